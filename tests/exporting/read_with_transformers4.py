"""Run by test_transformers4.py in an environment that has transformers 4: opens folders and says what they answer.

Reads from stdin a list of {"folder", "base" (of an adapter) or null, "texts", "ids"}; writes to stdout as many of
{"tokens": of each text, "chat": of a conversation, "logits": (T, vocabulary)}.
"""

import json
import sys
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def widen(model: nn.Module) -> None:
    """Multiply by PyTorch: bitsandbytes' products on CPUs are not to be trusted (docs/lab-notes.md)."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            linear.weight = nn.Parameter(weight)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.data.float())
            model.set_submodule(name, linear)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
    model = AutoModelForCausalLM.from_pretrained(asked["base"] or asked["folder"], dtype=torch.float32)
    if asked["base"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, asked["folder"])
    if hasattr(model.config, "quantization_config"):
        widen(model)
        nn.Module.to(model, torch.float32)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([asked["ids"]]), use_cache=False).logits[0]
    return {
        "tokens": [tokenizer(text)["input_ids"] for text in asked["texts"]],
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False),
        "logits": logits.tolist(),
    }


if __name__ == "__main__":
    assert transformers.__version__.startswith("4."), transformers.__version__
    json.dump([answer(asked) for asked in json.load(sys.stdin)], sys.stdout)
