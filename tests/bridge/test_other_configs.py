"""Configs of other tools, in the shapes that their documentation and examples have, as nybble's."""

import json
from pathlib import Path
from typing import Any

import pytest
from typed import typed

import nybble
from nybble.errors import ConfigError
from nybble.options.option import flat, read_yaml, yaml_key
from nybble.options.schema import json_schema
from nybble.options.verbs import TrainConfig, load_config

AXOLOTL = {"base_model": "base", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "output_dir": "./out"}
FACTORY = {"model_name_or_path": "base", "dataset": "first,second", "output_dir": "saves/one", "cutoff_len": 2048}
TRL = {"model_name_or_path": "base", "dataset_name": "rows", "output_dir": "runs/trl"}
ROWS = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {  # a file, options, keys left out
    "axolotl qlora": (
        {**AXOLOTL, **ROWS, "load_in_8bit": False, "load_in_4bit": True, "adapter": "qlora", "lora_r": 32,
         "bf16": "auto", "lora_alpha": 16, "lora_target_linear": True, "sequence_len": 4096, "sample_packing": True,
         "tf32": False,
         "optimizer": "paged_adamw_32bit", "lr_scheduler": "cosine", "learning_rate": "2e-4", "warmup_steps": 10,
         "evals_per_epoch": 4, "special_tokens": {"pad_token": "<pad>"}, "wandb_project": "mine"},
        {"model": "base", "data": ["rows.jsonl"], "out": "./out", "rows_per_step": 8, "micro_batch_size": 2, "rank": 32,
         "alpha": 16, "target_modules": "all-linear", "max_seq_len": 4096, "packing": True, "page_optimizer": "always",
         "schedule": "cosine", "lr": 2e-4, "warmup": 10.0, "method": "qlora", "track": ["wandb"],
         "track_project": "mine"},
        {"evals_per_epoch": "no counterpart", "special_tokens.pad_token": "no counterpart"},
    ),
    "axolotl dpo": (
        {**AXOLOTL, "rl": "dpo", "rl_beta": 0.2, "adapter": "lora", "val_set_size": 0.05, "train_on_inputs": False},
        {"model": "base", "data": ["rows.jsonl"], "out": "./out", "objective": "dpo", "beta": 0.2, "method": "lora",
         "validation_fraction": 0.05},
        {},
    ),
    "axolotl full": (
        {"base_model": "base", "datasets": [{"path": "org/set", "split": "train", "field_output": "y"}],
         "lr_scheduler": "rex", "val_set_size": 0, "optimizer": "muon"},
        {"model": "base"},
        {"datasets": "of a data set field_output has no counterpart: see --prompt-field",
         "lr_scheduler": "schedule has nothing like 'rex'", "val_set_size": "some rows are always held out",
         "optimizer": "the optimizer is AdamW"},
    ),
    "factory lora sft": (
        {**FACTORY, "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
         "template": "llama3", "max_samples": 1000, "per_device_train_batch_size": 1, "num_train_epochs": 3.0,
         "gradient_accumulation_steps": 8, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
         "ddp_timeout": 180000000, "val_size": 0.1, "eval_steps": 500, "save_steps": 500, "plot_loss": True},
        {"model": "base", "data": ["first", "second"], "out": "saves/one", "max_seq_len": 2048, "objective": "sft",
         "method": "lora", "rank": 8, "target_modules": "all-linear", "chat_template": "llama3", "rows_per_step": 8,
         "micro_batch_size": 1, "epochs": 3.0, "schedule": "cosine", "warmup": 0.1, "compute_dtype": "bf16",
         "validation_fraction": 0.1, "eval_every": 500, "save_every": "500"},
        {"max_samples": "no counterpart", "ddp_timeout": "no counterpart", "plot_loss": "no counterpart"},
    ),
    "factory qlora": (
        {**FACTORY, "finetuning_type": "lora", "quantization_bit": 4, "double_quantization": True, "template": "qwen"},
        {"model": "base", "data": ["first", "second"], "out": "saves/one", "max_seq_len": 2048, "method": "qlora",
         "double_quant": True},
        {"template": "chat-template has nothing like 'qwen'"},
    ),
    "factory rewards in 8 bits": (
        {**FACTORY, "stage": "rm", "quantization_bit": 8, "pissa_init": True},
        {"model": "base", "data": ["first", "second"], "out": "saves/one", "max_seq_len": 2048, "objective": "reward",
         "init": "pissa"},
        {"quantization_bit": "bases are in four, three or two bits, or in 16"},
    ),
    "unsloth": (
        {"model": {"model_name": "base", "load_in_4bit": True, "max_seq_length": 2048},
         "data": {"dataset": "rows"},
         "lora": {"lora_r": 16, "lora_dropout": 0.0, "use_rslora": True, "target_modules": "q_proj,v_proj"},
         "training": {"num_epochs": 2, "learning_rate": 0.0002, "optim": "adamw_8bit", "random_seed": 3407,
                      "batch_size_finder": True}},
        {"model": "base", "method": "qlora", "max_seq_len": 2048, "data": ["rows"], "rank": 16, "dropout": 0.0,
         "rslora": True, "target_modules": ["q_proj", "v_proj"], "epochs": 2, "lr": 2e-4, "optimizer_bits": 8,
         "seed": 3407},
        {"training.batch_size_finder": "no counterpart"},
    ),
    "trl sft": (
        {**TRL, "use_peft": True, "lora_r": 32, "lora_alpha": 16, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4",
         "use_bnb_nested_quant": False, "max_length": 512, "packing": False, "learning_rate": 0.0001, "max_steps": 200,
         "per_device_train_batch_size": 4, "eos_token": "<|im_end|>", "attn_implementation": "flash_attention_2",
         "torch_dtype": "bfloat16", "lora_target_modules": ["q_proj"], "report_to": "none"},
        {"model": "base", "data": ["rows"], "out": "runs/trl", "rank": 32, "alpha": 16, "method": "qlora",
         "format": "fp4", "double_quant": False, "max_seq_len": 512, "packing": False, "lr": 1e-4, "max_steps": 200,
         "rows_per_step": 4, "micro_batch_size": 4, "compute_dtype": "bf16", "target_modules": ["q_proj"]},
        {"eos_token": "no counterpart"},
    ),
    "trl dpo": (
        {**TRL, "loss_type": "ipo", "beta": 0.05, "eval_steps": 0.2, "save_total_limit": 1, "max_steps": -1},
        {"model": "base", "data": ["rows"], "out": "runs/trl", "objective": "ipo", "beta": 0.05, "keep_checkpoints": 1},
        {"eval_steps": "it is said in steps, not as a share of them"},
    ),
    "trl kto": (
        {**TRL, "loss_type": "kto", "lora_dropout": 1.5, "dataset_text_field": "text", "seed": 7,
         "report_to": ["tensorboard"], "logging_dir": "logs"},
        {"model": "base", "data": ["rows"], "out": "runs/trl", "objective": "kto", "text_field": "text", "seed": 7,
         "track": ["tensorboard"]},
        {"lora_dropout": "dropout is 1.5.", "logging_dir": "no counterpart"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_becomes_an_option_or_is_named(name: str, tmp_path: Path) -> None:
    content, options, left_out = CONFIGS[name]
    file = tmp_path / "other.json"  # JSON is YAML
    file.write_text(json.dumps(content))
    imported = nybble.import_config(file)
    assert imported.options == options and imported.left_out == left_out
    assert all(f"#   {key}: " in imported.text for key in (*imported.left_out, *imported.not_needed))
    (tmp_path / "ours.yaml").write_text(imported.text)
    required = {key: "-" for key in ("model", "data", "out") if key not in options}
    ours = flat(load_config(tmp_path / "ours.yaml", required))
    assert {
        key: ours[key] for key in ("rank", "alpha", "lr", "rows_per_step") if key in options
    }.items() <= options.items()
    assert set(read_yaml(tmp_path / "ours.yaml")) == {yaml_key(key) for key in (*options, *required)}


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ({"wandb_project": "p"}, {"track": ["wandb"], "track_project": "p"}),
        ({"wandb_project": "p", "report_to": "none"}, {}),
        ({"wandb_project": "p", "report_to": ["none"]}, {}),
        ({"wandb_project": "p", "wandb_mode": "disabled"}, {}),
        ({"wandb_project": "p", "wandb_mode": "offline"}, {}),
        ({"wandb_project": "p", "use_wandb": False}, {}),
        (
            {"report_to": ["tensorboard", "wandb"], "wandb_project": "p"},
            {"track": ["tensorboard", "wandb"], "track_project": "p"},
        ),
        ({"use_mlflow": True, "use_tensorboard": False}, {"track": ["mlflow"]}),
        ({"model_revision": "abc"}, {"revision": "abc"}),
    ],
)
def test_trackers_and_what_turns_them_off(said: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"base_model": "base", "lora_r": 8} | said))
    imported = nybble.import_config(file)
    assert imported.options == {"model": "base", "rank": 8} | options and not imported.left_out


def test_a_tracker_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"base_model": "base", "report_to": ["none", "comet_ml"]}))
    assert "comet_ml is none of trackio, tensorboard" in nybble.import_config(file).left_out["report_to"]


def test_import_prints_or_writes_and_counts(tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    file.write_text("base_model: base\nlora_r: 8\nwandb_watch: all\n")
    shown = typed(["import", file])
    assert shown.exit_code == 0 and "rank: 8" in shown.stdout and "wandb_watch" in shown.stderr
    written = typed(["import", file, "--to", tmp_path / "ours.yaml"])
    assert written.exit_code == 0 and (tmp_path / "ours.yaml").read_text() == shown.stdout and not written.stdout
    again = typed(["import", file, "--to", tmp_path / "ours.yaml"])
    assert again.exit_code == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: 1\n", "no key that is known"),
        ("[1, 2]", "needs|mapping|holds"),
        ("base_model: [\n", "is not YAML"),
        (None, "No such file"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "other.yml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        nybble.import_config(file)


# ---- the schema -------------------------------------------------------------------------------------


def allows(schema: dict[str, Any], value: Any) -> bool:
    """The part of JSON schema that the options need."""
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list}
    kinds["object"] = dict
    if "anyOf" in schema:
        return any(allows(each, value) for each in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"] and not isinstance(value, bool)
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if (isinstance(value, bool) and "boolean" not in names) or not isinstance(value, tuple(kinds[n] for n in names)):
        return False
    if isinstance(value, list):
        return all(allows(schema["items"], each) for each in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            value >= schema.get("minimum", value) and value <= schema.get("maximum", value)
            and value > schema.get("exclusiveMinimum", value - 1) and value < schema.get("exclusiveMaximum", value + 1)
        )  # fmt: skip
    return True


SAMPLES = [True, 0, 1, 3, -1, 0.5, 1.5, 64, 2_000_000, "auto", "nf4", "text", "8GB", "50", ["a"], {"q_proj": 4}]


def test_the_schema_and_the_options_agree_on_what_is_allowed() -> None:
    schema = json_schema(TrainConfig, "nybble train")
    assert list(schema["properties"]) and schema["additionalProperties"] is False
    for key, of_key in schema["properties"].items():
        assert of_key["description"]
        is_switch = allows(of_key, True)
        for sample in SAMPLES:
            if is_switch and sample in (0, 1):  # which stand for a switch's values, and which no one writes
                continue
            try:
                load_config(None, {"model": "m", "data": "d", "out": "o", key: sample})
            except ConfigError as error:
                told = error.got.startswith(f"{key} is ") and "Allowed" in error.allowed
                # Words of a text's own form (sizes, patterns) and what options say together are not in the schema.
                if told and not isinstance(sample, str | dict | list):
                    assert not allows(of_key, sample), (key, sample)
                continue
            # Text is read as numbers and switches from flags; a file for an editor has them as they are.
            if not isinstance(sample, str) or not sample.isdecimal():
                assert allows(of_key, sample), (key, sample)


def test_what_two_keys_say_differently_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("base_model: first\nmodel_name: other\nlora_r: 8\nrank: 8\n")
    imported = nybble.import_config(tmp_path / "c.yml")
    assert imported.options == {"model": "first", "rank": 8}
    assert imported.left_out == {"model_name": "another key says of model: 'first'"}


def test_a_keys_line_breaks_stay_in_its_comment(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text('base_model: base\n"odd\\nrank": 3\n')
    imported = nybble.import_config(tmp_path / "c.yml")
    (tmp_path / "own.yaml").write_text(imported.text)
    assert list(imported.left_out) == ["odd\nrank"] and "#   odd rank: no counterpart" in imported.text
    assert "rank" not in read_yaml(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: rows.jsonl\nmodel: base\nrank: 8\n", "is a config of nybble's own already"),
        ("a: &a {x: 1, y: 2}\n" + "".join(f"{n}: &{n} {{{', '.join(f'{i}: *{m}' for i in range(9))}}}\n"
         for m, n in zip("abcdef", "bcdefg", strict=True)), "has more than 10,000 keys"),
    ],
)  # fmt: skip
def test_files_that_are_no_such_config_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        nybble.import_config(tmp_path / "c.yml")


def test_a_section_within_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("base_model: base\na: &a\n  b: *a\n")
    assert list(nybble.import_config(tmp_path / "c.yml").left_out) == ["a" + ".b" * 7]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("base_model: base\n")
    shown = typed(["import", tmp_path / "c.yml", "--to", tmp_path / "none" / "n.yaml"])
    assert shown.exit_code == 2 and "none" in shown.stderr and "No such file or directory" in shown.stderr


def test_config_schema_is_printed() -> None:
    shown = typed(["config", "schema"])
    assert shown.exit_code == 0 and json.loads(shown.stdout) == json_schema(TrainConfig, "nybble train FILE.yaml")
