// The arguments of nybble_attention_forward and nybble_attention_backward; backends/cpp/attention.py mirrors this struct.
#pragma once

#include <cstdint>

// Tokens of all documents lie side by side; document i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1.
// A row of a tensor is one token; its heads are contiguous, each `head_dim` long, and `*_stride` elements separate rows.
struct NybbleAttention {
    int32_t dtype;  // NYBBLE_F32 or NYBBLE_BF16: of every tensor but lse
    int32_t num_docs;
    const int32_t* cu_seqlens;  // [num_docs + 1]
    int64_t num_tokens, num_heads, num_kv_heads, head_dim;
    int64_t window;  // a token sees this many tokens, itself included; 0: all before it
    float scale;
    float softcap;  // c in c tanh(scores / c); 0: none

    const void *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    void* out;  // written by forward, read by backward
    int64_t out_stride;
    float* lse;  // [num_heads, num_tokens], natural logarithm; written by forward, read by backward

    const void* dout;  // from here on: backward only
    int64_t dout_stride;
    void *dq, *dk, *dv;  // written
    int64_t dq_stride, dk_stride, dv_stride;
};
