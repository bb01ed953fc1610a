"""What calibration keeps of a layer's inputs: H = XᵀX, and how far the inputs have already moved.

H weighs errors of the weights by what they do to the layer's output: |X Δᵀ|² = tr(Δ H Δᵀ). It is summed in fp32
whatever the inputs' dtype. Source: Optimal Brain Surgeon, as GPTQ (arXiv 2210.17323) uses it.

Where the inputs X₁₆ of the 16-bit model are at hand too, Xᵀ(X₁₆ - X) Wᵀ says how a weight should change so that the
layer, fed by quantised layers, still gives what it gave in 16 bits (asymmetric calibration, arXiv 2504.02692). It is
summed for each weight, `(in, out)`: the matrix Xᵀ(X₁₆ - X) would be four times as large where a layer is four times as
wide as its output.
"""

import torch
from torch import Tensor

PANEL = 128  # columns of H at a time; the products below the diagonal are spared
COLUMNS = 1024  # of x at once on their way into a drift


class InputStatistics:
    """Sums over the rows of X that are added, on the device of the rows.

    Args:
        in_features: columns of X.

    Attributes:
        drifts: of each linear that `add_drift` was called for, Xᵀ(X₁₆ - X) Wᵀ, fp32 `(in, out)`.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(in_features, in_features, device=device)  # only on and above the diagonal's panels
        self.drifts: dict[str, Tensor] = {}
        self.rows = 0
        self._drift_rows: dict[str, int] = {}

    def add(self, x: Tensor) -> None:
        """Add rows of what the layer gets, `(rows, in)`."""
        wide = x.float()
        for start in range(0, x.shape[1], PANEL):
            panel = self.gram[start : start + PANEL, start:]
            panel.addmm_(wide[:, start : start + PANEL].T, wide[:, start:])
        self.rows += len(x)

    def add_drift(self, linear: str, weight: Tensor, x: Tensor, exact: Tensor) -> None:
        """Add rows to the drift of one of the linears.

        Args:
            weight: of the linear, `(out, in)`.
            x: `(rows, in)`, what it gets.
            exact: `(rows, in)`, what it got in the 16-bit model.
        """
        if linear not in self.drifts:
            self.drifts[linear] = torch.zeros(x.shape[1], len(weight), device=x.device)
        # What has moved is small, so that products in the compute dtype lose nothing that counts.
        moved = (exact - x) @ weight.T  # (rows, out)
        for columns, drift in zip(x.split(COLUMNS, dim=1), self.drifts[linear].split(COLUMNS), strict=True):
            drift += columns.T @ moved
        self._drift_rows[linear] = self._drift_rows.get(linear, 0) + len(x)

    def finish(self) -> Tensor:
        """H over the number of rows, `(in, in)`, and the drifts over theirs.

        They are the sums themselves, since a second matrix of this size may be more than there is room for: nothing
        can be added afterwards.
        """
        for start in range(0, len(self.gram), PANEL):
            end = start + PANEL
            square = self.gram[start:end, start:end].triu()
            self.gram[start:end, start:end] = square + square.triu(1).T
            self.gram[end:, start:end] = self.gram[start:end, end:].T
        self.gram /= max(self.rows, 1)
        for linear, drift in self.drifts.items():
            drift /= self._drift_rows[linear]
        return self.gram
