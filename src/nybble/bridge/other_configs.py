"""Configs of other tools (Axolotl, LLaMA-Factory, Unsloth, TRL) as nybble's options, key by key.

The tools call most things alike, so there is one table by key. What a key says is one of nybble's options, or nothing
that has to be said here (`NOT_NEEDED`, with the reason), or it has no counterpart; nothing is left out unnamed.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from nybble.errors import ConfigError
from nybble.formats.format import FORMATS
from nybble.options.option import build_options, config_to_yaml, fields_of, read_yaml, yaml_key
from nybble.options.run_groups import Tracker
from nybble.options.verbs import TrainConfig

Options = dict[str, Any]
NO_COUNTERPART = "no counterpart"
FIRST = ("rl", "stage", "pref_loss", "loss_type", "adapter", "finetuning_type")  # what others mean anything under
TRACKERS = get_args(Tracker)
MOST_KEYS, DEEPEST = 10_000, 8
# said by several keys
TOGETHER = ("method", "objective", "target_modules", "init", "format", "compute_dtype", "track")


@dataclass(frozen=True)
class ImportedConfig:
    """A config of another tool as nybble reads it.

    Args:
        options: nybble's, by name, as far as the file says something of them.
        not_needed: key of the file -> why nothing has to be said.
        left_out: key of the file -> why nybble has nothing for it.
        text: YAML for `nybble train`, with the keys of both kinds as comments.
    """

    options: Options
    not_needed: dict[str, str]
    left_out: dict[str, str]
    text: str


class _NoCounterpart(Exception):
    """A value of a known key that nybble has nothing for; the reason."""


def import_config(path: "str | os.PathLike[str]") -> ImportedConfig:
    """Read a config of Axolotl, LLaMA-Factory, Unsloth or TRL as nybble's options; every key is accounted for.

    Args:
        path: a YAML or JSON file.

    Raises:
        ConfigError: the file cannot be read, or nothing in it is known.

    Example:
        >>> _ = open("axolotl.yml", "w").write("base_model: base\\nlora_r: 32\\nwandb_watch: all\\n")
        >>> imported = nybble.import_config("axolotl.yml")
        >>> imported.options, imported.left_out
        ({'model': 'base', 'rank': 32}, {'wandb_watch': 'no counterpart'})
    """
    path = Path(path)
    given = _keys_of(path)
    options: Options = {}
    not_needed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    off = next((key for key, value in given.items() if _turns_wandb_off(_leaf(key), value)), None)
    for key in sorted(given, key=lambda key: _leaf(key) not in FIRST):
        name, value = _leaf(key), given[key]
        if value is None or (why := _why_not_needed(name, value)) is not None:
            not_needed[key] = "no value" if value is None else str(why)
            continue
        if off is not None and name == "wandb_project":
            not_needed[key] = f"{off} turns it off"
            continue
        if name not in KEYS:
            left_out[key] = NO_COUNTERPART
            continue
        try:
            found = KEYS[name](value)
            _check(found, options)
        except (_NoCounterpart, ConfigError) as error:
            left_out[key] = str(error).partition("\n")[0]
            continue
        if (twice := _said_otherwise(found, options)) is not None:
            left_out[key] = f"another key says of {yaml_key(twice)}: {options[twice]!r}"
            continue
        if "track" in found:
            found = found | {"track": list(dict.fromkeys([*options.get("track", ()), *found["track"]]))}
        options |= found
        not_needed |= {} if found else {key: "nybble's default"}
        not_needed |= {f"{key}.{part}": "what rows and files are is recognised" for part in _parts_of_data(name, value)}
    if not options:
        raise ConfigError(
            f"{path} holds no key that is known.",
            "Known: training configs of Axolotl, LLaMA-Factory, Unsloth and TRL, as YAML or JSON.",
            "`nybble train --print-config` prints a file to start from.",
        )
    _settle(options)
    return ImportedConfig(options, not_needed, left_out, _text(path, options, not_needed, left_out))


def _keys_of(path: Path) -> dict[str, Any]:
    """What the file says, by key.

    Raises:
        ConfigError: it has too many keys, or is a config of nybble already.
    """
    given = dict(islice(_flat(read_yaml(path)), MOST_KEYS + 1))
    if len(given) > MOST_KEYS:
        raise ConfigError(f"{path} has more than {MOST_KEYS:,} keys.", "Allowed: the config of a training run.")
    if given.keys() <= {yaml_key(name) for name in fields_of(TrainConfig)} and "data" in given:
        raise ConfigError(
            f"{path} is a config of nybble's own already.",
            "Needed: one of Axolotl, LLaMA-Factory, Unsloth or TRL.",
            f"Train by it as it is: nybble train {path}",
        )
    return given


def _said_otherwise(found: Options, options: Options) -> str | None:
    """The first option of which another key has said something else, but for those that several keys say together."""
    told = (name for name, own in found.items() if name not in TOGETHER and options.get(name, own) != own)
    return next(told, None)


def _flat(values: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Keys of sections as `section.key`; anchors may lead a section into itself, so that the depth has an end."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and depth < DEEPEST:
            yield from _flat(value, f"{name}.", depth + 1)
        else:
            yield name, value


def _leaf(key: str) -> str:
    return key.rpartition(".")[2].replace("-", "_").lower()


# ---- what keys say --------------------------------------------------------------------------------


def _as(option: str) -> Callable[[Any], Options]:
    """The value as it is; numbers that YAML reads as text (`2e-4`) as numbers."""

    def convert(value: Any) -> Options:
        return {option: _number(value) if isinstance(value, str) else value}

    return convert


def _number(text: str) -> Any:
    try:
        return float(text) if any(sign in text for sign in ".eE") else int(text)
    except ValueError:
        return text


def _float(value: Any) -> float:
    number = _number(str(value))
    if not isinstance(number, int | float):
        raise _NoCounterpart(f"{value!r} is no number")
    return float(number)


def _when(option: str, own: Any) -> Callable[[Any], Options]:
    """A switch that chooses a value; off says nothing."""
    return lambda value: {option: own} if value is True else {}


def _choice(option: str, values: Mapping[Any, Any]) -> Callable[[Any], Options]:
    """One of the tool's values as one of nybble's."""

    def convert(value: Any) -> Options:
        known = str(value).lower()
        if known not in values:
            raise _NoCounterpart(f"{yaml_key(option)} has nothing like {value!r}")
        return {option: values[known]}

    return convert


def _targets(value: Any) -> Options:
    names = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
    return {"target_modules": "all-linear" if names in (["all"], ["all-linear"]) else names}


def _modules(value: Any) -> Options:
    return {"modules_to_save": value if isinstance(value, list) else str(value)}


def _data(value: Any) -> Options:
    """A path or name, several, or Axolotl's list of mappings, of which the path counts."""
    entries = value if isinstance(value, list) else str(value).split(",")
    found = []
    for entry in entries:
        if isinstance(entry, Mapping):
            further = sorted(set(entry) - {"path", "split", "ds_type", "type"})
            if further:
                raise _NoCounterpart(f"of a data set {', '.join(further)} has no counterpart: see --prompt-field")
            path = entry.get("path")
            if not isinstance(path, str):
                raise _NoCounterpart("a data set has no path")
            found.append(f"{path}#{entry['split']}" if entry.get("split") else str(path))
        else:
            found.append(str(entry).strip())
    return {"data": found}


def _parts_of_data(name: str, value: Any) -> list[str]:
    """What entries of a list of data sets say of their form."""
    if name != "datasets" or not isinstance(value, list):
        return []
    entries = [entry for entry in value if isinstance(entry, Mapping)]
    return sorted({part for entry in entries for part in entry if part in ("type", "ds_type")})


def _held_out(value: Any) -> Options:
    number = _float(value)
    if number == 0:
        raise _NoCounterpart("some rows are always held out")
    return {"validation_fraction": number} if number < 1 else {"validation_rows": int(number)}


def _optimizer(value: Any) -> Options:
    name = str(value).lower()
    if "adamw" not in name:
        raise _NoCounterpart("the optimizer is AdamW")
    options: Options = {"optimizer_bits": 8} if "8bit" in name else {}
    return options | ({"page_optimizer": "always"} if "paged" in name else {})


def _quantised(value: Any) -> Options:
    """A number of bits, or a switch."""
    if value in (True, 4, "4"):
        return {"method": "qlora"}
    if value in (False, None):
        return {}
    raise _NoCounterpart("bases are in four, three or two bits, or in 16")


def _steps(option: str) -> Callable[[Any], Options]:
    def convert(value: Any) -> Options:
        number = _number(str(value))
        if not isinstance(number, int):
            raise _NoCounterpart("it is said in steps, not as a share of them")
        return {option: str(number) if option == "save_every" else number} if number > 0 else {}

    return convert


def _warmup(value: Any) -> Options:
    return {"warmup": _float(value)} if _float(value) > 0 else {}


def _initial(value: Any) -> Options:
    return _choice("init", {"true": "default", **{name: name for name in ("loftq", "pissa", "olora", "eva")}})(value)


def _compute(value: Any) -> Options:
    name = str(value).lower().rpartition(".")[2]
    known = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32", "auto": "auto"}
    return _choice("compute_dtype", known)(name)


def _trackers(value: Any) -> Options:
    names = [str(name).lower() for name in (value if isinstance(value, list) else [value])]
    if unknown := [name for name in names if name not in (*TRACKERS, "none")]:
        raise _NoCounterpart(f"{', '.join(unknown)} is none of {', '.join(TRACKERS)}")
    return {} if names == ["none"] else {"track": [name for name in names if name != "none"]}


def _tracker(name: str) -> Callable[[Any], Options]:
    return lambda value: {"track": [name]} if value is True else {}


def _project_of(name: str) -> Callable[[Any], Options]:
    return lambda value: {"track": [name], "track_project": value}


def _turns_wandb_off(name: str, value: Any) -> bool:
    """Whether a key says that W&B, of which another may name a project, is not used, or sends nothing."""
    off = {"report_to": ("none", ["none"]), "wandb_mode": ("disabled", "offline"), "use_wandb": (False,)}
    return value in off.get(name, ())


_OBJECTIVES = {name: name for name in ("sft", "dpo", "ipo", "simpo", "orpo", "kto")}
_OBJECTIVES |= {"rm": "reward", "sigmoid": "dpo"}
_THEIR_FORMATS = {format.name: format.name for format in FORMATS.values() if format.bitsandbytes}
_TEMPLATES = {name: name for name in ("chatml", "llama3", "gemma", "phi", "deepseek")}
_NAMES: dict[Callable[[Any], Options], str] = {
    _as("model"): "base_model model_name_or_path model_name model model_id pretrained_model_name_or_path",
    _as("tokenizer"): "tokenizer_config tokenizer_name tokenizer_name_or_path tokenizer",
    _as("out"): "output_dir out",
    _as("max_seq_len"): "sequence_len max_seq_length max_length cutoff_len max_seq_len",
    _as("rank"): "lora_r lora_rank r rank",
    _as("alpha"): "lora_alpha alpha",
    _as("dropout"): "lora_dropout",
    _targets: "lora_target_modules lora_target target_modules",
    _when("target_modules", "all-linear"): "lora_target_linear",
    _modules: "lora_modules_to_save additional_target modules_to_save",
    _as("dora"): "use_dora peft_use_dora",
    _as("rslora"): "use_rslora peft_use_rslora",
    _as("lora_plus_ratio"): "loraplus_lr_ratio",
    _initial: "init_lora_weights peft_init_lora_weights",
    _when("init", "pissa"): "pissa_init",
    _as("micro_batch_size"): "micro_batch_size per_device_train_batch_size",
    _as("accumulated"): "gradient_accumulation_steps",
    _as("epochs"): "num_epochs num_train_epochs epochs",
    _steps("max_steps"): "max_steps",
    _as("lr"): "learning_rate lr",
    _choice("schedule", {name: name for name in ("cosine", "linear", "constant")}): "lr_scheduler lr_scheduler_type",
    _warmup: "warmup_steps warmup_ratio",
    _as("weight_decay"): "weight_decay",
    _as("beta1"): "adam_beta1",
    _as("beta2"): "adam_beta2",
    _as("max_grad_norm"): "max_grad_norm gradient_clipping",
    _optimizer: "optimizer optim",
    _steps("eval_every"): "eval_steps",
    _steps("save_every"): "save_steps",
    _as("keep_checkpoints"): "save_total_limit",
    _as("early_stopping_patience"): "early_stopping_patience",
    _as("keep_best"): "load_best_model_at_end",
    _as("seed"): "seed random_state random_seed",
    _held_out: "val_set_size val_size",
    _data: "datasets dataset dataset_name dataset_path data_path data_files train_file dataset_id",
    _as("text_field"): "dataset_text_field",
    _as("packing"): "sample_packing packing",
    _when("train_on", "all"): "train_on_inputs train_on_prompt",
    _as("neftune_alpha"): "neftune_noise_alpha",
    _as("label_smoothing"): "label_smoothing_factor",
    _choice("objective", _OBJECTIVES): "rl stage pref_loss loss_type",
    _as("beta"): "beta rl_beta pref_beta dpo_beta",
    _choice("chat_template", _TEMPLATES): "chat_template template",
    _choice("method", {"qlora": "qlora", "lora": "lora", "full": "full"}): "adapter finetuning_type",
    _when("method", "full"): "full_finetuning",
    _quantised: "load_in_4bit quantization_bit",
    _choice("format", _THEIR_FORMATS): "bnb_4bit_quant_type",
    _as("double_quant"): "bnb_4bit_use_double_quant double_quantization use_bnb_nested_quant",
    _compute: "torch_dtype dtype bnb_4bit_compute_dtype",
    _when("compute_dtype", "bf16"): "bf16",
    _trackers: "report_to",
    _project_of("wandb"): "wandb_project",
    _project_of("mlflow"): "mlflow_experiment_name",
    **{_tracker(name): f"use_{name}" for name in ("wandb", "mlflow", "tensorboard")},
    _as("revision"): "revision_of_model model_revision",
}  # fmt: skip
KEYS = {name: convert for convert, names in _NAMES.items() for name in names.split()}

NOT_NEEDED = {  # key -> why nothing has to be said
    "gradient_checkpointing": "what blocks keep is chosen to fit (--keep)",
    "use_gradient_checkpointing": "what blocks keep is chosen to fit (--keep)",
    "flash_attention": "attention is nybble's own",
    "flash_attn": "attention is nybble's own",
    "attn_implementation": "attention is nybble's own",
    "sdp_attention": "attention is nybble's own",
    "use_liger_kernel": "kernels are nybble's own",
    "group_by_length": "rows are packed",
    "pad_to_sequence_len": "rows are packed",
    "logging_steps": "every step is in events.jsonl",
    "do_train": "`nybble train` trains",
    "use_peft": "adapters are the default (--method)",
    "strict": "every option is checked",
    "overwrite_cache": "nothing is cached",
    "preprocessing_num_workers": "rows are read in one process",
    "dataloader_num_workers": "rows are read in one process",
    "tf32": "products are as precise as PyTorch is told",
}


def _why_not_needed(name: str, value: Any) -> str | None:
    if value is False and name in ("load_in_8bit", "fp16", "bf16", "full_finetuning", "lora_target_linear"):
        return "off"
    if name == "wandb_mode" and _turns_wandb_off(name, value):
        return "W&B is not used"
    return NOT_NEEDED.get(name)


# ---- together ---------------------------------------------------------------------------------------


def _check(found: Options, options: Options) -> None:
    """Refuse values that their options do not take, under the objective and method that were found."""
    others: Options = {name: options[name] for name in ("objective", "method") if name in options}
    own = {name: value for name, value in found.items() if name != "accumulated"}
    build_options(TrainConfig, {"model": "-", "data": "-", "out": "-", **others, **own})


def _settle(options: Options) -> None:
    """What several keys say together: rows of a step; adapters over a base in few bits or in 16."""
    accumulated, at_once = options.pop("accumulated", None), options.get("micro_batch_size")
    if accumulated is not None or at_once is not None:
        options["rows_per_step"] = int(accumulated or 1) * int(at_once or 1)
    if options.get("method") in ("lora", "full"):
        for name in ("format", "double_quant"):
            options.pop(name, None)


def _text(path: Path, options: Options, not_needed: dict[str, str], left_out: dict[str, str]) -> str:
    """YAML for `nybble train`, and what of the file is not in it."""
    required = [name for name, field in fields_of(TrainConfig).items() if field.is_required()]
    missing = [name for name in required if name not in options]
    config = build_options(TrainConfig, {**options, **dict.fromkeys(missing, "-")})
    lines = config_to_yaml(config, comments=False, to_fill_in=missing).splitlines()
    named = {yaml_key(name) for name in (*options, *missing)}
    kept = _of_keys(lines, named)
    text = [f"# From {' '.join(path.name.split())}. What is not given is left at nybble's default.", *kept]
    for heading, keys in (("Not needed:", not_needed), ("Without counterpart:", left_out)):
        if keys:
            text += ["", f"# {heading}", *(f"#   {' '.join(f'{key}: {why}'.split())}" for key, why in keys.items())]
    return "\n".join(text) + "\n"


def _of_keys(lines: list[str], named: set[str]) -> list[str]:
    """The lines of these keys, with what is indented under them."""
    kept, taking = [], False
    for line in lines:
        if line and line[0] not in " -":
            taking = line.partition(":")[0] in named
        kept += [line] if taking else []
    return kept
