"""Pictures of figures: one pair of axes, its labels, the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCH = 120  # dots
AXES = (0.12, 0.14, 0.86, 0.82)  # left, bottom, width, height, as parts of the picture; labels have room beside them


@contextmanager
def picture(
    out: Path | BinaryIO, x: str, y: str = "", inches: tuple[float, float] = (7, 4), *, fitted: bool = False
) -> Iterator["Axes"]:
    """Axes to draw on, written to `out` afterwards: as a PNG, or as what the file's suffix says.

    Args:
        x, y: what the axes show.
        inches: width and height.
        fitted: make room for labels of any length, which takes as long as drawing.

    Raises:
        OSError, ValueError: it cannot be written, or the suffix is no picture's.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # here, since importing it takes half a second

    with rc_context({"text.parse_math": False}):  # labels are users' words, in which a $ is a $
        figure = Figure(figsize=inches, layout="constrained" if fitted else None)
        axes = figure.subplots() if fitted else figure.add_axes(AXES)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield axes
        figure.savefig(out, dpi=INCH)
