"""`nybble config schema`."""

import json
from typing import Any

import typer

from nybble.options.schema import json_schema
from nybble.options.verbs import TrainConfig


def schema(given: dict[str, Any]) -> int:
    """Print the JSON schema of a run's YAML file, for editors that complete and check it."""
    typer.echo(json.dumps(json_schema(TrainConfig, "nybble train FILE.yaml"), indent=2))
    return 0
