"""Pictures in what a run over pictures is asked: by the server, in a chat, and by transformers itself."""

import base64
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import FP32, Running, raw
from tiny_multimodal import make_multimodal, make_processor, make_rows
from typed import typed

import nybble
from nybble.errors import DataError
from nybble.runs.open_run import load_run

QUESTION = "Which colour?"
SECOND = "And now?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    options = {"max_steps": 2, "rows_per_step": 4, "rank": 4, "lr": 1e-4, "compute_dtype": "fp32", "eval_every": 2}
    options |= {"allow": ["near-leak"], "validation_fraction": 0.2}
    model = make_multimodal(folder / "model", "qwen2_5_vl")
    nybble.train(model=model, data=make_rows(folder / "rows"), out=folder / "run", **options)
    return folder / "run"


@pytest.fixture(scope="module")
def running(run: Path) -> Iterator[Running]:
    server = Running([run], image_hosts=["pictures.example"])
    yield server
    server.stop()


def file_of(folder: Path, number: int) -> Path:
    return folder / "rows" / f"{number:03}.png"


def data_url(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def asked(*urls: str, words: str = QUESTION) -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": words}]}]


def own_answer(run: Path, turns: list[dict[str, Any]], most: int) -> str:
    """transformers' generation from what its processor makes of the conversation, over the same weights."""
    processor = make_processor("qwen2_5_vl")
    loaded = load_run(run, FP32)
    given = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        ids = loaded.model.generate(
            **given, max_new_tokens=most, do_sample=False, eos_token_id=list(loaded.template.stop_ids), pad_token_id=0
        )
    return processor.tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def picture_turn(file: Path, words: str = QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": str(file)}, {"type": "text", "text": words}]}


def said(role: str, words: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": words}]}


def test_the_servers_answers_are_transformers_own(running: Running, run: Path, folder: Path) -> None:
    client, files = running.client(), [file_of(folder, number) for number in (0, 1)]
    answers = []
    for file in files:
        reply = client.chat.completions.create(model="run", messages=asked(data_url(file)), max_tokens=8)
        answers.append(reply.choices[0].message.content)
        assert answers[-1] == own_answer(run, [picture_turn(file)], 8) and answers[-1]
    assert answers[0] != answers[1], "answers depend on the picture"
    turns = [
        *asked(data_url(files[0])),
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": SECOND},
    ]
    stream = client.chat.completions.create(model="run", messages=turns, max_tokens=8, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    own = [picture_turn(files[0]), said("assistant", answers[0]), said("user", SECOND)]
    assert streamed == own_answer(run, own, 8)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://elsewhere.example/a.png", r"as data:.*Allowed hosts: pictures\.example\. .*--image-hosts"),
        ("file:///etc/passwd", "files are never read"),
        ("/etc/passwd", "files are never read"),
        ("http://pictures.example@elsewhere.example/a.png", "send the picture as data:"),
        ("data:image/png;base64,AAAA", "UnidentifiedImageError"),
        ("data:image/png;base64,%%%", "base64"),
    ],
)
def test_other_addresses_and_broken_pictures_are_refused(running: Running, url: str, message: str) -> None:
    status, body = raw(running, json.dumps({"model": "run", "messages": asked(url), "max_tokens": 4}).encode())
    assert status == 400
    assert re.search(message, body["error"]["message"]), body


def test_pictures_are_the_users(running: Running, folder: Path) -> None:
    turns = [{**turn, "role": "system"} for turn in asked(data_url(file_of(folder, 0)))]
    status, body = raw(running, json.dumps({"model": "run", "messages": turns}).encode())
    assert status == 400 and "pictures are the user's" in body["error"]["message"]
    turns = asked(words="What is <|image_pad|>?")
    status, body = raw(running, json.dumps({"model": "run", "messages": turns}).encode())
    assert status == 400 and "spells <|image_pad|>" in body["error"]["message"]


def test_pictures_are_fetched_from_hosts_that_are_named_and_no_further(folder: Path) -> None:
    from nybble.serving.fetched import Pictures
    from nybble.serving.requests import RequestError

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/on" else 200)
            self.send_header("Location", "/picture")
            self.end_headers()
            self.wfile.write(b"bytes")

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = f"127.0.0.1:{server.server_port}"
        allowed = Pictures({host}, 10)
        assert allowed.stored(f"http://{host}/picture") == b"bytes"
        for pictures, path, message in (
            (allowed, "/on", "302"),
            (Pictures({host}, 4), "/picture", "more than 4 bytes"),
            (Pictures({"127.0.0.1"}, 10), "/picture", "Allowed hosts: 127"),
            (Pictures(), "/picture", "No host is allowed"),
        ):
            with pytest.raises(RequestError, match=message):
                pictures.stored(f"http://{host}{path}")
    finally:
        server.shutdown()
        server.server_close()


def test_a_chat_shows_pictures(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an option with the first message, and typed."""
    first, second = file_of(folder, 0), file_of(folder, 1)
    how = ["--run", run, "--max-new-tokens", "8", "--compute-dtype", "fp32"]
    one = typed(["chat", *how, "--image", first, "--prompt", QUESTION])
    assert own_answer(run, [picture_turn(first)], 8).strip() in one.output
    lines = iter([QUESTION, "/image", f"/image {second}", SECOND, "/image missing.png", "Well?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *prompt: next(lines))
    held = typed(["chat", *how, "--image", first])
    answer = own_answer(run, [picture_turn(first)], 8)
    turns = [picture_turn(first), said("assistant", answer.strip()), picture_turn(second, SECOND)]
    assert own_answer(run, turns, 8).strip() in held.output
    assert "Name a file: /image FILE" in held.output and "missing.png: No such file" in held.output


def test_models_of_text_alone_refuse_pictures(trained: Path, folder: Path, run: Path) -> None:
    named = ["--run", trained, "--image", file_of(folder, 0), "--prompt", "x"]
    assert "reads text alone" in typed(["chat", *named]).output
    with pytest.raises(DataError, match="pictures \\(1\\), and the model reads text alone"):
        nybble.open_run(trained).generate([picture_turn(file_of(folder, 0))])
    merged = nybble.merge(run, out=folder / "merged").folder
    how = ["--model", merged, "--compute-dtype", "fp32", "--max-new-tokens", "4"]
    asked_it = typed(["chat", *how, "--image", file_of(folder, 0), "--prompt", QUESTION])
    assert asked_it.exit_code == 0, asked_it.output
