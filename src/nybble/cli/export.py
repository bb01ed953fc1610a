"""`nybble merge` and `nybble export`."""

from typing import Any

from nybble.options.option import build_options
from nybble.options.verbs import ExportConfig, GgufType, MergeConfig

EXIT_CODES = {"verified": 0, "failed": 3, "undecided": 4}


def merge(given: dict[str, Any]) -> int:
    """Merge a run's adapter into its base, verified against the run before it is called done."""
    config = build_options(MergeConfig, given)
    from nybble.cli.render import Terminal
    from nybble.exporting.artefact import export_run
    from nybble.exporting.compare import compare_merges

    with Terminal() as terminal:
        if config.out is None:
            compare_merges(config, terminal)
            return 0
        return EXIT_CODES[export_run(config, config.out, config.to, GgufType.F16, terminal).outcome]


def export(given: dict[str, Any]) -> int:
    """Write a run for other programs (PEFT, transformers, bitsandbytes, llama.cpp), verified in them."""
    config = build_options(ExportConfig, given)
    from nybble.cli.render import Terminal
    from nybble.exporting.artefact import export_run

    with Terminal() as terminal:
        return EXIT_CODES[export_run(config, config.out, config.to, config.gguf_type, terminal).outcome]
