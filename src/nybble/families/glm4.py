"""GLM-4-0414 (github.com/zai-org/GLM-4): GLM with norms of what attention and the MLP add, too."""

from dataclasses import replace

from nybble.families.glm import GLM

GLM4 = replace(
    GLM,
    model_type="glm4",
    attention_output_norm="post_self_attn_layernorm",
    mlp_output_norm="post_mlp_layernorm",
    gguf="GLM4",
)
