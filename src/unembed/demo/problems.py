"""Refusals as problem details (RFC 9457), `application/problem+json`."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from unembed.errors import UnembedError

MEDIA_TYPE = "application/problem+json"
_MOST_FAULTS = 8  # faults of a body
_KEY = 40  # characters of a body's key that are repeated
_OPTION = re.compile(r"--([a-z][a-z-]*)")


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
    """Turn a fault of the input into a refusal; command-line options become fields of a body."""
    return ProblemError(422, _OPTION.sub(lambda match: match[1].replace("-", "_"), str(error)))


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


def invalid(error: ValidationError) -> ProblemError:
    """Turn what the schema says of a body into a refusal; what was sent is not repeated."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    fields = [{"field": _place(f["loc"]), "message": str(f["msg"])} for f in faults[:_MOST_FAULTS]]
    first = fields[0]
    detail = f"{first['field']}: {first['message'][:1].lower()}{first['message'][1:]}"
    return ProblemError(422, detail, errors=fields)


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:_KEY] for part in location) or "body"


def _sentence(error: HTTPException) -> str:
    sentences = {
        404: "nothing here; GET /docs lists what there is",
        405: "another method is expected here; GET /docs lists them",
        413: too_large().detail,
    }
    return sentences.get(error.status_code, str(error.detail))
