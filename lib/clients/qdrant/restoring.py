"""A collection put in place from a snapshot: sent to the server, or fetched by the server from itself."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from lib.clients.qdrant import snapshots
from lib.clients.qdrant.collection import Health, delete_collection, health, list_collections
from lib.clients.qdrant.snapshots import Snapshot, restarted, startup
from lib.clients.qdrant.transport import NoAnswer, Qdrant, QdrantError, collection_path, is_disk_full
from lib.errors import BackupDamaged, MigrationError, StoreFailed, StoreUnreachable

ANSWER_SECONDS = 300.0  # the server answers when the restore is done; after that the collection is asked
RESTORE_SECONDS = 1800.0
POLL_SECONDS = 0.5
DEAD_SECONDS = 10.0  # while a shard is put in place, a collection can look dead for a moment
WRONG_CHECKSUM = "0" * 64

# A container's own port, where QDRANT_URL is a mapped one.
_OWN_URL = "http://localhost:6333"
_GATEWAY_GAVE_UP = (502, 503, 504)
_PIECE_BYTES = 256 << 10  # each has the seconds that a send may take


@dataclass(frozen=True)
class Restored:
    """How a restore ended: seconds it took, and whether the server itself said so (else: polled)."""

    seconds: float
    answered: bool


def unique_filename(stem: str) -> str:
    """A name for an uploaded file: it stays on the server under it, and can be deleted by it."""
    return f"{stem}-{secrets.token_hex(6)}.snapshot"


def preflight_upload(q: Qdrant, collection: str) -> None:
    """Raise AccessRefused unless snapshots may be uploaded: a kilobyte with a wrong checksum.

    It changes and leaves nothing, whether the collection exists or not (seen on 1.11.3 and 1.18.3).
    """
    try:
        form = _Form(unique_filename("preflight"), b"0" * 1024)
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
    progress: Callable[[int, int], object] | None = None,
    seconds: float = RESTORE_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
    beside: bool = False,
) -> Restored:
    """Send a snapshot of `size` bytes and sha256 `checksum`, and have it restored as `collection`.

    The file stays in the collection's folder as `filename` (see `unique_filename`), also when this fails. An answer
    of 200 proves nothing about the points: count them and compare. `progress` gets (bytes sent, bytes in all).
    `beside`: other parts of the collection, from other nodes' snapshots, are in place already.
    Raises MigrationError where the collection exists, AccessRefused, QdrantError and StoreFailed (look at `health`
    then, and delete a dead collection), NoAnswer where the sending broke off, BackupDamaged for a short source.
    """
    if not beside:
        _refuse_existing(q, collection)
    preflight_upload(q, collection)
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as stream:
        body = _Body(stream, size, progress)
        return _upload(q, collection, body, filename, checksum, (answer_seconds, seconds))


def recover(
    q: Qdrant,
    collection: str,
    location: str,
    checksum: str,
    *,
    seconds: float = RESTORE_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
    beside: bool = False,
) -> Restored:
    """Have the server restore `collection` from a `location` that it fetches itself (see `can_fetch_itself`).

    Like `upload_and_restore` otherwise; a second restore of the same collection that is under way is waited for.
    """
    if not beside:
        _refuse_existing(q, collection)
    began, process = time.monotonic(), startup(q)
    try:
        _put_recover(q, collection, location, checksum, answer_seconds)
    except NoAnswer:
        pass
    except QdrantError as error:
        if error.status != 409 and error.status not in _GATEWAY_GAVE_UP:
            raise
    else:
        return Restored(time.monotonic() - began, answered=True)
    wait_restored(q, collection, seconds, process)
    return Restored(time.monotonic() - began, answered=False)


def can_fetch_itself(q: Qdrant, collection: str, snapshot: Snapshot, probe: str) -> str | None:
    """The URL under which the server fetches this snapshot of its own, or None where it cannot.

    Proved by a recover as `probe` (a name that nobody has) with a wrong checksum: the mismatch that it answers
    names the right one, and nothing is created (seen on 1.11.3 and 1.18.3). Raises AccessRefused, and QdrantError
    where the server has no room for what it fetches.
    """
    for base in dict.fromkeys((q.base_url, _OWN_URL)):
        location = base + collection_path(collection, "snapshots", snapshot.name)
        try:
            _put_recover(q, probe, location, WRONG_CHECKSUM, q.timeout_seconds)
        except NoAnswer:
            continue
        except QdrantError as error:
            if is_disk_full(error):
                raise
            if _is_mismatch(error) and snapshot.checksum is not None and snapshot.checksum in error.text:
                return location
    return None


def _is_mismatch(error: QdrantError) -> bool:
    """Whether the server received something else than the checksum says."""
    return error.status == 400 and "checksum mismatch" in error.text.lower()


def wait_restored(q: Qdrant, collection: str, seconds: float, process: str | None = None) -> None:
    """Poll until the collection answers. Raises StoreFailed: dead, or not there after `seconds`.

    Until a restore is done, its collection answers 404 or 500 (seen on 1.11.3 and 1.18.3). `process` is the server
    that was asked (`startup`): another one restores nothing.
    """
    deadline = time.monotonic() + seconds
    failed_since: float | None = None
    while True:
        gone = restarted(q, process)
        state = _health(q, collection)
        now = time.monotonic()
        if state == "live":
            return
        failed_since = (failed_since or now) if state == "dead" else None
        lost = gone and state == "missing"
        if lost or now >= deadline or (failed_since is not None and now - failed_since >= DEAD_SECONDS):
            raise StoreFailed(
                f"the restore of '{collection}' at {q.display} did not finish: the collection is {state}",
                next_step="look at the Qdrant server's log, then run the same command again",
            )
        q.sleep(POLL_SECONDS)


class _Body:
    """A stream of known length, as the multipart encoder wants it."""

    def __init__(self, stream: BinaryIO, size: int, progress: Callable[[int, int], object] | None) -> None:
        self.len = size  # what is left
        self._stream, self._size, self._progress = stream, size, progress

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(self.len if size < 0 else min(size, self.len))
        if not piece and self.len:
            raise BackupDamaged(f"the snapshot ends {self.len} bytes early", next_step="use another backup")
        self.len -= len(piece)
        if self._progress:
            self._progress(self._size - self.len, self._size)
        return piece


class _Form:
    """A snapshot as multipart, in pieces: of a file, 16 KiB would be read at a time. `left`: bytes not sent yet."""

    def __init__(self, filename: str, content: bytes | _Body) -> None:
        from requests_toolbelt import MultipartEncoder

        self._encoder = MultipartEncoder({"snapshot": (filename, content, "application/octet-stream")})
        self.len = self.left = int(self._encoder.len)
        self.content_type = str(self._encoder.content_type)

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._encoder.read(_PIECE_BYTES):
            yield piece
            self.left -= len(piece)


def _upload(
    q: Qdrant,
    collection: str,
    body: _Body,
    filename: str,
    checksum: str,
    patience: tuple[float, float],
) -> Restored:
    form, began, process = _Form(filename, body), time.monotonic(), startup(q)
    try:
        _post(q, collection, form, checksum, patience[0])
    except NoAnswer:
        if form.left:
            raise  # the server got a part, and restores nothing
    except QdrantError as error:
        if _is_mismatch(error):
            raise BackupDamaged(
                f"the snapshot of '{collection}' that {q.display} received is not the one of the backup: the file was"
                " changed since it was verified, or damaged on the way",
                next_step="check the file:  python scripts/backup_automem.py --check FILE",
            ) from error
        if error.status not in _GATEWAY_GAVE_UP:
            raise
    else:
        return Restored(time.monotonic() - began, answered=True)
    wait_restored(q, collection, patience[1], process)
    return Restored(time.monotonic() - began, answered=False)


def _post(q: Qdrant, collection: str, form: _Form, checksum: str, seconds: float) -> None:
    path = collection_path(collection, "snapshots", "upload")
    params = {"wait": "true", "priority": "snapshot", "checksum": checksum}
    headers, body = {"Content-Type": form.content_type}, cast("BinaryIO", form)
    q.call("POST", path, body, params=params, headers=headers, timeout=seconds, retry=False)


def _put_recover(q: Qdrant, collection: str, location: str, checksum: str, seconds: float) -> None:
    body = {"location": location, "priority": "snapshot", "checksum": checksum}
    # To the configured address alone: who listens at another one is not known.
    if q.api_key and location.startswith(f"{q.base_url}/"):
        body["api_key"] = q.api_key
    path = collection_path(collection, "snapshots", "recover")
    q.json("PUT", path, body, params={"wait": "true"}, timeout=seconds, retry=False)


def _refuse_existing(q: Qdrant, collection: str) -> None:
    """A restore clears what it restores onto, and where it fails then, nothing is left (seen on 1.11.3 and 1.18.3)."""
    state = health(q, collection)
    if state not in {"missing", "restoring"}:
        raise MigrationError(
            f"'{collection}' exists at {q.display} ({state}); a restore would clear it first",
            next_step="delete it once its backup is proved, or restore under another name",
        )


def _health(q: Qdrant, collection: str) -> Health:
    try:
        return health(q, collection)
    except StoreUnreachable:
        return "failing"  # it may be starting anew


def drop_temporary(q: Qdrant, name: str, nodes: Iterable[Qdrant] = ()) -> None:
    """Delete a temporary collection, live or failed, and first the files uploaded to it.

    The files cannot be reached without the collection. `nodes` are those of a cluster, each of which may hold a file.
    """
    if name not in list_collections(q):
        return
    for node in (q, *nodes):
        # The collection matters more: a failed one keeps a 1.11.3 server from starting.
        with suppress(MigrationError):
            for one in snapshots.list_snapshots(node, name):
                snapshots.delete(node, name, one.name)
    delete_collection(q, name)
