"""Learning from pictures within texts: tokens, losses and gradients against transformers, whole runs, what others read
of them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import put_into_four_bits, tune
from tiny_multimodal import KINDS, make_multimodal, make_processor, make_rows, picture, row_of, write_rows
from typed import typed

from nybble.data.open_template import open_template
from nybble.data.picture_reader import PicturedRow
from nybble.data.prepare import prepare
from nybble.layers.convert import adapters_of, quantizable_linears
from nybble.layers.pictured_lm import reading
from nybble.options.groups import RowOptions
from nybble.sources.load import load_model
from nybble.sources.open import open_model
from nybble.sources.task import PICTURED

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava", "qwen3_vl", "idefics3", "gemma3")]
LAYOUTS = {"llava": "packed", "idefics3": "packed", "qwen2_5_vl": "packed", "qwen3_vl": "packed", "gemma3": "padded"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """models(kind) -> its folder, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_multimodal(root / kind, kind)
        return made[kind]

    return model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one picture, of two, of none, and of several turns."""
    folder = tmp_path_factory.mktemp("mixed")
    rows: list[Any] = []
    for number, colour in enumerate(("red", "green", "blue")):
        picture(colour, number).save(folder / f"{number}.png")
        rows.append(row_of([f"{number}.png"], f"Which colour{' is it' * number}?", colour))
    rows.append(row_of(["0.png", "2.png"], "Both?", "red and blue"))
    turns = row_of(["1.png"], "And this?", "green")["messages"]
    rows.append({"messages": [*turns, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]})
    rows.append({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]})
    return write_rows(folder / "rows.jsonl", rows)


def encoded(folder: Path, data: Path, **more: Any) -> list[Any]:
    source = open_model(str(folder))
    template = open_template(RowOptions(), source.load_tokenizer(), reader=source.picture_reader)
    prepared = prepare(str(data), template, max_seq_len=512, validation_fraction=0, **more)
    assert not [found for found in prepared.audit.findings if found.level == "error"], prepared.audit.findings
    return list(prepared.train)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_processors_own(kind: str, models: Any, mixed: Path) -> None:
    processor = make_processor(kind)
    rows = encoded(models(kind), mixed)
    written = [json.loads(line)["messages"] for line in mixed.read_text().splitlines()]
    assert len(rows) == len(written)
    by_origin = {int(row.origin.partition(":")[2]): row for row in rows}
    for number, messages in enumerate(written, 1):
        for turn in messages:
            said = [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
            turn["content"] = [
                part | {"image": str(mixed.parent / part["image"])} if "image" in part else part for part in said
            ]
        theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        row, ids = by_origin[number], torch.tensor(theirs["input_ids"][0])
        assert torch.equal(row.input_ids.long(), ids)
        answers = [turn["content"][0]["text"] + "<|im_end|>" for turn in messages if turn["role"] == "assistant"]
        assert processor.tokenizer.decode(row.input_ids[row.supervised]) == "".join(answers)
        assert isinstance(row, PicturedRow) == any("image" in part for turn in messages for part in turn["content"])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "gemma3", *SLOW[1:3]])
def test_losses_and_gradients_are_the_models_own(kind: str, models: Any, mixed: Path) -> None:
    """In four bits, of rows together, against transformers' own loss of each alone."""
    from transformers import AutoModelForImageTextToText

    source = open_model(str(models(kind))).for_task(PICTURED)
    rows = encoded(models(kind), mixed)
    model = load_model(source, None, torch.float32)
    theirs = AutoModelForImageTextToText.from_pretrained(models(kind)).eval()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) or "embed" in name or "lm_head" in name
    language = quantizable_linears(model)
    assert len(language) == 14 and not [name for name in language if "vis" in name]
    put_into_four_bits(model)
    tune(model)
    ours = reading(source.picture_reader).of(model)
    assert ours.verdict.path == "generic"
    assert ours.backbone.layout == LAYOUTS[kind], ours.verdict
    parameters = [p for adapter in adapters_of(model).values() for p in (adapter.lora_A, adapter.lora_B)]
    batch = source.picture_reader.collate(rows, ours.packed)
    loss = ours.loss(batch)
    found = torch.autograd.grad(loss, parameters)
    processor, total, count = make_processor(kind), 0.0, 0
    for row in rows:
        labels = row.input_ids.long().masked_fill(~row.supervised, -100)[None]
        alone = source.picture_reader.inputs([row])
        if getattr(processor, "return_mm_token_type_ids", False):
            name = "token_type_ids" if kind == "gemma3" else "mm_token_type_ids"
            alone[name] = torch.isin(row.input_ids, torch.tensor(processor.image_token_ids).int()).long()[None]
        targets = int((labels[:, 1:] != -100).sum())
        total = total + model(input_ids=row.input_ids.long()[None], labels=labels, **alone).loss * targets
        count += targets
    own = torch.autograd.grad(total / count, parameters)
    assert loss.detach().item() == pytest.approx(float((total / count).detach()), rel=1e-5)
    ours_flat, own_flat = (torch.cat([g.flatten() for g in each]) for each in (found, own))
    assert float((ours_flat - own_flat).norm() / own_flat.norm()) < 1e-5


# ---- whole runs


STEPS = 6


def fine_tune(model: Path, data: Path, out: Path, **more: Any) -> Path:
    from nybble.options.verbs import load_config
    from nybble.training.session import train

    options = {"model": str(model), "data": str(data), "out": str(out), "max_steps": STEPS, "rows_per_step": 4}
    options |= {"rank": 4, "lr": 1e-2, "eval_every": STEPS, "save_every": 3, "keep_checkpoints": 9}
    options |= {"compute_dtype": "fp32", "validation_fraction": 0.2, "allow": ("near-leak",)}
    train(load_config(None, options | more))
    return out


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def runs(models: Any, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """runs(kind) -> the folder of a run over it, made once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = fine_tune(models(kind), colours, root / kind, memory="4GB")
        return made[kind]

    return run


@pytest.mark.parametrize("kind", ["qwen2_5_vl", *SLOW])
def test_a_run_learns_and_goes_on_to_the_bit(kind: str, runs: Any) -> None:
    import shutil

    from short_runs import resume, tensors_after

    from nybble.runs.events import read_events

    out = runs(kind)
    first, last = read_events(out / "events.jsonl", "eval")
    assert last["loss"] < first["loss"]
    whole = tensors_after(out, STEPS)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS}")
    resume(out)
    assert tensors_after(out, STEPS) == whole
    assert json.loads((out / "task.json").read_text())["kind"] == "pictured"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", *SLOW])
def test_peft_gives_the_same_logits(kind: str, runs: Any, adapters: int = 14) -> None:
    import peft
    from transformers import AutoImageProcessor

    from nybble.evaluation.evaluation_rows import evaluation_rows
    from nybble.exporting.consumers import widen
    from nybble.runs.open_run import load_frozen, load_tuned, open_run

    opened = open_run(runs(kind))
    tuned, base = (load(opened, torch.float32, torch.device("cpu")) for load in (load_tuned, load_frozen))
    widen(base)
    theirs = peft.PeftModel.from_pretrained(base, opened.run.adapter).eval()
    adapted = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == adapters and any("vis" in name for name in adapted) == (adapters > 14)
    ours = opened.computed_by.of(tuned)
    row = evaluation_rows(opened)[0]
    batch = ours.collate([row])
    ids = {"input_ids": row.input_ids.long()[None]}
    with torch.no_grad():
        found = ours.logits(batch, torch.arange(len(row)))
        torch.testing.assert_close(theirs(**ids, **ours.beside(row)).logits[0], found, atol=1e-4, rtol=1e-4)
    assert AutoImageProcessor.from_pretrained(opened.run.adapter, backend="pil").size


def test_an_answer_to_a_picture_is_transformers_own(runs: Any, colours: Path) -> None:
    import nybble
    from nybble.errors import ConfigError
    from nybble.runs.open_run import load_tuned, open_run

    opened, processor = open_run(runs("qwen2_5_vl")), make_processor("qwen2_5_vl")
    turns = row_of([str(colours.parent / "001.png")], "Which colour, 1?", "")["messages"][:1]
    answer = nybble.open_run(opened.run.path, compute_dtype="fp32").generate(turns, max_new_tokens=6)
    inputs = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    model = load_tuned(opened, torch.float32, torch.device("cpu"))
    theirs = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(theirs, skip_special_tokens=True)
    with pytest.raises(ConfigError, match="nowhere"):
        nybble.open_run(opened.run.path).generate(row_of(["nowhere.png"], "Which?", "")["messages"][:1])


@pytest.mark.slow
def test_both_towers_are_adapted_where_that_is_asked_for(models: Any, colours: Path, tmp_path: Path) -> None:
    import nybble
    from nybble.errors import ConfigError
    from nybble.runs.adapter_files import StoredAdapter

    out = fine_tune(models("llava"), colours, tmp_path / "all", quantize_towers="all")
    assert len(StoredAdapter(out / "adapter").names) == 14 + 12
    test_peft_gives_the_same_logits("llava", lambda kind: out, adapters=26)
    merged = nybble.merge(out, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    more = {"adapter": str(out / "adapter"), "quantize_towers": "all", "max_steps": 1, "eval_every": 1}
    assert (fine_tune(models("llava"), colours, tmp_path / "on", **more) / "adapter").is_dir()
    texts = write_rows(tmp_path / "t.jsonl", [{"prompt": f"a {n}", "completion": "b"} for n in range(20)])
    with pytest.raises(ConfigError, match="no row has a picture"):
        fine_tune(models("llava"), texts, tmp_path / "texts", quantize_towers="all")
    alone = fine_tune(models("llava"), texts, tmp_path / "texts", max_steps=1, eval_every=1)
    assert not (alone / "task.json").exists(), "rows of text are learnt by the language model alone"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_evaluated_and_merged(kind: str, runs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    import nybble
    from nybble.errors import ExportError

    out = runs(kind)
    judged: Any = nybble.evaluate(out)
    assert judged.loss("tuned").value < judged.loss("base, as trained on").value
    merged = nybble.merge(out, out=tmp_path / "merged")
    assert merged.outcome == "verified", merged.verification
    assert "quantize_towers" not in json.loads((merged.folder / "config.json").read_text())
    _, told = AutoModelForImageTextToText.from_pretrained(merged.folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with pytest.raises(ExportError, match="reads pictures"):
        nybble.export(out, to="gguf", out=tmp_path / "gguf")


def test_rows_with_pictures_are_refused_where_text_is_read(models: Any, colours: Path, runs: Any) -> None:
    import nybble
    from nybble.data.calibration_text import read_calibration_file
    from nybble.errors import ConfigError, DataError, ModelError
    from nybble.evaluation.samples import compare_answers
    from nybble.runs.open_run import load_tuned, open_run

    source = open_model(str(models("llava")))
    with pytest.raises(ConfigError, match="Rows have pictures"):
        nybble.load_data(str(colours), source, allow=["near-leak"])
    template = open_template(RowOptions(), source.load_tokenizer(), reader=source.picture_reader)
    with pytest.raises(DataError, match="a row with pictures"):
        read_calibration_file(str(colours), template)
    opened = open_run(runs("qwen2_5_vl"))
    model, rows = load_tuned(opened, torch.float32, torch.device("cpu")), encoded(models("qwen2_5_vl"), colours)[:2]
    (sample, _) = compare_answers(model, opened.template, rows, max_new_tokens=4)
    turns = row_of([str(colours.parent / "000.png")], "Which colour, 0?", "")["messages"][:1]
    assert sample.reference == "red"
    assert (
        sample.tuned == nybble.open_run(opened.run.path, compute_dtype="fp32").generate(turns, max_new_tokens=4).strip()
    )
    with pytest.raises(ModelError, match="reads texts and pictures, and objective is dpo"):
        nybble.plan(model=models("qwen2_5_vl"), objective="dpo")
    for name, given in {"init": "pissa", "neftune_alpha": 5.0, "quality": "calibrated"}.items():
        with pytest.raises(ConfigError, match=r"pictures"):
            fine_tune(models("llava"), colours, colours.parent / "refused", **{name: given})


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_model_is_asked_about_texts_whole_where_its_language_model_has_no_class(models: Any, kind: str) -> None:
    asked = typed(["chat", "--model", models(kind), "--prompt", "Hello", "--max-new-tokens", "2"])
    assert asked.exit_code == 0, asked.output


def test_a_plan_counts_pixels_and_the_tower(models: Any, colours: Path) -> None:
    import nybble
    from nybble.planning.shape import tower_of

    source = open_model(str(models("llava"))).for_task(PICTURED)
    shape = tower_of(source.skeleton)
    assert shape is not None and (shape.patch_values, shape.width, shape.num_layers, shape.patches) == (48, 64, 2, 16)
    more = {"data": str(colours), "memory": "4GB", "allow": ["near-leak"], "rows_per_step": 4, "micro_batch_size": 2}
    plan: Any = nybble.plan(model=models("llava"), **more).chosen
    assert plan.batches.picture_values == 2 * 3 * 16 * 16 and plan.batches.step_picture_values == 4 * 3 * 16 * 16
    states = 2 * 16 * (64 * 3 + 2 * 64)  # of all blocks, and as the language model takes them
    itemsize = (plan.components["pictures"] - 4 * plan.batches.step_picture_values) / states
    assert itemsize in (2, 4)


@pytest.mark.slow
def test_what_putting_each_tower_into_four_bits_costs(models: Any, colours: Path) -> None:
    from nybble.errors import ConfigError
    from nybble.evaluation.compare_arms import compare_arms
    from nybble.options.option import build_options
    from nybble.options.verbs import EvalQualityConfig

    given = {"model": str(models("llava")), "data": str(colours), "compute_dtype": "fp32", "allow": ["near-leak"]}
    given |= {"validation_fraction": 0.2}
    language, vision, whole = compare_arms(build_options(EvalQualityConfig, given))
    assert [arm.arm for arm in (language, vision, whole)] == [f"nf4:absmax:{t}" for t in ("language", "vision", "all")]
    assert whole.bits_per_weight < min(language.bits_per_weight, vision.bits_per_weight)
    assert vision.quality.kl_mean > 0 and 0 < language.quality.kl_mean < 2 * whole.quality.kl_mean
    with pytest.raises(ConfigError, match="not calibrated"):
        compare_arms(build_options(EvalQualityConfig, given | {"arms": "nf4:calibrated"}))


@pytest.mark.slow
def test_colours_are_told_apart(models: Any, tmp_path: Path) -> None:
    """Of pictures of one of four colours, each of a shade and a size of its own; the base's weights are random."""
    import nybble

    data = make_rows(tmp_path / "pictures", 160, seed=0)
    more = {"max_steps": 160, "eval_every": 160, "save_every": 160, "rank": 16, "rows_per_step": 8}
    out = fine_tune(models("llava"), data, tmp_path / "run", **more, lr=5e-3)
    judged: Any = nybble.evaluate(out, answers=32)
    score = judged.score("tuned", "exact")
    print(judged.score("base, as trained on", "exact").value, score.value, judged.loss("tuned").value)
    assert score.value > 0.8, score
