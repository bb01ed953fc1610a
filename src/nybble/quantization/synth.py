"""`nybble synth`: a 4-bit folder of a published shape with random weights, to rehearse memory and time with.

Linears are drawn from N(0, 0.02²), those that write to the residual stream from N(0, 0.02² / 2L) (GPT-2's
initialisation), so that activations stay in range however deep the model. One tensor exists at a time. The tokenizer
is byte-level with ChatML's markers: 259 tokens, which any of the vocabularies holds.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nybble.events import Listener, silent, tracked
from nybble.files.disk import disk_errors
from nybble.formats.bnb import quantization_config, to_bnb
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.formats.safetensors import SafetensorsWriter, staged_folder
from nybble.kernels.ops.four_bit import quantize
from nybble.layers.convert import quantizable_linears
from nybble.quantization.folder import save_config
from nybble.sources.shapes import SHAPES
from nybble.sources.skeleton import build_skeleton
from nybble.sources.tokenizer import save_tokenizer

SCALE = 0.02
ROWS_DRAWN = 4096  # of a matrix at a time
INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")
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
        config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
        config.quantization_config = quantization_config(BaseFormats(spec), torch.bfloat16, ["lm_head"])
        save_config(config, staging)
    return writer.total_bytes


def _parameters(config: PretrainedConfig, spec: QuantSpec, seed: int, report: Listener) -> Iterator[tuple[str, Tensor]]:
    """What is stored, name by name: four-bit linears as bitsandbytes stores them, the rest in bf16."""
    model = build_skeleton(config)
    linears = {f"{name}.weight" for name in quantizable_linears(model)}
    generator = torch.Generator().manual_seed(seed)
    residual = SCALE / math.sqrt(2 * config.num_hidden_layers)
    named = list(model.named_parameters())  # tied ones once
    for name, parameter in tracked(named, "drawing", report):
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
            continue
        matrix = torch.empty(shape, dtype=torch.bfloat16)
        for rows in matrix.split(ROWS_DRAWN):
            drawn = torch.randn(rows.shape, generator=generator)
            rows.copy_(drawn.mul_(residual if name.endswith(INTO_RESIDUAL) else SCALE))
        if name in linears:
            yield from to_bnb(name, quantize(matrix, spec)).items()
        else:
            yield name, matrix


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token a byte, and ChatML's markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
