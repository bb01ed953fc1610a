"""`nybble synth`: a 4-bit folder of a published shape with random weights, to rehearse memory and time with.

Linears are drawn from N(0, 0.02²), those that write to the residual stream from N(0, 0.02² / 2L) (GPT-2's
initialisation), so that activations stay in range however deep the model. One tensor exists at a time. The tokenizer
is byte-level with ChatML's markers: 259 tokens, which any of the vocabularies holds.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nybble.events import Listener, silent, tracked
from nybble.files.disk import disk_errors
from nybble.formats.bnb import quantization_config
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.quantized_stack import QuantizedStack, stored_tensors
from nybble.formats.safetensors import SafetensorsWriter, staged_folder
from nybble.kernels.ops.four_bit import quantize
from nybble.layers.convert import quantizable_linears
from nybble.layers.quantized_experts import expert_shapes
from nybble.quantization.folder import save_config
from nybble.sources.shapes import SHAPES
from nybble.sources.skeleton import build_skeleton
from nybble.sources.tokenizer import save_tokenizer

SCALE = 0.02
ROWS_DRAWN = 4096  # of a matrix at a time
INTO_RESIDUAL = ("o_proj", "down_proj")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def synthesize(shape: str, spec: QuantSpec, out: Path, seed: int = 0, report: Listener = silent) -> int:
    """Write a model of `SHAPES[shape]` to `out`; returns the bytes of its tensors.

    Args:
        report: told which parameter is drawn.

    Raises:
        ModelError: `out` is taken or cannot be written.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(**SHAPES[shape])
    with disk_errors(out), staged_folder(out) as staging:
        tokenizer = byte_tokenizer()
        save_tokenizer(tokenizer, staging)
        config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
        with SafetensorsWriter(staging) as writer:
            for name, tensor in _parameters(config, spec, seed, report):
                writer.write(name, tensor)
        skeleton = build_skeleton(config)
        config.architectures, config.dtype = [type(skeleton).__name__], torch.bfloat16
        stacks = bool(expert_shapes(skeleton))
        config.quantization_config = quantization_config(BaseFormats(spec), torch.bfloat16, ["lm_head"], stacks=stacks)
        save_config(config, staging)
    return writer.total_bytes


def _parameters(config: PretrainedConfig, spec: QuantSpec, seed: int, report: Listener) -> Iterator[tuple[str, Tensor]]:
    """What is stored, name by name: four-bit linears as bitsandbytes stores them, the rest in bf16; vectors are ones,
    and so are buffers.
    """
    model = build_skeleton(config)
    linears, stacks = {f"{name}.weight" for name in quantizable_linears(model)}, expert_shapes(model)
    generator = torch.Generator().manual_seed(seed)
    residual = SCALE / math.sqrt(2 * config.num_hidden_layers)
    named = list(model.named_parameters())  # tied ones once
    for name, parameter in tracked(named, "drawing", report):
        scale = residual if name.removesuffix(".weight").endswith(INTO_RESIDUAL) else SCALE
        if len(parameter.shape) == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
        elif name in stacks:
            num, size = stacks[name].num, (stacks[name].out_features, stacks[name].in_features)
            experts = (quantize(_drawn(size, scale, generator), spec) for _ in range(num))
            yield from stored_tensors(name, QuantizedStack.of(experts, num)).items()
        else:
            matrix = _drawn(parameter.shape, scale, generator)
            yield from stored_tensors(name, quantize(matrix, spec)).items() if name in linears else [(name, matrix)]
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored:
            yield name, torch.ones(buffer.shape, dtype=torch.bfloat16)


def _drawn(shape: Sequence[int], scale: float, generator: torch.Generator) -> Tensor:
    """A bf16 matrix of N(0, scale²)."""
    matrix = torch.empty(*shape, dtype=torch.bfloat16)
    for rows in matrix.split(ROWS_DRAWN):
        rows.copy_(torch.randn(rows.shape, generator=generator).mul_(scale))
    return matrix


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token a byte, and ChatML's markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
