"""Command R7B and Command A (arXiv 2504.00698): Command R whose layers have a window and rotary angles, but every
fourth, which has neither.
"""

from dataclasses import replace

from nybble.families.cohere import COHERE

COHERE2 = replace(
    COHERE,
    model_type="cohere2",
    windows="by kind",
    rotated_windows=True,
    head_norms=(),
    head_norms_option=None,
    gguf="COHERE2",
)
