"""GGUF files as llama.cpp's converter writes them, of tiny models, and blocks of random bytes."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_families import MIXTURES
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from nybble.formats.format import STORED_FORMATS
from nybble.formats.quant_spec import stored_spec
from nybble.formats.quantized_tensor import QuantizedTensor

VOCABULARY = 160
STEPS = {  # of their fp16 numbers, such that weights are about as large as a model's
    "q4_0": 0.01, "q8_0": 0.001, "iq4_nl": 0.001, "q4_k": 0.0003, "q5_k": 0.0002, "q6_k": 0.0001, "iq4_xs": 0.0001,
}  # fmt: skip
HALVES = {"q6_k": (208,), "q4_k": (0, 2), "q5_k": (0, 2)}  # where fp16 numbers lie in a block, of others at 0


TYPES = {  # of a model's layers, every type that is trained over; the first end of a name that fits
    "experts.gate_proj": "Q4_K", "experts.up_proj": "Q4_K", "experts.down_proj": "Q6_K",
    "attn.q_proj": "Q4_K", "attn.k_proj": "Q5_K", "attn.v_proj": "Q6_K", "attn.o_proj": "Q8_0", "gate_proj": "IQ4_NL",
    "attn.qkv_proj": "Q5_K",
    "up_proj": "IQ4_XS", "down_proj": "Q4_0",
}  # fmt: skip
WIDE_ENOUGH = {"hidden_size": 256, "intermediate_size": 256}
WIDE_EXPERTS = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
GEMMAS = {"gemma2": "gemma2", "gemma3_text": "gemma3", "gemma4_text": "gemma4"}
OTHERS = {"smollm3": "smollm3", "granite": "granite", "phi3": "phi3", "ministral3": "mistral3"}
IN_FILES = {"llama": "llama", **OTHERS, **GEMMAS, **MIXTURES}
INTERLEAVED = ("llama", "smollm3", "granite", "mistral3")  # whose q and k the converter reorders


def mixed_file(make_folder: Callable, file: Path, family: str = "llama") -> Path:
    """A model whose layers are in blocks of every type that is trained over, embedding and head in Q8_0; q and k of a
    Llama or Mixtral in llama.cpp's order.
    """
    sizes = WIDE_ENOUGH | (WIDE_EXPERTS if family.startswith("qwen") else {})
    sizes |= {"hidden_size_per_layer_input": 64} if family == "gemma4_text" else {}
    _, model = make_folder(family, **sizes)
    ends = {"embed_tokens": "Q8_0", "lm_head": "Q8_0", "embed_tokens_per_layer": "Q6_K"}
    return write_model(file, model, IN_FILES[family], own_blocks=TYPES | ends)


def random_blocks(format: str, rows: int, columns: int) -> QuantizedTensor:
    """Blocks of random bytes, whose fp16 numbers are ordinary ones of both signs."""
    spec = stored_spec(format)
    generator = np.random.default_rng(len(format) + rows)
    packed = generator.integers(0, 256, spec.packed_shape((rows, columns)), dtype=np.uint8)
    block = STORED_FORMATS[format].block
    assert block is not None
    blocks = packed.reshape(-1, block.num_bytes)
    for at in HALVES.get(format, (0,)):
        halves = generator.normal(0, STEPS[format], (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    empty = torch.empty(0, dtype=torch.uint8)
    return QuantizedTensor(torch.from_numpy(packed), empty, spec, (rows, columns), torch.float32)


def interleave(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: rotary pairs side by side (its convert_hf_to_gguf `permute`)."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_model(
    file: Path,
    model: PreTrainedModel,
    arch: str,
    block_type: str = "F32",
    pre: str | None = "smollm",
    own_blocks: Mapping[str, str] | None = None,
) -> Path:
    """The model as llama.cpp's converter writes it; `own_blocks`: end of a layer's name -> type of random blocks."""
    config = model.config
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    (add_gemma4 if arch == "gemma4" else add_layers)(writer, config)
    if arch in ("gemma2", "gemma3"):
        add_gemma(writer, config)
    if (experts := getattr(config, "num_local_experts", getattr(config, "num_experts", None))) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    add_tokenizer(writer, pre)
    quantized = gguf.GGMLQuantizationType[block_type]
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, tensor in tensors_of(model):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch in INTERLEAVED and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleave(tensor, heads)
        if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor.float() + 1.0
        module, _, leaf = name.rpartition(".")
        stored = f"{names.get_name(module)}.{leaf}"
        if tensor.ndim > 1 and (
            own := next((own for end, own in (own_blocks or {}).items() if module.endswith(end)), None)
        ):
            rows, columns = tensor.shape[:-1].numel(), tensor.shape[-1]
            packed, kind = random_blocks(own.lower(), rows, columns).packed.numpy(), gguf.GGMLQuantizationType[own]
            writer.add_tensor(stored, packed.reshape(*tensor.shape[:-1], -1), raw_dtype=kind)
            continue
        kind = quantized if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_layers(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        for which in ("short", "long"):
            writer.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], dtype=np.float32))


def add_gemma(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """What is Gemma 2's or 3's own; which layers have windows is said where it does not go without saying."""
    writer.add_sliding_window(config.sliding_window)
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    every = {"gemma2": 2, "gemma3_text": 6}[config.model_type]
    if windows != [bool((layer + 1) % every) for layer in range(len(windows))]:
        writer.add_sliding_window_pattern(windows)
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_gemma4(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Keys of kinds of layers; keys and values, which nothing reads, of layers that read others', as in checkpoints."""
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    first = config.num_hidden_layers - config.num_kv_shared_layers
    wide, narrow = (config.per_layer_config[kind] for kind in ("full_attention", "sliding_attention"))
    ropes = config.rope_parameters
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(windows)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    twice = 2 if config.use_double_wide_mlp else 1
    widths = [config.intermediate_size * (twice if layer >= first else 1) for layer in range(len(windows))]
    writer.add_feed_forward_length(widths)
    heads = [(narrow if window else wide).num_key_value_heads for window in windows]
    writer.add_head_count_kv(heads)
    writer.add_key_length(wide.head_dim)
    writer.add_value_length(wide.head_dim)
    writer.add_key_length_swa(narrow.head_dim)
    writer.add_value_length_swa(narrow.head_dim)
    writer.add_rope_dimension_count(wide.head_dim)
    writer.add_rope_dimension_count_swa(narrow.head_dim)
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    turned = int(wide.head_dim * ropes["full_attention"]["partial_rotary_factor"] / 2)
    divisors = [1.0] * turned + [1e30] * (wide.head_dim // 2 - turned)
    writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    for layer in range(first, len(windows)):
        rows = heads[layer] * (narrow if windows[layer] else wide).head_dim
        writer.add_tensor(f"blk.{layer}.attn_k.weight", np.ones((rows, config.hidden_size), dtype=np.float32))


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """By names as the converter knows them: gate and up of experts apart, the shared expert's gate a row."""
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield from ((f"{owner}.gate_proj.weight", gate), (f"{owner}.up_proj.weight", up))
        elif owner.endswith(".experts") or leaf == "layer_scalar":
            yield f"{name}.weight", tensor
        else:
            yield name, tensor[0] if owner.endswith("shared_expert_gate") else tensor


def add_tokenizer(writer: gguf.GGUFWriter, pre: str | None) -> None:
    printable = [chr(code) for code in range(33, 127)]
    special = ["<s>", "</s>"]
    tokens = [*special, *printable, "Ġ", "Ċ", "ĠĠ", "ab", "Ġa"]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["Ġ Ġ", "a b", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
