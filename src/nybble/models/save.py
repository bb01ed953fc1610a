"""`nybble quantize`: a base model as a folder in four bits, written tensor by tensor."""

import copy
from pathlib import Path

from torch import Tensor

from nybble.errors import ModelError
from nybble.formats.bnb import quantization_config, to_bnb
from nybble.formats.quantized_tensor import QuantSpec
from nybble.formats.safetensors_io import SafetensorsWriter, staged_folder
from nybble.kernels.ops import quantize
from nybble.layers.convert import is_linear, quantizable_linears
from nybble.models.interface import ModelSource
from nybble.models.load import Progress
from nybble.models.placement import place_tensors, read_placed
from nybble.models.skeleton import build_skeleton, dense_end_weights, is_transposed


def quantize_folder(
    source: ModelSource,
    spec: QuantSpec,
    out: Path,
    progress: Progress | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the source to `out` with the linears of its blocks in four bits; `out` appears complete or not at all.

    nf4 and fp4 are stored as bitsandbytes stores them: transformers loads the folder where bitsandbytes
    is installed. int4 is stored with nybble's own keys. Matrices outside the blocks are kept in 16 bits,
    norms and biases as they are.

    Args:
        out: a new or empty folder.
        progress: wraps the list of tensors to write, called with `total=`.

    Raises:
        ModelError: `out` is taken, or the source is damaged or already in four bits.
    """
    if source.quant_spec is not None:
        raise ModelError(
            f"{source.name} is already in 4 bits ({source.quant_spec.format}).",
            "Allowed: a model in 16 or 32 bits; quantising twice loses quality each time.",
            "Use it as it is, or start from the 16-bit model.",
        )
    with staged_folder(out) as staging:
        tokenizer = source.load_tokenizer()
        model = build_skeleton(source.config)
        placed = place_tensors(source, model)
        linears = {f"{name}.weight" for name in quantizable_linears(model)}
        transposed = {name for name in linears if is_transposed(model.get_submodule(name.removesuffix(".weight")))}
        ends = dense_end_weights(model)
        with SafetensorsWriter(staging, max_shard_bytes) as writer:
            for place in placed if progress is None else progress(placed, total=len(placed)):
                tensor = read_placed(source, place)
                assert isinstance(tensor, Tensor)
                if place.target in linears:
                    q = quantize(tensor.T if place.target in transposed else tensor, spec)
                    stored = to_bnb(place.target, q)
                elif place.target in ends or tensor.ndim > 1:
                    stored = {place.target: tensor.to(source.dense_dtype)}
                else:
                    stored = {place.target: tensor}
                del tensor  # its bytes are not needed while it is written, nor while the next one is read
                for name, part in stored.items():
                    writer.write(name, part)

        kept = [n for n, module in model.named_modules() if is_linear(module) and f"{n}.weight" not in linears]
        config = copy.deepcopy(source.config)
        config.architectures = [type(model).__name__]
        config.dtype = source.dense_dtype
        config.quantization_config = quantization_config(spec, source.dense_dtype, kept)
        config.save_pretrained(staging)
        source.load_generation_config().save_pretrained(staging)
        tokenizer.save_pretrained(staging)
