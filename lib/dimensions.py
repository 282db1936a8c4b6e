"""Embedding models and dimensions: the sizes that a model can make, and the dimension check."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lib.errors import DimensionMismatch, UsageProblem, did_you_mean

UNKNOWN_MODEL = "unknown"  # in a manifest, if nothing says which model made the vectors
# The providers that AutoMem can use (its EMBEDDING_PROVIDER), but for placeholder vectors.
OPENAI, VOYAGE, OLLAMA, LOCAL = "openai", "voyage", "ollama", "local"
LOCAL_URL = "local:fastembed"  # the endpoint of models that run in this process
# The models that AutoMem chooses by size for the provider `local`.
LOCAL_MODELS = {384: "BAAI/bge-small-en-v1.5", 768: "BAAI/bge-base-en-v1.5", 1024: "BAAI/bge-large-en-v1.5"}


@dataclass(frozen=True)
class SettingNames:
    """The settings that an operator changes to use another key, model or endpoint of one provider."""

    key: str
    model: str
    endpoint: str


SETTING_NAMES = {
    OPENAI: SettingNames("OPENAI_API_KEY", "EMBEDDING_MODEL", "OPENAI_BASE_URL"),
    VOYAGE: SettingNames("VOYAGE_API_KEY", "VOYAGE_MODEL", "VOYAGE_BASE_URL"),
    OLLAMA: SettingNames("", "OLLAMA_MODEL", "OLLAMA_BASE_URL"),
    LOCAL: SettingNames("", "EMBEDDING_PROVIDER", "AUTOMEM_MODELS_DIR"),
}


@dataclass(frozen=True)
class _Model:
    """The sizes of one model's vectors.

    `native` is the size of an answer to a request that names none. `sizes` are the others that the model is trained
    for: a larger vector of it, cut to one of them and scaled to length 1, is its vector of that size. `unit`: the
    provider documents that all vectors have length 1.
    """

    native: int
    sizes: Collection[int] = ()
    unit: bool = True


# https://platform.openai.com/docs/guides/embeddings, https://docs.voyageai.com/docs/embeddings. Ollama's
# nomic-embed-text and the local models make one size: AutoMem asks them for none.
_VOYAGE = _Model(1024, (256, 512, 2048))
_MODELS = {
    "text-embedding-3-small": _Model(1536, range(1, 1536)),
    "text-embedding-3-large": _Model(3072, range(1, 3072)),
    "text-embedding-ada-002": _Model(1536),
    "voyage-4-large": _VOYAGE,
    "voyage-4": _VOYAGE,
    "voyage-4-lite": _VOYAGE,
    "voyage-3-large": _VOYAGE,
    "voyage-3.5": _VOYAGE,
    "voyage-3.5-lite": _VOYAGE,
    "voyage-code-3": _VOYAGE,
    "nomic-embed-text": _Model(768, unit=False),
    **{model: _Model(size, unit=False) for size, model in LOCAL_MODELS.items()},
}


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
    return name if name in _MODELS else model


def same_model(one: object, other: object) -> bool:
    """Whether two names mean one model, with or without a gateway's prefix."""
    return bare_model(str(one)) == bare_model(str(other))


def provider_of(record: Mapping[str, Any]) -> str:
    """Return the provider that a stamp, a manifest's component or a journal names. One without is OpenAI's."""
    return str(record.get("provider") or OPENAI)


def provider_fact(provider: str) -> dict[str, str]:
    """Return what such a record holds of the provider: nothing if it is OpenAI, as in records of earlier versions."""
    return {} if provider == OPENAI else {"provider": provider}


def is_model_of(record: Mapping[str, Any], spec: EmbeddingSpec) -> bool:
    """Whether a stamp names the model and the provider of `spec`."""
    return same_model(record.get("model"), spec.model) and provider_of(record) == spec.provider


def native_size(model: str) -> int | None:
    """Return the size of the model's vectors if a request names none, or None for an unknown model."""
    known = _MODELS.get(bare_model(model))
    return known.native if known else None


def similar_model(model: str) -> str:
    """Return ` (did you mean ...?)` if an unknown model's name resembles a known one's, else an empty text."""
    return did_you_mean(model.rpartition("/")[2], _MODELS) if native_size(model) is None else ""


def takes_dimensions(model: str) -> bool:
    """Whether OpenAI's API accepts `dimensions` for this model."""
    return bare_model(model).startswith("text-embedding-3-")


def can_be_cut(model: str) -> bool:
    """Whether vectors of this model's smaller sizes are larger ones cut and scaled to length 1."""
    known = _MODELS.get(bare_model(model))
    return known is not None and bool(known.sizes)


def has_unit_vectors(model: str) -> bool:
    """Whether the model's provider documents vectors of length 1."""
    known = _MODELS.get(bare_model(model))
    return known is not None and known.unit


def model_fault(model: str, size: int, provider: str = OPENAI) -> str | None:
    """Return why `model` cannot make vectors of `size`, or None. An unknown model is checked by its first answer."""
    known = _MODELS.get(bare_model(model))
    if known is None or size == known.native or size in known.sizes:
        return None
    if isinstance(known.sizes, range):
        made = f"at most {known.native}d vectors"
    else:
        made = f"{'d, '.join(map(str, sorted([*known.sizes, known.native])))}d vectors only"
    name = "local model" if provider == LOCAL else SETTING_NAMES[provider].model
    return f"{name} {model} makes {made}, VECTOR_SIZE is {size}"


def check_model(model: str, size: int, provider: str = OPENAI) -> None:
    """Raise UsageProblem if `model` cannot make vectors of `size`."""
    fault = model_fault(model, size, provider)
    if fault is None:
        return
    known = _MODELS[bare_model(model)]
    sizes = LOCAL_MODELS if provider == LOCAL else [known.native, *known.sizes]
    step = f"export VECTOR_SIZE={min(sizes, key=lambda one: (abs(one - size), one))}"
    if provider == OPENAI:
        larger = "text-embedding-3-large" if size <= 3072 else "..."
        step = f"export EMBEDDING_MODEL={larger}\nor:\nexport VECTOR_SIZE={known.native}"
    raise UsageProblem(fault, next_step=step)


def check_dimension(collection: str, actual: int, configured: int) -> None:
    """Raise DimensionMismatch (a ValueError) if the live size is not the configured one.

    The command's stderr then starts with `ValueError: VECTOR DIMENSION MISMATCH`, as AutoMem's guide documents.
    """
    if actual == configured:
        return
    raise DimensionMismatch(
        f"VECTOR DIMENSION MISMATCH\nQdrant collection '{collection}': {actual}d\nConfig VECTOR_SIZE: {configured}d",
        next_step=(
            f"keep the collection:\nexport VECTOR_SIZE={actual}\n"
            "or migrate it:\npython scripts/backup_automem.py && python scripts/reembed_embeddings.py"
        ),
    )


OPENAI_BASE_URL = "https://api.openai.com/v1"


def public_url(base_url: str) -> str:
    """Return `base_url` without credentials, query and closing slash; OpenAI's URL if it is empty."""
    parts = urlsplit(base_url.strip() or OPENAI_BASE_URL)
    host = parts.netloc.rpartition("@")[2].lower()
    return urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), "", ""))
