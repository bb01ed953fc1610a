"""Did each layer's and expert's ΔW arrive? Asked of an artefact's own matrices, one after the other.

Of a matrix W that became W', <W' − W, ΔW> / <ΔW, ΔW> is 1 where all of ΔW is there, and 0 where none is. A whole model
may answer well while some experts, which few tokens reach, have lost theirs, or a layer whose part is no more than what
rounding the others changes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nybble.exporting.consumers import Consumer, TransformersConsumer
from nybble.exporting.gguf_model import ADAPTER_FILE, MODEL_FILE, read_gguf_adapter
from nybble.exporting.merged_source import MergedSource, Moved, how_moved
from nybble.exporting.verify import Check
from nybble.layers.streamed import expert_name
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.runs.adapter_files import PREFIX
from nybble.sources.open import open_model

LEAST = {  # of ΔW, by what the artefact promises
    ArtefactKind.PEFT: 0.99,
    ArtefactKind.DENSE: 0.9,
    ArtefactKind.FOUR_BIT: 0.5,
    ArtefactKind.GGUF_ADAPTER: 0.99,
}
LEAST_IN_BLOCKS, LEAST_IN_FOUR_BITS = 0.9, 0.5
SHOWN = 3
DEVIATIONS, FAINT = 4, 1.0  # of rounding, that are allowed for; with these a lost ΔW would pass


def deltas_arrived(
    merged: MergedSource, kind: ArtefactKind, folder: Path, consumer: Consumer | None, gguf_type: GgufType
) -> list[Check]:
    """A check of all that has an adapter: of a model in 16 bits always, else where experts are among it.

    Args:
        consumer: of the artefact; asked of PEFT's alone.
        gguf_type: of a GGUF model.
    """
    if not merged.adapter.experts and kind is not ArtefactKind.DENSE:
        return []
    if kind is ArtefactKind.GGUF:
        least = LEAST_IN_FOUR_BITS if gguf_type.in_four_bits else LEAST_IN_BLOCKS
        return [_check(merged.moved(open_model(str(folder / MODEL_FILE))), least)]
    if kind is ArtefactKind.GGUF_ADAPTER:
        return [_check(_gguf_deltas(merged, folder / ADAPTER_FILE), LEAST[kind])]
    if kind is not ArtefactKind.PEFT:
        return [_check(merged.moved(open_model(str(folder)).for_task(merged.task)), LEAST[kind])]
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


def _gguf_deltas(merged: MergedSource, file: Path) -> Iterator[Moved]:
    """What llama.cpp adds to each layer and expert, alpha / rank · B · A, along ΔW."""
    alpha, matrices = read_gguf_adapter(file, merged.opened.source)
    for name in merged.adapter.names:
        a, b = matrices[name]
        deltas = (b * (alpha / a.shape[-2])) @ a
        if name not in merged.experts:
            delta = merged.read_delta(f"{name}.weight")
            if delta is not None and delta.any():
                yield how_moved(name, merged.turned(name, deltas), delta)
            continue
        for index, theirs in enumerate(deltas):
            delta = merged.read_delta_expert(name, index)
            if delta is not None and delta.any():
                yield how_moved(expert_name(name, index), theirs, delta)
