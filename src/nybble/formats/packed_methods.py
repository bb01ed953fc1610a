"""What the `quantization_config` of a folder means: which layout its weights have, and which modules it leaves out.

One function for each `quant_method`. Every field is looked at: one that is not known here, or has a value that is not,
is refused by name, since it might change what the weights stand for.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from nybble.errors import FormatError
from nybble.formats import awq, fp8, gptq, integer_groups, llm_int8, mxfp4, nvfp4
from nybble.formats.packed_layout import PackedLayout

EVERY_LINEAR = "Linear"  # as compressed-tensors names what a group of its config is for
NOT_UNDERSTOOD = "Start from the 16-bit model."
GPTQ_HISTORY = (  # how the codes were found, and what runs them: nothing about what they stand for
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment",
    "damp_percent", "dataset", "disable_exllama", "exllama_config", "lm_head", "max_input_length", "meta", "method",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "mse", "pad_token_id", "static_groups", "sym", "tokenizer", "true_sequential",
    "use_cuda_fp16", "use_exllama",
)  # fmt: skip
INT8_HISTORY = (  # how layers were run, and what eight bits do not use
    "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_threshold",
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """How a folder's config says that its weights are stored.

    Args:
        method: its quant_method.
        layouts: names of modules, or EVERY_LINEAR -> how their weights are stored.
        kept: names of modules that stay in 16 bits; names as `names_module` takes them.
    """

    method: str
    layouts: tuple[tuple[tuple[str, ...], PackedLayout], ...]
    kept: tuple[str, ...] = ()

    def layout_of(self, module: str) -> PackedLayout | None:
        """How a module's weight is stored; None where the config says nothing of it."""
        named = [layout for names, layout in self.layouts if any(names_module(name, module) for name in names)]
        others = [layout for names, layout in self.layouts if EVERY_LINEAR in names]
        return next(iter(named + others), None)


def packing_from_config(config: Mapping[str, Any]) -> Packing | None:
    """How a config.json says that weights are stored; None where its quant_method is none of those here.

    Raises:
        FormatError: names the field that is not understood.
    """
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if isinstance(quantization, Mapping) and quantization.get("load_in_8bit") is True:
        method = "bitsandbytes"  # older configs name no method
    elif method == "bitsandbytes":
        return None  # four bits: kept as they are, see bnb.py
    if not isinstance(method, str) or method not in METHODS:
        return None
    fields = _Fields(method, quantization)
    packing = METHODS[method](fields)
    fields.finish()
    return packing


def names_module(pattern: str, module: str) -> bool:
    """Whether an entry of a config's list means a module: a name, the beginning or end of one, wildcards, or a regular
    expression after `re:`.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if "*" in pattern:
        return fnmatchcase(module, pattern)
    return f".{module}.".startswith(f".{pattern}.") or module.endswith(f".{pattern}")


class _Fields:
    """A config's fields: each is taken once, and what is left over is refused by name."""

    def __init__(self, method: str, values: Any):
        self.method, self.where = method, "quantization_config"
        self._left: dict[str, Any] = dict(values)
        self._left.pop("quant_method", None)

    def has(self, key: str) -> bool:
        return key in self._left

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._left))

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """A field's value; refused where it is none of these."""
        value = self.take(key, default)
        if not any(value == each and type(value) is type(each) for each in allowed):
            self.refuse(f"{key} = {value!r:.200}", f"Readable: {', '.join(map(repr, allowed))}.")
        return value

    def count(self, key: str, default: Any = None, *, or_row: bool = False) -> int:
        """A positive integer; with `or_row` -1 too, for whole rows."""
        value = self.take(key, default)
        if type(value) is not int or not (value > 0 or (or_row and value == -1)):
            self.refuse(f"{key} = {value!r:.200}", "Needed: a positive integer" + (", or -1." if or_row else "."))
        return value

    def names(self, *keys: str) -> tuple[str, ...]:
        """The names that lists under these keys hold."""
        found: list[str] = []
        for key in keys:
            value = self.take(key) or []
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                self.refuse(f"{key} = {value!r:.200}", "Needed: a list of names.")
            found += value
        for name in found:
            self._check_expression(name)
        return tuple(found)

    def pair(self, key: str, default: Any = None) -> tuple[int, int] | None:
        """Two positive integers, or None."""
        value = self.take(key, default)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
            self.refuse(f"{key} = {value!r:.200}", "Needed: two positive integers.")
        return value[0], value[1]

    def part(self, key: str, where: str) -> "_Fields":
        """The fields of an object within."""
        value = self.take(key)
        if not isinstance(value, Mapping):
            self.refuse(f"{key} = {value!r:.200}", "Needed: an object.")
        inner = _Fields(self.method, value)
        inner.where = where
        return inner

    def unused(self, *keys: str) -> None:
        """Take fields that say nothing about the weights."""
        for key in keys:
            self.take(key)

    def absent(self, *keys: str) -> None:
        """Fields that change what weights stand for, unless they are empty."""
        for key in keys:
            if value := self.take(key):
                self.refuse(f"{key} = {value!r:.200}", "Readable: without it.")

    def finish(self) -> None:
        if self._left:
            key, value = next(iter(self._left.items()))
            self.refuse(f"{key} = {value!r:.200}, which is not understood", "Every field must be.")

    def refuse(self, what: str, allowed: str) -> NoReturn:
        raise FormatError(f"{self.where} of {self.method} has {what}.", allowed, NOT_UNDERSTOOD)

    def _check_expression(self, name: str) -> None:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            self.refuse(f"the expression {name!r:.200}: {error}", "Needed: regular expressions after re:.")


def _gptq(fields: _Fields) -> Packing:
    bits = fields.one_of("bits", gptq.BITS)
    group_size = fields.count("group_size", or_row=True)
    ordered = fields.one_of("desc_act", (True, False), False)
    named = {fields.one_of(key, ("gptq", "gptq_v2"), "gptq") for key in ("checkpoint_format", "format")}
    fields.one_of("pack_dtype", ("int32",), "int32")
    fields.absent("dynamic", "is_marlin_format", "rotation", "adapter")
    fields.unused(*GPTQ_HISTORY)
    layout = gptq.layout(bits, group_size, ordered, first_version="gptq_v2" not in named)
    return Packing("gptq", _all(layout))


def _awq(fields: _Fields) -> Packing:
    fields.one_of("bits" if fields.has("bits") else "w_bit", (awq.BITS,))
    group_size = fields.count("group_size" if fields.has("group_size") else "q_group_size", or_row=True)
    fields.one_of("zero_point", (True,), True)
    for key in ("version", "format"):
        fields.one_of(key, ("gemm", "GEMM"), "gemm")
    fields.unused("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "lm_head", "modules_to_fuse")
    return Packing("awq", _all(awq.layout(group_size)), fields.names("modules_to_not_convert"))


def _fp8(fields: _Fields) -> Packing:
    block = fields.pair("weight_block_size")
    fields.one_of("fmt", ("e4m3", "e5m2"), "e4m3")
    fields.one_of("scale_fmt", ("float", "ue8m0"), "float")
    fields.one_of("expert_dtype", ("fp8",), "fp8")
    fields.absent("modules_to_convert")
    fields.unused("activation_scheme", "dequantize", "kv_cache_scheme")
    layout = fp8.layout(".weight_scale_inv", block, aliases=None if block else {".weight_scale": ".weight_scale_inv"})
    return Packing("fp8", _all(layout), fields.names("modules_to_not_convert", "ignored_layers"))


def _fbgemm_fp8(fields: _Fields) -> Packing:
    fields.unused("activation_scale_ub")
    layout = fp8.layout(".weight_scale", None, per_row=True)
    return Packing("fbgemm_fp8", _all(layout), fields.names("modules_to_not_convert"))


def _int8(fields: _Fields) -> Packing:
    fields.one_of("load_in_8bit", (True,))
    fields.absent("load_in_4bit", "llm_int8_has_fp16_weight")
    fields.unused(*INT8_HISTORY)
    return Packing("bitsandbytes", _all(llm_int8.layout()), fields.names("llm_int8_skip_modules"))


def _mxfp4(fields: _Fields) -> Packing:
    fields.unused("dequantize")
    return Packing("mxfp4", _all(mxfp4.experts_layout()), fields.names("modules_to_not_convert"))


def _modelopt(fields: _Fields) -> Packing:
    layouts: dict[str, Callable[[], PackedLayout]] = {
        "NVFP4": nvfp4.modelopt_layout,
        "W4A16_NVFP4": nvfp4.modelopt_layout,
        "FP8": lambda: fp8.layout(".weight_scale", None),
        "FP8_PER_CHANNEL_PER_TOKEN": lambda: fp8.layout(".weight_scale", None, per_row=True),
    }
    algorithm = fields.one_of("quant_algo", tuple(layouts))
    if algorithm.endswith("NVFP4"):
        fields.one_of("group_size", (nvfp4.BLOCK_SIZE,), nvfp4.BLOCK_SIZE)
    fields.absent("quantized_layers", "has_zero_point", "pre_quant_scale")
    fields.unused("config_groups", "kv_cache_quant_algo", "kv_cache_scheme", "producer", "group_size")
    return Packing("modelopt", _all(layouts[algorithm]()), fields.names("ignore", "exclude_modules"))


def _compressed_tensors(fields: _Fields) -> Packing:
    format = fields.take("format")
    fields.one_of("quantization_status", ("compressed",), "compressed")
    fields.absent("transform_config", "moe_sparsity_config")
    if fields.take("sparsity_config") not in (None, {}, {"format": "dense"}):
        fields.refuse("a sparsity_config", "Readable: without it.")
    fields.unused("dequantize", "global_compression_ratio", "kv_cache_scheme", "run_compressed", "version")
    groups = fields.part("config_groups", "quantization_config.config_groups")
    layouts = []
    for name in groups:
        group = groups.part(name, f"{groups.where}.{name}")
        targets = group.names("targets") or (EVERY_LINEAR,)
        group.unused("input_activations", "output_activations")
        own_format = group.take("format") or format
        weights = group.part("weights", f"{group.where}.weights")
        layouts.append((targets, _compressed_layout(weights, own_format)))
        group.finish()
    if not layouts:
        fields.refuse("no config_groups", "Needed: how weights are stored.")
    return Packing("compressed-tensors", tuple(layouts), fields.names("ignore"))


def _compressed_layout(fields: _Fields, format: str) -> PackedLayout:
    """Of one group of a compressed-tensors config."""
    bits, kind = fields.count("num_bits", 8), fields.one_of("type", ("int", "float"), "int")
    symmetric = fields.one_of("symmetric", (True, False), True)
    strategy, group_size, block = fields.take("strategy"), fields.take("group_size"), fields.pair("block_structure")
    fields.absent("dynamic")
    fields.unused("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    fields.finish()
    strategy = strategy or ("tensor" if group_size is None else "channel" if group_size == -1 else "group")
    if format == "nvfp4-pack-quantized" and (kind, bits, group_size) == ("float", 4, nvfp4.BLOCK_SIZE) and symmetric:
        return nvfp4.compressed_layout()
    if format == "mxfp4-pack-quantized" and (kind, bits, group_size) == ("float", 4, mxfp4.BLOCK_SIZE) and symmetric:
        return mxfp4.compressed_layout()
    is_grouped = type(group_size) is int and group_size > 0
    if format in ("float-quantized", "naive-quantized") and kind == "float" and bits == 8 and symmetric:
        if strategy in ("tensor", "channel"):
            return fp8.layout(".weight_scale", None, per_row=strategy == "channel")
        if strategy == "block" and block is not None:
            return fp8.layout(".weight_scale", block)
        if strategy == "group" and is_grouped:
            return fp8.layout(".weight_scale", (1, group_size))
    is_packed = format == "pack-quantized" and bits in integer_groups.PACKED_BITS
    is_plain = format in ("int-quantized", "naive-quantized") and bits <= 8
    is_shared = strategy in ("tensor", "channel") or (strategy == "group" and is_grouped)
    if kind == "int" and is_shared and (is_packed or is_plain):
        return integer_groups.layout(bits, strategy, group_size, symmetric, is_packed)
    what = f"{kind} of {bits} bits, symmetric={symmetric}, strategy={strategy!r}, group_size={group_size!r}"
    fields.refuse(
        f"{what}, as {format!r}",
        f"Readable: pack-quantized (int, {', '.join(map(str, integer_groups.PACKED_BITS))} bits), int-quantized, "
        "float-quantized (fp8), naive-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized.",
    )


def _all(layout: PackedLayout) -> tuple[tuple[tuple[str, ...], PackedLayout], ...]:
    return (((EVERY_LINEAR,), layout),)


METHODS: dict[str, Callable[[_Fields], Packing]] = {
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _int8,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
