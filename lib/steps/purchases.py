"""What a migration bought, over all of its starts: sums, and texts a second over time, kept in the spool.

A run may be killed while it embeds, before it has a journal: what it had bought by then is told by the report of the
run that finishes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from lib.dimensions import EmbeddingSpec
from lib.embedding.endpoint import public_url
from lib.embedding.spool import Spool
from lib.embedding.workers import EmbedProgress

MOST_SLOTS = 240
_SLOT_SECONDS = 0.5  # the shortest; those of a long run grow with it
_SAVE_SECONDS = 2.0  # so much of the figures a kill may take along; no vector


@dataclass(frozen=True)
class Slot:
    """A stretch of embedding: `at` its begin (Unix seconds), its length, and the texts that arrived in it.

    `after_pause`: embedding began anew with it, by another start or a later round.
    """

    at: float
    seconds: float
    texts: int
    rate_limited: int = 0
    after_pause: bool = False


@dataclass
class Purchases:
    """Sums over all slots; `settled_by` names the run whose report has told them.

    `discarded` are those of the `tokens` that were paid for vectors of no use.
    """

    texts: int = 0
    tokens: int = 0
    requests: int = 0
    rate_limited: int = 0
    seconds: float = 0.0
    slots: list[Slot] = field(default_factory=list)
    settled_by: str = ""
    discarded: int = 0

    def add(self, slot: Slot, tokens: int, requests: int) -> None:
        """Add one; where there are too many each two become one."""
        self.texts += slot.texts
        self.tokens += tokens
        self.requests += requests
        self.rate_limited += slot.rate_limited
        self.seconds += slot.seconds
        self.slots.append(slot)
        if len(self.slots) > MOST_SLOTS:
            pairs = zip(self.slots[::2], [*self.slots[1::2], None], strict=False)
            self.slots = [_joined(one, other) for one, other in pairs]


def _joined(one: Slot, other: Slot | None) -> Slot:
    if other is None:
        return one
    return Slot(
        one.at,
        one.seconds + other.seconds,
        one.texts + other.texts,
        one.rate_limited + other.rate_limited,
        one.after_pause or other.after_pause,
    )


class PurchaseLog:
    """The purchases of one endpoint, model and size for one graph and collection, as the spool keeps them."""

    def __init__(self, spool: Spool, spec: EmbeddingSpec) -> None:
        self._spool = spool
        self._name = f"bought of {public_url(spec.base_url)} {spec.model} {spec.size}"
        self.made = _read(spool.get_meta(self._name))

    def begin(self, run_id: str | None) -> None:
        """Forget what the report of another run than the one that is gone on with (None: none is) has told."""
        if self.made.settled_by and self.made.settled_by != run_id:
            self.made = Purchases()

    def settle(self, run_id: str) -> None:
        """Note that this run's report has told them."""
        self.made.settled_by = run_id
        self.save()

    def pay(self, tokens: int) -> None:
        """Count tokens of an answer that only tested the endpoint; on the disk when it returns."""
        self.made.tokens += tokens
        self.made.discarded += tokens
        self.save()

    def save(self) -> None:
        """On the disk when it returns."""
        self._spool.set_meta(self._name, json.dumps(dataclasses.asdict(self.made)))


def _read(stored: str | None) -> Purchases:
    if not stored:
        return Purchases()
    try:
        values = json.loads(stored)
        return Purchases(**{**values, "slots": [Slot(**one) for one in values["slots"]]})
    except (ValueError, KeyError, TypeError):  # figures of another version of these scripts
        return Purchases()


@contextmanager
def watched(log: PurchaseLog | None, *, kept: bool = True) -> Iterator[Callable[[EmbedProgress], None]]:
    """A callback that notes one purchase's progress; what it saw last counts however the block ends.

    `kept`: False if the vectors are thrown away, so that all tokens count as discarded.
    """
    if log is None:
        yield lambda _seen: None
        return
    watch = _Watch(log, kept=kept)
    try:
        yield watch.see
    finally:
        watch.end()


class _Watch:
    def __init__(self, log: PurchaseLog, *, kept: bool) -> None:
        self._log, self._kept = log, kept
        self._seen = self._noted = EmbedProgress(0, 0, 0, 0, 0, 0.0, 0.0)
        self._pause = bool(log.made.slots)
        self._saved = time.monotonic()

    def see(self, seen: EmbedProgress) -> None:
        self._seen = seen
        width = max(_SLOT_SECONDS, 2 * self._log.made.seconds / MOST_SLOTS)
        if seen.seconds - self._noted.seconds < width:
            return
        self._note()
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._log.save()
            self._saved = time.monotonic()

    def end(self) -> None:
        if self._seen.requests > self._noted.requests or self._seen.embedded > self._noted.embedded:
            self._note()
        self._log.made.discarded += self._seen.discarded if self._kept else self._seen.tokens
        self._log.save()

    def _note(self) -> None:
        seen, noted = self._seen, self._noted
        seconds = seen.seconds - noted.seconds
        slot = Slot(
            round(time.time() - seconds, 3),
            round(seconds, 3),
            seen.embedded - noted.embedded,
            seen.rate_limited - noted.rate_limited,
            after_pause=self._pause,
        )
        self._log.made.add(slot, seen.tokens - noted.tokens, seen.requests - noted.requests)
        self._noted, self._pause = replace(seen), False
