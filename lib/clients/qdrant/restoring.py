"""Restore a collection from a snapshot, either uploaded or fetched by the server from itself."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, cast

from lib.clients.qdrant import snapshots
from lib.clients.qdrant.collection import delete_collection, exists, health
from lib.clients.qdrant.snapshots import Snapshot, restarted, startup
from lib.clients.qdrant.transport import (
    NoAnswer,
    Qdrant,
    QdrantError,
    collection_path,
    is_disk_full,
    is_down,
    unanswered,
)
from lib.concurrency import Progress
from lib.errors import BackupDamaged, MigrationError, StoreFailed

ANSWER_SECONDS = 300.0  # the server answers when the restore has ended; after that the collection is polled
RESTORE_SECONDS = 1800.0
POLL_SECONDS = 0.5
FAILED_SECONDS = 10.0  # during a restore, a collection can look failed for a moment
WRONG_CHECKSUM = "0" * 64

_OWN_FOLDER = "file:///qdrant/snapshots"  # of Qdrant's image: read from there, it does not go through the network
_OWN_URL = "http://localhost:6333"  # a container's own port, if QDRANT_URL is a mapped one
_CONFLICT = 409
_PIECE_BYTES = 256 << 10  # the timeout of a send applies to each piece


def unique_filename(stem: str) -> str:
    """Return a name for an uploaded file. The server stores the file under this name, and deletes it by this name."""
    return f"{stem}-{secrets.token_hex(6)}.snapshot"


def preflight_upload(q: Qdrant, collection: str) -> None:
    """Raise AccessRefused if snapshots may not be uploaded, by an upload of one kilobyte with a wrong checksum.

    It changes and leaves nothing (seen on 1.11.3 and 1.18.3).
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
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as stream:
        form = _Form(filename, _Body(stream, size, progress))
        process = startup(q)
        try:
            _post(q, collection, form, checksum, answer_seconds)
            return True
        except (NoAnswer, QdrantError) as error:
            if _is_mismatch(error):
                raise BackupDamaged(
                    f"the snapshot of '{collection}' that {q.display} received is not the one of the backup: the file"
                    " was changed since it was verified, or damaged on the way",
                    next_step="run the same command again; if it fails again, verify every backup:\n"
                    "python scripts/backup_automem.py --check all",
                ) from error
            if form.left or not unanswered(error):
                raise  # of a part the server restores nothing
    wait_restored(q, collection, seconds, process)
    return False


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
    process = startup(q)
    try:
        _put_recover(q, collection, location, checksum, answer_seconds)
        return True
    except (NoAnswer, QdrantError) as error:
        if not unanswered(error) and getattr(error, "status", None) != _CONFLICT:
            raise
    wait_restored(q, collection, seconds, process)
    return False


def can_fetch_itself(q: Qdrant, collection: str, snapshot: Snapshot, probe: str) -> str | None:
    """The URL from which the server reads this snapshot of its own, or None if it cannot.

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
            if is_disk_full(error):
                raise
            if _is_mismatch(error) and snapshot.checksum is not None and snapshot.checksum in error.text:
                return location
    return None


def _is_mismatch(error: MigrationError) -> bool:
    """Whether what the server received has another checksum."""
    return isinstance(error, QdrantError) and error.status == 400 and "checksum mismatch" in error.text.lower()


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
        q.sleep(POLL_SECONDS)


class _Body:
    """A stream of known length, as the multipart encoder needs it; `len` is the number of unread bytes."""

    def __init__(self, stream: BinaryIO, size: int, progress: Progress | None) -> None:
        self.len = size
        self._stream, self._progress = stream, progress

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(self.len if size < 0 else min(size, self.len))
        if not piece and self.len:
            raise BackupDamaged(f"the snapshot ends {self.len} bytes early")
        self.len -= len(piece)
        if self._progress:
            self._progress(len(piece))
        return piece


class _Form:
    """A snapshot as a multipart body of `len` bytes, of which `left` are not sent yet.

    It yields large pieces: from a file object, http.client would read 16 KiB at a time.
    """

    def __init__(self, filename: str, content: bytes | _Body) -> None:
        from requests_toolbelt import MultipartEncoder

        self._encoder = MultipartEncoder({"snapshot": (filename, content, "application/octet-stream")})
        self.len = self.left = int(self._encoder.len)
        self.content_type = str(self._encoder.content_type)

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._encoder.read(_PIECE_BYTES):
            yield piece
            self.left -= len(piece)


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
    """Delete a collection, live or failed, and first the snapshots that were uploaded to it (on all `nodes`)."""
    if not exists(q, name):
        return
    for node in (q, *nodes):
        # The collection matters more: a failed one keeps a 1.11.3 server from starting.
        with suppress(MigrationError):
            for one in snapshots.list_snapshots(node, name):
                snapshots.delete(node, name, one.name)
    delete_collection(q, name)
