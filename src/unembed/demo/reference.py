"""The OpenAPI document as a page to read: no script, nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

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
    whole = _resolve(document, schema)
    if whole.get("type") == "array":
        yield "<p>A list of:</p>"
        whole = _resolve(document, whole["items"])
    if "properties" not in whole:
        return
    required = whole.get("required", [])
    default = "" if answer else "<th>Default"
    yield f"<div class=wide><table><thead><tr><th>Field<th>Type{default}<th></tr></thead><tbody>"
    for name, field in whole["properties"].items():
        cells = [f"<code>{escape(name)}</code>", escape(_type(document, field))]
        description = field.get("description", "")
        if not answer:
            given = "required" if name in required else json.dumps(field.get("default"))
            cells.append(f"<code>{escape(given)}</code>")
        yield f"<tr><td>{'<td>'.join(cells)}<td>{escape(description)}</tr>"
    yield "</tbody></table></div>"


def _type(document: dict[str, Any], field: dict[str, Any], deep: bool = True) -> str:
    """In words: ``number[]``, ``string or null``, ``right, wrong, …``, or an object's fields."""
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
