"""Layers whose weights are not in memory: they know where the bytes come from, and what they would be.

`StreamedLinear` stands for a four-bit linear layer of a block; its bytes come from a block store (`memory/store.py`)
when a decoder block asks for them. Embedding and head read rows and panels of their 16-bit matrices themselves.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor, nn

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors_io import MatrixFile


class BlockStore(Protocol):
    """Where a streamed base's blocks come from."""

    def begin(self, *, will_return: bool) -> None:
        """A pass over the blocks starts at the first; `will_return`: a backward pass follows it."""
        ...

    def fetch(self, name: str) -> QuantizedTensor:
        """The weight of the linear layer called `name`, valid until a layer of another block is fetched."""
        ...


class StreamedLinear(nn.Module):
    """A frozen four-bit linear layer without its weight; only decoder blocks compute with it.

    Args:
        name: in the model, which the block store knows it by.
        bias: stays in memory, None without one.
    """

    bias: nn.Parameter | None

    def __init__(self, name: str, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.name, self.in_features, self.out_features = name, in_features, out_features
        empty = torch.empty(out_features, dtype=dtype, device="meta")
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)


class StreamedEmbedding(nn.Module):
    """An embedding that reads the rows it is asked for.

    Args:
        matrix: `[vocabulary, hidden]` on disk.
        compute_dtype: of the result.
    """

    def __init__(self, matrix: MatrixFile, compute_dtype: torch.dtype):
        super().__init__()
        self.matrix, self.compute_dtype = matrix, compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        rows = self.matrix.gather(input.flatten())
        return rows.view(*input.shape, -1).to(self.compute_dtype)


class HeadMatrix:
    """The output head's matrix on disk, handed out in panels of rows; the next is read while one is used."""

    device = torch.device("cpu")

    def __init__(self, matrix: MatrixFile):
        self.matrix, self.dtype = matrix, matrix.dtype
        self.shape = torch.Size((matrix.num_rows, matrix.num_columns))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nybble-head")

    def split(self, rows: int) -> Iterator[Tensor]:
        """Panels of up to `rows` rows in order, each valid until the next is asked for.

        Raises:
            ModelError: reading fails, or the file ends too soon.
        """
        starts = range(0, self.shape[0], rows)
        buffers = [torch.empty(rows * self.matrix.row_bytes, dtype=torch.uint8) for _ in starts[:2]]

        def read(i: int) -> Tensor:
            return self.matrix.read_rows(starts[i], min(starts[i] + rows, self.shape[0]), buffers[i % 2])

        coming = self._reader.submit(read, 0)
        for i in range(len(starts)):
            panel = coming.result()
            if i + 1 < len(starts):
                coming = self._reader.submit(read, i + 1)
            yield panel


class StreamedHead(nn.Module):
    """Stands in a model's head; the loss head reads its matrix in panels."""

    def __init__(self, matrix: MatrixFile):
        super().__init__()
        self.weight = HeadMatrix(matrix)
