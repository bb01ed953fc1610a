"""Answers from a model: batches of prompts, greedy or sampled, through transformers' generation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: object | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop token or `max_new_tokens`.

    Args:
        prompts: token ids; shorter ones are padded on the left and masked.
        stop_ids: tokens that end an answer; they are not part of the result.
        temperature: 0 takes the likeliest token, else samples from softmax(logits / temperature).
        streamer: a transformers streamer that sees each token (one prompt only).

    Returns:
        The new token ids of each prompt.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    pad_id = stop_ids[0]
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        streamer=streamer,
        **sampling,
    )
    model.train(was_training)
    return [_until_stop(row, set(stop_ids)) for row in output[:, longest:].tolist()]


def _until_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in stop_ids:
            return ids[:i]
    return ids
