"""The micro-batches that a run will meet, known before it starts: rows and their order are."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from nybble.data.encoded_rows import EncodedRows, counted
from nybble.data.examples import EncodedExample
from nybble.data.mixture import Mixture
from nybble.data.prepare import PreparedData
from nybble.data.sampler import StepSampler, split_micro_batches
from nybble.options.groups import LengthOptions, MemoryOptions
from nybble.planning.run_shape import MicroBatches, Side
from nybble.sizes import ShapeRules

COUNTED_STEPS = 500  # in which different numbers of tokens are counted; later ones add few


class _Pictures:
    """What the pictures of micro-batches come to, at most; nothing where no row has one.

    Attributes:
        values: numbers that those of one are made into.
        decoded_bytes: of those of one before that.
    """

    def __init__(self, training: EncodedRows, held_out: EncodedRows):
        self._all = training.picture_values.astype(np.int64)
        self._there = bool(self._all.any() or held_out.picture_values.any())
        self.values = self.decoded_bytes = 0

    def values_of(self, rows: Sequence[int]) -> int:
        """Of training rows together."""
        return int(self._all[rows].sum()) if self._there else 0

    def meet(self, rows: EncodedRows, micro: Sequence[int]) -> None:
        """Count one more micro-batch."""
        if self._there:
            self.values = max(self.values, int(rows.picture_values[micro].astype(np.int64).sum()))
            self.decoded_bytes = max(self.decoded_bytes, 1024 * int(rows.decoded_kib[micro].astype(np.int64).sum()))


class _Sides:
    """What the prompts of micro-batches come to at most, and their answers; nothing where rows are not of both."""

    def __init__(self, apart: bool, rules: ShapeRules):
        self._apart, self._rules = apart, rules
        self._most = np.zeros((2, 3), dtype=np.int64)  # of each tokens, longest, tokens of evaluations

    def meet(self, rows: EncodedRows, micro: Sequence[int], *, evaluated: bool = False) -> None:
        """Count one more micro-batch."""
        if self._apart:
            longest = np.array(_widths_of_sides(rows, micro, self._rules))
            self._most[:, 1] = np.maximum(self._most[:, 1], longest)
            column = 2 if evaluated else 0
            self._most[:, column] = np.maximum(self._most[:, column], len(micro) * longest)

    def of(self, side: int) -> Side | None:
        """Of prompts (0), of answers (1)."""
        return Side(*map(int, self._most[side])) if self._apart else None


def micro_batches_of(
    data: PreparedData,
    memory: MemoryOptions,
    rules: ShapeRules,
    *,
    steps: int,
    seed: int,
    shares: bool = False,
    apart: bool = False,
) -> Callable[[int], MicroBatches]:
    """Most rows at once -> what the micro-batches of the run come to; counted once for each number of rows.

    Args:
        shares: what two documents of a row begin with is computed once.
        apart: rows are prompts with answers, which are padded each by themselves.
    """

    @functools.cache
    def of_size(size: int) -> MicroBatches:
        return count_micro_batches(
            data.train,
            data.validation,
            mixture=data.mixture,
            rows_per_step=memory.rows_per_step,
            steps=steps,
            seed=seed,
            size=size,
            packed=memory.packing,
            shares=shares,
            apart=apart,
            rules=rules,
        )

    return of_size


def count_micro_batches(
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    *,
    rows_per_step: int,
    steps: int,
    seed: int,
    size: int,
    packed: bool,
    rules: ShapeRules,
    mixture: Mixture | None = None,
    shares: bool = False,
    apart: bool = False,
) -> MicroBatches:
    """What the micro-batches of at most `size` rows come to over `steps` optimizer steps and in evaluations."""
    training, held_out = counted(train), counted(validation)
    lengths, supervised = training.lengths, training.num_targets
    sampler = StepSampler(len(train), rows_per_step, seed, mixture)
    tokens_of = functools.partial(_tokens_of, packed=packed, shares=shares, apart=apart, rules=rules)
    sides = _Sides(apart, rules)
    heaviest: list[int] = []
    tokens = targets = most = step_values = 0
    counts: set[int] = set()
    pictures = _Pictures(training, held_out)
    for step in range(steps):
        rows = sampler.next_step()
        step_values = max(step_values, pictures.values_of(rows))
        within = _largest(lengths, rows, size) <= tokens and _largest(supervised, rows, size) <= targets
        if within and step >= COUNTED_STEPS:
            continue
        own = 0
        for micro in split_micro_batches(rows, lengths, size, packed):
            taken = tokens_of(training, micro)
            own += taken
            counts.add(taken)
            if taken > tokens:
                tokens, heaviest = taken, micro
            targets = max(targets, int(supervised[micro].sum()))
            pictures.meet(training, micro)
            sides.meet(training, micro)
        most = max(most, own)
    dealt = split_micro_batches(range(len(held_out)), held_out.lengths, size, packed)
    for micro in dealt:
        pictures.meet(held_out, micro)
        sides.meet(held_out, micro, evaluated=True)
    asked = [tokens_of(held_out, micro) for micro in dealt]
    longest = int(training.longest.max())
    return MicroBatches(
        tokens=tokens,
        supervised=targets,
        longest_row=longest if packed or apart else rules.padded_width(longest),
        token_counts=len(counts),
        validation_tokens=max(asked, default=0),
        validation_supervised=max((int(held_out.num_targets[micro].sum()) for micro in dealt), default=0),
        validation_counts=len(set(asked) - counts),
        documents=int(training.documents.max()),
        heaviest=tuple(heaviest),
        picture_values=pictures.values,
        step_picture_values=max(step_values, pictures.values),
        decoded_bytes=pictures.decoded_bytes,
        share=1.0 if packed else most / (tokens * -(-rows_per_step // size)),
        prompts=sides.of(0),
        answers=sides.of(1),
    )


def total_steps(length: LengthOptions, num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps of a run over so many training rows."""
    return length.max_steps or StepSampler(num_rows, rows_per_step, 0).num_steps(length.epochs)


def even_micro_batches(
    length: int,
    *,
    rows_per_step: int,
    size: int,
    packed: bool,
    rules: ShapeRules,
    documents: int = 1,
    learnt: int | None = None,
    apart: bool = False,
) -> MicroBatches:
    """The micro-batches of a run whose rows all have so many documents of `length` tokens.

    Args:
        learnt: targets of a row; all its tokens where None.
        apart: rows are prompts with answers.
    """
    sizes = {size, rows_per_step % size or size}
    length = length if packed else rules.padded_width(length)
    tokens = size * documents * length
    targets = tokens if learnt is None else size * learnt
    tokens = _filled(tokens, rules) if packed else tokens
    side = Side(size * length, length, size * length) if apart else None
    return MicroBatches(tokens, targets, length, len(sizes), tokens, targets, 0, documents, prompts=side, answers=side)


def _tokens_of(
    rows: EncodedRows, micro: Sequence[int], *, packed: bool, shares: bool, apart: bool, rules: ShapeRules
) -> int:
    """Of one micro-batch, padding included."""
    if apart:
        return len(micro) * sum(_widths_of_sides(rows, micro, rules))
    if not packed:
        return int(rows.documents[micro].sum()) * rules.padded_width(int(rows.longest[micro].max()))
    shared = int(rows.shared_tokens[micro].sum()) if shares else 0
    return _filled(int(rows.lengths[micro].sum()) - shared, rules)


def _widths_of_sides(rows: EncodedRows, micro: Sequence[int], rules: ShapeRules) -> tuple[int, int]:
    """Tokens that prompts are padded to, and answers."""
    answers = rows.supervised_tokens[micro]
    longest = int((rows.lengths[micro] - answers).max()), int(answers.max())
    return rules.padded_width(longest[0]), rules.padded_width(longest[1])


def _filled(tokens: int, rules: ShapeRules) -> int:
    return -(-tokens // rules.token_multiple) * rules.token_multiple


def _largest(numbers: np.ndarray, rows: Sequence[int], size: int) -> int:
    """The most that `size` of these rows can come to."""
    return sum(sorted(numbers[rows].tolist(), reverse=True)[:size])
