"""nybble: fine-tune large language models whose frozen weights are four bits wide.

    import nybble

    run = nybble.train(model="smollm2-135m-instruct", data="examples.jsonl", out="runs/first", rank=16)
    print(run.loss_before, run.loss_after, run.adapter)
    print(nybble.open_run(run).generate("What is 12 * 7?"))

Every flag of a verb is a keyword of its function. A user's mistake raises a `NybbleError`. Nothing is printed: what
happens goes to the listener `on_event=`. A name is imported when it is first used, so that `import nybble` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nybble import openmp as openmp  # first: what it sets counts only until torch is loaded

if TYPE_CHECKING:
    from nybble.api.artefacts import export, merge, push
    from nybble.api.data import check_data
    from nybble.api.evaluate import compare, evaluate, evaluate_quality
    from nybble.api.parts import Model, TrainingData, add_adapters, load, load_data, open_model
    from nybble.api.plan import PlanResult, plan
    from nybble.api.quantize import QuantizedModel, quantize, synth
    from nybble.api.run import Run, open_run
    from nybble.api.serve import serve
    from nybble.api.train import train
    from nybble.bridge.other_configs import ImportedConfig, import_config
    from nybble.errors import NybbleError
    from nybble.evaluation.compare_methods import MethodsCompared
    from nybble.evaluation.evaluate import Evaluation
    from nybble.events import Event, Listener
    from nybble.exporting.artefact import ExportResult
    from nybble.exporting.compare import MergesCompared
    from nybble.exporting.push import Pushed
    from nybble.hf import Acceleration, NybbleConfig, accelerate, quantize_
    from nybble.runs.result import RunResult

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "Evaluation",
    "Event",
    "ExportResult",
    "ImportedConfig",
    "Listener",
    "MergesCompared",
    "MethodsCompared",
    "Model",
    "NybbleConfig",
    "NybbleError",
    "PlanResult",
    "Pushed",
    "QuantizedModel",
    "Run",
    "RunResult",
    "TrainingData",
    "__version__",
    "accelerate",
    "add_adapters",
    "check_data",
    "compare",
    "evaluate",
    "evaluate_quality",
    "export",
    "import_config",
    "load",
    "load_data",
    "merge",
    "open_model",
    "open_run",
    "plan",
    "push",
    "quantize",
    "quantize_",
    "serve",
    "synth",
    "train",
]

_MODULES = {  # of each exported name; the imports above say the same to type checkers
    name: module
    for module, names in {
        "api.artefacts": ("export", "merge", "push"),
        "api.data": ("check_data",),
        "api.evaluate": ("compare", "evaluate", "evaluate_quality"),
        "api.parts": ("Model", "TrainingData", "add_adapters", "load", "load_data", "open_model"),
        "api.plan": ("PlanResult", "plan"),
        "api.quantize": ("QuantizedModel", "quantize", "synth"),
        "api.run": ("Run", "open_run"),
        "api.serve": ("serve",),
        "api.train": ("train",),
        "bridge.other_configs": ("ImportedConfig", "import_config"),
        "errors": ("NybbleError",),
        "evaluation.compare_methods": ("MethodsCompared",),
        "evaluation.evaluate": ("Evaluation",),
        "events": ("Event", "Listener"),
        "exporting.artefact": ("ExportResult",),
        "exporting.compare": ("MergesCompared",),
        "exporting.push": ("Pushed",),
        "hf": ("Acceleration", "NybbleConfig", "accelerate", "quantize_"),
        "runs.result": ("RunResult",),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    return getattr(import_module(f"nybble.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
