"""What a run keeps for whoever opens it."""

import json
from pathlib import Path

from nybble.data.examples import Message
from nybble.options.option import build_options
from nybble.options.verbs import TrainConfig
from nybble.runs.open_run import open_run
from nybble.training.session import train

OWN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' says: ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant says: ' }}{% endif %}"
)


def test_a_run_keeps_the_chat_template_that_it_was_trained_with(tiny_model: Path, tmp_path: Path) -> None:
    """Chat, serve, eval and export open a run so; resuming does the same, and needs the file no more."""
    file = tmp_path / "own.jinja"
    file.write_text(OWN, encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"q {n}", "completion": f"a {n}"}) + "\n" for n in range(12)))
    options = {"model": str(tiny_model), "data": str(rows), "out": str(tmp_path / "run"), "chat_template": str(file)}
    options |= {"max_steps": 2, "save_every": "1", "rows_per_step": 2, "validation_rows": 2, "quality": "absmax"}
    train(build_options(TrainConfig, options))
    file.unlink()

    template = open_run(tmp_path / "run").template
    prompt = "<|im_start|>user says: hi<|im_end|><|im_start|>assistant says: "
    assert template.render([Message("user", "hi")], True) == prompt
    assert template.tokenizer.decode(template.encode_prompt([Message("user", "hi")])) == prompt
    train(build_options(TrainConfig, options | {"resume": True}))
