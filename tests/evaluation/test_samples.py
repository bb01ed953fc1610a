"""The side-by-side answers that a run ends with."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.data.examples import EncodedExample
from nybble.evaluation.samples import compare_answers
from nybble.layers.convert import adapters_of, attach_adapters, resolve_targets

CONTEXT = 64


class Letters:
    """A tokenizer of one letter a token, which is all that samples ask of one."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(ord("a") + token) for token in ids)


class Template:
    tokenizer, stop_ids = Letters(), ()


def tuned_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=26,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    attach_adapters(model, resolve_targets(model, "all-linear"), rank=4, alpha=8)
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.lora_B, std=0.5)
    return model


def row(prompt: list[int], answer: list[int]) -> EncodedExample:
    supervised = [False] * len(prompt) + [True] * len(answer)
    return EncodedExample(torch.tensor(prompt + answer, dtype=torch.int32), torch.tensor(supervised), "file:1")


def test_base_and_tuned_answers_stand_beside_prompt_and_reference():
    model = tuned_model()
    rows = [row([0, 1, 2], [3, 4]), row([5] * CONTEXT, [6]), row([], [6]), row([7, 8], [9])]
    samples = compare_answers(model, Template(), rows, max_new_tokens=5)
    assert [(sample.prompt, sample.reference) for sample in samples] == [("abc", "de"), ("hi", "j")]
    assert all(len(sample.base) == len(sample.tuned) == 5 and sample.base != sample.tuned for sample in samples)
    assert all(adapter.enabled for adapter in adapters_of(model).values())
    assert compare_answers(model, Template(), rows[:1], max_new_tokens=5) == samples[:1]
