"""The application: routes of the page and of its API."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import unembed
from unembed.demo import requests
from unembed.demo.middleware import Guard
from unembed.demo.models import Demo, describe_model
from unembed.demo.requests import EventStream
from unembed.demo.schemas import (
    EXAMPLES,
    MEDIA_TYPE,
    DecodeRequest,
    EncodeOut,
    EncodeRequest,
    HealthOut,
    InvertOut,
    InvertRequest,
    ModelsOut,
    ProblemError,
    ProblemOut,
    QueueOut,
    RandomOut,
    RequestBody,
    WordsOut,
    WordsRequest,
    on_http_error,
    on_problem,
)
from unembed.demo.server import LOOPBACK
from unembed.errors import UnembedError

_GRACE = 10.0  # seconds in which the workers must have ended once everybody has an answer
_STATIC = Path(__file__).parent / "static"
_PROBLEM = {MEDIA_TYPE: {"schema": ProblemOut.model_json_schema()}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": _PROBLEM}
    for status, description in {
        400: "The body is not valid JSON.",
        408: "The body took too long to come.",
        411: "The body has no length (Content-Length), but comes in chunks.",
        413: "The body is too large.",
        415: "A compressed body.",
        422: "A field, a text or a vector that cannot be used.",
        429: "Too many requests from this address; see Retry-After.",
        500: "The server failed.",
        503: "The queue is full or the server is shutting down; see Retry-After.",
        504: "Not finished in the time a request may take.",
    }.items()
}
_EVENTS = """The answer is a stream of server-sent events: `queued` (`position`: requests before
this one; again whenever it changes), `start` (the embedding and, for a text, its tokens), `step`
after every denoiser pass, and `done` with the result or `error` with problem details. docs/demo.md
describes them."""
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["queued", "start", "step", "done", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


def _body(schema: type[RequestBody]) -> dict[str, Any]:
    """Describe a body, which is read by `requests.read_body`, for the OpenAPI document."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _demo(request: Request) -> Demo:
    demo: Demo = request.app.state.demo
    return demo


Shared = Annotated[Demo, Depends(_demo)]
pages, api = APIRouter(), APIRouter()


@pages.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return FileResponse(_STATIC / "index.html")


@pages.get("/docs", include_in_schema=False)
async def reference(request: Request) -> HTMLResponse:
    """The API for readers."""
    state = request.app.state
    if not hasattr(state, "reference"):  # it never changes, and is long to write
        state.reference = reference_page(request.app.openapi())
    return HTMLResponse(state.reference)


@api.get("/models", response_model_exclude_none=True)
async def models(demo: Shared) -> ModelsOut:
    """The models served, the vectors they expect, and the strategies with their options."""
    descriptions = [describe_model(model, demo.limits) for model in demo.models.values()]
    return ModelsOut(models=descriptions, default=descriptions[0].name)


@api.post("/encode", responses=_REFUSALS, openapi_extra=_body(EncodeRequest))
async def encode(request: Request, demo: Shared) -> EncodeOut:
    """Embed a text."""
    body = await requests.read_body(request, demo, EncodeRequest)
    embedding = await requests.encode(demo, body, request.scope).result(request)
    return EncodeOut.model_validate(embedding)


@api.post(
    "/decode",
    status_code=200,
    response_class=EventStream,
    responses={
        **_REFUSALS,
        200: {"description": _EVENTS, "content": {"text/event-stream": {"schema": _EVENT}}},
    },
    openapi_extra=_body(DecodeRequest),
)
async def decode(request: Request, demo: Shared) -> EventStream:
    """Invert a text's embedding or a vector, told step by step."""
    body = await requests.read_body(request, demo, DecodeRequest)
    return EventStream(requests.decode(demo, body, request.scope), demo.limits.seconds)


@api.post("/invert", responses=_REFUSALS, openapi_extra=_body(InvertRequest))
async def invert(request: Request, demo: Shared) -> InvertOut:
    """Invert several texts' embeddings or vectors at once."""
    body = await requests.read_body(request, demo, InvertRequest)
    results = await requests.invert(demo, body, request.scope).result(request)
    return InvertOut.model_validate({**results, "model": demo.find(body.model).name})


@api.post("/words", responses=_REFUSALS, openapi_extra=_body(WordsRequest))
async def words(request: Request, demo: Shared) -> WordsOut:
    """Tell which words are in a text of any length, from its embedding or a vector."""
    body = await requests.read_body(request, demo, WordsRequest)
    return await requests.words(demo, body, request)


@api.get("/random")
async def random_text() -> RandomOut:
    """A sentence to try."""
    return RandomOut(text=random.choice(EXAMPLES))


@api.get("/queue")
async def queue(demo: Shared) -> list[QueueOut]:
    """Tell how busy each worker is."""
    limit = demo.limits.queue
    return [
        QueueOut(
            model=model.name,
            serves=kind,
            asks_encoder=kind == "search",
            waiting=waiting,
            running=running,
            limit=limit,
        )
        for model in demo.models.values()
        if model.inverter.alignment is None  # a map has the workers of its model
        for kind, worker in model.workers.items()
        for waiting, running in [worker.counts]
    ]


@pages.head("/health", include_in_schema=False)
@api.get("/health")
async def health(demo: Shared) -> HealthOut:
    """Tell whether the server answers."""
    return HealthOut(status="ok", models=list(demo.models))


@api.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(demo: Shared) -> Response:
    """Figures for Prometheus."""
    workers = [w for model in demo.models.values() for w in model.workers.values()]
    counts = {worker.name: worker.counts for worker in workers}
    return Response(demo.metrics.page(counts), media_type=CONTENT_TYPE_LATEST)


def create_app(demo: Demo, hosts: Sequence[str] = LOOPBACK, origins: Sequence[str] = ()) -> FastAPI:
    """The application, ready to be served.

    Args:
        demo: The models and the limits.
        hosts: Names by which it answers (the Host header), without ports.
        origins: Other web sites whose pages may call the API (CORS), as ``https://example.org``.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(demo.close, _GRACE)

    app = FastAPI(
        title="unembed",
        version=unembed.__version__,
        description="Embedding vectors turned back into text, step by step.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.demo = demo
    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(UnembedError, on_problem)
    app.add_exception_handler(HTTPException, on_http_error)
    app.include_router(pages)
    app.include_router(api)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.add_middleware(
        Guard, hosts=hosts, limits=demo.limits, clients=demo.clients, metrics=demo.metrics
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Content-Type"],
            expose_headers=["Retry-After"],
        )
    return app


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} API</title>
<link rel="icon" type="image/svg+xml" href="static/icon.svg">
<link rel="stylesheet" href="static/reference.css">
</head>
<body>
<header><a href="./">{title}</a></header>
<main>
<h1>{title} API <small>{version}</small></h1>
<p>{description} For programs: <a href="openapi.json">openapi.json</a>.</p>
"""
_FOOT = "</main>\n</body>\n</html>\n"


def reference_page(document: dict[str, Any]) -> str:
    """Write an OpenAPI document as HTML: operations, the fields of their bodies, their answers.

    Args:
        document: OpenAPI 3.1, as FastAPI makes it.
    """
    info = {key: escape(document["info"][key]) for key in ("title", "version", "description")}
    parts = [_HEAD.format(**info)]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(document, f"{method.upper()} {path}", operation)
    return "\n".join([*parts, _FOOT])


def _operation(document: dict[str, Any], name: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<section>\n<h2><code>{escape(name)}</code></h2>"
    yield f"<p>{escape(operation.get('description', ''))}</p>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        yield "<h3>Body</h3>"
        yield from _fields(document, body["schema"])
    yield "<h3>Answers</h3>\n<dl>"
    for status, answer in operation["responses"].items():
        kinds = ", ".join(answer.get("content", {}))
        yield f"<dt>{escape(status)} <code>{escape(kinds)}</code></dt>"
        yield f"<dd>{escape(answer.get('description', '')).replace('Successful Response', '')}"
        json_schema = answer.get("content", {}).get("application/json", {}).get("schema")
        if json_schema is not None:
            yield from _fields(document, json_schema, answer=True)
        yield "</dd>"
    yield "</dl>\n</section>"


def _fields(
    document: dict[str, Any], schema: dict[str, Any], answer: bool = False
) -> Iterator[str]:
    """A table of an object's fields; of a list, those of what it holds.

    Only a body's fields have defaults and may be left out.
    """
    resolved = _resolve(document, schema)
    if resolved.get("type") == "array":
        yield "<p>A list of:</p>"
        resolved = _resolve(document, resolved["items"])
    if "properties" not in resolved:
        return
    required = resolved.get("required", [])
    head = "" if answer else "<th>Default"
    yield f"<div class=wide><table><thead><tr><th>Field<th>Type{head}<th></tr></thead><tbody>"
    for name, field in resolved["properties"].items():
        cells = [f"<code>{escape(name)}</code>", escape(_type(document, field))]
        description = field.get("description", "")
        if not answer:
            default = "required" if name in required else json.dumps(field.get("default"))
            cells.append(f"<code>{escape(default)}</code>")
        yield f"<tr><td>{'<td>'.join(cells)}<td>{escape(description)}</tr>"
    yield "</tbody></table></div>"


def _type(document: dict[str, Any], field: dict[str, Any], deep: bool = True) -> str:
    """Spell a type: ``number[]``, ``string or null``, ``right, wrong, …``, an object's fields."""
    field = _resolve(document, field)
    if "anyOf" in field:
        return " or ".join(_type(document, each) for each in field["anyOf"])
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_type(document, field['items'])}"
    if "properties" in field and deep:
        inside = (f"{k}: {_type(document, v, False)}" for k, v in field["properties"].items())
        return "{" + ", ".join(inside) + "}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"names with {_type(document, field['additionalProperties'])}"
    return str(field.get("type", "any"))


def _resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    target: dict[str, Any] = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
    return {**target, **{k: v for k, v in schema.items() if k != "$ref"}}
