"""The families of decoders whose layers nybble's decoder blocks compute, by the model type of their configs."""

from nybble.families.gemma2 import GEMMA2
from nybble.families.gemma3 import GEMMA3
from nybble.families.llama import LLAMA
from nybble.families.mistral import MISTRAL
from nybble.families.qwen2 import QWEN2
from nybble.families.qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)}
