"""The families of decoders whose layers nybble's decoder blocks compute, by the model type of their configs."""

from typing import Any

from nybble.families.cohere import COHERE
from nybble.families.cohere2 import COHERE2
from nybble.families.family import Family
from nybble.families.gemma2 import GEMMA2
from nybble.families.gemma3 import GEMMA3
from nybble.families.gemma4 import GEMMA4
from nybble.families.glm import GLM
from nybble.families.glm4 import GLM4
from nybble.families.granite import GRANITE
from nybble.families.llama import LLAMA
from nybble.families.ministral import MINISTRAL
from nybble.families.ministral3 import MINISTRAL3
from nybble.families.mistral import MISTRAL
from nybble.families.mixtral import MIXTRAL
from nybble.families.olmo2 import OLMO2
from nybble.families.olmo3 import OLMO3
from nybble.families.olmoe import OLMOE
from nybble.families.phi import PHI
from nybble.families.phi3 import PHI3
from nybble.families.qwen2 import QWEN2
from nybble.families.qwen2_moe import QWEN2_MOE
from nybble.families.qwen3 import QWEN3
from nybble.families.qwen3_moe import QWEN3_MOE
from nybble.families.smollm3 import SMOLLM3
from nybble.families.stablelm import STABLELM
from nybble.families.starcoder2 import STARCODER2

FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, GEMMA2, GEMMA3, GEMMA4, SMOLLM3, GRANITE, OLMO2, OLMO3,
        PHI, PHI3, GLM, GLM4, COHERE, COHERE2, STABLELM, STARCODER2, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE,
    )
}  # fmt: skip


def family_of(config: Any) -> Family | None:
    """What models of a text config have of their family; None where it is not known."""
    family = FAMILIES.get(config.model_type)
    return None if family is None else family.of(config)
