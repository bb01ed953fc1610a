"""What many tests are made of: a tiny model and examples as files, small models in four bits with adapters.

Nothing here needs pytest, since the drills run outside of it, and nothing heavy is imported before it is asked for.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
BILLION = WIDE | {"num_hidden_layers": 16, "vocab_size": 32768, "tie_word_embeddings": False}  # of a Llama
SMALL = {  # of a family that is like a Llama
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------


def byte_tokenizer(merged_to: int | None = None) -> Any:
    """A byte-level tokenizer; with merges, learnt from ROWS, up to that many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = {} if merged_to is None else {"vocab_size": merged_to}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, **size)
    text = [] if merged_to is None else [row["prompt"] + row["completion"] for row in ROWS]
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)


def make_model(folder: Path) -> None:
    """A Llama of two blocks with a byte-level tokenizer, as transformers saves it, in two shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def make_decoder(folder: Path, model_type: str, **sizes: Any) -> Path:
    """A decoder of any type in fp32 with a tokenizer of bytes, as transformers saves it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes | own)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_data(path: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_four_bit_model(folder: Path, spec: Any = None) -> None:
    """A Llama of four blocks with random weights in few bits, nf4 unless said, and a byte-level tokenizer.

    Narrow: products in bf16 take long where the CPU has none.
    """
    from unittest.mock import patch

    from nybble.formats.quant_spec import QuantSpec
    from nybble.quantization.synth import synthesize
    from nybble.sources.shapes import SHAPES

    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    with patch.dict(SHAPES, narrow=SHAPES["tiny"] | narrow):
        synthesize("narrow", spec or QuantSpec(), folder)


# ---- in memory -----------------------------------------------------------------------------------


def put_into_four_bits(model: Any, spec: Any = None, dtype: Any = None) -> None:
    """Put the linear layers of a model's blocks, and its experts, into few bits, in place: nf4, computed in fp32,
    unless said.
    """
    import torch
    from torch import nn

    from nybble.formats.quant_spec import BaseFormats, QuantSpec
    from nybble.kernels.ops.four_bit import quantize
    from nybble.layers.convert import quantizable_linears, replace_linears
    from nybble.layers.dense import weight_matrix
    from nybble.layers.quantized_experts import expert_shapes, replace_experts

    spec = spec or QuantSpec()
    stacks = {name: model.get_parameter(name) for name in expert_shapes(model)}
    replace_experts(model, stacks, BaseFormats(spec), dtype or torch.float32)
    for name, stack in stacks.items():
        for index, matrix in enumerate(stack.detach()):
            model.get_submodule(name).load_expert(index, quantize(matrix.contiguous(), spec))
    dense = {name: model.get_submodule(name) for name in quantizable_linears(model)}
    replace_linears(model, dense, BaseFormats(spec), dtype or torch.float32)
    for name, linear in dense.items():
        layer = model.get_submodule(name)
        layer.load_quantized(quantize(weight_matrix(linear), spec))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)


def tune(model: Any, targets: str = "all-linear", *, rank: int = 3, std: float = 0.2, **options: Any) -> Any:
    """The model with adapters that do something: their B is random, not zero."""
    from torch import nn

    from nybble.layers.convert import attach_adapters, resolve_targets

    options = {"alpha": 2.0 * rank, "seed": 1} | options
    for adapter in attach_adapters(model, resolve_targets(model, targets), rank=rank, **options).values():
        nn.init.normal_(adapter.lora_B, std=std)
    return model
