"""Answers from a model: batches of prompts, greedy or sampled, token by token as they come.

Models that nybble's decoder blocks compute answer through their packed weights (layers/decoding.py); others, and
other devices, through transformers' generation. What the model's own generation config says about sampling and
penalties is not applied on either way: the arguments say all.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.errors import ConfigError, DataError
from nybble.layers.backbone import why_not_forward
from nybble.layers.decoding import CachedDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnToken = Callable[[int, int], None]  # index of the prompt, token


def generate(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop token, `max_new_tokens`, or the end of the model's context.

    Args:
        prompts: token ids; of different lengths, if need be.
        stop_ids: tokens that end an answer; they are not part of it.
        max_new_tokens: most tokens in an answer, at least 1.
        temperature: 0 takes the likeliest token, else samples from softmax(logits / temperature).
        top_p: samples among the likeliest tokens whose probabilities reach this sum, in (0, 1].
        top_k: samples among so many likeliest tokens; 0 among all.
        seed: of the sampling; None draws from torch's global generator.
        on_token: called with (index of the prompt, token) as soon as a token of an answer is known.

    Returns:
        The new token ids of each prompt.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a prompt is empty, or leaves no room in the model's context.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, temperature {temperature}, top_p {top_p}, top_k {top_k}.",
            "Allowed: max_new_tokens of at least 1, temperature and top_k of at least 0, top_p above 0 and up to 1.",
        )
    if not prompts:
        return []
    room = min(max_new_tokens, *(_room(model, prompt) for prompt in prompts))
    through = _through_blocks if why_not_forward(model) is None else _through_transformers
    return through(model, prompts, frozenset(stop_ids), room, temperature, top_p, top_k, seed, on_token or _ignore)


def context_length(model: "PreTrainedModel") -> int | None:
    """Tokens that the model was made for, prompt and answer together; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _room(model: "PreTrainedModel", prompt: Sequence[int]) -> int:
    context = context_length(model) or sys.maxsize
    if not 0 < len(prompt) < context:
        raise DataError(
            f"The prompt has {len(prompt)} tokens.",
            f"Allowed: 1 to {context - 1}, so that an answer fits into the model's context of {context}.",
            "Shorten the prompt." if prompt else "",
        )
    return context - len(prompt)


def _ignore(prompt: int, token: int) -> None:
    return None


# ---- decoder blocks ------------------------------------------------------------------------------


@torch.no_grad()
def _through_blocks(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    on_token: OnToken,
) -> list[list[int]]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))  # which prompt each row of the decoder answers
    decoder = CachedDecoder(model)
    logits = decoder.start(prompts, max_new_tokens)
    while True:
        tokens = choose_tokens(logits, temperature, top_p, generator, top_k)
        open_rows = [row for row, token in enumerate(tokens.tolist()) if token not in stop_ids]
        if len(open_rows) < len(going):
            decoder.keep(open_rows)
            going, tokens = [going[row] for row in open_rows], tokens[open_rows]
        for prompt, token in zip(going, tokens.tolist(), strict=True):
            answers[prompt].append(token)
            on_token(prompt, token)
        if not going or len(answers[going[0]]) == max_new_tokens:
            return answers
        logits = decoder.step(tokens)


def choose_tokens(
    logits: Tensor,
    temperature: float,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    top_k: int = 0,
) -> Tensor:
    """The next token of each row of logits, `(N, vocabulary)` -> int64 `(N)`.

    With 0 < top_p < 1 only the nucleus is sampled from: the likeliest tokens, down to the one with which their
    probabilities reach top_p (Holtzman et al. 2020, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    if top_p == 1:
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    descending, tokens = probabilities.sort(dim=-1, descending=True)
    likelier = descending.cumsum(dim=-1) - descending  # probability of all tokens before this one
    nucleus = descending.masked_fill(likelier >= top_p, 0.0)
    return tokens.gather(1, torch.multinomial(nucleus, 1, generator=generator)).squeeze(1)


# ---- transformers --------------------------------------------------------------------------------


@torch.no_grad()
def _through_transformers(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    on_token: OnToken,
) -> list[list[int]]:
    """Prompts padded on the left and masked."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    pad_id = min(stop_ids, default=0)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    answers = _Answers(len(prompts), stop_ids, on_token)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stop_ids) or None,
                pad_token_id=pad_id,
                top_k=top_k,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                streamer=answers,
                **sampling,
            )
    finally:
        model.train(was_training)
    return answers.ids


class _Answers:
    """The streamer that transformers hands the prompts, and then a token of each row at a time."""

    def __init__(self, num_prompts: int, stop_ids: frozenset[int], on_token: OnToken):
        self.ids: list[list[int]] = [[] for _ in range(num_prompts)]
        self._open = [True] * num_prompts
        self._stop_ids, self._on_token = stop_ids, on_token
        self._prompts_seen = False

    def put(self, value: Any) -> None:
        if not self._prompts_seen:
            self._prompts_seen = True
            return
        for row, token in enumerate(value.tolist()):
            self._open[row] &= token not in self._stop_ids
            if self._open[row]:
                self.ids[row].append(token)
                self._on_token(row, token)

    def end(self) -> None:
        """All answers have ended; nothing is held back."""
