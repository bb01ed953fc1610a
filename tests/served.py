"""A server in a thread, and how tests ask it."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import uvicorn

from nybble.data.examples import Message
from nybble.generation.generate import generate
from nybble.options.groups import MachineOptions
from nybble.options.use_groups import ServerOptions
from nybble.runs.open_run import load_run
from nybble.serving.app import Api, make_app
from nybble.serving.engine import Engine, load_models
from nybble.serving.server import allowed_hosts

FP32 = MachineOptions(device="cpu", compute_dtype="fp32")
QUESTION = [{"role": "user", "content": "What is 3 plus 3?"}]
PLAIN = {"model": "run", "messages": QUESTION, "max_tokens": 24}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


class Running:
    """A server in a thread."""

    def __init__(
        self, runs: list[Path], token: str | None = None, max_queue: int = 32, image_hosts: Sequence[str] = ()
    ):
        self.engine = Engine(load_models(runs, FP32), max_queue, threads=1)
        api = Api(self.engine, token, max_new_tokens=64, max_request_bytes=20_000, image_hosts=image_hosts)
        settings = uvicorn.Config(
            make_app(api, allowed_hosts(ServerOptions(run=tuple(runs)))), port=0, log_level="error"
        )
        self.server = uvicorn.Server(settings)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, token: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=token, max_retries=0, timeout=60)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.engine.stop()


def expected(run: Path, tuned: bool = True, max_tokens: int = 24) -> str:
    """The greedy answer of a run loaded by itself."""
    from nybble.layers.convert import enable_adapters

    loaded = load_run(run, FP32)
    enable_adapters(loaded.model, tuned)
    prompt = loaded.template.encode_prompt([Message("user", QUESTION[0]["content"])])
    ids = generate(loaded.model, [prompt], stop_ids=loaded.template.stop_ids, max_new_tokens=max_tokens)[0]
    return loaded.template.tokenizer.decode(ids, skip_special_tokens=True)


def ask(client: openai.OpenAI, model: str, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=QUESTION, **({"max_tokens": 24} | options))


def raw(running: Running, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/v1/chat/completions", body, sent)
    response = connection.getresponse()
    text = response.read()
    return response.status, json.loads(text) if text.startswith(b"{") else {}
