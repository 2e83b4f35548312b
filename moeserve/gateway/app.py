"""The HTTP application: routes, limits, error shape. No state but what it is given."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from moeserve import __version__
from moeserve.config import HttpConfig
from moeserve.core import ErrorCode, MoeserveError
from moeserve.gateway import metrics as metrics_room
from moeserve.gateway.auth import ApiKeyAuth
from moeserve.gateway.errors import ApiError, check_model, json_response, of_status
from moeserve.gateway.host_check import HostCheck, needs_host_check
from moeserve.gateway.http_limits import RequestSizeLimits
from moeserve.gateway.http_metrics import CountResponses
from moeserve.gateway.lifecycle import Lifecycle
from moeserve.gateway.metrics import Metrics
from moeserve.gateway.openai_chat import create_chat_completion
from moeserve.gateway.openai_completions import create_completion
from moeserve.gateway.openai_schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from moeserve.gateway.tokenize_routes import detokenize, tokenize


def create_app(lifecycle: Lifecycle, config: HttpConfig, metrics: Metrics) -> FastAPI:
    """The whole HTTP API as an ASGI application."""
    app = FastAPI(
        title="moeserve",
        version=__version__,
        docs_url=None,  # that page loads scripts from elsewhere; /openapi.json stays
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_status_routes(app, lifecycle, metrics)
    _add_model_routes(app, lifecycle)
    _add_generation_routes(app, lifecycle, config)
    _describe_bodies(app)
    _add_error_handlers(app)
    # The last one added sees a request first.
    app.add_middleware(
        RequestSizeLimits,
        max_header_bytes=config.max_header_bytes,
        max_body_bytes=config.max_body_bytes,
        body_timeout_s=config.body_timeout_s,
        receive_timeout_s=config.receive_timeout_s,
    )
    if needs_host_check(config):
        app.add_middleware(HostCheck, bound_host=config.host, allowed_hosts=config.allowed_hosts)
    if config.api_key is not None:
        app.add_middleware(ApiKeyAuth, api_key=config.api_key)
    app.add_middleware(CountResponses, counter=metrics.http_requests)
    return app


def _add_status_routes(app: FastAPI, lifecycle: Lifecycle, metrics: Metrics) -> None:
    @app.head("/health", include_in_schema=False, response_class=Response)
    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 when requests are served; 503 with the stage and the reason when not, also where they
        are taken but experts that they need cannot be read (`degraded`)."""
        status = lifecycle.link.status
        body: dict[str, Any] = {"status": lifecycle.stage, "detail": status.detail}
        if lifecycle.stage == "ready" and status.trouble:
            return json_response({"status": "degraded", "detail": status.trouble}, status=503)
        if lifecycle.stage == "ready":
            return json_response(body)
        if lifecycle.stage == "loading":
            body["progress"] = round(status.progress, 4)
        return json_response(body, status=503)

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Prometheus text format."""
        return Response(metrics.text(), media_type=metrics_room.CONTENT_TYPE)


def _add_model_routes(app: FastAPI, lifecycle: Lifecycle) -> None:
    created = int(time.time())

    def model_object() -> dict[str, Any]:
        info = lifecycle.service().info
        return {
            "id": info.name,
            "object": "model",
            "created": created,
            "owned_by": "moeserve",
            "max_model_len": info.context_tokens,
        }

    @app.get("/v1/models", response_class=Response)
    async def list_models() -> Response:
        """The one model served."""
        return json_response({"object": "list", "data": [model_object()]})

    @app.get("/v1/models/{model_id:path}", response_class=Response)
    async def get_model(model_id: str) -> Response:
        """The model, if it is the one served."""
        check_model(model_id, lifecycle.service().info)
        return json_response(model_object())


def _add_generation_routes(app: FastAPI, lifecycle: Lifecycle, config: HttpConfig) -> None:
    @app.post("/v1/chat/completions", response_class=Response, openapi_extra=_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(request, lifecycle)

    @app.post("/v1/completions", response_class=Response, openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await create_completion(request, lifecycle, config.max_prompts)

    @app.post("/tokenize", response_class=Response, openapi_extra=_body(TokenizeRequest))
    async def tokenize_text(request: Request) -> Response:
        return await tokenize(request, lifecycle)

    @app.post("/detokenize", response_class=Response, openapi_extra=_body(DetokenizeRequest))
    async def detokenize_ids(request: Request) -> Response:
        return await detokenize(request, lifecycle)


def _body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Says in the OpenAPI description what a route's body is."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_bodies(app: FastAPI) -> None:
    """Adds the schemas of the request structs to /openapi.json."""
    kinds = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title=app.title, version=app.version, routes=app.routes)
            described.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _add_error_handlers(app: FastAPI) -> None:
    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def moeserve_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, MoeserveError)
        return ApiError.of(error).response()

    async def framework_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{error.detail}: {request.method} {request.url.path[:200]}"
        return of_status(error.status_code, text, error.headers).response()

    async def our_mistake(_: Request, error: Exception) -> Response:
        # The server logs the traceback; a client learns only that it is not its fault.
        code = ErrorCode.INTERNAL.value
        return ApiError(500, "internal error; the server's log has the cause", code=code).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(MoeserveError, moeserve_error)
    app.add_exception_handler(HTTPException, framework_error)
    app.add_exception_handler(Exception, our_mistake)
