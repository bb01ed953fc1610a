"""What calibrating costs in bytes and in work, beside the training that it is for: arithmetic only."""

from nybble.formats.quant_spec import QuantSpec
from nybble.planning.base_costs import block_bytes
from nybble.planning.run_shape import DENSE_BYTES, ModelShape
from nybble.sizes import (
    CALIBRATION_KEPT_BYTES,
    CALIBRATION_STATE_BYTES,
    CALIBRATION_TOKENS,
    EXPERT_STATISTICS_BYTES,
)
from nybble.sources.parts import BlockParts

FP32_COST = 2.5  # time of an fp32 product over one in bf16, where the compute dtype is bf16
GRAM_SHARE = 0.6  # of XᵀX that is computed: it is symmetric
WEIGHT_PASSES = 5  # products of H with a weight: correction for drift, feedback, errors
DRIFT_SHARE = 1.0  # two products, for every second token
WEIGHTS_AT_WORK = 3  # fp32 copies of a weight while its levels are chosen, and when its errors are measured
WIDE = 4  # bytes of fp32
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that are given the same tensor
AROUND_BYTES = 120_000_000  # gaps in the heap, compiled products; fitted to what was measured


def calibration_products(shape: ModelShape, tokens: int, compute_bytes: int) -> float:
    """Multiply-adds of calibrating, those in fp32 counted by what they take over the compute dtype's."""
    fp32 = FP32_COST if compute_bytes == 2 else 1.0
    products = 0.0
    for block, count in shape.parts.blocks:
        gram = sum(width * width for width, _ in _groups(block))
        gram += sum(block.passed_experts * width * width for _, _, width, _ in block.stacks)
        by_weight = sum(rows * rows * columns for _, rows, columns in block.linears)
        by_weight += sum(num * width * width * out for _, num, width, out in block.stacks)
        # forward of quantised and of 16-bit states
        by_tokens = block.passed_elements * (2 + DRIFT_SHARE) + fp32 * GRAM_SHARE * gram
        products += count * (tokens * by_tokens + fp32 * WEIGHT_PASSES * by_weight)
    return products


def training_products(shape: ModelShape, tokens: float, supervised: float) -> float:
    """Multiply-adds of a run's frozen products: forward, gradient of the input, the head of supervised tokens."""
    weights = shape.multiplied_elements
    return 2 * weights * tokens + 2 * shape.vocab_size * shape.hidden_size * supervised


def calibration_bytes(shape: ModelShape, spec: QuantSpec, tokens: int, compute_bytes: int) -> int:
    """Height of calibrating, above what the process itself takes (nybble.quantization.blocks).

    Always there: a block in 16 bits and in four, one dense weight, the states of all tokens and, for every second one,
    of the 16-bit model. For each group of linears that share an input: H, the drifts, inputs that are needed twice, and
    either a chunk of inputs on its way into H, or the weight whose levels are chosen. Experts: H of as many as
    EXPERT_STATISTICS_BYTES holds. Before the first block: the embedding.
    """
    a_feature = tokens * 3 // 2  # of all tokens and half of them again, elements
    chunk_tokens = min(CALIBRATION_TOKENS, tokens)
    heights = [DENSE_BYTES * shape.vocab_size * shape.hidden_size]
    for block, _ in shape.parts.blocks:
        elements = block.linear_elements + block.matrix_elements + max((i * o for _, i, o in block.linears), default=0)
        in_both = compute_bytes * elements + block_bytes(block, spec)
        for width, outs in _groups(block):
            kept = min(CALIBRATION_KEPT_BYTES, compute_bytes * a_feature * width) if len(outs) == 1 else 0
            chunk = chunk_tokens * ((WIDE + 3 * compute_bytes) * width + 2 * compute_bytes * shape.intermediate_size)
            held = in_both + kept + WIDE * width * (width + sum(outs))
            heights.append(held + max(chunk, (WEIGHTS_AT_WORK - 1) * WIDE * width * max(outs)))
        for _, num, width, out in block.stacks:
            statistics = max(WIDE * width**2, min(EXPERT_STATISTICS_BYTES, num * WIDE * width**2))
            heights.append(in_both + statistics + WEIGHTS_AT_WORK * WIDE * width * out)
    return CALIBRATION_STATE_BYTES * a_feature * shape.hidden_size + max(heights) + AROUND_BYTES


def _groups(block: BlockParts) -> list[tuple[int, list[int]]]:
    """Linears that share an input: its width, and their out_features."""
    groups: dict[tuple[str, str], tuple[int, list[int]]] = {}
    for name, width, out in block.linears:
        parent, _, leaf = name.rpartition(".")
        first = next((names[0] for names in SHARED_INPUTS if leaf in names), leaf)
        groups.setdefault((parent, first), (width, []))[1].append(out)
    return list(groups.values())
