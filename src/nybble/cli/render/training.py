"""A training run, from what it starts from to what it changed."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nybble.cli.render.step_line import StepLine
from nybble.cli.render.terminal import Terminal, show
from nybble.evaluation.samples import Sample
from nybble.planning.ranks import RankChosen
from nybble.runs.result import RunResult
from nybble.sources.bundled import Fetching
from nybble.training import events
from nybble.units import format_bytes

# metrics in the lines of steps and evaluations
SHOWN = (
    *("rewards/margins", "rewards/accuracies", "kl", "cross_entropy", "agreement"),
    *("accuracy", "micro_f1", "macro_f1", "entity_f1", "mrr", "spearman"),
)
PROMPT_CHARACTERS = 600  # of a prompt that are shown


@show.register(events.RunStarted)
@show.register(events.AdapterTaken)
@show.register(events.Resumed)
def _(event: events.RunStarted | events.AdapterTaken | events.Resumed, terminal: Terminal) -> None:
    """The user asked for it; what follows says the rest."""


@show.register
def _(event: Fetching, terminal: Terminal) -> None:
    sentence = f"Fetching {event.requirement} ({event.megabytes} MB, once) with pip."
    Console(stderr=True, soft_wrap=True).print(sentence, highlight=False, markup=False)  # off --json's output


@show.register
def _(event: events.ModelOpened, terminal: Terminal) -> None:
    terminal.say(f"model: {event.name}")
    for note in event.notes:
        terminal.say(f"  {note}")


@show.register
def _(event: events.TeacherAsked, terminal: Terminal) -> None:
    terminal.say(
        f"the teacher was asked about {event.rows} rows in {event.seconds:.0f} s; peak memory: "
        f"{format_bytes(event.peak_bytes)} measured, {format_bytes(event.predicted_peak_bytes)} predicted"
    )


@show.register
def _(event: events.TrainingBegun, terminal: Terminal) -> None:
    if event.after is not None:
        terminal.say(f"going on after step {event.after} of {event.total_steps}")
    terminal.steps = StepLine(terminal.console, event.total_steps)


@show.register
def _(event: events.RateTried, terminal: Terminal) -> None:
    told = "no finite loss" if event.loss is None else f"held-out loss {event.loss:.4f}"
    terminal.say(f"  lr {event.lr:g}: {told} after {event.steps} steps at {event.small_lr:.3g}")


@show.register
def _(event: events.RateChosen, terminal: Terminal) -> None:
    terminal.say(f"lr: {event.lr:g}, {event.why}")


@show.register
def _(event: RankChosen, terminal: Terminal) -> None:
    terminal.say(f"rank: {event.rank}, {event.why}")


@show.register
def _(event: events.Step, terminal: Terminal) -> None:
    assert terminal.steps is not None
    told = "".join(f"  {_last(name)} {event.metrics[name]:.3f}" for name in SHOWN if name in event.metrics)
    figures = f"loss {event.loss:.4f}{told}  {event.tokens_per_s:.0f} tokens/s  {format_bytes(event.memory_bytes)}"
    terminal.steps.update(event.step, figures)


@show.register
def _(event: events.HeldOutLoss, terminal: Terminal) -> None:
    when = "before training" if event.step == 0 else f"after step {event.step}"
    told = "".join(f", {_last(name)} {event.metrics[name]:.4f}" for name in SHOWN if name in event.metrics)
    terminal.say(f"held-out loss {when}: {event.loss:.4f} {event.unit}{told}")


@show.register
def _(event: events.OutOfMemory, terminal: Terminal) -> None:
    how = "with the optimizer's state in a file" if event.paged else f"{event.micro_batch_size} rows at once"
    how = "without graphs" if event.graphs is False else how
    terminal.say(f"step {event.step} ran out of memory: again, {how}")


@show.register
def _(event: events.StoppedEarly, terminal: Terminal) -> None:
    lowest = f"the held-out loss was lowest, {event.best_loss:.4f}, after step {event.best_step}"
    terminal.say(f"stopped after step {event.step}: {lowest}")


@show.register
def _(event: events.NotPaged, terminal: Terminal) -> None:
    terminal.say(event.reason)


@show.register
def _(event: events.TrainingEnded, terminal: Terminal) -> None:
    terminal.end_steps()


@show.register
def _(event: events.RunMeasured, terminal: Terminal) -> None:
    terminal.say(f"{event.steps} steps in {event.training_s:.0f} s")
    terminal.say(
        f"peak memory: {format_bytes(event.peak_bytes)} measured, {format_bytes(event.predicted_peak_bytes)} "
        f"predicted; a step: {event.step_s:.3g} s measured, at most {event.predicted_step_s:.3g} s predicted"
    )


def show_interrupted(terminal: Terminal, trained: RunResult) -> None:
    """Where what there is lies, and how to go on."""
    terminal.say(f"Interrupted after step {trained.steps}; what was trained is in {trained.trained}.")
    terminal.say(f"next:\n  nybble train --resume --out {trained.folder.path}")


def show_result(terminal: Terminal, trained: RunResult, samples: Sequence[Sample]) -> None:
    """Losses before and after, answers side by side, what to type next."""
    if not trained.validation:
        terminal.say("no sample answers and no held-out loss: no row is held out")
    elif trained.streamed and trained.writes_answers:
        terminal.say("no sample answers: the base is streamed")
    show_samples(terminal, samples)
    before, after = trained.loss_before, trained.loss_after
    if before is not None and after is not None:
        unit = "nats per supervised token gained" if trained.config.objective.objective == "sft" else "gained"
        gained = f"{before - after:+.4f} {unit}"
        terminal.say(f"held-out loss: {before:.4f} before, {after:.4f} after ({gained})")
    for note in trained.source.notes:
        terminal.say(note)
    terminal.say(f"{'model:  ' if trained.full else 'adapter:'} {trained.trained}")
    terminal.say(f"losses:  {trained.folder.loss_plot}")
    terminal.say("next:")
    compared = trained.validation and trained.source.task.kind == "tokens"
    merging = ("export",) if trained.full else ("merge --compare",) if compared else ("merge",)
    verbs = ("chat", *(("eval",) if trained.validation else ()), *merging)
    for verb in verbs if trained.writes_answers else ("eval", "merge --out DIR"):
        terminal.say(f"  nybble {verb} --run {trained.folder.path}")


def show_samples(terminal: Terminal, samples: Sequence[Sample]) -> None:
    """Print each sample: the prompt, then base, tuned and reference answers."""
    for i, sample in enumerate(samples, 1):
        table = Table(title=f"held-out prompt {i}", title_justify="left", show_header=False, show_lines=True)
        table.add_column(style="bold")
        table.add_column()
        for name, text in (
            ("prompt", _shorten(sample.prompt)),
            ("base", sample.base),
            ("tuned", sample.tuned),
            ("reference", sample.reference),
        ):
            table.add_row(name, Text(text))
        terminal.console.print(table)


def _last(name: str) -> str:
    """What a metric is called in a line: its name without its family."""
    return name.rpartition("/")[2]


def _shorten(text: str) -> str:
    return text if len(text) <= PROMPT_CHARACTERS else "... " + text[-PROMPT_CHARACTERS:]
