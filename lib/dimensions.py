"""Embedding models and dimensions: the sizes that a model can make, and the dimension check."""

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
# The providers that AutoMem can use (its EMBEDDING_PROVIDER), but for placeholder vectors.
OPENAI, VOYAGE, OLLAMA, LOCAL = "openai", "voyage", "ollama", "local"
LOCAL_URL = "local:fastembed"  # the endpoint of models that run in this process


@dataclass(frozen=True)
class EmbeddingSpec:
    """The endpoint, model and size that decide a text's vector. The endpoint's URL may hold a login or a key.

    Each provider has its own endpoint, so that `provider` decides nothing more: it names the protocol and its limits.
    """

    base_url: str = field(repr=False)
    model: str
    size: int
    provider: str = field(default=OPENAI, compare=False)


def bare_model(model: str) -> str:
    """Return the model without a gateway's prefix: `openai/text-embedding-3-large` is `text-embedding-3-large`."""
    name = model.rpartition("/")[2]
    return name if name in _NATIVE_SIZES else model


def same_model(one: object, other: object) -> bool:
    """Whether two names mean one model, with or without a gateway's prefix."""
    return bare_model(str(one)) == bare_model(str(other))


def native_size(model: str) -> int | None:
    """Return the model's full size, or None for an unknown model."""
    return _NATIVE_SIZES.get(bare_model(model))


def similar_model(model: str) -> str:
    """Return ` (did you mean ...?)` if an unknown model's name resembles a known one's, else an empty text."""
    import difflib

    near = difflib.get_close_matches(model.rpartition("/")[2], _NATIVE_SIZES, 1, 0.85)
    return f" (did you mean {near[0]}?)" if near and native_size(model) is None else ""


def takes_dimensions(model: str) -> bool:
    """Whether the API accepts `dimensions` for this model."""
    return bare_model(model).startswith(_SHORTENED)


def model_fault(model: str, size: int) -> str | None:
    """Return why `model` cannot make vectors of `size`, or None. An unknown model is checked by its first answer."""
    native = native_size(model)
    if native is None or size == native:
        return None
    if not takes_dimensions(model):
        return f"EMBEDDING_MODEL {model} makes {native}d vectors only, VECTOR_SIZE is {size}"
    if size > native:
        return f"EMBEDDING_MODEL {model} makes at most {native}d vectors, VECTOR_SIZE is {size}"
    return None


def check_model(model: str, size: int) -> None:
    """Raise UsageProblem if `model` cannot make vectors of `size`."""
    fault = model_fault(model, size)
    if fault is None:
        return
    larger = "text-embedding-3-large" if size <= 3072 else "a larger model"
    raise UsageProblem(
        fault,
        next_step=f"export EMBEDDING_MODEL={larger}   or   export VECTOR_SIZE={native_size(model)}",
    )


def check_dimension(collection: str, actual: int, configured: int) -> None:
    """Raise DimensionMismatch (a ValueError) if the live size is not the configured one.

    The command's stderr then starts with `ValueError: VECTOR DIMENSION MISMATCH`, as AutoMem's guide documents.
    """
    if actual == configured:
        return
    raise DimensionMismatch(
        f"VECTOR DIMENSION MISMATCH\nQdrant collection '{collection}': {actual}d\nConfig VECTOR_SIZE: {configured}d",
        next_step=(
            f"keep the collection:  export VECTOR_SIZE={actual}\n"
            "migrate it:           python scripts/backup_automem.py && python scripts/reembed_embeddings.py"
        ),
    )


OPENAI_BASE_URL = "https://api.openai.com/v1"


def public_url(base_url: str) -> str:
    """Return `base_url` without credentials, query and closing slash; OpenAI's URL if it is empty."""
    parts = urlsplit(base_url.strip() or OPENAI_BASE_URL)
    host = parts.netloc.rpartition("@")[2].lower()
    return urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), "", ""))
