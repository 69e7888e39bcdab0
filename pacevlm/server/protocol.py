"""What clients send and get: the chat completions of OpenAI's interface, with fields of our own beside them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from pacevlm.errors import ConfigError
from pacevlm.server.config import MAX_BUDGET_MS
from pacevlm.server.job import Served
from pacevlm.types import BudgetKind

MAX_MESSAGES, MAX_PARTS = 64, 64
"""More than a question about one picture needs; what a longer list would say is refused anyway."""
# Tags of unions stand in brackets, so that messages to people can leave them out.
_TEXT, _PARTS, _IMAGE = "(text)", "(parts)", "(image)"


class _Asked(BaseModel):
    """Whatever clients send: types are taken as they are, and what is unknown is passed over as OpenAI's servers do."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", hide_input_in_errors=True)


# Requests ------------------------------------------------------------------------------------------------------------


class TextPart(_Asked):
    """A piece of the question."""

    type: Literal["text"]
    text: str


class ImageUrl(_Asked):
    """Where the picture is: `data:image/png;base64,...`, or an https address of a host that the server lists."""

    url: str


class ImagePart(_Asked):
    """The picture that the question is about."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _content_tag(content: Any) -> str | None:
    return _TEXT if isinstance(content, str) else _PARTS if isinstance(content, list) else None


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return {"text": _TEXT, "image_url": _IMAGE}.get(kind) if isinstance(kind, str) else None


Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag(_TEXT)] | Annotated[ImagePart, Tag(_IMAGE)],
    Discriminator(
        _part_tag,
        custom_error_type="part",
        custom_error_message="must be a part of the type text or image_url",
    ),
]
Content: TypeAlias = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[Part], Tag(_PARTS), Field(max_length=MAX_PARTS)],
    Discriminator(_content_tag, custom_error_type="content", custom_error_message="must be a text or a list of parts"),
]


class Message(_Asked):
    """One turn. System and developer messages are put in front of the question, which is the only user message."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None


class StreamOptions(_Asked):
    """What a stream says besides the answer."""

    include_usage: bool | None = None


class ChatRequest(_Asked):
    """A question, at most one picture, and what is asked of the answer.

    The model answers greedily, once, and without tools: fields that would change that are refused. `seed`, `top_p`,
    `user` and others that change nothing are passed over.
    """

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = Field(None, description="name of the served model; that one if left out")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, description="most tokens of the answer; enters the promised bound")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same under its newer name; the lower binds")
    latency_budget_ms: float | None = Field(
        None, gt=0, le=MAX_BUDGET_MS, description="milliseconds from the request's first byte on"
    )
    budget_kind: BudgetKind | None = Field(
        None, description="what the budget covers: the whole request (e2e, the default) or its first token (ttft)"
    )
    price: float | None = Field(None, description="points of accuracy that one full latency is worth below the budget")
    knobs: str | None = Field(
        None, description="the configuration that must run, such as high/8/16, instead of the one that would be chosen"
    )
    temperature: float | None = Field(None, description="0 or left out: answers are greedy")
    n: int | None = Field(None, description="1 or left out: there is one answer")
    frequency_penalty: float | None = Field(None, description="0 or left out")
    presence_penalty: float | None = Field(None, description="0 or left out")
    logprobs: bool | None = Field(None, description="false or left out")
    top_logprobs: int | None = Field(None, description="0 or left out")
    logit_bias: dict[str, Any] | None = Field(None, description="empty or left out")
    tools: list[Any] | None = Field(None, description="empty or left out")
    functions: list[Any] | None = Field(None, description="empty or left out")
    tool_choice: Any = Field(None, description="none, auto or left out")
    response_format: Any = Field(None, description='{"type": "text"} or left out')
    stop: Any = Field(None, description="empty or left out")
    modalities: Any = Field(None, description='["text"] or left out')
    audio: Any = Field(None, description="left out")

    @property
    def most_tokens(self) -> int | None:
        """The lower of the two limits, if one is given."""
        given = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(given, default=None)


# What each field may be besides null, and why nothing else.
_GREEDY = "this server answers greedily, so that the same request always gives the same answer"
_ONE = "this server gives one answer"
_PLAIN = "this server answers questions in plain text"
_ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "temperature": ((0,), f"{_GREEDY}; give 0 or leave it out"),
    "n": ((1,), f"{_ONE}; give 1 or leave it out"),
    "frequency_penalty": ((0,), f"{_GREEDY}; give 0 or leave it out"),
    "presence_penalty": ((0,), f"{_GREEDY}; give 0 or leave it out"),
    "logprobs": ((False,), f"{_PLAIN}, without probabilities; leave it out"),
    "top_logprobs": ((0,), f"{_PLAIN}, without probabilities; leave it out"),
    "logit_bias": (({},), f"{_GREEDY}; leave it out"),
    "tools": (([],), f"{_PLAIN} and calls no tools; leave it out"),
    "functions": (([],), f"{_PLAIN} and calls no functions; leave it out"),
    "tool_choice": (("none", "auto"), f"{_PLAIN} and calls no tools; leave it out"),
    "response_format": (({"type": "text"},), f"{_PLAIN}; leave it out"),
    "stop": (([], ""), "an answer ends where the model ends it; leave it out, or limit it with max_tokens"),
    "modalities": ((["text"], []), f"{_PLAIN}; leave it out"),
    "audio": ((), f"{_PLAIN}; leave it out"),
}


class FieldError(ConfigError):
    """A field of a request cannot be used.

    Attributes:
        param: which one, as a path such as `messages.0.content`; None for the body as a whole.
        code: what is wrong, for programs.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


def parse_chat(body: bytes | bytearray) -> ChatRequest:
    """Read a request's JSON, once; raises FieldError in one sentence."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _as_field_error(error) from None
    for name, (allowed, why) in _ALLOWED.items():
        value = getattr(request, name)
        if value is not None and value not in allowed:
            raise FieldError(f"{name} cannot be used here: {why}", name, "unsupported_value")
    return request


def _as_field_error(error: ValidationError) -> FieldError:
    """The first complaint; of a body that is no JSON there is only that one."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    text = first["msg"]
    if first["type"] == "json_invalid":
        text = text.removeprefix("Invalid JSON: ")
        return FieldError(f"the body is not JSON that can be read: {text}", code="invalid_json")
    param = ".".join(str(name) for name in first["loc"] if not str(name).startswith("("))
    if not param:
        return FieldError(f"the body must be a JSON object: {text}", code="invalid_json")
    return FieldError(f"{param[:200]}: {text}", param[:200])


# Answers -------------------------------------------------------------------------------------------------------------


class KnobReport(BaseModel):
    """The configuration that ran."""

    tier: str
    top_k: int
    num_blocks: int


class StageReport(BaseModel):
    """Milliseconds of each stage in the worker."""

    read: float
    prepare: float
    stage1: float
    vision: float
    first_block: float
    prefill: float
    decode: float


class PacingReport(BaseModel):
    """How a request kept its budget. Milliseconds; `measured_ms` is `queue_ms` and `answer_ms` together."""

    knobs: KnobReport
    predicted_ms: float | None = Field(description="of what the budget covers, without waiting and drift")
    upper_bound_ms: float | None = Field(description="known beforehand, drift included; null if nothing is promised")
    measured_ms: float = Field(description="from the request's first byte to the whole answer")
    ttft_ms: float = Field(description="from the request's first byte to the first token")
    queue_ms: float = Field(description="from the request's first byte until the worker began")
    answer_ms: float = Field(description="in the worker")
    budget_ms: float | None = Field(description="null if knobs were given and no budget")
    budget_kind: BudgetKind
    other_budget_ms: float | None = Field(description="of the other kind, where both had to hold")
    budget_met: bool
    feasible: bool
    why_infeasible: str | None
    price: float
    drift_factor: float
    attempts: int = Field(description="how many workers began it; 2 if the first one died")
    stages: StageReport


class Usage(BaseModel):
    """Tokens; those of the picture count as prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The only answer."""

    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """An answer, and how it kept its budget."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    pacevlm: PacingReport


class Delta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The only answer, so far."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """One event of a stream; the last one with a choice has `pacevlm`, and the one behind it, if asked for, `usage`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    pacevlm: PacingReport | None = None


class ErrorBody(BaseModel):
    """What went wrong, in a sentence for people and in words for programs."""

    message: str
    type: str
    param: str | None
    code: str | None
    retry_after_s: float | None = Field(default=None, description="when a request like this could be accepted")
    soonest_budget_ms: float | None = Field(default=None, description="the smallest budget that could be promised now")


class ErrorEnvelope(BaseModel):
    """An error, as OpenAI's clients read it."""

    error: ErrorBody


def report(served: Served) -> PacingReport:
    """How a request kept its budget."""
    answer, times = served.answer, served.answer.times
    return PacingReport(
        knobs=KnobReport(tier=answer.knobs.tier, top_k=answer.knobs.top_k, num_blocks=answer.knobs.num_blocks),
        predicted_ms=_rounded(answer.predicted_ms),
        upper_bound_ms=_rounded(answer.upper_bound_ms),
        measured_ms=round(served.queue_ms + times.e2e_ms, 3),
        ttft_ms=round(served.queue_ms + times.ttft_ms, 3),
        queue_ms=round(served.queue_ms, 3),
        answer_ms=round(times.e2e_ms, 3),
        budget_ms=_rounded(answer.budget_ms),
        budget_kind=answer.kind,
        other_budget_ms=_rounded(answer.other_budget_ms),
        budget_met=answer.budget_met,
        feasible=answer.feasible,
        why_infeasible=answer.why_infeasible,
        price=answer.price,
        drift_factor=round(answer.drift_factor, 4),
        attempts=served.attempts,
        stages=StageReport(
            read=round(times.read_ms, 3),
            prepare=round(times.prepare_ms, 3),
            stage1=round(times.stage1_ms, 3),
            vision=round(times.vision_ms, 3),
            first_block=round(times.first_block_ms, 3),
            prefill=round(times.prefill_ms, 3),
            decode=round(sum(times.decode_ms), 3),
        ),
    )


def usage(served: Served) -> Usage:
    """Tokens of a request."""
    answer = served.answer
    num_prompt = answer.sizes.num_text_tokens + answer.vision.num_image_tokens
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=answer.num_output_tokens,
        total_tokens=num_prompt + answer.num_output_tokens,
    )


def report_headers(found: PacingReport) -> dict[str, str]:
    """The same as headers, for gateways that read no bodies: `x-pacevlm-budget-met: true`."""
    knobs = found.knobs
    values = {
        "knobs": f"{knobs.tier}/{knobs.top_k}/{knobs.num_blocks}",
        "predicted-ms": found.predicted_ms,
        "upper-bound-ms": found.upper_bound_ms,
        "measured-ms": found.measured_ms,
        "ttft-ms": found.ttft_ms,
        "queue-ms": found.queue_ms,
        "answer-ms": found.answer_ms,
        "budget-ms": found.budget_ms,
        "budget-kind": found.budget_kind,
        "budget-met": str(found.budget_met).lower(),
        "feasible": str(found.feasible).lower(),
    }
    return {f"x-pacevlm-{name}": str(value) for name, value in values.items() if value is not None}


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else round(value, 3)
