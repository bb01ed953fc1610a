"""Whether a teacher's tokens are its student's: its distributions are over them."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from nybble.data.examples import EncodedExample
from nybble.errors import ConfigError
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBED_ROWS = 32  # whose text both tokenizers are given
SHOWN = 3  # tokens that differ


def check_tokens(
    source: StoredModel, ours: "PreTrainedTokenizerBase", parts: Sequence[Sequence[EncodedExample]], vocabulary: int
) -> None:
    """Refuse a teacher that reads rows otherwise than the student, or whose tokens are others.

    Tokens beside the ordinary vocabulary that no row has may differ; and either may know more than the other.

    Args:
        source: the teacher.
        ours: the student's tokenizer.
        parts: rows, of which the first are written out and read by both.
        vocabulary: tokens that the teacher can be given.

    Raises:
        ConfigError: says which tokens differ.
    """
    theirs = source.load_tokenizer()
    here, there = ({id: token for token, id in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs))
    used = np.zeros(1 + max(here), dtype=bool)
    for row in chain(*parts):
        used[row.input_ids.numpy()] = True
    added = {*ours.added_tokens_decoder, *theirs.added_tokens_decoder}
    differing = [
        id for id, token in sorted(here.items()) if there.get(id, token) != token and (used[id] or id not in added)
    ]
    differing += [id for id in used.nonzero()[0].tolist() if id not in there or id >= vocabulary]
    if differing:
        named = "; ".join(f"{id} is {here[id]!r} here and {_named(there, id, vocabulary)}" for id in differing[:SHOWN])
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise _other_tokens(source, f"tokens differ: {named}{more}")
    for row in islice(chain(*parts), PROBED_ROWS):
        text = ours.decode(row.input_ids.tolist(), skip_special_tokens=False)
        read = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (ours, theirs)]
        if read[0] != read[1]:
            same = next((i for i, (a, b) in enumerate(zip(*read, strict=False)) if a != b), min(map(len, read)))
            pairs = zip((here, there), read, strict=True)
            shown = ["".join(f" {known[id]!r}" for id in ids[same : same + SHOWN]) for known, ids in pairs]
            raise _other_tokens(source, f"{row.origin} is read as{shown[0]} here where it is read as{shown[1]} there")


def _named(there: dict[int, str], id: int, vocabulary: int) -> str:
    return repr(there[id]) if id in there and id < vocabulary else "nothing there"


def _other_tokens(source: StoredModel, difference: str) -> ConfigError:
    return ConfigError(
        f"teacher is {source.name!r}, and {difference}.",
        "A teacher's distributions are over its tokens: they must be the student's.",
        "Choose a teacher of the same family, or --objective sft on answers that the teacher wrote.",
    )
