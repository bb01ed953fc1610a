"""`nybble.evaluate`, `nybble.evaluate_quality` and `nybble.compare`."""

from typing import TYPE_CHECKING, Any

from nybble.api.keywords import RunLike, as_options
from nybble.events import Listener, silent
from nybble.network import fetching
from nybble.options.option import build_options
from nybble.options.verbs import CompareConfig, EvalConfig, EvalQualityConfig

if TYPE_CHECKING:
    from nybble.evaluation.compare_arms import ArmResult
    from nybble.evaluation.compare_methods import MethodsCompared
    from nybble.evaluation.embeddings import TextsCompared
    from nybble.evaluation.evaluate import Evaluation
    from nybble.evaluation.judged import LabelsJudged
    from nybble.evaluation.rewards import PairsJudged


def evaluate(
    run: RunLike | None = None, *, on_event: Listener = silent, **options: Any
) -> "Evaluation | LabelsJudged | PairsJudged | TextsCompared":
    """Compare a run with its base on held-out rows: losses, answers, what was forgotten of general text.

    The report is written to the run's folder `report/`, the model card beside its adapter.

    Args:
        run: what `nybble.train` or `nybble.open_run` returned, or the path of its folder.
        on_event: told what happens, as it happens.
        options: the flags of `nybble eval` with underscores.

    Returns:
        What was measured: `loss(arm)` in nats a supervised token with its interval, `change(arm)`, `score(arm,
        metric)`, for the arms "tuned", "base, as trained on" and "base, 16 bits"; `to_json()` is report.json. Of a run
        that scores texts: `accuracy()`, `macro_f1()`, `classes()`, `confusion`; of a reward model: `accuracy()`,
        `margin()`, `chosen`, `rejected`; of one that embeds texts: `figures()`, of base and tuned model.

    Raises:
        NybbleError: there is no such run, its base is another now, or there are no rows to judge it by.

    Example:
        >>> found = nybble.evaluate(run, answers=1)
        >>> found.loss("tuned").value < found.loss("base, as trained on").value
        True
    """
    config = build_options(EvalConfig, as_options({"run": run} | options))
    from nybble.evaluation.evaluate import evaluate as run_evaluation

    return run_evaluation(config, on_event)


def evaluate_quality(*, on_event: Listener = silent, **options: Any) -> "list[ArmResult]":
    """Compare ways of putting a model into four bits with the 16-bit model.

    Args:
        on_event: told what happens, as it happens.
        options: the flags of `nybble eval quality` with underscores. `model` and `data` are needed.

    Returns:
        For each of `arms`: `quality` (KL divergence and loss in nats, how often the likeliest token is the same),
        `bits_per_weight`, `seconds`.

    Raises:
        NybbleError: an option is wrong, the model is in few bits already, or there are no held-out rows.

    Example:
        >>> (arm,) = nybble.evaluate_quality(model=tiny, data="rows.jsonl", arms="nf4:absmax")
        >>> arm.arm, arm.quality.kl_mean > 0
        ('nf4:absmax', True)
    """
    config = build_options(EvalQualityConfig, as_options(options))
    from nybble.evaluation.compare_arms import compare_arms

    with fetching(not config.model.offline):
        return compare_arms(config, on_event)


def compare(*, on_event: Listener = silent, **options: Any) -> "MethodsCompared":
    """Compare full fine-tuning, LoRA over 16 bits and QLoRA on a model and examples, by short runs of equal tokens.

    Each method trains in a process of its own, in a folder of its own below `out`. Called again with the same options
    it goes on where it was interrupted; what is finished stays.

    Args:
        on_event: told what happens, as it happens.
        options: the flags of `nybble compare` with underscores. `model`, `data` and `out` are needed.

    Returns:
        For each method in `results`: memory at the peak, planned and measured, tokens a second, held-out losses in nats
        before and after, `retention` of what full fine-tuning gained, bytes of what it leaves. What does not fit is in
        `left_out`, with the reason; `interrupted` is a signal that ended it early. `comparison.json` and
        `comparison.png` are in `out`.

    Raises:
        NybbleError: an option is wrong, or `out` holds a comparison with others.

    Example:
        >>> found = nybble.compare(model=tiny, data="rows.jsonl", out="compared", methods="lora", max_steps=2)
        >>> [(result.method, result.loss_after < result.loss_before) for result in found.results]
        [('lora', True)]
    """
    config = build_options(CompareConfig, as_options(options))
    from nybble.evaluation.compare_methods import compare_methods

    with fetching(not config.model.offline):
        return compare_methods(config, on_event)
