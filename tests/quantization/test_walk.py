"""Walking a model block by block against its own forward, and calibrated blocks against the others."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nybble.calibration.feedback import FeedbackOptions
from nybble.errors import ModelError
from nybble.formats.quant_spec import BaseFormats
from nybble.layers.convert import quantizable_linears
from nybble.quantization.blocks import BlockCalibrator
from nybble.quantization.folder import CalibrationInput, quantize_folder
from nybble.quantization.walk import ModuleWalk, PackedWalk, WalkError, start_walk
from nybble.sources.load import load_model
from nybble.sources.open import open_model

WINDOWS = torch.randint(160, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fp32_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """States that nothing is lost of between two blocks, to compare a walk with a model's forward closely."""
    monkeypatch.setattr("nybble.quantization.walk.STATES_DTYPE", torch.float32)


def inputs_of_linears(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """What each linear of the blocks gets in transformers' own forward, (rows, in)."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.setdefault(name, []).append(arguments[0].flatten(0, -2))
        )
        for name in quantizable_linears(model)
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def make_walk(model: nn.Module, kind: type, exact: bool = False):
    blocks = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    return PackedWalk(model, WINDOWS, exact) if kind is PackedWalk else ModuleWalk(model, WINDOWS, exact, blocks)


CASES = [
    ("llama", PackedWalk),
    ("qwen2", PackedWalk),
    ("qwen3", PackedWalk),
    ("mistral", PackedWalk),
    ("llama", ModuleWalk),
    ("qwen3", ModuleWalk),
    ("gpt2", ModuleWalk),
]


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.usefixtures("fp32_states")
@torch.no_grad()
def test_statistics_and_states_are_those_of_the_models_own_forward(make_folder, family: str, kind: type) -> None:
    folder, _ = make_folder(family)
    model = load_model(open_model(str(folder)), None, torch.float32)
    expected = inputs_of_linears(model, WINDOWS)
    last = model.base_model(input_ids=WINDOWS, output_hidden_states=True).hidden_states
    walk = make_walk(model, kind, exact=True)
    blocks = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    prefix = next(iter(expected)).split(".0.")[0]
    seen = set()
    for index, layer in enumerate(blocks):
        torch.testing.assert_close(walk.states.flatten(0, -2), last[index].flatten(0, 1), rtol=1e-4, atol=1e-4)
        for group, statistics in walk.groups(index, layer):
            hessian = statistics.finish()
            assert set(statistics.drifts) == set(group)
            for leaf in group:
                x = expected[f"{prefix}.{index}.{leaf}"]
                assert statistics.rows == len(x) == WINDOWS.numel()
                h = x.double().T @ x.double() / len(x)
                torch.testing.assert_close(hessian.double(), h, rtol=1e-3, atol=1e-3 * float(h.abs().max()))
                assert float(statistics.drifts[leaf].abs().max()) < 1e-4 * float(h.abs().max())  # nothing is quantised
                seen.add(f"{prefix}.{index}.{leaf}")
    assert seen == set(expected)
    assert not any(model.get_submodule(name)._forward_hooks for name in expected)


@torch.no_grad()
def test_states_between_blocks_take_two_bytes_and_lose_no_more_than_that(make_folder) -> None:
    folder, _ = make_folder("llama")
    model = load_model(open_model(str(folder)), None, torch.float32)
    walk = make_walk(model, PackedWalk, exact=True)
    for index, layer in enumerate(model.model.layers):
        for _ in walk.groups(index, layer):
            pass
    last = []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))
    model(WINDOWS)
    assert walk.states.dtype == walk.exact.dtype == torch.bfloat16
    lost = (walk.states.float() - last[0].flatten(0, 1)).norm() / last[0].norm()
    assert 0 < float(lost) < 0.01


@pytest.mark.usefixtures("fp32_states")
@torch.no_grad()
def test_exact_states_are_carried_for_every_second_chunk(make_folder, monkeypatch) -> None:
    """The statistics of the chunks' inputs stay those of all; the drift is that of the chunks that have it."""
    monkeypatch.setattr("nybble.quantization.walk.CALIBRATION_TOKENS", 24)
    folder, _ = make_folder("llama")
    model = load_model(open_model(str(folder)), None, torch.float32)
    walk = make_walk(model, PackedWalk, exact=True)
    embedded = model.model.embed_tokens(WINDOWS)
    assert torch.equal(walk.exact, embedded[::2].flatten(0, 1))
    walk.exact += 0.1 * torch.randn(walk.exact.shape, generator=torch.Generator().manual_seed(2))
    layer = model.model.layers[0]
    exact, x = layer.input_layernorm(walk.exact), layer.input_layernorm(embedded.flatten(0, 1))
    _, statistics = next(walk.groups(0, layer))
    carried = layer.input_layernorm(embedded[::2]).flatten(0, 1)
    torch.testing.assert_close(statistics.finish(), x.T @ x / 120, rtol=1e-3, atol=1e-4)
    for leaf in ("q_proj", "k_proj", "v_proj"):
        drift = carried.T @ (exact - carried) @ layer.self_attn.get_submodule(leaf).weight.T / 72
        torch.testing.assert_close(statistics.drifts[f"self_attn.{leaf}"], drift, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_inputs_that_there_is_no_room_for_are_computed_twice(make_folder, monkeypatch) -> None:
    """With room for all, for some and for none of them, statistics and states are the same to the bit."""
    monkeypatch.setattr("nybble.quantization.walk.CALIBRATION_TOKENS", 24)
    folder, _ = make_folder("llama")
    found = []
    for room in (1 << 27, 30_000, 0):
        monkeypatch.setattr("nybble.quantization.walk.CALIBRATION_KEPT_BYTES", room)
        model = load_model(open_model(str(folder)), None, torch.float32)
        walk = make_walk(model, PackedWalk, exact=True)
        walk.exact += 0.1
        grams = [statistics.gram for _, statistics in walk.groups(0, model.model.layers[0])]
        found.append([*grams, walk.states, walk.exact])
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@torch.no_grad()
def test_linears_that_share_an_input_share_their_statistics(make_folder) -> None:
    folder, _ = make_folder("llama")
    model = load_model(open_model(str(folder)), None, torch.float32)
    for kind in (PackedWalk, ModuleWalk):
        groups = [group for group, _ in make_walk(model, kind).groups(0, model.model.layers[0])]
        assert [tuple(name.split(".")[1] for name in group) for group in groups] == [
            ("q_proj", "k_proj", "v_proj"),
            ("o_proj",),
            ("gate_proj", "up_proj"),
            ("down_proj",),
        ]


def test_decoder_blocks_are_chosen_where_they_know_the_model(make_folder) -> None:
    for family, kind in (("llama", PackedWalk), ("gpt2", ModuleWalk)):
        folder, _ = make_folder(family)
        model = load_model(open_model(str(folder)), None, torch.float32)
        blocks = model.base_model.layers if family == "llama" else model.base_model.h
        assert type(start_walk(model, WINDOWS, False, blocks)) is kind


@pytest.mark.usefixtures("fp32_states")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_block_sees_the_quantised_ones_before_it(make_folder, family: str) -> None:
    """Block 1's inputs are those of the model whose block 0 is quantised."""
    folder, _ = make_folder(family)
    source = open_model(str(folder))
    calibrator = BlockCalibrator(source, BaseFormats(), WINDOWS, torch.float32)
    weights, reports = calibrator.run(0)
    model = load_model(source, BaseFormats(), torch.float32)
    for target, q in weights.items():
        model.get_submodule(target.removesuffix(".weight")).load_quantized(q)
    with torch.no_grad():
        states = model.base_model(input_ids=WINDOWS, output_hidden_states=True).hidden_states
        exact = load_model(source, None, torch.float32).base_model(input_ids=WINDOWS, output_hidden_states=True)
    walk = calibrator.walk
    torch.testing.assert_close(walk.states.flatten(0, -2), states[1].flatten(0, 1), rtol=1e-4, atol=1e-4)
    # the five short windows are one chunk of PackedWalk, and ModuleWalk carries every second
    carried = exact.hidden_states[1] if family == "llama" else exact.hidden_states[1][::2]
    torch.testing.assert_close(walk.exact.flatten(0, -2), carried.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert {report.method for report in reports} == {"calibrated"}
    assert len(reports) == len(weights) == (7 if family == "llama" else 4)


def test_calibrated_moves_the_output_less_than_search_and_absmax(make_folder, tmp_path: Path) -> None:
    """On inputs that the calibration never saw; the model is random, so that only its layers' outputs mean anything."""
    folder, dense = make_folder("llama")
    windows = torch.randint(160, (64, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = dense.base_model(input_ids=WINDOWS).last_hidden_state
    lost = {}
    for rounding in ("absmax", "search", "calibrated"):
        out = tmp_path / rounding
        calibration = CalibrationInput(windows, torch.float32)
        quantize_folder(open_model(str(folder)), BaseFormats(), out, rounding=rounding, calibration=calibration)
        model = load_model(open_model(str(out)), None, torch.float32)
        with torch.no_grad():
            lost[rounding] = float((model.base_model(input_ids=WINDOWS).last_hidden_state - expected).norm())
    assert lost["calibrated"] < lost["search"] < lost["absmax"]


def calibrated(folder: Path, out: Path) -> None:
    calibration = CalibrationInput(WINDOWS, torch.float32)
    quantize_folder(open_model(str(folder)), BaseFormats(), out, rounding="calibrated", calibration=calibration)


def test_a_model_that_cannot_be_walked_is_not_put_into_four_bits_in_another_way(
    make_folder, tmp_path: Path, monkeypatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise WalkError("its layers are a maze")

    folder, _ = make_folder("llama")
    monkeypatch.setattr("nybble.quantization.blocks.start_walk", refuse)
    with pytest.raises(ModelError, match=r"(?s)cannot be calibrated: its layers are a maze.*--quality absmax"):
        calibrated(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate"), MemoryError()])
def test_a_failed_allocation_is_no_reason_to_leave_calibrating_out(
    make_folder, tmp_path: Path, monkeypatch, error: Exception
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    folder, _ = make_folder("gpt2")
    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.GPT2Model.forward", fail)
    with pytest.raises(type(error)) as raised:
        calibrated(folder, tmp_path / "out")
    assert raised.value is error


@pytest.mark.parametrize("output", ["tensor", "tuple", "pair", "changed between"])
@torch.no_grad()
def test_layers_are_entered_whatever_form_their_output_has(output: str) -> None:
    """A model of each kind; one that changes the states between its layers cannot be walked."""

    class Layer(nn.Module):
        special = "of the layer"

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
            return (x + 1,) if output == "tuple" else x + 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.base_model = nn.ModuleList([Layer(), Layer()]), self.run

        def run(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            x = input_ids.float()[..., None].expand(*input_ids.shape, 2)
            for layer in self.layers:
                assert layer.special == "of the layer"
                y = layer(x)
                if output == "pair":
                    y, _ = y
                x = y[0] if output == "tuple" else y * 2 if output == "changed between" else y
            return x

    model = Model()
    layers = list(model.layers)
    if output in ("pair", "changed between"):
        with pytest.raises(WalkError, match="do not hand hidden states"):
            ModuleWalk(model, WINDOWS, False, model.layers)
    else:
        walk = ModuleWalk(model, WINDOWS, False, model.layers)
        assert torch.equal(walk.states[..., 0], WINDOWS.float())
    assert list(model.layers) == layers, "the layers are back in their places"


def test_dead_inputs_fall_back_to_search_and_are_listed(make_folder, tmp_path: Path) -> None:
    folder, dense = make_folder("llama")
    with torch.no_grad():
        dense.model.layers[1].input_layernorm.weight.zero_()
    dense.save_pretrained(folder)
    done = quantize_folder(
        open_model(str(folder)), BaseFormats(), tmp_path / "out",
        rounding="calibrated", calibration=CalibrationInput(WINDOWS, torch.float32),
    )  # fmt: skip
    dead = {report.name: report for report in done.reports if report.method == "search"}
    # v's outputs are zero too, so that o_proj gets nothing either
    assert {name.split(".")[-1] for name in dead} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(".layers.1." in name and "zero" in report.note for name, report in dead.items())


def test_options_reach_the_feedback(make_folder) -> None:
    folder, _ = make_folder("llama")
    source = open_model(str(folder))
    packed = []
    for options in (FeedbackOptions(), FeedbackOptions(shift=0.0), FeedbackOptions(damping=0.1)):
        calibrator = BlockCalibrator(source, BaseFormats(), WINDOWS, torch.float32, copy.copy(options))
        assert (calibrator.walk.exact is None) == (options.shift == 0)
        calibrator.run(0)
        packed.append(calibrator.run(1)[0]["model.layers.1.mlp.down_proj.weight"].packed)
    assert not torch.equal(packed[0], packed[1]) and not torch.equal(packed[0], packed[2])
