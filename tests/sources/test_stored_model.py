"""A place of weights that is defined here, and everything that takes a stored model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.options.option import with_options
from nybble.options.verbs import load_config
from nybble.planning.micro_batches import even_micro_batches
from nybble.planning.request import plan_run
from nybble.quantization.folder import CalibrationInput, quantize_folder
from nybble.quantization.sensitivity import measure_formats
from nybble.sizes import SHAPE_RULES
from nybble.sources import stored_model
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.stored_model import StoredModel

CPU = torch.device("cpu")
FAMILIES = ["llama", "gpt2"]  # linears of both layouts, ends tied and not
WINDOWS = torch.randint(160, (6, 16), generator=torch.Generator().manual_seed(1))


class MemoryModel(StoredModel):
    """A model whose tensors are in a dict: what a new place of weights must answer, and no more."""

    dense_dtype = torch.bfloat16

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.name, self.config, self._tokenizer = "in memory", model.config, tokenizer
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def fingerprint(self) -> str:
        return "in memory"

    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()


@pytest.fixture(params=FAMILIES)
def stored(request: pytest.FixtureRequest, make_folder) -> tuple[MemoryModel, Path, PreTrainedModel]:
    """The same model in memory, in a folder and as transformers has it."""
    folder, model = make_folder(request.param, torch.bfloat16)
    return MemoryModel(model, AutoTokenizer.from_pretrained(folder)), folder, model


def test_it_is_loaded_as_a_folder_is(stored: tuple[MemoryModel, Path, PreTrainedModel]) -> None:
    source, folder, _ = stored
    for formats in (BaseFormats(), None):
        ours, theirs = (load_model(each, formats, torch.float32) for each in (source, open_model(str(folder))))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("rounding", ["absmax", "search", "calibrated"])
def test_it_is_quantised_as_a_folder_is(stored, tmp_path: Path, rounding: str) -> None:
    source, folder, _ = stored
    written = []
    for name, each in (("ours", source), ("theirs", open_model(str(folder)))):
        calibration = CalibrationInput(WINDOWS, torch.float32)
        done = quantize_folder(each, BaseFormats(), tmp_path / name, rounding=rounding, calibration=calibration)
        written.append((load_file(tmp_path / name / "model.safetensors"), {each.name: each for each in done.reports}))
    (ours, our_reports), (theirs, their_reports) = written
    assert ours.keys() == theirs.keys() and our_reports == their_reports
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    four = open_model(str(tmp_path / "ours"))
    assert four.made_from == "in memory" and four.in_four_bits == set(source.linears) and source.in_four_bits is None


def test_a_run_on_it_is_planned(stored, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one skeleton, and not read from the disk while it trains, since it is on none."""
    source, folder, _ = stored
    built = []
    build = stored_model.build_skeleton
    monkeypatch.setattr(
        stored_model, "build_skeleton", lambda *given, **more: built.append(given) or build(*given, **more)
    )
    config = load_config(None, {"model": "in memory", "data": str(data), "out": str(folder / "run")})
    memory = config.memory

    def even(size: int):
        return even_micro_batches(
            32, rows_per_step=memory.rows_per_step, size=size, packed=memory.packing, rules=SHAPE_RULES["cpu"]
        )

    plans, _ = plan_run(config, source, None, even, torch.float32, CPU)
    streamed, _ = plan_run(with_options(config, stream_base="always"), source, None, even, torch.float32, CPU)
    assert plans.chosen is not None and plans.chosen.resident_blocks is None
    assert streamed.chosen is None
    assert source.linears and source.blocks and source.ends and source.placements
    assert len(built) == 1


def test_formats_of_its_layers_are_measured(stored) -> None:
    source, _, _ = stored
    found = measure_formats(source, 3.6, QuantSpec(), WINDOWS, torch.float32, CPU)
    assert list(found.formats.layers) == source.linears and found.bits <= 3.6


def test_weights_of_linears_are_out_by_in_whatever_their_layer_keeps(stored) -> None:
    source, _, model = stored
    for name in source.linears:
        linear, weight = model.get_submodule(name), source.read_linear(name)
        kept = linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight
        assert torch.equal(weight, kept) and torch.equal(source.turned(name, weight), linear.weight)


def test_loading_leaves_the_skeleton_as_it_was(stored) -> None:
    source, _, _ = stored
    before = {name: type(module) for name, module in source.skeleton.named_modules()}
    load_model(source, BaseFormats(), torch.float32)
    assert {name: type(module) for name, module in source.skeleton.named_modules()} == before
    assert all(tensor.is_meta for tensor in source.skeleton.state_dict().values())


def test_what_it_cannot_do_it_says(stored) -> None:
    source, _, _ = stored
    assert source.embedding_rows([1, 2]) is None and not source.is_streamable and source.without_lattice() is source
    assert source.licence is None and source.made_from is None and source.files == ()
