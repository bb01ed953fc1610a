"""Answers from a model: batches of prompts, greedy or sampled, token by token as they come.

Models that nybble's decoder blocks compute answer through their packed weights (generation/decoding.py); others, and
on devices without kernels for that, through transformers' generation. What the model's own generation config says about
sampling and penalties is not applied on either way: the arguments say all.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.errors import ConfigError, DataError
from nybble.generation.decoding import CachedDecoder, decoder_ops
from nybble.layers.backbone import given_beside, why_not_forward
from nybble.layers.context import context_length
from nybble.layers.dense import is_encoder_decoder
from nybble.layers.lora import DoraLinear
from nybble.layers.trained import trained_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_TEMPERATURE = 1e-6  # with the bounds of the penalty: no logit, divided by both, leaves fp32's range
PENALTIES = (1e-6, 1e6)

OnToken = Callable[[int, int], object]  # index of the prompt, token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits, in this order.

    Args:
        repetition_penalty: logits of tokens that the text has, its prompt included, are divided by it where they are
            above zero and multiplied where they are below (CTRL, Keskar et al. 2019, arXiv 1909.05858).
        temperature: 0 takes the likeliest token, else samples from softmax(logits / temperature).
        top_k: samples among so many likeliest tokens; 0 among all.
        top_p: samples among the likeliest tokens whose probabilities reach this sum, in (0, 1] (the nucleus: Holtzman
            et al. 2020, arXiv 1904.09751).
        min_p: samples among tokens at least so likely as a share of the likeliest one, in [0, 1) (arXiv 2407.01082).
        seed: None draws from torch's global generator.

    Raises:
        ConfigError: an argument is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (
            (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf)
            and 0 < self.top_p <= 1
            and self.top_k >= 0
            and 0 <= self.min_p < 1
            and PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1]
        ):
            raise ConfigError(
                f"{self}.",
                f"Allowed: temperature 0 or at least {MIN_TEMPERATURE:g}, top_k of at least 0, top_p above 0 and up to "
                f"1, min_p from 0 to below 1, repetition_penalty from {PENALTIES[0]:g} to {PENALTIES[1]:g}.",
            )


GREEDY = Sampling()


def generate(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    on_token: OnToken | None = None,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[list[int]]:
    """Continue each prompt until a stop token, `max_new_tokens`, or the end of the model's context.

    Args:
        prompts: token ids; of different lengths, if need be.
        stop_ids: tokens that end an answer; they are not part of it.
        max_new_tokens: most tokens in an answer, at least 1.
        sampling: how each token is chosen; the likeliest one if not given.
        on_token: called with (index of the prompt, token) as soon as a token of an answer is known.
        beside: what a vision-language model is given of the pictures in its one prompt, by name.

    Returns:
        The new token ids of each prompt.

    Raises:
        ConfigError: max_new_tokens is below 1.
        DataError: a prompt is empty, or leaves no room in the model's context.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}.", "Allowed: at least 1.")
    if not prompts:
        return []
    assert not beside or len(prompts) == 1, "pictures of several prompts are not told apart"
    room = min(max_new_tokens, *(_room(model, prompt) for prompt in prompts))
    through = _through_blocks if _has_decoder(model) else partial(_through_transformers, beside=beside)
    return through(model, prompts, frozenset(stop_ids), room, sampling, on_token or (lambda prompt, token: None))


def _has_decoder(model: "PreTrainedModel") -> bool:
    """Whether decoder blocks give the answers; their kernels know no module that is trained whole, and do not scale
    rows, as DoRA's adapters do."""
    scales = any(isinstance(module, DoraLinear) for module in model.modules())
    return not scales and not trained_modules(model) and why_not_forward(model, ops=decoder_ops) is None


def _room(model: "PreTrainedModel", prompt: Sequence[int]) -> int:
    context = context_length(model.config) or sys.maxsize
    if is_encoder_decoder(model) and 0 < len(prompt) <= context:
        return context  # its decoder begins anew
    if not 0 < len(prompt) < context:
        raise DataError(
            f"The prompt has {len(prompt)} tokens.",
            f"Allowed: 1 to {context - 1}, so that an answer fits into the model's context of {context}.",
            "Shorten the prompt." if prompt else "",
        )
    return context - len(prompt)


# ---- decoder blocks ------------------------------------------------------------------------------


@torch.no_grad()
def _through_blocks(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    sampling: Sampling,
    on_token: OnToken,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))  # which prompt each row of the decoder answers
    decoder = CachedDecoder(model)
    logits = decoder.start(prompts, max_new_tokens)
    generator = None if sampling.seed is None else torch.Generator(logits.device).manual_seed(sampling.seed)
    penalty = RepetitionPenalty(prompts, sampling.repetition_penalty)
    while True:
        tokens = choose_tokens(penalty(logits), sampling, generator)
        open_rows = [row for row, token in enumerate(tokens.tolist()) if token not in stop_ids]
        if len(open_rows) < len(going):
            decoder.keep(open_rows)
            penalty.keep(open_rows)
            going, tokens = [going[row] for row in open_rows], tokens[open_rows]
        for prompt, token in zip(going, tokens.tolist(), strict=True):
            answers[prompt].append(token)
            on_token(prompt, token)
        if not going or len(answers[going[0]]) == max_new_tokens:
            return answers
        penalty.add(tokens)
        logits = decoder.step(tokens)


class RepetitionPenalty:
    """What a penalty makes of logits: those of tokens that a text already has move towards, and below, zero.

    Args:
        prompts: what the texts begin with.
        penalty: as `Sampling.repetition_penalty`; 1 changes nothing.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], penalty: float):
        self._prompts, self._penalty = prompts, penalty
        self._seen: Tensor | None = None  # bool (texts, vocabulary), from the first logits on

    def __call__(self, logits: Tensor) -> Tensor:
        """`(texts, vocabulary)`; the logits themselves where the penalty is 1."""
        if self._penalty == 1:
            return logits
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in zip(self._seen, self._prompts, strict=True):
                row[torch.tensor(list(prompt), device=row.device)] = True
        penalised = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        return torch.where(self._seen, penalised, logits)

    def add(self, tokens: Tensor) -> None:
        """The next token of each text, `(texts)`."""
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)

    def keep(self, texts: Sequence[int]) -> None:
        """Forget all other texts."""
        if self._seen is not None:
            self._seen = self._seen[list(texts)]


def choose_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row of logits, `(N, vocabulary)` -> int64 `(N)`; penalties have been taken off them."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = (logits.float() / sampling.temperature).softmax(dim=-1)
    tokens = None
    if sampling.top_p < 1:
        descending, tokens = probabilities.sort(dim=-1, descending=True)
        likelier = descending.cumsum(dim=-1) - descending  # probability of all tokens before this one
        probabilities = descending.masked_fill(likelier >= sampling.top_p, 0.0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


# ---- transformers --------------------------------------------------------------------------------


@torch.no_grad()
def _through_transformers(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    sampling: Sampling,
    on_token: OnToken,
    beside: Mapping[str, Tensor],
) -> list[list[int]]:
    """Prompts padded and masked: on the left, or where an encoder reads them on the right. Whatever the model's
    generation config has that the arguments do not name (beams, banned tokens, a time limit) stands aside meanwhile."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    pad_id = min(stop_ids, default=0)
    prompted = is_encoder_decoder(model)
    ids = torch.full((len(prompts), longest), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        places = slice(0, len(prompt)) if prompted else slice(longest - len(prompt), None)
        ids[row, places] = torch.tensor(list(prompt), device=device)
        mask[row, places] = 1
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        options |= {"top_p": sampling.top_p, "min_p": sampling.min_p}
    begun = prompts
    if prompted:
        first = _first_tokens(model)
        options |= first
        begun = [[first["decoder_start_token_id"]]] * len(prompts)
    penalty = RepetitionPenalty(begun, sampling.repetition_penalty)

    def penalised(texts: Tensor, scores: Tensor) -> Tensor:
        penalty.add(texts[:, -1])  # nothing at the first call: it ends in a token of the prompt
        return penalty(scores)

    answers = _Answers(len(prompts), stop_ids, on_token)
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stop_ids) or None,
                pad_token_id=pad_id,
                logits_processor=[penalised],  # transformers' own penalty would count padding as text
                streamer=answers,
                **options,
                **given_beside(model, beside, device),
            )
    finally:
        model.train(was_training)
        model.generation_config = own_config
    return answers.ids


def _first_tokens(model: Any) -> dict[str, Any]:
    """What an encoder-decoder's answers begin with: a token that its decoder is given, and one that it must say first
    where its makers have one (of mBART's the language).
    """
    own, config = model.generation_config, model.config
    names = ("decoder_start_token_id", "forced_bos_token_id")
    said = {name: getattr(own, name, None) for name in names}
    return {name: getattr(config, name, None) if value is None else value for name, value in said.items()}


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
