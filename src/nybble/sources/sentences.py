"""sentence-transformers' files beside a model: how the states of its tokens become an embedding.

`modules.json` lists what a text goes through; the folder of its pooling has a `config.json`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ModelError

if TYPE_CHECKING:
    from nybble.options.objective_groups import Pooling

MODULES, SETTINGS, OWN_LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
KNOWN = ("Transformer", "Pooling", "Normalize")
MODES: dict[str, "Pooling"] = {  # true in a pooling's config; newer ones have `pooling_mode`
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
NAMES: dict[str, "Pooling"] = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}
MODULE_NAMES = {pooling: name for name, pooling in NAMES.items()}


def read_pooling(folder: Path) -> "Pooling | None":
    """What the files of a folder say; None where it has none.

    Raises:
        ModelError: they cannot be read, or say something that is not known.
    """
    if not (folder / MODULES).is_file():
        return None
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        paths = {kind: str(module["path"]) for kind, module in zip(kinds, modules, strict=True)}
        if odd := [kind for kind in kinds if kind not in KNOWN]:
            raise _unknown(folder, f"a module {odd[0]}", f"Allowed: {', '.join(KNOWN)}.")
        if "Pooling" not in paths:
            return None
        config = json.loads((folder / paths["Pooling"] / "config.json").read_text(encoding="utf-8"))
        said = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
        if not said:
            said = [config["pooling_mode"]] if isinstance(config["pooling_mode"], str) else [*config["pooling_mode"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{folder / MODULES}, or what it names, is damaged: {error!r}."
        raise ModelError(got, "", "Restore it.") from error
    known = MODES | NAMES
    if len(said) != 1 or said[0] not in known:
        raise _unknown(folder, f"the pooling {', '.join(said)}", f"Allowed: one of {', '.join(NAMES)}.")
    return known[said[0]]


def named_prompts(folder: Path) -> tuple[str, ...]:
    """Names of the prompts that the files of a folder would put before texts.

    Raises:
        ModelError: they cannot be read.
    """
    if not (folder / SETTINGS).is_file():
        return ()
    try:
        prompts = json.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("prompts") or {}
        return tuple(name for name, prompt in prompts.items() if prompt)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / SETTINGS} is damaged: {error!r}.", "", "Restore it.") from error


def _unknown(folder: Path, what: str, allowed: str) -> ModelError:
    return ModelError(
        f"{folder / MODULES} names {what}, which is not known here.",
        allowed,
        f"To train without what these files say, take a copy of the folder without {MODULES}.",
    )


def write_pooling(folder: Path, pooling: "Pooling", hidden: int, max_seq_len: int | None) -> None:
    """Write the files with which sentence-transformers opens a folder of transformers: its states pooled and scaled.

    Args:
        hidden: elements of a state.
        max_seq_len: tokens of a text that are read; None leaves it to the tokenizer.
    """
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    mode: dict[str, Any] = {name: own == pooling for name, own in MODES.items()}
    config = {"word_embedding_dimension": hidden, **mode, "include_prompt": True}
    _write(folder / MODULES, modules)
    (folder / "1_Pooling").mkdir()
    _write(folder / "1_Pooling" / "config.json", config)
    (folder / "2_Normalize").mkdir()  # it has no settings
    _write(folder / OWN_LENGTH, {"max_seq_length": max_seq_len, "do_lower_case": False})
    _write(folder / SETTINGS, {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"})


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
