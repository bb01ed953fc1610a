"""Experts that are streamed from the folder of a base: the same bits as in memory."""

from unittest.mock import patch

import torch

from nybble.formats.quant_spec import QuantSpec
from nybble.layers.convert import resolve_targets
from nybble.layers.quantized_experts import QuantizedExperts
from nybble.layers.streamed import StreamedExperts, attach_store
from nybble.memory.store import open_store
from nybble.quantization.synth import synthesize
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.shapes import SHAPES

NARROW = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
NARROW |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "num_hidden_layers": 3}


def test_streamed_experts_give_the_same_bits(tmp_path):
    with patch.dict(SHAPES, narrow=SHAPES["qwen3-30b-a3b"] | NARROW):
        synthesize("narrow", QuantSpec(), tmp_path / "base")
    source = open_model(str(tmp_path / "base"))
    assert source.is_streamable
    ids, found = torch.arange(3, 20)[None], []
    for resident in (None, 1):
        store = None if resident is None else open_store(source, resident)
        streamed = () if store is None else [*source.linears, *source.experts]
        model = load_model(source, source.layer_formats, torch.float32, stream_linears_of=streamed)
        kind = QuantizedExperts if store is None else StreamedExperts
        assert sum(isinstance(module, kind) for module in model.modules()) == 2 * 3
        assert len(resolve_targets(model, "experts")) == 6
        if store is not None:
            attach_store(model, store)
            store.begin(will_return=True)
        states = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=states, use_cache=False).logits
        logits.square().sum().backward()
        found.append((logits.detach(), states.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
