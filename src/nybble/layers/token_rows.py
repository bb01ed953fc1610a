"""Rows of the frozen embedding and of the head that are trained, of tokens that the base never learnt.

As PEFT's `trainable_token_indices`: a row is trained itself, in fp32, beginning with the base's; all others are frozen.
Where embedding and head are one matrix they share the trained rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_TOKENS = 128  # the head's rows are added through a matrix of (vocabulary, tokens)


class TokenRows(nn.Module):
    """A frozen embedding in which some tokens have rows of their own.

    Args:
        base: the embedding.
        tokens: ids, each once.

    Attributes:
        rows: fp32 `(tokens, width)`, trained.
    """

    def __init__(self, base: nn.Embedding, tokens: Sequence[int]):
        super().__init__()
        self.base, self.tokens, self.enabled = base, list(tokens), True
        self.original = _rows_of(base, self.tokens)
        self.rows = nn.Parameter(self.original.clone())
        self._place = torch.full((base.num_embeddings,), -1, device=base.weight.device)
        self._place[self.tokens] = torch.arange(len(self.tokens), device=base.weight.device)

    @property
    def num_embeddings(self) -> int:
        return self.base.num_embeddings

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        place = self._place[x]  # (...), -1 where the token has no row of its own
        own = F.embedding(place.clamp(min=0), self.rows) * getattr(self.base, "embed_scale", 1.0)
        return torch.where((place >= 0)[..., None], own.to(y.dtype), y)


class TokenLogits(nn.Module):
    """A frozen head in which some tokens have rows of their own; to the loss head an adapter.

    Args:
        base: the head, a linear layer.
        tokens: ids, each once.
        tied: has the rows, where the embedding is the same matrix.

    Attributes:
        rows: fp32 `(tokens, width)`, trained; None where `tied` has them.
        lora_B: `(vocabulary, tokens)`, 1 where a column's token is; frozen.
    """

    scaling = 1.0

    def __init__(self, base: nn.Linear, tokens: Sequence[int], tied: TokenRows | None):
        super().__init__()
        self.base, self.tokens, self.enabled = base, list(tokens), True
        self.original = _rows_of(base, self.tokens)
        self.rows = nn.Parameter(self.original.clone()) if tied is None else None
        self._tied = (tied,)  # in a tuple: it is no module of this one
        self.lora_B = torch.zeros(len(base.weight), len(self.tokens), device=base.weight.device)
        self.lora_B[self.tokens, list(range(len(self.tokens)))] = 1.0

    @property
    def lora_A(self) -> Tensor:
        """How the rows differ from the base's, fp32 `(tokens, width)`."""
        (tied,) = self._tied
        rows = self.rows if tied is None else tied.rows
        assert rows is not None
        return rows - self.original

    def low_rank(self, x: Tensor) -> Tensor:
        """What the tokens' logits are more than the base's, (..., width) -> (..., tokens)."""
        return F.linear(x, self.lora_A.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(self.low_rank(x), self.lora_B.to(x.dtype)) if self.enabled else y


def _rows_of(base: Any, tokens: list[int]) -> Tensor:
    return base.weight.detach()[tokens].float()


def train_rows(model: "PreTrainedModel", tokens: Sequence[int]) -> None:
    """Give these tokens rows of their own in the embedding and in the head, in place.

    Raises:
        ConfigError: these have adapters, or are no plain matrices; or the tokens are too many.
    """
    if len(tokens) > MOST_TOKENS:
        raise ConfigError(
            f"The rows have {len(tokens)} tokens that the base never learnt.",
            f"Trained are at most {MOST_TOKENS}.",
            "Train them into the base's embedding first.",
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ConfigError(
            f"train-new-tokens is on; embedding and head are {type(embedding).__name__} and {type(head).__name__}.",
            "Rows are trained of an embedding and a linear head without adapters.",
            "Leave them out of --target-modules, or leave --train-new-tokens out.",
        )
    rows = TokenRows(embedding, tokens)
    model.set_submodule(names[id(embedding)], rows)
    tied = rows if embedding.weight.data_ptr() == head.weight.data_ptr() else None
    model.set_submodule(names[id(head)], TokenLogits(head, tokens, tied))


def token_rows(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained rows by the name of the module that has them."""
    parts = {name: each for name, each in model.named_modules() if isinstance(each, TokenRows | TokenLogits)}
    return {name: each.rows for name, each in parts.items() if each.rows is not None}
