"""What calibrating costs in bytes and in work, beside the training that it is for: arithmetic only."""

from nybble.calibration.feedback import NORMAL_BYTES
from nybble.formats.quantized_tensor import QuantSpec
from nybble.memory.costs import DENSE_BYTES, LINEARS, ModelShape, block_bytes

FP32_COST = 2.5  # time of an fp32 product over one in bf16, where the compute dtype is bf16
GRAM_SHARE = 0.6  # of XᵀX that is computed: it is symmetric
WEIGHT_PASSES = 10  # products of H with a weight: feedback, refits, descents, errors
MATRICES_INVERTED = 5  # of the size of H while it is inverted: H, D and three that come and go
MATRICES_KEPT = 3  # H, D and the factor of the inverse
WEIGHTS_AT_WORK = 6  # fp32 copies of a weight while its levels are chosen
NORMALS_AT_WORK = 4  # of the normal equations of its scales
WIDE = 4  # bytes of fp32
AROUND_BYTES = 120_000_000  # a chunk of text at work, gaps in the heap, compiled products; measured: 88 to 115 MB


def calibration_products(shape: ModelShape, tokens: int, compute_bytes: int) -> float:
    """Multiply-adds of calibrating, those in fp32 counted by what they take over the compute dtype's."""
    fp32 = FP32_COST if compute_bytes == 2 else 1.0
    inputs = [shape.hidden_size, shape.query_width, shape.hidden_size, shape.intermediate_size]
    gram = sum(width * width for width in inputs)
    weights = sum(rows * columns for rows, columns in shape.linears)
    by_weight = sum(rows * rows * columns for rows, columns in shape.linears)
    forward = 2 * weights * tokens  # of the quantised and of the 16-bit states
    return shape.num_layers * (forward + tokens * gram * (1 + fp32 * GRAM_SHARE) + fp32 * WEIGHT_PASSES * by_weight)


def training_products(shape: ModelShape, tokens: float, supervised: float) -> float:
    """Multiply-adds of a run's frozen products: forward, gradient of the input, the head of supervised tokens."""
    weights = shape.num_layers * sum(rows * columns for rows, columns in shape.linears)
    return 2 * weights * tokens + 2 * shape.vocab_size * shape.hidden_size * supervised


def calibration_bytes(shape: ModelShape, spec: QuantSpec, tokens: int, compute_bytes: int) -> int:
    """Height of calibrating, above what the process itself takes (nybble.models.calibrate).

    Always there: the embedding, a block in 16 bits and in four, the states of all tokens and, for every second one,
    of the 16-bit model. For each linear: the inputs of all tokens where they are not the states, and either H and what
    inverting it takes, or what it takes to choose the weight's levels.
    """
    a_feature = compute_bytes * tokens * 3 // 2
    embedding = DENSE_BYTES * shape.vocab_size * shape.hidden_size
    block = compute_bytes * shape.block_elements + block_bytes(shape, spec)
    heights = []
    for name, (width, out) in zip(LINEARS, shape.linears, strict=True):
        inputs = a_feature * (shape.intermediate_size if name == "down_proj" else shape.query_width)
        matrix, weight = WIDE * width**2, WIDE * width * out
        normals = NORMALS_AT_WORK * min(NORMAL_BYTES, WIDE * out * (width // spec.block_size) ** 2)
        choosing = MATRICES_KEPT * matrix + WEIGHTS_AT_WORK * weight + normals
        heights.append(inputs + max(MATRICES_INVERTED * matrix, choosing))
    return embedding + block + a_feature * shape.hidden_size + max(heights) + AROUND_BYTES
