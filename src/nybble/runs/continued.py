"""Training on from an adapter that exists: what it fixes, and which base it belongs to."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ConfigError, RunError
from nybble.layers.convert import resolve_targets
from nybble.layers.trained import resolve_modules
from nybble.options.adapter_groups import AdapterOptions
from nybble.options.option import yaml_key
from nybble.runs.adapter_files import StoredAdapter
from nybble.runs.folder import RunFolder
from nybble.sources.stored_model import StoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_adapter(path: str) -> StoredAdapter:
    """The adapter in a folder, or the last one of the run in it.

    Raises:
        RunError: there is none, it is damaged, it is more than LoRA, or its base is its own.
    """
    folder = Path(path).expanduser()
    of_run = RunFolder(folder).adapter
    adapter = StoredAdapter(of_run if of_run.is_dir() else folder)
    if adapter.tokens:
        raise RunError(
            f"The adapter in {adapter.folder} has trained rows of tokens.",
            "Trained on are adapters alone.",
            "Merge it (`nybble merge`) and train on the merged model.",
        )
    if adapter.taken_by:
        raise RunError(
            f"The adapter in {adapter.folder} belongs on what {adapter.taken_by} left of its base's weights.",
            "Trained on are adapters that belong on a base as it is.",
            f"`nybble export --run {adapter.folder.parent} --to peft` makes such a one, of twice the rank.",
        )
    return adapter


def options_of(
    adapter: StoredAdapter, given: AdapterOptions, skeleton: "PreTrainedModel", heads: Collection[str] = ()
) -> dict[str, Any]:
    """The options that the adapter fixes: its rank, alpha, scaling, layers and the modules that it has whole.

    Args:
        skeleton: the base, on the meta device.
        heads: modules that are trained whole without being named.

    Raises:
        ConfigError: an option that was given differs from the adapter's.
        RunError: the base lacks a layer of the adapter.
    """
    adapter.check_layers(skeleton)
    settings = adapter.settings
    own: dict[str, Any] = {
        "rank": settings["rank"],
        "alpha": float(settings["alpha"]),
        "rslora": bool(settings["rslora"]),
        "dora": settings["dora"],
        "rank_pattern": settings["rank_pattern"],
        "alpha_pattern": settings["alpha_pattern"],
    }
    same_layers = set(resolve_targets(skeleton, given.target_modules)) == set(adapter.names)
    own["target_modules"] = given.target_modules if same_layers else tuple(adapter.names)
    own["modules_to_save"] = whole = tuple(name for name in adapter.modules if name not in heads)
    if given.modules_to_save and set(resolve_modules(skeleton, given.modules_to_save, (), ())) == set(whole):
        own["modules_to_save"] = given.modules_to_save
    for name in given.model_fields_set & own.keys():
        if getattr(given, name) != own[name]:
            shown = _listed(own[name])
            raise ConfigError(
                f"{yaml_key(name)} is {_listed(getattr(given, name))}, the adapter in {adapter.folder} has {shown}.",
                "An adapter is trained on as it is: its rank, alpha, scaling and layers are fixed.",
                f"Leave --{yaml_key(name)} out, or train a new adapter on the merged model (`nybble merge`).",
            )
    return own


def check_base_of(adapter: StoredAdapter, source: StoredModel, allowed: Collection[str]) -> list[str]:
    """Refuse another base than the adapter's run recorded; returns sentences the user should see.

    Raises:
        RunError: it is another, and "base" is not among `allowed`; or what its run recorded is damaged.
    """
    run = RunFolder(adapter.folder.parent)
    recorded = run.recorded()
    if not recorded:
        named = adapter.config.get("base_model_name_or_path")
        return [f"The adapter says that it is for {named!r}; whether {source.name} is that cannot be checked."]
    if recorded["fingerprint"] not in (source.fingerprint(), source.made_from) and "base" not in allowed:
        base = recorded.get("model", "its base")
        raise RunError(
            f"The adapter in {adapter.folder} was trained on {base!r}, and {source.name} is another base.",
            "An adapter is trained on on the base that it belongs to, or on its four-bit folder.",
            f"Use --model {base}, or insist with --allow-change base.",
        )
    if run.base.is_dir() and source.quant_spec is None:
        return [
            f"The adapter was trained on the calibrated four bits in {run.base}; those of this run will differ a "
            f"little. --model {run.base} goes on with the same."
        ]
    return []


def _listed(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items()) or "nothing"
    if not isinstance(value, tuple):
        return str(value)
    return ", ".join(value[:3]) + (f" and {len(value) - 3} more" if len(value) > 3 else "")
