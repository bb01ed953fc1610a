"""What a training step adds to the plain loss, and an evaluation does not.

NEFTune (Jain et al. 2023, arXiv 2310.05914): noise on the embeddings, uniform in ±α / √(L·d) for a row of L tokens.
Label smoothing (Szegedy et al. 2016, arXiv 1512.00567): (1 - ε)·(-log p(y)) + ε·mean over the vocabulary of -log p.
z-loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5): + z·log²Z, where Z is the sum of the logits' exponentials.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.ops.loss import cross_entropy_


@dataclass(frozen=True)
class Regularisers:
    """How much of each; 0 leaves it out.

    Args:
        noise: NEFTune's α.
        label_smoothing: ε.
        z_loss: z.
    """

    noise: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def of_loss(self) -> bool:
        """Whether the loss is another than cross-entropy."""
        return bool(self.label_smoothing or self.z_loss)

    def noised(self, embedded: Tensor, lengths: Sequence[int]) -> Tensor:
        """Embeddings with noise, drawn by PyTorch's own generator.

        Args:
            embedded: `(tokens, width)` of rows side by side, where what lies behind them gets none; or
                `(rows, tokens, width)`.
            lengths: tokens of each row.
        """
        bounds = [self.noise / math.sqrt(length * embedded.shape[-1]) for length in lengths]
        if embedded.ndim == 2:
            bounds = [bound for bound, length in zip(bounds, lengths, strict=True) for _ in range(length)]
            bounds += [0.0] * (len(embedded) - len(bounds))
        sizes = torch.tensor(bounds).to(embedded).view(-1, *[1] * (embedded.ndim - 1))
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * sizes

    # ---- as a `Criterion` of the loss head: cross-entropy with these

    num_figures: ClassVar[int] = 0

    @property
    def plain(self) -> "Regularisers":
        """None of them."""
        return PLAIN

    def of_rows(self, first: int, count: int) -> "Regularisers":
        """As `Criterion` says: all rows are alike."""
        return self

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """As `Criterion` says."""
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        return (losses + self.z_loss * logits.logsumexp(1).square() if self.z_loss else losses)[None]

    def losses_(self, logits: Tensor, targets: Tensor, factor: Tensor | float) -> Tensor:
        """As `Criterion` says."""
        read = self.read(logits, targets) if self.of_loss else None
        losses = cross_entropy_(logits, targets, factor)  # logits now holds the gradient
        if read is not None:
            self.add_(losses, logits, targets, read, factor)
        return losses[None]

    def add_(
        self, losses: Tensor, gradient: Tensor, targets: Tensor, read: tuple[Tensor, Tensor], factor: Tensor | float
    ) -> None:
        """Make cross-entropy's losses and gradient, f·(p - 1_y), these: f·((1 + 2·z·log Z)·p - (1 - ε)·1_y - ε/V).

        Args:
            losses: `(N,)` fp32. gradient: `(N, vocabulary)`. Both are changed in place.
            targets: `(N,)`; negative ones leave their rows out, which stay zeros.
            read: what `read` said of the logits.
            factor: f.
        """
        wanted, mean = read
        supervised = (targets >= 0).float()
        log_z = (losses + wanted) * supervised
        epsilon, steeper = self.label_smoothing, 2 * self.z_loss * log_z
        losses += (epsilon * (wanted - mean) + self.z_loss * log_z.square()) * supervised
        gradient *= (1 + steeper).to(gradient.dtype)[:, None]
        at_target = factor * (steeper + epsilon) * supervised
        gradient.scatter_add_(1, targets.clamp(min=0)[:, None], at_target.to(gradient.dtype)[:, None])
        gradient -= (factor * epsilon / gradient.shape[1] * supervised).to(gradient.dtype)[:, None]

    @staticmethod
    def read(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row the target's logit and the mean, `(N,)` fp32, before the gradient takes the logits' place."""
        wanted = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1).float()
        return wanted, logits.mean(dim=1, dtype=torch.float32)


PLAIN = Regularisers()
