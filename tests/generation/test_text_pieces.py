"""Text that streams whole characters only."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nybble.generation.text_pieces import TextPieces
from nybble.quantization.synth import byte_tokenizer

TEXT = "Déjà vu: 日本語, 🙂👍🏽 and  two spaces.\nA new line\t(tab)"


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space before them, bytes for what is unknown, as Llama 2 has them."""
    words = [*"▁ :,().", "▁vu", "▁and", "▁two", "▁spaces", "▁new", "▁line", "▁A", "tab"]
    vocabulary = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", *words]
    tokenizer = Tokenizer(
        models.Unigram([(token, -float(len(vocabulary) - i)) for i, token in enumerate(vocabulary)], 256, True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, sentencepiece_tokenizer])
def test_pieces_are_the_text_and_never_half_a_character(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = TextPieces(tokenizer)
    shown = [pieces.add(token) for token in ids]
    assert "".join(shown) == tokenizer.decode(ids) and "日本語" in "".join(shown)
    assert "\ufffd" not in "".join(shown) and pieces.rest() == ""
    assert len([piece for piece in shown if piece]) > 20 and "" in shown, "as they come, but for unfinished ones"


def test_an_unfinished_character_is_shown_only_at_the_end():
    tokenizer = byte_tokenizer()
    pieces = TextPieces(tokenizer)
    ids = tokenizer.encode("ok 🙂", add_special_tokens=False)[:-1]
    assert "".join(pieces.add(token) for token in ids) == "ok "
    assert pieces.rest() == "\ufffd" and pieces.rest() == ""
