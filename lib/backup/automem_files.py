"""The files of AutoMem's own backups: recognised by their content, and read as a stream.

One JSON object for each store, as AutoMem's `automem/backup.py` writes it (0.16, with `indent=2`):
https://github.com/verygoodplugins/automem
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import IO, NoReturn, TypeVar, cast

import msgspec

from lib.backup.archive import damage_reported, opened_tar
from lib.backup.manifest import COLLECTION_DIR, GRAPH_DIR
from lib.clients.embeddings.cache_file import chunks
from lib.errors import BackupDamaged, BadFile
from lib.journal import STAMP

GRAPH, COLLECTION = "graph", "collection"
_GZIP = b"\x1f\x8b"
_HEAD_BYTES = 4096
_SIGNS = {kind: re.compile(rf'\s*\{{[^\[]*"{kind}_name"\s*:'.encode()) for kind in (GRAPH, COLLECTION)}
_MEMBER = re.compile(rf"(?:\./)?({GRAPH_DIR}|{COLLECTION_DIR})/[^/]+\.json\.gz")
_IN_TAR = re.compile(rb"(?:\./)?(?:falkordb|qdrant)/(?:[^\0]*\.json\.gz)?\0")
_KINDS = {GRAPH_DIR: GRAPH, COLLECTION_DIR: COLLECTION}
ANOTHER = "use another backup of AutoMem's"
T = TypeVar("T")
_PIECE, _LARGEST_ELEMENT = 1 << 20, 64 << 20
_FIELD = re.compile(rb'  "([a-z_]+)": (.*?)(,?)\n')


@dataclass(frozen=True)
class AutoMemFile:
    """A backup of one store. `member`: its name in the tar.gz of AutoMem's GET /backup; empty for a file."""

    path: Path
    kind: str
    member: str = ""

    @property
    def display(self) -> str:
        """The file for messages."""
        return f"{self.path} ({self.member})" if self.member else str(self.path)

    @property
    def stamp(self) -> str:
        """The time in the file's name, or an empty text."""
        found = re.search(STAMP, self.member or self.path.name)
        return found[0] if found else ""


def is_automems(path: Path) -> bool:
    """Whether the file is one of AutoMem's own backups, or the tar.gz of its GET /backup."""
    head = _head(path)
    return any(sign.match(head) for sign in (*_SIGNS.values(), _IN_TAR))


def automem_files(path: Path) -> list[AutoMemFile]:
    """AutoMem's own backups in a file, a tar.gz or a folder (its newest), one of each store; none for other files.

    Raises BadFile if they were not taken together, BackupDamaged.
    """
    if path.is_dir():
        found = [max(files, key=lambda one: (one.stamp, one.path)) for files in _in_folder(path) if files]
    elif _IN_TAR.match(head := _head(path)):
        found = list(_in_tar(path))
    else:
        return [AutoMemFile(path, kind) for kind, sign in _SIGNS.items() if sign.match(head)]
    if len({one.stamp for one in found}) > 1:
        named = " ".join(quote(str(one.path)) for one in found)
        step = f"name the files to restore:\npython scripts/restore_from_backup.py {named}"
        raise BadFile(
            f"{path} holds no pair: {' and '.join(one.display for one in found)} were not taken together",
            next_step=step if path.is_dir() else ANOTHER,
        )
    return found


def listed_files(folder: Path) -> list[AutoMemFile]:
    """All backups of AutoMem's own scripts in a backup folder, newest first."""
    return sorted((one for files in _in_folder(folder) for one in files), key=lambda one: one.stamp, reverse=True)


def _in_folder(folder: Path) -> Iterator[list[AutoMemFile]]:
    for name, kind in _KINDS.items():
        paths = [*folder.glob(f"{name}/{name}_*.json*"), *folder.glob(f"{name}_*.json*")]
        yield [AutoMemFile(path, kind) for path in paths if path.suffix in {".gz", ".json"} and path.is_file()]


def _in_tar(path: Path) -> Iterator[AutoMemFile]:
    seen = set()
    with opened_tar(path, to_end=True) as (tar, _):
        for member in tar:
            named = _MEMBER.fullmatch(member.name)
            if member.isdir():
                continue
            if not named or not member.isreg() or named[1] in seen:
                raise BackupDamaged(f"{path} holds a member that no backup has: {member.name!r}", next_step=ANOTHER)
            seen.add(named[1])
            yield AutoMemFile(path, _KINDS[named[1]], member.name)
        # A complete tar ends with a block of zeros, which was read; tarfile accepts one that ends before it.
        if tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise BackupDamaged(f"{path} is cut after a member", next_step=ANOTHER)


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if head.startswith(_GZIP):
        try:
            with gzip.open(path) as plain:
                head = plain.read(_HEAD_BYTES)
        except (OSError, EOFError, zlib.error):
            return b""
    return head


class Text:
    """The text of a file, read forward."""

    def __init__(self, source: AutoMemFile, stream: IO[bytes]) -> None:
        self._source, self._stream = source, stream
        self._at = self._before = 0
        self._held = self._read()
        if not self._held.startswith(b'{\n  "'):
            self.refuse_layout()

    def until(self, mark: bytes) -> bytes:
        """Return the text up to and with the next `mark`. Raises BackupDamaged if there is none."""
        # The last byte of a mark is rare, and a search for one byte is twenty times as fast as one for the mark.
        last, searched = mark[-1:], self._at
        while True:
            found = self._held.find(last, searched)
            if found < 0:  # add a piece to the text that is not read yet
                rest = self._held[self._at :]
                self._before += self._at
                piece = self._read()
                self._held, self._at, searched = rest + piece, 0, len(rest)
                if not piece:
                    self.refuse("it is cut")
                if len(rest) > _LARGEST_ELEMENT:
                    self.refuse_layout()
            elif self._held.endswith(mark, self._at, found + 1):
                start, self._at = self._at, found + 1
                return self._held[start : self._at]
            else:
                searched = found + 1

    def require_end(self) -> None:
        """Raise BackupDamaged unless only the closing brace and blanks follow."""
        rest = self._held[self._at :]
        while len(rest) < _PIECE and (piece := self._read()):
            rest += piece
        if rest.strip() != b"}":
            self.refuse("it is cut" if not rest.strip() else "something follows the end of its object")

    def decoded(self, text: bytes, kind: type[T]) -> T:
        """Return the JSON as `kind`. Raises BackupDamaged."""
        try:
            try:
                return msgspec.json.decode(text, type=kind)
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:
                # Python's encoder writes NaN and Infinity, which are not JSON.
                return msgspec.convert(json.loads(text), kind)
        except (msgspec.ValidationError, ValueError, RecursionError) as error:
            self.refuse(f"{error}")

    def refuse(self, why: str, next_step: str = ANOTHER) -> NoReturn:
        """Raise BackupDamaged with the number of bytes, uncompressed, that were read."""
        where = f"at byte {self._before + self._at:,} of its text"
        raise BackupDamaged(f"{self._source.display} is damaged {where}: {why}", next_step=next_step)

    def refuse_layout(self) -> NoReturn:
        """Refuse a file that another program has formatted, with the command that formats it again."""
        path, kind = quote(str(self._source.path)), self._source.kind
        command = f"gunzip -cf {path} | python -m json.tool --indent 2 - {kind}.json"
        self.refuse("its lines are not those that AutoMem writes", f"if another program has formatted it:  {command}")

    def _read(self) -> bytes:
        try:
            return self._stream.read(_PIECE)
        except (EOFError, OSError, zlib.error) as error:
            self.refuse(str(error))


@contextmanager
def opened_text(source: AutoMemFile) -> Iterator[Text]:
    """Open the text of a file, inflated. Raises BackupDamaged."""
    from isal import igzip, igzip_threaded

    with ExitStack() as stack:
        stack.enter_context(damage_reported(source.path))
        if source.member:
            tar, _ = stack.enter_context(opened_tar(source.path, to_end=True))
            member = next(one for one in tar if one.name == source.member)
            stream = igzip.open(cast("IO[bytes]", tar.extractfile(member)), "rb")
        else:
            stream = stack.enter_context(source.path.open("rb"))
            if stream.read(2) == _GZIP:
                stream = stack.enter_context(igzip_threaded.open(source.path, "rb"))
            else:
                stream.seek(0)
        yield Text(source, stream)


def fields(text: Text) -> Iterator[tuple[str, bytes]]:
    """Yield each field of the object with its JSON; of a list, each element alone under the list's name.

    No line within a JSON string can end, so the lines of `indent=2` show where an element ends. This takes a third of
    the time of ijson (10,000 points of 768d: 239 MB of text, ijson 3.0 s), and orjson or msgspec parse an element.
    """
    text.until(b"\n")
    more = True
    while more:
        field = _FIELD.fullmatch(text.until(b"\n"))
        if not field:
            text.refuse("a field of the object is expected here")
        name, value, comma = field[1].decode(), field[2], field[3]
        if value == b"[":
            while True:
                yield name, text.until(b"\n    }")
                if (after := text.until(b"\n")) != b",\n":
                    break
            comma = after + text.until(b"\n")
            if comma not in {b"\n  ]\n", b"\n  ],\n"}:
                text.refuse(f"the end of '{name}' is expected here")
        elif value == b"{":
            yield name, b"{" + text.until(b"\n  }")
            comma = text.until(b"\n")
        elif value != b"[]":
            yield name, value
        more = b"," in comma
    text.require_end()


def elements(text: Text, size: int) -> Iterator[tuple[str, list[bytes]]]:
    """Yield pages of at most `size` elements of each field, with the field's name."""
    for name, found in groupby(fields(text), key=lambda field: field[0]):
        for page in chunks((element for _, element in found), size):
            yield name, page
