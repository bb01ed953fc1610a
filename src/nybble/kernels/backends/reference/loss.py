import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.ops.loss import check_targets

REFERENCE_ROWS = 256  # taken at once: a GPU's chunk of logits would be several times its size in fp32


@registry.register("cross_entropy_", "reference")
def cross_entropy_(logits: Tensor, targets: Tensor, gradient_scale: Tensor) -> Tensor:
    check_targets(targets, logits.shape[1])
    parts = zip(logits.split(REFERENCE_ROWS), targets.split(REFERENCE_ROWS), strict=True)
    return torch.cat([_some_rows(rows, wanted, gradient_scale) for rows, wanted in parts])


def _some_rows(logits: Tensor, targets: Tensor, gradient_scale: Tensor) -> Tensor:
    supervised, column = targets >= 0, targets.clamp(min=0)[:, None]
    log_probabilities = logits.float().log_softmax(1)
    losses = -log_probabilities.gather(1, column).squeeze(1)
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, column, torch.full_like(losses, -1.0)[:, None])
    logits.copy_(torch.where(supervised[:, None], gradient.mul_(gradient_scale), 0.0))
    return torch.where(supervised, losses, 0.0)
