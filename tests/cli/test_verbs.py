"""The command line as a user meets it: help, versions, flags, and every kind of mistake."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import yaml
from typed import typed
from typer.testing import CliRunner

import nybble
from nybble.cli.main import app
from nybble.cli.verbs import add_verb
from nybble.errors import NybbleError, TrainingError
from nybble.options.option import build_options, fields_of
from nybble.options.verbs import TrainConfig, load_config

VERBS = ("train", "chat", "quantize", "eval", "merge", "export", "serve", "doctor")
REQUIRED = ["--model", "m", "--data", "d.jsonl", "--out", "o"]


def run(*arguments: str) -> Any:
    return typed(arguments)


def refusal(*arguments: str) -> list[str]:
    """The lines printed for a user's mistake, once it is sure that nothing but a message came of it."""
    result = run(*arguments)
    assert result.exit_code == 2 and not result.stdout
    assert isinstance(result.exception, SystemExit), "an exception escaped"
    lines: list[str] = result.stderr.splitlines()
    assert lines[0].startswith("Error: ") and "Traceback" not in result.stderr
    return lines


def test_version() -> None:
    assert run("--version").stdout == f"nybble {nybble.__version__}\n"


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = "import sys; sys.modules['fcntl'] = None  # as where there is none\nfrom nybble.cli.main import app\n"
    code += "try: app(['--help'])\nexcept SystemExit: pass\n"
    code += "print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for verb in (*VERBS, "data"):
        assert re.search(rf"\b{verb}\b", done.stdout)


@pytest.mark.benchmark
def test_help_takes_less_than_half_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nybble", "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("verb", [[verb] for verb in VERBS] + [["data", "check"]])
def test_help_of_each_verb(verb: list[str]) -> None:
    result = run(*verb, "--help")
    assert result.exit_code == 0 and "Usage:" in result.stdout


def test_help_shows_each_option_once_with_its_default() -> None:
    text = " ".join(typed(["train", "--help"], env={"COLUMNS": "300"}).stdout.split())
    for name in fields_of(TrainConfig):
        assert len(re.findall(rf"│ --{name.replace('_', '-')} ", text)) == 1
    assert "what their first gradients need. (default: 16)" in text
    assert "(default: on)" in text and "(required)" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--rnak", "8"], ["--rnak", "Did you mean --rank?"]),
        (["train", "--learning-rate", "1"], ["Did you mean --lr?"]),
        (["train", "--print-confg"], ["Did you mean --print-config?"]),
        (["train", "--no-packng"], ["Did you mean --no-packing?"]),
        (["doctor", "--jsn"], ["Did you mean --json?"]),
        (["data", "check", "--modle", "m"], ["Did you mean --model?"]),
        (["quantize", "--rank", "8"], ["--rank", "Did you mean"]),
        (
            ["train", *REQUIRED, "--rank", "many"],
            ["rank is 'many'", "whole number, at least 1", "Leave it out to get 16"],
        ),
        (
            ["train", *REQUIRED, "--format", "nf5"],
            ["format is 'nf5'", "nf4, fp4, int4, int4_asym, nf3, nf2, stored, none"],
        ),
        (["quantize", "--model", "m", "--out", "o", "--format", "none"], ["format is 'none'"]),
        (["train", *REQUIRED, "--micro-batch-size", "99"], ["99", "at most rows-per-step"]),
        (["train", "--model", "m", "--data", "d"], ["out is not given", "--out OUT"]),
        (["train", "--model", "m", "--data", "d", "--out", ""], ["out is ''"]),
        (["chat"], ["run is not given", "--run RUN"]),
        (["train", "absent.yaml"], ["absent.yaml: No such file", "--print-config"]),
    ],
)
def test_mistakes(arguments: list[str], words: list[str]) -> None:
    text = "\n".join(refusal(*arguments))
    for word in words:
        assert word in text


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--rank"], ["train", "a.yaml", "b.yaml"]])
def test_mistakes_that_click_finds(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.stderr


def test_a_misspelt_verb_names_the_nearest() -> None:
    assert "'train'" in run("trian").stderr


def test_a_process_prints_three_lines_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: [brackets]\n")
    done = subprocess.run(
        [sys.executable, "-m", "nybble", "train", "run.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[0] == "Error: run.yaml: model is ['brackets']."  # not eaten as rich markup
    assert len(done.stderr.splitlines()) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_print_config_is_a_file_to_start_from(tmp_path: Path) -> None:
    result = run("train", "--print-config", "--rank", "4", "--target-modules", "q_proj,v_proj", "--no-packing")
    assert result.exit_code == 0
    values = yaml.safe_load(result.stdout)
    assert values["rank"] == 4 and values["model"] is None and values["packing"] is False
    assert values["target-modules"] == ["q_proj", "v_proj"]

    file = tmp_path / "run.yaml"
    file.write_text(result.stdout)
    again = run("train", str(file), "--print-config", "--lr", "1e-4", *REQUIRED)
    file.write_text(again.stdout)
    config = load_config(file, {})
    assert (config.adapters.rank, config.loop.lr, config.memory.packing) == (4, 1e-4, False)
    assert config.model.model == "m"


def test_only_flags_that_were_typed_reach_a_verb() -> None:
    seen = []

    def body(given: dict[str, Any], twice: Annotated[bool, typer.Option("--twice")] = False) -> int:
        seen.append((given, twice))
        return 0

    assert CliRunner().invoke(one_verb(body), ["--twice", "--rank", "4", "--no-packing"]).exit_code == 0
    assert seen == [({"rank": "4", "packing": False}, True)]


@pytest.mark.parametrize(
    ("error", "exit_code", "lines"),
    [
        (NybbleError("got", "allowed", "fix"), 2, ["Error: got", "allowed", "fix"]),
        (TrainingError("only this"), 2, ["Error: only this"]),
        (KeyboardInterrupt(), 130, []),
    ],
)
def test_what_a_verb_raises_becomes_lines_and_an_exit_code(
    error: BaseException, exit_code: int, lines: list[str]
) -> None:
    def body(given: dict[str, Any]) -> int:
        raise error

    result = CliRunner().invoke(one_verb(body), [])
    assert result.exit_code == exit_code and result.stderr.splitlines() == lines


def test_a_verbs_exit_code_is_the_processes() -> None:
    assert CliRunner().invoke(one_verb(lambda given: 130), []).exit_code == 130


def test_a_bug_is_not_dressed_up_as_the_users_mistake() -> None:
    def body(given: dict[str, Any]) -> int:
        raise KeyError("bug")

    assert isinstance(CliRunner().invoke(one_verb(body), []).exception, KeyError)


def verbs() -> list[tuple[str, Any]]:
    """Every verb of the command line, with its name."""
    found = []
    waiting = [("nybble", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        found.append((name, command))
        waiting += [(f"{name} {part}", inner) for part, inner in getattr(command, "commands", {}).items()]
    return [(name, command) for name, command in found if name not in ("nybble", "nybble data")]


@pytest.mark.parametrize("name, command", verbs(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_option_of_any_verb_forgets_a_value_that_was_given(name: str, command: Any, capsys: Any) -> None:
    """Given twice, an option is refused, or both values arrive."""
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    for option in options:
        values = [[], []] if option.is_flag else [["1"], ["2"]]
        arguments = [part for value in values for part in (option.opts[0], *value)]
        if option.multiple:
            assert list(command.make_context(name, arguments).params[option.name]) == ["1", "2"], option.opts
            continue
        with pytest.raises(typer.Exit) as stopped:
            command.make_context(name, arguments)
        assert stopped.value.exit_code == 2 and f"{option.opts[0]} is given twice" in capsys.readouterr().err
        if option.secondary_opts:
            with pytest.raises(typer.Exit):
                command.make_context(name, [option.opts[0], option.secondary_opts[0]])
            assert f"{option.opts[0]} is given twice" in capsys.readouterr().err


def test_lists_take_what_is_given_again() -> None:
    seen = []

    def body(given: dict[str, Any]) -> int:
        config = build_options(TrainConfig, given)
        seen.append((config.data.data, config.data.allow))
        return 0

    again = ["--data", "e,f.jsonl", "--allow", "validation-leak", "--allow", "too-long,truncated"]
    assert CliRunner().invoke(one_verb(body), [*REQUIRED, *again]).exit_code == 0
    assert seen == [(("d.jsonl", "e,f.jsonl"), ("validation-leak", "too-long", "truncated"))]


def one_verb(body: Any) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    add_verb(app, "verb", body, TrainConfig)
    return app


def test_doctor_reports_this_machine() -> None:
    facts = json.loads(run("doctor", "--json").stdout)
    import torch

    assert facts["packages"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads() and facts["cpu"]["cores"] >= 1
    assert len(facts["cuda"]) == torch.cuda.device_count()
    assert facts["memory"]["total_bytes"] is None or facts["memory"]["total_bytes"] > 1e8
    assert Path(facts["cpu_kernels"]["path"]).parent.is_dir(), "the kernels are looked for where they could be"
    reference = {row["op"] for row in facts["kernels"] if row["backend"] == "reference" and row["available"]}
    assert {"quantize_4bit", "dequantize_4bit"} <= reference
    for row in facts["kernels"]:
        assert row["available"] or row["reason"], "what is missing has a reason"


def test_doctor_in_words() -> None:
    text = run("doctor").stdout
    for word in ("torch", "processor", "memory", "Kernels", "quantize_4bit"):
        assert word in text
