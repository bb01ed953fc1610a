"""GGUF files as sources: tiny models written as llama.cpp writes them, against transformers' own numbers."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from tiny_families import MIXTURES
from tiny_gguf import IN_FILES, OTHERS, add_tokenizer, write_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from nybble.errors import ModelError
from nybble.formats.gguf import GgufFile
from nybble.formats.quant_spec import BaseFormats
from nybble.sources.gguf import _tokenizer_of
from nybble.sources.load import load_model
from nybble.sources.open import open_model


def write_tokenizer(file: Path, add: Callable[[gguf.GGUFWriter], None]) -> Path:
    """A file with a tokenizer and no tensors."""
    writer = gguf.GGUFWriter(file, "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("family", "arch"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_model_equals_the_one_it_was_made_of(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, family: str, arch: str, tied: bool
) -> None:
    overrides = {"sliding_window": None} if family == "mistral" else {}
    _, model = make_folder(family, torch.bfloat16, tie_word_embeddings=tied, **overrides)
    file = write_model(tmp_path / "m.gguf", model, arch)
    source = open_model(str(file))
    assert source.notes == ()
    ours = load_model(source, None, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model.float()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_blocks_are_widened_as_transformers_widens_them(make_folder: Callable, tmp_path: Path, tokens: Tensor) -> None:
    _, model = make_folder("llama")
    file = write_model(tmp_path / "m.gguf", model, "llama", "Q4_1")
    source = open_model(str(file))
    assert source.notes == (f"{file} was itself published in 4 bits (Q4_1), not in 16.",)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected = theirs.state_dict()
    for name in source.tensor_names():
        tensor = source.read(name)
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert load_model(source, BaseFormats(), torch.float32)(tokens).logits.isfinite().all()


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_equals_the_one_it_was_made_of(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, family: str
) -> None:
    _, model = make_folder(family, torch.bfloat16)
    source = open_model(str(write_model(tmp_path / "m.gguf", model, MIXTURES[family])))
    assert source.config.model_type == family and len(source.experts) == 2 * 2
    ours = load_model(source, None, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model.float()(tokens).logits, rtol=1e-5, atol=1e-5)
    name = next(iter(source.experts))
    assert torch.equal(source.read(name)[2], source.read_expert(name, 2))
    assert load_model(source, BaseFormats(), torch.float32)(tokens).logits.isfinite().all()


def differing(ours: PretrainedConfig, theirs: PretrainedConfig) -> set[str]:
    """Options in which they differ, by more than rounding to fp32."""
    found = ours.to_dict()
    wanted = {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in theirs.to_dict().items()
    }
    return {key for key, value in wanted.items() if found.get(key) != value}


LONG = {
    "original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.25 * i for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)], "original_max_position_embeddings": 32,
    },
}  # fmt: skip
SAID = {  # windows, where llama.cpp takes others for granted
    "num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {}) for family in (*OTHERS, "gemma2", "gemma3_text")),
        ("granite", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("phi3", LONG),
        ("gemma2", SAID),
        ("gemma3_text", SAID),
    ],
)
def test_a_model_of_another_family_equals_the_one_it_was_made_of(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, family: str, overrides: dict[str, object]
) -> None:
    _, model = make_folder(family, torch.bfloat16, **overrides)
    source = open_model(str(write_model(tmp_path / "m.gguf", model, IN_FILES[family])))
    assert differing(source.config, model.config) <= {"_name_or_path", "dtype"}
    loaded, model = load_model(source, None, torch.float32), model.float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
        longer = torch.cat([tokens, tokens, tokens, tokens], dim=1)  # than the length that LongRoPE was made from
        torch.testing.assert_close(loaded(longer).logits, model(longer).logits, rtol=1e-5, atol=1e-5)


KEYS_AS_VALUES = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_hidden_layers": 3,
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
    "num_global_key_value_heads": 1, "tie_word_embeddings": False, "final_logit_softcapping": None,
    "use_double_wide_mlp": False,
}  # fmt: skip


@pytest.mark.parametrize("overrides", [{}, {"use_double_wide_mlp": False}, KEYS_AS_VALUES], ids=len)
def test_a_gemma_4_equals_the_one_it_was_made_of(
    make_folder: Callable, tmp_path: Path, tokens: Tensor, overrides: dict[str, object]
) -> None:
    _, model = make_folder("gemma4_text", torch.bfloat16, **overrides)
    source = open_model(str(write_model(tmp_path / "m.gguf", model, "gemma4")))
    unsaid = {"vocab_size_per_layer_input"} if overrides is KEYS_AS_VALUES else set()
    assert differing(source.config, model.config) <= {"_name_or_path", "dtype"} | unsaid
    loaded = load_model(source, None, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model.float()(tokens).logits, rtol=1e-5, atol=1e-5)
    assert load_model(source, BaseFormats(), torch.float32)(tokens).logits.isfinite().all()


def with_numbers(file: Path, key: str, change: Callable[[list], list]) -> Path:
    """The file with other numbers, of the same count and type, in an array of its header."""
    old = GgufFile(file).array(key)
    kind = "<%d?" if isinstance(old[0], bool) else "<%di"
    before, after = (struct.pack(kind % len(numbers), *numbers) for numbers in (old, change(old)))
    data = file.read_bytes()
    start = data.index(key.encode())
    file.write_bytes(data[:start] + data[start:].replace(before, after, 1))
    return file


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("feed_forward_length", lambda widths: [*widths[:-1], widths[-1] // 2]),
        ("feed_forward_length", lambda widths: [widths[0], widths[0] * 2, *widths[2:]]),
        ("attention.head_count_kv", lambda heads: [1, *heads[1:]]),
        ("attention.sliding_window_pattern", lambda windows: [*windows[:-1], True]),
    ],
)
def test_layers_that_differ_otherwise_than_gemma_4_s_are_refused(
    make_folder: Callable, tmp_path: Path, key: str, change: Callable[[list], list]
) -> None:
    _, model = make_folder("gemma4_text")
    file = write_model(tmp_path / "m.gguf", model, "gemma4")
    with pytest.raises(ModelError, match=r"differ otherwise than Gemma 4's(.|\n)*twice the width"):
        open_model(str(with_numbers(file, f"gemma4.{key}", change)))


def test_rotary_divisors_that_are_not_gemma_4_s_are_refused(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder("gemma4_text")
    file = write_model(tmp_path / "m.gguf", model, "gemma4")
    still, other = (struct.pack("<2f", *pair) for pair in ((1e30, 1e30), (1e30, 2.0)))
    assert still in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(still, other, 1))
    with pytest.raises(ModelError, match=r"'none' and a table \(rope_freqs.weight\) that is not Gemma 4's"):
        open_model(str(file))


def test_experts_that_are_there_by_half_are_named(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder("qwen3_moe", num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "qwen3moe")
    file.write_bytes(file.read_bytes().replace(b"blk.0.ffn_up_exps", b"blk.0.ffn_up_shexp"[:17]))
    with pytest.raises(ModelError, match="no place for"):
        open_model(str(file)).tensor_names()


def test_the_config_says_what_llama_cpp_takes_for_granted(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder("qwen3", num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "qwen3")
    source = open_model(str(file))
    config = source.config
    assert not hasattr(config, "quantization_config")
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.head_dim == 16 and config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]
    config.save_pretrained(tmp_path / "saved")
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    differing = {key for key, value in theirs.to_dict().items() if config.to_dict().get(key) != value}
    left_out = {"architectures", "head_dim"}  # by transformers
    assert differing <= left_out | {"_model_name_or_path", "_name_or_path", "dtype"}, differing
    assert source.load_tokenizer().apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    _, mixture = make_folder("qwen3_moe", num_hidden_layers=1)
    assert open_model(str(write_model(tmp_path / "x.gguf", mixture, "qwen3moe"))).config.norm_topk_prob


def test_a_size_that_is_missing_or_that_layers_have_each_is_named(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder(num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "llama")
    file.write_bytes(file.read_bytes().replace(b"llama.embedding_length", b"llama.embedding_lengt_"))
    with pytest.raises(ModelError, match=r"no number under llama\.embedding_length"):
        open_model(str(file))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rope.dimension_count", struct.pack("<I", 8), r"turns 8 of 16 elements of a head"),
        ("attention.key_length", struct.pack("<I", 2**32 - 1), r"turns 16 of 4294967295 elements of a head"),
        ("attention.layer_norm_rms_epsilon", struct.pack("<f", math.nan), r"no number under"),
        ("attention.layer_norm_rms_epsilon", struct.pack("<f", math.inf), r"no number under"),
    ],
)
def test_numbers_that_no_model_has_are_refused(
    make_folder: Callable, tmp_path: Path, key: str, value: bytes, said: str
) -> None:
    """Before memory is taken for them, and not left out where llama.cpp would go by them."""
    _, model = make_folder(num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "llama")
    data = file.read_bytes()
    place = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4  # behind the type
    file.write_bytes(data[:place] + value + data[place + 4 :])
    with pytest.raises(ModelError, match=said):
        open_model(str(file))


def test_experts_of_which_nothing_says_how_many_are_asked_are_refused(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder("qwen2_moe", num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "qwen2moe")
    file.write_bytes(file.read_bytes().replace(b"qwen2moe.expert_used_count", b"qwen2moe.expert_used_c_unt"))
    with pytest.raises(ModelError, match=r"no number under qwen2moe\.expert_used_count"):
        open_model(str(file))


def test_words_without_merges_are_not_left_in_letters(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder(num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "llama")
    file.write_bytes(file.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez"))
    with pytest.raises(ModelError, match="no merges"):
        open_model(str(file)).load_tokenizer()


def test_digits_are_split_as_smollm_was_trained(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder(num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "llama")
    (tmp_path / "tokenizer.json").write_text("not this one")  # what lies beside the file is not taken
    ours = open_model(str(file)).load_tokenizer()
    assert ours.tokenize("ab  12 a") == ["ab", "ĠĠ", "1", "2", "Ġa"]
    (tmp_path / "tokenizer.json").unlink()
    plain = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert plain.tokenize("ab  12 a") == ["ab", "Ġ", "Ġ", "1", "2", "Ġa"]  # the reason for setting it


TEXTS = ["ab  12 a", " ab", "ab\n\n\tab", "<s>ab</s> a 123 4567", "don't AB'S", "naïve 東京"]


@pytest.mark.parametrize(
    ("pre", "pattern"),
    [
        (
            "llama-bpe",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+",
        ),
        ("qwen2", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"),
    ],
)
def test_words_are_split_by_the_rule_that_the_file_names(tmp_path: Path, pre: str, pattern: str) -> None:
    """Against transformers' own reader, which knows these two. (It ends the pattern with three kinds of spaces.)"""
    file = write_tokenizer(tmp_path / "m.gguf", lambda writer: add_tokenizer(writer, pre))
    ours = _tokenizer_of(GgufFile(file))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids, text
    state = json.loads(ours.backend_tokenizer.to_str())
    assert state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"].startswith(pattern.removesuffix(r"|\s+"))
    assert bool(state["model"]["ignore_merges"]) == (pre == "llama-bpe")  # as llama.cpp does


@pytest.mark.parametrize("pre", ["cats", "default", None])
def test_an_unknown_splitting_rule_is_refused_by_name(make_folder: Callable, tmp_path: Path, pre: str | None) -> None:
    folder, model = make_folder(num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "llama", pre=pre)
    with pytest.raises(ModelError, match=rf"{pre or 'does not name'}(.|\n)*gpt-2, smollm(.|\n)*--tokenizer"):
        open_model(str(file)).load_tokenizer()
    assert open_model(str(file), str(folder)).load_tokenizer().eos_token == "w1"  # the way out


def test_a_file_without_a_tokenizer_or_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "none.gguf", lambda writer: None)
    with pytest.raises(ModelError, match=r"is missing(.|\n)*--tokenizer"):
        _tokenizer_of(GgufFile(file))
    file = write_tokenizer(tmp_path / "t5.gguf", lambda writer: writer.add_tokenizer_model("t5"))
    with pytest.raises(ModelError, match=r"of the kind 't5'"):
        _tokenizer_of(GgufFile(file))


def add_sentencepiece(writer: gguf.GGUFWriter, **keys: bool) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "▁▁"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-9.0, -9.0, -9.0, -3.0, -1.0, -2.0, -4.0])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 7])
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)


@pytest.mark.parametrize(
    ("text", "with_prefix", "without"),
    [  # by hand, from llama.cpp's rules
        ("ab", ["▁ab"], ["ab"]),
        (" ab", ["▁", "▁ab"], ["▁ab"]),  # the prefix comes on top of a space that is there
        ("ab</s>ab", ["▁ab", "</s>", "▁ab"], ["ab", "</s>", "ab"]),  # and after special tokens
        ("a\n", ["▁a", "<0x0A>"], ["a", "<0x0A>"]),
        ("aé", ["▁a", "<0xC3>", "<0xA9>"], ["a", "<0xC3>", "<0xA9>"]),
    ],
)
def test_sentencepiece_is_read_as_llama_cpp_reads_it(
    tmp_path: Path, text: str, with_prefix: list[str], without: list[str]
) -> None:
    default = _tokenizer_of(GgufFile(write_tokenizer(tmp_path / "a.gguf", add_sentencepiece)))
    bare = write_tokenizer(
        tmp_path / "b.gguf", lambda w: add_sentencepiece(w, add_space_prefix=False, add_bos_token=False)
    )
    assert default.tokenize(text) == with_prefix
    assert default(text).input_ids[0] == 1 and default.bos_token == "<s>"  # llama.cpp's, where the file does not say
    assert _tokenizer_of(GgufFile(bare)).tokenize(text) == without
    assert _tokenizer_of(GgufFile(bare))(text).input_ids[0] != 1
    assert default.decode(default(text, add_special_tokens=False).input_ids) == text.replace("</s>", "</s> ")


def test_the_fingerprint_covers_header_and_weights(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder(num_hidden_layers=1)
    file = write_model(tmp_path / "m.gguf", model, "llama")
    first = open_model(str(file)).fingerprint()
    assert open_model(str(file)).fingerprint() == first
    with torch.no_grad():
        model.model.norm.weight[-1] += 1
    assert open_model(str(write_model(file, model, "llama"))).fingerprint() != first


def test_a_tensor_without_a_place_is_named(make_folder: Callable, tmp_path: Path) -> None:
    _, model = make_folder("llama", attention_bias=True, num_hidden_layers=1)
    source = open_model(str(write_model(tmp_path / "m.gguf", model, "llama")))
    with pytest.raises(ModelError, match=r"no place for: blk\.0\.attn_q\.bias"):
        source.tensor_names()


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"hello")
    with pytest.raises(ModelError, match="does not start with GGUF"):
        open_model(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="not a complete GGUF file"):
        open_model(str(tmp_path / "m.gguf"))
