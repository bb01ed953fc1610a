"""GGUF files as llama.cpp's converter writes them, of tiny models, and blocks of random bytes."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_families import MIXTURES
from torch import Tensor
from transformers import PreTrainedModel

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
    "up_proj": "IQ4_XS", "down_proj": "Q4_0",
}  # fmt: skip
WIDE_ENOUGH = {"hidden_size": 256, "intermediate_size": 256}
WIDE_EXPERTS = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
IN_FILES = {"llama": "llama", **MIXTURES}


def mixed_file(make_folder: Callable, file: Path, family: str = "llama") -> Path:
    """A model whose layers are in blocks of every type that is trained over, embedding and head in Q8_0; q and k of a
    Llama or Mixtral in llama.cpp's order.
    """
    sizes = WIDE_ENOUGH | (WIDE_EXPERTS if family.startswith("qwen") else {})
    _, model = make_folder(family, **sizes)
    ends = {"embed_tokens": "Q8_0", "lm_head": "Q8_0"}
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
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(VOCABULARY)
    if (experts := getattr(config, "num_local_experts", getattr(config, "num_experts", None))) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    add_tokenizer(writer, pre)
    quantized = gguf.GGMLQuantizationType[block_type]
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, tensor in tensors_of(model):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleave(tensor, heads)
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


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """By names as the converter knows them: gate and up of experts apart, the shared expert's gate a row."""
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield from ((f"{owner}.gate_proj.weight", gate), (f"{owner}.up_proj.weight", up))
        elif owner.endswith(".experts"):
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
