"""QuantizedLinear: a frozen linear layer whose weight lives in four bits.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314), eq. 5: Y = X · dequantise(W)ᵀ. The dense weight exists
only while a product uses it: backward dequantises again rather than keep it.
"""

import threading

import torch
from torch import Tensor, nn

from nybble.formats.quant_spec import QuantSpec
from nybble.formats.quantized_tensor import QuantizedTensor
from nybble.kernels.heap import lies_in_heap
from nybble.kernels.ops.four_bit import dequantize, dequantize_into
from nybble.layers.rooms import Rooms
from nybble.layers.streamed import FrozenProduct, add_into


class _OfThread(threading.local):
    """Each thread's own rooms for dense weights, one for each dtype."""

    def __init__(self) -> None:
        self.rooms = Rooms()


DENSE = _OfThread()


class QuantizedLinear(nn.Module):
    """Drop-in for a frozen `nn.Linear`: two frozen uint8 parameters instead of a dense weight.

    Args:
        in_features, out_features: of the layer; the weight is `[out_features, in_features]`.
        bias: whether the layer adds a bias (kept in `compute_dtype`, frozen).
        spec: the four-bit format.
        compute_dtype: of the bias, and of the weight returned by `dequantize`.
        device: where to make the parameters, "meta" while a model is only a skeleton.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec,
        compute_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.compute_dtype = spec, compute_dtype
        self.source_dtype = compute_dtype
        shape = (out_features, in_features)
        packed = torch.empty(spec.packed_shape(shape), dtype=torch.uint8, device=device)
        scales = torch.empty(spec.scales_bytes(out_features * in_features), dtype=torch.uint8, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        if bias:
            bias_values = torch.empty(out_features, dtype=compute_dtype, device=device)
            self.bias = nn.Parameter(bias_values, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """Without numbers: for models whose code asks which type it is, or where it lies."""
        return self.packed.new_empty(0, dtype=self.compute_dtype)

    def load_quantized(self, q: QuantizedTensor) -> None:
        """Take over the bytes of `q`, which may be in another format than the layer was made with."""
        assert q.shape == (self.out_features, self.in_features), (q.shape, self)
        self.spec, self.source_dtype = q.spec, q.dtype
        self.packed = nn.Parameter(q.packed, requires_grad=False)
        self.scales = nn.Parameter(q.scales, requires_grad=False)

    def quantized(self) -> QuantizedTensor:
        """The weight as formats/ knows it; nothing is copied."""
        shape = (self.out_features, self.in_features)
        return QuantizedTensor(self.packed.detach(), self.scales.detach(), self.spec, shape, self.source_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, `[out_features, in_features]`."""
        return dequantize(self.quantized(), dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = FrozenProduct.apply(x, self._dense if lies_in_heap(x.device) else self.dequantize)
        return y if self.bias is None else add_into(y, self.bias)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight in this thread's room, valid until another is put there."""
        out = DENSE.rooms.of(dtype, (self.out_features, self.in_features), dtype, self.packed.device)
        dequantize_into(self.quantized(), out)
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.spec}"
