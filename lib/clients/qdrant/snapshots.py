"""Snapshots of a collection on the server: create once, list, download whole, delete."""

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
    collection_path,
    is_down,
    unanswered,
)
from lib.concurrency import Progress
from lib.errors import BackupDamaged, MigrationError, StoreFailed, one_line
from lib.network import end_by

ANSWER_SECONDS = 300.0  # the server answers when the snapshot is made; after that its list is polled
CREATE_SECONDS = 1800.0
RESTART_SECONDS = 120.0  # a server that does not answer meanwhile may be starting again
POLL_SECONDS = 1.0
PIECE_BYTES = 1024 * 1024
PIECE_SECONDS = 600.0  # a connection that brings less than a piece in this time is closed

_WAIT = {"wait": "true"}
_MOST_RESTARTS = 3  # of the server while it makes one snapshot
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True)
class Snapshot:
    """A snapshot file on the server: size in bytes, sha256 in hex if the server gives one, creation time (UTC)."""

    name: str
    size: int
    checksum: str | None
    created: str


def server_time(q: Qdrant) -> datetime:
    """The server's clock (UTC, whole seconds) from its `Date` header; this machine's if a proxy removed that."""
    date = q.call("GET", "/").headers.get("Date", "")
    try:
        return parsedate_to_datetime(date).astimezone(timezone.utc)
    except ValueError:
        return datetime.now(timezone.utc)


def startup(q: Qdrant) -> str | None:
    """When the server process was started, as 1.11.3 and 1.18.3 report it; None if it may not be asked."""
    try:
        moment = q.json("GET", "/telemetry", params={"details_level": "0"}, retry=False)["app"]["startup"]
    except (MigrationError, KeyError, TypeError):
        return None
    return str(moment) if moment else None


def restarted(q: Qdrant, before: str | None) -> bool:
    """Whether the server process is certainly another one than the one whose `startup` was `before`."""
    now = startup(q) if before else None
    return now is not None and now != before


def restorable(backup_version: str, server_version: str) -> str | None:
    """Why a server cannot restore a snapshot of `backup_version`, or None: the same or the next minor version can.

    Others leave a failed collection, or lose data (https://qdrant.tech/documentation/concepts/snapshots/; seen with
    1.11.3 and 1.18.3).
    """
    backup, server = _VERSION.match(backup_version), _VERSION.match(server_version)
    if backup is None or server is None:
        return f"the version of the backup ('{backup_version}') or server ('{server_version}') is not known"
    major, minor = backup[1], int(backup[2])
    if major == server[1] and int(server[2]) - minor in {0, 1}:
        return None
    allowed = f"{major}.{minor} and {major}.{minor + 1} only"
    return f"a snapshot of Qdrant {backup_version} restores onto {allowed}, this server is {server_version}"


def list_snapshots(q: Qdrant, collection: str) -> list[Snapshot]:
    """The snapshots that this node holds of the collection. Raises NotFound."""
    return [_snapshot(raw) for raw in q.json("GET", collection_path(collection, "snapshots"))]


def create(q: Qdrant, collection: str, *, seconds: float = CREATE_SECONDS) -> Snapshot:
    """Have one snapshot made, never two, and wait for it, at most `seconds`.

    The server continues after a lost answer (seen on 1.11.3 and 1.18.3): then the list is polled, and only a restarted
    server is asked again. Raises NoAnswer if none appears, QdrantError, AccessRefused.
    """
    path, known = collection_path(collection, "snapshots"), list_snapshots(q, collection)
    for _ in range(_MOST_RESTARTS):
        process = startup(q)
        try:
            return _snapshot(q.json("POST", path, params=_WAIT, timeout=min(ANSWER_SECONDS, seconds)))
        except MigrationError as error:
            if not unanswered(error):
                raise
        if made := _wait_new(q, collection, known, seconds, process):
            return made
    text = f"Qdrant at {q.display} was restarted {_MOST_RESTARTS} times while it made a snapshot of '{collection}'"
    raise NoAnswer(text, next_step="look at the server's log and its memory, then run the same command again")


def _wait_new(
    q: Qdrant, collection: str, known: Sequence[Snapshot], seconds: float, process: str | None
) -> Snapshot | None:
    """Poll for a snapshot that is not `known`. Returns None if the server was restarted and left none."""
    answered = time.monotonic()
    deadline = answered + seconds
    seen: Snapshot | None = None
    while time.monotonic() < deadline:
        new_process = restarted(q, process)  # before the list, which then has what the old process made
        try:
            new = [one for one in list_snapshots(q, collection) if one not in known]
        except MigrationError as error:
            if not is_down(error) or time.monotonic() - answered > RESTART_SECONDS:
                raise
            q.sleep(POLL_SECONDS)
            continue
        answered = time.monotonic()
        newest = max(new, key=lambda one: (one.created, one.name), default=None)
        if newest and newest == seen:
            return seen  # unchanged since the last poll, so it is complete
        if new_process and not newest:
            return None
        seen = newest
        q.sleep(POLL_SECONDS)
    text = f"Qdrant at {q.display}: no snapshot of '{collection}' appeared within {seconds:.0f} s"
    raise NoAnswer(text, next_step="look at the server's log and its free disk space, then run the same command again")


def _snapshot(raw: dict[str, Any]) -> Snapshot:
    checksum = str(raw.get("checksum"))
    valid = checksum if _SHA256.fullmatch(checksum) else None
    return Snapshot(str(raw["name"]), int(raw["size"]), valid, str(raw.get("creation_time") or ""))


def delete(q: Qdrant, collection: str, snapshot: str) -> bool:
    """Delete a snapshot file. Returns False if it, or the collection, does not exist."""
    try:
        q.json("DELETE", collection_path(collection, "snapshots", snapshot), params=_WAIT, retry=True)
    except NotFound:
        return False
    return True


def download(
    q: Qdrant, collection: str, snapshot: Snapshot, write: Callable[[bytes], object], progress: Progress | None = None
) -> str:
    """Pass every byte of the snapshot to `write`, in order and once. Returns the sha256 in hex.

    Resumes after a broken connection. A server with its snapshots in S3 sends neither a length nor parts of a file:
    then the listed size counts, and after a break what was received is skipped. Raises BackupDamaged if the server's
    checksum differs, StoreFailed if the file changes meanwhile, NoAnswer after several connections without a byte.
    """
    fetch, digest = _Fetch(q, collection_path(collection, "snapshots", snapshot.name), snapshot.size), hashlib.sha256()
    for piece in fetch.pieces():
        digest.update(piece)
        write(piece)
        if progress:
            progress(len(piece))
    sha256 = digest.hexdigest()
    if snapshot.checksum not in {None, sha256}:
        text = f"snapshot {snapshot.name}: sha256 of the download is {sha256}, the server's is {snapshot.checksum}"
        raise BackupDamaged(text, next_step="run the backup again")
    return sha256


def with_checksum(q: Qdrant, collection: str, snapshot: Snapshot) -> Snapshot:
    """The snapshot with a checksum. If the server gave none (S3), one download, which is not stored, computes it."""
    if snapshot.checksum is not None:
        return snapshot
    return replace(snapshot, checksum=download(q, collection, snapshot, lambda _piece: None))


class _Fetch:
    """The download of one file over as many connections as it needs."""

    def __init__(self, q: Qdrant, path: str, listed_size: int) -> None:
        self.received = 0
        self.total = -1
        self._q, self._path, self._listed_size = q, path, listed_size
        self._etag = ""

    def pieces(self) -> Iterator[bytes]:
        barren = 0  # consecutive connections that brought almost nothing
        while True:
            before, began = self.received, time.monotonic()
            yield from self._one_connection()
            if self.received == self.total:
                return
            enough = PIECE_BYTES if time.monotonic() - began >= PIECE_SECONDS else 1
            barren = barren + 1 if self.received - before < enough else 0
            if barren > len(PAUSES_SECONDS):
                text = f"Qdrant at {self._q.display}: the download does not continue after byte {self.received}"
                raise NoAnswer(text, next_step="check the network, then run the same command again")
            self._q.sleep(PAUSES_SECONDS[max(0, barren - 1)])

    def _one_connection(self) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"}  # otherwise it is compressed, and has no length
        if self.received:
            headers["Range"] = f"bytes={self.received}-"
        with self._q.call("GET", self._path, headers=headers, stream=True) as response:
            if response.status_code == 206 and "Content-Range" not in response.headers:
                return  # the connection broke within the headers
            skip = self._bytes_to_skip(response)
            # If the connection breaks here, its pieces end early.
            with contextlib.suppress(HTTPError, OSError):
                for data in _paced(response):
                    piece, skip = data[skip:], max(0, skip - len(data))
                    if self.received + len(piece) > self.total:
                        raise self._refuse("the download is longer than its length")
                    self.received += len(piece)
                    if piece:
                        yield piece

    def _bytes_to_skip(self, response: requests.Response) -> int:
        """Check the headers. Returns how many bytes of this answer were already received."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._refuse("a proxy compresses the download")
        if self.received == 0:
            self._etag = response.headers.get("ETag", "")
            length = response.headers.get("Content-Length", str(self._listed_size))
            if not re.fullmatch(r"[0-9]{1,18}", length):
                raise self._refuse(f"the length of the download is {one_line(length[:40])!r}")
            self.total = int(length)
            return 0
        if response.status_code == 200 and not self._etag and "Content-Length" not in response.headers:
            return self.received
        wanted = f"bytes {self.received}-{self.total - 1}/{self.total}"
        if response.status_code != 206 or response.headers.get("Content-Range") != wanted:
            raise self._refuse("the rest of an interrupted download cannot be fetched")
        if response.headers.get("ETag", "") != self._etag:
            raise self._refuse("the snapshot changed while it was fetched")
        return 0

    def _refuse(self, why: str) -> StoreFailed:
        step = "run the backup again, directly against the server"
        return StoreFailed(f"Qdrant at {self._q.display}: {why}", next_step=step)


def _paced(response: requests.Response) -> Iterator[bytes]:
    """Yield the body as it arrives. Raises TimeoutError if a piece takes PIECE_SECONDS.

    urllib3's `stream` reads chunk lines and trailers without a limit.
    """
    end_by(response, time.monotonic() + PIECE_SECONDS)
    left = PIECE_BYTES
    while data := response.raw.read1(PIECE_BYTES, decode_content=False):
        yield data
        left -= len(data)
        if left <= 0:
            end_by(response, time.monotonic() + PIECE_SECONDS)
            left = PIECE_BYTES
