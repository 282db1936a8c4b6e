"""Snapshots of a collection on the server: create once, list, download whole, restore, delete."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import requests
from urllib3.exceptions import HTTPError
from urllib3.filepost import encode_multipart_formdata

from lib.clients.qdrant import transport
from lib.clients.qdrant.collection import delete_collection, exists, health
from lib.clients.qdrant.transport import NoAnswer, NotFound, Qdrant, QdrantError, collection_path, is_down, unanswered
from lib.concurrency import Progress
from lib.errors import BackupDamaged, MigrationError, StoreFailed, one_line
from lib.network import end_by

ANSWER_SECONDS = 300.0  # the server answers when a snapshot is made or restored; after that it is polled
CREATE_SECONDS = RESTORE_SECONDS = 1800.0
RESTART_SECONDS = 120.0  # a server that does not answer meanwhile may be starting again
FAILED_SECONDS = 10.0  # during a restore, a collection can look failed for a moment
POLL_SECONDS, RESTORE_POLL_SECONDS = 1.0, 0.5
PIECE_BYTES = 1024 * 1024
PIECE_SECONDS = 600.0  # a connection that brings less than a piece in this time is closed
WRONG_CHECKSUM = "0" * 64

_WAIT = {"wait": "true"}
_MOST_RESTARTS = 3  # of the server while it makes one snapshot
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_OWN_FOLDER = "file:///qdrant/snapshots"  # of Qdrant's image: read from there, it does not go through the network
_OWN_URL = "http://localhost:6333"  # a container's own port, if QDRANT_URL is a mapped one
_CONFLICT = 409
_SENT_BYTES = 256 << 10  # the timeout of a send applies to each piece


@dataclass(frozen=True)
class Snapshot:
    """A snapshot file on the server: size in bytes, sha256 in hex if the server gives one, creation time (UTC)."""

    name: str
    size: int
    checksum: str | None
    created: str


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


def delete(q: Qdrant, collection: str, snapshot: str) -> None:
    """Delete a snapshot file, if it and the collection exist."""
    with contextlib.suppress(NotFound):
        q.json("DELETE", collection_path(collection, "snapshots", snapshot), params=_WAIT, retry=True)


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
            if barren > len(transport.PAUSES_SECONDS):
                text = f"Qdrant at {self._q.display}: the download does not continue after byte {self.received}"
                raise NoAnswer(text, next_step="check the network, then run the same command again")
            self._q.sleep(transport.PAUSES_SECONDS[max(0, barren - 1)])

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


def unique_filename(stem: str) -> str:
    """Return a name for an uploaded file. The server stores the file under this name, and deletes it by this name."""
    return f"{stem}-{secrets.token_hex(6)}.snapshot"


def preflight_upload(q: Qdrant, collection: str) -> None:
    """Raise AccessRefused if snapshots may not be uploaded, by an upload of one kilobyte with a wrong checksum.

    It changes and leaves nothing (seen on 1.11.3 and 1.18.3).
    """
    try:
        form = _Form(unique_filename("preflight"), BytesIO(b"0" * 1024), 1024)
        _post(q, collection, form, WRONG_CHECKSUM, q.timeout_seconds)
    except QdrantError as error:
        if error.status != 400:
            raise


def upload_and_restore(
    q: Qdrant,
    collection: str,
    source: Path | BinaryIO,
    *,
    size: int,
    filename: str,
    checksum: str,
    progress: Progress | None = None,
    seconds: float = RESTORE_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
    allow_existing: bool = False,
) -> bool:
    """Upload a snapshot of `size` bytes and sha256 `checksum`, and have it restored as `collection`.

    Returns whether the server answered within `answer_seconds`; if not, the collection was polled for at most
    `seconds`. An answer does not verify the points. The server keeps the file as `filename` (see `unique_filename`),
    also after a failure. `allow_existing`: the collection already has parts from other nodes' snapshots.
    Raises MigrationError if the collection exists, AccessRefused, QdrantError and StoreFailed (then check `health`
    and delete a failed collection), NoAnswer if the upload was interrupted, BackupDamaged for a source that is
    shorter or that has another checksum.
    """
    if not allow_existing:
        _refuse_existing(q, collection)
    preflight_upload(q, collection)
    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as stream:
        form = _Form(filename, stream, size, progress)
        send = partial(_post, q, collection, form, checksum, answer_seconds)
        try:
            # Of a part the server restores nothing.
            return _restored(q, collection, send, seconds, lambda error: unanswered(error) and form.sent)
        except QdrantError as error:
            if not _is_mismatch(error):
                raise
            raise BackupDamaged(
                f"the snapshot of '{collection}' that {q.display} received is not the one of the backup: the file"
                " was changed since it was verified, or damaged on the way",
                next_step="run the same command again; if it fails again, verify every backup:\n"
                "python scripts/backup_automem.py --check all",
            ) from error


def recover(
    q: Qdrant,
    collection: str,
    location: str,
    checksum: str,
    *,
    seconds: float = RESTORE_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
    allow_existing: bool = False,
) -> bool:
    """Like `upload_and_restore`, from a `location` that the server fetches itself (see `can_fetch_itself`).

    If the collection is already being restored, that restore is waited for.
    """
    if not allow_existing:
        _refuse_existing(q, collection)
    send = partial(_put_recover, q, collection, location, checksum, answer_seconds)

    def may_run(error: MigrationError) -> bool:
        return unanswered(error) or (isinstance(error, QdrantError) and error.status == _CONFLICT)

    return _restored(q, collection, send, seconds, may_run)


def _restored(
    q: Qdrant, collection: str, send: Callable[[], object], seconds: float, may_run: Callable[[MigrationError], bool]
) -> bool:
    """Send a request to restore. Returns whether it was answered; if a restore may run in spite of an error, waits."""
    process = startup(q)
    try:
        send()
        return True
    except (NoAnswer, QdrantError) as error:
        if not may_run(error):
            raise
    wait_restored(q, collection, seconds, process)
    return False


def can_fetch_itself(q: Qdrant, collection: str, snapshot: Snapshot, probe: str) -> str | None:
    """The URL from which the server can read this snapshot, which it made; None if it cannot.

    Verified by a recover as `probe` (an unused name) with a wrong checksum: the mismatch error names the right one,
    and nothing is created (seen on 1.11.3 and 1.18.3). Raises AccessRefused, and QdrantError for a full disk.
    """
    addresses = [base + collection_path(collection, "snapshots", snapshot.name) for base in (q.base_url, _OWN_URL)]
    own_file = _OWN_FOLDER + collection_path(collection, snapshot.name).removeprefix("/collections")
    for location in dict.fromkeys((own_file, *addresses)):
        try:
            _put_recover(q, probe, location, WRONG_CHECKSUM, q.timeout_seconds)
        except NoAnswer:
            continue
        except QdrantError as error:
            if transport.is_disk_full(error):
                raise
            if _is_mismatch(error) and snapshot.checksum is not None and snapshot.checksum in error.text:
                return location
    return None


def _is_mismatch(error: QdrantError) -> bool:
    """Whether what the server received has another checksum."""
    return error.status == 400 and "checksum mismatch" in error.text.lower()


def wait_restored(q: Qdrant, collection: str, seconds: float, process: str | None = None) -> None:
    """Poll until the collection answers. Raises StoreFailed if it failed, or is not restored after `seconds`.

    Until a restore ends, its collection answers 404 or 500 (seen on 1.11.3 and 1.18.3). `process` is the `startup` of
    the server that was asked to restore: if the server was restarted, nothing is restored any more.
    """
    deadline, failed_since = time.monotonic() + seconds, None
    while True:
        new_process = restarted(q, process)
        try:
            state = health(q, collection)
        except MigrationError as error:
            if not is_down(error):
                raise
            state = "unavailable"
        now = time.monotonic()
        if state == "live":
            return
        failed_since = (failed_since or now) if state == "failed" else None
        has_failed = failed_since is not None and now - failed_since >= FAILED_SECONDS
        if has_failed or now >= deadline or (new_process and state == "missing"):
            raise StoreFailed(f"the restore of '{collection}' at {q.display} did not finish: the collection is {state}")
        q.sleep(RESTORE_POLL_SECONDS)


class _Form:
    """A snapshot of `size` bytes as a multipart body of `len` bytes; `sent`: whether all of them were sent.

    It yields large pieces: from a file object, http.client would read 16 KiB at a time.
    """

    def __init__(self, filename: str, stream: BinaryIO, size: int, progress: Progress | None = None) -> None:
        fields = {"snapshot": (filename, b"\0", "application/octet-stream")}
        around, self.content_type = encode_multipart_formdata(fields)
        self._head, self._tail = around.split(b"\0")
        self._stream, self._size, self._progress = stream, size, progress
        self.len, self.sent = len(self._head) + size + len(self._tail), False

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        unread = self._size
        while unread:
            piece = self._stream.read(min(_SENT_BYTES, unread))
            if not piece:
                raise BackupDamaged(f"the snapshot ends {unread} bytes early")
            unread -= len(piece)
            if self._progress:
                self._progress(len(piece))
            yield piece
        yield self._tail
        self.sent = True


def _post(q: Qdrant, collection: str, form: _Form, checksum: str, seconds: float) -> None:
    path = collection_path(collection, "snapshots", "upload")
    params = {"wait": "true", "priority": "snapshot", "checksum": checksum}
    headers, body = {"Content-Type": form.content_type}, cast("BinaryIO", form)
    q.call("POST", path, body, params=params, headers=headers, timeout=seconds)


def _put_recover(q: Qdrant, collection: str, location: str, checksum: str, seconds: float) -> None:
    body = {"location": location, "priority": "snapshot", "checksum": checksum}
    # The key is sent to the configured address only: another server may listen at the other one.
    if q.api_key and location.startswith(f"{q.base_url}/"):
        body["api_key"] = q.api_key
    path = collection_path(collection, "snapshots", "recover")
    q.json("PUT", path, body, params={"wait": "true"}, timeout=seconds)


def _refuse_existing(q: Qdrant, collection: str) -> None:
    """Raise MigrationError if the collection exists: a restore that fails destroys it (seen on 1.11.3 and 1.18.3)."""
    state = health(q, collection)
    if state not in {"missing", "restoring"}:
        text = f"'{collection}' exists at {q.display} ({state}); a restore would clear it first"
        raise MigrationError(text, next_step="verify its backup, then delete it and run the same command again")


def delete_with_snapshots(q: Qdrant, name: str, nodes: Iterable[Qdrant] = ()) -> None:
    """Delete a collection, live or failed, and first the snapshots that were uploaded to it (on all `nodes`).

    Raises MigrationError if a snapshot cannot be deleted and the collection is live: it stays, because without it the
    server no longer lists the file, which would stay on its disk.
    """
    if not exists(q, name):
        return
    refused: MigrationError | None = None
    for node in (q, *nodes):
        try:
            for one in list_snapshots(node, name):
                delete(node, name, one.name)
        except MigrationError as error:
            refused = error
    # A failed collection matters more than a file: it keeps a 1.11.3 server from starting.
    if refused and health(q, name) == "live":
        raise refused
    delete_collection(q, name)
