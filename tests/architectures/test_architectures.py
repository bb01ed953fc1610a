"""Every causal architecture of transformers: trained as the model is, or refused in words.

docs/architectures.md says what became of each. `python tests/architectures/test_architectures.py` writes its section of
decoders anew, and with names of types behind it only their lines.
"""

import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent))

from smoke import DTYPES, Wrong, train_in
from tables import table, words_of, write_lines
from tiny_models import all_types, tiny_model
from transformers import logging

from nybble.errors import ModelError, NybbleError
from nybble.layers.backbone import decoder_states
from nybble.layers.causal_lm import CausalLM
from nybble.layers.convert import adapters_of, attach_adapters, resolve_targets
from nybble.layers.own_head import loss_head
from nybble.runs.adapter_writing import adapter_config

SECTION = "Decoders"
SAMPLE = ("llama", "gemma3_text", "mamba")
BAD = ("crash", "wrong")


def outcome(model_type: str) -> list[str]:
    """Path, rows, what became of it in each dtype, and in PEFT: the cells of a line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tiny_model(model_type).save_pretrained(folder)
        except Exception as error:  # whatever a class of transformers raises for its own default config
            return ["", "", f"cannot be built small: {words_of(error)}", "", ""]
        path, rows, peft, said = "", "", "", []
        for name, dtype in DTYPES.items():
            out = Path(folder) / name
            out.mkdir()
            try:
                trained = train_in(Path(folder), dtype, out)
            except NybbleError as error:
                said.append(f"refused: {words_of(error)}".replace(folder, "it"))
            except Wrong as error:
                said.append(f"wrong: {error}")
            except Exception as error:  # the table shows it, and the test fails on it
                last = traceback.extract_tb(error.__traceback__)[-1]
                said.append(f"crash: {type(error).__name__}: {words_of(error)} ({Path(last.filename).name})")
            else:
                path, rows, peft = trained.path, trained.rows, trained.peft
                said.append("trains")
        return [path, rows, *said, peft]


def test_the_table_has_every_type() -> None:
    assert sorted(table(SECTION)) == all_types(), "run: python tests/architectures/test_architectures.py"


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_trains_as_the_model_is(model_type: str) -> None:
    assert outcome(model_type)[2:4] == ["trains", "trains"]


def test_layers_with_the_names_of_merged_experts_are_where_peft_leaves_them() -> None:
    model = tiny_model("deepseek_v3")
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=2, alpha=4.0, dropout=0.1)
    config = adapter_config(model, "base")
    expected = adapters_of(model).keys()
    peft = get_peft_model(tiny_model("deepseek_v3"), LoraConfig(**config | {"inference_mode": False}))
    found = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert any("shared_experts.gate_proj" in name for name in expected) and found == expected


@pytest.mark.parametrize("model_type", ["llama4_text", "modernbert-decoder"])
def test_the_decoder_is_what_has_the_embedding(model_type: str) -> None:
    """transformers' own lookups give the whole model for the one, and the output matrix for the other."""
    model = tiny_model(model_type).eval()
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        states = decoder_states(model, ids, torch.arange(7)[None])
        assert torch.allclose(loss_head(model).logits(states[0]), model(input_ids=ids).logits[0], atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("git", "fails over a text"), ("reformer", "fails over a text"), ("prophetnet", "last states alone")],
)
def test_what_cannot_be_asked_is_refused_in_words(model_type: str, words: str) -> None:
    model = tiny_model(model_type)
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=2, alpha=4.0)
    with pytest.raises(ModelError, match=words):
        CausalLM.of(model)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", all_types())
def test_every_type_is_as_the_table_says(model_type: str) -> None:
    found = outcome(model_type)
    assert not any(cell.startswith(BAD) for cell in found), found
    assert found == table(SECTION)[model_type]


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for each in sys.argv[1:] or all_types():
        lines = outcome(each)
        print(each, *lines, sep=" | ", flush=True)
        write_lines(SECTION, {each: lines})
