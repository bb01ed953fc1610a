"""H and the factor of its inverse, in the room of one matrix.

Error feedback needs U, upper triangular with H⁻¹ = UᵀU, and what is reported of it needs H. Both are triangles, H being
symmetric: U takes the half of the matrix on and above the diagonal, H keeps the half below. What both need of the
diagonal's panels, H keeps aside. At 8,192 inputs a matrix is 268 MB.

All of it is blocked, a panel of rows or columns at a time, and in place.
"""

import torch
from torch import Tensor

PANEL = 256  # rows or columns at once


class Hessian:
    """A symmetric matrix in the order in which columns are rounded, and the factor of its inverse once it is damped.

    Args:
        matrix: `(in, in)`, fp32, symmetric; taken over and changed.
        order: `(in,)`, int64, the columns in the order of rounding; as they stand where None.

    Attributes:
        damping: what was added to the diagonal of the H that is factorised; 0 before.
        pivots: `(in,)`, the diagonal of U.
    """

    def __init__(self, matrix: Tensor, order: Tensor | None = None):
        self._matrix = matrix
        if order is not None:
            _permute(matrix, order)
        self._squares = [matrix[panel, panel].clone() for panel in self._panels()]  # H's, undamped
        self.damping = 0.0
        self.pivots = torch.empty(0)

    def __len__(self) -> int:
        return len(self._matrix)

    def times(self, x: Tensor) -> Tensor:
        """H x, undamped, of x `(in, n)`."""
        product = torch.empty_like(x)
        for panel, square in zip(self._panels(), self._squares, strict=True):
            torch.mm(square, x[panel], out=product[panel])
            product[panel].addmm_(self._matrix[panel, : panel.start], x[: panel.start])
            product[panel].addmm_(self._matrix[panel.stop :, panel].T, x[panel.stop :])
        return product

    def factorise(self, damping: float) -> bool:
        """Make U of H + damping · I; False, and nothing made, where that is not positive definite."""
        self._restore()
        self._matrix.diagonal().add_(damping)
        if not self._decompose():
            return False
        self._invert()
        self.damping, self.pivots = damping, self._matrix.diagonal().clone()
        return True

    def factor(self, rows: slice, columns: slice) -> Tensor:
        """A view of U, of which only what lies on and above the diagonal's panels means anything."""
        return self._matrix[rows, columns]

    def divide(self, x: Tensor) -> Tensor:
        """(H + damping · I)⁻¹ x = UᵀU x of x `(in, n)`."""
        product = torch.empty_like(x)
        for panel in self._panels():  # U x
            torch.mm(self._matrix[panel, panel.start :], x[panel.start :], out=product[panel])
        for panel in reversed(self._panels()):  # Uᵀ of that: rows above are still those of U x
            product[panel] = self._matrix[: panel.stop, panel].T @ product[: panel.stop]
        return product

    def _panels(self) -> list[slice]:
        size = len(self._matrix)
        return [slice(start, min(start + PANEL, size)) for start in range(0, size, PANEL)]

    def _restore(self) -> None:
        """H on and above the diagonal again, where an attempt at a factor may have been."""
        for panel, square in zip(self._panels(), self._squares, strict=True):
            self._matrix[panel, panel] = square
            self._matrix[panel, panel.stop :] = self._matrix[panel.stop :, panel].T

    def _decompose(self) -> bool:
        """R, upper triangular with H = R Rᵀ, from the last panel to the first; False where H is not positive definite.

        With J the reversal of rows, J H J = L Lᵀ is the usual decomposition, and R = J L J.
        """
        matrix = self._matrix
        for panel in reversed(self._panels()):
            above, after = slice(0, panel.start), slice(panel.stop, None)
            matrix[: panel.stop, panel].addmm_(matrix[: panel.stop, after], matrix[panel, after].T, alpha=-1)
            lower, info = torch.linalg.cholesky_ex(matrix[panel, panel].flip(0, 1))
            if int(info) != 0:
                return False
            own = lower.flip(0, 1)
            matrix[panel, panel] = own
            matrix[above, panel] = torch.linalg.solve_triangular(own.T, matrix[above, panel], upper=False, left=False)
        return True

    def _invert(self) -> None:
        """U = R⁻¹, a panel of rows after the other, from the rows below, which are inverted already."""
        matrix = self._matrix
        panels = self._panels()
        for index in reversed(range(len(panels))):
            rows = panels[index]
            own = matrix[rows, rows]
            inverse = torch.linalg.solve_triangular(own, torch.eye(len(own), device=own.device), upper=True)
            for columns in reversed(panels[index + 1 :]):  # those to the left still need R's own rows
                between = slice(rows.stop, columns.stop)
                matrix[rows, columns] = -inverse @ (matrix[rows, between] @ matrix[between, columns])
            matrix[rows, rows] = inverse


def _permute(matrix: Tensor, order: Tensor) -> None:
    """Rows and columns of a matrix into this order, in place."""
    for start in range(0, len(matrix), PANEL):
        rows = slice(start, start + PANEL)
        matrix[rows] = matrix[rows][:, order]
    for start in range(0, len(matrix), PANEL):
        columns = slice(start, start + PANEL)
        matrix[:, columns] = matrix[:, columns][order]
