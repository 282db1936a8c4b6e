"""Snapshots of a collection on the server: created once, listed, downloaded whole, deleted."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import requests
from urllib3.exceptions import HTTPError

from lib.clients.qdrant.transport import (
    PAUSES_SECONDS,
    NoAnswer,
    NotFound,
    Qdrant,
    QdrantError,
    collection_path,
)
from lib.errors import BackupDamaged, MigrationError, StoreFailed, one_line
from lib.http_deadline import end_by


def server_time(q: Qdrant) -> datetime:
    """The server's clock (UTC, whole seconds): the `Date` of an answer, sent by 1.11.3 and 1.18.3.

    This machine's clock where a proxy took that header away.
    """
    told = q.call("GET", "/").headers.get("Date", "")
    try:
        return parsedate_to_datetime(told).astimezone(timezone.utc)
    except ValueError:
        return datetime.now(timezone.utc)


def startup(q: Qdrant) -> str | None:
    """When this server process was started, in its own words (1.11.3 and 1.18.3); None where it does not say.

    A key for one collection may not ask for it (https://qdrant.tech/documentation/guides/security/).
    """
    try:
        told = q.json("GET", "/telemetry", params={"details_level": "0"}, retry=False)
    except MigrationError:
        return None
    app = told.get("app") if isinstance(told, dict) else None
    moment = app.get("startup") if isinstance(app, dict) else None
    return str(moment) if moment else None


def restarted(q: Qdrant, before: str | None) -> bool:
    """Whether surely another process answers than the one that said `before`."""
    now = startup(q) if before else None
    return now is not None and now != before


_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def restorable(backup_version: str, server_version: str) -> str | None:
    """Why a server cannot take a snapshot of `backup_version`, or None where it can.

    The same minor version or the next one takes it (https://qdrant.tech/documentation/concepts/snapshots/); others
    leave a dead collection behind, or lose data (seen with 1.11.3 and 1.18.3).
    """
    backup, server = _VERSION.match(backup_version), _VERSION.match(server_version)
    if backup is None or server is None:
        return f"the version of the backup ('{backup_version}') or server ('{server_version}') is not known"
    if backup[1] == server[1] and int(server[2]) - int(backup[2]) in {0, 1}:
        return None
    minor = int(backup[2])
    return (
        f"a snapshot of Qdrant {backup_version} restores onto {backup[1]}.{minor} and {backup[1]}.{minor + 1} only, "
        f"this server is {server_version}"
    )


ANSWER_SECONDS = 300.0  # the server answers when the snapshot is made; after that its list is asked
CREATE_SECONDS = 1800.0
POLL_SECONDS = 1.0
PIECE_BYTES = 1024 * 1024
PIECE_SECONDS = 600.0  # a download that brings less in this time is broken off

_SERVERS = 3  # so many of them, one after the other, may fall over one snapshot

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GATEWAY_GAVE_UP = (502, 503, 504)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot file on the server: size in bytes, sha256 in hex where the server told one, creation time (UTC)."""

    name: str
    size: int
    checksum: str | None
    created: str


@dataclass(frozen=True)
class Download:
    """What came over: bytes, their sha256 in hex, and how often the way broke meanwhile."""

    size: int
    sha256: str
    resumed: int


def list_snapshots(q: Qdrant, collection: str) -> list[Snapshot]:
    """The snapshots that this node holds of the collection. Raises NotFound."""
    return [_snapshot(raw) for raw in q.json("GET", collection_path(collection, "snapshots"))]


def create(
    q: Qdrant,
    collection: str,
    *,
    known_before: Sequence[Snapshot] | None = None,
    seconds: float = CREATE_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
) -> Snapshot:
    """Have one snapshot made and wait for it, at most `seconds`; never two.

    A lost answer stops nothing on the server (seen on 1.11.3 and 1.18.3), so the list is polled then; a server that
    was started anew meanwhile is asked again. With `known_before` (the list before an earlier try) a snapshot that is
    not in it is taken as that try's. Raises NoAnswer where none appears, QdrantError, AccessRefused.
    """
    now = list_snapshots(q, collection)
    known = now if known_before is None else known_before
    earlier = [snapshot for snapshot in now if snapshot not in known]
    if earlier:
        return _newest(earlier)
    for _ in range(_SERVERS):
        process = startup(q)
        made = _ask(q, collection, answer_seconds) or _await_new(q, collection, known, seconds, process)
        if made:
            return made
    raise NoAnswer(
        f"Qdrant at {q.display} was started anew {_SERVERS} times while it made a snapshot of '{collection}'",
        next_step="look at the server's log and its memory, then run again",
    )


def _ask(q: Qdrant, collection: str, answer_seconds: float) -> Snapshot | None:
    """The snapshot, or None where no answer came."""
    path = collection_path(collection, "snapshots")
    try:
        return _snapshot(q.json("POST", path, params={"wait": "true"}, timeout=answer_seconds, retry=False))
    except NoAnswer:
        return None
    except QdrantError as error:
        if error.status not in _GATEWAY_GAVE_UP:
            raise
        return None


def delete(q: Qdrant, collection: str, snapshot: str) -> bool:
    """Delete a snapshot file; False where it, or the collection, is not there."""
    try:
        path = collection_path(collection, "snapshots", snapshot)
        q.json("DELETE", path, params={"wait": "true"}, retry=True)
    except NotFound:
        return False
    return True


def download(
    q: Qdrant,
    collection: str,
    snapshot: Snapshot,
    write: Callable[[bytes], object],
    progress: Callable[[int, int], object] | None = None,
) -> Download:
    """Hand every byte of the snapshot to `write`, in order and once; goes on where the connection broke.

    A server that keeps its snapshots in S3 sends neither a length nor a part of a file: the length is the list's, and
    after a break the bytes that are here already are passed over.

    `progress` gets (bytes so far, bytes in all). Raises BackupDamaged where the server's own checksum differs,
    StoreFailed where the file changes on the way, NoAnswer after several connections without a byte.
    """
    fetch = _Fetch(q, collection_path(collection, "snapshots", snapshot.name), snapshot.size)
    digest = hashlib.sha256()
    for piece in fetch.pieces():
        digest.update(piece)
        write(piece)
        if progress is not None:
            progress(fetch.done, fetch.total)
    sha256 = digest.hexdigest()
    if snapshot.checksum not in {None, sha256}:
        raise BackupDamaged(
            f"snapshot {snapshot.name}: sha256 of the download is {sha256}, the server's is {snapshot.checksum}",
            next_step="run the backup again",
        )
    return Download(fetch.done, sha256, fetch.resumed)


def with_checksum(q: Qdrant, collection: str, snapshot: Snapshot) -> Snapshot:
    """The snapshot; if the server gave no checksum (its snapshots are in S3), with that of what it sends.

    The snapshot is downloaded once more for this, onto no disk, so that a second download is compared with the first.
    Raises like `download`.
    """
    if snapshot.checksum is not None:
        return snapshot
    return replace(snapshot, checksum=download(q, collection, snapshot, lambda _piece: None).sha256)


class _Fetch:
    """One file over as many connections as it takes."""

    def __init__(self, q: Qdrant, path: str, listed_size: int) -> None:
        self.done = 0
        self.total = -1
        self._listed_size = listed_size
        self.resumed = 0
        self._q = q
        self._path = path
        self._etag = ""

    def pieces(self) -> Iterator[bytes]:
        barren = 0  # connections in a row that brought next to nothing
        while self.done != self.total:
            before, began = self.done, time.monotonic()
            yield from self._one_connection()
            if self.done == self.total:
                return
            self.resumed += 1
            enough = PIECE_BYTES if time.monotonic() - began >= PIECE_SECONDS else 1
            barren = barren + 1 if self.done - before < enough else 0
            if barren > len(PAUSES_SECONDS):
                raise NoAnswer(
                    f"Qdrant at {self._q.display}: the download stays broken off at byte {self.done}"
                )
            self._q.sleep(PAUSES_SECONDS[max(0, barren - 1)])

    def _one_connection(self) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"}  # otherwise compressed on the fly, without a length
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
        with self._q.call("GET", self._path, headers=headers, stream=True) as response:
            if response.status_code == 206 and "Content-Range" not in response.headers:
                return  # its head broke off
            known = self._check(response)
            # What breaks here ends this connection's pieces early.
            with contextlib.suppress(HTTPError, OSError):
                for received in _paced(response):
                    piece, known = received[known:], max(0, known - len(received))
                    if self.done + len(piece) > self.total:
                        raise self._refuse("the download is longer than its length")
                    self.done += len(piece)
                    if piece:
                        yield piece

    def _check(self, response: requests.Response) -> int:
        """How many bytes of this answer are here already."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._refuse("a proxy compresses the download")
        if self.done == 0:
            self._etag = response.headers.get("ETag", "")
            length = response.headers.get("Content-Length", str(self._listed_size))
            if not re.fullmatch(r"[0-9]{1,18}", length):
                raise self._refuse(f"the length of the download is {one_line(length[:40])!r}")
            self.total = int(length)
            return 0
        if response.status_code == 200 and not self._etag and "Content-Length" not in response.headers:
            return self.done
        wanted = f"bytes {self.done}-{self.total - 1}/{self.total}"
        if response.status_code != 206 or response.headers.get("Content-Range") != wanted:
            raise self._refuse("the rest of a broken download cannot be fetched")
        if response.headers.get("ETag", "") != self._etag:
            raise self._refuse("the snapshot changed while it was fetched")
        return 0

    def _refuse(self, why: str) -> StoreFailed:
        step = "run the backup again, straight against the server"
        return StoreFailed(f"Qdrant at {self._q.display}: {why}", next_step=step)


def _paced(response: requests.Response) -> Iterator[bytes]:
    """The bytes as they come, chunk lines and trailers passed over; TimeoutError if a MiB takes PIECE_SECONDS.

    Not by `stream` of urllib3: it reads lines and trailers without a bound.
    """
    left = 0
    while True:
        if left <= 0:
            end_by(response, time.monotonic() + PIECE_SECONDS)
            left = PIECE_BYTES
        received = response.raw.read1(PIECE_BYTES, decode_content=False)
        if not received:
            return
        left -= len(received)
        yield received


def _await_new(
    q: Qdrant, collection: str, known: Sequence[Snapshot], seconds: float, process: str | None
) -> Snapshot | None:
    """What appears in the list; None where the server `process` that was asked is gone, and left nothing."""
    deadline = time.monotonic() + seconds
    seen: Snapshot | None = None
    while time.monotonic() < deadline:
        gone = restarted(q, process)  # asked before the list: what that one made is in it
        fresh = [snapshot for snapshot in list_snapshots(q, collection) if snapshot not in known]
        if fresh and _newest(fresh) == seen:
            return seen  # twice the same: nothing writes to it any more
        if gone and not fresh:
            return None
        seen = _newest(fresh) if fresh else None
        q.sleep(POLL_SECONDS)
    raise NoAnswer(
        f"Qdrant at {q.display}: no snapshot of '{collection}' appeared within {seconds:.0f} s",
        next_step="look at the server's log and free disk space, then run again",
    )


def _newest(snapshots: Sequence[Snapshot]) -> Snapshot:
    return max(snapshots, key=lambda snapshot: (snapshot.created, snapshot.name))


def _snapshot(raw: dict[str, Any]) -> Snapshot:
    checksum = str(raw.get("checksum") or "")
    found = Snapshot(str(raw["name"]), int(raw["size"]), checksum, str(raw.get("creation_time") or ""))
    return found if _SHA256.fullmatch(checksum) else replace(found, checksum=None)
