"""Did each expert's ΔW arrive? Asked of an artefact's own matrices, one after the other.

Of a matrix W that became W', <W' − W, ΔW> / <ΔW, ΔW> is 1 where all of ΔW is there, and 0 where none is. A whole model
may answer well while some experts, which few tokens reach, have lost theirs.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nybble.exporting.consumers import Consumer, TransformersConsumer
from nybble.exporting.merged_source import MergedSource, Moved, how_moved
from nybble.exporting.verify import Check
from nybble.layers.streamed import expert_name
from nybble.options.use_groups import ArtefactKind
from nybble.runs.adapter_files import PREFIX
from nybble.sources.open import open_model

LEAST = {ArtefactKind.PEFT: 0.99, ArtefactKind.DENSE: 0.9, ArtefactKind.FOUR_BIT: 0.5}
SHOWN = 3
DEVIATIONS, FAINT = 4, 1.0  # of rounding, that are allowed for; with these a lost ΔW would pass


def experts_arrived(merged: MergedSource, kind: ArtefactKind, folder: Path, consumer: Consumer) -> list[Check]:
    """A check of all that has an adapter, where experts are among it; none for other kinds.

    Args:
        consumer: of the artefact.
    """
    if not merged.adapter.experts or kind not in LEAST:
        return []
    if kind is not ArtefactKind.PEFT:
        return [_check(merged.moved(open_model(str(folder))), LEAST[kind])]
    if not isinstance(consumer, TransformersConsumer):
        return []  # nybble's own reader, which read these very matrices
    return [_check(_peft_deltas(merged, consumer.model), LEAST[kind])]


def _check(moved: Iterable[Moved], least: float) -> Check:
    found_in = list(moved)
    lost = [each for each in found_in if not abs(each.share - 1) <= 1 - least + DEVIATIONS * each.noise]
    found = f"{len(found_in) - len(lost)} of {len(found_in)}"
    if lost:
        found += "; not " + ", ".join(
            f"{each.name} ({round(each.share, 2) + 0.0:.0%})" for each in lost[:SHOWN]
        )  # no -0%
        found += f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    if faint := sum(DEVIATIONS * each.noise > FAINT for each in found_in):
        found += f"; {faint} too faint beside the rounding to tell"
    return Check("ΔW of each layer and expert", found, f"all, {least:.0%} of it at least", not lost)


def _peft_deltas(merged: MergedSource, model: Any) -> Iterator[Moved]:
    """What PEFT adds to each expert, along ΔW."""
    for name in sorted(merged.adapter.experts):
        wrapper = model.get_submodule(PREFIX + merged.adapter.stored_as(name))
        shape, deltas = merged.experts[name], wrapper.get_delta_weight("default").float()
        for index in range(shape.num):
            delta = merged.read_delta_expert(name, index)
            if delta is not None and delta.any():
                theirs = deltas[index].T if shape.transposed else deltas[index]
                yield how_moved(expert_name(name, index), theirs.to(delta.device), delta)
