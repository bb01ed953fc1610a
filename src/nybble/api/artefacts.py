"""`nybble.merge`, `nybble.export` and `nybble.push`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from nybble.api.keywords import RunLike, as_options
from nybble.events import Listener, silent
from nybble.options.option import build_options
from nybble.options.use_groups import GgufType
from nybble.options.verbs import ExportConfig, MergeConfig, PushConfig

if TYPE_CHECKING:
    from nybble.exporting.artefact import ExportResult
    from nybble.exporting.compare import MergesCompared
    from nybble.exporting.push import Pushed


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


def push(
    folder: RunLike,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    on_event: Listener = silent,
) -> "Pushed":
    """Put what a run trained, or a folder that `merge` or `export` wrote, into a repository of the Hugging Face hub.

    Args:
        folder: a run, whose adapter or model is pushed with its card; or a folder with an adapter, a model or a GGUF
            file. Nothing else of a run is sent.
        repository: "owner/name"; made where there is none.
        private: make it private; one that is there and public is refused.
        revision: branch that the files go to, made where there is none; "main" if None.
        dry_run: send nothing, and say what would be sent.
        on_event: told what happens, as it happens.

    Returns:
        The files with their bytes, and the address of the commit. The token is what the hub's client finds: HF_TOKEN,
        or that of `hf auth login`.

    Raises:
        NybbleError: there is nothing to push, it is damaged or was not verified, or the hub refuses it.

    Example:
        >>> pushed = nybble.push(run, "someone/tiny-adapter", dry_run=True)
        >>> pushed.files["adapter_model.safetensors"] > 0, pushed.url
        (True, None)
    """
    options = {"private": private, "revision": revision, "dry_run": dry_run}
    config = build_options(PushConfig, options)
    from nybble.exporting.push import push as push_folder

    return push_folder(Path(folder), repository, config.push, on_event)
