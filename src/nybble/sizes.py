"""Sizes that a run's tensors are cut into: plain numbers, read by what cuts and by what counts the bytes of it.

`ShapeRules` are those that a device's kernels ask for, one entry a kind of device; a backend that wants others has
them here, since importing `kernels/` brings torch and the planner counts without it.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ShapeRules:
    """How rows and matrices are cut on one kind of device.

    Args:
        token_multiple: packed micro-batches are filled up to a multiple of so many tokens.
        row_multiple: chunks of logits and panels of a large head have a multiple of so many rows.
        chunk_bytes: what a chunk of logits may take,
        few_rows: and twice that where it would have fewer rows than this, with which products are slow.
        panel_rows: of a 16-bit matrix that are widened at a time when products run in fp32,
        panel_bytes: and where that is more than so many bytes, fewer.
        large_head_bytes: heads from here on go in panels,
        resident_in_panels: in memory as on a disk, so that both give one result; else those from a disk alone.
        graph_work: tokens of a micro-batch times weights of a block up to which the device is done before its host has
            asked for the next: such micro-batches come from graphs (`training/accumulation.py`). 0 where none do.
        weight_panel_bytes: of a weight in few bits, written out in the compute dtype, that decoder blocks multiply with
            at a time.
        block_buffers: that blocks of a streamed base pass through: the one at work, and those read ahead.
        few_widths: padded rows are filled up to one of few widths, since each costs compiled products,
        widest: where that has no more tokens than this; any number where None.
    """

    token_multiple: int
    row_multiple: int
    chunk_bytes: int
    few_rows: int
    panel_rows: int
    panel_bytes: int
    large_head_bytes: int
    resident_in_panels: bool
    weight_panel_bytes: int
    block_buffers: int
    graph_work: float
    few_widths: bool = False
    widest: int | None = None

    def padded_width(self, longest: int) -> int:
        """Tokens that rows are padded to: as many as the longest has; or where there are to be few widths, a power of
        two or one and a half times one, of which rows of up to 512 tokens have thirteen.
        """
        if not self.few_widths:
            return longest
        power = max(8, 1 << (longest.bit_length() - 1))  # at most `longest`, if that is 8 or more
        filled = next(width for width in (power, 3 * power // 2, 2 * power) if width >= longest)
        return longest if self.widest is not None and filled > self.widest else filled

    def whole_rows(self, fit: int) -> int:
        """The rows of a chunk or panel that has room for `fit`: a multiple, and at least one of them."""
        return max(self.row_multiple, fit // self.row_multiple * self.row_multiple)

    def chunk_rows(self, row_bytes: int) -> int:
        """Rows of logits, of so many bytes each, that are looked at together."""
        return self.whole_rows(self.chunk_bytes // row_bytes)

    def product_rows(self, row_bytes: int) -> int:
        """States whose logits, of so many bytes each, are one product."""
        rows = self.chunk_rows(row_bytes)
        return rows if rows >= self.few_rows else self.whole_rows(min(self.few_rows, 2 * self.chunk_bytes // row_bytes))

    def in_graphs(self, tokens: int, block_elements: int) -> bool:
        """Whether a micro-batch of so many tokens comes from a graph, in blocks of so many weights."""
        return 0 < tokens * block_elements <= self.graph_work

    def head_panel_rows(self, vocabulary: int, row_bytes: int, *, widened: bool, streamed: bool) -> int:
        """Rows of a head that are multiplied with at once: all, unless it is large, or is widened to another dtype.

        Args:
            row_bytes: of a row as it is stored.
        """
        if vocabulary * row_bytes >= self.large_head_bytes and (streamed or self.resident_in_panels):
            return self.whole_rows(self.panel_bytes // row_bytes)
        return min(self.panel_rows, vocabulary) if widened else vocabulary


def panel_rows(rows: int, row_bytes: int, panel_bytes: int, multiple: int) -> int:
    """Rows of the panels that a matrix is cut into: as few as hold `panel_bytes` at most, of one size but for the last;
    all of its rows where it cannot be cut.

    Args:
        multiple: it can be cut after every so many rows; 0 where it cannot.
    """
    if not multiple or rows * row_bytes <= panel_bytes:
        return rows
    fit = max(1, panel_bytes // row_bytes // multiple)  # in units of `multiple`
    units = -(-rows // multiple)
    return min(rows, -(-units // -(-units // fit)) * multiple)


_ONEDNN = ShapeRules(
    token_multiple=64,  # it keeps a compiled product, some 0.8 MB, for each shape it has seen
    row_multiple=64,
    chunk_bytes=2**25,
    few_rows=128,
    panel_rows=8192,
    panel_bytes=2**25,
    large_head_bytes=2**28,
    resident_in_panels=True,
    weight_panel_bytes=2**26,
    block_buffers=2,
    graph_work=0.0,
)
_CUBLAS = ShapeRules(
    token_multiple=64,  # whole tiles
    row_multiple=64,
    chunk_bytes=2**29,  # 2,048 rows of a vocabulary of 128k: no longer a matter of launches
    few_rows=0,
    panel_rows=8192,
    panel_bytes=2**27,
    large_head_bytes=2**28,
    resident_in_panels=False,  # they would save nothing, and cost sums of parts
    weight_panel_bytes=2**62,  # blocks write out all of a projection (`layers/augmented.py`)
    block_buffers=3,  # told ahead of time: two on their way keep the link busy while one waits for its buffer
    graph_work=3e11,  # 1,376 tokens of an 8B: some 25 us a kernel on an H100, as asking for one takes; assumed
)
_PLAIN = replace(_CUBLAS, chunk_bytes=2**27, graph_work=0.0)  # of GPUs that nothing here was measured on
SHAPE_RULES = {"cpu": _ONEDNN, "cuda": _CUBLAS, "xpu": _PLAIN, "mps": _PLAIN}


def rules_for(kind: str, compute_bytes: int, positions: int | None = None) -> ShapeRules:
    """The rules of a kind of device for products of elements of so many bytes, in a model of so many positions, or of
    any number.
    """
    return replace(SHAPE_RULES[kind], few_widths=kind == "cpu" and compute_bytes == 2, widest=positions)


PRODUCT_BYTES = 650_000  # of one that oneDNN 3.11 has compiled for AVX512-BF16: 620,000 to 730,000 by its shape
TILE_PRODUCT_BYTES = 1_100_000  # for AMX: 640,000 to 1,210,000; experts' and attention's are large

GRAPH_MULTIPLE = 256  # of tokens and of supervised ones, that micro-batches from graphs are filled up to

WIDE_LOGIT_BYTES = 8  # of a logit to which something is done after the product: in fp32, and its slope
DISTILLED_BYTES = 4  # of a student's logit beside itself: in fp32, compared with its teacher's
ASKED_BYTES = 16  # of a teacher's logit: itself, in fp32, and what its sums are made of

RANK_MULTIPLE = 64  # of what a projection of one product has beside its input; columns of a tile

EXPERT_ROWS = 16  # rows of an expert are filled up to a multiple of so many, whole tiles, or, from 256 rows on,
EXPERT_SHARE = 8  # to one of the eight or more numbers between two powers of two: oneDNN keeps each shape's product

PAGE_BYTES = 2**22  # of optimizer state; smaller pages cost a step more in handing over than in copying
PAGE_BUFFERS = 3  # read ahead, updated, written behind

MAPPED_FROM = 2**25  # bytes from which glibc gives a piece a mapping of its own
SLABS_FROM = 2**16  # and from which decoder blocks have it in a slab (`kernels/slabs.py`)
BESIDE_SLABS_FROM = 2**22  # bytes from which what has none, where they are in use, has a mapping of its own

LAYER_INPUT_TOKENS = 256  # whose inputs of single layers are made at once

CALIBRATION_TOKENS = 512  # computed at once while calibrating
CALIBRATION_KEPT_BYTES = 2**25  # of inputs that are needed twice
EXPERT_STATISTICS_BYTES = 2**30  # of experts whose statistics are summed in one pass
CALIBRATION_STATE_BYTES = 2  # of an element of the hidden states between two blocks, whatever is computed in


def filled_rows(count: int) -> int:
    """Rows of an expert that got so many, filled up."""
    step = max(EXPERT_ROWS, (1 << count.bit_length() - 1) // EXPERT_SHARE) if count else EXPERT_ROWS
    return -(-count // step) * step


def filled_numbers(most: int) -> int:
    """Different numbers of rows that experts with up to `most` are filled up to."""
    few = EXPERT_ROWS * EXPERT_SHARE * 2  # until there a multiple of EXPERT_ROWS
    return -(-min(most, few) // EXPERT_ROWS) + EXPERT_SHARE * max(0, (most - 1).bit_length() - (few - 1).bit_length())
