"""`nybble quantize`."""

from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import track

from nybble.config import QuantizeConfig, build_options


def quantize(given: dict[str, Any]) -> int:
    """Write a model in four bits, as a folder that transformers with bitsandbytes reads too."""
    config = build_options(QuantizeConfig, given)
    from nybble.formats.quantized_tensor import QuantSpec
    from nybble.models.save import quantize_folder
    from nybble.models.source import open_source

    spec = QuantSpec(config.format, config.block_size, config.double_quant)
    console = Console()
    progress = partial(track, description="quantizing", console=console, transient=True)
    quantize_folder(open_source(config.model, config.tokenizer), spec, config.out, progress)
    console.print(f"{config.out} holds {config.model} in {config.format}.", highlight=False, markup=False)
    return 0
