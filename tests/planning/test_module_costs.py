"""What blocks of encoder-decoders and of vision towers are said to hold, against what autograd saves."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from nybble.layers.convert import attach_adapters, block_names, quantizable_linears
from nybble.planning.block_costs import kept_bytes
from nybble.planning.run_shape import MicroBatches, RunShape, Side
from nybble.planning.shape import shape_of
from nybble.sizes import SHAPE_RULES

ROWS, PROMPT, ANSWER, RANK = 3, 70, 30, 4
T5 = {"d_model": 128, "d_kv": 16, "d_ff": 512, "num_layers": 2, "num_heads": 8}
BART = {
    "d_model": 128, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 8, "decoder_attention_heads": 8, "max_position_embeddings": 100,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "own"), [("t5", T5), ("t5", T5 | {"feed_forward_proj": "gated-gelu"}), ("bart", BART)]
)
def test_each_half_holds_what_it_is_said_to(kind: str, own: dict[str, Any], dtype: torch.dtype) -> None:
    """A block in the middle of each: the first ones hold what all share."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, vocab_size=99, **own)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype).requires_grad_(False).train()
    attach_adapters(model, quantizable_linears(model), rank=RANK, alpha=8.0)
    held, seen, inside = dict.fromkeys(block_names(model), 0), {p.data_ptr() for p in model.parameters()}, [""]

    def put(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside[0] in held and storage.data_ptr() not in seen:
            kept.append(tensor)  # or another would take its place
            seen.add(storage.data_ptr())
            held[inside[0]] += storage.nbytes()
        return tensor

    kept: list[torch.Tensor] = []
    for name in held:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: inside.__setitem__(0, name))
        model.get_submodule(name).register_forward_hook(lambda *_: inside.__setitem__(0, ""))
    prompts, mask = torch.randint(3, 99, (ROWS, PROMPT)), torch.ones(ROWS, PROMPT, dtype=torch.int64)
    mask[0, -9:] = 0
    with saved_tensors_hooks(put, lambda tensor: tensor):
        model(input_ids=prompts, attention_mask=mask, decoder_input_ids=prompts[:, :ANSWER], use_cache=False)
    sides = {"prompts": Side(ROWS * PROMPT, PROMPT, 0), "answers": Side(ROWS * ANSWER, ANSWER, 0)}
    batches = MicroBatches(ROWS * (PROMPT + ANSWER), ROWS * ANSWER, PROMPT, 1, 0, 0, 0, **sides)
    shape = shape_of(AutoModelForSeq2SeqLM.from_config(config))
    rules = SHAPE_RULES["cpu"]
    run = RunShape(shape, batches, 0, RANK, dtype.itemsize, None, "generic", "everything", rules)
    measured = list(held.values())
    # Autograd saves the adapters' own copies in 16 bits beside that; they are small, and not the blocks'.
    for planned, found in zip(map(kept_bytes, run.sides), (measured[1], measured[3]), strict=True):
        assert 0.95 * found <= planned <= 1.05 * found, (planned / found, kind)
