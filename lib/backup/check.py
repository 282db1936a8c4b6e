"""Check backups that exist, here or elsewhere, as far as this machine can; upload those that verify."""

from __future__ import annotations

import dataclasses
import gzip
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from lib.backup.age import SUFFIX, CopyKeys, require_encryption
from lib.backup.archive import peek_facts
from lib.backup.catalog import (
    Deployment,
    find_set,
    latest,
    manifest_paths,
    newest_full,
    safety_copies,
    with_purpose,
)
from lib.backup.collection import verify_collection
from lib.backup.copies import (
    MANIFEST_NAME,
    Uploaded,
    accept,
    fetch,
    is_whole_here,
    manifests,
    read_there,
    require_elsewhere,
    require_fetchable,
    upload,
)
from lib.backup.copy_store import OffsiteStore, is_url, open_offsite
from lib.backup.graph import compare_names, verify_graph
from lib.backup.manifest import GRAPH_DIR, Manifest, read_manifest
from lib.clients.falkordb.rdb import is_rdb
from lib.clients.falkordb.scratch import Engine
from lib.concurrency import ProgressBar
from lib.errors import BackupDamaged, BadFile, MigrationError, MissingData, UsageProblem
from lib.files import lock_targets, private_dir
from lib.journal import STAMP

_GZIP = b"\x1f\x8b"
# https://github.com/verygoodplugins/automem, scripts/backup_automem.py; the archive is that of its GET /backup.
_AUTOMEM_HEAD = 4096
_AUTOMEMS_OWN = {
    "a graph": re.compile(rb'\s*\{[^\[]*"graph_name"\s*:'),
    "a collection": re.compile(rb'\s*\{[^\[]*"collection_name"\s*:'),
    "an archive": re.compile(rb"(?:\./)?(?:falkordb|qdrant)/(?:[^\0]*\.json\.gz)?\0"),
}
RDB, ARCHIVE, SNAPSHOT, MANIFEST = "rdb", "archive", "snapshot", "manifest"


@dataclass(frozen=True)
class FileVerification:
    """One file and what could be proved of it; `fault` is empty where it is what it should be."""

    path: Path | str
    level: str
    note: str
    fault: str = ""


def kind_of(path: Path) -> str:
    """What a FILE is, told from its content; raises BadFile where it is nothing that can be restored."""
    _require_file(path)
    with path.open("rb") as stream:
        head = stream.read(512)
    if is_rdb(path):
        return RDB
    _refuse_automems_own(path, head)
    if head.startswith(_GZIP):
        peek_facts(path)
        return ARCHIVE
    if head.lstrip().startswith(b"{"):
        return MANIFEST
    if head[257:262] == b"ustar" or path.suffix == ".snapshot":
        return SNAPSHOT
    raise BadFile(
        f"{path} is no backup: neither an RDB, nor a qdrant_snapshot_*.tar.gz, nor a backup_*.json",
        next_step="python scripts/backup_automem.py --list",
    )


def _refuse_automems_own(path: Path, head: bytes) -> None:
    """Raise BadFile for a backup of AutoMem's own scripts or of its GET /backup."""
    if head.startswith(_GZIP):
        try:
            with gzip.open(path) as stream:
                head = stream.read(_AUTOMEM_HEAD)
        except (OSError, EOFError, zlib.error):
            return
    kind = next((kind for kind, sign in _AUTOMEMS_OWN.items() if sign.match(head)), None)
    if kind:
        raise BadFile(
            f"{path} is {kind} as AutoMem's own backup writes it, not a backup of these scripts",
            next_step="restore it with AutoMem's own scripts/restore_from_backup.py, in AutoMem's checkout; or take one"
            " of these:  python scripts/backup_automem.py --list",
        )


def _require_file(path: Path) -> None:
    hint = "python scripts/backup_automem.py --list"
    try:
        if path.is_dir():
            raise BadFile(
                f"{path} is a folder, a file is needed", next_step=f"ls -l {quote(str(path))}   or   {hint}"
            )
        if not path.exists():
            raise BadFile(f"{path} does not exist", next_step=hint)
        if path.stat().st_size == 0:
            raise BadFile(f"{path} is empty", next_step=hint)
        path.open("rb").close()
    except PermissionError as error:
        raise BadFile(
            f"{path} cannot be read: {error.strerror}", next_step=f"ls -l {quote(str(path))}"
        ) from error


def verify_named(
    folder: Path, word: str, engines: list[Engine], owner: Deployment | None = None
) -> list[FileVerification]:
    """Prove what `--check` names: `all`, `latest` of `owner`, a manifest, or a file of a set with the whole set.

    What is damaged becomes a Proof with its fault, the others go on. Raises MissingData where there is nothing to
    prove, BadFile for a file of no set.
    """
    paths = named_manifests(folder, word, owner)
    return [proof for path in paths for proof in _verify_manifest(path, engines)]


def named_manifests(folder: Path, word: str, owner: Deployment | None = None) -> list[Path]:
    """The manifests of the sets that `--check` names; raises like `verify_named`."""
    if word == "latest" and not Path(word).exists():
        newest = latest(folder, owner)
        assert newest.path is not None
        return [newest.path]
    if word != "all":
        return [_manifest_of(folder, Path(word))]
    paths = manifest_paths(folder)
    if not paths:
        raise MissingData(f"no backup in {folder}", next_step="python scripts/backup_automem.py")
    return paths


def _manifest_of(folder: Path, path: Path) -> Path:
    found = find_set(folder, path)
    if path.is_file() and path in manifest_paths(path.parent):
        return path
    if found is None and kind_of(path) == MANIFEST:
        return path
    if found is None or found.path is None:
        raise BadFile(
            f"{path} belongs to no backup set in {folder}: there is no manifest to prove it against",
            next_step="name the folder with --backup-dir",
        )
    return found.path


def _verify_manifest(path: Path, engines: list[Engine]) -> list[FileVerification]:
    try:
        return _verify_set(read_manifest(path), engines)
    except (BackupDamaged, BadFile) as error:
        return [FileVerification(path, "damaged", "", str(error))]


def _verify_set(manifest: Manifest, engines: list[Engine]) -> list[FileVerification]:
    compare_names(manifest)
    proofs = []
    for component in manifest.components:
        path = manifest.file_of(component)
        try:
            if component is manifest.graph:
                found = verify_graph(path, manifest.graph.graph, engines, component=manifest.graph)
                proofs.append(FileVerification(path, found.level, found.note))
            else:
                proved = verify_collection(path, component=manifest.collection)
                proofs.append(FileVerification(path, proved.level, proved.note))
        except BackupDamaged as error:
            proofs.append(FileVerification(path, "damaged", "", str(error)))
        except MigrationError as error:
            proofs.append(FileVerification(path, "unknown", "", str(error)))
    return proofs


LATEST = "latest"
_QUARANTINE = "quarantine"  # in the backup folder: what was fetched and is not verified
_SET_FILE = re.compile(rf".+_({STAMP})\.[a-z.]+")


@dataclass(frozen=True)
class _Named:
    """A URL taken apart: the folder, the manifest's name (LATEST, or none for all), a file of that set."""

    folder: str
    manifest: str = ""
    file: str = ""


def _named(url: str) -> _Named:
    parent, _, last = url.rstrip("/").removesuffix(SUFFIX).rpartition("/")
    if last == LATEST or MANIFEST_NAME.fullmatch(last):
        return _Named(parent, last)
    if found := _SET_FILE.fullmatch(last):
        folder, _, within = parent.rpartition("/")
        return _Named(folder, f"backup_{found[1]}.json", f"{within}/{last}")
    return _Named(url)


def require_place(url: str, folder: Path, keys: CopyKeys, *, graph: str = "", write: bool = True) -> str:
    """Raise where sets of `folder` could not be uploaded to the URL and found again; the URL as it may be shown.

    Raises UsageProblem, AccessRefused, StoreUnreachable, MissingData, StoreFailed. `graph` is the one that will be
    backed up. With `write` a small file is written there, read back and deleted.
    """
    require_elsewhere(url, folder)
    if _named(url).manifest:
        last = url.rstrip("/").rpartition("/")[2]
        raise UsageProblem(
            f"a folder '{last}' is read as the name of a backup in the folder above it: sets in it would not be found",
            next_step="name a folder that is called otherwise",
        )
    if graph:
        require_fetchable(f"{GRAPH_DIR}/{graph}.rdb")
    if keys.encrypt:
        require_encryption(keys)
    store = open_offsite(url)
    if write:
        store.verify_writable()
    else:
        store.sizes()
    return store.shown


def fetched(
    word: str,
    folder: Path,
    owner: Deployment,
    engines: Callable[[], list[Engine]],
    bar: ProgressBar,
    keys: CopyKeys,
) -> str:
    """A FILE argument as it is, or the set that a URL names brought into `folder`: the path of its file there.

    A set is fetched into a folder of its own, and moved into `folder` only when it is verified.

    The URL of a manifest or of one of its files, or of a folder with `/latest` behind it: the newest full set there
    that is of this deployment and no safety copy. Raises like `offsite.fetch`, and BadFile for another URL.
    """
    if not is_url(word):
        return word
    named = _named(word)
    store = open_offsite(named.folder, keys)
    if not named.manifest:
        raise BadFile(
            f"{store.shown} names no backup: end it with backup_*.json, a file of a set, or {LATEST}",
            next_step=f"python scripts/backup_automem.py --list {quote(store.shown)}",
        )
    name = _newest(store, owner, folder) if named.manifest == LATEST else named.manifest
    with lock_targets([f"fetching into {folder.absolute()}"]):
        path = folder / name
        if not is_whole_here(store, name, folder):
            path = _verified(fetch(store, name, private_dir(folder) / _QUARANTINE, bar), folder, engines())
    if named.file and named.file not in {file.name for file in read_manifest(path).files}:
        raise BadFile(f"{store.shown}/{named.file} is no file of the set {name}")
    return str(folder / named.file if named.file else path)


def _verified(path: Path, folder: Path, engines: list[Engine]) -> Path:
    """Verify a fetched set and move it into `folder`; the path of its manifest there.

    Raises BackupDamaged for a set that does not verify, which is removed.
    """
    for proof in verify_named(path.parent, str(path), engines):
        if proof.fault:
            shutil.rmtree(path.parent)
            raise BackupDamaged(
                f"the set that was fetched does not verify, and was removed: {proof.fault}",
                next_step="use another set of the copies:  python scripts/backup_automem.py --list URL",
            )
    accepted = accept(path, folder)
    shutil.rmtree(path.parent)
    return accepted


def _newest(store: OffsiteStore, owner: Deployment | None, folder: Path) -> str:
    """What `latest` means there, as it does in `folder`; a newer manifest that does not read raises."""
    safety = safety_copies(folder)
    found = (with_purpose(read_there(store, name)[0], safety) for name in manifests(store))
    return newest_full(found, owner, store.shown).name


def verify_copies(
    url: str, folder: Path, engines: list[Engine], bar: ProgressBar, keys: CopyKeys
) -> list[FileVerification]:
    """The restore drill of the sets elsewhere, one after the other: fetched into `folder`, proved, removed again.

    The URL of a folder, or of one set in it. What is damaged or missing becomes a Proof with its fault. Raises
    MissingData where no set is there.
    """
    named = _named(url)
    store = open_offsite(named.folder, keys)
    names = [named.manifest] if named.manifest else manifests(store)
    if named.manifest == LATEST:
        names = [_newest(store, None, folder)]
    proofs: list[FileVerification] = []
    for name in names:
        with _drill_folder(folder) as drill:
            try:
                found = verify_named(drill, str(fetch(store, name, drill, bar)), engines)
            except (BackupDamaged, BadFile, MissingData) as error:
                found = [FileVerification(drill / name, "damaged", "", str(error))]
        proofs += [_there(store, drill, one) for one in found]
    return proofs


def _there(store: OffsiteStore, drill: Path, proof: FileVerification) -> FileVerification:
    """The proof as of the file there, not of the copy that was proved."""
    path = Path(proof.path).relative_to(drill)
    fault = proof.fault.replace(str(drill), store.shown)
    return dataclasses.replace(proof, path=f"{store.shown}/{path}", fault=fault)


@contextmanager
def _drill_folder(folder: Path) -> Iterator[Path]:
    """A folder for copies, empty; what a killed drill left in it goes first."""
    drill = private_dir(folder) / "drill"
    with lock_targets([f"drill in {folder.absolute()}"]):
        shutil.rmtree(drill, ignore_errors=True)
        try:
            yield drill
        finally:
            shutil.rmtree(drill, ignore_errors=True)


def verify_and_upload(
    folder: Path,
    owner: Deployment,
    word: str,
    url: str | None,
    engines: list[Engine],
    bar: ProgressBar,
    keys: CopyKeys,
) -> tuple[list[FileVerification], list[Uploaded] | None]:
    """Prove what `--check` names, here or elsewhere, and bring the sets that prove to `url`, oldest first.

    Raises UsageProblem for sets that are elsewhere already, else like `verify_named`, `require_place` and `upload`.
    """
    if is_url(word):
        if url:
            raise UsageProblem(
                "--upload is for sets that are here, --check names some that are elsewhere",
                next_step="python scripts/backup_automem.py --check all --upload URL",
            )
        return verify_copies(word, folder, engines, bar, keys), None
    if url:
        require_place(url, folder, keys)
    proofs = verify_named(folder, word, engines, owner)
    faulty = {Path(one.path) for one in proofs if one.fault}
    if not url:
        return proofs, None
    manifests_here = [
        read_manifest(one) for one in sorted(named_manifests(folder, word, owner)) if one not in faulty
    ]
    sound = [
        one for one in manifests_here if not faulty & {one.file_of(component) for component in one.components}
    ]
    return proofs, [upload(url, manifest, bar, keys) for manifest in sound]
