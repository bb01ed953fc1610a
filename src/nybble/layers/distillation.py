"""Distillation: a student's distribution of each next token beside its teacher's, without ever holding all logits.

The teacher's is known at its k likeliest tokens, and as one bucket for all others. With u = logits / T, q = softmax(u)
of the student and p of the teacher at the same temperature (Hinton et al. 2015, arXiv 1503.02531, section 2):

    KL = Σ_i p_i · (log p_i − log q_i) + p_rest · (log p_rest − log q_rest),   i over the k tokens, rest all others
    loss = α · T² · KL + (1 − α) · (−log softmax(logits)[target])

    ∂KL/∂u_j = q_j − p_j at the k tokens, q_j · (1 − p_rest / q_rest) at the others

T² keeps the gradient as large as cross-entropy's, whatever T is. The KL over buckets is a lower bound of the whole one,
and is it where k is the vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.kernels.ops.loss import cross_entropy_
from nybble.layers.loss_head import Head
from nybble.sizes import ASKED_BYTES, DISTILLED_BYTES, SHAPE_RULES

TINY = 1e-30  # of a probability, before its logarithm


class TeacherRows(NamedTuple):
    """What a teacher says of the tokens that come next, at a temperature.

    Args:
        ids: int64 `(N, k)`, its likeliest tokens, the likeliest first.
        log_p: fp32 `(N, k + 1)`, their log-probabilities, and that of all others together.
    """

    ids: Tensor
    log_p: Tensor

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """p of the k tokens, and of the rest, `(N, k)` and `(N, 1)`; they add up to 1 however they were rounded."""
        p = self.log_p.softmax(dim=1)
        return p[:, :-1], p[:, -1:]


@dataclass(frozen=True)
class Mixture:
    """How a student is distilled.

    Args:
        alpha: α, the share of the teacher in the loss.
        temperature: T.
    """

    alpha: float
    temperature: float


@dataclass(frozen=True)
class Distilled:
    """A `Criterion` of the loss head. Its figures: the KL in nats, −log p(target), and whether the student's likeliest
    token is the teacher's.
    """

    teacher: TeacherRows
    mixture: Mixture
    num_figures: ClassVar[int] = 3

    @property
    def plain(self) -> "Distilled":
        """As `Criterion` says: an evaluation asks for the same."""
        return self

    def of_rows(self, first: int, count: int) -> "Distilled":
        """As `Criterion` says; there are fewer behind the last."""
        return Distilled(TeacherRows(*(part[first : first + count] for part in self.teacher)), self.mixture)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """As `Criterion` says."""
        ids = self.teacher.ids
        log_q = (logits / self.mixture.temperature).log_softmax(dim=1)
        q_rest = log_q.exp().scatter(1, ids, 0.0).sum(dim=1, keepdim=True)
        kl = self._kl(log_q.gather(1, ids), q_rest)
        cross_entropy = F.cross_entropy(logits, targets, reduction="none")
        return self._told(kl, cross_entropy, logits.argmax(dim=1) == ids[:, 0])

    def losses_(self, logits: Tensor, targets: Tensor, factor: Tensor | float) -> Tensor:
        """As `Criterion` says, a part of the rows at a time: it takes a copy of their logits in fp32."""
        rows = SHAPE_RULES[logits.device.type].chunk_rows(DISTILLED_BYTES * logits.shape[1])
        parts = zip(logits.split(rows), targets.split(rows), strict=True)
        return torch.cat([self.of_rows(i * rows, rows)._part(*part, factor) for i, part in enumerate(parts)], dim=1)

    def _part(self, logits: Tensor, targets: Tensor, factor: Tensor | float) -> Tensor:
        (ids, _), (alpha, temperature) = self.teacher, (self.mixture.alpha, self.mixture.temperature)
        filled_up = len(logits) - len(ids)
        logits[len(ids) :] = 0
        logits, targets = logits[: len(ids)], targets[: len(ids)]
        agreement = logits.argmax(dim=1) == ids[:, 0]
        u = logits.to(torch.float32, copy=True).div_(temperature)  # (N, vocabulary)
        u_teacher = u.gather(1, ids)  # (N, k)
        log_z = u_teacher[:, :1] + cross_entropy_(u, ids[:, 0].contiguous(), 1.0)[:, None]
        log_q = u_teacher - log_z
        q = u.scatter_(1, ids, 0.0)  # the gradient of a cross-entropy is q but at its target
        q_rest = q.sum(dim=1, keepdim=True)
        p, p_rest = self.teacher.probabilities()
        slope = q.mul_(1 - p_rest / q_rest.clamp(min=TINY)).scatter_(1, ids, log_q.exp() - p)  # d KL / d u
        cross_entropy = cross_entropy_(logits, targets, factor * (1 - alpha))  # logits now hold its gradient
        logits += slope.mul_(factor * alpha * temperature)
        return F.pad(self._told(self._kl(log_q, q_rest), cross_entropy, agreement), (0, filled_up))

    def _kl(self, log_q: Tensor, q_rest: Tensor) -> Tensor:
        """KL(teacher || student) `(N,)`; what the teacher thinks impossible adds nothing."""
        p, p_rest = self.teacher.probabilities()
        tokens = (torch.xlogy(p, p) - p * log_q).sum(dim=1)
        return tokens + (torch.xlogy(p_rest, p_rest) - p_rest * q_rest.clamp(min=TINY).log()).squeeze(1)

    def _told(self, kl: Tensor, cross_entropy: Tensor, agreement: Tensor) -> Tensor:
        alpha, temperature = self.mixture.alpha, self.mixture.temperature
        loss = alpha * temperature**2 * kl + (1 - alpha) * cross_entropy
        return torch.stack([loss, kl, cross_entropy, agreement.float()])


@torch.no_grad()
def likeliest(head: Head, hidden: Tensor, count: int, vocabulary: int, temperature: float) -> TeacherRows:
    """What a teacher says: its `count` likeliest tokens among the first `vocabulary`, and the others together; on the
    CPU.

    Args:
        head, hidden: of the teacher, `(N, hidden)` the states that its head reads.
    """
    # In one room: small tensors that stay between large ones that go would leave holes in the C library's heap.
    found = TeacherRows(torch.empty(len(hidden), count, dtype=torch.long), torch.empty(len(hidden), count + 1))
    rows = SHAPE_RULES[hidden.device.type].chunk_rows(ASKED_BYTES * head.vocabulary)
    for states, ids, log_p in zip(hidden.split(rows), found.ids.split(rows), found.log_p.split(rows), strict=True):
        u = head.logits(states)[:, :vocabulary].to(torch.float32, copy=True).div_(temperature)
        u -= u.logsumexp(dim=1, keepdim=True)
        top = u.topk(count, dim=1)
        ids.copy_(top.indices)
        log_p[:, :count].copy_(top.values)
        log_p[:, count:].copy_(u.scatter_(1, top.indices, float("-inf")).logsumexp(dim=1, keepdim=True))
    return found
