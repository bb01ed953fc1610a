"""Added tokens that the model never learnt are told by their embedding, or by what does not mention them."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.data.prepare import prepare
from nybble.data.template import ChatTemplate
from nybble.sources.open import open_model

WIDTH, SPARE = 32, 24


@pytest.fixture
def audit(tokenizer_of, tmp_path):
    """audit(change, added, answer): rows under chatml, whose embedding `change(table, id_of)` has changed."""

    def audited(change=None, added=(), answer="The answer"):
        own = tokenizer_of("bytes", "chatml")
        own.save_pretrained(tmp_path / "m")
        tokenizer = type(own).from_pretrained(tmp_path / "m")
        tokenizer.add_tokens(list(added), special_tokens=True)
        table = torch.randn(len(own) + SPARE, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.3
        if change is not None:
            change(table, tokenizer.convert_tokens_to_ids)
        path = tmp_path / "a.jsonl"
        rows = [{"prompt": f"q {n}", "completion": answer if n % 2 else "plain"} for n in range(8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = ChatTemplate(tokenizer)
        data = prepare(
            str(path), template, max_seq_len=99, vocab_size=len(table), embedding_rows=lambda ids: table[ids]
        )
        data.audit.check()
        return {found.id: found for found in data.audit.findings}.get("untrained-tokens")

    return audited


def zero(table, id_of):
    table[id_of("<|im_start|>")] = 1e-6


def at_the_mean(table, id_of):
    table[id_of("<|im_start|>")] = table.mean(0)


def as_a_spare_row(table, id_of):
    table[id_of("<|im_start|>")] = table[-3]


@pytest.mark.parametrize("change", [zero, at_the_mean, as_a_spare_row])
def test_marks_of_a_template_that_the_base_never_learnt_are_named(audit, change):
    found = audit(change)
    assert (found.level, found.num_rows, found.detail) == ("warning", 8, "'<|im_start|>'")


def test_trained_marks_are_not(audit):
    assert audit() is None


def test_a_new_token_in_a_spare_row_is_named_in_the_rows_that_use_it(audit):
    found = audit(added=["<|act|>", "<|unused|>"], answer="<|act|> The answer")
    assert (found.num_rows, found.detail) == (4, "'<|act|>'")
    assert audit(added=["<|act|>"]) is None, "no row uses it"


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_those_of_the_stored_embedding(tmp_path, tied):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    ids = [3, 49, 0, 3]
    assert open_model(str(tmp_path)).embedding_rows(ids).equal(model.get_input_embeddings().weight[ids].detach())
