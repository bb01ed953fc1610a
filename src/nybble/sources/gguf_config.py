"""The config of transformers that a GGUF file's keys stand for."""

from typing import TYPE_CHECKING, Any

from nybble.errors import ModelError, foreign_errors
from nybble.formats.gguf import GgufFile
from nybble.sources.skeleton import build_skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
}
MIXTURES = {"llama": "mixtral"}  # what an architecture is where its file speaks of experts
NEEDED = {  # key of the file -> name of the config
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GIVEN = {
    "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
NORMED_ROUTING = {"qwen2moe": False, "qwen3moe": True, "olmoe": False}  # what llama.cpp takes for granted of each


def config_of(file: GgufFile) -> "PretrainedConfig":
    """The config, with what llama.cpp takes for granted of the architecture.

    Raises:
        ModelError: a key is missing, says something for each layer by itself, or is damaged.
    """
    from transformers import AutoConfig

    arch, metadata = file.architecture, file.metadata
    values: dict[str, Any] = {name: file.number(f"{arch}.{key}") for key, name in NEEDED.items()}
    there = {key: name for key, name in GIVEN.items() if f"{arch}.{key}" in metadata}
    values |= {name: file.number(f"{arch}.{key}") for key, name in there.items()}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    embedding = file.entries.get("token_embd.weight")
    values["vocab_size"] = metadata.get(f"{arch}.vocab_size") if embedding is None else embedding.shape[0]
    values |= {name: metadata[key] for key, name in TOKENS.items() if key in metadata}
    values["tie_word_embeddings"] = "output.weight" not in file.entries
    if arch in NORMED_ROUTING:
        values["norm_topk_prob"] = NORMED_ROUTING[arch]
    model_type = MIXTURES.get(arch, MODEL_TYPES[arch]) if values.get("num_experts") else MODEL_TYPES[arch]

    def refused(error: Exception) -> ModelError:
        return ModelError(
            f"No {model_type} config can be made of the keys in {file.path}: {error}", fix="Fetch the model again."
        )

    with foreign_errors(refused):
        config = AutoConfig.for_model(model_type, **values)
    config.name_or_path = str(metadata.get("general.name", ""))
    file.complete_config(config)
    with foreign_errors(refused):
        config.architectures = [type(build_skeleton(config)).__name__]
    return config
