"""A stack of matrices of one shape, such as one projection of all experts of a mixture, each in few bits by itself.

In memory an expert is a row of `packed` and a row of `scales` (laid out as quantized_tensor.py says). On disk a stack
called `w` has bitsandbytes' keys (bnb.py) with an axis of experts in front, so that an expert is a row of each, and a
folder of 128 experts a layer does not have 128 times as many tensors:

    w                                uint8 [E, ceil(n / 2)]
    w.absmax, w.zero_points          [E, B]
    w.nested_absmax                  fp32 [E, ceil(B / 256)]
    w.nested_offset                  fp32 [E]                       bitsandbytes has it in the state
    w.quant_map, w.nested_quant_map  as bitsandbytes has them
    w.quant_state.nybble_experts__nf4    the state's JSON, with the shape [E, out, in]

bitsandbytes has no stacks, so only nybble reads these.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.bnb import StoredWeight, from_bnb, state_key, stored_weight, to_bnb
from nybble.formats.format import FORMATS
from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import TensorEntry, row_entry

ROWS = ("", ".absmax", ".zero_points", ".nested_absmax")  # what an expert has a row of
SHARED = (".quant_map", ".nested_quant_map")
OFFSETS = ".nested_offset"
STATE = ".quant_state.nybble_experts__"


@dataclass(frozen=True)
class QuantizedStack:
    """E matrices `[out, in]` in one format.

    Args:
        packed: uint8 `[E, packed bytes]`.
        scales: uint8 `[E, scales' bytes]`, rows filled up to a multiple of four bytes.
        spec: of every matrix.
        shape: of a matrix, (out_features, in_features).
        dtype: of the matrices that they were made from.
    """

    packed: Tensor
    scales: Tensor
    spec: QuantSpec
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def empty(
        cls, num: int, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "QuantizedStack":
        """Room for so many matrices."""
        numel = prod(shape)
        packed = torch.empty(num, spec.packed_bytes(numel), dtype=torch.uint8, device=device)
        scales = torch.zeros(num, -(-spec.scales_bytes(numel) // 4) * 4, dtype=torch.uint8, device=device)
        return cls(packed, scales, spec, shape, dtype)

    @classmethod
    def of(cls, matrices: Iterable[QuantizedTensor], num: int) -> "QuantizedStack":
        """So many matrices of one shape and format, each copied as it comes."""
        stack = None
        for index, q in enumerate(matrices):
            stack = stack or cls.empty(num, q.spec, (q.shape[0], q.shape[1]), q.dtype, q.packed.device)
            stack.put(index, q)
        assert stack is not None
        return stack

    def __len__(self) -> int:
        return len(self.packed)

    def to(self, device: torch.device | str) -> "QuantizedStack":
        """On this device."""
        return replace(self, packed=self.packed.to(device), scales=self.scales.to(device))

    def matrix(self, index: int) -> QuantizedTensor:
        """One of them; nothing is copied."""
        packed = self.packed[index].view(self.spec.packed_shape(self.shape))
        scales = self.scales[index, : self.spec.scales_bytes(prod(self.shape))]
        return QuantizedTensor(packed, scales, self.spec, self.shape, self.dtype)

    def put(self, index: int, q: QuantizedTensor) -> None:
        """Copy a matrix into its place."""
        assert q.shape == self.shape and q.spec == self.spec, (q.shape, q.spec, self.shape, self.spec)
        self.packed[index].copy_(q.packed.reshape(-1))
        self.scales[index, : q.scales.numel()].copy_(q.scales)


def stored_tensors(name: str, weight: QuantizedTensor | QuantizedStack) -> dict[str, Tensor]:
    """The tensors to store for a parameter called `name`."""
    return to_bnb(name, weight) if isinstance(weight, QuantizedTensor) else _stack_tensors(name, weight)


def _stack_tensors(name: str, stack: QuantizedStack) -> dict[str, Tensor]:
    matrices = [to_bnb(name, stack.matrix(index)) for index in range(len(stack))]
    key = state_key(name, stack.spec.entry)
    states: list[dict[str, Any]] = [json.loads(bytes(each[key].tolist())) for each in matrices]
    tensors = {f"{name}{part}": matrices[0][f"{name}{part}"] for part in SHARED if f"{name}{part}" in matrices[0]}
    for part in ROWS:
        if f"{name}{part}" in matrices[0]:
            tensors[f"{name}{part}"] = torch.stack([each[f"{name}{part}"].flatten() for each in matrices])
    if stack.spec.double_quant:
        tensors[f"{name}{OFFSETS}"] = torch.tensor([state.pop("nested_offset") for state in states])
    state = states[0] | {"shape": [len(stack), *stack.shape]}
    content = bytearray(json.dumps(state).encode())
    tensors[f"{name}{STATE}{stack.spec.format}"] = torch.frombuffer(content, dtype=torch.uint8)
    return tensors


def is_stack(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a stack called `name` is stored among these tensors (only the keys are looked at)."""
    return any(f"{name}{STATE}{format}" in tensors for format in FORMATS)


def stack_owner(key: str) -> str | None:
    """The stack whose state is stored under this key; None where it is no stack's state."""
    name, marker, _ = key.partition(STATE)
    return name if marker else None


def stack_of_tensors(name: str, tensors: Mapping[str, Tensor]) -> QuantizedStack:
    """The stack called `name`, from the tensors that are stored for it, which are in memory.

    Raises:
        FormatError: they are damaged.
    """

    def read(entry: TensorEntry) -> Tensor:
        tensor = tensors[entry.name].contiguous()
        return tensor.view(-1).view(torch.uint8)[entry.start : entry.end].view(tensor.dtype).view(entry.shape)

    entries = {
        key: TensorEntry(key, str(tensor.dtype), tuple(tensor.shape), Path(), 0, tensor.nbytes)
        for key, tensor in tensors.items()
    }
    stored = StoredStack(name, entries, read)
    return QuantizedStack.of((stored.matrix(index) for index in range(stored.num)), stored.num)


class StoredStack:
    """A stack in a file, of which a matrix at a time is read.

    Args:
        name: of the stack.
        entries: what is stored for it.
        read: gives the tensor of an entry.

    Raises:
        FormatError: its state is malformed, or a part has not a row for each matrix.
    """

    def __init__(self, name: str, entries: Mapping[str, TensorEntry], read: Callable[[TensorEntry], Tensor]):
        self.name, self._entries, self._read = name, entries, read
        key = next(key for key in entries if stack_owner(key) == name)
        self._format = key.partition(STATE)[2]
        try:
            self._state: dict[str, Any] = json.loads(bytes(read(entries[key]).flatten().tolist()))
            self.num, out_features, in_features = self._state["shape"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(
                f"{key} is no state of a stack: {error}.", "It must be JSON with a shape of 3."
            ) from error
        self.shape = (out_features, in_features)
        rows = [*(f"{name}{part}" for part in ROWS), f"{name}{OFFSETS}"]
        for part in rows:
            if part in entries and (not entries[part].shape or entries[part].shape[0] != self.num):
                raise FormatError(
                    f"{part} has shape {list(entries[part].shape)}.",
                    f"It must have a row for each of {self.num} experts.",
                )
        self._shared = {
            f"{name}{part}": read(entries[f"{name}{part}"]) for part in SHARED if f"{name}{part}" in entries
        }
        offsets = entries.get(f"{name}{OFFSETS}")
        self._offsets = None if offsets is None else read(offsets).tolist()

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return sum(entry.nbytes for entry in self._entries.values())

    def matrix(self, index: int) -> QuantizedTensor:
        """One of them, in memory of its own.

        Raises:
            FormatError: it is damaged.
        """
        rows = {part: self._read(entry) for part, entry in self._rows(index).items()}
        return from_bnb(self.name, rows | self._small(index))

    def stored(self, index: int) -> tuple[StoredWeight, dict[str, TensorEntry]]:
        """Where the bytes of one of them lie."""
        rows, small = self._rows(index), self._small(index)
        sizes = {part: entry.nbytes for part, entry in rows.items()} | {part: t.nbytes for part, t in small.items()}
        return stored_weight(self.name, sizes, small.__getitem__), rows

    def _rows(self, index: int) -> dict[str, TensorEntry]:
        names = [f"{self.name}{part}" for part in ROWS]
        return {name: row_entry(self._entries[name], index) for name in names if name in self._entries}

    def _small(self, index: int) -> dict[str, Tensor]:
        """Tables and state of a matrix, as bitsandbytes stores them."""
        state = self._state | {"shape": list(self.shape)}
        if self._offsets is not None:
            state["nested_offset"] = self._offsets[index]
        key = state_key(self.name, FORMATS[self._format])
        return self._shared | {key: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)}
