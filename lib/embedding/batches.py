"""Rows put together into requests that the provider accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from lib.embedding.pacing import estimated_tokens
from lib.embedding.plan_table import TextRow
from lib.embedding.pricing import CUT_TO_TOKENS, count_tokens, cut_to_tokens, input_limit

MAX_INPUTS = 2048  # of one request (https://platform.openai.com/docs/api-reference/embeddings)
MAX_TOKENS = 250_000  # the provider takes 300,000; its count and ours may differ


@dataclass(frozen=True)
class Refused:
    """A row that has no vector, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Caps:
    """The most of one request: texts, and tokens as the rate limiter estimates them."""

    inputs: int = MAX_INPUTS
    tokens: float = MAX_TOKENS


def batches(
    rows: Iterable[TextRow],
    model: str,
    caps: Callable[[], Caps],
    *,
    refused: Callable[[Refused], None],
    cut: Callable[[str], None],
) -> Iterator[list[TextRow]]:
    """Batches under the `caps` of the moment.

    Blank texts are told to `refused`: one would fail its whole request. Texts over the model's limit are cut and
    their labels told to `cut`; the key stays that of the whole text.
    """
    batch: list[TextRow] = []
    tokens, limits = 0, caps()
    for row in rows:
        if not row.text.strip():
            refused(Refused(row.label, "blank content"))
            continue
        sent = _fitting(row, model)
        if sent.text != row.text:
            cut(row.label)
        weight = max(sent.tokens, estimated_tokens([sent.text]))
        if batch and (len(batch) >= limits.inputs or tokens + weight > limits.tokens):
            yield batch
            batch, tokens, limits = [], 0, caps()
        batch.append(sent)
        tokens += weight
    if batch:
        yield batch


def _fitting(row: TextRow, model: str) -> TextRow:
    tokens = row.tokens or count_tokens([row.text])[0]
    limit = input_limit(model)
    if limit is None or tokens <= limit:
        return row if row.tokens == tokens else replace(row, tokens=tokens)
    return replace(row, text=cut_to_tokens(row.text, CUT_TO_TOKENS), tokens=CUT_TO_TOKENS)
