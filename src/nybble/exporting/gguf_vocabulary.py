"""A transformers tokenizer as llama.cpp stores one in GGUF (formats/gguf_vocabulary.py says what the kinds mean).

SentencePiece's pieces join by descending score, so the score of a token is minus the rank of the merge that makes it.
"""

import json
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, TokenType

from nybble.data.examples import Message
from nybble.data.template import ChatTemplate
from nybble.errors import ExportError
from nybble.formats.gguf_vocabulary import BYTE_TOKEN, SPACE, SPLITTING_RULES, Vocabulary


def vocabulary_of(tokenizer: Any, size: int, opening: str = "", gemma4: bool = False) -> Vocabulary:
    """The vocabulary of a fast tokenizer, filled up to `size` tokens.

    Args:
        opening: the special token that texts begin with, where they do.
        gemma4: whether one with byte fallback and no space before texts keeps its merges, as in Gemma 4's files.

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
    byte_fallback = bool(model.get("byte_fallback"))
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, number in ids.items():
        is_byte = byte_fallback and BYTE_TOKEN.fullmatch(token)
        tokens[number], types[number] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number] = added.content
        types[number] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not byte_fallback:
        return Vocabulary("gpt2", _splitting_rule(description), tokens, types, merges)
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    # llama.cpp puts a space after every special token or nowhere; some tokenizers only where the text itself begins
    begun = tokenizer.tokenize(f"{opening}a", add_special_tokens=False)[bool(opening)].startswith(SPACE)
    if gemma4 and not begun:
        return Vocabulary("gemma4", "gemma4", tokens, types, merges)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair) if not isinstance(pair, str) else pair.replace(" ", "", 1), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=begun)


def add_vocabulary(writer: GGUFWriter, template: ChatTemplate, size: int) -> None:
    """Write the run's tokenizer, its chat template and the tokens that end an answer.

    Raises:
        ExportError: llama.cpp has no counterpart for this tokenizer.
    """
    tokenizer, begins = template.tokenizer, template.encoder.leading_bos is not None
    # such files have bos before every text, whatever they say of it
    gemma4 = writer.arch == MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA4] and begins
    vocabulary = vocabulary_of(tokenizer, size, _opening(template), gemma4)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.model != "gpt2":
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
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    if template.chat_template is not None:
        writer.add_chat_template(template.chat_template)


def _opening(template: ChatTemplate) -> str:
    """The bos that conversations spell at their beginning, else nothing."""
    bos = template.tokenizer.bos_token or ""
    if template.chat_template is None:
        return ""
    return bos if bos and template.render([Message("user", "a")], True).startswith(bos) else ""


def _splitting_rule(description: dict[str, Any]) -> str:
    """llama.cpp's name for the rule that a tokenizer, described as JSON, splits text by."""
    whole = description.get("pre_tokenizer")
    parts = whole["pretokenizers"] if whole and whole["type"] == "Sequence" else [whole]
    key = tuple(_describe(part) for part in parts if part)
    names = [name for name, rule in SPLITTING_RULES.items() if rule.parts == key]
    if not names:
        raise _no_counterpart(f"splits text by a rule of its own ({', '.join(key) or 'none'})")
    whole_words = bool(description["model"].get("ignore_merges"))
    return next((name for name in names if SPLITTING_RULES[name].whole_words == whole_words), names[0])


def _describe(part: dict[str, Any]) -> str:
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "bytes" if part.get("use_regex", True) else "raw bytes"
    if part["type"] == "Digits" and part["individual_digits"]:
        return "digits"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return str(part["pattern"].get("Regex", part["pattern"]))
    return str(part["type"])


def _no_counterpart(what: str) -> ExportError:
    return ExportError(
        f"The model's tokenizer {what}, which GGUF has no name for here.",
        f"Supported: byte-level BPE split as by {', '.join(SPLITTING_RULES)}; SentencePiece BPE with byte fallback.",
        "Export with --to 16bit and use llama.cpp's own converter.",
    )
