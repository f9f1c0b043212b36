import numpy as np
import pytest

from unembed.errors import ConfigError, StoreError
from unembed.vectors.stores import address as module
from unembed.vectors.stores.address import open_store, parse_address
from unembed.vectors.stores.store import draw_ids


@pytest.mark.parametrize(
    ("text", "kind", "collection", "column"),
    [
        (
            "postgresql://me@host/db?table=docs&column=v&sslmode=require",
            "pgvector",
            "docs",
            "v",
        ),
        ("qdrant://localhost:6333?collection=docs", "qdrant", "docs", None),
        ("https://cloud.example:6333?collection=docs", "qdrant", "docs", None),
        ("chroma://localhost:8000?collection=c", "chroma", "c", None),
        ("elasticsearch://localhost:9200?collection=i&column=f", "elasticsearch", "i", "f"),
    ],
)
def test_parse_address_takes_apart(text, kind, collection, column):
    where = parse_address(text)
    assert (where.kind, where.collection, where.column) == (kind, collection, column)
    assert "?" not in where.place
    assert where.options == ({"sslmode": "require"} if kind == "pgvector" else {})


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql://host/db?password=hunter2",
        "qdrant://host?api_key=hunter2",
        "redis://:hunter2@host",
    ],
)
def test_parse_address_refuses_a_password_without_repeating_it(text):
    with pytest.raises(StoreError, match="without a password") as caught:
        parse_address(text)
    assert "hunter2" not in str(caught.value)


def test_parse_address_names_the_forms():
    with pytest.raises(StoreError, match="postgresql://, qdrant://"):
        parse_address("mysql://host/db")


def test_open_store_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"extra postgres .*install.*\[postgres\]"):
        open_store("postgresql://localhost/db")


def test_the_secret_is_never_shown(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    where = module.Address("pgvector", "postgresql://host/db", secret="hunter2")
    assert "hunter2" not in repr(where)


def test_draw_ids_does_not_depend_on_the_order_and_nests():
    names = [f"id {k}" for k in range(500)]
    mixed = list(np.random.default_rng(0).permutation(names))
    assert draw_ids(names, 50, 1) == draw_ids(mixed, 50, 1)
    assert draw_ids(names, 20, 1) == draw_ids(names, 50, 1)[:20]
    assert draw_ids(names, 50, 2) != draw_ids(names, 50, 1)
