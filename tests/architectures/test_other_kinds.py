"""Encoders, vision models and encoder-decoders, each through whole runs of all that it learns.

docs/architectures.md says what became of each. `python tests/architectures/test_other_kinds.py` writes its sections
anew, and with names of types behind it only their lines.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[1])])

from tables import table, words_of, write_lines
from tiny import make_data
from tiny_encoders import make_encoder
from tiny_pictures import make_pictures, make_vision
from tiny_seq2seq import make_seq2seq
from whole_runs import DTYPES, Lesson, outcome

WORDS = ("red", "green", "blue")
TEXTS = [{"text": f"{WORDS[n % 3]} {n}", "label": WORDS[n % 3]} for n in range(36)]
TAGS = [{"tokens": ["is", WORDS[n % 3], str(n)], "tags": ["no", WORDS[n % 3], "no"]} for n in range(36)]
PAIRS = [{"anchor": f"{n} {WORDS[n % 3]}", "positive": f"it is {WORDS[n % 3]} {n}"} for n in range(36)]
ANSWERS = [{"prompt": f"{n} {WORDS[n % 3]}", "completion": f"is {WORDS[n % 3]}"} for n in range(36)]


@dataclass(frozen=True)
class Kind:
    """A kind of models: a section of the page.

    Args:
        types: that are tried.
        make: a tiny model of a type, in a folder.
        lessons: what it learns, from data written into a folder.
        sample: a type whose first lesson is tried by itself, in fp32.
    """

    section: str
    types: tuple[str, ...]
    make: Callable[[Path, str], Path]
    lessons: Callable[[Path], list[Lesson]]
    sample: str


def _of_texts(folder: Path) -> list[Lesson]:
    classify = {"objective": "classify"}
    return [
        Lesson("classify", make_data(folder / "texts.jsonl", TEXTS), classify),
        Lesson("label tokens", make_data(folder / "tags.jsonl", TAGS), classify),
        Lesson("embed", make_data(folder / "pairs.jsonl", PAIRS), {"objective": "embed", "pooling": "mean"}),
    ]


def _of_pictures(folder: Path) -> list[Lesson]:
    return [Lesson("classify", make_pictures(folder / "pictures", each=12), {"objective": "classify"})]


def _of_prompts(folder: Path) -> list[Lesson]:
    return [Lesson("answer prompts", make_data(folder / "prompts.jsonl", ANSWERS))]


KINDS = (
    Kind(
        "Encoders",
        (
            "albert",
            "bert",
            "big_bird",
            "camembert",
            "convbert",
            "deberta",
            "deberta-v2",
            "distilbert",
            "electra",
            "ernie",
            "esm",
            "eurobert",
            "funnel",
            "gte",
            "ibert",
            "jina_embeddings_v3",
            "mobilebert",
            "modernbert",
            "mpnet",
            "nomic_bert",
            "rembert",
            "roberta",
            "roformer",
            "squeezebert",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
        make_encoder,
        _of_texts,
        "bert",
    ),
    Kind(
        "Vision models",
        (
            "beit",
            "clip",
            "convnext",
            "data2vec-vision",
            "deit",
            "dinov2",
            "dinov2_with_registers",
            "hiera",
            "ijepa",
            "metaclip_2",
            "resnet",
            "segformer",
            "siglip",
            "siglip2",
            "swin",
            "swinv2",
            "vit",
            "vit_msn",
        ),
        make_vision,
        _of_pictures,
        "vit",
    ),
    Kind(
        "Encoder-decoders",
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "fsmt",
            "led",
            "longt5",
            "m2m_100",
            "marian",
            "mbart",
            "mt5",
            "mvp",
            "nllb-moe",
            "pegasus",
            "pegasus_x",
            "plbart",
            "prophetnet",
            "switch_transformers",
            "t5",
            "t5gemma",
            "umt5",
        ),
        make_seq2seq,
        _of_prompts,
        "t5",
    ),
)


def line_of(kind: Kind, model_type: str, folder: Path, lessons: int = 9, dtypes: Sequence[str] = DTYPES) -> list[str]:
    """The cells of a type's line, of so many of its lessons."""
    try:
        model = kind.make(folder / "model", model_type)
    except Exception as error:  # whatever a class of transformers raises for sizes that are not its own
        return [*[""] * 4, f"cannot be built small: {words_of(error)}", *[""] * 4]
    return outcome(model, kind.lessons(folder)[:lessons], folder / "runs", dtypes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.section)
def test_the_section_has_every_type(kind: Kind) -> None:
    written = table(kind.section)
    assert sorted(written) == sorted(kind.types), "run: python tests/architectures/test_other_kinds.py"
    assert not [cells for cells in written.values() if any(bad in " ".join(cells) for bad in ("crash:", "wrong:"))]


SLOW = pytest.mark.slow
SAMPLES = [pytest.param(kind, marks=() if kind.sample == "vit" else SLOW, id=kind.sample) for kind in KINDS]


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_is_as_the_table_says(kind: Kind, tmp_path: Path) -> None:
    """One lesson, in fp32: the line without the others."""
    tasks, *found = line_of(kind, kind.sample, tmp_path, lessons=1, dtypes=("fp32",))
    written, *cells = table(kind.section)[kind.sample]
    assert written.split(", ")[0] == tasks and found == [*cells[:4], *cells[5:]]


@SLOW
@pytest.mark.parametrize(("kind", "each"), [(kind, each) for kind in KINDS for each in kind.types])
def test_every_type_is_as_the_table_says(kind: Kind, each: str, tmp_path: Path) -> None:
    assert line_of(kind, each, tmp_path) == table(kind.section)[each]


if __name__ == "__main__":
    for kind in KINDS:
        for each in [each for each in sys.argv[1:] or kind.types if each in kind.types]:
            with tempfile.TemporaryDirectory() as folder:
                cells = line_of(kind, each, Path(folder))
            print(each, *cells, sep=" | ", flush=True)
            write_lines(kind.section, {each: cells})
