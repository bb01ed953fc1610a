"""What users see of events."""

import importlib
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

import nybble
from nybble.cli.render import Terminal
from nybble.cli.render import step_line as step_line_module
from nybble.cli.render.terminal import SafeConsole, show
from nybble.cli.render.training import PROMPT_CHARACTERS, show_samples
from nybble.evaluation.samples import Sample
from nybble.events import Event, Note, Progress, tracked
from nybble.exporting.verify import Check, Verification, Verified
from nybble.sources.bundled import Fetching
from nybble.training.events import HeldOutLoss, NotPaged, OutOfMemory, Resumed, Step, TrainingBegun, TrainingEnded


def kinds_of(base: type[Event]) -> set[type[Event]]:
    return {kind for each in base.__subclasses__() for kind in (each, *kinds_of(each))}


def printed(*events: Event) -> str:
    console = Console(file=io.StringIO(), width=200)
    with Terminal(console) as terminal:
        for event in events:
            terminal(event)
    return console.file.getvalue()


def test_every_event_has_its_way_of_being_shown() -> None:
    source = Path(nybble.__file__).parent
    for file in source.rglob("[!_]*.py"):
        importlib.import_module(".".join(("nybble", *file.relative_to(source).with_suffix("").parts)))
    own = {kind for kind in kinds_of(Event) if kind.__module__.startswith("nybble.")}
    assert {Note, Step} <= own
    missing = [kind.__name__ for kind in own if show.dispatch(kind) is show.dispatch(object)]
    assert not missing, f"cli/render has nothing for {missing}"


def test_names_in_the_log_are_unique() -> None:
    named = [kind.kind for kind in kinds_of(Event) if kind.kind and kind.__module__.startswith("nybble.")]
    assert len(named) == len(set(named))


def test_an_event_without_one_is_an_error() -> None:
    class Unknown(Event):
        pass

    with pytest.raises(NotImplementedError, match="Unknown"):
        printed(Unknown())


def test_no_text_talks_to_the_terminal() -> None:
    """Names of files, rows and answers of models may hold anything that a terminal acts on."""
    talk = "a\x1b[2J\x9b31m\x1b]0;title\x07 é 字\tb"
    console = SafeConsole(markup=False, file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    console.print(Panel(Text(talk)))
    Terminal(console)(Note(talk))
    console.out(talk)
    written = console.file.getvalue()
    assert not {character for character in written if not character.isprintable()} - {"\n", "\t"}, repr(written)
    assert written.count(r"a\x1b[2J\x9b31m\x1b]0;title") == 3 and "é 字" in written
    piped = SafeConsole(file=io.StringIO())
    piped.out(talk)
    assert "\x1b[2J" in piped.file.getvalue(), "an answer in a file is the answer"


def test_notes_are_printed_as_they_are() -> None:
    assert printed(Note("a [bold]bracket[/bold]", warning=True)) == "a [bold]bracket[/bold]\n"


def test_progress_is_a_bar_on_a_terminal_and_nothing_elsewhere() -> None:
    def work(console: Console) -> str:
        with Terminal(console) as terminal:
            assert list(tracked("abc", "loading", terminal)) == ["a", "b", "c"]
            terminal(Progress("left", 1, 3))
            terminal(Note("something else"))
        return console.file.getvalue()

    assert work(Console(file=io.StringIO())) == "something else\n"
    shown = work(Console(file=io.StringIO(), force_terminal=True))
    assert "loading" in shown and "left" in shown and "100%" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0, "the cursor is shown again"


@pytest.mark.parametrize("begun", [TrainingBegun(3), Progress("writing", 1, 3)])
def test_a_bar_goes_when_the_work_fails(begun: Event) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(ZeroDivisionError), Terminal(console) as terminal:
        terminal(begun)
        raise ZeroDivisionError
    shown = console.file.getvalue()
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


def test_training_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_line_module, "PLAIN_INTERVAL_S", 0.0)
    step = Step(5, 1.25, 1e-4, 0.5, tokens=100, supervised_tokens=50, step_s=2.0, tokens_per_s=50.0, memory_bytes=10**9)
    shown = printed(
        Resumed(4),
        TrainingBegun(6, after=4),
        OutOfMemory(5, paged=True),
        OutOfMemory(5, graphs=False),
        OutOfMemory(5, micro_batch_size=2),
        NotPaged("no room"),
        step,
        HeldOutLoss(0, 2.5, 10),
        HeldOutLoss(5, 1.5, 10),
        TrainingEnded(6, False, 10**9),
    )
    assert shown.splitlines() == [
        "going on after step 4 of 6",
        "step 5 ran out of memory: again, with the optimizer's state in a file",
        "step 5 ran out of memory: again, without graphs",
        "step 5 ran out of memory: again, 2 rows at once",
        "no room",
        "step 5/6  loss 1.2500  50 tokens/s  1 GB",
        "held-out loss before training: 2.5000 nats per supervised token",
        "held-out loss after step 5: 1.5000 nats per supervised token",
    ]


def test_a_download_is_announced_where_it_spoils_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(Fetching("tiny-model==1.0", 93)) == ""
    assert capsys.readouterr().err == "Fetching tiny-model==1.0 (93 MB, once) with pip.\n"


def test_samples_are_printed_as_they_are_and_long_prompts_from_their_end() -> None:
    console = Console(file=io.StringIO(), width=120)
    prompt = "start of it " + "word " * (PROMPT_CHARACTERS // 5) + "[bold] end"
    show_samples(Terminal(console), [Sample(prompt, "the reference", "the [base]", "the tuned")])
    shown = console.file.getvalue()
    assert "[bold]" in shown and "start of it" not in shown
    assert all(text in shown for text in ("the reference", "the [base]", "the tuned"))


def test_an_artefact_of_scores_is_told_by_its_checks_alone() -> None:
    checks = [Check("scores", "0.002 from the tuned model's", "at most 0.05, relative", True)]
    said = printed(Verified(Verification("transformers", {"texts": 18, "same_class": 1.0}, checks)))
    assert "verified in: transformers" in said and "0.002 from the tuned model's" in said
    assert "held-out positions" not in said
