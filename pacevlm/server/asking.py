"""From what a client sent to a job: the question, its picture, and what is asked of the answer."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pacevlm.errors import ConfigError, KnobError, QuestionError
from pacevlm.knobs import Knobs, check_price
from pacevlm.server.config import MAX_BUDGET_MS
from pacevlm.server.job import Job
from pacevlm.server.protocol import ChatRequest, FieldError, ImagePart, Message
from pacevlm.server.remote import PictureFetcher
from pacevlm.types import BudgetKind

MAX_TOKEN_LENGTH = 8
"""Characters of a token, on average of a text that fills the model; cutting longer ones would hold everybody up."""
# An eighth of the time of base64.b64decode: 0.06 instead of 0.5 ms for 100 kB.
_BASE64 = TypeAdapter(bytes, config=ConfigDict(val_json_bytes="base64"))
# Headers that gateways send, and what each one's milliseconds cover.
BUDGET_HEADERS: dict[str, BudgetKind] = {"request-timeout-ms": "e2e", "x-slo-ttft-ms": "ttft"}


async def read_job(
    request: ChatRequest,
    headers: Mapping[str, str],
    fetcher: PictureFetcher,
    *,
    max_positions: int,
    request_id: str,
    arrived_s: float,
) -> Job:
    """What the queue is given.

    Args:
        max_positions: of the model; a question that cannot fit is not cut into tokens.
        request_id: names it in the queue.
        arrived_s: when its first byte was seen.

    Raises:
        FieldError: a field cannot be used.
        ImageError: the picture cannot be fetched.
        QuestionError: the question is too long for the model.
    """
    budgets_ms = read_budgets(request, headers)
    question, url = read_question(request.messages)
    most = MAX_TOKEN_LENGTH * max_positions
    if len(question) > most:
        raise QuestionError(
            f"the question has {len(question):,} characters, more than the {most:,} that the model takes"
        )
    return Job(
        request_id=request_id,
        image=None if url is None else await _read_picture(url, fetcher),
        question=question,
        arrived_s=arrived_s,
        budgets_ms=budgets_ms,
        price=_read_price(request.price),
        knobs=_read_knobs(request.knobs),
        max_new_tokens=request.most_tokens,
        stream=bool(request.stream),
    )


def read_budgets(request: ChatRequest, headers: Mapping[str, str]) -> dict[BudgetKind, float]:
    """Milliseconds by what they cover; where field and header say the same kind, the tighter one binds."""
    if request.budget_kind is not None and request.latency_budget_ms is None:
        raise FieldError(
            "budget_kind says what latency_budget_ms covers; give both, or leave it out", "budget_kind", "missing_value"
        )
    given: list[tuple[BudgetKind, float]] = []
    if request.latency_budget_ms is not None:
        given.append((request.budget_kind or "e2e", request.latency_budget_ms))
    given += [(kind, _header_ms(name, headers[name])) for name, kind in BUDGET_HEADERS.items() if name in headers]
    budgets: dict[BudgetKind, float] = {}
    for kind, budget_ms in given:
        budgets[kind] = min(budget_ms, budgets.get(kind, budget_ms))
    return budgets


def read_question(messages: list[Message]) -> tuple[str, str | None]:
    """The question, with what system messages say in front of it, and its picture's URL; raises FieldError."""
    texts: list[str] = []
    url: str | None = None
    turns = [message.role for message in messages if message.role not in ("system", "developer")]
    if turns != ["user"]:
        raise FieldError(
            f"messages hold {len(turns)} turns besides system messages, but each answer is to one user message: this "
            "model knows no conversation; put all that it needs into one question",
            "messages",
            "unsupported_value",
        )
    for index, message in enumerate(messages):
        for part in [message.content] if isinstance(message.content, str) else message.content or ():
            if not isinstance(part, ImagePart):
                texts.append(part if isinstance(part, str) else part.text)
            elif url is not None or message.role != "user":
                raise FieldError(
                    "a question has at most one picture, in the user's message; leave out the others",
                    f"messages.{index}.content",
                    "unsupported_value",
                )
            else:
                url = part.image_url.url
    return "\n".join(text for text in texts if text), url


async def _read_picture(url: str, fetcher: PictureFetcher) -> bytes:
    if url[:5].lower() != "data:":
        return await fetcher.fetch(url)
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise FieldError(
            "image_url is a data: URL that is not base64; write data:image/png;base64, and the file's base64 behind it",
            "messages",
            "invalid_image",
        )
    try:
        return _BASE64.validate_strings(payload)
    except ValidationError:
        raise FieldError(
            "image_url does not hold valid base64; encode the whole file with base64.b64encode",
            "messages",
            "invalid_image",
        ) from None


def _header_ms(name: str, text: str) -> float:
    try:
        value = float(text) if len(text) <= 32 and text.isascii() and "_" not in text else None
    except ValueError:
        value = None
    if value is None or not 0 < value <= MAX_BUDGET_MS:
        raise FieldError(
            f"the header {name} is {text[:32]!r}; it must be a number of milliseconds above 0 and up to "
            f"{MAX_BUDGET_MS:.0f}, what is left when the request is sent",
            name,
            "invalid_budget",
        )
    return value


def _read_price(price: float | None) -> float | None:
    try:
        return None if price is None else check_price(price)
    except ConfigError as error:
        raise FieldError(str(error), "price") from None


def _read_knobs(text: str | None) -> Knobs | None:
    try:
        return None if text is None else Knobs.parse(text[:200])
    except KnobError as error:
        raise FieldError(str(error), "knobs", "invalid_knobs") from None
