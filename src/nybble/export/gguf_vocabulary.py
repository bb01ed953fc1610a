"""A transformers tokenizer as llama.cpp stores one in GGUF.

    gpt2    byte-level BPE: tokens, types, merges, and the name of the rule by which text is split first (`pre`)
    llama   SentencePiece's BPE with byte fallback: tokens, types and scores; pieces join by descending score, so
            the score of a token is minus the rank of the merge that makes it

llama.cpp knows splitting rules by name; `_RULES` names those of the families that nybble exports.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer".
"""

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nybble.data.template import ChatTemplate
from nybble.errors import ExportError

if TYPE_CHECKING:
    import gguf

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# what the tokenizer's pre-tokenizers are -> llama.cpp's name
_RULES = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?{_TAIL}", "raw bytes"): "llama-bpe",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?{_TAIL}", "raw bytes"): "qwen2",
    (_TEKKEN, "raw bytes"): "tekken",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What the keys `tokenizer.ggml.*` hold.

    Args:
        model: "gpt2" or "llama".
        pre: name of the splitting rule, for gpt2.
        tokens: by id, filled up to the rows of the embedding matrix.
        types: `gguf.TokenType` of each.
        merges: of gpt2, by rank, "left right".
        scores: of llama.
        space_prefix: whether llama.cpp should put a space before a text, for llama.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer, filled up to `size` tokens.

    Raises:
        ExportError: llama.cpp has no counterpart for this tokenizer.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise _no_counterpart(f"is a {model['type']} model")
    ids: dict[str, int] = tokenizer.get_vocab()
    if len(ids) > size or max(ids.values()) >= size:
        raise ExportError(f"The tokenizer has {len(ids)} tokens, the model's embedding {size} rows.")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(_type("UNUSED"))] * size
    for token, number in ids.items():
        tokens[number], types[number] = token, int(_type("BYTE" if _BYTE.fullmatch(token) else "NORMAL"))
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number] = added.content
        types[number] = int(_type("CONTROL" if added.special else "USER_DEFINED"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not model.get("byte_fallback"):
        return Vocabulary("gpt2", _splitting_rule(description.get("pre_tokenizer")), tokens, types, merges)
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(_type("UNKNOWN"))
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair) if not isinstance(pair, str) else pair.replace(" ", "", 1), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=first.startswith("▁"))


def add_vocabulary(writer: "gguf.GGUFWriter", template: ChatTemplate, size: int) -> None:
    """Write the run's tokenizer, its chat template and the tokens that end an answer.

    Raises:
        ExportError: llama.cpp has no counterpart for this tokenizer.
    """
    tokenizer = template.tokenizer
    vocabulary = vocabulary_of(tokenizer, size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    if template.stop_ids and template.stop_ids[0] != tokenizer.eos_token_id:
        writer.add_eot_token_id(template.stop_ids[0])
    writer.add_add_bos_token(template.encoder.leading_bos is not None)
    writer.add_add_eos_token(False)
    if template.chat_template is not None:
        writer.add_chat_template(template.chat_template)


def _splitting_rule(pre_tokenizer: dict[str, Any] | None) -> str:
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer and pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    key = tuple(_describe(part) for part in parts if part)
    if key not in _RULES:
        raise _no_counterpart(f"splits text by a rule of its own ({', '.join(key) or 'none'})")
    return _RULES[key]


def _describe(part: dict[str, Any]) -> str:
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "bytes" if part.get("use_regex", True) else "raw bytes"
    if part["type"] == "Digits" and part["individual_digits"]:
        return "digits"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return str(part["pattern"].get("Regex", part["pattern"]))
    return str(part["type"])


def _type(name: str) -> int:
    import gguf

    return int(gguf.TokenType[name])


def _no_counterpart(what: str) -> ExportError:
    return ExportError(
        f"The model's tokenizer {what}, which GGUF has no name for here.",
        f"Supported: byte-level BPE split as by {', '.join(_RULES.values())}; SentencePiece BPE with byte fallback.",
        "Export with --to 16bit and use llama.cpp's own converter.",
    )
