"""What calibration keeps of a layer's inputs: H = XᵀX, and how far the inputs have already moved.

H weighs errors of the weights by what they do to the layer's output: |X Δᵀ|² = tr(Δ H Δᵀ). It is summed in fp32
whatever the inputs' dtype. Source: Optimal Brain Surgeon, as GPTQ (arXiv 2210.17323) uses it.

Where the inputs of the 16-bit model are at hand too, D = (X₁₆ - X)ᵀ X says how the weight should change so that the
layer, fed by quantised layers, still gives what it gave in 16 bits (asymmetric calibration, arXiv 2504.02692).
"""

import torch
from torch import Tensor

PANEL = 128  # columns of H at a time; the products below the diagonal are spared


class InputStatistics:
    """Sums over the rows of X that are added, on the device of the rows.

    Args:
        in_features: columns of X.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(in_features, in_features, device=device)  # only on and above the diagonal's panels
        self.drift: Tensor | None = None
        self.rows = self.exact_rows = 0

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add rows.

        Args:
            x: `(rows, in)`, what the layer gets.
            exact: `(rows, in)`, what it got in the 16-bit model.
        """
        wide = x.float()
        for start in range(0, x.shape[1], PANEL):
            panel = self.gram[start : start + PANEL, start:]
            panel.addmm_(wide[:, start : start + PANEL].T, wide[:, start:])
        self.rows += len(x)
        if exact is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.gram)
            # The difference is small, so that products in the compute dtype lose nothing that counts.
            self.drift += (exact - x).T @ x
            self.exact_rows += len(x)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """H over the number of rows, and D over that of the rows that came with exact inputs (None where none did).

        Both `(in, in)`. They are the sums themselves, since a second matrix of this size may be more than there is
        room for: nothing can be added afterwards.
        """
        for start in range(0, len(self.gram), PANEL):
            end = start + PANEL
            square = self.gram[start:end, start:end].triu()
            self.gram[start:end, start:end] = square + square.triu(1).T
            self.gram[end:, start:end] = self.gram[start:end, end:].T
        self.gram /= max(self.rows, 1)
        if self.drift is not None:
            self.drift /= self.exact_rows
        return self.gram, self.drift
