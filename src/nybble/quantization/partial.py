"""What an interrupted quantisation has finished, so that the next one goes on from there.

Beside `out` lies `out.partial` with a file a block and a journal that names each file with its SHA-256; what the
journal does not name, or names with another hash, is done again. The journal also says what the work was started with:
a partial folder of other work is discarded.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from nybble.files.disk import fsync, write_complete

JOURNAL = "journal.json"
STATES = "states.safetensors"


@dataclass(frozen=True)
class LayerReport:
    """How one linear layer was put into four bits.

    Args:
        name: of the layer.
        method: "absmax", "search", "weighted search" or "calibrated".
        absmax_error: what plain absmax would have lost, and
        error: what was lost: the share of the layer's output over the calibration tokens, squared; of the weight
            itself where there are none.
        note: why it is not what was asked for, or what was done to its statistics.
    """

    name: str
    method: str
    absmax_error: float
    error: float
    note: str = ""


class PartialFolder:
    """The finished blocks of one piece of work.

    Args:
        out: what the work will become; nothing is written to it here.
        work: what decides the result, ready for JSON.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, out: Path, work: Mapping[str, Any]):
        self.path = out.absolute().with_name(f"{out.absolute().name}.partial")
        self._journal: dict[str, Any] = {"work": dict(work), "blocks": {}, "states": None}
        found = self._read_journal()
        if found is not None and found["work"] == self._journal["work"]:
            self._journal = found
        elif self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            journal = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none yet, or its writing was cut off by a crash: begin anew
            return None
        return journal if isinstance(journal, dict) and journal.keys() == self._journal.keys() else None

    def save(self, block: str, tensors: Mapping[str, Tensor], reports: Sequence[LayerReport]) -> None:
        """Keep a finished block."""
        blocks = self._journal["blocks"]
        file = blocks[block]["file"] if block in blocks else f"block-{len(blocks):05d}.safetensors"
        sha256 = self._write(file, tensors)
        blocks[block] = {"file": file, "sha256": sha256, "reports": [asdict(each) for each in reports]}
        self._write_journal()

    def load(self, block: str) -> dict[str, Tensor] | None:
        """A finished block's tensors; None where it is not there as the journal says."""
        entry = self._journal["blocks"].get(block)
        return None if entry is None else self._load(entry["file"], entry["sha256"])

    def reports(self, block: str) -> list[LayerReport]:
        return [LayerReport(**report) for report in self._journal["blocks"][block]["reports"]]

    def save_states(self, num_blocks: int, states: Mapping[str, Tensor]) -> None:
        """Keep the hidden states after the first `num_blocks` blocks, in place of earlier ones."""
        file = f"{num_blocks}-{STATES}"
        sha256 = self._write(file, states)
        previous = self._journal["states"]
        self._journal["states"] = {"after": num_blocks, "file": file, "sha256": sha256}
        self._write_journal()
        if previous is not None and previous["file"] != file:
            (self.path / previous["file"]).unlink(missing_ok=True)

    def load_states(self) -> tuple[int, dict[str, Tensor]] | None:
        """The latest states that were kept and after how many blocks they stand."""
        entry = self._journal["states"]
        states = None if entry is None else self._load(entry["file"], entry["sha256"])
        return None if states is None else (entry["after"], states)

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def _load(self, file: str, sha256: str) -> dict[str, Tensor] | None:
        path = self.path / file
        if not path.is_file():
            return None
        content = path.read_bytes()
        return load(content) if hashlib.sha256(content).hexdigest() == sha256 else None

    def _write(self, file: str, tensors: Mapping[str, Tensor]) -> str:
        """The file appears complete or not at all; returns its SHA-256."""
        temporary = self.path / f".{file}"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        fsync(temporary)
        with open(temporary, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.replace(temporary, self.path / file)
        return digest

    def _write_journal(self) -> None:
        write_complete(self.path / JOURNAL, json.dumps(self._journal, indent=1) + "\n")
