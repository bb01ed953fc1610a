"""Groups of what is done with a model or run that is there: compared, evaluated, answered, merged, exported, served.

How one is trained, planned and quantised is in groups.py.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from nybble.errors import ConfigError
from nybble.options.groups import CalibrationOptions, LengthOptions, PathOptions
from nybble.options.option import Folder, Name, Options, Seed, Sources, knob, one_or_more, split_names

NEW_FOLDER: Any = {"description": "Folder to write; it must not exist, or be empty.", "aliases": ("output_dir",)}


class RoundingOptions(CalibrationOptions):
    """How merged weights go back into four bits."""

    quality: Literal["absmax", "search", "calibrated"] = knob(
        "calibrated",
        "How scales and levels of a model in nf4 are chosen, as in train. calibrated: on the run's training rows.",
    )


class ComparisonOptions(Options, group="Comparison"):
    arms: Annotated[tuple[Name, ...], BeforeValidator(split_names)] = knob(
        ("nf4:absmax", "nf4:search", "nf4:calibrated"),
        "What to compare with the 16-bit model: format:quality pairs; where rows have pictures format:quality:towers, "
        "not given nf4:absmax of language, vision and all.",
    )
    eval_tokens: int = knob(16384, "Held-out tokens to compare on.", ge=64)
    out: Folder | None = knob(None, "Folder for quality.json and quality.png; neither is written if not given.")


class ComparedLength(LengthOptions):
    """How long each method trains."""

    max_steps: int = knob(30, "Optimizer steps of each method, over the same rows in the same order.", ge=2)


class ComparedMethods(Options, group="Comparison"):
    methods: Annotated[tuple[Name, ...], BeforeValidator(split_names)] = knob(
        ("full", "lora", "nf4:absmax", "nf4:calibrated"),
        "What to compare, in this order: full, lora, and QLoRA as format:quality pairs.",
    )
    lr: float = knob(2e-4, "Peak learning rate of adapters.", gt=0, aliases=("learning_rate",))
    full_lr: float = knob(2e-5, "Peak learning rate of full fine-tuning; usually a tenth of that of adapters.", gt=0)
    out: Folder = knob(
        ..., "Folder of the comparison and of its runs. What is finished there stays: the same command goes on."
    )


class OpenedRun(Options, group="Run"):
    run: Folder = knob(..., "Run folder that `nybble train` made.", aliases=("adapter",))


class EvaluationOptions(OpenedRun, group="Evaluation"):
    data: Sources | None = knob(None, "Held-out examples; the run's own validation rows if not given.")
    metric: Literal["auto", "exact", "f1", "number", "none"] = knob(
        "auto", "How answers are compared with their references. auto: as the references allow. none: no answers."
    )
    answers: int = knob(16, "Rows that are answered.", ge=1)
    lm_eval: Name | None = knob(None, "Tasks of lm-eval (names or .yaml files), separated by commas, to run too.")


class AnsweringModel(Options, group="Chat"):
    """A run, or a model that is none."""

    run: Folder | None = knob(None, "Run folder that `nybble train` made.", aliases=("adapter",))
    model: Name | None = knob(None, "Model without a run, such as a merged one: what --model of `nybble train` takes.")

    @model_validator(mode="after")
    def _run_or_model(self) -> Self:
        if (self.run is None) == (self.model is None):
            raise ConfigError(
                "run is not given." if self.run is None else "run and model are both given.",
                "Either the folder of a training run, or the name of a model.",
                "Add --run RUN or --model MODEL, and only one of them.",
            )
        return self


class AnswerOptions(Options, group="Chat"):
    system: Name | None = knob(None, "System message that conversations begin with.", aliases=("system_prompt",))
    prompt: Name | None = knob(None, "Answer this one prompt and stop; without it, chat.")
    max_new_tokens: int = knob(256, "Most tokens in an answer.", ge=1, aliases=("max_tokens", "max_length"))
    temperature: float = knob(0.0, "Randomness of the answers; 0 always takes the likeliest token.", ge=0)
    top_p: float = knob(1.0, "Sample among the likeliest tokens that make up this probability.", gt=0, le=1)
    top_k: int = knob(0, "Sample among so many likeliest tokens; 0 among all.", ge=0)
    seed: Seed = knob(0, "Seed of the sampling.")


class ChatOptions(AnswerOptions):
    image: Annotated[tuple[Name, ...], BeforeValidator(one_or_more)] = knob(
        (), "File of a picture that the first message shows; given again, further ones.", aliases=("images",)
    )


class MergeOptions(Options, group="Run"):
    """How an adapter goes into its base, and what that is verified on."""

    onto: Literal["auto", "original", "dequantized"] = knob(
        "auto",
        "Base that the adapter is merged onto: its original weights, or the four bits that were trained on. "
        "auto: the latter, except where the result is in four bits.",
    )
    data: Sources | None = knob(None, "Held-out examples to verify on; the run's own validation rows if not given.")
    verify_positions: int = knob(1000, "Held-out tokens at which the artefact is compared with the run.", ge=1)


class MergedRun(MergeOptions, OpenedRun):
    """A run whose adapter goes into its base."""


AdapterMethod = Literal["cat", "linear", "ties", "dare_linear", "dare_ties"]


class MergedInputs(MergeOptions):
    """A run, or adapters that one is made of."""

    run: Folder | None = knob(None, "Run folder that `nybble train` made.", aliases=("adapter",))
    adapters: Annotated[tuple[Name, ...], BeforeValidator(split_names)] = knob(
        (), "Instead of a run: adapters on one base, nybble's or PEFT's, to make one adapter of."
    )
    weights: Annotated[tuple[float, ...], BeforeValidator(split_names)] = knob(
        (), "With --adapters: how much each counts; each 1 / their number if not given."
    )
    method: AdapterMethod = knob(
        "cat",
        "With --adapters: cat adds them exactly, the ranks too; the others add A and B of one rank entry by entry, "
        "ties and dare some of these.",
        aliases=("combination_type",),
    )
    density: float = knob(0.5, "With --method ties or dare: part of the entries that is kept.", gt=0, le=1)
    seed: Seed = knob(0, "With --method dare: seed of the entries that are kept.")

    @model_validator(mode="after")
    def _run_or_adapters(self) -> Self:
        if (self.run is None) != bool(self.adapters):
            raise ConfigError(
                "run is not given." if self.run is None else "run and adapters are both given.",
                "Either the folder of a training run, or adapters to make one of.",
                "Add --run RUN or --adapters A,B, and only one of them.",
            )
        if len(self.adapters) == 1 or (self.weights and len(self.weights) != len(self.adapters)):
            raise ConfigError(
                f"adapters are {len(self.adapters)}, weights {len(self.weights)}.",
                "Two adapters or more, and a weight for each where weights are given.",
                "Name as many weights as adapters.",
            )
        both = ("onto", "data", "verify_positions") if self.adapters else ("weights", "method", "density", "seed")
        if unused := [name for name in both if name in self.model_fields_set]:
            of = "a merge into a base: with --run" if self.adapters else "several adapters: with --adapters"
            raise ConfigError(f"{unused[0]} is given.", f"--{unused[0].replace('_', '-')} is of {of}.", "Leave it out.")
        return self


class LoadedOptions(PathOptions):
    """How a model is loaded for a training loop of one's own."""

    keep: Literal["nothing", "attention", "everything"] = knob(
        "nothing", "What each block keeps for its backward pass; the rest is computed again."
    )
    quality: Literal["absmax", "search"] = knob("absmax", "How scales and levels are chosen, as in train.")


class SynthOptions(Options, group="Model"):
    shape: Literal[
        "llama-2-70b",
        "llama-65b",
        "llama-3-8b",
        "mixtral-8x7b",
        "qwen3-30b-a3b",
        "qwen3-30b-a3b-8-layers",
        "llama-3.2-1b",
        "smollm2-360m",
        "smollm2-135m",
        "tiny",
    ] = knob(..., "Model whose shape to take.")
    out: Folder = knob(..., **NEW_FOLDER)
    seed: Seed = knob(0, "Seed of the weights.")


class OutputOptions(Options, group="Output"):
    out: Folder = knob(..., **NEW_FOLDER)


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


class ExportOutput(OutputOptions):
    to: ArtefactKind = knob(..., "Form: an adapter for PEFT or for llama.cpp (gguf-lora), or a merged model.")
    gguf_type: GgufType = knob(GgufType.F16, "Block type of a GGUF model's matrices.")


class MergeOutput(Options, group="Output"):
    out: Folder | None = knob(None, **NEW_FOLDER)
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
        return self


class PushOptions(Options, group="Hub"):
    private: bool = knob(False, "Make the repository private, where there is none yet; a public one is refused.")
    revision: Name | None = knob(
        None, "Branch that the files go to, made where there is none; main if not given.", aliases=("branch",)
    )
    dry_run: bool = knob(False, "List the files and their bytes, and send nothing.")


class ServerOptions(Options, group="Server"):
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
    image_hosts: Name | None = knob(
        None, "Hosts, separated by commas, that pictures of requests may be fetched from; none unless given."
    )
    max_queue: int = knob(32, "Requests that may wait or run; more are refused with 429.", ge=1)
    max_request_bytes: int = knob(1_000_000, "Bytes a request may have; larger ones are refused with 413.", ge=1)
