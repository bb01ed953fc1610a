"""torch's own kernels of FlashAttention-2 (Dao 2023, arXiv 2307.08691), for NVIDIA's GPUs."""

import torch

from nybble.kernels import registry
from nybble.kernels.backends.flash import attention as attention


def _why_unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "torch's kernels for ROCm lay the log-sum-exp out in another way"
    if not torch.backends.cuda.is_flash_attention_available():
        return "torch was built without it"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or above"
    return attention.why_another_torch()


registry.register_backend("flash", devices=("cuda",), probe=_why_unavailable)
