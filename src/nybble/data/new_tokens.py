"""Tokens that were added to a tokenizer and that the model never learnt. Embeddings are frozen: it never will.

Tokens that nobody trained are told by their embedding: (nearly) zero, as makers leave reserved ones; at the mean of
all rows, where resizing puts new ones; or the same as a row that belongs to no token. The search for them follows
Land and Bartolo 2024, "Fishing for Magikarp". Rows drawn at random look like trained ones; those tokens can only be
told by what does not mention them.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.data.examples import EncodedExample
from nybble.data.findings import Finding, find

ReadRows = Callable[[list[int]], Tensor | None]  # token ids -> fp32 (N, hidden)
SAMPLE = 512  # ordinary rows that stand for all
NEAR = 0.1  # of what is usual


def find_new_tokens(
    sequences: Sequence[EncodedExample],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    vocab_size: int,
    read_rows: ReadRows,
) -> list[Finding]:
    """Sequences with tokens that `untrained_tokens` gives; arguments as it takes them."""
    new = set(untrained_tokens(sequences, tokenizer, chat_template, vocab_size, read_rows))
    if not new:
        return []
    origins = (s.origin for s in sequences if new.intersection(s.input_ids.tolist()))
    return find("untrained-tokens", origins, describe_tokens(sorted(new), tokenizer))


def describe_tokens(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """How they are spelled."""
    return ", ".join(repr(tokenizer.convert_ids_to_tokens(id)) for id in ids)


def untrained_tokens(
    sequences: Iterable[EncodedExample],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    vocab_size: int,
    read_rows: ReadRows,
) -> list[int]:
    """Ids of added tokens in the sequences that nothing shows to have been trained, in order.

    Args:
        chat_template: the one that the sequences were rendered with.
        vocab_size: rows of the embedding.
        read_rows: gives rows of it.
    """
    added = {id for id in tokenizer.added_tokens_decoder if id < vocab_size}
    used: set[int] = set()
    for sequence in sequences:
        used |= added.intersection(sequence.input_ids.unique().tolist())
    candidates = sorted(used)
    if not candidates:
        return []
    never = _untrained(candidates, len(tokenizer), vocab_size, read_rows)
    new = never | _unmentioned(candidates, tokenizer, chat_template)
    return [id for id in candidates if id in new]


def _unmentioned(candidates: Iterable[int], tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> set[int]:
    """Tokens beyond the vocabulary that the tokenizer was made with, which neither its settings nor its chat template
    mention."""
    if not tokenizer.is_fast:  # it does not tell them apart
        return set()
    named = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    templates = f"{chat_template}{tokenizer.chat_template}"
    spelled = {id: tokenizer.convert_ids_to_tokens(id) for id in candidates}
    return {id for id, token in spelled.items() if id not in named and token not in own and token not in templates}


def _untrained(candidates: list[int], num_tokens: int, vocab_size: int, read_rows: ReadRows) -> set[int]:
    """Those whose embedding is (nearly) zero, at the mean of all, or the same as that of no token."""
    ordinary = torch.linspace(0, min(num_tokens, vocab_size) - 1, SAMPLE).long().unique().tolist()
    spare = list(range(num_tokens, vocab_size))[:SAMPLE]
    rows = read_rows([*candidates, *ordinary, *spare])
    if rows is None:
        return set()
    own, usual, unused = rows.split([len(candidates), len(ordinary), len(spare)])
    mean = usual.mean(0)  # (hidden,)
    length, distance = usual.norm(dim=1).median(), (usual - mean).norm(dim=1).median()
    untrained = (own.norm(dim=1) < NEAR * length) | ((own - mean).norm(dim=1) < 2 * NEAR * distance)
    if spare:
        untrained |= torch.cdist(own, unused).amin(1) < NEAR * NEAR * length
    return {id for id, found in zip(candidates, untrained.tolist(), strict=True) if found}
