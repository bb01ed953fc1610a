"""Manifests: any change of a byte, of a size or of the manifest itself is seen."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from nybble.errors import FormatError
from nybble.files.disk import complete_folder
from nybble.files.manifest import MANIFEST_NAME, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(bytes(range(64)))
    (tmp_path / "deep" / "b").write_bytes(b"b")
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path, {"step": 3})
    return tmp_path


def test_what_was_written_verifies_and_says_what_it_is_about(folder: Path) -> None:
    assert verify_manifest(folder) == {"step": 3}
    files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    assert files["deep/b"] == {"bytes": 1, "sha256": hashlib.sha256(b"b").hexdigest()}
    assert files.keys() == {"a", "deep/b", "empty"}
    (folder / "another").write_bytes(b"")
    verify_manifest(folder)


@pytest.mark.parametrize("name", ["a", "deep/b", MANIFEST_NAME])
def test_every_flipped_bit_is_seen(name: str, folder: Path) -> None:
    path = folder / name
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(FormatError, match="not as it was written"):
            verify_manifest(folder)
    path.write_bytes(content)
    verify_manifest(folder)


def test_sizes_missing_files_and_a_missing_manifest_are_seen(folder: Path) -> None:
    for name in ("a", "empty", MANIFEST_NAME):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        with pytest.raises(FormatError, match=name):
            verify_manifest(folder)
        os.unlink(folder / name)
        with pytest.raises(FormatError, match=name):
            verify_manifest(folder)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\\..\\x"])
def test_a_manifest_may_not_point_out_of_its_folder(name: str, folder: Path) -> None:
    content = {"version": 1, "about": {}, "files": {name: {"bytes": 0, "sha256": ""}}}
    digest = hashlib.sha256(json.dumps(content, indent=1, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps({"sha256": digest} | content, indent=1) + "\n")
    with pytest.raises(FormatError, match="outside the folder"):
        verify_manifest(folder)


def test_a_complete_folder_is_sealed_after_its_files_are_written(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "f", lambda folder: write_manifest(folder, {})) as temporary:
        (temporary / "a").write_bytes(b"a")
        assert not (tmp_path / "f").exists()
    verify_manifest(tmp_path / "f")
    with complete_folder(tmp_path / "f", lambda folder: write_manifest(folder, {"new": True})) as temporary:
        (temporary / "b").write_bytes(b"b")
    assert verify_manifest(tmp_path / "f") == {"new": True}
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["b", MANIFEST_NAME]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
