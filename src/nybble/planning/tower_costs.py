"""What pictures cost in bytes beside the tokens that they become: their pixels, and the states of the tower that reads
them. Symbols as in costs.py; N patches in a micro-batch, w and f the tower's widths.
"""

from nybble.planning.run_shape import RunShape

PIXEL_BYTES = 4  # processors give fp32


def held_bytes(run: RunShape) -> int:
    """Pixels of a step's micro-batches, which are made together; and the states of all blocks of the tower, which some
    models read in the middle and hold until the language model has been passed, and what that is handed.
    """
    if run.tower is None:
        return 0
    states = 1 if run.tower.adapted else run.tower.num_layers + 1  # an adapted tower's are what its blocks keep
    width = run.tower.width * states + 2 * run.model.hidden_size
    return PIXEL_BYTES * run.batches.step_picture_values + _patches(run) * run.compute_bytes * width


def making_bytes(run: RunShape) -> int:
    """Height of making a micro-batch's pixels: pictures decoded, and what a processor makes of them on its way, in fp64
    where it scales them so.
    """
    return 0 if run.tower is None else run.batches.decoded_bytes + 4 * PIXEL_BYTES * run.batches.picture_values


def reading_bytes(run: RunShape) -> int:
    """Height of the tower's pass beside that: pixels in the compute dtype, one block at work as transformers' modules
    are, its masks, and states on their way to the language model; of an adapted one also the gradients of a block.
    """
    if run.tower is None:
        return 0
    tower, c = run.tower, run.compute_bytes
    w, f = tower.width, tower.intermediate_size
    block = 16 * w + c * (10 * w + 4 * f) * (2 if tower.adapted else 1)  # norms in fp32
    per_patch = c * tower.patch_values + block + 2 * c * run.model.hidden_size + 2 * c * tower.patches
    return _patches(run) * per_patch


def _patches(run: RunShape) -> int:
    assert run.tower is not None
    return -(-run.batches.picture_values // run.tower.patch_values)
