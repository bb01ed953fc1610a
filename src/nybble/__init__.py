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
    from nybble.api.artefacts import export, merge
    from nybble.api.evaluate import evaluate
    from nybble.api.parts import Model, TrainingData, add_adapters, load, load_data, open_model
    from nybble.api.plan import PlanResult, plan
    from nybble.api.quantize import QuantizedModel, quantize
    from nybble.api.run import Run, open_run
    from nybble.api.train import train
    from nybble.errors import NybbleError
    from nybble.evaluation.evaluate import Evaluation
    from nybble.events import Event, Listener
    from nybble.exporting.artefact import ExportResult
    from nybble.exporting.compare import MergesCompared
    from nybble.runs.result import RunResult

__version__ = "0.1.0"

__all__ = [
    "Evaluation",
    "Event",
    "ExportResult",
    "Listener",
    "MergesCompared",
    "Model",
    "NybbleError",
    "PlanResult",
    "QuantizedModel",
    "Run",
    "RunResult",
    "TrainingData",
    "__version__",
    "add_adapters",
    "evaluate",
    "export",
    "load",
    "load_data",
    "merge",
    "open_model",
    "open_run",
    "plan",
    "quantize",
    "train",
]

_MODULES = {  # of each exported name; the imports above say the same to type checkers
    "Evaluation": "evaluation.evaluate",
    "Event": "events",
    "ExportResult": "exporting.artefact",
    "Listener": "events",
    "MergesCompared": "exporting.compare",
    "Model": "api.parts",
    "NybbleError": "errors",
    "PlanResult": "api.plan",
    "QuantizedModel": "api.quantize",
    "Run": "api.run",
    "RunResult": "runs.result",
    "TrainingData": "api.parts",
    "add_adapters": "api.parts",
    "evaluate": "api.evaluate",
    "export": "api.artefacts",
    "load": "api.parts",
    "load_data": "api.parts",
    "merge": "api.artefacts",
    "open_model": "api.parts",
    "open_run": "api.run",
    "plan": "api.plan",
    "quantize": "api.quantize",
    "train": "api.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    return getattr(import_module(f"nybble.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
