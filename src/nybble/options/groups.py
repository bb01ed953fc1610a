"""Every option of nybble, declared once: name, type, default, bounds, meaning, group. Here those of how a model is
trained, planned and quantised; the run itself is in run_groups.py, what is minimised in objective_groups.py, what is
done with a model that is there in use_groups.py.

The command line's flags, the keys of a run's YAML file and the comments of `train --print-config` are generated from
the classes below; verbs.py says which verb takes which. An option's Python name `rows_per_step` is the flag
`--rows-per-step` and the YAML key `rows-per-step` (underscores are accepted there too). Options that belong together
are one small class, with a heading, its `group`; where a verb takes only some of them, these are a class that the other
extends. Options come in the order in which they are declared, those of a base first; of several bases, the last one's.
"""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, field_validator, model_validator

from nybble.cards import CARDS
from nybble.errors import ConfigError
from nybble.options.option import (
    AutoRate,
    BlockSize,
    Bytes,
    Interval,
    MomentBits,
    Name,
    Options,
    Seed,
    Sources,
    knob,
    nearest,
    split_names,
)

ComputeType = Literal["auto", "bf16", "fp32"]
Towers = Literal["language", "all"]
Device = Literal["auto", "cpu", "cuda", "xpu", "mps"]
DENSE_SHARE = 0.1  # of the weights of a model's blocks that may stay in 16 bits where it is called four-bit


class ModelOptions(Options, group="Model"):
    model: Name = knob(
        ...,
        "Base model: a Hugging Face folder or hub id, a .gguf file; or smollm2-135m-instruct, or all-minilm-l6-v2.",
        aliases=("base_model", "model_name_or_path", "model_id"),
    )
    tokenizer: Name | None = knob(
        None, "Folder or hub id of the tokenizer; the model's own if not given.", aliases=("tokenizer_name",)
    )
    revision: Name | None = knob(
        None,
        "Branch, tag or commit of a model on the hub; the newest if not given. A run keeps the commit that it got.",
        aliases=("model_revision", "revision_of_model"),
    )
    offline: bool = knob(
        False,
        "Fetch nothing: models, tokenizers and examples are on this machine, or in the hub's cache. HF_HUB_OFFLINE=1 "
        "says the same to the hub's client alone.",
        aliases=("local_files_only",),
    )


class AcceptOptions(Options, group="Data"):
    """What may be wrong with examples."""

    allow: Annotated[tuple[Name, ...], BeforeValidator(split_names)] = knob(
        (), "Findings of the audit to accept, by id, such as validation-leak; what they say then stops nothing."
    )


class RowOptions(AcceptOptions):
    """How examples are read."""

    validation_data: Sources | None = knob(
        None,
        "Held-out examples; a part of --data if not given. Given again: further ones.",
        aliases=("eval_file", "validation_file", "eval_data"),
    )
    validation_fraction: float = knob(
        0.05, "Part of --data held out for validation.", gt=0, lt=1, aliases=("val_set_size", "validation_split")
    )
    validation_rows: int = knob(512, "Most rows held out for validation.", ge=1, aliases=("max_eval_samples",))
    prompt_field: Name | None = knob(None, "Column that holds the prompt.", aliases=("instruction_field",))
    completion_field: Name | None = knob(None, "Column that holds the answer.", aliases=("response_field",))
    chosen_field: Name | None = knob(
        None, "Of pairs: column that holds the better answer.", aliases=("field_chosen", "chosen_column")
    )
    rejected_field: Name | None = knob(
        None, "Of pairs: column that holds the worse answer.", aliases=("field_rejected", "rejected_column")
    )
    messages_field: Name | None = knob(None, "Column that holds a conversation: a list of {role, content}.")
    text_field: Name | None = knob(
        None,
        "Column that holds plain text to continue, or to tell apart (two texts beside each other: premise,hypothesis).",
        aliases=("dataset_text_field",),
    )
    label_field: Name | None = knob(
        None, "classify, kto: column that holds the label.", aliases=("label_column", "label_column_name")
    )
    role: Annotated[tuple[Name, ...], BeforeValidator(split_names)] = knob(
        (), "A role that rows call otherwise, as OLD=NEW: narrator=assistant. Given again: further ones."
    )
    tools: Name | None = knob(None, "JSON file with a list of tools, for rows that bring none.")
    tool_calls: Literal["auto", "text"] = knob(
        "auto",
        "auto: calls that rows spell in their text (Hermes, Glaive, xLAM, ToolACE) are written as the chat template "
        "writes calls. text: they stay as they are.",
    )
    thinking: Literal["keep", "last", "drop"] = knob(
        "keep",
        "Which thinking of the assistant's rows keep. keep: all. last: that behind the last user's turn. drop: none.",
    )
    train_on: Literal["assistant", "last", "completion", "all"] = knob(
        "assistant",
        "What of a conversation is learnt. assistant: the assistant's turns. last: the last of them. completion: those "
        "behind the last user's turn. all: every token, prompts and results of tools too.",
    )
    template: Literal["auto", "none"] = knob(
        "auto",
        "auto: a chat template, the tokenizer's own unless --chat-template names another. none: prompt and completion "
        "strings stay bare.",
    )
    chat_template: Name | None = knob(
        None,
        "Chat template in place of the tokenizer's own: a Jinja file, or plain, chatml, llama3, gemma, phi, deepseek. "
        "The run keeps it, and chat, serve and export use it.",
        aliases=("jinja_template", "chat_template_jinja"),
    )
    max_seq_len: int = knob(
        1024,
        "Tokens a row may have; longer rows are cut at the end, counted and named.",
        ge=8,
        aliases=("max_length", "max_seq_length", "sequence_len", "cutoff_len"),
    )
    seed: Seed = knob(0, "Seed of the split, the order of rows, the adapters and dropout.")

    @model_validator(mode="after")
    def _one_template_or_none(self) -> Self:
        if self.chat_template is not None and self.template == "none":
            raise ConfigError(
                f"chat-template is {self.chat_template!r}, template is none.",
                "With --template none no chat template is used.",
                "Leave one of the two out.",
            )
        return self


class ExampleOptions(Options, group="Data"):
    data: Sources = knob(
        ...,
        "Examples: a JSONL, JSON, CSV, Parquet or text file (packed too), a folder, a pattern, a hub id, or "
        "builtin:pydoc; behind hub ids and folders #SPLIT. Given again: further ones, each with :WEIGHT or none.",
        aliases=("dataset", "train_file", "dataset_name", "training_data"),
    )


class DataOptions(RowOptions, ExampleOptions):
    """Which examples, and how they are read."""


class PlannedData(RowOptions):
    """Examples to plan for, where there are some."""

    data: Sources | None = knob(
        None, "Examples whose lengths are planned for; without them every row has --max-seq-len tokens."
    )


class BaseFormat(Options, group="Four bits"):
    """The formats a model can be trained on."""

    format: Literal["nf4", "fp4", "int4", "int4_asym", "nf3", "nf2", "stored", "none"] = knob(
        "nf4",
        "Format of the frozen weights; nf3 and nf2 take three and two bits. stored: a GGUF file's own blocks, or the "
        "bits a folder has. none: keep 16 bits.",
        aliases=("bnb_4bit_quant_type", "quant_type"),
    )


class ScaleOptions(Options, group="Four bits"):
    block_size: BlockSize = knob(
        64,
        "Consecutive weights that share one scale: 32 to 4096, a power of two.",
        aliases=("blocksize", "group_size"),
    )
    double_quant: bool = knob(
        True,
        "Store the scales in 8 bits too: 4.13 instead of 4.5 bits a weight.",
        aliases=("bnb_4bit_use_double_quant",),
    )


class FourBitOptions(ScaleOptions, BaseFormat):
    """What is made of a weight."""


class OutputFormat(FourBitOptions):
    """The formats a model can be written in."""

    format: Literal["nf4", "fp4", "int4", "int4_asym", "nf3", "nf2"] = knob(
        "nf4",
        "Format of the weights; nf3 and nf2 take three and two bits.",
        aliases=("bnb_4bit_quant_type", "quant_type"),
    )


class DenseShareOptions(Options, group="Four bits"):
    max_dense_share: float = knob(
        DENSE_SHARE,
        "Most of the blocks' weights that may stay in 16 bits, such as stacked experts; more is refused.",
        ge=0,
        le=1,
    )


class TowerOptions(Options, group="Four bits"):
    quantize_towers: Towers = knob(
        "language",
        "Parts of a vision-language model that are in four bits and get adapters where rows have pictures. language: "
        "its language model. all: the blocks of its vision tower too.",
    )


class WeightOptions(TowerOptions, DenseShareOptions, FourBitOptions):
    """The frozen weights of a model to train."""


class OutputWeights(DenseShareOptions, OutputFormat):
    """The weights of a model to write."""


class CalibrationOptions(Options, group="Four bits"):
    """What calibrated weights are made with."""

    calibrate: Name | None = knob(
        None,
        "Text (.txt, .md) or examples to calibrate on. Not given: train, merge and export take the training rows, "
        "others general text. A slice of general text is always mixed in.",
        aliases=("calibration_data", "calib_data"),
    )
    calibration_tokens: int = knob(
        32768, "Tokens to calibrate on.", ge=512, aliases=("nsamples", "num_calibration_samples")
    )


class MixedOptions(Options, group="Four bits"):
    mixed: float | None = knob(
        None,
        "Give each layer 4, 3 or 2 bits (nf4, nf3, nf2) so that this many bits a weight, scales included, lose least.",
        gt=2,
        lt=5,
        aliases=("average_bits",),
    )


class QualityOptions(MixedOptions, CalibrationOptions):
    """How weights are put into four bits."""

    quality: Literal["auto", "absmax", "search", "calibrated"] = knob(
        "auto",
        "How scales and levels are chosen, in the same bytes. absmax: by each block's largest magnitude, as "
        "bitsandbytes. search: by least error of the weights. calibrated: by least error of each layer's output on "
        "text. auto: train calibrates where that takes under a tenth of the training, quantize where --calibrate is "
        "given; else absmax.",
    )

    @model_validator(mode="after")
    def _text_is_for_calibrating(self) -> Self:
        if self.calibrate is not None and self.quality in ("absmax", "search") and self.mixed is None:
            raise ConfigError(
                f"calibrate is {self.calibrate!r}, quality is {self.quality}.",
                "Only calibrated weights and --mixed use text.",
                "Leave --calibrate out, or use --quality calibrated.",
            )
        return self


class BatchOptions(Options, group="Memory"):
    memory: Bytes | None = knob(
        None,
        "Most memory the run may take, such as 8GB or 8GiB: anonymous memory on a CPU. What is free, if not given.",
        aliases=("max_memory", "memory_budget"),
    )
    rows_per_step: int = knob(
        16,
        "Rows that make one optimizer step.",
        ge=1,
        aliases=("batch_size", "gradient_accumulation_steps", "train_batch_size"),
    )
    micro_batch_size: int | None = knob(
        None,
        "Rows computed at once; chosen to fit if not given. It changes memory and speed, not the result.",
        ge=1,
        aliases=("per_device_train_batch_size",),
    )

    @model_validator(mode="after")
    def _micro_batch_fits_in_step(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_size > self.rows_per_step:
            raise ConfigError(
                f"micro-batch-size is {self.micro_batch_size}, rows-per-step is {self.rows_per_step}.",
                "A step is made of whole micro-batches, so micro-batch-size is at most rows-per-step.",
                "Lower --micro-batch-size or raise --rows-per-step.",
            )
        return self


class PathOptions(Options, group="Memory"):
    packing: bool = knob(True, "Put rows side by side instead of padding them; the result is the same.")
    keep: Literal["auto", "nothing", "attention", "everything"] = knob(
        "auto",
        "What each block keeps for its backward pass; the rest is computed again. auto: the most that fits.",
        aliases=("gradient_checkpointing", "checkpointing"),
    )


class MemoryOptions(PathOptions, BatchOptions):
    whole_blocks: int | None = knob(
        None,
        "The last so many blocks keep everything, whatever the others do. On a GPU as many as fit if not given.",
        ge=0,
    )
    stream_base: Literal["auto", "never", "always"] = knob(
        "auto",
        "Read blocks of the base from its 4-bit folder when they are used. auto: only where it does not fit otherwise.",
        aliases=("cpu_offload", "offload_folder"),
    )
    offload_activations: Literal["auto", "never", "always"] = knob(
        "auto",
        "Keep what blocks keep in a file of the run folder. auto: only where it does not fit otherwise.",
        aliases=("activation_offloading",),
    )
    page_optimizer: Literal["auto", "never", "always"] = knob(
        "auto",
        "Keep the optimizer's state in a file of the run folder. auto: only where it does not fit otherwise.",
        aliases=("paged_optimizer", "paged_adamw"),
    )
    optimizer_bits: MomentBits = knob(
        32,
        "Bits of each of AdamW's two moments between steps; 8 are blocks of 256 codes that share a scale.",
        aliases=("optim_bits", "optim", "adamw_8bit"),
    )

    @model_validator(mode="after")
    def _whole_blocks_stay(self) -> Self:
        if self.whole_blocks and self.offload_activations == "always":
            raise ConfigError(
                f"whole-blocks is {self.whole_blocks}, offload-activations is always.",
                "What blocks keep either stays in memory or goes to a file.",
                "Leave one of the two out.",
            )
        return self


class LengthOptions(Options, group="Training"):
    max_steps: int | None = knob(None, "Stop after this many steps, whatever --epochs says.", ge=1)
    epochs: float = knob(1.0, "Passes over the training rows.", gt=0, aliases=("num_train_epochs", "num_epochs"))


class LoopOptions(LengthOptions):
    lr: AutoRate = knob(
        2e-4,
        "Peak learning rate. auto: what the model's width suggests, or in runs that are long enough the best of a few "
        "rates around it, tried in small runs that take a tenth of the steps.",
        aliases=("learning_rate",),
    )
    lora_plus_ratio: float = knob(
        1.0,
        "LoRA+: B learns at this many times --lr, A at --lr; embeddings' adapters stay at --lr.",
        ge=1,
        aliases=("loraplus_lr_ratio",),
    )
    schedule: Literal["constant", "cosine", "linear"] = knob(
        "cosine", "How the learning rate goes on after the warm-up.", aliases=("lr_scheduler_type", "lr_scheduler")
    )
    warmup: float = knob(
        0.03,
        "Warm-up: a fraction of all steps if below 1, else a number of steps.",
        ge=0,
        aliases=("warmup_ratio", "warmup_steps"),
    )
    weight_decay: float = knob(0.0, "AdamW's decoupled weight decay.", ge=0)
    beta1: float = knob(0.9, "AdamW's decay of the gradient's mean.", ge=0, lt=1, aliases=("adam_beta1",))
    beta2: float = knob(0.999, "AdamW's decay of the gradient's square.", ge=0, lt=1, aliases=("adam_beta2",))
    max_grad_norm: float = knob(
        0.3, "Gradients with a larger norm are scaled down to it.", gt=0, aliases=("gradient_clipping", "clip")
    )
    early_stopping_patience: int | None = knob(
        None, "Stop once the held-out loss has not fallen for so many evaluations.", ge=1
    )
    keep_best: bool = knob(
        False,
        "Let the run's adapter be that of the lowest held-out loss instead of the last.",
        aliases=("load_best_model_at_end",),
    )
    eval_every: int | None = knob(
        None, "Steps between evaluations; about five a run if not given.", ge=1, aliases=("eval_steps",)
    )
    save_every: Interval = knob(
        "10m", "How often a checkpoint is saved: steps, or minutes as in 10m.", aliases=("save_steps",)
    )
    keep_checkpoints: int = knob(
        2, "Checkpoints that stay; older ones are removed.", ge=1, aliases=("save_total_limit", "keep_last")
    )


class ComputeOptions(Options, group="Machine"):
    compute_dtype: ComputeType = knob(
        "auto",
        "Type of activations and products. auto: bf16 where the hardware multiplies it, else fp32.",
        aliases=("dtype", "bnb_4bit_compute_dtype", "bf16"),
    )
    threads: int | None = knob(None, "CPU threads; PyTorch's choice if not given.", ge=1)


class MachineOptions(ComputeOptions):
    device: Device = knob(
        "auto",
        "Where to compute. auto: CUDA where there is one, else CPU. cuda is ROCm on AMD's cards; xpu is Intel's, mps "
        "Apple's GPU: in plain PyTorch, without nybble's own kernels.",
    )


class PlannedMachine(Options, group="Machine"):
    """The machine a plan is made for, which need not be this one."""

    machine: Name | None = knob(
        None, f"Card to plan for, which need not be here: {', '.join(CARDS)}. This machine if not given."
    )
    device: Device = knob("auto", "Where to compute on this machine; --machine plans for a card that is not here.")
    host_memory: Bytes | None = knob(None, "Memory beside a GPU, such as 16GB; this machine's if not given.")
    compute_dtype: ComputeType = knob("auto", "Type of activations and products.")

    @field_validator("machine")
    @classmethod
    def _machine_is_known(cls, name: str | None) -> str | None:
        if name is None or name in CARDS:
            return name
        raise ConfigError(
            f"machine is {name!r}. Did you mean {nearest(name, {card: card for card in CARDS})!r}?",
            f"Allowed: {', '.join(CARDS)}.",
            "For another card: take one of its kind, and say its --memory. Leave it out to plan for this machine.",
        )

    @model_validator(mode="after")
    def _one_machine(self) -> Self:
        if self.machine is not None and self.device != "auto":
            raise ConfigError(
                f"machine is {self.machine}, and device is {self.device}.",
                "--device is of this machine, --machine of one that need not be here.",
                "Leave out one of them.",
            )
        return self
