"""The options of each verb: which groups it takes, and what they say only together."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from nybble.errors import ConfigError
from nybble.options.groups import (
    AdapterInit,
    AdapterOptions,
    AdapterScaling,
    AdapterSizes,
    AnswerOptions,
    BaseFormat,
    CalibrationOptions,
    ComparisonOptions,
    ComputeOptions,
    DataOptions,
    DenseShareOptions,
    EvaluationOptions,
    ExportOptions,
    FourBitOptions,
    LengthOptions,
    LoopOptions,
    MachineOptions,
    MemoryOptions,
    MixedOptions,
    ModelOptions,
    OutputFormat,
    PlannedMachine,
    QualityOptions,
    RowOptions,
    RunOptions,
)
from nybble.options.option import (
    Folder,
    Name,
    Sources,
    build_options,
    config_to_yaml,
    knob,
    named_values,
    read_yaml,
)


def _check_mixed(mixed: float | None, format: str) -> None:
    if mixed is not None and format != "nf4":
        raise ConfigError(
            f"format is {format}, and mixed is {mixed:g}.",
            "--mixed chooses among nf4, nf3 and nf2 itself.",
            "Leave --format or --mixed out.",
        )


# Bases stand in reverse: the last one's options come first in help texts and YAML files.
class TrainConfig(
    MachineOptions,
    LoopOptions,
    MemoryOptions,
    AdapterOptions,
    QualityOptions,
    DenseShareOptions,
    FourBitOptions,
    BaseFormat,
    RunOptions,
    DataOptions,
    ModelOptions,
):
    """What `nybble train` needs to know."""

    @model_validator(mode="after")
    def _mixed_chooses_formats(self) -> Self:
        _check_mixed(self.mixed, self.format)
        return self


class PlanConfig(
    PlannedMachine,
    LengthOptions,
    MemoryOptions,
    AdapterInit,
    AdapterSizes,
    MixedOptions,
    DenseShareOptions,
    FourBitOptions,
    BaseFormat,
    RowOptions,
    ModelOptions,
):
    """What `nybble plan` needs to know."""

    group: ClassVar[str] = "Data"

    data: Sources | None = knob(
        None, "Examples whose lengths are planned for; without them every row has --max-seq-len tokens."
    )

    @model_validator(mode="after")
    def _mixed_chooses_formats(self) -> Self:
        _check_mixed(self.mixed, self.format)
        return self


class SynthConfig(FourBitOptions, OutputFormat):
    """What `nybble synth` needs to know."""

    group: ClassVar[str] = "Model"

    shape: Literal["llama-2-70b", "llama-65b", "llama-3-8b", "llama-3.2-1b", "smollm2-360m", "smollm2-135m", "tiny"] = (
        knob(..., "Model whose shape to take.")
    )
    out: Folder = knob(..., "Folder to write; it must not exist, or be empty.", aliases=("output_dir",))
    seed: int = knob(0, "Seed of the weights.", ge=0, le=2**32 - 1)


class QuantizeConfig(ComputeOptions, QualityOptions, DenseShareOptions, FourBitOptions, OutputFormat, ModelOptions):
    """What `nybble quantize` needs to know."""

    group: ClassVar[str] = "Output"

    out: Folder = knob(..., "Folder to write; it must not exist, or be empty.", aliases=("output_dir",))

    @model_validator(mode="after")
    def _mixed_chooses_formats(self) -> Self:
        _check_mixed(self.mixed, self.format)
        return self


class EvalQualityConfig(
    ComputeOptions,
    ComparisonOptions,
    CalibrationOptions,
    DenseShareOptions,
    FourBitOptions,
    DataOptions,
    ModelOptions,
):
    """What `nybble eval quality` needs to know."""


class DataConfig(DataOptions, ModelOptions):
    """What `nybble data check` needs to know."""


class EvalConfig(MachineOptions, EvaluationOptions):
    """What `nybble eval` needs to know."""


class ChatConfig(MachineOptions, AnswerOptions):
    """What `nybble chat` needs to know."""

    @model_validator(mode="after")
    def _run_or_model(self) -> Self:
        if (self.run is None) == (self.model is None):
            raise ConfigError(
                "run is not given." if self.run is None else "run and model are both given.",
                "Either the folder of a training run, or the name of a model.",
                "Add --run RUN or --model MODEL, and only one of them.",
            )
        return self


class OpenConfig(MachineOptions):
    """What `nybble.open_run` needs to know."""

    group: ClassVar[str] = "Run"

    run: Folder = knob(..., "Run folder that `nybble train` made.")


class LoadConfig(MachineOptions, DenseShareOptions, FourBitOptions, BaseFormat):
    """What `nybble.load` needs to know."""

    group: ClassVar[str] = "Memory"

    quality: Literal["absmax", "search"] = knob("absmax", "How scales and levels are chosen, as in train.")
    keep: Literal["nothing", "attention", "everything"] = knob(
        "nothing", "What each block keeps for its backward pass; the rest is computed again."
    )
    packing: bool = knob(True, "Rows of a batch lie side by side instead of being padded.")


class AttachConfig(AdapterScaling, AdapterSizes):
    """What `nybble.add_adapters` needs to know."""

    group: ClassVar[str] = "Adapters"

    seed: int = knob(0, "Seed of the adapters.", ge=0, le=2**32 - 1)


class StepConfig(MemoryOptions, LengthOptions):
    """What `TrainingData.steps` needs to know."""


class ServeConfig(MachineOptions):
    """What `nybble serve` needs to know."""

    group: ClassVar[str] = "Server"

    run: tuple[Folder, ...] = knob(
        ...,
        "Run folder that `nybble train` made; given again, further ones on the same base.",
        aliases=("adapter", "lora_modules"),
    )
    host: Name = knob("127.0.0.1", "Address to listen on. Anything but this machine's own needs --token.")
    port: int = knob(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    token: Name | None = knob(
        None, "What clients must send as their API key; NYBBLE_TOKEN in the environment hides it from other users."
    )
    allow_host: Name | None = knob(None, "Names, separated by commas, that clients may reach this server by.")
    max_new_tokens: int = knob(512, "Most tokens in an answer.", ge=1, aliases=("max_tokens",))
    max_queue: int = knob(32, "Requests that may wait or run; more are refused with 429.", ge=1)
    max_request_bytes: int = knob(1_000_000, "Bytes a request may have; larger ones are refused with 413.", ge=1)


class ArtefactKind(StrEnum):
    """What can be made of a run."""

    PEFT = "peft"
    DENSE = "16bit"
    FOUR_BIT = "nf4"
    GGUF = "gguf"
    GGUF_ADAPTER = "gguf-lora"

    @property
    def is_adapter(self) -> bool:
        """The adapter alone: nothing is merged."""
        return self in (ArtefactKind.PEFT, ArtefactKind.GGUF_ADAPTER)

    @property
    def is_rounded(self) -> bool:
        """Merged weights go back into four bits, as --quality says."""
        return self is ArtefactKind.FOUR_BIT


class GgufType(StrEnum):
    """How a GGUF file stores matrices; the gguf package has the same names in capitals."""

    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"

    @property
    def in_four_bits(self) -> bool:
        return self is GgufType.Q4_0


def _check_rounding(config: ExportOptions, rounds: bool) -> None:
    if config.calibrate is not None and not (rounds and config.quality == "calibrated"):
        raise ConfigError(
            f"calibrate is {config.calibrate!r}, and nothing is calibrated.",
            "Only --to nf4 with --quality calibrated, and --compare, use text.",
            "Leave --calibrate out, or use --to nf4 --quality calibrated.",
        )


class MergeConfig(ExportOptions):
    """What `nybble merge` needs to know."""

    group: ClassVar[str] = "Output"

    out: Folder | None = knob(None, "Folder to write; it must not exist, or be empty.", aliases=("output_dir",))
    to: Literal[ArtefactKind.DENSE, ArtefactKind.FOUR_BIT] = knob(ArtefactKind.DENSE, "Form of the merged model.")
    compare: bool = knob(False, "Only compare the ways to merge on the held-out rows, and write nothing.")

    @model_validator(mode="after")
    def _writes_or_compares(self) -> Self:
        if (self.out is None) != self.compare:
            raise ConfigError(
                "out is not given." if self.out is None else "out and compare are both given.",
                "Either --out FOLDER, or --compare, which writes nothing.",
                "Add one, or take the other away.",
            )
        _check_rounding(self, self.to.is_rounded or self.compare)
        return self


class ExportConfig(ExportOptions):
    """What `nybble export` needs to know."""

    group: ClassVar[str] = "Output"

    out: Folder = knob(..., "Folder to write; it must not exist, or be empty.", aliases=("output_dir",))
    to: ArtefactKind = knob(..., "Form: an adapter for PEFT or for llama.cpp (gguf-lora), or a merged model.")
    gguf_type: GgufType = knob(GgufType.F16, "Block type of a GGUF model's matrices.")

    @model_validator(mode="after")
    def _text_is_for_calibrating(self) -> Self:
        _check_rounding(self, self.to.is_rounded)
        return self


def load_config(path: Path | str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """The options of a training run: those of a YAML file, and `overrides` over them.

    Args:
        path: a YAML file whose keys are names of options, or None.
        overrides: names of options to values; strings are converted to each option's type.

    Raises:
        ConfigError: the file cannot be read, or a name or value is not allowed.
    """
    from_file = {} if path is None else read_yaml(Path(path))
    return build_options(TrainConfig, overrides, from_file, origin=str(path))


def draft_config(path: Path | str | None, overrides: Mapping[str, Any]) -> str:
    """`load_config` as commented YAML, in which required options that are not given are left to be filled in."""
    from_file = {} if path is None else read_yaml(Path(path))
    given = named_values(TrainConfig, from_file, str(path)) | named_values(TrainConfig, overrides, "")
    missing = [name for name, field in TrainConfig.model_fields.items() if field.is_required() and not given.get(name)]
    config = build_options(TrainConfig, {**overrides, **dict.fromkeys(missing, "-")}, from_file, origin=str(path))
    return config_to_yaml(config, to_fill_in=missing)
