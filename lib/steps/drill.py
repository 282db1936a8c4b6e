"""The restore drill: prove backups that already exist, as far as this machine can."""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from lib.backup_set.archive import peek_facts
from lib.backup_set.manifest import Manifest, read_manifest
from lib.backup_set.sets import Deployment, find_set, latest, manifest_paths
from lib.errors import BackupDamaged, BadFile, MigrationError, MissingData
from lib.graph.engine import Engine
from lib.graph.rdb import is_rdb
from lib.steps.compare_manifest import compare_names
from lib.steps.prove import prove_graph
from lib.steps.prove_collection import prove_collection

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
class Proof:
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


def prove_named(
    folder: Path, word: str, engines: list[Engine], owner: Deployment | None = None
) -> list[Proof]:
    """Prove what `--check` names: `all`, `latest` of `owner`, a manifest, or a file of a set with the whole set.

    What is damaged becomes a Proof with its fault, the others go on. Raises MissingData where there is nothing to
    prove, BadFile for a file of no set.
    """
    paths = named_manifests(folder, word, owner)
    return [proof for path in paths for proof in _prove_manifest(path, engines)]


def named_manifests(folder: Path, word: str, owner: Deployment | None = None) -> list[Path]:
    """The manifests of the sets that `--check` names; raises like `prove_named`."""
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


def _prove_manifest(path: Path, engines: list[Engine]) -> list[Proof]:
    try:
        return _prove_set(read_manifest(path), engines)
    except (BackupDamaged, BadFile) as error:
        return [Proof(path, "damaged", "", str(error))]


def _prove_set(manifest: Manifest, engines: list[Engine]) -> list[Proof]:
    compare_names(manifest)
    proofs = []
    for half in manifest.halves:
        path = manifest.file_of(half)
        try:
            if half is manifest.graph:
                found = prove_graph(path, manifest.graph.graph, engines, half=manifest.graph)
                proofs.append(Proof(path, found.level, found.note))
            else:
                proved = prove_collection(path, half=manifest.collection)
                proofs.append(Proof(path, proved.level, proved.note))
        except BackupDamaged as error:
            proofs.append(Proof(path, "damaged", "", str(error)))
        except MigrationError as error:
            proofs.append(Proof(path, "unknown", "", str(error)))
    return proofs
