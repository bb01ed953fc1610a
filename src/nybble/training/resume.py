"""Going on with a run: what must not have changed since its checkpoint, and saying what has."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.fingerprint import data_fingerprint, row_digests
from nybble.data.prepare import PreparedData
from nybble.errors import RunError
from nybble.options.option import flat, with_options, yaml_key
from nybble.options.verbs import TrainConfig, as_method, load_config, settle_method
from nybble.runs.folder import RunFolder
from nybble.training.checkpoint import CONFIG, Checkpoint

# Options that change nothing about the steps that follow, or whose content is compared instead of their name.
FREE_OPTIONS = (
    *("out", "overwrite", "resume", "allow_change", "allow", "save_every", "keep_checkpoints", "eval_every"),
    *("model", "tokenizer", "data", "validation_data", "memory", "adapter", "max_dense_share", "teacher"),
    *("track", "track_project", "revision", "offline"),
)


def settle_config(checkpoint: Checkpoint, config: TrainConfig) -> TrainConfig:
    """`config` with what the run had chosen for the options that choose for themselves.

    Raises:
        RunError: an option differs from the checkpoint's, and "config" is not among `allow_change`.
    """
    written = settle_method(load_config(checkpoint.folder / CONFIG, {}))
    before, begun = flat(written), written.method.method
    if "packing" not in config.memory.model_fields_set:  # what the model takes may have settled it
        config = with_options(config, packing=written.memory.packing)
    if config.method.method == "auto" and begun != "auto":  # it chose that
        config = as_method(config, begun)
    changed = [
        f"{yaml_key(name)} was {before[name]}, is {value}"
        for name, value in flat(config).items()
        if name not in FREE_OPTIONS and before[name] != value
    ]
    if changed and "config" not in config.run.allow_change:
        raise _changed(checkpoint, "options", "; ".join(changed), "config")
    config = with_options(config, revision=_revision(config, written))
    return config if changed else with_options(config, **checkpoint.state["settled"])


def _revision(config: TrainConfig, written: TrainConfig) -> str | None:
    """The run's own unless another is asked for; that of another model only where it is."""
    asked, own = config.model.revision, written.model.revision
    if config.model.model == written.model.model:
        return asked or own
    return None if asked == own else asked


def check_base(checkpoint: Checkpoint, fingerprint: str, allowed: Collection[str]) -> None:
    """Refuse another base model than the checkpoint's.

    Raises:
        RunError: it differs, and "base" is not among `allowed`.
    """
    before = checkpoint.about["base"]
    if before != fingerprint and "base" not in allowed:
        raise _changed(checkpoint, "a base model", f"its SHA-256 was {before[:16]}.., is {fingerprint[:16]}..", "base")


def check_data(checkpoint: Checkpoint, data: PreparedData, digests: "DataDigests", allowed: Collection[str]) -> None:
    """Refuse other examples than the checkpoint's, naming the first that differs.

    Raises:
        RunError: they differ, and "data" is not among `allowed`.
    """
    if checkpoint.about["data"] == digests.fingerprint or "data" in allowed:
        return
    before = DataDigests.read(RunFolder(checkpoint.folder.parents[1]).data_rows)
    if before is None or before.fingerprint != checkpoint.about["data"]:
        difference = f"their SHA-256 was {checkpoint.about['data'][:16]}.., is {digests.fingerprint[:16]}.."
    else:
        train = _difference("training", before.train, digests.train, data.train)
        validation = _difference("validation", before.validation, digests.validation, data.validation)
        weights = f"their weights: {before.mixture or 'none'} were, {digests.mixture or 'none'} are"
        difference = "; ".join(part for part in (train, validation) if part) or weights
    raise _changed(checkpoint, "examples", difference, "data")


def _difference(name: str, old: Tensor, new: Tensor, rows: Sequence[EncodedExample]) -> str:
    if torch.equal(old, new):
        return ""
    common = min(len(old), len(new))
    differing = (old[:common] != new[:common]).nonzero().flatten().tolist()
    place = differing[0] if differing else common
    where = f" ({rows[place].origin})" if place < len(rows) else ""
    return f"{len(old)} {name} sequences were, {len(new)} are, the first that differs is number {place + 1}{where}"


def _changed(checkpoint: Checkpoint, what: str, difference: str, name: str) -> RunError:
    return RunError(
        f"{checkpoint.folder} belongs to a run with other {what}: {difference}.".replace("other a ", "another "),
        "A run goes on with the base model, the examples and the options that it began with.",
        f"Restore them, start a new run, or insist with --allow-change {name}.",
    )


class DataDigests:
    """Digests of a run's sequences; kept in its folder, to name what changed.

    Args:
        train, validation: int64, one for each sequence.
        mixture: rows and weight of each data set where they have weights, else "".
    """

    def __init__(self, train: Tensor, validation: Tensor, mixture: str = ""):
        self.train, self.validation, self.mixture = train, validation, mixture
        self.fingerprint = data_fingerprint(train, validation, mixture)

    @classmethod
    def of(cls, data: PreparedData) -> "DataDigests":
        mixed = (
            ""
            if data.mixture is None
            else " ".join(
                f"{rows}:{weight}" for rows, weight in zip(data.mixture.rows, data.mixture.weights, strict=True)
            )
        )
        return cls(row_digests(data.train), row_digests(data.validation), mixed)

    @classmethod
    def read(cls, path: Path) -> "DataDigests | None":
        """None where the file is missing or damaged: it only serves a better message."""
        try:
            with safe_open(path, "pt") as file:
                mixture = (file.metadata() or {}).get("mixture", "")
                return cls(file.get_tensor("train"), file.get_tensor("validation"), mixture)
        except (OSError, SafetensorError):
            return None

    def write(self, path: Path) -> None:
        metadata = {"mixture": self.mixture} if self.mixture else None
        save_file({"train": self.train, "validation": self.validation}, path, metadata)
