"""Pushing onto a hub that runs here: what goes there, what does not, and what a refusal says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from huggingface_hub import constants
from typed import typed

import nybble
from nybble.errors import ExportError
from nybble.sources.open import open_model

TO = "someone/tuned"
CARD = "---\nbase_model: someone/base\nlibrary_name: peft\n---\n\n# An adapter\n\n| loss | 1.25 |\n"


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    run = make_run()
    (run / "adapter" / "README.md").write_text(CARD)
    return run


def test_a_runs_adapter_goes_there_with_its_card_and_nothing_else(hub: Hub, run: Path) -> None:
    adapter = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    dry = typed(["push", run, TO, "--dry-run", "--private"])
    assert dry.exit_code == 0 and not hub.asked and "nothing was sent" in dry.stdout, dry.output
    assert all(name in dry.stdout for name in adapter)

    done = typed(["push", run, TO, "--private"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert hub.repos[TO]["main"] == adapter and TO in hub.private
    assert hub.url + f"/{TO}/commit/" in done.stdout.replace("\n", "")
    assert "adapter_config.json names the base 'base', which is no hub id" in done.stdout.replace("\n", " ")
    assert hub.count("PUT /store") == 1, "weights as large files"
    assert hub.tokens == {"Bearer hf_secret"} and "hf_secret" not in done.output
    assert not any("hf_secret" in file.read_text() for file in run.rglob("*.json")), "it is kept nowhere"

    again = nybble.push(run, TO, revision="second")
    assert hub.count("PUT /store") == 1 and again.files.keys() == adapter.keys(), "what is there is not sent again"
    assert hub.repos[TO]["second"] == adapter and again.url is not None


def test_a_merged_folder_is_opened_from_there(hub: Hub, run: Path, tmp_path: Path) -> None:
    base = open_model(str(run.parent / "base"))
    small = nybble.quantize(model=run.parent / "base", out=tmp_path / "small").folder
    pushed = nybble.push(small, TO)
    assert pushed.num_bytes == sum(path.stat().st_size for path in small.iterdir())
    fetched, local = open_model(TO), open_model(str(small))
    assert fetched.made_from == base.fingerprint()
    for name in local.tensor_names():
        ours, theirs = local.read(name), fetched.read(name)
        assert torch.equal(getattr(ours, "packed", ours), getattr(theirs, "packed", theirs))
    damaged = tmp_path / "damaged"
    shutil.copytree(small, damaged)
    (damaged / "config.json").write_text("{}")
    with pytest.raises(nybble.NybbleError, match=r"config\.json"):
        nybble.push(damaged, TO)


def test_only_a_models_own_files_go_and_the_rest_is_named(hub: Hub, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    for name in ("token", "optimizer.pt", "rows.jsonl", ".hidden"):
        (folder / name).write_text("secret")
    shutil.copytree(run / "adapter", folder / "checkpoints" / "step-1")
    shown = typed(["push", folder, TO, "--dry-run"])
    assert shown.exit_code == 0 and not hub.asked
    assert "not sent: .hidden, checkpoints, optimizer.pt, rows.jsonl and 1 more" in " ".join(shown.output.split())
    assert nybble.push(folder, TO, dry_run=True).files.keys() == {path.name for path in (run / "adapter").iterdir()}
    result = typed(["push", run.parent, TO])
    assert result.exit_code == 2 and "holds no adapter, no model" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_model.safetensors", None, "is truncated|claims a header"),
        ("adapter_config.json", b"", r"adapter_config\.json cannot be read"),
        ("adapter_config.json", b"[]", r"adapter_config\.json cannot be read.*a list where names are due"),
        ("adapter_config.json", b"\xff", r"adapter_config\.json cannot be read"),
        ("README.md", b"---\nbase_model: [a\n---\n", r"README\.md cannot be read"),
        ("README.md", b"---\n- a\n---\n", r"README\.md cannot be read"),
        ("verification.json", b"{", r"verification\.json cannot be read"),
    ],
)
def test_damaged_folders_are_refused(
    name: str, content: bytes | None, said: str, hub: Hub, run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = folder / name
    file.write_bytes(file.read_bytes()[:50] if content is None else content)
    with pytest.raises(nybble.NybbleError, match=f"(?s){said}"):
        nybble.push(folder, TO)
    assert not hub.asked


def test_what_was_not_verified_is_said_under_any_name(hub: Hub, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "adapter", tmp_path / "renamed")
    (folder / "verification.json").write_text(json.dumps({"passed": False, "outcome": "failed"}))
    shown = typed(["push", folder, TO, "--dry-run"])
    assert shown.exit_code == 0 and "verification.json says failed" in " ".join(shown.output.split())


def test_a_repository_that_others_see_is_not_taken_for_private(hub: Hub, run: Path) -> None:
    nybble.push(run, TO)
    before = json.dumps(hub.repos[TO]["main"], default=str)
    result = typed(["push", run, TO, "--private"])
    assert result.exit_code == 2 and "is there already, and public" in result.stderr
    assert json.dumps(hub.repos[TO]["main"], default=str) == before


@pytest.mark.parametrize(
    ("request_", "status", "headers", "said"),
    [
        ("POST /api/repos/create", 401, {}, r"without a token that it takes \(401\)"),
        ("POST /api/repos/create", 403, {}, r"(?s)has no right to a model someone/tuned \(403\).*hf auth login"),
        ("POST /api/models/someone/tuned/preupload", 404, {"X_Error_Code": "RepoNotFound"}, "no model someone/tuned"),
        ("POST /api/repos/create", 429, {"Retry_After": "9"}, r"(?s)no more requests.*Try again in 9 s"),
        ("PUT /store", 413, {}, r"refused a model someone/tuned \(413\)"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_do(
    hub: Hub, run: Path, request_: str, status: int, headers: dict[str, str], said: str
) -> None:
    hub.refuse(request_, status, **headers)
    with pytest.raises(ExportError, match=said) as refused:
        nybble.push(run, TO)
    assert not hub.repos.get(TO, {}).get("main") and "hf_secret" not in str(refused.value)


def test_a_hub_that_is_down_and_a_card_that_it_does_not_take(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "adapter" / "README.md").write_text(CARD.replace("someone/base", "/models/base"))
    with pytest.raises(ExportError, match=r"(?s)refused .*base_model.* is no model id.*Mend"):
        nybble.push(run, TO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = typed(["push", run, "someone/other"])
    assert result.exit_code == 2 and "Check the network" in result.stderr and "Traceback" not in result.output
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="Nothing can be sent: HF_HUB_OFFLINE"):
        nybble.push(run, "someone/other")


@pytest.mark.parametrize("name", ["a b", "a..b", "-x", "x.lock", "a//b", "x/", "re~1", "@", "a/.b"])
def test_a_branch_that_git_does_not_take_is_refused_before_anything_is_sent(hub: Hub, run: Path, name: str) -> None:
    with pytest.raises(ExportError, match="names no branch"):
        nybble.push(run, TO, revision=name)
    assert TO not in hub.repos


def test_what_is_nothing_to_push_is_refused(hub: Hub, run: Path, tmp_path: Path) -> None:
    refused = {
        "holds no adapter, no model and no GGUF file": (tmp_path / "nowhere", TO),
        "names no repository": (run, "tuned"),
        "names no repository: ": (run, "someone/x--y"),
        "was not verified": (shutil.copytree(run / "adapter", tmp_path / "merged.unverified"), TO),
    }
    shutil.rmtree(run / "adapter")
    refused["holds no adapter and no model yet"] = (run, TO)
    for said, (folder, repository) in refused.items():
        result = typed(["push", folder, repository])
        assert result.exit_code == 2 and said in result.stderr.replace("\n", " "), (said, result.output)
    assert not hub.asked
