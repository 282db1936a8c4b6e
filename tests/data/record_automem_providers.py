"""Write automem_providers.json: what AutoMem itself chooses for each row of settings.

    python tests/data/record_automem_providers.py AUTOMEM_CHECKOUT VERSION

AutoMem's own code decides: `config.py` reads the settings, `embedding/provider_init.py` chooses, and the provider classes
check the size. Only the local models are replaced, by one that makes vectors of the model's size.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
VOYAGE, OPENAI, OLLAMA = {"VOYAGE_API_KEY": "pa-x"}, {"OPENAI_API_KEY": "sk-x"}, {"OLLAMA_MODEL": "mxbai-embed-large"}
LARGE, SMALL = {"EMBEDDING_MODEL": "text-embedding-3-large"}, {"EMBEDDING_MODEL": "text-embedding-3-small"}
SIZES = {"BAAI/bge-small-en-v1.5": 384, "BAAI/bge-base-en-v1.5": 768, "BAAI/bge-large-en-v1.5": 1024}


def provider(word: str) -> dict[str, str]:
    return {"EMBEDDING_PROVIDER": word}


def size(number: object) -> dict[str, str]:
    return {"VECTOR_SIZE": str(number)}


ROWS: list[dict[str, str]] = [
    # The guide's settings, and each of Voyage's sizes.
    *({**OPENAI, **LARGE, **size(number)} for number in (256, 768, 1024, 1536, 3072)),
    {**OPENAI, **SMALL, **size(768)},
    {**OPENAI, **SMALL, **size(1536)},
    *({**VOYAGE, **size(number)} for number in (256, 512, 1024, 2048)),
    *({**VOYAGE, **OPENAI, **LARGE, **size(number)} for number in (256, 512, 768, 1024, 1536, 2048, 3072)),
    {**VOYAGE, **OPENAI, **SMALL, **size(1537)},
    # The default of EMBEDDING_MODEL, the small model above its size, and a gateway's prefix.
    {**OPENAI, **size(768)},
    {**OPENAI, **size(1536)},
    {**OPENAI, **size(1537)},
    {**OPENAI, **size(3072)},
    {**OPENAI, **SMALL, **size(3072)},
    {**OPENAI, "EMBEDDING_MODEL": "openai/text-embedding-3-small", **size(2048)},
    {**OPENAI, "EMBEDDING_MODEL": "openai/text-embedding-3-large", **size(3072)},
    {**OPENAI, "EMBEDDING_MODEL": "text-embedding-ada-002", **size(1536)},
    {**OPENAI, **LARGE, **size(3072), "OPENAI_BASE_URL": "https://openrouter.ai/api/v1"},
    {**VOYAGE, "VOYAGE_MODEL": "voyage-4-large", **size(1024)},
    {**VOYAGE, "VOYAGE_MODEL": "voyage-3.5", **size(512)},
    # Ollama: if its URL or its model is set, and no key is.
    {**OLLAMA, **size(1024)},
    {"OLLAMA_BASE_URL": "http://localhost:11434", **size(768)},
    {"OLLAMA_BASE_URL": "http://ollama:11434/", "OLLAMA_MODEL": "bge-m3", **size(1024)},
    {**OLLAMA, **OPENAI, **LARGE, **size(1024)},
    {**OLLAMA, **VOYAGE, **size(1024)},
    {**OLLAMA, **VOYAGE, **size(768)},
    {**OLLAMA, **VOYAGE, **OPENAI, **LARGE, **size(768)},
    {**OLLAMA, "OLLAMA_TIMEOUT": "5.5", **size(1024)},
    {"OLLAMA_TIMEOUT": "5.5", **size(384)},
    # Nothing is set but a size.
    *(size(number) for number in (384, 768, 1024)),
    size(512),
    size(3072),
    {**VOYAGE, **size(384)},
    {**VOYAGE, **size(3072)},
    {**LARGE, **size(1024)},
    {"VOYAGE_MODEL": "voyage-4-large", **size(1024)},
    # A provider by name, with other providers' settings next to its own.
    {**provider("openai"), **VOYAGE, **OPENAI, **LARGE, **size(1024)},
    {**provider("openai"), **OPENAI, **size(768)},
    {**provider("openai"), **OLLAMA, **OPENAI, **SMALL, **size(2000)},
    {**provider("openai"), **VOYAGE, **size(1024)},
    {**provider("voyage"), **VOYAGE, **OPENAI, **size(1024)},
    {**provider("voyage"), **VOYAGE, **OPENAI, **size(768)},
    {**provider("voyage"), **VOYAGE, "VOYAGE_MODEL": "voyage-4-lite", **size(256)},
    {**provider("voyage"), **OPENAI, **size(1024)},
    {**provider("ollama"), **VOYAGE, **OPENAI, **size(768)},
    {**provider("ollama"), **OLLAMA, **OPENAI, **size(1024)},
    {**provider("ollama"), "OLLAMA_TIMEOUT": "soon", **size(768)},
    {**provider("local"), **VOYAGE, **OPENAI, **size(1024)},
    {**provider("local"), **size(384)},
    {**provider("local"), **size(768)},
    {**provider("local"), **size(3072)},
    {**provider("placeholder"), **OPENAI, **size(768)},
    # Spelling: blanks, upper case, empty values, unknown words.
    {**provider(" Voyage "), **VOYAGE, **size(1024)},
    {**provider("OPENAI"), **VOYAGE, **OPENAI, **LARGE, **size(1024)},
    {**provider("Auto"), **VOYAGE, **OPENAI, **LARGE, **size(1024)},
    {**provider("LOCAL\t"), **OPENAI, **size(768)},
    {**provider(""), **VOYAGE, **OPENAI, **size(512)},
    {**provider("   "), **OPENAI, **size(768)},
    {**provider("fastembed"), **OPENAI, **size(768)},
    {**provider("open-ai"), **OPENAI, **size(768)},
    {**provider("auto"), "VOYAGE_API_KEY": "", **OPENAI, **LARGE, **size(1024)},
    {"VOYAGE_API_KEY": "", "OPENAI_API_KEY": "", "OLLAMA_MODEL": "", "OLLAMA_BASE_URL": "", **size(768)},
    {"OLLAMA_BASE_URL": "", **OLLAMA, **size(1024)},
    {**OPENAI, **LARGE, **size(768), "OPENAI_BASE_URL": ""},
    # The older name of VECTOR_SIZE.
    {**VOYAGE, "QDRANT_VECTOR_SIZE": "1024"},
    {**OPENAI, **LARGE, "QDRANT_VECTOR_SIZE": "3072"},
    {"QDRANT_VECTOR_SIZE": "384"},
    {**VOYAGE, **OPENAI, **LARGE, "QDRANT_VECTOR_SIZE": "1024", **size(768)},
    {**VOYAGE, **OPENAI, **LARGE, "QDRANT_VECTOR_SIZE": "1024", "VECTOR_SIZE": ""},
    {**provider("voyage"), **VOYAGE, "QDRANT_VECTOR_SIZE": "768"},
]


def main() -> int:
    """Choose for one row of standard input, or for every row in a separate process, and write the file."""
    if len(sys.argv) == 2:
        print(json.dumps(choose(sys.argv[1])))
        return 0
    checkout, version = sys.argv[1:]
    rows = [{"settings": row, "automem": ask(checkout, row)} for row in ROWS]
    text = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    path = HERE / "automem_providers.json"
    path.write_text(f'{{\n  "automem": {json.dumps(version)},\n  "rows": [\n{text}\n  ]\n}}\n', encoding="utf-8")
    print(f"{path}: {len(rows)} rows")
    return 0


def ask(checkout: str, row: dict[str, str]) -> dict[str, object]:
    """Return AutoMem's choice in a new process with these settings alone."""
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "AUTOMEM_MODELS_DIR": f"{checkout}/.models", **row}
    words = [sys.executable, __file__, checkout]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True, cwd="/")
    return dict(json.loads(done.stdout.splitlines()[-1]))


class TextEmbedding:
    """The local model of fastembed: a vector of the model's size, without a download."""

    def __init__(self, model_name: str, **_options: object) -> None:
        self._size = SIZES[model_name]

    def embed(self, texts: list[str]) -> object:
        return iter([[0.0] * self._size for _ in texts])


def choose(checkout: str) -> dict[str, object]:
    """Return AutoMem's provider, model and size, or what it raises."""
    sys.path.insert(0, checkout)
    sys.modules["fastembed"] = types.SimpleNamespace(TextEmbedding=TextEmbedding)  # type: ignore[assignment]
    try:
        from automem.config import EMBEDDING_MODEL, VECTOR_SIZE
        from automem.embedding.provider_init import init_embedding_provider

        state = types.SimpleNamespace(embedding_provider=None, qdrant=None, effective_vector_size=VECTOR_SIZE)
        logger = logging.getLogger("automem")
        init_embedding_provider(
            state=state, logger=logger, vector_size_config=VECTOR_SIZE, embedding_model=EMBEDDING_MODEL
        )
    except Exception as error:  # noqa: BLE001 - whatever AutoMem refuses to start with
        return {"raises": type(error).__name__, "says": " ".join(str(error).split())[:160]}
    name, _, model = state.embedding_provider.provider_name().partition(":")
    known = {"openai-compatible": "openai", "fastembed": "local"}
    return {"provider": known.get(name, name), "model": model, "size": state.embedding_provider.dimension()}


if __name__ == "__main__":
    raise SystemExit(main())
