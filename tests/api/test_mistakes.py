"""A mistake made from Python is the error that the command line prints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pictures import make_vision
from tiny_seq2seq import make_seq2seq
from typed import typed

import nybble
from nybble.errors import ConfigError, ModelError, NybbleError, RunError

VERBS: dict[str, Callable[..., Any]] = {
    "train": nybble.train,
    "plan": nybble.plan,
    "quantize": nybble.quantize,
    "eval": nybble.evaluate,
    "merge": nybble.merge,
    "export": nybble.export,
    "data check": nybble.check_data,
    "eval quality": nybble.evaluate_quality,
    "serve": nybble.serve,
    "synth": nybble.synth,
}
RUN = {"model": "MODEL", "data": "ROWS", "out": "new"}


@pytest.fixture
def places(tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run" / "config.yaml").write_text("model: m\ndata: d\nout: o\n")
    (tmp_path / "empty").mkdir()
    return {"MODEL": tiny_model, "ROWS": data}


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("train", RUN | {"rank": "many"}, "rank is 'many'"),
        ("train", {"model": "m", "data": "d"}, "out is not given"),
        ("train", RUN | {"micro_batch_size": 99}, "rows-per-step"),
        ("train", RUN | {"model": "nowhere/../nothing"}, "no model at"),
        ("train", RUN | {"data": "absent.jsonl"}, "absent.jsonl"),
        ("train", RUN | {"out": "a-run"}, "already holds a run"),
        ("train", RUN | {"out": "full"}, "holds files, but no run"),
        ("train", {"out": "empty", "resume": True}, "no run to go on with"),
        ("train", {"resume": True}, "needs the folder of the run"),
        ("train", RUN | {"target_modules": "nope"}, "target_modules names 'nope'"),
        ("plan", {"model": "nowhere/../nothing"}, "no model at"),
        ("quantize", {"model": "MODEL", "out": "full"}, "full"),
        ("quantize", {"model": "MODEL", "out": "new", "format": "none"}, "format is 'none'"),
        ("eval", {"run": "empty"}, "holds no run"),
        ("eval", {}, "run is not given"),
        ("merge", {"run": "a-run", "out": "new", "compare": True}, "both given"),
        ("export", {"run": "a-run", "out": "full", "to": "peft"}, "already exists"),
        ("export", {"run": "a-run", "out": "new"}, "to is not given"),
        ("data check", {"model": "MODEL", "data": "absent.jsonl"}, "absent.jsonl"),
        ("eval quality", {"model": "MODEL", "data": "ROWS", "arms": "nf5:absmax"}, "'nf5:absmax'"),
        ("serve", {}, "run is not given"),
        ("serve", {"run": ("empty",)}, "holds no run"),
        ("synth", {"shape": "huge", "out": "new"}, "shape is 'huge'"),
    ],
)
def test_it_is_the_same_error(verb: str, options: dict[str, Any], words: str, places: dict[str, Path]) -> None:
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(NybbleError) as raised:
        VERBS[verb](**given)
    assert words in raised.value.got
    flags = [part for name, value in given.items() for part in flag(name, value)]
    shown = typed([*verb.split(), *flags])
    assert shown.exit_code == raised.value.exit_code == 2
    error = raised.value
    assert shown.stderr.splitlines() == f"Error: {error}".splitlines()
    assert not Path("new").exists()


def flag(name: str, value: Any) -> list[str]:
    key = f"--{name.replace('_', '-')}"
    if isinstance(value, tuple):
        return [part for each in value for part in (key, str(each))]
    return [key] if value is True else [key, str(value)]


@pytest.mark.parametrize("function", VERBS.values(), ids=VERBS)
def test_an_unknown_keyword_names_the_nearest(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"no option 'trheads'|no option 'modle'") as raised:
        function(**({"modle": "m"} if function in (nybble.train, nybble.plan, nybble.quantize) else {"trheads": 2}))
    assert "Did you mean" in raised.value.got and raised.value.allowed.startswith("Options: ")


def test_a_file_of_options_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        nybble.train("absent.yaml")


def test_mistakes_with_the_parts(places: dict[str, Path], tmp_path: Path) -> None:
    source = nybble.open_model(places["MODEL"])
    data = nybble.load_data(places["ROWS"], source)
    for call, words in {
        "model": (lambda: nybble.open_model("nowhere/../nothing"), "no model at"),
        "type": (lambda: nybble.open_model(3), "model is 3"),
        "data": (lambda: nybble.load_data("absent.jsonl", source), "absent.jsonl"),
        "length": (lambda: nybble.load_data(places["ROWS"], source, max_seq_len=1), "max-seq-len is 1"),
        "option": (lambda: nybble.load_data(places["ROWS"], source, max_length=64), "Did you mean 'max-seq-len'"),
        "rows": (lambda: data.batches(rows=0), "rows-per-step is 0"),
        "micro": (lambda: data.steps(rows=4, micro_batch_size=5), "micro-batch-size is 5"),
        "format": (lambda: nybble.load(source, format="nf5"), "format is 'nf5'"),
        "keep": (lambda: nybble.load(source, keep="auto"), "keep is 'auto'"),
        "run": (lambda: nybble.open_run(tmp_path / "empty"), "holds no run"),
        "number": (lambda: nybble.open_run(3), "run is 3"),
    }.values():
        with pytest.raises(NybbleError) as raised:
            call()
        assert words in raised.value.got
    model = nybble.load(source)
    with pytest.raises(ConfigError, match="has no adapter"):
        model.save_adapter(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="names 'nope'"):
        nybble.add_adapters(model, target_modules="nope")
    nybble.add_adapters(model, rank=2)
    with pytest.raises(ConfigError, match="has adapters"):
        nybble.add_adapters(model, rank=2)


def test_models_that_no_loop_of_ones_own_is_made_of(data: Path, tmp_path: Path) -> None:
    vision, prompted = (nybble.open_model(make(tmp_path / make.__name__)) for make in (make_vision, make_seq2seq))
    for call in (lambda source: nybble.load_data(data, source), nybble.load):
        with pytest.raises(ModelError, match="a vision model, which reads pictures and no text"):
            call(vision)
        with pytest.raises(ConfigError, match=r"an encoder-decoder(.|\n)*nybble\.train"):
            call(prompted)
        with pytest.raises(ConfigError, match=r"nybble\.open_model\(PATH\)"):
            call(str(tmp_path))


def test_a_model_that_stays_in_16_bits_is_not_loaded_as_one_in_four(mostly_dense: Path) -> None:
    source = nybble.open_model(mostly_dense)
    with pytest.raises(ModelError, match="cannot be put into four bits"):
        nybble.load(source)
    assert nybble.load(source, format="none").module and nybble.load(source, max_dense_share=1.0).module


def test_a_run_of_another_version_says_which(trained: Path, tmp_path: Path) -> None:
    for record, maker in (('{"fingerprint": "f", "nybble": "9.9"}', "nybble 9.9"), (None, "an earlier nybble")):
        run = tmp_path / maker
        run.mkdir()
        (run / "config.yaml").write_text((trained / "config.yaml").read_text() + "wonder: 3\n")
        if record:
            (run / "base.json").write_text(record)
        with pytest.raises(RunError, match=rf"made by {maker}, and this one, {nybble.__version__}.*'wonder'"):
            nybble.open_run(run)
    own = (trained / "base.json").read_text()
    assert f'"nybble": "{nybble.__version__}"' in own
    (run / "base.json").write_text(own)
    with pytest.raises(ConfigError, match=r"no option 'wonder'"):
        nybble.open_run(run)
