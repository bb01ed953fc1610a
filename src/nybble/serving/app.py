"""The web application: OpenAI's /v1/chat/completions, /v1/completions and /v1/models over an `Engine`.

Guards, outermost first: the Host header must name this server (a page in a browser could else reach it through a
name of its own: DNS rebinding), the token where one is set, JSON only (which no form can send), and limits on bytes,
prompt and answer. A client that leaves ends its computation.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nybble.data.answer_forms import Schemas
from nybble.data.template import ChatTemplate
from nybble.errors import NybbleError
from nybble.generation.text_pieces import TextPieces
from nybble.layers.context import context_length
from nybble.serving.answers import Delta, MixedAnswer, PlainAnswer, Reader, joined
from nybble.serving.engine import Engine, QueueFull, ServedModel, as_error
from nybble.serving.fetched import Pictures
from nybble.serving.requests import ChatRequest, CompletionFields, RequestError, TextRequest, parse

RETRY_AFTER_S = 1
NOTHING: Mapping[str, Any] = {}
LOG = logging.getLogger(__name__)


class Api:
    """The endpoints.

    Args:
        token: that clients must send, None where none is needed.
        max_new_tokens: most tokens in an answer.
        max_request_bytes: of a body, and of a picture that is fetched.
        image_hosts: that pictures are fetched from.
    """

    def __init__(
        self,
        engine: Engine,
        token: str | None,
        max_new_tokens: int,
        max_request_bytes: int,
        image_hosts: Sequence[str] = (),
    ):
        self.engine, self.token = engine, token
        self._pictures = Pictures(frozenset(map(str.lower, image_hosts)), max_request_bytes)
        self._reading = asyncio.Lock()
        self.max_new_tokens, self.max_request_bytes = max_new_tokens, max_request_bytes
        self.started = int(time.time())

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._check_token(request)
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self.engine.models]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        self._check_token(request)
        return JSONResponse(self._entry(self._model(request.path_params["name"]).name))

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "nybble"}

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = parse(await self._body(request), ChatRequest)
        served = self._model(asked.model)
        template = served.template
        if asked.has_pictures:
            async with self._reading:  # they are fetched and decoded beside the loop that serves clients
                prompt, beside = await asyncio.to_thread(_encoded, template, asked, self._pictures)
        else:  # in the main thread, where a template's time is limited
            prompt, beside = _encoded(template, asked, self._pictures)
        form = template.answer_form
        reader: Reader = PlainAnswer()
        if form.thought is not None or form.calls is not None or form.words:
            marks = template.encoder.special_tokens
            schemas = _types(asked.schemas()) if asked.schemas() else None
            reader = MixedAnswer(form, schemas, asked.continue_final_message, marks)
        return await self._complete(request, asked, served, prompt, ChatForm, reader, beside)

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = parse(await self._body(request), TextRequest)
        served = self._model(asked.model)
        prompt = _bare_prompt(served, asked.prompt)
        return await self._complete(request, asked, served, prompt, TextForm, PlainAnswer())

    async def _complete(
        self,
        request: Request,
        asked: CompletionFields,
        served: ServedModel,
        prompt: list[int],
        form: "type[_Form]",
        reader: Reader,
        beside: Mapping[str, Any] = NOTHING,
    ) -> Response:
        _check_ids(served, "stop_token_ids", asked.stop_token_ids)
        limit = self._limit(served, prompt)
        wanted = asked.limit() or limit
        asking = (min(limit, wanted), asked.sampling(), asked.stop_token_ids)
        tokens = self.engine.answer(served, prompt, *asking, beside)
        answer = Answer(tokens, served, asked.stop, min(limit, wanted), marks=isinstance(reader, MixedAnswer))
        warnings = [f"{wanted} new tokens were asked for; this answer may have {limit}."] if wanted > limit else []
        shown = form(asked.model, len(prompt), answer, reader, warnings)
        pieces = answer.pieces()
        first = await anext(pieces, None)  # what can be refused is refused before a stream begins
        if asked.stream:
            lines = shown.stream(first, pieces, asked.stream_options.include_usage)
            return StreamingResponse(lines, media_type="text/event-stream")
        deltas = reader.add(first or "")
        async with aclosing(pieces):
            async for piece in pieces:
                deltas += reader.add(piece)
                if await request.is_disconnected():
                    raise ClientDisconnect
        return JSONResponse(shown.whole([*deltas, *reader.finish()]))

    def _limit(self, served: ServedModel, prompt: Sequence[int]) -> int:
        """Most tokens that an answer to the prompt may have."""
        context = context_length(served.model.config)
        room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(prompt))
        if not prompt or room < 1:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens; with an answer it must fit into the model's context, {context}.",
                code="context_length_exceeded",
            )
        return room

    def _model(self, name: str) -> ServedModel:
        if name not in self.engine.models:
            known = ", ".join(self.engine.models)
            raise RequestError(f"There is no model {name!r}. Models: {known}.", 404, "model_not_found")
        return self.engine.models[name]

    async def _body(self, request: Request) -> bytes:
        self._check_token(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(f"The content type is {kind!r}; application/json is needed.", 415)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_request_bytes:
                most = f"The body has more than {self.max_request_bytes} bytes"
                raise RequestError(f"{most}, which `nybble serve --max-request-bytes` allows.", 413)
        return bytes(body)

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.token.encode()):
            raise RequestError("The token is missing or wrong.", 401, "invalid_api_key")


class Answer:
    """Text from tokens, as it comes: whole characters, up to a stop string.

    Args:
        marks: special tokens are text too.
    """

    def __init__(
        self,
        tokens: AsyncGenerator[int, None],
        served: ServedModel,
        stops: Sequence[str],
        limit: int,
        marks: bool = False,
    ):
        self._tokens, self._stops, self._limit = tokens, stops, limit
        self._text = TextPieces(served.template.tokenizer, marks)
        self._found_stop = False

    @property
    def num_tokens(self) -> int:
        return len(self._text.ids)

    @property
    def finish_reason(self) -> str:
        return "length" if self.num_tokens == self._limit and not self._found_stop else "stop"

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Text to show; what could be the beginning of a stop string is held back until it is clear."""
        held = ""
        async with aclosing(self._tokens):
            async for token in self._tokens:
                held += self._text.add(token)
                if (cut := _first_of(held, self._stops)) is not None:
                    self._found_stop = True
                    yield held[:cut]
                    return
                keep = _possible_stop(held, self._stops)
                if shown := held[: len(held) - keep]:
                    held = held[len(held) - keep :]
                    yield shown
        held += self._text.rest()
        if (cut := _first_of(held, self._stops)) is not None:
            self._found_stop, held = True, held[:cut]
        if held:
            yield held


def _first_of(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins, None where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of the text that a stop string may begin with."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


class _Form:
    """How an answer is put into OpenAI's objects.

    Args:
        reader: of the answer's pieces.
        warnings: what was done otherwise than asked for; a key of its own, where there are any.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, prompt_tokens: int, answer: Answer, reader: Reader, warnings: Sequence[str]):
        self.answer, self.reader, self.prompt_tokens, self._warnings = answer, reader, prompt_tokens, warnings
        self.common = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self) -> dict[str, int]:
        new = self.answer.num_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}

    @property
    def warnings(self) -> dict[str, Any]:
        said = [*self._warnings, *self.reader.warnings]
        return {"warnings": said} if said else {}

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.reader.found_calls else self.answer.finish_reason

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": self.finish_reason, "logprobs": None} | self.content(deltas)
        return {"object": self.kind, **self.common, "choices": [choice], "usage": self.usage(), **self.warnings}

    async def stream(
        self, first: str | None, pieces: AsyncGenerator[str, None], with_usage: bool
    ) -> AsyncGenerator[str, None]:
        """Server-sent events. An error after the stream began becomes its last event."""
        try:
            async with aclosing(pieces):
                for opening in self.opening():
                    yield self._event(opening, None)
                for delta in self.reader.add(first or ""):
                    yield self._event(self.delta(delta), None)
                async for piece in pieces:
                    for delta in self.reader.add(piece):
                        yield self._event(self.delta(delta), None)
                for delta in self.reader.finish():
                    yield self._event(self.delta(delta), None)
        except Exception as error:
            if not isinstance(error, NybbleError):
                LOG.exception("an answer broke off")  # the response has begun: nothing else would say so
            yield _line({"error": {"message": as_error(error), "type": "server_error"}})
            return
        yield self._event(self.delta({}), self.finish_reason, self.warnings)
        if with_usage:
            yield _line({"object": self.chunk_kind, **self.common, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def _event(self, content: dict[str, Any], finish_reason: str | None, more: Mapping[str, Any] = NOTHING) -> str:
        choice = {"index": 0, "finish_reason": finish_reason, "logprobs": None} | content
        return _line({"object": self.chunk_kind, **self.common, "choices": [choice], **more})

    def content(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        return []


class ChatForm(_Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        return {"message": joined(deltas)}

    def delta(self, delta: Delta) -> dict[str, Any]:
        return {"delta": delta}

    def opening(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]


class TextForm(_Form):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def content(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        return {"text": joined(deltas)["content"]}

    def delta(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.get("content", "")}


def _encoded(template: ChatTemplate, asked: ChatRequest, pictures: Pictures) -> tuple[list[int], Mapping[str, Any]]:
    """A conversation's tokens, and what the model is given of its pictures."""
    turns, tools = asked.conversation(pictures.stored), asked.schemas()
    if not asked.continue_final_message:
        return template.asked(turns, tools)
    if any(turn.pictures for turn in turns):
        raise RequestError("continue_final_message is for conversations without pictures.")
    return template.encode_continued(turns, tools), NOTHING


def _types(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """The schemas of each tool's parameters."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), dict)]
    parameters = {f.get("name", ""): f.get("parameters") for f in functions}
    named = {name: own.get("properties") for name, own in parameters.items() if isinstance(own, dict)}
    return {name: properties for name, properties in named.items() if isinstance(properties, dict)}


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _bare_prompt(served: ServedModel, prompt: str | list[int] | list[str]) -> list[int]:
    """Token ids of a text without a template, with the beginning-of-sequence token where the tokenizer puts one."""
    if isinstance(prompt, str):
        return served.template.encode_text(prompt)
    ids = [token for token in prompt if isinstance(token, int)]
    _check_ids(served, "prompt", ids)
    return ids


def _check_ids(served: ServedModel, key: str, ids: Sequence[int]) -> None:
    rows = served.model.get_input_embeddings().num_embeddings
    if any(not 0 <= token < rows for token in ids):
        raise RequestError(f"{key} holds a token id outside 0 to {rows - 1}.")


def make_app(api: Api, hosts: Sequence[str]) -> Starlette:
    """The application; `hosts` are the names that clients may reach it by."""
    routes = [
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.one_model, methods=["GET"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.text, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[..., Any]] = {
        RequestError: _refused,
        QueueFull: _queue_full,
        NybbleError: _refused,
        ClientDisconnect: _gone,
    }
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)]
    return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)


async def _refused(request: Request, error: Exception) -> Response:
    status, code = (error.status, error.code) if isinstance(error, RequestError) else (400, None)
    return _error(str(error), status, code)


async def _queue_full(request: Request, error: Exception) -> Response:
    response = _error("Too many requests are waiting.", 429, "rate_limit_exceeded")
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _error(message: str, status: int, code: str | None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(content, status_code=status)
