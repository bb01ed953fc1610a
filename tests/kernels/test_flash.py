"""Packed attention by torch's FlashAttention, without a GPU.

torch's two ops get a body for the CPU, of plain PyTorch: torch's own dispatcher calls it, by their schema. It shows
that the arguments are right and that results go where they belong; the kernels themselves it cannot show.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.kernels import registry
from nybble.kernels.backends import flash
from nybble.kernels.backends.flash import attention
from nybble.kernels.backends.reference import attention as plain

LENGTHS = (20, 0, 13)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
BORDERS = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
SCALE = 0.3


def fused(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as slices of one buffer, bf16."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(sum(LENGTHS), HEADS + 2 * KV_HEADS, HEAD_DIM, generator=generator).bfloat16()
    q, k, v = buffer.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    return q, k, v


@pytest.fixture
def calls():
    """The named arguments that torch's ops were called with."""
    seen: list[dict[str, Any]] = []

    def window_of(given: dict[str, Any]) -> tuple[Any, ...]:
        """What the plain bodies take for the arguments that torch's documents describe."""
        seen.append(given)
        assert given["is_causal"] and given["dropout_p"] == 0 and given["window_size_right"] == 0
        assert given["cum_seq_q"] is given["cum_seq_k"] and given["max_q"] == given["max_k"]
        left = given["window_size_left"]
        return given["cum_seq_q"], given["max_q"], given["scale"], left + 1 if left >= 0 else 0, 0.0

    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **named
    ):
        assert not return_debug_mask
        out, lse = plain.packed_attention(query, key, value, *window_of(locals() | named))
        random = torch.empty(2, dtype=torch.uint64)
        return out, lse, random, random[0], out.new_empty(0)

    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, **named,
    ):  # fmt: skip
        grads = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in (query, key, value)]
        how = window_of(locals() | named)
        plain.packed_attention_backward(grad_out, query, key, value, out, logsumexp, *how, *grads)
        return tuple(grads)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield seen
    library._destroy()


@pytest.mark.parametrize("window", [0, 1, 5])
def test_what_torch_is_given_and_where_its_results_go(calls, window):
    q, k, v = fused(0)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    how = (BORDERS, max(LENGTHS), SCALE, window, 0.0)
    out, lse = attention.packed_attention(q, k, v, *how)
    expected_out, expected_lse = plain.packed_attention(q, k, v, *how)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    grads, expected = fused(2), fused(3)
    attention.packed_attention_backward(dout, q, k, v, out, lse, *how, *grads)
    plain.packed_attention_backward(dout, q, k, v, out, lse, *how, *expected)
    assert all(map(torch.equal, grads, expected))
    for given in calls:
        assert given["window_size_left"] == (window - 1 if window else -1) and given["max_q"] == max(LENGTHS)
        for mine, taken in zip((q, k, v), (given["query"], given["key"], given["value"]), strict=True):
            assert (mine.data_ptr(), mine.stride()) == (taken.data_ptr(), taken.stride()), "taken as they lie"


def test_torch_says_itself_that_its_results_are_laid_out_as_ours():
    """Its functions for meta tensors know no numbers, but shapes and types."""
    q, k, v = (x.to("meta") for x in fused(0))
    out, lse = attention.packed_attention(q, k, v, BORDERS.to("meta"), max(LENGTHS), SCALE, 0, 0.0)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert lse.shape == (HEADS, sum(LENGTHS)) and lse.dtype == torch.float32 and lse.is_contiguous()


def test_the_ops_are_those_that_were_read():
    """Where this fails after an update of torch: read what changed, and the kernels' own checks, first."""
    assert attention.why_another_torch() is None
    assert str(torch.ops.aten._flash_attention_forward.default._schema) == FORWARD_SCHEMA
    assert str(torch.ops.aten._flash_attention_backward.default._schema) == BACKWARD_SCHEMA


FORWARD_SCHEMA = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k,"
    " SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None,"
    " SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None,"
    " Tensor? block_table=None, int? num_splits=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state,"
    " Tensor unused, Tensor debug_attn_mask)"
)
BACKWARD_SCHEMA = (
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p,"
    " bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None,"
    " SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
)


@pytest.mark.parametrize("names", ["_FORWARD", "_BACKWARD"])
def test_another_torch_is_not_asked(names, monkeypatch):
    monkeypatch.setattr(attention, names, ("block", *getattr(attention, names)))
    assert f"aten::_flash_attention{names.lower()}" in attention.why_another_torch()


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"softcap": 30.0}, "no soft cap"),
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"head_dim": 12}, "not 12"),
        ({"head_dim": 264}, "not 264"),
        ({"gap": 4}, "16 bytes"),
    ],
    ids=str,
)
def test_what_it_lacks_plain_pytorch_runs_and_blocks_run_all_the_same(what, why, monkeypatch):
    backend = registry._backends["flash"]
    monkeypatch.setitem(registry._backends, "flash", backend._replace(probe=lambda: None))

    def arguments(dtype=torch.bfloat16, head_dim=HEAD_DIM, softcap=0.0, gap=0):
        x = torch.zeros(5, 2 * head_dim + gap, dtype=dtype)[:, : 2 * head_dim].view(5, 2, head_dim)
        how = (torch.tensor([0, 5], dtype=torch.int32), 5, SCALE, 0, softcap)
        return {
            "packed_attention": (x, x, x, *how),
            "packed_attention_backward": (x, x, x, x, x, x, *how, x, x, x),
        }

    for op, taken in arguments().items():
        assert registry.backend_of(op, "cuda", args=taken) == "flash"
    for op, refused in arguments(**what).items():
        assert registry.backend_of(op, "cuda", args=refused) == "reference"
        assert why in registry._registrations[op]["flash"].unsupported(*refused)
    assert registry.runs(("packed_attention", "packed_attention_backward"), "cuda") is None


def test_it_says_why_it_does_not_run_here(monkeypatch):
    why = {row.reason for row in registry.available() if row.backend == "flash"}
    assert why == ({""} if torch.cuda.is_available() else {"no CUDA device"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for capability, reason in (((7, 5), "needs compute capability 8.0 or above"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert flash._why_unavailable() == reason
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in str(flash._why_unavailable())
