"""Which model AutoMem's stand-in embeds with: chosen from the settings as AutoMem does (`embedding/provider_init.py`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import requests

Settings = Mapping[str, str]
# AutoMem's variables and their defaults. VOYAGE_BASE_URL is a constant there.
EMBEDDING_DEFAULTS = {
    "EMBEDDING_PROVIDER": "auto",
    "EMBEDDING_MODEL": "text-embedding-3-large",
    "OPENAI_BASE_URL": "https://api.openai.com/v1",
    "OPENAI_API_KEY": "",
    "VOYAGE_BASE_URL": "https://api.voyageai.com/v1",
    "VOYAGE_API_KEY": "",
    "VOYAGE_MODEL": "voyage-4",
    "OLLAMA_BASE_URL": "",
    "OLLAMA_MODEL": "",
    "AUTOMEM_MODELS_DIR": "",
}
VOYAGE_SIZES = (256, 512, 1024, 2048)
LOCAL_MODELS = {384: "BAAI/bge-small-en-v1.5", 768: "BAAI/bge-base-en-v1.5", 1024: "BAAI/bge-large-en-v1.5"}
TIMEOUT_SECONDS = 20.0


class VectorsUnavailable(Exception):
    """Qdrant or the embedding model failed. AutoMem logs it and continues without vectors."""


def chosen_provider(settings: Settings, size: int) -> str:
    """Choose the provider for vectors of `size`. Raises ValueError for a setting with which AutoMem does not start.

    AutoMem downloads a local model if nothing else is set up; the stand-in then writes placeholder vectors.
    """
    wanted = settings["EMBEDDING_PROVIDER"].strip().lower()
    if wanted == "auto":
        if settings["VOYAGE_API_KEY"] and size in VOYAGE_SIZES:
            return "voyage"
        if settings["OPENAI_API_KEY"]:
            return "openai"
        return "ollama" if settings["OLLAMA_BASE_URL"] or settings["OLLAMA_MODEL"] else "placeholder"
    if wanted not in {"voyage", "openai", "ollama", "local", "placeholder"}:
        raise ValueError(f"Invalid EMBEDDING_PROVIDER={wanted}")
    if wanted in {"voyage", "openai"} and not settings[f"{wanted.upper()}_API_KEY"]:
        raise ValueError(f"EMBEDDING_PROVIDER={wanted} but {wanted.upper()}_API_KEY not set")
    if wanted == "voyage" and size not in VOYAGE_SIZES:
        raise ValueError(f"voyage supported dimensions: {list(VOYAGE_SIZES)}, the collection has {size}")
    return wanted


class Embedder:
    """Embeds one text at a time with the provider that the settings choose. Raises ValueError as `chosen_provider`."""

    def __init__(self, settings: Settings, size: int) -> None:
        self.provider = chosen_provider(settings, size)
        self._settings, self._size = settings, size
        self._local: Any = None
        if self.provider == "local":
            from fastembed import TextEmbedding

            folder = settings["AUTOMEM_MODELS_DIR"] or str(Path.home() / ".config" / "automem" / "models")
            self._local = TextEmbedding(LOCAL_MODELS.get(size, LOCAL_MODELS[768]), cache_dir=folder)

    def embed(self, text: str) -> list[float]:
        """Embed a text. Raises VectorsUnavailable, also if the vector has another size than the collection."""
        vector: list[float] = getattr(self, f"_{self.provider}_vector")(text)
        if len(vector) != self._size:
            raise VectorsUnavailable(f"{self.provider} returned {len(vector)}d, not {self._size}d")
        return vector

    def _openai_vector(self, text: str) -> Any:
        model = self._settings["EMBEDDING_MODEL"]
        body: dict[str, Any] = {"model": model, "input": text, "encoding_format": "float"}
        if model.startswith("text-embedding-3-"):
            body["dimensions"] = self._size
        return self._ask("OPENAI", "embeddings", body)["data"][0]["embedding"]

    def _voyage_vector(self, text: str) -> Any:
        body = {"input": [text], "model": self._settings["VOYAGE_MODEL"], "output_dimension": self._size}
        return self._ask("VOYAGE", "embeddings", body)["data"][0]["embedding"]

    def _ollama_vector(self, text: str) -> Any:
        body = {"model": self._settings["OLLAMA_MODEL"] or "nomic-embed-text", "prompt": text}
        return self._ask("OLLAMA", "api/embeddings", body)["embedding"]

    def _local_vector(self, text: str) -> Any:
        return next(iter(self._local.embed([text]))).tolist()

    def _placeholder_vector(self, text: str) -> Any:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(self._size).tolist()

    def _ask(self, prefix: str, path: str, body: object) -> Any:
        key = self._settings.get(f"{prefix}_API_KEY")
        url = (self._settings[f"{prefix}_BASE_URL"] or "http://localhost:11434").rstrip("/")
        return send("POST", f"{url}/{path}", body, {"Authorization": f"Bearer {key}"} if key else {})


def send(method: str, url: str, body: object, headers: dict[str, str]) -> Any:
    """Send a request and return the JSON of its answer. Raises VectorsUnavailable."""
    try:
        answer = requests.request(method, url, json=body, headers=headers, timeout=TIMEOUT_SECONDS)
    except requests.RequestException as error:
        raise VectorsUnavailable(f"{method} {url}: {type(error).__name__}") from error
    if not answer.ok:
        raise VectorsUnavailable(f"{method} {url}: {answer.status_code} {answer.text[:300]}")
    return answer.json()
