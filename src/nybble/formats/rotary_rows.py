"""The order of the rows of q and k: llama.cpp turns neighbouring elements of a head together in some architectures,
where transformers turns the halves of a head. Apart from gguf.py, which needs the package of that name.
"""

from torch import Tensor


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k as llama.cpp's rotation wants them: element i of a head's first half beside that of its second.

    (heads · 2 · half, ...) -> (heads · half · 2, ...)
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def restored(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
