"""Benchmarks through EleutherAI's lm-evaluation-harness, on the tuned model as it is in memory."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nybble.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_installed() -> None:
    """Refuse before long work what could not be done after it.

    Raises:
        ConfigError: the package is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-eval is given, but the package lm-eval is not installed.",
            "It is not among nybble's own requirements.",
            "Run `pip install lm-eval`, or leave --lm-eval out.",
        )


def run_tasks(model: "PreTrainedModel", tokenizer: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """The harness's results, task -> metric -> value.

    Args:
        tasks: names the harness knows, or `.yaml` files that describe tasks in its way.

    Raises:
        ConfigError: the harness knows no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        described = [yaml.safe_load(Path(task).read_text()) if task.endswith(".yaml") else task for task in tasks]
        results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=described)
    except (KeyError, ValueError, OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"lm-eval is {', '.join(tasks)}: {error}.", "Allowed: tasks of lm-eval, and .yaml files."
        ) from error
    assert results is not None
    found: dict[str, Any] = results["results"]
    return found
