"""A batch embedded by one worker, split where it is refused, down to the row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from lib.embedding.batches import Refused
from lib.embedding.client import CONTROL_TEXT, EmbeddingClient
from lib.embedding.plan_table import TextRow
from lib.embedding.pricing import count_tokens, cut_to_tokens
from lib.embedding.refusals import BadAnswer, BadInput, context_limit
from lib.errors import ProviderRefused

Vectors = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Arrived:
    """From a worker: vectors, a refused row, the label of a text that was cut, an error, or the end of a batch."""

    vectors: Vectors
    tokens: int = 0
    refused: Refused | None = None
    cut: str | None = None
    error: BaseException | None = None
    batch_ended: bool = False


def embed_split(
    client: EmbeddingClient,
    batch: list[TextRow],
    stop: threading.Event,
    deliver: Callable[[Arrived], None],
    too_many: Callable[[int], None],
    since: float | None = None,
) -> bool:
    """Embed `batch` and deliver what comes of it, piece by piece; returns whether every row was taken.

    A refused batch is never sent again as it is: its halves are. Where both are taken whole, it was the number
    of texts, and `too_many` hears how many are fine. `since`: when the whole batch was first sent (monotonic).
    Raises what EmbeddingClient.embed raises, except BadInput.
    """
    since = time.monotonic() if since is None else since
    try:
        answer = client.embed([row.text for row in batch], stop=stop)
    except BadInput as problem:
        shorter = _cut_to_limit(batch[0], str(problem)) if len(batch) == 1 else None
        if shorter:
            taken = embed_split(client, [shorter], stop, deliver, too_many, since)
            if taken:
                deliver(Arrived([], cut=shorter.label))
            return taken
        if len(batch) == 1:
            _prove_endpoint(client, stop, since)
            deliver(Arrived([], refused=Refused(batch[0].label, str(problem))))
            return False
        middle = (len(batch) + 1) // 2
        halves = [
            embed_split(client, half, stop, deliver, too_many, since)
            for half in (batch[:middle], batch[middle:])
        ]
        if all(halves) and not isinstance(problem, BadAnswer):
            too_many(middle)
        return all(halves)
    rows = answer.vectors.astype("<f4", copy=False)
    pairs = [(row.key, vector.tobytes()) for row, vector in zip(batch, rows, strict=True)]
    deliver(Arrived(pairs, answer.tokens))
    return True


def _cut_to_limit(row: TextRow, problem: str) -> TextRow | None:
    """The row with its text cut to what the refusal says the model takes; None if it says nothing, or it fits.

    The provider may count other tokens than ours: each further refusal takes a tenth more off.
    """
    limit = context_limit(problem)
    if limit is None or limit < 2:
        return None
    tokens = count_tokens([row.text])[0]
    most = limit - 1 if tokens >= limit else int(tokens * 0.9)
    text = cut_to_tokens(row.text, most) if most else ""
    return replace(row, text=text, tokens=most) if text.strip() and text != row.text else None


def _prove_endpoint(client: EmbeddingClient, stop: threading.Event, since: float) -> None:
    """Before a row is called bad: has the endpoint taken any other text since, or does it take a plain word?

    One that has begun to refuse everything must not look like a graph full of bad memories.
    """
    if client.answered_since(since):
        return
    try:
        client.embed([CONTROL_TEXT], stop=stop)
    except BadInput as problem:
        raise ProviderRefused(
            f"{client.provider} does not even embed a plain word: {problem}",
            next_step="check EMBEDDING_MODEL, VECTOR_SIZE and OPENAI_BASE_URL, then run the same command again",
        ) from problem
