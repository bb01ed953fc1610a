"""Layers whose weights are not in memory: they know where the bytes come from, and what they would be.

`StreamedLinear` stands for a four-bit linear layer of a block; its bytes come from a block store (`memory/store.py`)
when a decoder block, or its own forward and backward, asks for them. Embedding and head read rows and panels of their
16-bit matrices themselves.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.formats.safetensors import MatrixFile
from nybble.kernels.ops.four_bit import dequantize
from nybble.layers.expert_products import ExpertMatrices
from nybble.sizes import SHAPE_RULES


class BlockStore(Protocol):
    """Where a streamed base's blocks come from."""

    def begin(self, *, will_return: bool) -> None:
        """A pass over the blocks starts at the first; `will_return`: a backward pass follows it."""

    def fetch(self, name: str) -> QuantizedTensor:
        """The weight of the linear layer or expert called `name`, valid until one of another block is fetched."""


def add_into(y: Tensor, other: Tensor) -> Tensor:
    """y + other, in the place of a y that is nobody else's: what comes and goes between tensors that are kept leaves
    gaps in the C library's heap.
    """
    return y.add_(other) if torch.result_type(y, other) == y.dtype else y + other


class FrozenProduct(torch.autograd.Function):
    """y = x · Wᵀ and dx = dy · W, `dense(dtype)` making W anew for each; it has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.dense = dense
        return F.linear(x, dense(x.dtype))  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (grad_y,) = grad_outputs
        return (grad_y @ ctx.dense(grad_y.dtype) if ctx.needs_input_grad[0] else None), None


class StreamedLinear(nn.Module):
    """A frozen four-bit linear layer without its weight.

    Args:
        name: in the model, which the block store knows it by.
        bias: stays in memory, None without one.
        device: where the weight is computed with.

    Attributes:
        store: that has the weight; set by the backbone whose modules compute through `forward`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.name, self.in_features, self.out_features = name, in_features, out_features
        self.device, self.compute_dtype = torch.device(device), dtype
        self.store: BlockStore | None = None
        empty = torch.empty(out_features, dtype=dtype, device="meta")
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)

    @property
    def weight(self) -> Tensor:
        """Without numbers, as `QuantizedLinear` has it."""
        return torch.empty(0, dtype=self.compute_dtype, device=self.device)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight, `[out_features, in_features]`."""
        assert self.store is not None, f"{self.name} is streamed, and there is no block store"
        return dequantize(self.store.fetch(self.name), dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = FrozenProduct.apply(x, self.dense)
        return y if self.bias is None else add_into(y, self.bias)


class StreamedExperts(ExpertMatrices):
    """One projection of all experts of a mixture, without its matrices.

    Args:
        name: in the model; the block store knows its experts by `expert_name`.
        device: where matrices are computed with.

    Attributes:
        store: as of `StreamedLinear`.
    """

    def __init__(self, name: str, num: int, in_features: int, out_features: int, device: torch.device | str = "cpu"):
        super().__init__(num, in_features, out_features)
        self.name, self.device = name, torch.device(device)
        self.store: BlockStore | None = None

    def matrix(self, index: int) -> QuantizedTensor:
        assert self.store is not None, f"{self.name} is streamed, and there is no block store"
        return self.store.fetch(expert_name(self.name, index))


def expert_name(stack: str, index: int) -> str:
    """What one expert's matrix is called, of a projection of all experts."""
    return f"{stack}.{index}"


def attach_store(model: nn.Module, store: BlockStore) -> None:
    """Let the model's streamed layers compute by themselves."""
    for module in model.modules():
        if isinstance(module, StreamedLinear | StreamedExperts):
            module.store = store


def embed_rows(own_class: type[nn.Embedding], embedding: nn.Embedding, rows: Tensor, shape: torch.Size) -> Tensor:
    """What an embedding of `own_class` makes of rows that were looked up elsewhere: its own forward over just these.

    Args:
        rows: `(N, hidden)`, one for each place of `shape` in order.

    Returns:
        `(*shape, hidden)`.
    """
    few = copy.copy(embedding)  # shares all but the table
    few._parameters = {**embedding._parameters, "weight": nn.Parameter(rows, requires_grad=False)}
    few.padding_idx = None  # a row of the whole table, and of interest to gradients alone
    return own_class.forward(few, torch.arange(len(rows), device=rows.device).view(shape))


class StreamedEmbedding(nn.Module):
    """An embedding that reads the rows it is asked for.

    Args:
        matrix: `[vocabulary, hidden]` on disk.
        compute_dtype: of the result.
        own: the embedding that it stands for, which says what is done to rows; its table is dropped.
    """

    def __init__(self, matrix: MatrixFile, compute_dtype: torch.dtype, own: nn.Embedding):
        super().__init__()
        self.matrix, self.compute_dtype = matrix, compute_dtype
        own.weight = nn.Parameter(torch.empty(0, matrix.num_columns, dtype=compute_dtype), requires_grad=False)
        self.own = own

    def forward(self, input: Tensor) -> Tensor:
        rows = self.matrix.gather(input.flatten().cpu()).to(input.device, self.compute_dtype)
        return embed_rows(type(self.own), self.own, rows, input.shape)


class HeadMatrix:
    """The output head's matrix on disk, handed out in panels of rows; the next is read while one is used.

    Args:
        device: where panels go.
    """

    def __init__(self, matrix: MatrixFile, device: torch.device | str = "cpu"):
        self.matrix, self.dtype, self.device = matrix, matrix.dtype, torch.device(device)
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
            yield panel.to(self.device)


class StreamedHead(nn.Module):
    """Stands in a model's head and reads its matrix in panels, as the loss head does; a bias stays in memory."""

    def __init__(self, matrix: MatrixFile, bias: nn.Parameter | None, device: torch.device | str = "cpu"):
        super().__init__()
        self.weight, self.bias = HeadMatrix(matrix, device), bias

    def forward(self, x: Tensor) -> Tensor:
        y = panel_product(x, self.weight)
        return y if self.bias is None else add_into(y, self.bias).to(y.dtype)


class _PanelProduct(torch.autograd.Function):
    """y = x · Wᵀ and dx = dy · W, a panel of W's rows at a time, widened anew for each; W has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: "Tensor | HeadMatrix") -> Tensor:
        row_bytes = weight.shape[1] * weight.dtype.itemsize
        rules = SHAPE_RULES[x.device.type]
        ctx.weight, ctx.rows = weight, min(rules.panel_rows, max(1, rules.panel_bytes // row_bytes))
        return torch.cat([F.linear(x, panel) for panel in widened(weight, ctx.rows, x.dtype)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (grad_y,) = grad_outputs
        grad_x = None
        panels = widened(ctx.weight, ctx.rows, grad_y.dtype)
        for columns, panel in zip(grad_y.split(ctx.rows, dim=-1), panels, strict=True):
            part = columns @ panel
            grad_x = part if grad_x is None else grad_x + part
        return grad_x, None


def widened(
    weight: "Tensor | HeadMatrix", rows: int, dtype: torch.dtype, room: Tensor | None = None
) -> Iterator[Tensor]:
    """So many rows of W at a time, in `dtype`, each used before the next is asked for.

    Args:
        room: `[rows, in]` in `dtype`, which every panel is widened into, since the heap would keep one room for each;
            taken anew where it is None.
    """
    for panel in weight.split(rows):
        if panel.dtype == dtype:
            yield panel
            continue
        room = panel.new_empty(panel.shape, dtype=dtype) if room is None else room
        yield room[: len(panel)].copy_(panel)


def panel_product(x: Tensor, weight: "Tensor | HeadMatrix") -> Tensor:
    """x · Wᵀ, `(..., in)` -> `(..., out)`, in the dtype of x; never holds more than a panel of W in it."""
    product: Tensor = _PanelProduct.apply(x, weight)
    return product
