"""The settings that go with a restored collection, as lines to type."""

from __future__ import annotations

from lib.config import Config


def settings_lines(size: int, model: str, config: Config) -> list[str]:
    """Lines to put back where the collection's size or model is not the configured one; else none."""
    if (size, model) == (config.vector_size, config.embedding_model):
        return []
    origins = {config.settings[name].origin for name in ("VECTOR_SIZE", "EMBEDDING_MODEL")}
    files = sorted({origin.rsplit(":", 1)[0] for origin in origins if ":" in origin})
    configured = f"{config.vector_size}d ({config.embedding_model})"
    lines = [
        "",
        f"warning: the collection is {size}d ({model}), the configuration says {configured}. Put back:",
        f"  export VECTOR_SIZE={size}",
        f"  export EMBEDDING_MODEL={model}",
    ]
    for file in files:
        lines.append(f"and in {file}:")
        lines += [f"  VECTOR_SIZE={size}", f"  EMBEDDING_MODEL={model}"]
    return lines
