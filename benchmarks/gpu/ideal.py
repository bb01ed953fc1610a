"""What a step would take if nothing were lost, made of the ceilings that were measured."""

from collections.abc import Mapping

from gpu.check import Check, Load, Shape


def ideal_step(
    shape: Shape,
    load: Load,
    keep: str,
    products: Mapping[str, tuple[float, float]],
    attention: tuple[float, float],
    bytes_per_s: float,
) -> dict[str, float]:
    """Seconds of an ideal step by part: "products" is L0, all of them are L1. Every token is supervised.

    Args:
        products: seconds forward and backward of each of `Shape.products` and of the head, for all tokens.
        attention: of a block.
        bytes_per_s: of a copy, read and written.
    """
    h, q, k, f = shape.widths
    again = keep != "everything"  # blocks compute their forward pass once more, but for down's product
    forward, backward = (sum(products[name][way] for name in shape.products) for way in (0, 1))
    ins, outs = h + q + h + f, (q + 2 * k) + h + 2 * f + h  # of the four products, elements a token
    forward_ops = 4 * h + 2 * (q + k) + 3 * f + 2 * h  # norms, rotation, gate, residuals
    backward_ops = 8 * h + 2 * (q + k) + 6 * f + 4 * h
    wide = 2 * load.tokens * shape.layers / bytes_per_s  # of an element a token, in every block
    blocks = shape.layers * (forward + backward + again * (forward - products["down"][0]))
    return {
        "products": blocks + sum(products["head"]),
        "dequantise": 2 * 2.516 * shape.layers * shape.block_elements / bytes_per_s,  # 0.516 read, 2 written
        "attention": shape.layers * (attention[0] * (2 if keep == "nothing" else 1) + attention[1]),
        "small ops": wide * (forward_ops * (1 + again) + backward_ops),
        "adapters": wide * (ins * (1 + again) + outs + ins),
        "loss": 5 * 2 * load.tokens * shape.vocabulary / bytes_per_s,
        "optimizer": 28 * shape.adapter_parameters / bytes_per_s,
    }


def ideal_of(check: Check, shape: Shape, load: Load, keep: str) -> dict[str, float] | None:
    """From the ceilings in the record; None where they are missing."""
    lines = [line for what in ("product", "attention") for line in check.lines(what) if line["tokens"] == load.tokens]
    times = {
        line.get("name", "attention"): (line["forward_s"], line["backward_s"]) for line in lines if not line["more"]
    }
    copy = [line["bytes_per_s"] for line in check.lines("copy")]
    if not copy or not {*shape.products, "head", "attention"} <= times.keys():
        return None
    return ideal_step(shape, load, keep, times, times["attention"], copy[-1])
