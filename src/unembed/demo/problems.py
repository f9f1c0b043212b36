"""Refusals as problem details (RFC 9457), `application/problem+json`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from unembed.errors import UnembedError

MEDIA_TYPE = "application/problem+json"
_SHOWN = 8  # faults of a body


class ProblemError(Exception):
    """A request that is not served.

    Attributes:
        status: HTTP status.
        detail: One sentence for the person who asked: what is wrong, what to do.
        retry_after: Whole seconds after which it is worth asking again; None where it is not.
        errors: The faults of a body, each with its place.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        retry_after: int | None = None,
        errors: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after
        self.errors = errors

    def to_dict(self) -> dict[str, Any]:
        """The members of the problem, for a body or an event."""
        title = HTTPStatus(self.status).phrase
        members: dict[str, Any] = {
            "type": "about:blank",
            "title": title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.retry_after is not None:
            members["retry_after"] = self.retry_after
        if self.errors:
            members["errors"] = self.errors
        return members

    def to_response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.to_dict(), self.status, headers, MEDIA_TYPE)


def refusal(error: UnembedError) -> ProblemError:
    """A fault of the input, in the words it has everywhere else."""
    return ProblemError(422, str(error))


def too_large() -> ProblemError:
    """More bytes than are read."""
    return ProblemError(413, "the body is larger than this server reads")


async def on_problem(request: Request, error: Exception) -> JSONResponse:
    """Handler of `ProblemError` and `UnembedError`."""
    assert isinstance(error, (ProblemError, UnembedError))
    return (error if isinstance(error, ProblemError) else refusal(error)).to_response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of what the framework refuses: no such path, another method, too large a body."""
    assert isinstance(error, HTTPException)
    response = ProblemError(error.status_code, _sentence(error)).to_response()
    response.headers.update(error.headers or {})
    return response


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Handler of bodies that are not what the schema says; what was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    if any(fault["type"] == "json_invalid" for fault in faults):
        return ProblemError(400, "expected a body of valid JSON").to_response()
    named = [{"field": _place(f["loc"]), "message": str(f["msg"])} for f in faults[:_SHOWN]]
    first = named[0]
    detail = f"{first['field']}: {first['message'][:1].lower()}{first['message'][1:]}"
    return ProblemError(422, detail, errors=named).to_response()


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != "body") or "body"


def _sentence(error: HTTPException) -> str:
    known = {
        404: "nothing here; GET /docs lists what there is",
        405: "another method is expected here; GET /docs lists them",
        413: too_large().detail,
    }
    return known.get(error.status_code, str(error.detail))
