"""The tokenizer of a GGUF file, and what llama.cpp does with it.

    gpt2    byte-level BPE: tokens, types, merges, and the name of the rule by which text is split first (`pre`)
    llama   SentencePiece's BPE with byte fallback: tokens, types and scores; any two pieces that spell a token join,
            the best score first. With a space prefix, a space goes before the text and after each special token
    gemma4  the same pieces and bytes, joined by merges as in byte-level BPE; line breaks are set apart, and bos goes
            before every text

llama.cpp knows splitting rules by name; `SPLITTING_RULES` names those of the families that nybble reads and writes.
Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer"; llama.cpp's `llama-vocab.cpp`.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class SplittingRule:
    """How a byte-level tokenizer takes text apart before it joins bytes.

    Args:
        parts: one after the other: "digits" (each by itself), "bytes" (GPT-2's words), "raw bytes" (whole), or a
            regular expression whose matches are set apart.
        whole_words: a word that is a token is taken as it is, whatever the merges say.
        adds_bos: a text begins with bos where the file does not say whether it does.
        aliases: llama.cpp's other names for the same rule.
    """

    parts: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    aliases: tuple[str, ...] = ()


SPLITTING_RULES = {
    "gpt-2": SplittingRule(("bytes",), aliases=("phi-2", "olmo", "mpt", "gigachat", "exaone4")),
    "smollm": SplittingRule(("digits", "bytes"), aliases=("starcoder", "refact", "command-r", "codeshell", "exaone")),
    "llama-bpe": SplittingRule(
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?{_TAIL}", "raw bytes"),
        whole_words=True,
        adds_bos=True,
        aliases=("llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"),
    ),
    "smaug-bpe": SplittingRule(  # Llama 3's words, without taking whole ones as they are
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?{_TAIL}", "raw bytes"), aliases=("dbrx",)
    ),
    "qwen2": SplittingRule(
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?{_TAIL}", "raw bytes"),
        aliases=("deepseek-r1-qwen", "megrez", "hunyuan", "stablelm2", "solar-open"),
    ),
    "tekken": SplittingRule((_TEKKEN, "raw bytes"), whole_words=True, adds_bos=True),
}
KNOWN_MODELS = ("gpt2", "llama", "gemma4")
LINE_BREAKS = r"\n+"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """What the keys `tokenizer.ggml.*` hold.

    Args:
        model: of KNOWN_MODELS.
        pre: name of the splitting rule, for gpt2.
        tokens: by id, filled up to the rows of the embedding matrix.
        types: `gguf.TokenType` of each.
        merges: of gpt2 and gemma4, by rank, "left right".
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


def splitting_rule(name: str) -> SplittingRule | None:
    """llama.cpp's rule of this name, None where it is not known here."""
    return next((rule for key, rule in SPLITTING_RULES.items() if name in (key, *rule.aliases)), None)


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer that gives the tokens that llama.cpp gives, special tokens spelled out in the text included.

    Nothing is put before a text but SentencePiece's space.

    Raises:
        ValueError: tokens, merges or scores do not belong together.
    """
    if len(vocabulary.types) != len(vocabulary.tokens):
        raise ValueError(f"it has {len(vocabulary.tokens)} tokens, and types of {len(vocabulary.types)}")
    if vocabulary.model in MERGED and not vocabulary.merges:
        raise ValueError("it has no merges, by which its tokenizer joins letters")
    tokenizer = _BUILDERS[vocabulary.model](vocabulary)
    for kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        tokens = [token for token, of in zip(vocabulary.tokens, vocabulary.types, strict=True) if of == kind]
        added = [AddedToken(token, normalized=False, special=kind == TokenType.CONTROL) for token in tokens]
        tokenizer.add_special_tokens(added) if kind == TokenType.CONTROL else tokenizer.add_tokens(added)
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    rule = splitting_rule(vocabulary.pre)
    if rule is None:
        raise ValueError(f"it splits text by the unknown rule {vocabulary.pre!r}")
    merges = [_pair(merge) for merge in vocabulary.merges]
    tokenizer = Tokenizer(models.BPE(_ids(vocabulary), merges, ignore_merges=rule.whole_words))
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    if len(vocabulary.scores) != len(vocabulary.tokens):
        raise ValueError(f"it has {len(vocabulary.tokens)} tokens, and scores of {len(vocabulary.scores)}")
    return _of_pieces(vocabulary, _merges_by_score(vocabulary))


def _gemma4(vocabulary: Vocabulary) -> Tokenizer:
    tokenizer = _of_pieces(vocabulary, [_pair(merge) for merge in vocabulary.merges])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(LINE_BREAKS), behavior="isolated")
    return tokenizer


def _of_pieces(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> Tokenizer:
    """Pieces with ▁ for spaces, and a token for every byte of what is no piece."""
    unknown = next(
        (t for t, of in zip(vocabulary.tokens, vocabulary.types, strict=True) if of == TokenType.UNKNOWN), None
    )
    tokenizer = Tokenizer(models.BPE(_ids(vocabulary), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    written: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.space_prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        written.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(written)
    return tokenizer


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}
MERGED = ("gpt2", "gemma4")  # whose tokens are joined by merges


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every two tokens that spell a third, that with the best score first."""
    known = set(vocabulary.tokens)
    ranked = sorted(zip(vocabulary.scores, vocabulary.tokens, vocabulary.types, strict=True), key=lambda t: -t[0])
    return [
        (token[:cut], token[cut:])
        for _, token, kind in ranked
        if kind in (TokenType.NORMAL, TokenType.UNUSED)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _pre_tokenizer(rule: SplittingRule) -> Any:
    def build(part: str) -> Any:
        if part == "digits":
            return pre_tokenizers.Digits(individual_digits=True)
        if part in ("bytes", "raw bytes"):
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=part == "bytes")
        return pre_tokenizers.Split(Regex(part), behavior="isolated")

    return pre_tokenizers.Sequence([build(part) for part in rule.parts])


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    if len(ids) != len(vocabulary.tokens):
        twice = next(token for number, token in enumerate(vocabulary.tokens) if ids[token] != number)
        raise ValueError(f"it has the token {twice!r} twice")
    return ids


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise ValueError(f"its merge {merge!r} is none")
    return left, right
