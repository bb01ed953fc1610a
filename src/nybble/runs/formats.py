"""The formats of a run's base where its layers have several: measured once, kept in the run folder."""

import json
from pathlib import Path

from nybble.errors import RunError
from nybble.files.disk import write_complete
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.quantization.sensitivity import MixedFormats


def write_formats(path: Path, mixed: MixedFormats) -> None:
    """`formats.json`: the format of every layer, and the predicted losses it was chosen by."""
    content = {
        "bits": mixed.bits,
        "predicted_kl": mixed.predicted_kl,
        "layers": mixed.formats.layers,
        "losses": mixed.losses,
    }
    write_complete(path, json.dumps(content, indent=1) + "\n")


def read_formats(path: Path, spec: QuantSpec) -> BaseFormats:
    """The formats of a run's layers, with `spec`'s block size and double quantisation.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return BaseFormats(spec, json.loads(path.read_text(encoding="utf-8"))["layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is missing or damaged: {error}.",
            "A run with --mixed keeps the format of each layer there.",
            "Restore the file, or train again.",
        ) from error
