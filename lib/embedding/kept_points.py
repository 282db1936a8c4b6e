"""Live points kept in the spool: what only a point holds must outlive the collection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib.embedding.plan_table import point_id_of, stored_id
from lib.embedding.spool_file import SpoolFile, chunks, marks


@dataclass(frozen=True)
class KeptPoint:
    """A live point as it was read: its payload as JSON, and its vector (float32, little-endian) where one was asked."""

    point_id: str | int
    payload: bytes
    vector: bytes | None = None


class KeptPoints(SpoolFile):
    """The latest known payload of every point that was read."""

    def keep_points(self, rows: Sequence[KeptPoint]) -> None:
        """Add or replace, on the disk when it returns. A row without a vector leaves a kept vector in place."""
        with self._transaction():
            self._db.executemany(
                """INSERT INTO kept_points (point_id, payload, vector) VALUES (?, ?, ?)
                   ON CONFLICT (point_id) DO UPDATE SET payload = excluded.payload,
                     vector = coalesce(excluded.vector, kept_points.vector)""",
                ((stored_id(row.point_id), row.payload, row.vector) for row in rows),
            )

    def kept(self, point_ids: Sequence[str | int]) -> dict[str | int, KeptPoint]:
        """Those of `point_ids` that are kept."""
        found: dict[str | int, KeptPoint] = {}
        for part in chunks([stored_id(each) for each in point_ids]):
            sql = f"SELECT id, point_id, payload, vector FROM kept_points WHERE point_id IN ({marks(part)})"  # noqa: S608 - only marks
            for values in self._rows(sql, part):
                point = _kept_point(values)
                found[point.point_id] = point
        return found

    def kept_points(self, page: int = 500) -> Iterator[KeptPoint]:
        """Every kept point, read page by page."""
        after = 0
        sql = "SELECT id, point_id, payload, vector FROM kept_points WHERE id > ? ORDER BY id LIMIT ?"
        while rows := self._rows(sql, [after, page]):
            for values in rows:
                after = int(str(values[0]))
                yield _kept_point(values)

    def kept_count(self) -> int:
        """How many points are kept."""
        return self._number("SELECT count(*) FROM kept_points")

    def clear_kept(self) -> None:
        """Forget the payloads of an earlier migration; points kept whole, vector and all, stay: they were removed."""
        with self._transaction():
            self._db.execute("DELETE FROM kept_points WHERE vector IS NULL")


def _kept_point(values: tuple[object, ...]) -> KeptPoint:
    _, point_id, payload, vector = values
    assert isinstance(payload, bytes)
    assert vector is None or isinstance(vector, bytes)
    return KeptPoint(point_id_of(point_id), payload, vector)
