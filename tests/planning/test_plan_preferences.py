"""Plans of runs that learn from preferences: as of so many tokens of examples, and the reference's passes in time."""

from pathlib import Path
from typing import Any

import nybble
from nybble.planning.costs import Part


def plan(model: Path, **options: Any) -> Any:
    sizes = {"max_seq_len": 256, "keep": "everything", "stream_base": "never", "rank": 4, "machine": "rtx-4090"}
    return nybble.plan(model=str(model), **sizes | options).chosen


def test_pairs_take_what_as_many_rows_of_examples_take(tiny_model: Path) -> None:
    """No second model, and nothing beside what examples take: bytes are the same, part by part."""
    examples = plan(tiny_model, rows_per_step=16, micro_batch_size=4)
    pairs = {
        reference: plan(tiny_model, rows_per_step=8, micro_batch_size=2, objective="dpo", reference=reference)
        for reference in ("precomputed", "step")
    }
    assert pairs["precomputed"].components == pairs["step"].components == examples.components
    assert Part.KEPT in examples.components
    assert pairs["precomputed"].step_s == examples.step_s < pairs["step"].step_s < 2 * examples.step_s


def test_ktos_mismatched_answers_take_time(tiny_model: Path) -> None:
    options = {"rows_per_step": 16, "micro_batch_size": 4}
    examples, kto = plan(tiny_model, **options), plan(tiny_model, **options, objective="kto")
    in_step = plan(tiny_model, **options, objective="kto", reference="step")
    assert kto.components == examples.components and examples.step_s < kto.step_s < in_step.step_s
