"""What clients may ask: the bodies of OpenAI's two completion endpoints, checked.

Source: https://platform.openai.com/docs/api-reference, and for what it does not have, vLLM's. A key is honoured, or it
cannot change an answer, or it has the value that asks for nothing; every other one is refused by name. A null stands
for the default wherever it is sent.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from nybble.data.examples import Example, Message
from nybble.data.tool_formats import as_schema
from nybble.data.turn_pictures import with_pictures
from nybble.data.turns import link_results, read_turns
from nybble.errors import DataError, NybbleError
from nybble.generation.generate import Sampling

Stored = Callable[[str], bytes | str]  # of a picture's URL its file, or that URL where it holds the file

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256


class RequestError(NybbleError):
    """A request that cannot be answered.

    Args:
        status: of the HTTP response.
        code: OpenAI's name for the kind of mistake, if it has one.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class _Unsupported(ValueError):
    """A key asks for what is not done here."""


def _no_boolean(value: Any) -> Any:
    """True would be read as 1."""
    if isinstance(value, bool):
        raise ValueError(f"{json.dumps(value)} is no number")
    return value


Whole = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean)]


def _is(value: Any, other: Any) -> bool:
    """Equal, as JSON has it: true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class RequestObject(BaseModel):
    """An object of a request; its fields are the keys that are honoured.

    harmless: keys that change no answer, whatever they hold.
    neutral: keys that are not honoured, with the values under which nobody expects them to be.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    harmless: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_asked_for(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        asked = {
            key: value
            for key, value in given.items()
            if value is not None
            and key not in cls.harmless
            and not any(_is(value, neutral) for neutral in cls.neutral.get(key, ()))
        }
        refused = [f"{key} is not supported here{cls._values(key)}" for key in asked if key not in cls.model_fields]
        if refused:
            raise _Unsupported(f"{'; '.join(refused)}. Honoured: {', '.join(cls.model_fields)}.")
        return asked

    @classmethod
    def _values(cls, key: str) -> str:
        values = cls.neutral.get(key, ())
        return f", except as {' or '.join(map(json.dumps, values))}" if values else ""


class StreamOptions(RequestObject):
    harmless = frozenset({"include_obfuscation"})
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"continuous_usage_stats": (False,)}

    include_usage: bool = False


class CompletionFields(RequestObject):
    """What both endpoints take."""

    harmless = frozenset(
        {
            *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "priority"),
            *("prompt_cache_key", "prompt_cache_retention", "cache_prompt", "prediction", "parallel_tool_calls"),
        }
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "best_of": (1,),
        "logprobs": (False,),  # 0 asks for those of the answer itself
        "top_logprobs": (0,),
        "echo": (False,),
        "suffix": ("",),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "use_beam_search": (False,),
        "min_tokens": (0,),
        "ignore_eos": (False,),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template_kwargs": ({},),
    }

    model: str
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    max_new_tokens: Whole | None = Field(None, ge=1)
    temperature: Number = Field(0.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: Whole = Field(0, ge=-1)  # 0 and -1: among all
    min_p: Number = Field(0.0, ge=0, lt=1)
    repetition_penalty: Number = Field(1.0, gt=0)
    seed: Whole | None = Field(None, ge=0, le=2**63 - 1)
    stop: list[str] = Field(default_factory=list, max_length=MAX_STOPS)
    stop_token_ids: list[Whole] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        texts = [stop for stop in stops if isinstance(stop, str)] if isinstance(stops, list) else []
        if any(not 1 <= len(text) <= MAX_STOP_CHARACTERS for text in texts):
            raise ValueError(f"each has 1 to {MAX_STOP_CHARACTERS} characters")
        return stops

    def limit(self) -> int | None:
        """Most tokens the client wants: the least, where it says so under several names."""
        given = (self.max_tokens, self.max_completion_tokens, self.max_new_tokens)
        return min((limit for limit in given if limit is not None), default=None)

    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature, self.top_p, max(0, self.top_k), self.min_p, self.repetition_penalty, self.seed
        )


class TextPart(RequestObject):
    harmless = frozenset({"cache_control"})

    type: Literal["text"]
    text: str

    def as_row(self, stored: Stored) -> dict[str, Any]:
        """The part as rows have it."""
        return {"type": "text", "text": self.text}


class ImageUrl(RequestObject):
    harmless = frozenset({"detail"})

    url: str = Field(min_length=1)


class ImagePart(RequestObject):
    harmless = frozenset({"cache_control"})

    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _url_alone(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    def as_row(self, stored: Stored) -> dict[str, Any]:
        """The part as rows have it; `stored` says what its URL stands for."""
        return {"type": "image", "image": stored(self.image_url.url)}


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(RequestObject):
    """A turn. An assistant's may have no content, as one that only called tools; no other turn may."""

    harmless = frozenset({"name", "id", "cache_control"})
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "refusal": ("",),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning_content: str = ""
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.content or ()):
            raise ValueError(f"an image_url in a message of the {self.role}: pictures are the user's")
        return self

    def turn(self, stored: Stored) -> dict[str, Any]:
        """The turn as rows have it.

        Args:
            stored: what a picture's URL stands for.
        """
        parts = self.content or ""
        said: Any = parts
        if not isinstance(parts, str):
            said = [part.as_row(stored) for part in parts]
            if all(isinstance(part, TextPart) for part in parts):
                said = "".join(part["text"] for part in said)
        return {"role": self.role, "content": said} | self.model_dump(
            include={"reasoning_content", "tool_calls", "tool_call_id"}, exclude_defaults=True
        )


class ChatRequest(CompletionFields):
    """/v1/chat/completions. Tools are described to the model; its calls are read where the template's form is known."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        key: values for key, values in CompletionFields.neutral.items() if key != "tool_choice"
    }

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Literal["auto", "none"] = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _goes_on_with_an_answer(self) -> "ChatRequest":
        if self.continue_final_message == self.add_generation_prompt:
            raise ValueError("of continue_final_message and add_generation_prompt, one is true and the other false")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message: the last message is not the assistant's")
        return self

    @property
    def has_pictures(self) -> bool:
        """Whether a turn has one."""
        return any(isinstance(part, ImagePart) for turn in self.messages for part in turn.content or ())

    def conversation(self, stored: Stored) -> tuple[Message, ...]:
        """Its turns.

        Args:
            stored: the file of a picture, or the data URL that it is, from its URL.

        Raises:
            RequestError: a tool call, a tool's result or a picture cannot be read.
        """
        try:
            turns = [message.turn(stored) for message in self.messages]
            read = link_results(read_turns(turns, "messages", "messages", pictures=True), "messages")
            return with_pictures(Example("messages", read), {}, None).conversation()
        except DataError as error:
            raise RequestError(str(error)) from None

    def schemas(self) -> list[dict[str, Any]]:
        """Its tools, as templates are given them; none where none may be called."""
        return list(map(as_schema, self.tools)) if self.tool_choice == "auto" else []


class TextRequest(CompletionFields):
    """/v1/completions; one prompt, as text or as token ids."""

    prompt: str | list[Whole] | list[str]

    @field_validator("prompt", mode="after")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], str):
            if len(value) > 1:
                raise ValueError("one prompt a request")
            return value[0]
        return value


Body = TypeVar("Body", bound=CompletionFields)


def parse(body: bytes, kind: type[Body]) -> Body:
    """The request in a body.

    Raises:
        RequestError: it is no JSON, lacks something, or asks for what is not done here.
    """
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}.") from None


def _refusal(error: ValidationError) -> RequestError:
    """The first mistake in words; first of all a key that asks for what is not done here."""
    found = [(detail, detail.get("ctx", {}).get("error")) for detail in error.errors()]
    detail, cause = next((each for each in found if isinstance(each[1], _Unsupported)), found[0])
    place = ".".join(str(part) for part in detail["loc"] if "[" not in str(part))  # without the names of types
    words = str(cause) if isinstance(cause, ValueError) else detail["msg"]
    code = "unsupported_parameter" if isinstance(cause, _Unsupported) else None
    return RequestError(f"{place}: {words}" if place else words, code=code)
