"""What calibrating costs in bytes and in work, beside the training that it is for: arithmetic only."""

from nybble.formats.quantized_tensor import QuantSpec
from nybble.memory.costs import DENSE_BYTES, ModelShape, block_bytes
from nybble.models.walk import CHUNK_TOKENS, KEPT_BYTES, STATES_DTYPE

FP32_COST = 2.5  # time of an fp32 product over one in bf16, where the compute dtype is bf16
GRAM_SHARE = 0.6  # of XᵀX that is computed: it is symmetric
WEIGHT_PASSES = 5  # products of H with a weight: correction for drift, feedback, errors
DRIFT_SHARE = 1.0  # two products, for every second token
WEIGHTS_AT_WORK = 3  # fp32 copies of a weight while its levels are chosen, and when its errors are measured
WIDE = 4  # bytes of fp32
AROUND_BYTES = 120_000_000  # gaps in the heap, compiled products; fitted to what was measured


def calibration_products(shape: ModelShape, tokens: int, compute_bytes: int) -> float:
    """Multiply-adds of calibrating, those in fp32 counted by what they take over the compute dtype's."""
    fp32 = FP32_COST if compute_bytes == 2 else 1.0
    inputs = [shape.hidden_size, shape.query_width, shape.hidden_size, shape.intermediate_size]
    gram = sum(width * width for width in inputs)
    weights = sum(rows * columns for rows, columns in shape.linears)
    by_weight = sum(rows * rows * columns for rows, columns in shape.linears)
    by_tokens = weights * (2 + DRIFT_SHARE) + fp32 * GRAM_SHARE * gram  # forward of quantised and of 16-bit states
    return shape.num_layers * (tokens * by_tokens + fp32 * WEIGHT_PASSES * by_weight)


def training_products(shape: ModelShape, tokens: float, supervised: float) -> float:
    """Multiply-adds of a run's frozen products: forward, gradient of the input, the head of supervised tokens."""
    weights = shape.num_layers * sum(rows * columns for rows, columns in shape.linears)
    return 2 * weights * tokens + 2 * shape.vocab_size * shape.hidden_size * supervised


def calibration_bytes(shape: ModelShape, spec: QuantSpec, tokens: int, compute_bytes: int) -> int:
    """Height of calibrating, above what the process itself takes (nybble.models.calibrate).

    Always there: a block in 16 bits and in four, one dense weight, the states of all tokens and, for every second one,
    of the 16-bit model. For each group of linears that share an input: H, the drifts, inputs that are needed twice, and
    either a chunk of inputs on its way into H, or the weight whose levels are chosen. Before the first block: the
    embedding.
    """
    a_feature = tokens * 3 // 2  # of all tokens and half of them again, elements
    block = compute_bytes * (shape.block_elements + max(i * o for i, o in shape.linears)) + block_bytes(shape, spec)
    q, k, v, o, gate, up, down = shape.linears
    chunk_tokens = min(CHUNK_TOKENS, tokens)
    heights = [DENSE_BYTES * shape.vocab_size * shape.hidden_size]
    for group, is_kept in (((q, k, v), False), ((o,), True), ((gate, up), False), ((down,), True)):
        width, outs = group[0][0], [out for _, out in group]
        kept = min(KEPT_BYTES, compute_bytes * a_feature * width) if is_kept else 0
        chunk = chunk_tokens * ((WIDE + 3 * compute_bytes) * width + 2 * compute_bytes * shape.intermediate_size)
        held = block + kept + WIDE * width * (width + sum(outs))
        heights.append(held + max(chunk, (WEIGHTS_AT_WORK - 1) * WIDE * width * max(outs)))
    return STATES_DTYPE.itemsize * a_feature * shape.hidden_size + max(heights) + AROUND_BYTES
