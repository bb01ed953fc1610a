"""Linear layers that read the same input, with the adapters beside them: forward and backward, a product at a time.

LoRA's formulas (arXiv 2106.09685), y = W·x + bias + scaling·B·A·x. `layers/augmented.py` has the same in one product.
DoRA's (arXiv 2402.09353), y = c·(W + scaling·B·A)·x + bias, are the same of c·W and c·B, each row times its own c =
m / n; only the gradient of m, Σ g·(y - bias) / m over the tokens, takes the product with W once more where y is gone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.ops.four_bit import dequantize_into
from nybble.kernels.slabs import copy_of, empty_like
from nybble.layers.dense import weight_matrix
from nybble.layers.lora import DoraLinear, LoraLinear, linear_features
from nybble.layers.quantized_linear import QuantizedLinear
from nybble.layers.quantized_weight import QuantizedWeight
from nybble.layers.rooms import Rooms
from nybble.layers.streamed import BlockStore, StreamedLinear
from nybble.sizes import SHAPE_RULES, panel_rows


class DenseWeights:
    """Dequantises frozen weights into kept buffers: a fresh one per product costs more than the arithmetic.

    Args:
        store: of a streamed base's blocks.
    """

    def __init__(self, store: BlockStore | None = None) -> None:
        self.store = store
        self.rooms = Rooms()
        self._held: dict[object, object] = {}

    def begin(self, *, will_return: bool) -> None:
        """A forward pass starts at the first block; `will_return`: its backward pass follows."""
        self._held.clear()  # so that every pass does the same, whatever the one before it was
        if self.store is not None:
            self.store.begin(will_return=will_return)

    def stored(self, linear: Any) -> QuantizedTensor | Tensor:
        """The weight of a frozen linear as it is kept, `[out, in]`."""
        if isinstance(linear, StreamedLinear):
            assert self.store is not None, f"{linear.name} is streamed, and there is no block store"
            return self.store.fetch(linear.name)
        if isinstance(linear, QuantizedLinear):
            return linear.quantized()
        weight = weight_matrix(linear)
        return weight.q if isinstance(weight, QuantizedWeight) else weight

    def panels(self, linear: Any, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight of a frozen linear, `[out, in]` in `dtype`, so many rows at a time as `weight_panel_bytes` of the
        device holds: which rows, and they themselves, valid until the next are fetched.
        """
        stored = self.stored(linear)
        if isinstance(stored, Tensor):
            yield slice(0, stored.shape[0]), stored.to(dtype)
            return
        device, (out, width) = stored.packed.device, stored.shape
        most, multiple = SHAPE_RULES[device.type].weight_panel_bytes, stored.spec.row_multiple(width)
        rows = panel_rows(out, width * dtype.itemsize, most, multiple)
        for start in range(0, out, rows):
            part = stored if rows >= out else stored.rows(start, min(out, start + rows))
            weight = self.rooms.of(None, (part.shape[0], width), dtype, device)
            dequantize_into(part, weight)
            yield slice(start, start + part.shape[0]), weight

    def scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """What was fetched last, each row times its own number `(out)`; in place where it was written out for this."""
        scale = scale.to(weight.dtype)[:, None]
        buffer = self.rooms.kept.get(None)
        if buffer is not None and weight.data_ptr() == buffer.data_ptr():
            return weight.mul_(scale)
        return weight * scale

    def made(self, version: object, shape: tuple[int, int], like: Tensor, make: Callable[[Tensor], None]) -> Tensor:
        """What `make` writes into a matrix of this shape, valid until it is asked for another one of the shape.

        The blocks of a model have projections of the same few shapes, so what a block's recomputation has made is there
        for its backward pass.

        Args:
            version: nothing is made where the matrix has this one already.
            like: has its dtype and device.
        """
        matrix, held = self.rooms.of(shape, shape, like.dtype, like.device), (version, like.dtype)
        if self._held.get(shape) != held:
            self._held.pop(shape, None)
            make(matrix)
            self._held[shape] = held
        return matrix


class Projection:
    """Linear layers that read the same input, written side by side into one output.

    Rows that it reads may be wider than its input, and rows that it writes are: by nothing here, by columns of its own
    in `AugmentedProjection`. They are the first columns' `in_features` and `out_features`.

    Args:
        modules: LoraLinear, QuantizedLinear or dense linears; output columns in this order.
        weights: where the dense weights come from.

    Attributes:
        columns: of each linear in the output. ranks: of each adapter in z.
        in_width, out_width: columns of rows with room for what it puts beside its input, and its output's gradient.
    """

    def __init__(self, modules: Sequence[nn.Module], weights: DenseWeights):
        self.weights = weights
        self.linears: list[Any] = [module.base if isinstance(module, LoraLinear) else module for module in modules]
        self.adapters = [module if isinstance(module, LoraLinear) else None for module in modules]
        widths = [linear_features(linear)[1] for linear in self.linears]
        ranks = [adapter.rank if adapter else 0 for adapter in self.adapters]
        self.in_features, self.out_features = linear_features(self.linears[0])[0], sum(widths)
        self.in_width, self.out_width = self.in_features, self.out_features
        self.columns = _slices(widths)
        self.ranks = _slices(ranks)
        self._copies: AdapterCopies | None = None

    def parameters(self) -> list[Tensor]:
        """Of each adapter, in order: what `backward_adapters` returns gradients of."""
        return [parameter for adapter in self.adapters if adapter for parameter in adapter.trained()]

    def refresh_adapters(self, dtype: torch.dtype) -> None:
        """Bring the adapters' copies up to date, where there are any that are used."""
        if self._adapted():
            self._adapter_copies(dtype)

    def forget_adapters(self) -> None:
        """Make anew, at its next use, what was made of the adapters: their masters may have been written to by what
        counts no versions, such as optimizers outside PyTorch.
        """
        if self._copies is not None:
            self._copies.versions = ()
        for adapter in self.adapters:
            if adapter is not None:
                adapter.forget()

    def low_rank(self, x: Tensor) -> Tensor | None:
        """z = x · [A₁; A₂; ..]ᵀ, (T, in) -> (T, Σ ranks); None without adapters, or where they are switched off."""
        if not self._adapted():
            return None
        a = self._adapter_copies(x.dtype).a
        return torch.mm(x, a.T, out=empty_like(x, (x.shape[0], len(a))))

    def forward(self, x: Tensor, z: Tensor | None, residual: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """y = residual + factor · (x · Wᵀ + bias + scaling · z · Bᵀ), (T, in) -> (T, out); without a residual there is
        no factor, and y is `out_width` wide.
        """
        assert residual is not None or factor == 1.0
        y = empty_like(x, (x.shape[0], self.out_features)) if residual is None else copy_of(residual)
        for i, (linear, adapter, columns, ranks) in enumerate(self._parts()):
            part = y[:, columns]
            for rows, weight in self._scaled_panels(linear, None if z is None else adapter, x.dtype):
                if residual is None:
                    torch.mm(x, weight.T, out=part[:, rows])
                else:
                    part[:, rows].addmm_(x, weight.T, alpha=factor)
            if linear.bias is not None:
                part.add_(linear.bias.to(x.dtype), alpha=factor)
            if adapter is not None and z is not None:
                part.addmm_(z[:, ranks], self._adapter_copies(x.dtype).b_transposed[i], alpha=factor)
        return y

    def gradient(self, grad_y: Tensor) -> Tensor:
        """The gradient of y as the backward pass takes it, (T, out) -> `out_width` wide."""
        return grad_y if grad_y.is_contiguous() else copy_of(grad_y)

    def backward_low_rank(self, grad_y: Tensor) -> Tensor | None:
        """The gradient of z, (T, out) -> (T, Σ ranks); None without adapters."""
        if not any(self.adapters):
            return None
        grad_z = empty_like(grad_y, (grad_y.shape[0], self.ranks[-1].stop))
        for i, (_, adapter, columns, ranks) in enumerate(self._parts()):
            if adapter is not None:
                torch.mm(grad_y[:, columns], self._adapter_copies(grad_y.dtype).b[i], out=grad_z[:, ranks])
        return grad_z

    def backward_input(self, grad_y: Tensor, grad_z: Tensor | None) -> Tensor:
        """The gradient of x, (T, out) -> (T, in)."""
        grad_x = empty_like(grad_y, (grad_y.shape[0], self.in_features))
        for i, (linear, adapter, columns, _) in enumerate(self._parts()):
            part = grad_y[:, columns]
            for rows, weight in self._scaled_panels(linear, None if grad_z is None else adapter, grad_y.dtype):
                if i == 0 and rows.start == 0:
                    torch.mm(part[:, rows], weight, out=grad_x)
                else:
                    grad_x.addmm_(part[:, rows], weight)
        if grad_z is not None:
            grad_x.addmm_(grad_z, self._adapter_copies(grad_y.dtype).a)
        return grad_x

    def for_magnitudes(self, y: Tensor) -> Tensor | None:
        """A copy of what `forward` gave, (T, out), where it spares `backward_adapters` a product."""
        scaled = any(isinstance(adapter, DoraLinear) and adapter.enabled for adapter in self.adapters)
        return copy_of(y) if scaled else None

    def backward_adapters(
        self, grad_y: Tensor, grad_z: Tensor | None, x: Tensor, z: Tensor | None, y: Tensor | None = None
    ) -> list[Tensor]:
        """The gradients of what each adapter trains, in the order of `parameters`, fp32.

        Args:
            y: what `for_magnitudes` gave; it is overwritten.
        """
        if grad_z is None or z is None:
            return []
        grad_a = self._over_tokens(grad_z.T, x[:, : self.in_features])  # (Σ r, in)
        grads = []
        for linear, adapter, columns, ranks in self._parts():
            if adapter is not None:
                # zᵀ · grad_y, then turned: oneDNN takes the other order at half the speed.
                grad_b = self._over_tokens(z[:, ranks].T, grad_y[:, columns]).mul_(adapter.scaling)  # (r, out)
                scale = adapter.row_scale()
                grads += [grad_a[ranks], (grad_b if scale is None else grad_b.mul_(scale)).T.contiguous()]
            if isinstance(adapter, DoraLinear):
                given = None if y is None else y[:, columns]
                grads.append(self._grad_magnitude(linear, adapter, grad_y[:, columns], x, z[:, ranks], given))
        return grads

    def _grad_magnitude(
        self, linear: Any, adapter: DoraLinear, grad_y: Tensor, x: Tensor, z: Tensor, y: Tensor | None
    ) -> Tensor:
        """Of one adapter, fp32 `(out)`; z is its own, (T, r), and y (T, out), where it is there."""
        if y is not None:
            turned = y if linear.bias is None else y.sub_(linear.bias.to(y.dtype))
            return turned.mul_(grad_y).sum(dim=0, dtype=torch.float32) / adapter.magnitude.detach()
        turned = empty_like(grad_y)  # (T, out)
        for rows, weight in self.weights.panels(linear, x.dtype):
            torch.mm(x[:, : self.in_features], weight.T, out=turned[:, rows])
        turned.addmm_(z, (adapter.lora_B.detach() * adapter.scaling).to(x.dtype).T)
        return turned.mul_(grad_y).sum(dim=0, dtype=torch.float32) / adapter.norms()

    def _scaled_panels(
        self, linear: Any, adapter: LoraLinear | None, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Tensor]]:
        """The weight of a frozen linear, as `DenseWeights.panels` says, each row as its adapter scales it."""
        scale = None if adapter is None else adapter.row_scale()
        for rows, weight in self.weights.panels(linear, dtype):
            yield rows, weight if scale is None else self.weights.scaled(weight, scale[rows])

    def _over_tokens(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b, (r, T) · (T, n), in fp32 once it is rounded to the type of both."""
        return (a @ b).float()

    def _adapted(self) -> bool:
        """Whether there are adapters, and they are switched on."""
        enabled = {adapter.enabled for adapter in self.adapters if adapter}
        assert len(enabled) <= 1, "adapters are switched on and off together"
        return True in enabled

    def _versions(self) -> tuple[int, ...]:
        """How often each fp32 master has been written to."""
        return tuple(parameter._version for parameter in self.parameters())

    def _parts(self) -> list[tuple[Any, LoraLinear | None, slice, slice]]:
        return list(zip(self.linears, self.adapters, self.columns, self.ranks, strict=True))

    def _adapter_copies(self, dtype: torch.dtype) -> "AdapterCopies":
        """The adapters in `dtype`, made anew when an optimizer step has changed the masters."""
        versions = (dtype, *self._versions())
        if self._copies is None or self._copies.a.dtype != dtype:
            self._copies = AdapterCopies(self.adapters, dtype)
        if self._copies.versions != versions:
            self._copies.refresh(self.adapters, versions)
        return self._copies


class AdapterCopies:
    """The adapters of a projection as its products want them, in the compute dtype; memory that is written anew.

    a: `(Σ ranks, in)`, stacked. b: scaling · B, with DoRA its rows scaled, `(out, r)`, of each layer that has an
    adapter, by its place.
    b_transposed: the same, `(r, out)` and contiguous, which oneDNN adds twice as fast.
    versions: dtype, and how often each fp32 master had been written to when it was copied.
    """

    def __init__(self, adapters: Sequence[LoraLinear | None], dtype: torch.dtype):
        adapted = {i: adapter for i, adapter in enumerate(adapters) if adapter}
        first = next(iter(adapted.values())).lora_A
        ranks = sum(adapter.rank for adapter in adapted.values())
        self.versions: tuple[object, ...] = ()
        self.a = torch.empty(ranks, first.shape[1], dtype=dtype, device=first.device)
        self.b = {i: torch.empty_like(adapter.lora_B, dtype=dtype) for i, adapter in adapted.items()}
        self.b_transposed = {i: b.new_empty(b.shape[::-1]) for i, b in self.b.items()}

    @torch.no_grad()
    def refresh(self, adapters: Sequence[LoraLinear | None], versions: tuple[object, ...]) -> None:
        """Copy the masters as they are now."""
        row = 0
        for i, b in self.b.items():
            adapter = adapters[i]
            assert adapter is not None
            self.a[row : row + adapter.rank].copy_(adapter.lora_A)
            scale = adapter.row_scale()
            factor = adapter.scaling if scale is None else adapter.scaling * scale[:, None]
            torch.mul(adapter.lora_B, factor, out=b)
            self.b_transposed[i].copy_(b.T)
            row += adapter.rank
        self.versions = versions


def _slices(widths: Sequence[int]) -> list[slice]:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
