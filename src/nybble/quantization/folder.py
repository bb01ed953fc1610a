"""A model source as a folder: in 16 bits, or in four (`nybble quantize`), written block by block.

    absmax       each weight by itself, bitsandbytes' bytes
    search       each weight by itself, scales searched (nybble.calibration.search)
    calibrated   each weight in the light of what its inputs are (nybble.calibration.feedback)

Finished blocks are kept beside the output (nybble.quantization.partial), so that an interrupted run goes on where it
stopped and ends with the same bytes.
"""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.calibration.feedback import FeedbackOptions
from nybble.calibration.search import check_searchable, round_weight
from nybble.errors import ModelError
from nybble.events import Listener, Note, silent, tracked
from nybble.files.disk import disk_errors
from nybble.files.manifest import write_manifest
from nybble.formats.bnb import quantization_config, refused_by_transformers
from nybble.formats.quant_spec import BaseFormats
from nybble.formats.quantized_stack import QuantizedStack, stored_tensors
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import SafetensorsWriter, check_output_free, staged_folder, tensor_sha256
from nybble.layers.convert import TOWERS, is_linear
from nybble.layers.streamed import expert_name
from nybble.options.groups import DENSE_SHARE
from nybble.quantization.blocks import BlockCalibrator, weight_report
from nybble.quantization.partial import LayerReport, PartialFolder
from nybble.sources.inventory import take_inventory
from nybble.sources.parts import Inventory, check_dense_share
from nybble.sources.sentences import write_pooling
from nybble.sources.stored_model import StoredModel
from nybble.sources.task import reads_pictures
from nybble.sources.tokenizer import save_tokenizer

Rounding = Literal["absmax", "search", "calibrated"]
# what transformers 4 has beside `rope_scaling`, the last of them in it too
_OWN_ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
STATES_EVERY_S = 30.0  # hidden states are kept no more often: they are large, and blocks since then are quickly redone


@dataclass(frozen=True)
class CalibrationInput:
    """What calibrated weights are made with.

    Args:
        windows: int64 `(windows, tokens)`, the calibration text.
        compute_dtype: of the hidden states and products.
        options: of the error feedback.
    """

    windows: Tensor
    compute_dtype: torch.dtype
    options: FeedbackOptions = field(default_factory=FeedbackOptions)


@dataclass(frozen=True)
class QuantizedFolder:
    """What was written.

    Args:
        reports: of the linears, block by block; none for absmax, which there is nothing to compare with.
        inventory: what is in four bits, and what is not.
    """

    reports: list[LayerReport]
    inventory: Inventory


def quantize_folder(
    source: StoredModel,
    formats: BaseFormats,
    out: Path,
    max_shard_bytes: int = 5_000_000_000,
    *,
    rounding: Rounding = "absmax",
    calibration: CalibrationInput | None = None,
    max_dense_share: float = DENSE_SHARE,
    what: str = "quantizing",
    report: Listener = silent,
) -> QuantizedFolder:
    """Write the source to `out` with the linears of its blocks in four bits; `out` appears complete or not at all.

    Formats that bitsandbytes has are stored as it stores them: transformers loads the folder where it is installed.
    Others are stored with nybble's own keys, and refused by transformers. Matrices outside the blocks are kept in 16
    bits, norms and biases as they are. A manifest vouches for every file.

    Args:
        formats: of the linears of the blocks.
        out: a new or empty folder.
        calibration: for rounding "calibrated".
        max_dense_share: of the weights of the blocks, what may stay in 16 bits.
        what: this work is called where its progress is reported, block by block.

    Raises:
        ModelError: `out` is taken or cannot be written, the source is damaged or already in four bits, or too much of
            it is in no linear layer.
        FormatError: a format whose scales cannot be searched.
        WalkError: calibrated weights of a model whose layers cannot be run one by one.
    """
    if source.quant_spec is not None:
        raise ModelError(
            f"{source.name} is already quantised ({source.quant_spec.format}).",
            "Allowed: a model in 16 or 32 bits; quantising twice loses quality each time.",
            "Use it as it is, or start from the 16-bit model.",
        )
    for format in formats.names if rounding != "absmax" else ():
        check_searchable(format)
    check_output_free(out)
    inventory = take_inventory(source.skeleton)
    check_dense_share(inventory, source.name, max_dense_share)
    calibrator = None
    if rounding == "calibrated":
        assert calibration is not None
        windows, dtype = calibration.windows, calibration.compute_dtype
        calibrator = BlockCalibrator(source, formats, windows, dtype, calibration.options)
    with disk_errors(out):
        partial = PartialFolder(out, _work(source, formats, rounding, calibration))
        if calibrator is not None:
            _make_calibrated(calibrator, partial, what, report)
        else:
            _make_blocks(source, formats, rounding, partial, what, report)
        _assemble(source, formats, out, partial, max_shard_bytes)
        reports = [report for block in source.blocks for report in partial.reports(block)]
        partial.remove()
    if rounding == "calibrated" and (fallen := _fallen_back(source, reports)):
        report(Note(f"not calibrated, but searched, for too few of the text's tokens reached them: {fallen}"))
    return QuantizedFolder(reports, inventory)


def _fallen_back(source: StoredModel, reports: Sequence[LayerReport]) -> str:
    """Experts that were not calibrated, by name: `model.layers.3.mlp.experts.down_proj: 7, 12; ..`."""
    numbers: dict[str, list[str]] = {}
    for each in reports:
        stack, _, number = each.name.rpartition(".")
        if stack in source.experts and each.method == "search":
            numbers.setdefault(stack, []).append(number)
    return "; ".join(f"{stack}: {', '.join(found)}" for stack, found in numbers.items())


def _work(
    source: StoredModel, formats: BaseFormats, rounding: Rounding, calibration: CalibrationInput | None
) -> dict[str, object]:
    """All that decides the result."""
    work: dict[str, object] = {"source": source.fingerprint(), "quality": rounding, "formats": asdict(formats)}
    if calibration is not None and rounding == "calibrated":
        work["windows"] = tensor_sha256(calibration.windows)
        work["compute_dtype"] = str(calibration.compute_dtype)
        work["options"] = asdict(calibration.options)
    return work


def _make_blocks(
    source: StoredModel, formats: BaseFormats, rounding: Rounding, partial: PartialFolder, what: str, report: Listener
) -> None:
    """Every block that is not there yet, each weight by itself."""
    for block in tracked(source.blocks, what, report):
        if partial.load(block) is not None:
            continue
        stored: dict[str, Tensor] = {}
        reports: list[LayerReport] = []
        for target in source.placements:
            if target in source.in_few_bits and target.startswith(f"{block}."):
                stored |= _rounded(source, target, formats, rounding, reports)
        partial.save(block, stored, reports)


def _rounded(
    source: StoredModel, target: str, formats: BaseFormats, rounding: Rounding, reports: list[LayerReport]
) -> dict[str, Tensor]:
    """What to store for a parameter, rounded without data; how it came to be is added to the reports."""
    layer = target.removesuffix(".weight")
    spec, shape = formats.of(layer), source.experts.get(target)

    def put(name: str, weight: Tensor | QuantizedTensor) -> QuantizedTensor:
        assert isinstance(weight, Tensor)
        q = round_weight(weight, spec, rounding)
        if rounding != "absmax":
            reports.append(weight_report(name, rounding, weight, q))
        return q

    if shape is None:
        return stored_tensors(target, put(layer, source.read_linear(layer)))
    experts = (put(expert_name(target, index), source.read_expert(target, index)) for index in range(shape.num))
    return stored_tensors(target, QuantizedStack.of(experts, shape.num))


def _make_calibrated(calibrator: BlockCalibrator, partial: PartialFolder, what: str, report: Listener) -> None:
    """Every block from the last hidden states that were kept."""
    kept = partial.load_states()
    first = 0 if kept is None else kept[0]
    if kept is not None:
        calibrator.walk.states = kept[1]["states"]
        calibrator.walk.exact = kept[1].get("exact")
    last_kept = time.monotonic()
    for index, block in tracked(list(enumerate(calibrator.blocks))[first:], what, report):
        weights, reports = calibrator.run(index)
        stored = {name: part for target, q in weights.items() for name, part in stored_tensors(target, q).items()}
        partial.save(block, stored, reports)
        if time.monotonic() - last_kept > STATES_EVERY_S:
            walk = calibrator.walk
            exact = {} if walk.exact is None else {"exact": walk.exact}
            partial.save_states(index + 1, {"states": walk.states} | exact)
            last_kept = time.monotonic()


def _assemble(
    source: StoredModel, formats: BaseFormats, out: Path, partial: PartialFolder, max_shard_bytes: int
) -> None:
    """The folder from the finished blocks and from what stays in 16 bits."""
    linears = source.in_few_bits
    with staged_folder(out) as staging:
        with SafetensorsWriter(staging, max_shard_bytes) as writer:
            for block in source.blocks:
                stored = partial.load(block)
                assert stored is not None, block
                for name, part in sorted(stored.items()):
                    writer.write(name, part)
            for target in source.placements:
                if target not in linears:
                    writer.write(target, source.written(target))

        modules = source.skeleton.named_modules()
        kept = [n for n, module in modules if is_linear(module) and f"{n}.weight" not in linears]
        quantization = quantization_config(formats, source.dense_dtype, kept, stacks=bool(source.experts))
        _save_settings(source, source.load_tokenizer(), staging, quantization)
        write_manifest(staging, {"base": source.fingerprint(), "formats": sorted(formats.names)})


def save_dense_folder(
    source: StoredModel, out: Path, max_shard_bytes: int = 5_000_000_000, *, report: Listener = silent
) -> None:
    """Write the source to `out` in 16 bits, norms and biases as they are; `out` appears complete or not at all.

    Args:
        source: none of its tensors is in four bits.
        out: a new or empty folder.
        report: told which tensor is written.

    Raises:
        ModelError: `out` is taken or cannot be written, or the source is damaged.
    """
    with disk_errors(out), staged_folder(out) as staging:
        tokenizer = source.load_tokenizer()
        with SafetensorsWriter(staging, max_shard_bytes) as writer:
            for target in tracked(list(source.placements), "writing", report):
                writer.write(target, source.written(target))
        _save_settings(source, tokenizer, staging)


def save_config(config: PretrainedConfig, folder: Path) -> None:
    """Write config.json as transformers 4 and 5 both read it; they refuse the folder where only nybble reads its
    weights.
    """
    config.save_pretrained(folder)
    file = folder / "config.json"
    content = _for_transformers_4(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(refused_by_transformers(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _for_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """The config with transformers 4's keys beside those that transformers 5 has in their place, its parts too.

    Where the attention of layers differs, `rope_parameters` holds one entry for each kind of it; transformers 4 has
    Gemma 3's keys for that.
    """
    config = {key: _for_transformers_4(part) if isinstance(part, dict) else part for key, part in config.items()}
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not rope:
        return config
    if "sliding_attention" in rope:
        if rope["full_attention"].get("rope_type") == "proportional":  # Gemma 4's, which transformers 4 does not know
            return config
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config |= {key: rope[key] for key in _OWN_ROPE_KEYS if key in rope}
    if rope.get("rope_type") == "longrope":  # of which it takes these three and no others
        config["rope_scaling"] = {"type": "longrope", **{key: rope[key] for key in ("short_factor", "long_factor")}}
    elif rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key not in _OWN_ROPE_KEYS[:2]}
    return config


def _save_settings(
    source: StoredModel, tokenizer: PreTrainedTokenizerBase, folder: Path, quantization: dict[str, Any] | None = None
) -> None:
    """Config, generation config and tokenizer beside the weights."""
    config = copy.deepcopy(source.config)
    config.architectures = [type(source.skeleton).__name__]
    vars(config).pop(TOWERS, None)  # nybble's own
    config.dtype = source.dense_dtype
    if quantization is not None:
        config.quantization_config = quantization
    save_config(config, folder)
    if not reads_pictures(config):
        source.load_generation_config().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    source.save_processor(folder)
    if source.task.kind == "states" and source.pooling is not None:
        write_pooling(folder, source.pooling, config.get_text_config().hidden_size, source.text_length)
