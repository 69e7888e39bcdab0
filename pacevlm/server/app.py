"""The HTTP application: which path does what."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pacevlm import __version__
from pacevlm.server.chat import ChatEndpoint
from pacevlm.server.config import ServeConfig
from pacevlm.server.edge import Edge
from pacevlm.server.metrics import Metrics
from pacevlm.server.protocol import ChatCompletion, ChatRequest, ErrorEnvelope
from pacevlm.server.refusals import RESTART_S, RefusedError, envelope_response, error_response, plain_error

if TYPE_CHECKING:
    from pacevlm.server.engine import Engine

PAGE_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "server"
_REFUSALS = {
    400: "a field, the question, the picture or the budget cannot be used",
    401: "the API key is missing or wrong",
    404: "there is no such model",
    408: "the request took too long to arrive, or its budget was over by then",
    413: "the request is too large",
    429: "the budget cannot be met behind what was accepted before",
    503: "the worker is being restarted",
}
# Nothing that the page needs is anywhere else, and no text becomes markup but lit-html's templates.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types lit-html"
)


class ModelPacing(BaseModel):
    """What a client must know of a model to choose budgets, prices and knobs, whose full ones are the last of each."""

    full_p50_ms: float
    default_budget_ms: float
    default_price: float
    tiers: tuple[str, ...]
    top_ks: tuple[int, ...]
    num_blocks: tuple[int, ...]
    is_embedded: bool


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "pacevlm"
    pacevlm: ModelPacing


class Models(BaseModel):
    """All of them: one."""

    object: str = "list"
    data: list[Model]


def create_app(engine: Engine, config: ServeConfig, api_key: str | None = None) -> FastAPI:
    """The application around an engine, which starts and stops with it.

    Args:
        api_key: what clients must send; None asks for none.
    """
    metrics, started = Metrics(engine), int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    # The usual pages of documentation would load scripts from elsewhere; /openapi.json says the same.
    app = FastAPI(title="pacevlm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Edge, api_key=api_key)
    app.add_exception_handler(HTTPException, _as_envelope)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorEnvelope, "description": text} for status, text in _REFUSALS.items()
    }
    body = {"required": True, "content": {"application/json": {"schema": _reference("ChatRequest")}}}
    chat = ChatEndpoint(engine, config, metrics).__call__
    app.add_route("/v1/chat/completions", chat, ["POST"])  # answers; the next one only describes it, and takes longer
    app.add_api_route(
        "/v1/chat/completions",
        chat,
        methods=["POST"],
        response_model=ChatCompletion,
        responses=refusals,
        openapi_extra={"requestBody": body},
        summary="Answer a question about a picture within a latency budget",
    )

    @app.get("/v1/models", response_model=Models, responses={401: refusals[401]})
    async def models() -> Models:
        """The model that is served."""
        outlook = engine.outlook
        space = outlook.knob_space
        pacing = ModelPacing(
            full_p50_ms=outlook.full_p50_ms,
            default_budget_ms=outlook.default_budget_ms,
            default_price=outlook.default_price,
            tiers=space.tiers,
            top_ks=space.top_ks,
            num_blocks=space.num_blocks,
            is_embedded=outlook.is_embedded,
        )
        return Models(data=[Model(id=config.model_name, created=started, pacevlm=pacing)])

    @app.get("/health", responses={503: refusals[503]})
    async def health() -> Response:
        """200 while requests are answered."""
        if engine.ready:
            return JSONResponse({"status": "ready"})
        return error_response(RefusedError(503, "the worker is not ready", "not_ready", retry_after_s=RESTART_S))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/samples")
    def show_samples() -> Response:  # no coroutine: it is slow the first time, and runs in a thread
        """Questions that the embedded model can answer, with pictures and references."""
        from pacevlm.server.samples import samples

        try:
            return JSONResponse(samples())
        except ModuleNotFoundError as error:
            missing = f"{error.name} is not installed; pip install 'pacevlm[digits]' brings it"
            return error_response(RefusedError(404, missing, "not_installed"))

    for route in [route for route in app.routes if isinstance(route, APIRoute)]:
        # The page's folder, which stands behind them, would say that there is no such path.
        others = sorted({"GET", "POST", "PUT", "PATCH", "DELETE"} - set(route.methods or ()))
        app.add_api_route(route.path, _refuse_method, methods=others, include_in_schema=False)
    app.mount("/", _Page(directory=PAGE_FOLDER, html=True))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class _Page(StaticFiles):
    """The files of the page, which may load nothing from elsewhere."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """One file."""
        response = super().file_response(*args, **kwargs)
        response.headers["content-security-policy"] = _PAGE_POLICY
        response.headers["x-content-type-options"] = "nosniff"
        response.headers["cache-control"] = "no-cache"  # the next version's files belong together
        return response


async def _refuse_method(request: Request) -> Response:
    raise HTTPException(405, f"{request.method} cannot be used here")


async def _as_envelope(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return envelope_response(error.status_code, plain_error(error.status_code, error.detail), dict(error.headers or {}))


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The interface's description, with the request that is read by hand so that it is read once."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        described["components"]["schemas"] |= {**request.pop("$defs"), "ChatRequest": request}
        app.openapi_schema = described
    return app.openapi_schema
