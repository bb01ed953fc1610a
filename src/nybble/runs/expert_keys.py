"""Where PEFT has the matrices of adapters on experts, which it takes as parameters of the module that has them."""

from collections.abc import Collection

from nybble.layers.quantized_experts import PROJECTIONS

WRAPPED = ".base_layer"


def expert_keys(targets: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """Projections of experts among PEFT's target parameters -> the names that their matrices are stored under.

    PEFT wraps the module that has them once for each, in the order of its parameters: the last one is the outermost.

    Args:
        targets: parameters' names, or ends of them.
        stored: names that there are matrices under.
    """
    found: dict[str, str] = {}
    for module in dict.fromkeys(name.partition(WRAPPED)[0] for name in stored):
        names = [f"{module}.{leaf}" for leaf in PROJECTIONS]
        mine = [name for name in names if any(name == end or name.endswith(f".{end}") for end in targets)]
        found |= {name: module + WRAPPED * (len(mine) - 1 - place) for place, name in enumerate(mine)}
    return found
