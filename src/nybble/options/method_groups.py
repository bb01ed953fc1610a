"""What is fine-tuned of a model, as groups.py declares the other options; and what means nothing under a method."""

from collections.abc import Collection, Mapping
from typing import Literal

from nybble.options.adapter_groups import AdapterOptions
from nybble.options.groups import DenseShareOptions, FourBitOptions, QualityOptions
from nybble.options.option import Options, knob

Method = Literal["qlora", "lora", "full"]


class MethodOptions(Options, group="Method"):
    """Which weights are trained, over which base."""

    method: Literal["auto", "qlora", "lora", "full"] = knob(
        "qlora",
        "What is trained. qlora: adapters over a base in few bits. lora: adapters over a base in 16 bits. full: every "
        "weight, without adapters. auto: the first of full, lora, qlora that fits into --memory; without that, of the "
        "last two.",
        aliases=("finetuning_type", "tuning_type", "train_type", "tuner_type", "full_finetuning", "load_in_4bit"),
    )


_FEW_BITS = frozenset({**FourBitOptions.model_fields, **DenseShareOptions.model_fields, **QualityOptions.model_fields})
MEANINGLESS: Mapping[Method, frozenset[str]] = {  # options that a method has no use for
    "qlora": frozenset(),
    "lora": _FEW_BITS,
    "full": _FEW_BITS | AdapterOptions.model_fields.keys() | {"lora_plus_ratio", "whole_blocks"},
}
IMPOSSIBLE: Mapping[Method, Mapping[str, Collection[str]]] = {  # values that a method has no way for
    "qlora": {"format": ("none",)},
    "lora": {"stream_base": ("always",), "init": ("loftq", "activation", "pissa", "olora")},
    "full": {"stream_base": ("always",), "reference": ("step",)},
}
WHY: Mapping[Method, str] = {
    "qlora": "--method qlora trains adapters over a base in few bits.",
    "lora": "--method lora trains adapters over a base that stays in 16 bits, and in memory.",
    "full": "--method full trains every weight, in memory; there are no adapters, and no bits to choose.",
}
