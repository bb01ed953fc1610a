"""The options: one declaration each, read from flags and YAML alike, with errors that say what to do."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import ConfigError
from nybble.formats.format import FORMATS, STORED
from nybble.formats.quant_spec import BLOCK_SIZES
from nybble.options import verbs
from nybble.options.groups import BaseFormat, OutputFormat, ScaleOptions
from nybble.options.option import (
    Options,
    Verb,
    allowed_values,
    build_options,
    config_to_yaml,
    fields_by_group,
    fields_of,
    flat,
    groups_of,
    knob,
    known_names,
    nearest,
    spread,
    with_options,
)
from nybble.options.verbs import DataConfig, QuantizeConfig, TrainConfig, draft_config, load_config

REQUIRED = {"model": "m", "data": "d.jsonl", "out": "runs/a"}
ALL = [each for each in vars(verbs).values() if isinstance(each, type) and issubclass(each, Verb) and each is not Verb]


def load(**options: Any) -> TrainConfig:
    return load_config(None, {**REQUIRED, **options})


def refused(**options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(**options)
    return caught.value


def test_defaults() -> None:
    config = load()
    assert (config.adapters.rank, config.adapters.alpha, config.adapters.target_modules) == (16, 32.0, "all-linear")
    assert (config.loop.lr, config.loop.beta2, config.loop.max_grad_norm) == (2e-4, 0.999, 0.3)
    assert (config.weights.format, config.weights.block_size, config.weights.double_quant) == ("nf4", 64, True)
    assert (config.data.validation_fraction, config.data.validation_rows) == (0.05, 512)
    assert config.run.out == Path("runs/a")


def test_text_from_flags_becomes_each_options_type() -> None:
    config = load(**{"lr": "1e-4", "rank": "8", "block-size": "128", "target-modules": "q_proj, v_proj", "out": "x/y"})
    assert (config.loop.lr, config.adapters.rank, config.weights.block_size) == (1e-4, 8, 128)
    assert config.adapters.target_modules == ("q_proj", "v_proj") and config.run.out == Path("x/y")


def test_values_never_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().adapters.rank = 8  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        load().adapters = load(rank=8).adapters  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("rank", "abc", "a whole number, at least 1"),
        ("rank", 0, "at least 1"),
        ("rank", 2.5, "a whole number"),
        ("rank", True, "a whole number"),  # a bare `yes` in YAML
        ("lr", "nan", "a number, above 0"),
        ("lr", float("inf"), "a number, above 0"),
        ("lr", -1, "above 0"),
        ("dropout", 1, "at least 0, below 1"),
        ("format", "nf5", "nf4, fp4, int4, int4_asym, nf3, nf2, stored, none"),
        ("format", 4, "nf4, fp4, int4, int4_asym, nf3, nf2, stored, none"),
        ("block_size", 65, "32, 64, 128"),
        ("block_size", True, "32, 64, 128"),
        ("quality", "best", "one of auto, absmax, search, calibrated"),
        ("packing", "perhaps", "true or false"),
        ("data", 7, "a list of names"),
        ("data", "", "a list of names"),
        ("out", "", "a path"),
        ("out", 3, "a path"),
        ("target_modules", [], "a list of names"),
        ("target_modules", "q_proj,,v_proj", "a list of names"),
        ("device", "gpu", "auto, cpu, cuda"),
        ("max_steps", {"a": 1}, "a whole number"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    error = refused(**{name: value})
    assert name.replace("_", "-") in error.got and repr(value) in error.got
    assert allowed.lower() in error.allowed.lower()
    assert error.fix and error.exit_code == 2


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rnak", "rank"),
        ("learning_rate", "lr"),
        ("learning-rate", "lr"),
        ("lora_r", "rank"),
        ("per_device_train_batch_size", "micro-batch-size"),
        ("num_train_epochs", "epochs"),
        ("output_dir", "out"),
        ("max_lenght", "max-seq-len"),
        ("Rank", "rank"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(typed: str, meant: str) -> None:
    error = refused(**{typed: 1})
    assert repr(typed) in error.got and f"Did you mean '{meant}'?" in error.got
    assert "max-seq-len" in error.allowed


def test_what_is_not_given_is_named() -> None:
    with pytest.raises(ConfigError, match="--model MODEL"):
        load_config(None, {})
    with pytest.raises(ConfigError, match="--out OUT"):
        load_config(None, {"model": "m", "data": "d"})


def test_a_micro_batch_larger_than_a_step_is_refused() -> None:
    assert load(micro_batch_size=16).memory.micro_batch_size == 16
    error = refused(micro_batch_size=17)
    assert "17" in error.got and "16" in error.got


def test_what_options_say_together_is_refused_after_each_by_itself() -> None:
    assert "lr is 0" in refused(micro_batch_size=17, lr=0).got
    assert "max-seq-len is 1" in refused(mixed=3.5, format="fp4", max_seq_len=1).got
    assert "mixed is 3.5" in refused(mixed=3.5, format="fp4").got


def test_what_an_objective_does_not_know_is_refused() -> None:
    assert "train-on is all, and objective is dpo" in refused(objective="dpo", train_on="all").got
    assert "neftune-alpha is 5" in refused(objective="kto", neftune_alpha=5).got
    assert "label-smoothing is 0.5" in refused(objective="dpo", label_smoothing=0.5).got
    assert "train-new-tokens" in refused(objective="orpo", train_new_tokens=True).got


def test_a_reference_within_the_step_is_the_bare_base() -> None:
    load(objective="dpo", reference="step", init="eva")  # whose B are zeros
    for begun in ({"init": "activation"}, {"adapter": "a"}):
        assert "reference is step" in refused(objective="dpo", reference="step", **begun).got


def test_the_same_option_under_two_spellings_is_refused() -> None:
    assert "given twice" in refused(**{"max-steps": 1, "max_steps": 2}).got


def test_flags_win_over_the_file_and_none_restores_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nout: o\nrank: 4\nmax-steps: 7\nmax_seq_len: 99\n")
    config = load_config(file, {"rank": "8", "max_steps": None})
    assert (config.adapters.rank, config.loop.max_steps, config.data.max_seq_len) == (8, None, 99)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nrnak: 8\n", ("run.yaml", "'rnak'", "'rank'")),
        ("rank: yes\n", ("run.yaml", "rank", "True")),
        ("rank: 8\nrank: 16\n", ("run.yaml", "rank is given twice")),
        ("rank: [1\n", ("run.yaml", "not YAML", "line 2")),
        ("- rank\n", ("run.yaml", "list")),
        ("rank\n", ("run.yaml", "str")),
        ("!!python/object:os.system {}\n", ("run.yaml", "not YAML")),
        ("1: 2\n", ("run.yaml", "'1'")),
        ("[a, b]: 2\n", ("run.yaml",)),
        ("? {a: b}\n: 2\n", ("run.yaml",)),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, REQUIRED)
    for word in words:
        assert word in caught.value.got


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml", REQUIRED)
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path, REQUIRED)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "latin.yaml", REQUIRED)


def test_an_empty_file_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml", REQUIRED) == load()
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfrank: 4\r\n")
    assert load_config(tmp_path / "bom.yaml", REQUIRED).adapters.rank == 4


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(
    model=NAMES,
    lr=st.floats(min_value=1e-12, max_value=1e3),
    warmup=st.floats(min_value=0, max_value=1e4),
    targets=st.one_of(st.just("all-linear"), st.lists(st.from_regex(r"[a-z_.0-9]+", fullmatch=True), min_size=1)),
    max_steps=st.none() | st.integers(1, 10**9),
    packing=st.booleans(),
    comments=st.booleans(),
)
def test_what_is_written_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, comments: bool, **values: Any
) -> None:
    values["target_modules"] = values.pop("targets")
    config = load(**values)
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(config_to_yaml(config, comments), encoding="utf-8")
    assert load_config(file, {}) == config


def test_a_draft_says_what_to_fill_in_and_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "draft.yaml"
    file.write_text(draft_config(None, {"rank": "4"}))
    assert yaml.safe_load(file.read_text())["model"] is None
    with pytest.raises(ConfigError, match="--model"):
        load_config(file, {})
    assert load_config(file, REQUIRED) == load(rank=4)


def test_a_draft_with_everything_given_is_the_resolved_config() -> None:
    assert draft_config(None, REQUIRED) == config_to_yaml(load())


def test_a_draft_refuses_what_a_run_would_refuse() -> None:
    with pytest.raises(ConfigError, match="rank"):
        draft_config(None, {"rank": "0"})


def test_comments_say_meaning_and_bounds() -> None:
    text = config_to_yaml(load())
    assert "gradients need. Auto or a whole number, at least 1.\nrank: 16\n" in text
    assert "#" not in config_to_yaml(load(), comments=False)


@pytest.mark.parametrize("options", ALL)
def test_every_option_is_grouped_described_and_nearest_to_itself(options: type[Any]) -> None:
    grouped = [name for fields in fields_by_group(options).values() for name in fields]
    assert grouped == list(fields_of(options)) and len(grouped) == len(set(grouped))
    known = known_names(options)
    for name, field in fields_of(options).items():
        assert field.description and field.description.endswith(".") and "\n" not in field.description
        assert allowed_values(field).endswith(".")
        assert nearest(name, known) == name.replace("_", "-")
        assert known[name.replace("_", "-")] == name.replace("_", "-"), "another option claims this name"


def test_formats_and_block_sizes_are_those_of_the_bytes() -> None:
    assert get_args(OutputFormat.model_fields["format"].annotation) == tuple(FORMATS)
    assert get_args(BaseFormat.model_fields["format"].annotation) == (*FORMATS, STORED, "none")
    assert get_args(ScaleOptions.model_fields["block_size"].annotation) == BLOCK_SIZES


def test_verbs_share_declarations() -> None:
    declared = {name: repr(field) for name, field in fields_of(TrainConfig).items()}  # subclasses copy fields
    assert {name: repr(field) for name, field in fields_of(DataConfig).items()}.items() <= declared.items()
    assert build_options(QuantizeConfig, {"model": "m", "out": "o"}).weights.block_size == 64
    with pytest.raises(ConfigError, match="Did you mean"):
        build_options(QuantizeConfig, {"model": "m", "out": "o", "rank": 4})


# ---- verbs and their groups


class Volume(Options, group="Sound"):
    loud: bool = knob(False, "Whether it is heard.")
    pitch: int = knob(440, "Of the note.", ge=20)


class Tuned(Volume):
    pitch: int = knob(442, "Of the note, in tune.", ge=400)
    notes: tuple[str, ...] = knob((), "To play.")


class Pace(Options, group="Time"):
    beats: int = knob(..., "In a minute.")


class Room(Options, group="Sound"):
    echo: float | None = knob(None, "Seconds.")


class Play(Verb):
    volume: Tuned
    pace: Pace
    room: Room


def test_groups_stand_under_their_headings_in_order() -> None:
    listed = {heading: list(fields) for heading, fields in fields_by_group(Play).items()}
    assert listed == {"Sound": ["loud", "pitch", "notes", "echo"], "Time": ["beats"]}
    assert groups_of(Play) == {"volume": Tuned, "pace": Pace, "room": Room}
    assert fields_of(Play)["pitch"].default == 442, "what extends a group narrows an option in its place"
    assert list(groups_of(TrainConfig)) == [
        *("model", "data", "objective", "method", "run", "weights", "rounding", "adapters", "memory", "loop", "machine")
    ]


def test_an_option_is_in_one_group_of_a_verb() -> None:
    class Hall(Options, group="Place"):
        echo: float = knob(0.0, "Seconds.")

    with pytest.raises(AssertionError, match="Concert has echo in two groups"):

        class Concert(Verb):
            room: Room
            hall: Hall


def test_flat_options_are_spread_over_the_groups_and_come_back() -> None:
    assert spread(Play, {"beats": 3, "echo": 1.0}) == {"volume": {}, "pace": {"beats": 3}, "room": {"echo": 1.0}}
    with pytest.raises(KeyError):
        spread(Play, {"tempo": 3})
    played = build_options(Play, {"beats": "90", "notes": ["a", "b"]})
    assert played == Play(volume=Tuned(notes=("a", "b")), pace=Pace(beats=90), room=Room())
    assert flat(played) == {"loud": False, "pitch": 442, "notes": ("a", "b"), "beats": 90, "echo": None}
    assert flat(played, "json")["notes"] == ["a", "b"]
    assert build_options(Play, flat(played)) == played
    with pytest.raises(ConfigError, match="beats is not given"):
        build_options(Play, {})


@pytest.mark.parametrize("verb", ALL)
def test_every_verb_knows_its_options_flat(verb: type[Verb]) -> None:
    names = [name for group in groups_of(verb).values() for name in group.model_fields]
    assert sorted(names) == sorted(fields_of(verb))
    whole = verb.model_construct(**{name: group.model_construct() for name, group in groups_of(verb).items()})
    assert flat(whole).keys() == {name for name, field in fields_of(verb).items() if not field.is_required()}


def test_options_are_replaced_by_name_and_nothing_else_changes() -> None:
    before = load(rank=8)
    after = with_options(before, packing=False, stream_base="always", max_seq_len=1)  # nybble's own: unchecked
    changed = {name for name, value in flat(before).items() if flat(after)[name] != value}
    assert changed == {"packing", "stream_base", "max_seq_len"} and flat(before)["packing"]
    assert after.adapters == before.adapters and with_options(before) == before
    with pytest.raises(KeyError):
        with_options(before, pakcing=False)
