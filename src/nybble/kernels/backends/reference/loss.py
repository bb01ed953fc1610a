import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.ops.loss import check_targets


@registry.register("cross_entropy_", "reference")
def cross_entropy_(logits: Tensor, targets: Tensor, gradient_scale: float) -> Tensor:
    check_targets(targets, logits.shape[1])
    supervised, column = targets >= 0, targets.clamp(min=0)[:, None]
    log_probabilities = logits.float().log_softmax(1)
    losses = -log_probabilities.gather(1, column).squeeze(1)
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, column, torch.full_like(losses, -1.0)[:, None])
    logits.copy_(torch.where(supervised[:, None], gradient.mul_(gradient_scale), 0.0))
    return torch.where(supervised, losses, 0.0)
