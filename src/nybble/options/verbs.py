"""The options of each verb: which groups it takes, in the order users meet them, and what groups say only together."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import model_validator

from nybble.errors import ConfigError
from nybble.options import adapter_groups, groups, method_groups, objective_groups, run_groups, use_groups
from nybble.options.method_groups import IMPOSSIBLE, MEANINGLESS, WHY, Method
from nybble.options.option import (
    Verb,
    build_options,
    config_to_yaml,
    fields_of,
    flat,
    named_values,
    read_yaml,
    with_options,
    yaml_key,
)

Mixing = TypeVar("Mixing", "TrainConfig", "PlanConfig", "QuantizeConfig")
Learning = TypeVar("Learning", "TrainConfig", "PlanConfig", "DataConfig", "RowsConfig")
Artefact = TypeVar("Artefact", "MergeConfig", "ExportConfig")
Tuning = TypeVar("Tuning", "TrainConfig", "PlanConfig")


def _check_mixed(config: Mixing) -> Mixing:
    mixed, format = config.rounding.mixed, config.weights.format
    if mixed is not None and format != "nf4":
        raise ConfigError(
            f"format is {format}, and mixed is {mixed:g}.",
            "--mixed chooses among nf4, nf3 and nf2 itself.",
            "Leave --format or --mixed out.",
        )
    return config


def _check_calibrate(config: Artefact) -> Artefact:
    calibrate, output = config.rounding.calibrate, config.output
    rounds = output.to.is_rounded or (isinstance(output, use_groups.MergeOutput) and output.compare)
    if calibrate is not None and not (rounds and config.rounding.quality == "calibrated"):
        raise ConfigError(
            f"calibrate is {calibrate!r}, and nothing is calibrated.",
            "Only --to nf4 with --quality calibrated, and --compare, use text.",
            "Leave --calibrate out, or use --to nf4 --quality calibrated.",
        )
    return config


def _check_answers_alone(config: Learning) -> Learning:
    if config.data.train_on == "all" and config.objective.objective not in ("sft", "distill"):
        raise ConfigError(
            f"train-on is all, and objective is {config.objective.objective}.",
            "Answers are compared or judged; prompts are what they follow.",
            "Leave --train-on out.",
        )
    return config


CONVERSATION_OPTIONS = (  # of rows that chat templates write down
    *("prompt_field", "completion_field", "messages_field", "role", "tools", "tool_calls", "thinking", "train_on"),
    *("template", "chat_template"),
)


def _check_whole_texts(config: Learning) -> Learning:
    objective = config.objective.objective
    if objective not in objective_groups.WITHOUT_NEXT_TOKENS:
        return config
    if isinstance(config, RowsConfig):
        raise ConfigError(
            f"objective is {objective}.",
            "Batches for a training loop of one's own are of language models.",
            "Use nybble.train, or nybble.check_data to look at the rows.",
        )
    if (found := next(_unused_of_whole_texts(config), None)) is not None:
        name, why = found
        flag = name.replace("_", "-")
        said = f"{flag} is {flat(config)[name]}, and objective is {objective}."
        raise ConfigError(said, why, f"Leave --{flag} out.")
    return config


def _unused_of_whole_texts(config: "TrainConfig | PlanConfig | DataConfig") -> Iterator[tuple[str, str]]:
    """Options as they are that models which give something of whole texts have no use for, and why."""
    if not isinstance(config, DataConfig):
        trained = "Of models that give something of whole texts, adapters of a rank that is given are trained."
        if config.method.method in ("auto", "full"):
            yield "method", trained
        if config.adapters.rank == "auto":
            yield "rank", trained
        if config.adapters.init in ("activation", "eva"):
            yield "init", "Adapters that begin along a layer's inputs are for language models; others are not."
        if config.rounding.mixed is not None:
            yield "mixed", "What a layer may lose is measured on the next tokens that a language model says."
    for name in CONVERSATION_OPTIONS if config.objective.objective in objective_groups.OF_TEXTS else ():
        if getattr(config.data, name) != type(config.data).model_fields[name].default:
            yield name, "It is for conversations, which a chat template writes; here the tokenizer alone writes a text."


def _check_step_of_texts(config: Tuning) -> Tuning:
    if config.objective.objective == "embed" and config.memory.rows_per_step == 1:
        raise ConfigError(
            "rows-per-step is 1, and objective is embed.",
            "A text is told apart from the others of its step: from 2 on; more make the task harder, which is better.",
            "Raise --rows-per-step, or leave it out.",
        )
    return config


def _check_residual(config: "TrainConfig") -> "TrainConfig":
    init, rounding = config.adapters.init, config.rounding
    clashes = {"format": config.weights.format == "none", "quality": rounding.quality == "calibrated"}
    clashes |= {
        "dora": config.adapters.dora,
        "calibrate": rounding.calibrate is not None,
        "mixed": rounding.mixed is not None,
    }
    if init in adapter_groups.TAKES_FROM_BASE and (clashing := [name for name, found in clashes.items() if found]):
        raise ConfigError(
            f"init is {init}, and {clashing[0]} is {flat(config)[clashing[0]]}.",
            f"--init {init} puts what it leaves of the weights into four bits; by --quality absmax or search alone, "
            "since a model of such weights gives no states to calibrate on; and is not DoRA's.",
            f"Leave --{clashing[0]} or --init out.",
        )
    return config


def against_method(config: "TrainConfig | PlanConfig", method: Method) -> str:
    """The first option that was given and that a method has no use or no way for; empty where there is none."""
    values = flat(config)
    given = {name for group in type(config).model_fields for name in getattr(config, group).model_fields_set}
    meaningless = MEANINGLESS[method] - ({"format"} if config.weights.format == "none" else set())
    wrong = {name for name, refused in IMPOSSIBLE[method].items() if values.get(name) in refused}
    return next((name for name in values if name in given & (meaningless | wrong)), "")


def _check_method(config: Tuning) -> Tuning:
    method = config.method.method
    if method == "auto" or "method" not in config.method.model_fields_set:
        return config
    if name := against_method(config, method):
        raise ConfigError(
            f"method is {method}, and {yaml_key(name)} is {flat(config)[name]}.",
            WHY[method],
            f"Leave --{yaml_key(name)} or --method out.",
        )
    return config


def as_method(config: Tuning, method: Method) -> Tuning:
    """The options as a method settles them: where the base stays in 16 bits, `format` is "none"."""
    return with_options(config, method=method, **({} if method == "qlora" else {"format": "none"}))


def methods_left(config: Tuning) -> list[Method]:
    """Those that options leave open, the one that changes most first."""
    order: tuple[Method, ...] = ("full", "lora", "qlora")
    return [method for method in order if not against_method(config, method)]


def settle_method(config: Tuning) -> Tuning:
    """The options with the method that they ask for in so many words; "auto" stays. `--format none` is 16-bit LoRA."""
    method = config.method.method
    if method == "auto":
        return config
    return as_method(config, "lora" if method == "qlora" and config.weights.format == "none" else method)


class TrainConfig(Verb):
    """What `nybble train` needs to know."""

    model: groups.ModelOptions
    data: groups.DataOptions
    objective: objective_groups.ObjectiveOptions
    method: method_groups.MethodOptions
    run: run_groups.RunOptions
    weights: groups.WeightOptions
    rounding: groups.QualityOptions
    adapters: adapter_groups.AdapterOptions
    memory: groups.MemoryOptions
    loop: groups.LoopOptions
    machine: groups.MachineOptions

    _mixed_chooses_formats = model_validator(mode="after")(_check_mixed)
    _texts_are_whole = model_validator(mode="after")(_check_whole_texts)
    _a_step_has_several = model_validator(mode="after")(_check_step_of_texts)
    _answers_are_compared_alone = model_validator(mode="after")(_check_answers_alone)
    _residual_is_rounded_plainly = model_validator(mode="after")(_check_residual)
    _method_uses_what_is_given = model_validator(mode="after")(_check_method)

    @model_validator(mode="after")
    def _reference_is_asked_in_time(self) -> Self:
        if self.objective.reference == "step" and self.adapters.begins_with_an_effect:
            raise ConfigError(
                "reference is step, and training begins with an adapter that does something (--adapter, --init).",
                "The reference is what training begins with; in the step only the bare base can be asked.",
                "Leave --reference out: it is asked once, before the first step.",
            )
        return self

    @model_validator(mode="after")
    def _new_tokens_are_learnt_from_examples(self) -> Self:
        if self.adapters.train_new_tokens and self.objective.objective not in ("sft", "distill"):
            raise ConfigError(
                f"train-new-tokens is on, and objective is {self.objective.objective}.",
                "Rows of new tokens are learnt from examples to follow (--objective sft, distill).",
                "Train on examples first, or leave --train-new-tokens out.",
            )
        return self


class PlanConfig(Verb):
    """What `nybble plan` needs to know."""

    model: groups.ModelOptions
    data: groups.PlannedData
    objective: objective_groups.ObjectiveOptions
    method: method_groups.MethodOptions
    weights: groups.WeightOptions
    rounding: groups.MixedOptions
    adapters: adapter_groups.PlannedAdapters
    memory: groups.MemoryOptions
    loop: groups.LengthOptions
    machine: groups.PlannedMachine

    _mixed_chooses_formats = model_validator(mode="after")(_check_mixed)
    _texts_are_whole = model_validator(mode="after")(_check_whole_texts)
    _a_step_has_several = model_validator(mode="after")(_check_step_of_texts)
    _answers_are_compared_alone = model_validator(mode="after")(_check_answers_alone)
    _method_uses_what_is_given = model_validator(mode="after")(_check_method)


class SynthConfig(Verb):
    """What `nybble synth` needs to know."""

    weights: groups.OutputFormat
    model: use_groups.SynthOptions


class QuantizeConfig(Verb):
    """What `nybble quantize` needs to know."""

    model: groups.ModelOptions
    weights: groups.OutputWeights
    rounding: groups.QualityOptions
    machine: groups.ComputeOptions
    output: use_groups.OutputOptions

    _mixed_chooses_formats = model_validator(mode="after")(_check_mixed)


class EvalQualityConfig(Verb):
    """What `nybble eval quality` needs to know."""

    model: groups.ModelOptions
    data: groups.DataOptions
    scales: groups.ScaleOptions
    dense: groups.DenseShareOptions
    calibration: groups.CalibrationOptions
    comparison: use_groups.ComparisonOptions
    machine: groups.ComputeOptions


class CompareConfig(Verb):
    """What `nybble compare` needs to know."""

    model: groups.ModelOptions
    data: groups.DataOptions
    calibration: groups.CalibrationOptions
    adapters: adapter_groups.NewAdapters
    memory: groups.BatchOptions
    loop: use_groups.ComparedLength
    machine: groups.MachineOptions
    comparison: use_groups.ComparedMethods


class DataConfig(Verb):
    """What `nybble data check` needs to know."""

    model: groups.ModelOptions
    data: groups.DataOptions
    objective: objective_groups.ObjectiveName

    _texts_are_whole = model_validator(mode="after")(_check_whole_texts)
    _answers_are_compared_alone = model_validator(mode="after")(_check_answers_alone)


class EvalConfig(Verb):
    """What `nybble eval` needs to know."""

    data: groups.AcceptOptions
    evaluation: use_groups.EvaluationOptions
    machine: groups.MachineOptions


class ChatConfig(Verb):
    """What `nybble chat` needs to know."""

    model: use_groups.AnsweringModel
    answers: use_groups.ChatOptions
    machine: groups.MachineOptions


class ServeConfig(Verb):
    """What `nybble serve` needs to know."""

    machine: groups.MachineOptions
    server: use_groups.ServerOptions


class MergeConfig(Verb):
    """What `nybble merge` needs to know."""

    data: groups.AcceptOptions
    run: use_groups.MergedInputs
    rounding: use_groups.RoundingOptions
    output: use_groups.MergeOutput

    _text_is_for_calibrating = model_validator(mode="after")(_check_calibrate)

    @model_validator(mode="after")
    def _adapters_alone(self) -> Self:
        given = self.data.model_fields_set | self.rounding.model_fields_set | self.output.model_fields_set
        if self.run.adapters and (unused := sorted(given - {"out"})):
            raise ConfigError(
                f"adapters are given, and {unused[0]}.",
                "Adapters are made into one adapter; nothing is merged into a base.",
                f"Leave --{unused[0].replace('_', '-')} out.",
            )
        return self


class ExportConfig(Verb):
    """What `nybble export` needs to know."""

    data: groups.AcceptOptions
    run: use_groups.MergedRun
    rounding: use_groups.RoundingOptions
    output: use_groups.ExportOutput

    _text_is_for_calibrating = model_validator(mode="after")(_check_calibrate)


class PushConfig(Verb):
    """What `nybble push` needs to know beside what is pushed, and where to."""

    push: use_groups.PushOptions


class OpenConfig(Verb):
    """What `nybble.open_run` needs to know."""

    machine: groups.MachineOptions
    run: use_groups.OpenedRun


class AnswerConfig(Verb):
    """What `Run.generate` needs to know."""

    answers: use_groups.AnswerOptions


class SourceConfig(Verb):
    """What `nybble.open_model` needs to know."""

    model: groups.ModelOptions


class RowsConfig(Verb):
    """What `nybble.load_data` needs to know."""

    data: groups.DataOptions
    objective: objective_groups.ObjectiveName

    _texts_are_whole = model_validator(mode="after")(_check_whole_texts)
    _answers_are_compared_alone = model_validator(mode="after")(_check_answers_alone)


class LoadConfig(Verb):
    """What `nybble.load` needs to know."""

    weights: groups.WeightOptions
    machine: groups.MachineOptions
    loaded: use_groups.LoadedOptions


class AttachConfig(Verb):
    """What `nybble.add_adapters` needs to know."""

    adapters: adapter_groups.SeededAdapters


class StepConfig(Verb):
    """What `TrainingData.steps` needs to know."""

    loop: groups.LengthOptions
    memory: groups.MemoryOptions


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


def config_text(config: TrainConfig) -> str:
    """The YAML text that `load_config` reads back as the same options; what its method has no use for stays empty."""
    return config_to_yaml(config, to_fill_in=_unused(config))


def _unused(config: TrainConfig) -> frozenset[str]:
    """Options that the method has no use for, but for the format that says 16 bits."""
    method = config.method.method
    return frozenset() if method == "auto" else MEANINGLESS[method] - {"format"}


def draft_config(path: Path | str | None, overrides: Mapping[str, Any]) -> str:
    """`load_config` as commented YAML, in which required options that are not given are left to be filled in."""
    from_file = {} if path is None else read_yaml(Path(path))
    given = named_values(TrainConfig, from_file, str(path)) | named_values(TrainConfig, overrides, "")
    missing = [name for name, field in fields_of(TrainConfig).items() if field.is_required() and not given.get(name)]
    config = build_options(TrainConfig, {**overrides, **dict.fromkeys(missing, "-")}, from_file, origin=str(path))
    config = settle_method(config)
    return config_to_yaml(config, to_fill_in=[*missing, *_unused(config)])
