"""Is the artefact the tuned model that scores texts? Asked as `verify.py` asks language models.

Held-out texts are scored by the run, and each text alone by the artefact in its consumer: PEFT on the run's base, or
transformers on the folder with the tokenizer that lies beside it.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.picture_files import decode
from nybble.data.picture_rows import PictureProcessor, PictureRow
from nybble.data.text_rows import TextRow, texts_of
from nybble.errors import ExportError
from nybble.evaluation.classes import scored_model, scores_of
from nybble.events import Listener, silent
from nybble.exporting.consumers import CPU, base_of_adapters, widen
from nybble.exporting.verify import Check, Verification, not_loaded
from nybble.layers.scored import own_scores
from nybble.options.use_groups import ArtefactKind
from nybble.runs.open_run import OpenRun, load_tuned
from nybble.sources.processor import load_processor
from nybble.sources.skeleton import auto_class
from nybble.sources.tokenizer import load_tokenizer

MOST_ROWS = 200
SAME_CLASS = 0.99  # of the texts, or labelled tokens, but for one
DISTANCE = 0.05  # of scores from the run's, relative: what rounding to 16 bits may come to
FORMS = (ArtefactKind.PEFT, ArtefactKind.DENSE)


def check_form(opened: OpenRun, kind: ArtefactKind) -> None:
    """Refuse forms that hold language models alone.

    Raises:
        ExportError: it is one.
    """
    if kind not in FORMS:
        raise ExportError(
            f"--to {kind} is for language models that are decoders alone; the run in {opened.run.path} is "
            f"{opened.source.task.words}.",
            f"Allowed for it: {', '.join(FORMS)}.",
            "Use `nybble merge`, which writes a folder that transformers opens.",
        )


def verify_scores(
    opened: OpenRun, kind: ArtefactKind, folder: Path, rows: Sequence[EncodedExample], report: Listener = silent
) -> Verification:
    """Score held-out texts with the run and with the artefact, and compare."""
    texts = texts_of(rows[:MOST_ROWS])
    model = load_tuned(opened, torch.float32, CPU, report)
    wanted = torch.cat(scores_of(scored_model(opened, model), texts))
    del model
    gc.collect()  # modules refer to each other, and the next model needs the room
    try:
        name, artefact, tokenizer = _load(opened, kind, folder, report)
        with torch.no_grad():
            found = torch.cat([_scores_alone(artefact, row, tokenizer) for row in texts])
    except Exception as error:  # whatever the consumer raises, the artefact is then not verified
        return not_loaded(kind, error)
    several = opened.source.task.problem == "multi_label_classification"
    chosen = [_chosen(scores, paired=len(texts) > len(rows), several=several) for scores in (wanted, found)]
    agree = (chosen[0] == chosen[1]).all(1).double()
    return _compare(opened, name, (wanted, found), agree, artefact, tokenizer)


def _load(opened: OpenRun, kind: ArtefactKind, folder: Path, report: Listener) -> tuple[str, Any, Any]:
    pictures = opened.source.task.kind == "pictures"
    tokenizer = load_processor(str(folder), opened.source.skeleton) if pictures else load_tokenizer(str(folder))
    if kind is ArtefactKind.DENSE:
        loaded = auto_class(opened.source.task).from_pretrained(folder, dtype=torch.float32)
        return "transformers", loaded.eval(), tokenizer
    from peft import PeftModel

    base = base_of_adapters(opened, torch.float32, report)
    widen(base)
    return "PEFT on the run's base, widened", PeftModel.from_pretrained(base.float(), folder).eval(), tokenizer


def _scores_alone(model: Any, row: TextRow, tokenizer: Any) -> Tensor:
    if isinstance(row, PictureRow):
        scores: Tensor = model(pixel_values=tokenizer.pixels([decode(row.picture, row.origin).image])).logits
        return scores
    ids = row.input_ids.long()[None]
    types = None if row.token_types is None else row.token_types.long()[None]
    scores = own_scores(model, ids, torch.ones_like(ids), types).float()
    return scores if scores.ndim == 2 else scores[0, row.places]


def same_tokens(opened: OpenRun, tokenizer: Any) -> Check:
    """Whether the artefact's tokenizer, or image processor, reads texts or pictures as the run's does."""
    theirs: Any = opened.template.tokenizer
    if isinstance(tokenizer, PictureProcessor):
        from PIL import Image

        picture = [Image.radial_gradient("L").convert("RGB")]
        name, equal = "pixels of pictures", torch.equal(tokenizer.pixels(picture), theirs.pixels(picture))
    else:
        probes = ("A text.", "naïve café, 東京", "1 + 1 = 2\n")
        name = "tokens of texts"
        equal = all(tokenizer(text)["input_ids"] == theirs(text)["input_ids"] for text in probes)
    return Check(name, "the run's" if equal else "others", "the run's", equal)


def _chosen(scores: Tensor, paired: bool, several: bool) -> Tensor:
    """`(N, K)`: the class of each text, or labelled token, with the highest score, or all those that are likelier than
    not; or which of each pair's answers has more.
    """
    if several:
        return scores > 0
    return (scores.view(-1, 2) if paired else scores).argmax(1, keepdim=True)


def _compare(
    opened: OpenRun, consumer: str, scores: tuple[Tensor, Tensor], agree: Tensor, artefact: Any, tokenizer: Any
) -> Verification:
    wanted, found = scores
    distance = float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
    same, what = agree.mean().item(), "class" if len(agree) == len(wanted) else "answer"  # of pairs the preferred one
    differing, allowed = round((1 - same) * len(agree)), int((1 - SAME_CLASS) * len(agree)) + 1
    labels = [artefact.config.id2label[number] for number in range(len(opened.source.task.labels))]
    named = labels == list(opened.source.task.labels)
    checks = [
        Check(
            f"same {what} as the tuned model",
            f"{differing} of {len(agree)} differ",
            f"at most {allowed}",
            differing <= allowed,
        ),
        Check(
            "scores", f"{distance:.2g} from the tuned model's", f"at most {DISTANCE}, relative", distance <= DISTANCE
        ),
        same_tokens(opened, tokenizer),
        Check("names of the scores", ", ".join(map(str, labels[:5])), "the run's", named),
    ]
    return Verification(consumer, {"texts": len(wanted), f"same_{what}": same, "score_distance": distance}, checks)
