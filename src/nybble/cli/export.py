"""`nybble merge` and `nybble export`."""

from typing import Any

from rich.console import Console

from nybble.options.option import build_options
from nybble.options.verbs import ExportConfig, GgufType, MergeConfig


def merge(given: dict[str, Any]) -> int:
    """Merge a run's adapter into its base, verified against the run before it is called done."""
    config = build_options(MergeConfig, given)
    from nybble.exporting.artefact import export_run
    from nybble.exporting.compare import compare_merges

    if config.out is None:
        return compare_merges(config, Console())
    return export_run(config, config.out, config.to, GgufType.F16, Console())


def export(given: dict[str, Any]) -> int:
    """Write a run for other programs (PEFT, transformers, bitsandbytes, llama.cpp), verified in them."""
    config = build_options(ExportConfig, given)
    from nybble.exporting.artefact import export_run

    return export_run(config, config.out, config.to, config.gguf_type, Console())
