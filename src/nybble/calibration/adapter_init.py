"""Adapters that start from what quantisation lost, from the weights or from their inputs, instead of from nothing.

With E = W - Q, the quantised weight's error, the adapter's first value is the product of rank r nearest to it:

    loftq        least |E - s B A|_F: the truncated singular value decomposition of E. The first round of LoftQ (Li et
                 al. 2023, arXiv 2310.08659). Its later rounds quantise W - s B A anew, which gives a base of its own to
                 every adapter; here the base stays the one that everybody has.
    activation   least |(E - s B A) Xᵀ|_F over the layer's inputs X, which is what its output loses. With
                 XᵀX = H = L Lᵀ it is the decomposition of E L, and A is multiplied by L⁻¹ (the closed form of QERA,
                 arXiv 2410.06040, and CLoQ, arXiv 2501.18475, which write H^(1/2) for L: the product is the same).

For E = W the first is PiSSA's first value; `leading_columns` gives OLoRA's. EVA (Paischer et al. 2024, arXiv
2410.07170) lets A be the r directions in which a layer's inputs are largest, and B zero.
"""

import torch
from torch import Tensor

DAMPING = 0.01  # added to H's diagonal, as a part of its mean


def nearest_product(error: Tensor, rank: int, scaling: float, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A `(rank, in)` and B `(out, rank)`, fp32, with scaling * B A nearest to an error of the weight.

    Both get the square root of the singular values, so that neither has much larger gradients than the other.

    Args:
        error: `(out, in)`.
        rank: above the smaller side of the error, the rest of A and B is zero.
        scaling: what the adapter's product is multiplied by.
        hessian: `(in, in)`, XᵀX up to a factor; None weighs all errors alike.
    """
    wide, lower = error.double(), None if hessian is None else _cholesky(hessian.double())
    u, singular, v = _largest_singular(wide if lower is None else wide @ lower, min(rank, *error.shape))
    root = (singular / scaling).sqrt()
    b, a = u * root, root[:, None] * v.T  # (out, r), (r, in)
    if lower is not None:
        a = torch.linalg.solve_triangular(lower, a, upper=False, left=False)  # a L⁻¹
    missing = rank - len(singular)
    pad = torch.nn.functional.pad
    return pad(a, (0, 0, 0, missing)).float().contiguous(), pad(b, (0, missing)).float().contiguous()


def leading_columns(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A `(rank, in)` and B `(out, rank)`, fp32: the first rows of R and columns of Q, where the weight is Q R.

    As in PEFT's OLoRA nothing is divided by the scaling, which multiplies what is taken from the weight.
    """
    q, r = torch.linalg.qr(weight)
    missing, pad = max(0, rank - q.shape[1]), torch.nn.functional.pad
    return pad(r[:rank], (0, 0, 0, missing)).contiguous(), pad(q[:, :rank], (0, missing)).contiguous()


def largest_directions(hessian: Tensor, rank: int) -> Tensor:
    """A `(rank, in)`, fp32: the right singular vectors of the inputs X with the largest singular values.

    Args:
        hessian: `(in, in)`, XᵀX up to a factor, whose eigenvectors they are.
        rank: above the inputs' width, the rest of A is zero.
    """
    vectors = torch.linalg.eigh(hessian.double()).eigenvectors.flip(1)[:, :rank].T
    return torch.nn.functional.pad(vectors, (0, 0, 0, rank - len(vectors))).float().contiguous()


def explained_shares(hessian: Tensor, count: int) -> Tensor:
    """Of the sum of H's eigenvalues, what each of the `count` largest is, fp64, descending; fewer where H has fewer.

    Args:
        hessian: `(in, in)`, XᵀX up to a factor.
    """
    values = torch.linalg.eigvalsh(hessian.double()).flip(0).clamp(min=0)
    return values[:count] / values.sum().clamp(min=1e-30)


def _largest_singular(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular values with their vectors, from the smaller Gram matrix: (m, c), (c), (n, c)."""
    if matrix.shape[0] > matrix.shape[1]:
        v, singular, u = _largest_singular(matrix.T, count)
        return u, singular, v
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
    singular = values[-count:].flip(0).clamp(min=0).sqrt()
    u = vectors[:, -count:].flip(1)
    v = matrix.T @ u / singular.clamp(min=1e-30)
    return u, singular, v


def _cholesky(hessian: Tensor) -> Tensor:
    """L of the damped H; damped more as long as that is not positive definite."""
    mean, part = hessian.diagonal().mean().clamp(min=1e-30), DAMPING
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(part * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return lower
        part *= 10
