"""Who is let in, who waits, what breaks off and what is told of it; starting."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from served import FP32, QUESTION, Running, ask, expected, raw

from nybble.errors import ConfigError, RunError
from nybble.formats.quant_spec import BaseFormats, QuantSpec
from nybble.options.use_groups import ServerOptions
from nybble.runs.open_run import OpenRun
from nybble.serving import engine as engine_module
from nybble.serving.engine import load_models
from nybble.serving.server import allowed_hosts, choose_token


def test_guards(running: Running) -> None:
    body = json.dumps({"model": "run", "messages": QUESTION, "max_tokens": 2}).encode()
    assert raw(running, body)[0] == 200
    assert raw(running, body, Host="evil.example")[0] == 400
    assert raw(running, body, Host="localhost:1234")[0] == 200
    assert raw(running, body, Content_Type="text/plain")[0] == 415
    assert raw(running, b" " * 20_001 + body)[0] == 413
    assert raw(running, b"{")[0] == 400
    assert raw(running, b"[" * 15_000)[0] == 400
    assert raw(running, b'{"model": "run", "messages": [{"role": "user", "content": "\\ud800"}]}')[0] in (200, 400)
    assert raw(running, body)[0] == 200


def test_a_token_keeps_others_out(trained: Path) -> None:
    server = Running([trained], token="secret")
    try:
        for wrong in ("none", "secre", "secret2", "sécret"):
            body = json.dumps({"model": "run", "messages": QUESTION}).encode()
            assert raw(server, body, Authorization=f"Bearer {wrong}".encode().decode("latin-1"))[0] == 401
        with pytest.raises(openai.AuthenticationError):
            list(server.client("wrong").models.list())
        assert ask(server.client("secret"), "run", max_tokens=2).choices
    finally:
        server.stop()


def test_a_full_queue_answers_429(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def wait(*args: Any, on_token: Any, **options: Any) -> None:
        assert go_on.wait(30)
        on_token(0, 70)

    server = Running([trained], max_queue=2)
    monkeypatch.setattr(engine_module, "generate", wait)
    try:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, server.client(), "run") for _ in range(2)]
            deadline = time.monotonic() + 20
            while server.engine._room._value and time.monotonic() < deadline:  # type: ignore[attr-defined]
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError):
                ask(server.client(), "run")
            go_on.set()
            assert all(answer.result().choices for answer in waiting)
        assert ask(server.client(), "run").choices
    finally:
        go_on.set()
        server.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_computation(
    trained: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    given = []

    def endless(*args: Any, on_token: Any, **options: Any) -> None:
        for token in range(3000):
            given.append(token)
            on_token(0, 70)
            time.sleep(0.01)

    server = Running([trained])
    monkeypatch.setattr(engine_module, "generate", endless)
    try:
        body = json.dumps({"model": "run", "messages": QUESTION, "stream": stream}).encode()
        connection = socket.create_connection(("127.0.0.1", server.port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while len(given) < 5:
            time.sleep(0.01)
        connection.close()
        monkeypatch.undo()
        assert ask(server.client(), "run").choices[0].message.content
        assert len(given) < 2000
    finally:
        server.stop()


def test_a_stream_that_breaks_off_is_told_without_details_and_logged(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks_off(*args: Any, on_token: Any, **options: Any) -> None:
        on_token(0, 40)
        on_token(0, 41)
        raise RuntimeError("secret path /home/me")

    server = Running([trained])
    monkeypatch.setattr(engine_module, "generate", breaks_off)
    try:
        with pytest.raises(openai.APIError) as failure:
            list(ask(server.client(), "run", stream=True))
        assert "secret path" not in failure.value.message and "log says why" in failure.value.message
        assert "secret path" in caplog.text
    finally:
        server.stop()


def test_a_failure_is_told_without_details(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret path /home/me")

    server = Running([trained])
    monkeypatch.setattr(engine_module, "generate", broken)
    try:
        with pytest.raises(openai.InternalServerError) as failure:
            ask(server.client(), "run")
        assert "secret path" not in failure.value.message
        monkeypatch.undo()
        assert ask(server.client(), "run").choices
    finally:
        server.stop()


def storm(clients: list[openai.OpenAI], right: dict[str, str], requests: int) -> None:
    """Concurrent clients, one of whom leaves mid-stream each round; every answer must be its model's own."""

    def client_rounds(number: int) -> int:
        client, name = clients[number], list(right)[number % len(right)]
        for round_number in range(requests):
            if round_number % len(clients) == number:
                stream = ask(client, name, stream=True)
                next(iter(stream))
                stream.close()
            elif number % 2:
                assert ask(client, name).choices[0].message.content == right[name]
            else:
                chunks = ask(client, name, stream=True)
                assert "".join(c.choices[0].delta.content or "" for c in chunks) == right[name]
        return requests

    with ThreadPoolExecutor(len(clients)) as pool:
        assert list(pool.map(client_rounds, range(len(clients)))) == [requests] * len(clients)


def test_concurrent_clients(running: Running, trained: Path, second: Path) -> None:
    storm([running.client() for _ in range(4)], {"run": expected(trained), "other": expected(second)}, requests=6)


@pytest.mark.slow
def test_many_concurrent_clients_leave_memory_flat(running: Running, trained: Path, second: Path) -> None:
    from nybble.memory.measure import anonymous_bytes

    right = {"run": expected(trained), "other": expected(second)}
    clients = [running.client() for _ in range(16)]  # made once: each keeps a megabyte of its own in this process
    started, held = time.perf_counter(), [anonymous_bytes()]
    for _ in range(5):
        storm(clients, right, requests=10)
        held.append(anonymous_bytes())
    seconds, (_, *grown) = time.perf_counter() - started, [(b - a) / 1e6 for a, b in pairwise(held)]
    print(f"800 requests in {seconds:.0f} s; MB more after each 160 but the first: {grown}")
    assert max(grown) < 3, "a kilobyte a request is the heap's; what a request holds is more"


# ---- starting ------------------------------------------------------------------------------------


def options(**given: Any) -> ServerOptions:
    return ServerOptions(run=["r"], **given)


def test_open_addresses_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NYBBLE_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert choose_token(options(host=host)) is None
    for host in ("0.0.0.0", "192.168.1.4", "example.org", "::"):
        with pytest.raises(ConfigError, match="no token"):
            choose_token(options(host=host))
        assert choose_token(options(host=host, token="t")) == "t"
    monkeypatch.setenv("NYBBLE_TOKEN", "from the environment")
    assert choose_token(options(host="0.0.0.0")) == "from the environment"


def test_names_that_clients_may_use() -> None:
    assert allowed_hosts(options()) == ["localhost", "127.0.0.1", "::1"]
    assert "nas.local" in allowed_hosts(options(host="0.0.0.0", allow_host="nas.local, nas"))
    assert "0.0.0.0" not in allowed_hosts(options(host="0.0.0.0"))


def test_runs_of_other_layer_formats_are_not_served_together(
    trained: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which layers have how many bits is measured on each run's own rows, so the options alone do not say it."""
    formats = {"run": BaseFormats(), second.name: BaseFormats(QuantSpec("nf3"))}
    monkeypatch.setattr(OpenRun, "formats", property(lambda opened: formats[opened.run.path.name]))
    with pytest.raises(RunError, match="other formats of its layers"):
        load_models([trained, second], FP32)


def test_runs_of_other_bases_or_names_are_not_served_together(trained: Path, make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="share their base"):
        load_models([trained, make_run()], FP32)
    with pytest.raises(RunError, match="Two runs are named run"):
        load_models([trained, trained], FP32)
    assert torch.get_num_threads() >= 1
