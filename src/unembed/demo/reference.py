"""The OpenAPI document as a page to read: no script, nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any


def reference_page(document: dict[str, Any]) -> str:
    """HTML of an OpenAPI document."""
    return f"<!doctype html><title>{escape(document['info']['title'])}</title>"
