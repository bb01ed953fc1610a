"""`nybble.merge` and `nybble.export`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from nybble.api.keywords import RunLike, as_options
from nybble.events import Listener, silent
from nybble.options.option import build_options
from nybble.options.use_groups import GgufType
from nybble.options.verbs import ExportConfig, MergeConfig

if TYPE_CHECKING:
    from nybble.exporting.artefact import ExportResult
    from nybble.exporting.compare import MergesCompared


@overload
def merge(
    run: RunLike | None = None, *, compare: Literal[True], on_event: Listener = silent, **options: Any
) -> "MergesCompared": ...


@overload
def merge(*, adapters: Sequence[RunLike], on_event: Listener = silent, **options: Any) -> Path: ...


@overload
def merge(
    run: RunLike | None = None, *, compare: Literal[False] = False, on_event: Listener = silent, **options: Any
) -> "ExportResult": ...


def merge(
    run: RunLike | None = None,
    *,
    compare: bool = False,
    adapters: Sequence[RunLike] = (),
    on_event: Listener = silent,
    **options: Any,
) -> "ExportResult | MergesCompared | Path":
    """Merge a run's adapter into its base, verified against the run before it is called done; or adapters into one.

    Args:
        run: what `nybble.train` or `nybble.open_run` returned, or the path of its folder.
        adapters: folders of adapters on one base, to make one adapter of, in place of `run`; with `weights`, `method`
            ("cat", "linear", "ties", "dare_linear", "dare_ties"), `density` and `seed` among the options.
        compare: only measure what each way of merging costs in held-out loss, and write nothing.
        on_event: told what happens, as it happens.
        options: the flags of `nybble merge` with underscores. `out`, a new folder, is needed unless `compare`.

    Returns:
        What was written and the verdict; with `compare` the losses, in nats a token; of adapters the folder.

    Raises:
        NybbleError: there is no such run, `out` exists, or nothing can be written. Nothing that looks complete is left.

    Example:
        >>> merged = nybble.merge(run, out="models/merged")
        >>> merged.outcome, (merged.folder / "config.json").exists()
        ('verified', True)
    """
    of_run = {"compare": True} if compare else {}
    config = build_options(MergeConfig, as_options({"run": run, "adapters": adapters or None} | of_run | options))
    output, merged = config.output, config.run
    if merged.adapters:
        from nybble.exporting.adapter_merge import merge_adapters

        assert output.out is not None
        weights = merged.weights or (1 / len(merged.adapters),) * len(merged.adapters)
        how: dict[str, Any] = {"method": merged.method, "density": merged.density, "seed": merged.seed}
        return merge_adapters(merged.adapters, weights, output.out, **how, report=on_event)
    if output.out is None:
        from nybble.exporting.compare import compare_merges

        return compare_merges(config, on_event)
    from nybble.exporting.artefact import export_run

    return export_run(config, output.out, output.to, GgufType.F16, on_event)


def export(run: RunLike | None = None, *, on_event: Listener = silent, **options: Any) -> "ExportResult":
    """Write a run for other programs (PEFT, transformers, bitsandbytes, llama.cpp), verified in them.

    Args:
        run: what `nybble.train` or `nybble.open_run` returned, or the path of its folder.
        on_event: told what happens, as it happens.
        options: the flags of `nybble export` with underscores. `to` ("peft", "16bit", "nf4", "gguf", "gguf-lora") and
            `out`, a new folder, are needed.

    Returns:
        The files and the verdict. What is not verified lies in `<out>.unverified`.

    Raises:
        NybbleError: there is no such run, `out` exists, or this model has no such form. Nothing that looks complete is
            left.

    Example:
        >>> exported = nybble.export(run, to="peft", out="models/adapter")
        >>> exported.folder.name, [file.name for file in exported.files if "adapter" in file.name]
        ('adapter', ['adapter_config.json', 'adapter_model.safetensors'])
    """
    config = build_options(ExportConfig, as_options({"run": run} | options))
    from nybble.exporting.artefact import export_run

    output = config.output
    return export_run(config, output.out, output.to, output.gguf_type, on_event)
