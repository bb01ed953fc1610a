"""Which rows an objective learns from."""

from nybble.data.classification import LABELLED_ROWS
from nybble.data.embedding_rows import COMPARED_ROWS
from nybble.data.preferences import JUDGED_ROWS, PAIR_ROWS, WHOLE_PAIR_ROWS
from nybble.data.prepare import EXAMPLE_ROWS, RowKind
from nybble.data.prompts import PROMPTED_ROWS
from nybble.data.reward_rows import SCORED_PAIR_ROWS

ROW_KINDS: dict[str, RowKind] = {  # of each objective
    "sft": EXAMPLE_ROWS,
    "dpo": PAIR_ROWS,
    "ipo": PAIR_ROWS,
    "simpo": PAIR_ROWS,
    "orpo": WHOLE_PAIR_ROWS,
    "kto": JUDGED_ROWS,
    "classify": LABELLED_ROWS,
    "reward": SCORED_PAIR_ROWS,
    "distill": EXAMPLE_ROWS,
    "embed": COMPARED_ROWS,
}


def row_kind(objective: str, *, prompted: bool = False) -> RowKind:
    """Of the rows that an objective learns from.

    Args:
        prompted: by an encoder-decoder, which takes a prompt and its answer apart.
    """
    return PROMPTED_ROWS if prompted else ROW_KINDS[objective]
