"""The weights of a folder that other programs put into few bits, assembled from the tensors that they are stored as."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.packed_layout import PackedLayout
from nybble.formats.packed_methods import Packing, names_module
from nybble.formats.safetensors import TensorEntry

CACHE_SCALES = (".k_scale", ".v_scale")  # of keys and values that a server keeps
DAMAGED = "The checkpoint is damaged, or its config belongs to another."


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored as several tensors.

    Args:
        module: that has it.
        parts: end of name -> name of the stored tensor.
        shape: of the weight.
    """

    module: str
    layout: PackedLayout
    parts: Mapping[str, str]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.module + self.layout.weight

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """The weight, widened; `read` gives a stored tensor.

        Raises:
            FormatError: its parts do not fit together.
        """
        tensors = {end: read(name) for end, name in self.parts.items()}
        try:
            return self.layout.dequantize(tensors)
        except FormatError as error:
            raise _named(self.module, error) from error


@dataclass(frozen=True)
class PackedWeights:
    """All of a folder's.

    Args:
        weights: by the name of the parameter.
        unused: stored scales of activations, which frozen weights do without.
    """

    weights: Mapping[str, PackedWeight]
    unused: tuple[str, ...]

    @property
    def part_names(self) -> set[str]:
        """Every stored tensor that is not a weight like any other."""
        return {name for weight in self.weights.values() for name in weight.parts.values()} | set(self.unused)

    def notes(self, name: str) -> list[str]:
        """Sentences on what is done with them; `name` is the model's."""
        if not self.weights:
            return []
        kinds = "; ".join(sorted({weight.layout.name for weight in self.weights.values()}))
        notes = [
            f"{name} was published in few bits ({kinds}): {len(self.weights)} weights are widened, one at a time. "
            "Where its makers publish it in 16 bits too, that is the better start."
        ]
        if self.unused:
            notes.append(f"Left out: {len(self.unused)} scales of activations, which frozen weights do without.")
        return notes


def find_packed_weights(packing: Packing, entries: Mapping[str, TensorEntry]) -> PackedWeights:
    """The weights that are stored as a config says. Nothing is read.

    Raises:
        FormatError: a part is missing, of another type or shape than the others ask for, or without codes; a module
            that the config keeps in 16 bits is not; or no weight is stored so.
    """
    layouts = [layout for _, layout in packing.layouts]
    unused_ends = {end for layout in layouts for end in layout.unused} | set(CACHE_SCALES)
    ends = sorted({end for layout in layouts for end in (*layout.parts, *layout.aliases)}, key=len, reverse=True)
    unused, found = [], dict[str, dict[str, str]]()
    for name in entries:
        if any(name.endswith(end) for end in unused_ends):
            unused.append(name)
        elif end := next((end for end in ends if name.endswith(end)), None):
            found.setdefault(name.removesuffix(end), {})[end] = name
    weights = {}
    for module, parts in found.items():
        layout = packing.layout_of(module)
        if layout is None:
            continue
        own = {layout.aliases.get(end, end): name for end, name in parts.items()}
        if (weight := _weight(module, layout, own, entries)) is not None:
            weights[weight.name] = weight
            _check_not_kept(packing, module)
    if not weights:
        raise FormatError(
            f"quantization_config says {packing.method}, and no weight is stored so.",
            f"Needed: tensors that end in {', '.join(layouts[0].parts)}.",
            "Take quantization_config out of config.json if the weights are in 16 bits; else fetch the model again.",
        )
    return PackedWeights(weights, tuple(unused))


def _weight(
    module: str, layout: PackedLayout, parts: dict[str, str], entries: Mapping[str, TensorEntry]
) -> PackedWeight | None:
    """The weight of a module; None where it is one like any other."""
    codes = parts.get(layout.codes)
    if codes is None or entries[codes].dtype not in layout.parts[layout.codes].dtypes:
        if others := [name for end, name in parts.items() if end != layout.codes and end in layout.parts]:
            what = f"{module}{layout.codes} is {'missing' if codes is None else entries[codes].dtype}"
            wanted = " or ".join(layout.parts[layout.codes].dtypes)
            raise FormatError(f"{what}, beside {others[0]}.", f"Needed of {layout.name}: {wanted}.", DAMAGED)
        return None
    for end, part in layout.parts.items():
        if end not in parts:
            if part.needed:
                raise FormatError(f"{module}{end} is missing.", f"{layout.name} needs it.", DAMAGED)
        elif (dtype := entries[parts[end]].dtype) not in part.dtypes:
            raise FormatError(f"{module}{end} is {dtype}.", f"Readable: {', '.join(part.dtypes)}.", DAMAGED)
    own = {end: parts[end] for end in layout.parts if end in parts}
    try:
        shape = layout.shape({end: entries[name].shape for end, name in own.items()})
    except FormatError as error:
        raise _named(module, error) from error
    return PackedWeight(module, layout, own, shape)


def _check_not_kept(packing: Packing, module: str) -> None:
    if keeping := [name for name in packing.kept if names_module(name, module)]:
        raise FormatError(
            f"{module} is stored in few bits, and quantization_config keeps it in 16 ({keeping[0]!r}).",
            fix=DAMAGED,
        )


def _named(module: str, error: FormatError) -> FormatError:
    """The same, with the module's name before what is said of a part of it."""
    got = f"{module}{error.got}" if error.got.startswith((".", "_")) else f"{module}: {error.got}"
    return FormatError(got, error.allowed, error.fix)
