"""Embeddings kept in 16 bits do in another dtype what their own class does."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CanineConfig,
    CanineModel,
    CLIPConfig,
    CLIPForImageClassification,
    FSMTConfig,
    FSMTForConditionalGeneration,
    Gemma3TextConfig,
    MambaConfig,
)

from nybble.errors import ModelError
from nybble.layers.dense import CastEmbedding, input_embedding, replace_dense_ends
from nybble.layers.streamed import StreamedEmbedding

GEMMA = Gemma3TextConfig(
    vocab_size=96,
    hidden_size=40,  # its root is no number of bf16
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    pad_token_id=90,
)
IDS = torch.tensor([[3, 90, 7], [3, 3, 95]])


class Rows:
    """A matrix in a file, as StreamedEmbedding knows it."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.num_columns = matrix, matrix.shape[1]

    def gather(self, rows: Tensor) -> Tensor:
        return self.matrix[rows]


@pytest.fixture
def gemma() -> nn.Module:
    """In fp32, its embedding rounded to bf16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GEMMA, dtype=torch.float32).eval().requires_grad_(False)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.bfloat16())
    return model


def test_a_scaled_embedding_scales_in_the_compute_dtype(gemma: nn.Module) -> None:
    expected_rows, expected = gemma.model.embed_tokens(IDS), gemma(IDS).logits
    own = gemma.model.embed_tokens.weight
    kept = replace_dense_ends(gemma, torch.float32)
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"}
    cast = gemma.model.embed_tokens
    cast.weight = gemma.lm_head.weight = nn.Parameter(own.bfloat16(), requires_grad=False)
    assert isinstance(cast, CastEmbedding) and cast.weight.dtype == torch.bfloat16
    assert torch.equal(cast(IDS), expected_rows)
    torch.testing.assert_close(gemma(IDS).logits, expected)


def test_a_streamed_embedding_does_what_its_own_class_does(gemma: nn.Module) -> None:
    embedding = gemma.model.embed_tokens
    expected = embedding(IDS)
    streamed = StreamedEmbedding(Rows(embedding.weight.detach().bfloat16()), torch.float32, embedding)
    assert torch.equal(streamed(IDS), expected)


def test_ends_whose_weight_the_model_reads_stay_in_its_dtype() -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1))
    assert replace_dense_ends(model, torch.float32) == set()


def test_what_makes_states_is_found_where_transformers_does_not_say() -> None:
    with torch.device("meta"):
        clip, canine = CLIPForImageClassification(CLIPConfig()), CanineModel(CanineConfig(num_hidden_layers=1))
        fsmt = FSMTForConditionalGeneration(FSMTConfig(encoder_layers=1, decoder_layers=1))
    assert input_embedding(clip) is clip.vision_model.embeddings.patch_embedding
    assert input_embedding(fsmt.get_encoder()) is fsmt.model.encoder.embed_tokens
    with pytest.raises(ModelError, match="no embedding of tokens"):
        input_embedding(canine)
