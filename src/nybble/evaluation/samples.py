"""Held-out prompts answered by the base and by the tuned model, side by side."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nybble.data.examples import EncodedExample
from nybble.data.template import ChatTemplate
from nybble.generation.generate import generate
from nybble.layers.context import context_length
from nybble.layers.convert import enable_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and three answers to it."""

    prompt: str
    reference: str
    base: str
    tuned: str


def compare_answers(
    model: "PreTrainedModel",
    template: ChatTemplate,
    rows: Sequence[EncodedExample],
    max_new_tokens: int = SAMPLE_TOKENS,
    switch: Callable[[bool], object] | None = None,
) -> list[Sample]:
    """Greedy answers to the first supervised turn of each row, by the base and by the tuned model.

    Args:
        switch: makes the model its base, with False, or the tuned one; where None by its adapters.

    Rows without a prompt, or whose prompt fills the model's context, are left out.
    """
    context = context_length(model.config) or sys.maxsize
    rows = [row for row in rows if 0 < len(row.prompt_ids) < context]
    decode = template.tokenizer.decode
    prompts = [row.prompt_ids for row in rows]
    ask = partial(generate, model, stop_ids=template.stop_ids, max_new_tokens=max_new_tokens)
    answers = {}
    for tuned in (False, True):
        enable_adapters(model, tuned) if switch is None else switch(tuned)
        if any(row.picture_values for row in rows):
            assert template.reader is not None  # which made them
            beside = (template.reader.collate([row.prompt], packed=False).pictures for row in rows)
            new_ids = [ask([prompt], beside=own)[0] for prompt, own in zip(prompts, beside, strict=True)]
        else:
            new_ids = ask(prompts)
        answers[tuned] = [decode(ids, skip_special_tokens=True).strip() for ids in new_ids]
    references = [decode(row.answer_ids, skip_special_tokens=True).strip() for row in rows]
    shown = [decode(prompt, skip_special_tokens=True).strip() for prompt in prompts]
    return [Sample(*parts) for parts in zip(shown, references, answers[False], answers[True], strict=True)]
