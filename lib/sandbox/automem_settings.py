"""The settings of the AutoMem stand-in: AutoMem's own variables, with the guide's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

VARIABLES = (
    "FALKORDB_HOST",
    "FALKORDB_PORT",
    "FALKORDB_PASSWORD",
    "FALKORDB_GRAPH",
    "QDRANT_URL",
    "QDRANT_HOST",
    "QDRANT_PORT",
    "QDRANT_API_KEY",
    "QDRANT_COLLECTION",
    "VECTOR_SIZE",
    "VECTOR_SIZE_AUTODETECT",
    "EMBEDDING_MODEL",
    "OPENAI_BASE_URL",
    "OPENAI_API_KEY",
    "AUTOMEM_API_TOKEN",
    "AUTOMEM_POST_RECALL",
)
_NO = ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class AutoMemSettings:
    """Addresses, names, sizes; no secret is in its repr."""

    falkordb_host: str
    falkordb_port: int
    graph: str
    qdrant_url: str
    collection: str
    vector_size: int
    model: str
    openai_url: str
    falkordb_password: str = field(default="", repr=False)
    qdrant_api_key: str = field(default="", repr=False)
    openai_api_key: str = field(default="", repr=False)
    api_token: str = field(default="", repr=False)
    autodetect_size: bool = (
        False  # later versions adopt the collection's size; the guide's version refuses to start
    )
    post_recall: bool = False  # a version that takes POST /recall, as the guide writes it


def settings_from(env: Mapping[str, str]) -> AutoMemSettings:
    """Read the variables as AutoMem does: an empty one counts as unset. Raises ValueError for a bad number."""
    given = {name: value for name, value in env.items() if value}
    host, port = given.get("QDRANT_HOST", "localhost"), given.get("QDRANT_PORT", "6333")
    return AutoMemSettings(
        falkordb_host=given.get("FALKORDB_HOST", "localhost"),
        falkordb_port=int(given.get("FALKORDB_PORT", "6379")),
        falkordb_password=given.get("FALKORDB_PASSWORD", ""),
        graph=given.get("FALKORDB_GRAPH", "memories"),
        qdrant_url=given.get("QDRANT_URL", f"http://{host}:{port}").rstrip("/"),
        qdrant_api_key=given.get("QDRANT_API_KEY", ""),
        collection=given.get("QDRANT_COLLECTION", "memories"),
        vector_size=int(given.get("VECTOR_SIZE", "3072")),
        model=given.get("EMBEDDING_MODEL", "text-embedding-3-large"),
        openai_url=given.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/"),
        openai_api_key=given.get("OPENAI_API_KEY", ""),
        api_token=given.get("AUTOMEM_API_TOKEN", ""),
        autodetect_size=given.get("VECTOR_SIZE_AUTODETECT", "false").lower() not in _NO,
        post_recall=given.get("AUTOMEM_POST_RECALL", "0").lower() not in _NO,
    )
