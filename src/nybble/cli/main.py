"""`nybble`: the verbs, and what holds for all of them."""

from typing import Annotated

import typer

import nybble
from nybble.cli.chat import chat
from nybble.cli.compare import compare
from nybble.cli.config import schema
from nybble.cli.data import check
from nybble.cli.doctor import doctor
from nybble.cli.eval import evaluate, quality
from nybble.cli.export import export, merge
from nybble.cli.import_config import import_config
from nybble.cli.plan import plan
from nybble.cli.push import push
from nybble.cli.quantize import quantize
from nybble.cli.serve import serve
from nybble.cli.synth import synth
from nybble.cli.train import train
from nybble.cli.verbs import add_verb
from nybble.options import verbs

_SETTINGS = {"help_option_names": ["--help", "-h"]}

app = typer.Typer(
    name="nybble",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)
data_app = typer.Typer(
    name="data", help="Look at examples before training on them.", no_args_is_help=True, context_settings=_SETTINGS
)
config_app = typer.Typer(
    name="config", help="What a run's YAML file may hold.", no_args_is_help=True, context_settings=_SETTINGS
)
eval_app = typer.Typer(name="eval", context_settings=_SETTINGS)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nybble {nybble.__version__}")
        raise typer.Exit


@app.callback()
def _nybble(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Fine-tune large language models whose frozen weights are four bits wide."""


add_verb(app, "train", train, verbs.TrainConfig)
add_verb(app, "chat", chat, verbs.ChatConfig)
add_verb(app, "plan", plan, verbs.PlanConfig)
add_verb(app, "compare", compare, verbs.CompareConfig)
add_verb(app, "quantize", quantize, verbs.QuantizeConfig)
add_verb(app, "synth", synth, verbs.SynthConfig)
add_verb(app, "serve", serve, verbs.ServeConfig)
add_verb(app, "merge", merge, verbs.MergeConfig)
add_verb(app, "export", export, verbs.ExportConfig)
add_verb(app, "push", push, verbs.PushConfig)
app.add_typer(data_app)
app.add_typer(eval_app)
app.add_typer(config_app)
add_verb(eval_app, None, evaluate, verbs.EvalConfig)
add_verb(data_app, "check", check, verbs.DataConfig)
add_verb(eval_app, "quality", quality, verbs.EvalQualityConfig)
add_verb(app, "doctor", doctor)
add_verb(app, "import", import_config)
add_verb(config_app, "schema", schema)
