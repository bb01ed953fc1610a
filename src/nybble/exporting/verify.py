"""Is the artefact the tuned model? Asked of the artefact as its consumer loads it, before it is called done.

The run itself (four bits and adapter) is asked first, then let go, then the artefact: one model in memory at a time.
Of the run's distributions only the likeliest tokens are kept (evaluation/divergence.py).

What must hold depends on what the artefact promises. Faithful kinds (PEFT, 16 bits from the dequantised base, GGUF in
16 or 8 bits) must choose the tuned model's tokens. Kinds that round the weights anew, or put ΔW on another base, must
keep at least KEPT_GAIN of what fine-tuning gained on the held-out rows.

A choice of another token speaks against a faithful artefact, but for near ties of one whose every layer is asked for
its ΔW besides (`arrival.py`): it lies so near the tuned model (ROUNDING) that its weights can only be rounded, and the
tuned model prefers its own token by no more than such a distance moves log-probabilities. To second order KL is half
the variance of that, so √(2 KL) is its deviation.

Both are measured against what the run changed. Where that is too little (the base itself makes the tuned model's
choices, or its loss differs by no more than chance), a right artefact cannot be told from a wrong one: "undecided".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample, Message
from nybble.data.prompted_rows import PromptedRow
from nybble.data.template import ChatTemplate
from nybble.errors import DataError
from nybble.evaluation.divergence import Distributions
from nybble.events import Event
from nybble.exporting.consumers import Consumer, NybbleConsumer
from nybble.options.use_groups import ArtefactKind, GgufType
from nybble.runs.open_run import OpenRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outcome = Literal["verified", "undecided", "failed"]
NUM_PROMPTS = 3
ANSWER_TOKENS = 96
FAITHFUL_TOP1: dict[str, float] = {
    ArtefactKind.PEFT: 0.995,
    ArtefactKind.DENSE: 0.995,
    ArtefactKind.GGUF_ADAPTER: 0.995,
    GgufType.F16: 0.99,
    GgufType.BF16: 0.98,
    GgufType.Q8_0: 0.97,
}
KEPT_GAIN = 0.75
ENDS = 0.9  # of the held-out ends of turn at which the tuned model ends its answer
NEARER = 0.25  # an artefact's KL to the tuned model, at most, over the base's
ROUNDING = 1e-3  # the same, where it may be rounding alone: 16 bits come to 3e-6 to 8e-4
DEVIATIONS = 3.0  # by which log-probabilities may be moved in a near tie

PROBES = (
    (Message("user", "How much is 12 + 3456?"),),
    (Message("system", "Be brief."), Message("user", "Name a colour.\n\nThen stop.")),
    (Message("user", "naïve café, 東京"), Message("assistant", " Yes. "), Message("user", "Why?")),
)


@dataclass(frozen=True)
class Row:
    """A held-out text, the positions asked about, the tokens that follow them, and what a model is given of its
    pictures.
    """

    ids: list[int]
    positions: Tensor
    targets: Tensor
    beside: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """What a model says about the held-out rows. Lists run over all positions of all rows.

    Args:
        choices: int64 `(N,)`, its likeliest token.
        losses: fp32 `(N,)`, nats, of the tokens that follow.
        distributions: one of each row; only of the run.
        kl: fp64 `(N,)`, nats, of the run's distributions from this model's; not of the run itself.
        leads: fp32 `(N,)`, nats, by which the run prefers its likeliest token to this model's; not of the run itself.
        texts: its greedy answer to each prompt.
        ended: whether it came to an end of turn there.
    """

    choices: Tensor
    losses: Tensor
    distributions: list[Distributions]
    kl: Tensor | None
    leads: Tensor | None
    texts: list[list[int]]
    ended: list[bool]


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Args:
        name, found, needed: for the user.
        passed: whether it does.
        against_change: whether it is measured against what the run changed.
    """

    name: str
    found: str
    needed: str
    passed: bool
    against_change: bool = False


@dataclass(frozen=True)
class Verification:
    """What verifying found; `figures` are those the checks were made from.

    Args:
        too_little: in words, how the run changed too little to measure against; None where it changed enough.
    """

    consumer: str
    figures: dict[str, Any]
    checks: list[Check]
    too_little: str | None = None

    @property
    def passed(self) -> bool:
        return self.outcome == "verified"

    @property
    def outcome(self) -> Outcome:
        """Undecided where nothing speaks against the artefact but checks that the run gave no measure for."""
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return "verified"
        return "undecided" if self.too_little and all(check.against_change for check in failed) else "failed"

    def to_json(self) -> dict[str, Any]:
        checks = [vars(check) for check in self.checks]
        outcome = {"passed": self.passed, "outcome": self.outcome, "too_little": self.too_little}
        return {**outcome, "consumer": self.consumer, "figures": self.figures, "checks": checks}


@dataclass(frozen=True)
class Verified(Event):
    """An artefact has been asked, whatever came of it."""

    verification: Verification


class Prompt(NamedTuple):
    """What is answered, and what a model is given of its pictures."""

    ids: list[int]
    beside: dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """The run's own answers and its base's, to compare an artefact with."""

    rows: list[Row]
    prompts: list[Prompt]
    tuned: Answers
    base: Answers
    template: ChatTemplate


def choose_rows(
    validation: Sequence[EncodedExample],
    num_positions: int,
    beside: Callable[[EncodedExample], dict[str, Tensor]] = lambda row: {},
) -> list[Row]:
    """Rows with `num_positions` supervised positions in all, or all there are.

    Args:
        beside: what a model is given of a row's pictures.
    """
    rows, left = [], num_positions
    for example in validation:
        row = _row_of(example, left, beside)
        rows += [row] if len(row.positions) else []
        left -= len(row.positions)
        if left <= 0:
            break
    return rows


def _row_of(example: EncodedExample, most: int, beside: Callable[[EncodedExample], dict[str, Tensor]]) -> Row:
    """With the first supervised positions, so many at most."""
    if isinstance(example, PromptedRow):
        targets = example.label_ids[:most].long()
        return Row(example.prompt_ids, torch.arange(len(targets)), targets, beside(example))
    positions = example.supervised[1:].nonzero().squeeze(1)[:most]  # position p predicts token p + 1
    if not len(positions):
        return Row([], positions, positions)
    end = len(example) if example.picture_values else int(positions[-1]) + 1  # tokens and pictures belong together
    return Row(example.input_ids[:end].tolist(), positions, example.input_ids[positions + 1].long(), beside(example))


def ask_run(
    opened: OpenRun, model: "PreTrainedModel", validation: Sequence[EncodedExample], positions: int
) -> Reference:
    """The tuned model's answers and its base's, from a loaded run."""
    consumer = NybbleConsumer("the run", model, opened.template, opened.computed_by)
    rows = choose_rows(validation, positions, consumer.beside)
    asked = [row.prompt for row in validation if row.prompt_ids][:NUM_PROMPTS]
    prompts = [Prompt(row.input_ids.tolist(), consumer.beside(row)) for row in asked]
    tuned = ask(consumer, rows, prompts)
    opened.switch(model, tuned=False)
    base = ask(NybbleConsumer("the base", model, opened.template, opened.computed_by), rows, prompts, tuned)
    opened.switch(model, tuned=True)
    return Reference(rows, prompts, tuned, base, opened.template)


def ask(consumer: Consumer, rows: Sequence[Row], prompts: Sequence[Prompt], run: Answers | None = None) -> Answers:
    """A model's answers; `run` is whose distributions its KL is taken from."""
    choices, losses = [], []
    kl: list[Tensor] = []
    leads: list[Tensor] = []
    distributions: list[Distributions] = []
    for index, row in enumerate(rows):
        log_p = consumer.logits(row.ids, row.positions, row.beside).log_softmax(dim=-1)  # (N, vocabulary)
        choices.append(log_p.argmax(dim=-1))
        losses.append(-log_p.gather(1, row.targets[:, None]).squeeze(1))
        if run is None:
            distributions.append(Distributions.of(log_p))
        else:
            kl.append(run.distributions[index].kl(log_p))
            leads.append(run.distributions[index].lead(choices[-1]))
    texts = [consumer.answer(prompt.ids, ANSWER_TOKENS, prompt.beside) for prompt in prompts]
    return Answers(
        choices=torch.cat(choices),
        losses=torch.cat(losses),
        distributions=distributions,
        kl=torch.cat(kl) if kl else None,
        leads=torch.cat(leads) if leads else None,
        texts=texts,
        ended=[len(text) < ANSWER_TOKENS for text in texts],
    )


def compare(reference: Reference, consumer: Consumer, kind: str, *, layers_asked: bool) -> Verification:
    """Ask the artefact and judge it.

    Args:
        kind: key of FAITHFUL_TOP1, or another name for one that rounds anew or is on another base.
        layers_asked: each of its layers is asked for its ΔW: what differs in near ties alone is then no fault.
    """
    found = ask(consumer, reference.rows, reference.prompts, reference.tuned)
    figures = _figures(reference, found) | {"near_ties": near_ties(found, reference.base) if layers_asked else 0}
    too_little = _too_little(reference, found, figures, kind)
    checks = [*_check_tokens(reference, consumer), *_check_numbers(figures, kind, too_little)]
    return Verification(consumer.name, figures, checks, too_little)


def not_loaded(kind: str, error: Exception) -> Verification:
    """What is found of an artefact that its consumer cannot load or run."""
    found = f"{type(error).__name__}: {error}".strip()
    return Verification(kind, {}, [Check("loads and runs", found, "without an error", False)])


def _figures(reference: Reference, found: Answers) -> dict[str, Any]:
    tuned, base = reference.tuned, reference.base
    assert found.kl is not None and base.kl is not None
    loss, loss_tuned, loss_base = (answers.losses.double().mean().item() for answers in (found, tuned, base))
    targets = torch.cat([row.targets for row in reference.rows])
    stop = torch.tensor(sorted(reference.template.stop_ids))
    tuned_ends = torch.isin(targets, stop) & torch.isin(tuned.choices, stop)
    same = [ours == theirs for ours, theirs in zip(tuned.texts, found.texts, strict=True)]
    return {
        "positions": len(targets),
        "top1_agreement": (found.choices == tuned.choices).double().mean().item(),
        "top1_agreement_of_base": (base.choices == tuned.choices).double().mean().item(),
        "kl_mean": found.kl.mean().item(),
        "kl_p99": found.kl.quantile(0.99).item(),
        "kl_mean_of_base": base.kl.mean().item(),
        "loss": loss,
        "loss_tuned": loss_tuned,
        "loss_base": loss_base,
        "gain_kept": (loss_base - loss) / (loss_base - loss_tuned) if loss_base != loss_tuned else 1.0,
        "ends_of_turn": int(tuned_ends.sum()),
        "ends_of_turn_kept": int((torch.isin(found.choices, stop) & tuned_ends).sum()),
        "texts": len(same),
        "texts_equal": sum(same),
        "first_difference": [
            None if ours == theirs else _first_difference(ours, theirs)
            for ours, theirs in zip(tuned.texts, found.texts, strict=True)
        ],
        "ended_tuned": sum(tuned.ended),
        "ended": sum(found.ended),
        "ended_where_text_equal": all(
            ours == theirs for ours, theirs, equal in zip(tuned.ended, found.ended, same, strict=True) if equal
        ),
    }


def near_ties(found: Answers, base: Answers) -> int:
    """Choices in which an artefact differs from the run that rounding explains."""
    assert found.kl is not None and base.kl is not None and found.leads is not None
    kl = found.kl.mean().clamp(min=0)
    if kl > ROUNDING * base.kl.mean():
        return 0
    return int(((found.leads > 0) & (found.leads <= DEVIATIONS * (2 * kl).sqrt())).sum())


def _first_difference(ours: list[int], theirs: list[int]) -> int:
    """Index of the first token in which two answers differ."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _check_tokens(reference: Reference, consumer: Consumer) -> list[Check]:
    """Template, tokens and ends of turn are the run's."""
    template, tokenizer = reference.template, reference.template.tokenizer
    texts = [tokenizer.decode(row.ids) for row in reference.rows]
    for probe in PROBES if template.chat_template is not None else ():
        try:
            template.encode_prompt(probe)  # some templates know no system turn
        except DataError:
            continue
        texts.append(template.render(probe, True))
    wrong = sum(consumer.encode(text) != template.encoder.encode(text) for text in texts)
    same = template.chat_template is None or consumer.chat_template == template.chat_template
    end = template.stop_ids[0]
    return [
        Check("chat template", "the run's" if same else "another", "the run's", same),
        Check("tokens of rendered texts", f"{len(texts) - wrong} of {len(texts)} the same", "all", wrong == 0),
        Check(
            "end of turn is known",
            "yes" if end in consumer.stop_ids else "no",
            repr(tokenizer.convert_ids_to_tokens(end)),
            end in consumer.stop_ids,
        ),
    ]


def _too_little(reference: Reference, found: Answers, figures: dict[str, Any], kind: str) -> str | None:
    """How the run changed too little for a check to be measured against it: the base itself would pass as the tuned
    model, or what was gained lies within twice its standard error, or that of what the artefact's rounding changes.
    """
    least = FAITHFUL_TOP1.get(kind)
    if least is not None:
        differing = _differing(figures["top1_agreement_of_base"], figures)
        if differing > _allowed(least, figures):
            return None
        return f"the base differs from the tuned model in {differing} of {figures['positions']} choices of a token"
    tuned = reference.tuned.losses.double()
    gains, rounded = reference.base.losses.double() - tuned, found.losses.double() - tuned  # (N,) each
    spread = max(gains.std().item(), rounded.std().item()) if len(gains) > 1 else math.inf
    gain, chance = gains.mean().item(), 2 * spread / math.sqrt(len(gains))
    if gain > chance:
        return None
    return f"it gained {gain:.2g} nats a token on {len(gains)} held-out positions, give or take {chance:.2g}"


def _differing(agreement: float, figures: dict[str, Any]) -> int:
    return round((1 - agreement) * figures["positions"])


def _allowed(least: float, figures: dict[str, Any]) -> int:
    """Choices that may differ: one more than the share, since few rows may not hang on one token."""
    return math.floor((1 - least) * figures["positions"]) + 1


def _check_numbers(figures: dict[str, Any], kind: str, too_little: str | None) -> list[Check]:
    checks = []
    least = FAITHFUL_TOP1.get(kind)
    top1, kl, kl_base = figures["top1_agreement"], figures["kl_mean"], figures["kl_mean_of_base"]
    if least is not None:
        ties, allowed = figures["near_ties"], _allowed(least, figures)
        differing = _differing(top1, figures) - ties
        found = f"{top1:.2%}, {differing} of {figures['positions']} differ{f' beside {ties} near ties' if ties else ''}"
        needed = f"{least:.1%}, at most {allowed} differ"
        checks.append(Check("same choice as the tuned model", found, needed, differing <= allowed))
        nearer = kl < NEARER * kl_base
        found = f"KL {kl:.2g} to the tuned model, the base's {kl_base:.2g}"
        needed = f"less than {NEARER:.0%} of the base's"
        checks.append(Check("differs from the base", found, needed, nearer, against_change=True))
    else:
        kept = figures["gain_kept"]
        gained = figures["loss_base"] > figures["loss_tuned"]
        found = f"{kept:.0%} kept" if gained else "fine-tuning gained nothing on these rows"
        passed = gained and kept >= KEPT_GAIN and too_little is None  # else it would pass by chance
        checks.append(Check("gain on held-out rows", found, f"at least {KEPT_GAIN:.0%}", passed, against_change=True))
    ends, kept_ends = figures["ends_of_turn"], figures["ends_of_turn_kept"]
    checks.append(
        Check(
            "ends its turns",
            f"{kept_ends} of {ends} on held-out rows",
            f"at least {ENDS:.0%} of the tuned model's",
            kept_ends >= ENDS * ends,
        )
    )
    if figures["texts_equal"]:
        ended = figures["ended_where_text_equal"]
        checks.append(Check("stops by itself", "yes" if ended else "no", "where the tuned model does", ended))
    return checks
