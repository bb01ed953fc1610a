"""What a finished run shows: losses before and after, answers side by side, what to type next."""

from rich.console import Console

from nybble.evaluation.samples import compare_answers, show_samples
from nybble.training.session import TrainedRun

NUM_SAMPLES = 3
SIGNAL_EXIT_CODE = 128  # plus the signal's number, as shells count it


def show_result(trained: TrainedRun, console: Console) -> int:
    """Print what changed and where it lies; returns the process's exit code."""
    result, run = trained.result, trained.run
    if result.interrupted:
        console.print(f"Interrupted after step {result.steps}; the adapter is in {run.adapter}.", highlight=False)
        console.print(f"next:\n  nybble train --resume --out {run.path}", highlight=False)
        return SIGNAL_EXIT_CODE + result.interrupted
    if not trained.data.validation:
        console.print("no sample answers and no held-out loss: no row is held out", highlight=False)
    elif trained.streamed:  # an answer would read the whole base for every token
        console.print("no sample answers: the base is streamed", highlight=False)
    else:
        show_samples(console, compare_answers(trained.model, trained.template, trained.data.validation[:NUM_SAMPLES]))
    if result.loss_before is not None and result.loss_after is not None:
        console.print(
            f"held-out loss: {result.loss_before:.4f} before, {result.loss_after:.4f} after "
            f"({result.loss_before - result.loss_after:+.4f} nats per supervised token gained)",
            highlight=False,
        )
    for note in trained.source.notes:
        console.print(note, highlight=False)
    console.print(f"adapter: {run.adapter}", highlight=False)
    console.print(f"losses:  {run.loss_plot}", highlight=False)
    console.print("next:", highlight=False)
    for verb in ("chat", "eval", "merge --compare") if trained.data.validation else ("chat", "merge"):
        console.print(f"  nybble {verb} --run {run.path}", highlight=False)
    return 0
