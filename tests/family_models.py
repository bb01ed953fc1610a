"""Small models of each family in four bits, a packed batch, and their losses and gradients by decoder blocks and by
transformers' own layers.

A new family is one line of `CONFIGS`, or one for each kind of its configs, named by its model type and that kind. What
goes by little of a family's own is run with all of them in the slow tests, with a few always (`SAMPLED`).
"""

import copy
import functools
import itertools
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import put_into_four_bits, tune
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from nybble.data.packing import IGNORE, Batch, pack_tokens
from nybble.families import FAMILIES
from nybble.layers.backbone import FusedForward
from nybble.layers.convert import adapters_of
from nybble.layers.lora_experts import LoraExperts
from nybble.layers.norms import Norm
from nybble.layers.own_head import loss_head

VOCABULARY, WINDOW = 101, 5
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
GEMMA = {**KINDS, "head_dim": 18, "query_pre_attn_scalar": 11, "attn_implementation": "eager"}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
GROWING = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
}  # fmt: skip
GEMMA4 = {**SHAPE, "head_dim": 18, "global_head_dim": 34, "sliding_window": WINDOW}
BESIDE = {
    "use_double_wide_mlp": True, "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": VOCABULARY,
    "final_logit_softcapping": 4.0,
}  # fmt: skip
OF_TWO = {  # layers, the second of which reads the keys of the first
    "gemma4_text": Gemma4TextConfig(
        **GEMMA4 | BESIDE | {"num_hidden_layers": 2}, layer_types=["full_attention"] * 2, num_kv_shared_layers=1
    )
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SHAPE, **KINDS, use_sliding_window=True),
    "qwen3": Qwen3Config(**SHAPE, **KINDS, use_sliding_window=True, head_dim=16),
    "gemma2": Gemma2Config(**SHAPE, **GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
    "gemma3_text": Gemma3TextConfig(**SHAPE, **GEMMA),
    "gemma4_text": Gemma4TextConfig(
        **GEMMA4 | BESIDE | {"num_hidden_layers": 4}, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
    ),
    "gemma4_text, values that are keys": Gemma4TextConfig(
        **GEMMA4, layer_types=["sliding_attention", "full_attention", "full_attention"], attention_k_eq_v=True,
        num_global_key_value_heads=1, hidden_size_per_layer_input=0, use_bidirectional_attention="vision",
    ),
    "ministral": MinistralConfig(**SHAPE, **KINDS, head_dim=16),
    "ministral3": Ministral3Config(**SHAPE, head_dim=16, sliding_window=WINDOW, rope_parameters=GROWING),
    "smollm3": SmolLM3Config(**SHAPE, **KINDS, use_sliding_window=True, no_rope_layers=[1, 0, 1]),
    "granite": GraniteConfig(
        **SHAPE, embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.2, logits_scaling=1.5
    ),
    "olmo2": Olmo2Config(**SHAPE),
    "olmo3": Olmo3Config(**SHAPE, **KINDS),
    "phi3": Phi3Config(**SHAPE, sliding_window=WINDOW, rope_parameters=PARTIAL),
    "glm": GlmConfig(**SHAPE, head_dim=16, attention_bias=True, rope_parameters=PARTIAL),
    "glm4": Glm4Config(**SHAPE, head_dim=16, rope_parameters=PARTIAL),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.3),
    "cohere, normed heads": CohereConfig(**SHAPE, logit_scale=0.3, use_qk_norm=True),
    "cohere2": Cohere2Config(**SHAPE, **KINDS, logit_scale=0.3),
    "stablelm": StableLmConfig(**SHAPE, use_qkv_bias=True, rope_parameters=PARTIAL),
    "stablelm, parallel": StableLmConfig(
        **SHAPE, use_parallel_residual=True, qk_layernorm=True, rope_parameters=PARTIAL
    ),
    "phi": PhiConfig(**SHAPE, rope_parameters=PARTIAL),
    "phi, normed heads": PhiConfig(**SHAPE, rope_parameters=PARTIAL, qk_layernorm=True),
    "starcoder2": Starcoder2Config(**SHAPE, sliding_window=WINDOW),
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=WINDOW),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE, **KINDS, **EXPERTS, use_sliding_window=True, shared_expert_intermediate_size=56, mlp_only_layers=[1]
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, **EXPERTS, head_dim=16, sliding_window=WINDOW, use_sliding_window=True, norm_topk_prob=True
    ),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=6, num_experts_per_tok=3),
}  # each expert has a few rows, or none
DOCUMENTS = (7, 1, 20, 13)
# All stages and linears of other families are one of theirs.
ALWAYS = ("llama", "gemma2", "gemma4_text", "olmo3", "cohere2", "phi")
SAMPLED = [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in CONFIGS]
SAMPLED_MIXTURES = ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)]


def dense_model(name: str, seed: int = 0, layers: int | None = None, all_experts: bool = False) -> PreTrainedModel:
    """With norms around one, biases, and weights large enough for answers to depend on all of the prompt."""
    torch.manual_seed(seed)
    config = copy.deepcopy((CONFIGS | MIXTURES)[name])
    if all_experts and name in MIXTURES:
        config.num_experts_per_tok = getattr(config, "num_local_experts", None) or config.num_experts
    if FAMILIES[config.model_type].beside:  # whose layers go together
        config = copy.deepcopy(OF_TWO[name]) if layers == 2 and name in OF_TWO else config
    else:
        config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name and parameter_name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0 - FAMILIES[config.model_type].norm_offset, std=0.3)
        else:
            nn.init.normal_(parameter, std=0.2)
        if config.model_type == "gemma4_text" and parameter_name.endswith("q_norm.weight"):
            parameter.data.mul_(0.3)  # its scores have no factor of their own
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("layer_scalar"):
            buffer.uniform_(0.6, 1.4)
    return model.eval()


def tuned_model(name: str, seed: int = 0, layers: int | None = None, all_experts: bool = False) -> PreTrainedModel:
    """In four bits, with adapters that do something, on experts too."""
    model = dense_model(name, seed, layers, all_experts)
    put_into_four_bits(model)
    return tune(model, adapted_in(name))


def adapted_in(name: str) -> str:
    """What has adapters."""
    return "all-linear,experts" if name in MIXTURES else "all-linear"


@functools.cache
def transformers_own(name: str) -> tuple[PreTrainedModel, tuple[Tensor, float, Tensor]]:
    """A model, and its states, loss and gradients by transformers' own layers."""
    model = tuned_model(name)
    return model, by_transformers(model, packed_batch())


def written_out(model: PreTrainedModel) -> PreTrainedModel:
    """The model with dense weights, its adapters added to them."""
    twin = copy.deepcopy(model)
    for name, adapter in adapters_of(twin).items():
        if isinstance(adapter, LoraExperts):
            matrices = [adapter.base.widened(index, torch.float32) for index in range(adapter.num_experts)]
            dense = torch.stack(matrices) + adapter.scaling * (adapter.lora_B @ adapter.lora_A).detach()
            owner, _, leaf = name.rpartition(".")
            delattr(twin.get_submodule(owner), leaf)
            twin.get_submodule(owner).register_parameter(leaf, nn.Parameter(dense, requires_grad=False))
            twin.set_experts_implementation("eager")
            continue
        linear = nn.Linear(adapter.in_features, adapter.out_features, adapter.base.bias is not None)
        weight = adapter.base.dequantize() + adapter.scaling * (adapter.lora_B @ adapter.lora_A).detach()
        linear.weight, linear.bias = nn.Parameter(weight), adapter.base.bias
        twin.set_submodule(name, linear)
    return twin


def in_bf16(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model with its frozen parameters in bf16, and the same numbers in fp32."""
    narrow = copy.deepcopy(model)
    for parameter in narrow.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    wide = copy.deepcopy(narrow)
    for parameter in wide.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return narrow, wide


def packed_batch(lengths: tuple[int, ...] = DOCUMENTS) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens = sum(lengths)
    ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
    targets = torch.where(torch.rand(1, tokens, generator=generator) < 0.7, ids.roll(1), IGNORE)
    return replace(pack_tokens(ids.split(lengths)), targets=targets)


def gradients_of(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


def by_transformers(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, float, Tensor]:
    """States and loss at the supervised positions, and the adapters' gradients: each document alone, by the model's own
    forward and autograd.
    """
    model.zero_grad()
    states, logits = [], []
    for ids in batch.input_ids[0].split(batch.document_lengths):
        output = model(input_ids=ids[None], output_hidden_states=True)
        states.append(output.hidden_states[-1][0])
        logits.append(output.logits[0])
    places = batch.supervised_positions
    loss = F.cross_entropy(torch.cat(logits)[places].float(), batch.supervised_targets)
    loss.backward()
    return torch.cat(states)[places].detach(), loss.item(), gradients_of(model)


def by_blocks(model: PreTrainedModel, batch: Batch, keep: str) -> tuple[Tensor, float, Tensor]:
    model.zero_grad()
    states = FusedForward(model, keep).hidden(batch, batch.supervised_positions)
    loss = loss_head(model).loss(states, batch.supervised_targets, len(states))
    loss.backward()
    return states.detach(), loss.item(), gradients_of(model)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Of the tensors in it, but not of the model's own."""
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(storages, value))
    elif is_dataclass(value) and not isinstance(value, Norm):
        yield from storages([getattr(value, field.name) for field in fields(value)])
