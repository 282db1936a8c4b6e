"""Embedding models and dimensions: what a model can make, where it is asked, and the check that fails fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

from lib.errors import DimensionMismatch, UsageProblem

# Native sizes of OpenAI's models; only the text-embedding-3 family takes `dimensions`
# (https://platform.openai.com/docs/guides/embeddings).
_NATIVE_SIZES = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
}
_SHORTENED = ("text-embedding-3-",)
UNKNOWN_MODEL = "unknown"  # in a manifest, if nothing says which model made the vectors


@dataclass(frozen=True)
class EmbeddingSpec:
    """What decides a vector, apart from the text: endpoint (it may hold a login or a key), model and size."""

    base_url: str = field(repr=False)
    model: str
    size: int


def bare_model(model: str) -> str:
    """The model behind a gateway's prefix: `openai/text-embedding-3-large` is `text-embedding-3-large`."""
    name = model.rpartition("/")[2]
    return name if name in _NATIVE_SIZES else model


def same_model(one: object, other: object) -> bool:
    """Whether two names are of one model, a gateway's prefix left aside."""
    return bare_model(str(one)) == bare_model(str(other))


def native_size(model: str) -> int | None:
    """The model's full size, or None for a model that is not known here."""
    return _NATIVE_SIZES.get(bare_model(model))


def takes_dimensions(model: str) -> bool:
    """Whether the API takes `dimensions` for this model."""
    return bare_model(model).startswith(_SHORTENED)


def model_fault(model: str, size: int) -> str | None:
    """Why `model` cannot make vectors of `size`, or None. Unknown models are judged by their first answer."""
    native = native_size(model)
    if native is None or size == native:
        return None
    if not takes_dimensions(model):
        return f"EMBEDDING_MODEL {model} makes {native}d vectors only, VECTOR_SIZE is {size}"
    if size > native:
        return f"EMBEDDING_MODEL {model} makes at most {native}d vectors, VECTOR_SIZE is {size}"
    return None


def check_model(model: str, size: int) -> None:
    """Raise UsageProblem where `model` cannot make vectors of `size`."""
    fault = model_fault(model, size)
    if fault is None:
        return
    larger = "text-embedding-3-large" if size <= 3072 else "a larger model"
    raise UsageProblem(
        fault,
        next_step=f"export EMBEDDING_MODEL={larger}   or   export VECTOR_SIZE={native_size(model)}",
    )


def check_dimension(collection: str, actual: int, configured: int) -> None:
    """Fail fast, with the text operators know, where the live size is not the configured one.

    Raises DimensionMismatch (a ValueError); the command's stderr starts with `ValueError: VECTOR ...`.
    """
    if actual == configured:
        return
    raise DimensionMismatch(
        "VECTOR DIMENSION MISMATCH\n"
        f"Qdrant collection '{collection}': {actual}d\n"
        f"Config VECTOR_SIZE: {configured}d",
        next_step=(
            f"keep the collection:  export VECTOR_SIZE={actual}\n"
            "migrate it:           python scripts/backup_automem.py && python scripts/reembed_embeddings.py"
        ),
    )


OPENAI_BASE_URL = "https://api.openai.com/v1"


def public_url(base_url: str) -> str:
    """`base_url` without credentials, query and closing slash; OpenAI's own where it is empty."""
    parts = urlsplit(base_url.strip() or OPENAI_BASE_URL)
    host = parts.netloc.rpartition("@")[2].lower()
    return urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), "", ""))
