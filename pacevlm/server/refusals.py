"""What a client is told when a request is not answered: a status, headers, and an error as OpenAI's clients read it."""

from __future__ import annotations

import math
from http import HTTPStatus

from starlette.responses import Response

from pacevlm.errors import (
    BudgetError,
    ConfigError,
    DeadlineError,
    ImageError,
    KnobError,
    OverloadError,
    PacevlmError,
    QuestionError,
    WorkerError,
)
from pacevlm.server.protocol import ErrorBody, ErrorEnvelope, FieldError

INVALID, OVERLOADED, UNAVAILABLE = "invalid_request_error", "overloaded_error", "unavailable_error"
RESTART_S = 5.0
"""When to try again while the worker is restarted: about what loading a small model takes."""


class RefusedError(PacevlmError):
    """A request that is refused for what surrounds it, such as its size or its key.

    Attributes:
        status: of HTTP.
        code: what is wrong, for programs.
        param: what is wrong, as a field's path.
        must_close: the rest of the request is not read, so the connection ends with the answer.
        retry_after_s: when to try again, if that may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        must_close: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.must_close, self.retry_after_s = must_close, retry_after_s


def describe(error: PacevlmError) -> tuple[int, ErrorBody, dict[str, str]]:
    """Status, body and headers for an error that somebody can act on."""
    message, headers = str(error), {}
    if isinstance(error, RefusedError):
        if error.must_close:
            headers["connection"] = "close"
        kinds = {401: "authentication_error", 429: OVERLOADED, 503: UNAVAILABLE}
        kind = kinds.get(error.status, INVALID)
        status, body = error.status, ErrorBody(message=message, type=kind, param=error.param, code=error.code)
        body.retry_after_s = error.retry_after_s
    elif isinstance(error, OverloadError):
        status = 429
        body = ErrorBody(
            message=message,
            type=OVERLOADED,
            param="latency_budget_ms",
            code="budget_cannot_be_met",
            retry_after_s=_finite(error.retry_after_s),
            soonest_budget_ms=_finite(error.soonest_budget_ms),
        )
    elif isinstance(error, DeadlineError):
        status, body = 408, ErrorBody(message=message, type=INVALID, param="latency_budget_ms", code="deadline_expired")
    elif isinstance(error, WorkerError):
        status = 503
        body = ErrorBody(message=message, type=UNAVAILABLE, param=None, code="worker_lost", retry_after_s=RESTART_S)
    else:
        param, code = _where(error)
        status, body = 400, ErrorBody(message=message, type=INVALID, param=param, code=code)
    if body.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(body.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(body.retry_after_s * 1e3)))  # what OpenAI's clients prefer
    return status, body, headers


def error_response(error: PacevlmError) -> Response:
    """The answer to a request that is refused."""
    status, body, headers = describe(error)
    return envelope_response(status, body, headers)


def plain_error(status: int, message: str) -> ErrorBody:
    """For what has no error of its own: an unknown path, a wrong method, a fault of the server."""
    kind = "server_error" if status >= 500 else INVALID
    return ErrorBody(message=message, type=kind, param=None, code=HTTPStatus(status).phrase.lower().replace(" ", "_"))


def envelope_response(status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> Response:
    """An error as a whole response."""
    content = ErrorEnvelope(error=body).model_dump_json(exclude_unset=True)
    return Response(content, status, headers, media_type="application/json")


def _where(error: PacevlmError) -> tuple[str | None, str]:
    """Field and code of an error in what was asked."""
    if isinstance(error, FieldError):
        return error.param, error.code
    found = {
        ImageError: ("messages", "invalid_image"),
        QuestionError: ("messages", "invalid_question"),
        KnobError: ("knobs", "invalid_knobs"),
        BudgetError: ("latency_budget_ms", "invalid_budget"),
        ConfigError: (None, "invalid_value"),
    }
    return next((place for kind, place in found.items() if isinstance(error, kind)), (None, "invalid_value"))


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
