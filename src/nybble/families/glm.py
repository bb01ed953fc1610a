"""GLM-4 9B as first published (arXiv 2406.12793): Llama with one linear layer for gate and up, and rotary angles of
half of each head, neighbours turned together.
"""

from nybble.families.family import Family

GLM = Family("glm", gate_up=("mlp.gate_up_proj",), rope_neighbours=True, gguf="CHATGLM")
