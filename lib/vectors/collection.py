"""A collection as a whole: its state, its health, its end."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lib.errors import MissingData
from lib.vectors.address import collection_path
from lib.vectors.refusals import NoAnswer, NotFound, QdrantError, tells_full
from lib.vectors.transport import Qdrant

Health = Literal["missing", "live", "restoring", "dead", "failing"]

FLOAT32, FLOAT16, UINT8, TURBO4 = "float32", "float16", "uint8", "turbo4"
DATATYPES = (FLOAT32, FLOAT16, UINT8, TURBO4)  # of dense vectors, up to 1.19

POLL_SECONDS = 0.5
STABLE_POLLS = 3  # green can flicker between two optimisations

# What a collection answers (500) whose shard was cleared by a restore that then failed or was killed; seen on 1.11.3
# and 1.18.3. Not "Failed to load local shard" nor the texts of recovery mode: that data may be whole.
_DEAD = re.compile(
    r"Failed to restore local replica"
    r"|Dirty shard"
    r"|0 of 0 read operations failed"
    r"|does not have enough active replicas"
    r"|has no active replica"
)
_ASLEEP = "awaiting update operation"
_ELSEWHERE = re.compile(r"Tonic|tcp connect error|Unavailable", re.IGNORECASE)  # another node is down


@dataclass(frozen=True)
class CollectionState:
    """What `GET /collections/{name}` and an exact count say. `raw` is the answer as it came.

    `size` and `distance` are those of the unnamed vector, or of the first named one; 0 and "" without any.
    """

    name: str
    size: int
    distance: str
    points: int
    status: str
    optimizer_ok: bool
    vectors_named: bool
    raw: dict[str, Any] = field(repr=False)

    @property
    def datatype(self) -> str:
        """What the unnamed vector's numbers are stored as."""
        return str((self.raw["config"]["params"].get("vectors") or {}).get("datatype") or FLOAT32)

    @property
    def payload_schema(self) -> dict[str, dict[str, Any]]:
        """The payload indexes: field name to `{data_type, params?, points}`."""
        return dict(self.raw.get("payload_schema") or {})

    @property
    def metadata(self) -> dict[str, Any]:
        """The collection's own metadata (Qdrant 1.16 and later), else empty."""
        return dict(self.raw["config"].get("metadata") or {})

    @property
    def optimizer_said(self) -> str:
        """The optimiser's own words: "ok", or its error."""
        return str(self.raw.get("optimizer_status"))

    @property
    def asleep(self) -> bool:
        """Whether optimisations have waited for a change since the server was started.

        1.18.3 calls that grey; 1.11.3 may call it green, with these words as the optimiser's error (seen after a kill).
        """
        return self.status == "grey" or _ASLEEP in self.optimizer_said

    @property
    def settled(self) -> bool:
        """Whether nothing is being optimised or indexed, or waits for it."""
        return self.status == "green" and self.optimizer_ok and not self.asleep


def list_collections(q: Qdrant) -> list[str]:
    """The names of all collections that the key may see; aliases are not among them."""
    return sorted(str(entry["name"]) for entry in q.json("GET", "/collections")["collections"])


def exists(q: Qdrant, name: str) -> bool:
    """Whether a collection (not an alias) of this name is listed, dead ones included."""
    return name in list_collections(q)


def get_state(q: Qdrant, name: str) -> CollectionState:
    """The state now, with an exact count. Raises MissingData (naming what exists), QdrantError."""
    try:
        raw = q.json("GET", collection_path(name))
        points = q.json("POST", collection_path(name, "points", "count"), {"exact": True}, retry=True)[
            "count"
        ]
    except NotFound:
        known = ", ".join(list_collections(q)) or "none"
        raise MissingData(
            f"Qdrant at {q.display} has no collection '{name}' (it has: {known})",
            next_step="check QDRANT_COLLECTION and QDRANT_URL",
        ) from None
    size, distance, named = vector_params(raw["config"]["params"].get("vectors") or {})
    told = raw.get("optimizer_status")
    optimizer_ok = told == "ok" or _ASLEEP in str(told)
    return CollectionState(name, size, distance, int(points), str(raw["status"]), optimizer_ok, named, raw)


def vector_params(vectors: Mapping[str, Any]) -> tuple[int, str, bool]:
    """Size, distance and whether vectors are named, from `params.vectors` of a configuration."""
    named = not isinstance(vectors.get("size"), int)
    first: Mapping[str, Any] = next(iter(vectors.values()), {}) if named else vectors
    return int(first.get("size", 0)), str(first.get("distance", "")), named and bool(vectors)


def health(q: Qdrant, name: str) -> Health:
    """Whether the collection can be worked with.

    "dead": listed, but its shard is gone, as a failed restore leaves it; only a delete helps. "restoring": its shard
    is on the way. "failing": answers 500 for another reason, such as a node that is down; never delete that.
    """
    if not exists(q, name):
        return "missing"
    try:
        q.json("GET", collection_path(name))
        q.json("POST", collection_path(name, "points", "count"), {"exact": True}, retry=True)
    except NotFound:
        return "restoring"
    except QdrantError as error:
        return _ailment(error)
    return "live"


def _ailment(error: QdrantError) -> Health:
    if "Local shard" in error.text and "not found" in error.text:
        return "restoring"
    dead = error.status == 500 and _DEAD.search(error.text) and not _ELSEWHERE.search(error.text)
    return "dead" if dead else "failing"


def is_dead(q: Qdrant, name: str) -> bool:
    """Whether the collection is listed but lost its shard (see `health`)."""
    return health(q, name) == "dead"


def delete_collection(q: Qdrant, name: str) -> bool:
    """Delete it, aliases included; False where there was none (an alias is never followed).

    Its snapshot files stay on the server's disk and cannot be reached any more: delete them first.
    """
    try:
        return bool(q.json("DELETE", collection_path(name)))
    except NoAnswer:
        if exists(q, name):
            raise
        return True


def wait_green(q: Qdrant, name: str, seconds: float) -> CollectionState:
    """Poll until the collection is `settled` over several polls, at most `seconds`; returns the last state seen.

    One that is `asleep`, or whose optimiser stopped over an error, is woken by an empty update, as
    https://qdrant.tech/documentation/concepts/collections/ says: 1.18.3 forgets the error and tries again, 1.11.3
    keeps it until the server is restarted. Raises QdrantError where the disk has no room for what is to be optimised.
    """
    deadline = time.monotonic() + seconds
    stable, tried_again = 0, False
    while True:
        state = get_state(q, name)
        if state.asleep or not (state.optimizer_ok or tried_again):
            tried_again |= not state.optimizer_ok
            q.json("PATCH", collection_path(name), {"optimizers_config": {}}, retry=True)
        elif tells_full(state.optimizer_said):
            raise QdrantError(q.display, 500, state.optimizer_said)
        stable = stable + 1 if state.settled else 0
        if stable >= STABLE_POLLS or time.monotonic() >= deadline:
            return state
        q.sleep(POLL_SECONDS)


def set_metadata(q: Qdrant, name: str, metadata: Mapping[str, Any]) -> bool:
    """Merge into the collection's metadata; False where the server (before 1.16) takes and ignores it."""
    q.json("PATCH", collection_path(name), {"metadata": dict(metadata)}, retry=True)
    stored = q.json("GET", collection_path(name))["config"].get("metadata") or {}
    return all(stored.get(key) == value for key, value in metadata.items())
