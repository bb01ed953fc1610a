"""What clients may ask: the bodies of OpenAI's two completion endpoints, checked.

Source: https://platform.openai.com/docs/api-reference. Fields that ask for what is not done here are refused; a
client that sets them to what they are by default is not troubled.
"""

import json
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nybble.data.examples import Message
from nybble.errors import NybbleError

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


class StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionFields(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "best_of": (1,),
        "logprobs": (None, False, 0),
        "top_logprobs": (None, 0),
        "echo": (False,),
        "suffix": (None, ""),
        "presence_penalty": (None, 0),
        "frequency_penalty": (None, 0),
        "logit_bias": (None, {}),
        "tools": (None, []),
        "functions": (None, []),
        "response_format": (None, {"type": "text"}),
    }

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: list[str] = Field(default_factory=list, max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if isinstance(stops, list) and any(not stop or len(stop) > MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"each has 1 to {MAX_STOP_CHARACTERS} characters")
        return stops

    @field_validator("temperature", "top_p", "stream", "stream_options", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].get_default(call_default_factory=True) if value is None else value

    def limit(self) -> int | None:
        """Most tokens the client wants."""
        return self.max_tokens


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatRequest(CompletionFields):
    """/v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(CompletionFields):
    """/v1/completions; one prompt, as text or as token ids."""

    prompt: str | list[int] | list[str]

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
        request = kind.model_validate(content)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        raise RequestError(f"{place}: {detail['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}.") from None
    for name, value in (request.model_extra or {}).items():
        if name in CompletionFields.neutral and value not in CompletionFields.neutral[name]:
            raise RequestError(f"{name} is not supported here.", code="unsupported_parameter")
    return request
