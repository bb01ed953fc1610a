"""The config of transformers that a GGUF file's keys stand for."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nybble.errors import ModelError, foreign_errors
from nybble.families.family import FULL, SLIDING
from nybble.formats.gguf import FACTORS, LARGEST, NORMED_ROUTING, WINDOWLESS, GgufFile
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
    "smollm3": "smollm3",
    "granite": "granite",
    "phi3": "phi3",
    "mistral3": "ministral3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
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
OF_LAYERS = {"gemma4": ("feed_forward_length", "attention.head_count_kv")}  # of GIVEN, in what layers differ


def config_of(file: GgufFile) -> "PretrainedConfig":
    """The config, with what llama.cpp takes for granted of the architecture.

    Raises:
        ModelError: a key is missing, says for each layer by itself what must be one number, or is damaged.
    """
    from transformers import AutoConfig

    arch, metadata = file.architecture, file.metadata
    values: dict[str, Any] = {name: file.number(f"{arch}.{key}") for key, name in NEEDED.items()}
    given = {key: name for key, name in GIVEN.items() if key not in OF_LAYERS.get(arch, ())}
    there = {key: name for key, name in given.items() if f"{arch}.{key}" in metadata}
    values |= {name: file.number(f"{arch}.{key}") for key, name in there.items()}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if values.get("num_experts"):
        values["num_experts_per_tok"] = file.number(f"{arch}.expert_used_count")  # else transformers' own
    embedding = file.entries.get("token_embd.weight")
    values["vocab_size"] = metadata.get(f"{arch}.vocab_size") if embedding is None else embedding.shape[0]
    values |= {name: metadata[key] for key, name in TOKENS.items() if key in metadata}
    values.setdefault("pad_token_id", None)  # the config's own is another vocabulary's
    values["tie_word_embeddings"] = "output.weight" not in file.entries
    if arch in NORMED_ROUTING:
        values["norm_topk_prob"] = NORMED_ROUTING[arch]
    if arch in OWN:
        values |= OWN[arch](file, values)
    if of_its_own := "rope_parameters" in values:
        values.pop("rope_theta", None)  # which is among them
    model_type = MIXTURES.get(arch, MODEL_TYPES[arch]) if values.get("num_experts") else MODEL_TYPES[arch]

    def refused(error: Exception) -> ModelError:
        return ModelError(
            f"No {model_type} config can be made of the keys in {file.path}: {error}", fix="Fetch the model again."
        )

    with foreign_errors(refused):
        config = AutoConfig.for_model(model_type, **values)
    config.name_or_path = str(metadata.get("general.name", ""))
    if not of_its_own:
        file.complete_config(config)
    with foreign_errors(refused):
        config.architectures = [type(build_skeleton(config)).__name__]
    return config


def _granite(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """The factors of a Granite file.

    Raises:
        ModelError: one is missing, or its queries and keys are not turned.
    """
    if file.metadata.get("granite.rope.scaling.finetuned", True) is not True:
        raise ModelError(f"{file.path} has a Granite without rotary angles.", fix="Use the model's safetensors folder.")
    return {
        "attention_multiplier": file.number("granite.attention.scale"),
        "embedding_multiplier": file.number("granite.embedding_scale", 1.0),
        "residual_multiplier": file.number("granite.residual_scale", 1.0),
        "logits_scaling": file.number("granite.logit_scale"),
    }


def _phi3(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary angles of a Phi-3 file: of a part of each head, or with two tables of factors."""
    width = values["hidden_size"] // max(1, values["num_attention_heads"])
    angles: dict[str, Any] = {"rope_theta": file.number("phi3.rope.freq_base", 10000.0)}
    angles["partial_rotary_factor"] = file.number("phi3.rope.dimension_count", width) / max(1, width)
    if not all(name in file.entries for name in FACTORS):
        return {"rope_parameters": angles | file.linear_rope()}
    short, long = (file.read(name).tolist() for name in FACTORS)
    angles |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    if (factor := file.number("phi3.rope.scaling.attn_factor", 0.0)) != 0.0:
        angles["attention_factor"] = factor
    original = file.number("phi3.rope.scaling.original_context_length", values["max_position_embeddings"])
    return {"rope_parameters": angles, "original_max_position_embeddings": int(original)}


def _mistral3(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary angles of a Ministral 3 file, YaRN's as a rule, and how queries grow."""
    scaling = "mistral3.rope.scaling."
    angles: dict[str, Any] = {"rope_theta": file.number("mistral3.rope.freq_base", 10000.0)}
    if file.metadata.get(f"{scaling}type") != "yarn":
        angles |= file.linear_rope("none, linear and yarn")
    else:
        angles |= {"rope_type": "yarn", "factor": file.number(f"{scaling}factor", 1.0)}
        angles["beta_fast"] = file.number(f"{scaling}yarn_beta_fast", 32.0)
        angles["beta_slow"] = file.number(f"{scaling}yarn_beta_slow", 1.0)
        if (over_all := file.number(f"{scaling}yarn_log_multiplier", 0.0)) != 0.0:
            angles |= {"mscale": 1.0, "mscale_all_dim": over_all}
    if (beta := file.number("mistral3.attention.temperature_scale", 0.0)) != 0.0:
        angles["llama_4_scaling_beta"] = beta
    length = file.number(f"{scaling}original_context_length", values["max_position_embeddings"])
    angles["original_max_position_embeddings"] = int(length)
    return {"head_dim": int(file.number("mistral3.attention.key_length")), "rope_parameters": angles}


def _gemma(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of Gemma 2 or 3 says, or llama.cpp takes for granted of it, of windows, angles, scores and soft caps.

    Args:
        values: of NEEDED.
    """
    arch, layers = file.architecture, values["num_hidden_layers"]
    gemma2 = arch == "gemma2"
    key = f"{arch}.attention.sliding_window_pattern"
    if file.array(key):
        windows = file.numbers(key, layers)
    else:
        every = int(file.number(key, WINDOWLESS[arch]))
        windows = [every == 0 or (layer + 1) % every for layer in range(layers)]
    window = int(file.number(f"{arch}.attention.sliding_window", 4096 if gemma2 else 0))
    width = int(file.number(f"{arch}.attention.key_length"))
    of_largest = values["hidden_size"] // max(1, values["num_attention_heads"])
    full = {"rope_theta": file.number(f"{arch}.rope.freq_base", 10000.0)} | file.linear_rope()
    narrow = {"rope_type": "default", "rope_theta": file.number(f"{arch}.rope.freq_base_swa", 10000.0)}
    return {
        "head_dim": width,
        "layer_types": [SLIDING if window and each else FULL for each in windows],
        "sliding_window": window or values["max_position_embeddings"],
        "query_pre_attn_scalar": of_largest if layers == LARGEST[arch] else width,
        "rope_parameters": full if gemma2 else {FULL: full, SLIDING: narrow},
        "attn_logit_softcapping": file.number(f"{arch}.attn_logit_softcapping", 50.0) if gemma2 else None,
        "final_logit_softcapping": file.number(f"{arch}.final_logit_softcapping", 30.0 if gemma2 else 0.0) or None,
    }


def _gemma4(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a Gemma 4 file says of single layers, and of each kind of layers.

    Args:
        values: of NEEDED, and the tokens of the vocabulary.

    Raises:
        ModelError: a key is missing, or layers differ as no Gemma 4's do.
    """
    attention, layers, entries = "gemma4.attention.", values["num_hidden_layers"], file.entries
    kinds = [SLIDING if window else FULL for window in file.numbers(f"{attention}sliding_window_pattern", layers)]
    heads = file.numbers(f"{attention}head_count_kv", layers)
    heads_of = dict(zip(kinds, heads, strict=True))
    shared = int(file.number(f"{attention}shared_kv_layers", 0))
    widths, own = file.numbers("gemma4.feed_forward_length", layers), layers - shared
    doubled = widths[-1] != widths[0]
    expected = [widths[0] * (2 if doubled and layer >= own else 1) for layer in range(layers)]
    if kinds[-1] != FULL or not 0 < own <= layers or widths != expected or heads != [heads_of[kind] for kind in kinds]:
        raise ModelError(
            f"{file.path} has layers that differ otherwise than Gemma 4's do.",
            "Known: heads alike in all layers of a kind, an MLP of twice the width in those that read keys of others, "
            "no window in the last.",
            "Use the model's safetensors folder.",
        )
    width, narrow_heads = int(file.number(f"{attention}key_length")), heads_of.get(SLIDING, heads[0])
    more = {} if heads_of[FULL] == narrow_heads else {"num_key_value_heads": heads_of[FULL]}
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    table = entries.get("per_layer_token_embd.weight")
    angles = {"rope_theta": file.number("gemma4.rope.freq_base", 10000.0)} | file.proportional_rope(width)
    narrow = {"rope_type": "default", "rope_theta": file.number("gemma4.rope.freq_base_swa", 10000.0)}
    return {
        "layer_types": kinds,
        "sliding_window": int(file.number(f"{attention}sliding_window")),
        "head_dim": int(file.number(f"{attention}key_length_swa")),
        "num_key_value_heads": narrow_heads,
        "per_layer_config": {layer: {"head_dim": width} | more for layer in full},
        "attention_k_eq_v": any(f"blk.{layer}.attn_v.weight" not in entries for layer in full if layer < own),
        "num_kv_shared_layers": shared,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": doubled,
        "hidden_size_per_layer_input": int(file.number("gemma4.embedding_length_per_layer_input", 0)),
        "vocab_size_per_layer_input": values["vocab_size"] if table is None else table.shape[0],
        "final_logit_softcapping": file.number("gemma4.final_logit_softcapping", 0.0) or None,
        "rope_parameters": {FULL: angles, SLIDING: narrow},
    }


OWN: Mapping[str, Callable[[GgufFile, Mapping[str, Any]], dict[str, Any]]] = {
    "granite": _granite,
    "phi3": _phi3,
    "mistral3": _mistral3,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma4": _gemma4,
}  # architectures of which a file says more
