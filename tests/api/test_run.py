"""Runs, plans and models as objects."""

import threading
from pathlib import Path

import pytest
import torch
from tiny import make_data

import nybble
from nybble.data.preference_rows import PreferenceBatch
from nybble.errors import ConfigError, PlanError


def test_an_opened_run_says_what_the_run_said_and_loads_its_model_once(trained: Path) -> None:
    heard: list[nybble.Event] = []
    run = nybble.open_run(trained, on_event=heard.append)
    assert run.loss_after < run.loss_before and run.config.adapters.rank == 8 and run.adapter == trained / "adapter"
    assert {event["event"] for event in run.events()} >= {"start", "step", "eval", "end"}
    assert not heard, "no weights are read before an answer"
    question = "What is 3 plus 3?"
    answer = run.generate(question, max_new_tokens=8)
    loading = len(heard)
    assert loading and answer == run.generate([{"role": "user", "content": question}], max_new_tokens=8)
    assert len(heard) == loading, "loaded once"
    sampled = [run.generate(question, max_new_tokens=8, temperature=5.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    for mistake in ({"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 2}):
        with pytest.raises(ConfigError):
            run.generate(question, **mistake)
    for prompt in (3, "", [{"who": "me"}]):
        with pytest.raises(ConfigError, match="prompt is"):
            run.generate(prompt)


def test_a_conversation_ends_where_an_answer_is_due(trained: Path) -> None:
    """Behind the assistant's own turn another would be written, as of nobody asked."""
    said = [{"role": "user", "content": "What is 3 plus 3?"}, {"role": "assistant", "content": "It is"}]
    with pytest.raises(ConfigError, match=r"ends in a turn by assistant(.|\n)*continue_final_message"):
        nybble.open_run(trained).generate(said)
    with pytest.raises(ConfigError, match="ends in a turn by system"):
        nybble.open_run(trained).generate([{"role": "system", "content": "Be brief."}])


def test_a_run_trains_in_a_thread_and_its_listener_hears_of_every_step(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """Signals are the main thread's, so nothing is watched for there."""
    heard, done = [], []
    options = {"model": tiny_model, "data": data, "out": tmp_path / "run", "max_steps": 2}
    thread = threading.Thread(target=lambda: done.append(nybble.train(**options, on_event=heard.append)))
    thread.start()
    thread.join()
    (run,) = done
    assert [event.step for event in heard if event.kind == "step"] == [1, 2]
    opened = nybble.open_run(run)
    assert (opened.loss_before, opened.loss_after) == (run.loss_before, run.loss_after)
    again = nybble.train(resume=True, out=run, max_steps=3, allow_change="config")
    assert again.steps == 3


def test_a_plan_is_a_table_and_json_and_refuses_what_does_not_fit() -> None:
    planned = nybble.plan(model="llama-3-8b", machine="rtx-4090", host_memory="16GB")
    assert planned.chosen is not None and planned.chosen not in planned.rejected
    assert planned.to_json()["chosen"]["peak_bytes"] == planned.chosen.peak_bytes
    text = str(planned)
    assert "rows at once" in text and f"predicted memory: {planned.chosen.describe()}" in text
    for plan in planned.rejected:
        assert f"not {plan.strategy}: " in text
    planned.check()
    small = nybble.plan(model="llama-3-8b", memory="500MB", device="cpu")
    assert small.chosen is None and "predicted memory" not in str(small)
    with pytest.raises(PlanError):
        small.check()


def test_rows_of_every_objective_become_batches(tiny_model: Path, tmp_path: Path) -> None:
    source = nybble.open_model(tiny_model)
    pairs = make_data(tmp_path / "pairs.jsonl", [{"ask": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(8)])
    data = nybble.load_data(pairs, source, objective="dpo", prompt_field="ask")
    batch = next(data.batches(rows=3))
    text = data.template.tokenizer.decode(batch.input_ids[0])
    assert isinstance(batch, PreferenceBatch) and text.count("yes") == text.count("no") == 3
    assert text.index("yes") < text.index("no") and len(batch.document_lengths) == 6
    judged = make_data(
        tmp_path / "judged.jsonl", [{"prompt": "?", "completion": f"{n}", "label": n % 2} for n in range(8)]
    )
    batch = next(nybble.load_data(judged, source, objective="kto").batches(rows=4))
    assert isinstance(batch, PreferenceBatch) and batch.desirable is not None and len(batch.desirable) == 4
    with pytest.raises(ConfigError, match="objective"):
        nybble.load_data(judged, source, objective="guess")


def test_adapters_added_after_the_model_was_asked_are_computed(tiny_model: Path, data: Path) -> None:
    source = nybble.open_model(tiny_model)
    batch = next(nybble.load_data(data, source).batches(rows=4))
    model = nybble.load(source, device="cpu")
    before = model.token_losses(batch)
    nybble.add_adapters(model, rank=2, seed=1)
    assert torch.equal(model.token_losses(batch), before), "B begins with zeros"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.equal(model.token_losses(batch), before)
    model.train().loss(batch).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
