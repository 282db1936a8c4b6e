"""Points: scroll, count, retrieve, upsert in batches that every server accepts, delete, search."""

from __future__ import annotations

import re
import struct
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.clients.qdrant.transport import NoAnswer, NotFound, Parts, Qdrant, QdrantError, collection_path, encode
from lib.concurrency import bounded_map
from lib.errors import UsageProblem
from lib.network import is_this_machine

if TYPE_CHECKING:
    import numpy as np
    import requests
    from numpy.typing import NDArray

PointId = str | int  # a lower-case hyphenated UUID, or an unsigned integer

PAGE = 1000
PAGE_OF_IDS = 5000  # ids alone cost hardly more than the request
PAGE_WITH_VECTORS = 256  # larger pages of vectors are read more slowly
PAGES_AT_ONCE = 3  # the server reads pages, and they are on their way, while one is decoded
DELETE_BATCH = 1000
BATCH_POINTS = 256
# The server takes 32 MiB, and answers 400 above (seen on 1.11.3 and 1.18.3).
BATCH_BYTES = 30 * 1024 * 1024
_SEARCH_SECONDS = 10.0
_WAIT = {"wait": "true"}

# Strict mode (Qdrant 1.13 and later): 'Limit exceeded 100 > 2 for "limit". Help: ...'
_PAGE_LIMIT = re.compile(r'Limit exceeded \d+ > (\d+) for "limit"')
_UPSERT_LIMIT = re.compile(r'Limit exceeded \d+ > (\d+) for "upsert limit"')
_EXACT_REFUSED = "Exact search disabled"
_INVALID_ROW = (400, 422)


@dataclass(frozen=True, eq=False)
class Point:
    """One point; `payload` and `vector` ((dims,) float32) are None if not requested, or absent."""

    id: PointId
    payload: dict[str, Any] | None
    vector: NDArray[np.float32] | None


@dataclass(frozen=True)
class Rejected:
    """A row that is not in the collection, and why."""

    id: PointId
    reason: str


@dataclass(frozen=True)
class Hit:
    """A point found, and its score in the collection's distance."""

    id: PointId
    score: float


class _Row(NamedTuple):
    id: PointId
    json: bytes


def scroll(
    q: Qdrant, name: str, *, payload: bool | list[str] = False, vector: bool = False, page: int | None = None
) -> Iterator[list[Point]]:
    """Yield all points in pages, in the order of their ids.

    `payload` may list the wanted keys. Pages shrink to what strict mode allows. Raises NotFound, QdrantError.
    """
    path = collection_path(name, "points", "scroll")
    limit = page or (PAGE_WITH_VECTORS if vector else PAGE if payload else PAGE_OF_IDS)
    body: dict[str, Any] = {"with_payload": payload, "with_vector": vector}
    while True:
        try:
            result = q.json("POST", path, {**body, "limit": limit}, retry=True)
        except QdrantError as error:
            allowed = _PAGE_LIMIT.search(error.text) if error.status == 400 else None
            if allowed is None or not 0 < int(allowed[1]) < limit:
                raise
            limit = int(allowed[1])
            continue
        body["offset"] = result["next_page_offset"]
        yield _points(result.pop("points"))
        if body["offset"] is None:
            return


def retrieve(
    q: Qdrant, name: str, ids: Sequence[PointId], *, payload: bool | list[str] = False, vector: bool = False
) -> list[Point]:
    """The points with these ids, in any order; ids that the collection does not have are left out."""
    return [point for page in _by_ids(q, name, ids, payload=payload, vector=vector) for point in _points(page)]


def retrieve_pages(q: Qdrant, name: str, pages: Iterable[Sequence[PointId]], *, vector: bool) -> Iterator[list[Point]]:
    """Yield the points of each page of ids with their payloads. The next pages are requested while one is used."""
    post = partial(_post_page, q, name, payload=True, vector=vector)
    # Decoded here, one after the other: the numbers of a page take five times the memory of its JSON.
    for responses in bounded_map(post, pages, PAGES_AT_ONCE):
        yield [point for one in responses for point in (vector and _plain_points(one)) or _points(q.result(one))]


def _post_page(
    q: Qdrant, name: str, ids: Sequence[PointId], *, payload: bool | list[str], vector: bool
) -> list[requests.Response]:
    """The answers that hold these points: of smaller requests, if one for all is larger than a rate limit."""
    body = {"ids": list(ids), "with_payload": payload, "with_vector": vector}
    try:
        return [q.send("POST", collection_path(name, "points"), body, retry=True)]
    except QdrantError as error:
        if len(ids) == 1 or not _is_too_large(error):
            raise
    middle = len(ids) // 2
    halves = (ids[:middle], ids[middle:])
    return [one for half in halves for one in _post_page(q, name, half, payload=payload, vector=vector)]


def limits_reads(q: Qdrant, name: str) -> bool:
    """Whether strict mode limits reads per minute: `retrieve` costs as many as it has ids, a page of `scroll` one."""
    strict = q.json("GET", collection_path(name))["config"].get("strict_mode_config") or {}
    return bool(strict.get("enabled") and strict.get("read_rate_limit"))


def raw_points(q: Qdrant, name: str, ids: Sequence[PointId]) -> dict[PointId, tuple[Any, Any]]:
    """Payload and vectors of these points as in the server's JSON, with named and sparse vectors."""
    pages = _by_ids(q, name, ids, payload=True, vector=True)
    return {raw["id"]: (raw.get("payload"), raw.get("vector")) for page in pages for raw in page}


def _by_ids(
    q: Qdrant, name: str, ids: Sequence[PointId], *, payload: bool | list[str], vector: bool
) -> Iterator[list[dict[str, Any]]]:
    size = PAGE_WITH_VECTORS if vector else PAGE
    for start in range(0, len(ids), size):
        for response in _post_page(q, name, ids[start : start + size], payload=payload, vector=vector):
            yield q.result(response)


def count(q: Qdrant, name: str) -> int:
    """The exact number of points in the collection. Raises NotFound, QdrantError.

    If strict mode permits nothing exact (`search_allow_exact`), the ids are read and counted.
    """
    try:
        answer = q.json("POST", collection_path(name, "points", "count"), {"exact": True}, retry=True)
    except QdrantError as error:
        if error.status != 400 or _EXACT_REFUSED not in error.text:
            raise
        return sum(map(len, scroll(q, name)))
    return int(answer["count"])


def delete_points(q: Qdrant, name: str, ids: Sequence[PointId]) -> None:
    """Delete the points with these ids and wait until it is done; unknown ids are ignored."""
    path = collection_path(name, "points", "delete")
    for start in range(0, len(ids), DELETE_BATCH):
        body = {"points": list(ids[start : start + DELETE_BATCH])}
        q.json("POST", path, body, params=_WAIT, retry=True)


def update_payload(q: Qdrant, name: str, point_id: PointId, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Bring the payload of one point, if it exists, from `old` to `new`, and wait until it is done.

    Only keys that differ are sent, if no key is removed: AutoMem may have changed others since `old` was read.
    """
    changed = {key: value for key, value in new.items() if key not in old or encode(old[key]) != encode(value)}
    whole = None in changed.values() or not old.keys() <= new.keys()  # a POST removes keys that are null, and no other
    method, body = ("PUT", {"payload": new}) if whole else ("POST", {"payload": changed})
    try:
        path = collection_path(name, "points", "payload")
        q.json(method, path, {**body, "points": [point_id]}, params=_WAIT, retry=True)
    except NotFound as error:
        if "No point with id" not in error.text:  # AutoMem deleted it meanwhile (as worded by 1.11.3 and 1.19.0)
            raise


def _points(raws: list[dict[str, Any]]) -> list[Point]:
    """Convert in order. A vector from JSON takes eight times the memory of its array: each is freed when read."""
    raws.reverse()
    return [_point(raws.pop()) for _ in range(len(raws))]


def _plain_points(response: requests.Response) -> list[Point] | None:
    """Convert in order, if each point has one unnamed vector; None if not, or if the answer is of another form.

    simdjson makes an array of a vector without an object for each number. It takes half the time of orjson for that.
    """
    import numpy as np
    import simdjson

    try:
        document: Any = simdjson.Parser().parse(response.content)
        return [
            Point(
                raw["id"],
                raw["payload"].as_dict(),
                np.frombuffer(raw["vector"].as_buffer(of_type="d"), dtype=np.float64).astype(np.float32),
            )
            for raw in document["result"]
        ]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # no vector, null, named vectors, 65 bits
        return None


def _point(raw: dict[str, Any]) -> Point:
    vector = raw.get("vector")
    if isinstance(vector, dict):
        if any(name and isinstance(one, list) for name, one in vector.items()):
            text = "the collection has named vectors; AutoMem keeps one unnamed vector per point"
            raise UsageProblem(text, next_step="set QDRANT_COLLECTION to AutoMem's collection")
        vector = vector.get("")  # an unnamed vector together with sparse vectors
    if vector is not None:
        vector = float32s(vector)
    return Point(raw["id"], raw.get("payload"), vector)


def float32s(numbers: list[float]) -> NDArray[np.float32]:
    """Convert to (n,) float32, three times as fast as numpy does it."""
    import numpy as np  # 0.1 s, not needed when only ids and payloads are read

    try:
        return np.frombuffer(struct.pack(f"{len(numbers)}f", *numbers), dtype=np.float32)
    except (struct.error, OverflowError):  # null, or a number that float32 lacks
        return np.array(numbers, dtype=np.float32)


def read_float32s(text: bytes) -> NDArray[np.float32] | None:
    """Read a list of numbers, JSON, as (n,) float32; None for anything else. Three times as fast as `float32s`.

    Lists in the list are flattened.
    """
    import numpy as np
    import simdjson

    try:
        numbers: Any = simdjson.Parser().parse(text)
        with np.errstate(over="ignore"):
            return np.frombuffer(numbers.as_buffer(of_type="d"), dtype=np.float64).astype(np.float32)
    except (RuntimeError, TypeError, ValueError):  # no JSON, null, a text, 65 bits
        return None


def upsert(
    q: Qdrant, name: str, ids: Sequence[PointId], vectors: NDArray[np.float32], payloads: Sequence[dict[str, Any]]
) -> list[Rejected]:
    """Write points and wait until they are stored. Returns the rows that the server, or JSON, does not accept.

    `vectors` is (n, dims) float32, one row per id and payload. All other rows of a batch are stored.
    Raises QdrantError for what no single row causes: wrong dims, a full disk, a limit of the collection.
    """
    rows, rejected = _serialized(ids, vectors, payloads)
    path, compress = collection_path(name, "points"), _reads_gzip(q, name)
    remaining = list(_batches(rows, BATCH_POINTS))[::-1]
    while remaining:
        batch = remaining.pop()
        parts = [part for row in batch for part in (b",", row.json)]
        try:
            body = Parts([b'{"points":[', *parts[1:], b"]}"])
            q.json("PUT", path, body, params=_WAIT, retry=True, compress=compress)
        except NoAnswer:
            preflight_write(q, name)  # reports a refusal of the access, at which a large body gets no answer
            raise
        except QdrantError as error:
            if len(batch) == 1 and error.status in _INVALID_ROW and not _of_the_collection(error):
                rejected.append(Rejected(batch[0].id, error.text))
            else:
                remaining += _split(batch, error)[::-1]
    return rejected


def _reads_gzip(q: Qdrant, name: str) -> bool:
    """Whether points are sent compressed, to 42% of their JSON: a proxy may refuse it. A small request tries, once."""
    if q.reads_gzip is None:
        try:
            q.json("POST", collection_path(name, "points", "count"), {"exact": False}, retry=True, compress=True)
            q.reads_gzip = True
        except QdrantError:
            q.reads_gzip = False
    return q.reads_gzip


def preflight_write(q: Qdrant, name: str) -> None:
    """Raise AccessRefused if points may not be written, by a small request that needs the same right."""
    body = {"points": [str(uuid.uuid4())]}  # deletes a point that does not exist
    q.json("POST", collection_path(name, "points", "delete"), body, params=_WAIT, retry=True)


def _serialized(
    ids: Sequence[PointId], vectors: NDArray[np.float32], payloads: Sequence[dict[str, Any]]
) -> tuple[list[_Row], list[Rejected]]:
    import numpy as np
    import orjson

    rows: list[_Row] = []
    rejected: list[Rejected] = []
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    for point_id, vector, is_finite, payload in zip(ids, vectors, finite, payloads, strict=True):
        if not is_finite:
            rejected.append(Rejected(point_id, "its vector holds a number that is not finite"))
            continue
        try:
            json = encode({"id": point_id, "vector": vector, "payload": payload})
        except orjson.JSONEncodeError as error:
            rejected.append(Rejected(point_id, f"its payload is not JSON: {error}"))
            continue
        if len(json) < BATCH_BYTES:
            rows.append(_Row(point_id, json))
        else:
            rejected.append(Rejected(point_id, f"its {len(json)} bytes are more than one request may hold"))
    return rows, rejected


def _batches(rows: Sequence[_Row], points: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    size = 0
    for row in rows:
        if batch and (len(batch) == points or size + len(row.json) >= BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row.json) + 1
    if batch:
        yield batch


def _split(batch: list[_Row], error: QdrantError) -> list[list[_Row]]:
    """Smaller batches instead of a refused one; raises `error` if they would be refused too."""
    allowed = _UPSERT_LIMIT.search(error.text)
    if allowed and 0 < int(allowed[1]) < len(batch):
        return list(_batches(batch, int(allowed[1])))
    if len(batch) == 1 or not (_is_too_large(error) or error.status in _INVALID_ROW) or _of_the_collection(error):
        raise error
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]]


def _is_too_large(error: QdrantError) -> bool:
    """Whether smaller requests may be accepted. 429 without Retry-After: larger than the rate limit. 413: a proxy's."""
    return error.status == 413 or (error.status == 429 and error.retry_after is None)


def _of_the_collection(error: QdrantError) -> bool:
    """Whether every row would be refused alike: all have the same dims, and strict mode says "Help"."""
    return "Vector dimension error" in error.text or "Help:" in error.text


def search(q: Qdrant, name: str, query: PointId | NDArray[np.float32], limit: int) -> list[Hit]:
    """The `limit` nearest points, best first, to a vector (dims,), or to a stored point, which is left out.

    https://api.qdrant.tech/api-reference/search/query-points (1.10 and later). The official client takes 1 s and 45 MB
    to import. Raises NotFound, QdrantError, NoAnswer.
    """
    body = {"query": query, "limit": limit, "with_payload": False}
    answer = q.json("POST", collection_path(name, "points", "query"), body, timeout=_SEARCH_SECONDS, retry=False)
    return [Hit(point["id"], float(point["score"])) for point in answer["points"]]


@contextmanager
def exact_search(q: Qdrant, ids: Sequence[PointId]) -> Iterator[Callable[[str, NDArray[np.float32], int], list[Hit]]]:
    """Yield a function (collection, vector, limit) that searches among these ids only, exactly, best first.

    It uses the official client, as AutoMem does, and raises QdrantError, NoAnswer. A rate limit, which the client only
    reports, is waited out.
    """
    from qdrant_client import QdrantClient, models
    from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of a key over http, also in a private network
        # Checking the compatibility is an extra request, and a warning for servers that work.
        seconds = max(1, int(q.timeout_seconds))
        # As those of `Qdrant` itself.
        options: dict[str, Any] = {"auth": q.login, "trust_env": not is_this_machine(q.base_url)}
        client = QdrantClient(
            url=q.base_url, api_key=q.api_key or None, timeout=seconds, check_compatibility=False, **options
        )
    narrowed = models.Filter(must=[models.HasIdCondition(has_id=list(ids))])
    exact = models.SearchParams(exact=True)

    def nearest(name: str, vector: NDArray[np.float32], limit: int) -> list[Hit]:
        try:
            answer = client.query_points(
                name, vector.tolist(), query_filter=narrowed, search_params=exact, limit=limit, with_payload=False
            )
        except QdrantException as error:  # 429, with a Retry-After that may be no number
            asked = str(error.retry_after_s) if isinstance(error, ResourceExhaustedResponse) else None
            raise QdrantError(q.display, 429, q.shown(str(error)), retry_after=asked) from None
        except UnexpectedResponse as error:
            text = q.shown(error.content.decode("utf-8", "replace"))
            raise QdrantError(q.display, error.status_code or 0, text) from None
        except ResponseHandlingException:
            raise NoAnswer(f"Qdrant at {q.display} gave no answer to a search") from None
        return [Hit(one.id if isinstance(one.id, int) else str(one.id), one.score) for one in answer.points]

    with closing(client):
        yield lambda name, vector, limit: q.repeated(partial(nearest, name, vector, limit))
