"""The families of decoders whose layers nybble's decoder blocks compute, by the model type of their configs."""

from nybble.families.gemma2 import GEMMA2
from nybble.families.gemma3 import GEMMA3
from nybble.families.granite import GRANITE
from nybble.families.llama import LLAMA
from nybble.families.ministral import MINISTRAL
from nybble.families.mistral import MISTRAL
from nybble.families.olmo2 import OLMO2
from nybble.families.olmo3 import OLMO3
from nybble.families.phi3 import PHI3
from nybble.families.qwen2 import QWEN2
from nybble.families.qwen3 import QWEN3
from nybble.families.smollm3 import SMOLLM3

FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, SMOLLM3, GRANITE, OLMO2, OLMO3, PHI3,
    )
}  # fmt: skip
