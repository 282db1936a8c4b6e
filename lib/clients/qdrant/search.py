"""Nearest points, through the official client, as AutoMem itself asks for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.clients.qdrant.points import PointId
from lib.clients.qdrant.transport import NoAnswer, Qdrant, QdrantError, collection_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from qdrant_client import QdrantClient

_SECONDS = 10.0


@dataclass(frozen=True)
class Hit:
    """A point found, and its score in the collection's distance."""

    id: PointId
    score: float
    payload: dict[str, Any] | None


class Searcher:
    """The client for searches in one server; importing it takes most of a second, so it is made on first use."""

    def __init__(self, q: Qdrant) -> None:
        self._q = q
        self._client: QdrantClient | None = None

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()

    def search(
        self,
        name: str,
        vector: Sequence[float] | NDArray[np.float32],
        limit: int,
        *,
        payload: bool = True,
        among: Sequence[PointId] | None = None,
    ) -> list[Hit]:
        """The `limit` nearest points to `vector` (dims,), best first; `among` these ids, where given, and then exactly.

        Raises QdrantError, NoAnswer.
        """
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        query = [float(number) for number in vector]
        narrowed = {} if among is None else _narrowed(among)
        try:
            answer = self._open().query_points(
                name, query=query, limit=limit, with_payload=payload, **narrowed
            )
        except UnexpectedResponse as error:
            text = error.content.decode("utf-8", "replace")
            raise QdrantError(self._q.display, error.status_code or 0, text) from None
        except ResponseHandlingException:
            raise NoAnswer(f"Qdrant at {self._q.display} gave no answer to a search") from None
        return [Hit(_plain(point.id), point.score, point.payload) for point in answer.points]

    def _open(self) -> QdrantClient:
        if self._client is None:
            self._client = _client(self._q)
        return self._client


def search(
    q: Qdrant, name: str, vector: Sequence[float] | NDArray[np.float32], limit: int, *, payload: bool = True
) -> list[Hit]:
    """The `limit` nearest points to `vector` (dims,), best first. Raises NotFound, QdrantError, NoAnswer."""
    return _query(q, name, [float(number) for number in vector], limit, payload=payload)


def nearest_to(q: Qdrant, name: str, point_id: PointId, limit: int) -> list[Hit]:
    """The `limit` nearest points to a stored one, by its own vector, itself left out; best first, without payloads.

    Raises NotFound, QdrantError, NoAnswer.
    """
    return _query(q, name, point_id, limit, payload=False)


def _query(q: Qdrant, name: str, query: PointId | list[float], limit: int, *, payload: bool) -> list[Hit]:
    """One request (https://api.qdrant.tech/api-reference/search/query-points; 1.10 and later).

    The official client would take a second to import, and 45 MB.
    """
    body = {"query": query, "limit": limit, "with_payload": payload}
    answer = q.json("POST", collection_path(name, "points", "query"), body, timeout=_SECONDS, retry=False)
    return [Hit(point["id"], float(point["score"]), point.get("payload")) for point in answer["points"]]


def _narrowed(ids: Sequence[PointId]) -> dict[str, Any]:
    from qdrant_client import models

    wanted = models.Filter(must=[models.HasIdCondition(has_id=list(ids))])
    return {"query_filter": wanted, "search_params": models.SearchParams(exact=True)}


def _client(q: Qdrant) -> QdrantClient:
    from urllib.parse import urlsplit

    from qdrant_client import QdrantClient

    parts = urlsplit(q.base_url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a key over http, which a private network is
        return QdrantClient(
            host=parts.hostname,
            port=parts.port,
            https=parts.scheme == "https",
            prefix=parts.path or None,
            api_key=q.api_key or None,
            timeout=max(1, int(q.timeout_seconds)),
            check_compatibility=False,  # an extra request, and a warning for servers that work
        )


def _plain(point_id: object) -> PointId:
    return point_id if isinstance(point_id, int) else str(point_id)
