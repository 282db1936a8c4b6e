"""Copies encrypted with age (https://age-encryption.org): the keys, and files encrypted and decrypted as streams.

The package pyrage is loaded only if a copy is encrypted. It decrypts with a passphrase in memory only, so a passphrase
encrypts a small key file per set, which `age -d -i` accepts, and that key encrypts the set.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from lib.errors import AccessRefused, BackupDamaged, UsageProblem
from lib.files import atomic_writer, read_regular

SUFFIX = ".age"
_TAG, _NONCE, _CHUNK = 16, 16, 64 << 10  # https://github.com/C2SP/C2SP/blob/main/age.md: the payload
_HEADER_LIMIT = 64 << 10
_HEADER_END = b"\n---"
_KEY_FILE_LIMIT = 64 << 10
_IDENTITY = "AUTOMEM_BACKUP_IDENTITY"
_PASSPHRASE = "AUTOMEM_BACKUP_PASSPHRASE_FILE"  # noqa: S105 - the name of a setting
_RECIPIENTS = "AUTOMEM_BACKUP_RECIPIENTS"


@dataclass(frozen=True)
class CopyKeys:
    """The settings of encrypted copies, not parsed; empty if not set.

    `recipients`: public keys separated by commas, or the path of a file with one per line. The others are paths.
    """

    recipients: str = ""
    passphrase_file: str = ""
    identity: str = ""

    @property
    def encrypt(self) -> bool:
        """Whether copies are encrypted."""
        return bool(self.recipients or self.passphrase_file)

    @property
    def decrypt(self) -> bool:
        """Whether there is a key to decrypt copies with."""
        return bool(self.identity or self.passphrase_file)


def require_encryption(keys: CopyKeys) -> None:
    """Raise UsageProblem if copies cannot be encrypted with these keys."""
    if keys.recipients and keys.passphrase_file:
        raise UsageProblem(
            f"{_RECIPIENTS} and {_PASSPHRASE} are both set: it is not clear who may read the copies",
            next_step=f"unset one of them ({_IDENTITY} alone decrypts copies for a recipient):\nunset {_PASSPHRASE}",
        )
    if keys.recipients:
        recipients(keys)
    else:
        passphrase(keys)


def recipients(keys: CopyKeys) -> list[Any]:
    """The public keys that copies are encrypted for. Raises UsageProblem."""
    pyrage = _pyrage()
    words = [one.strip() for one in keys.recipients.split(",")]
    if not any(word.startswith(("age1", "ssh-")) for word in words):
        words = _lines(Path(keys.recipients), _RECIPIENTS)
    found = []
    for word in filter(None, words):
        kind = pyrage.ssh if word.startswith("ssh-") else pyrage.x25519
        try:
            found.append(kind.Recipient.from_str(word))
        except pyrage.RecipientError as error:
            step = "this prints the public key of a key file:\nage-keygen -y key.txt"
            message = f"{_RECIPIENTS}: {word[:20]!r}... is no public key of age or SSH: {error}"
            raise UsageProblem(message, next_step=step) from error
    if not found:
        step = "make a pair of keys:\nage-keygen -o key.txt"
        raise UsageProblem(f"{_RECIPIENTS} names no public key", next_step=step)
    return found


def passphrase(keys: CopyKeys) -> str:
    """The passphrase: the file's text without the end of its line. Raises UsageProblem."""
    _pyrage()
    path = Path(keys.passphrase_file).expanduser()
    lines = _lines(path, _PASSPHRASE, comments=False)
    if len(lines) != 1:
        raise UsageProblem(
            f"{_PASSPHRASE}: {path} has {len(lines)} lines: one is the passphrase",
            next_step=f"write the passphrase into {quote(str(path))}, as its one line",
        )
    return lines[0]


def identities(keys: CopyKeys) -> list[Any]:
    """The private keys of the identity file. Raises UsageProblem; no part of a key is shown."""
    pyrage = _pyrage()
    path = Path(keys.identity).expanduser()
    data = _secret(path, _IDENTITY)
    found: list[Any] = []
    with suppress(pyrage.IdentityError, UnicodeDecodeError):
        if b"PRIVATE KEY-----" in data:
            found = [pyrage.ssh.Identity.from_buffer(data)]
        else:
            lines = [one.strip() for one in data.decode().splitlines()]
            found = [pyrage.x25519.Identity.from_str(one) for one in lines if one and not one.startswith("#")]
    if not found:
        raise UsageProblem(
            f"{_IDENTITY}: {path} holds no private key that can be used",
            next_step="name a file that age-keygen made, or an SSH key without a passphrase",
        )
    return found


def new_key(words: str) -> tuple[Any, bytes]:
    """Make a key for one set. Returns the public key, and the key file encrypted with the passphrase."""
    pyrage = _pyrage()
    identity = pyrage.x25519.Identity.generate()
    return identity.to_public(), bytes(pyrage.passphrase.encrypt(f"{identity}\n".encode(), words))


def key_in(key_file: bytes, words: str) -> list[Any]:
    """The private key in a set's key file. Raises AccessRefused for a wrong passphrase, or on a slow machine.

    To try a passphrase takes a second on the machine that encrypts. pyrage refuses what takes too long on this one.
    """
    pyrage = _pyrage()
    if len(key_file) > _KEY_FILE_LIMIT:
        raise BackupDamaged("the key file of the copy is too large for one")
    try:
        return [pyrage.x25519.Identity.from_str(pyrage.passphrase.decrypt(key_file, words).decode().strip())]
    except (pyrage.DecryptError, pyrage.IdentityError, UnicodeDecodeError) as error:
        if "work parameter" in str(error):
            raise AccessRefused(
                "this machine is too slow or too busy to try the passphrase: the copy was encrypted on a faster one",
                next_step="run the same command again when this machine is less busy, or on a faster one; or decrypt"
                " the copy's files with age, which waits for as long as it takes:\nage -d -i backup_*.key.age FILE.age",
            ) from error
        raise AccessRefused(
            f"the copy was encrypted with another passphrase, or its key file is damaged: {error}",
            next_step=f"name the file with the passphrase of that time:\nexport {_PASSPHRASE}=...",
        ) from error


def encrypt(source: Path, target: Path, public_keys: list[Any]) -> None:
    """Encrypt a file into another, as a stream."""
    with source.open("rb") as plain, atomic_writer(target) as stream:
        _pyrage().encrypt_io(plain, stream, public_keys)


def decrypt(chunks: Iterable[bytes], write: Callable[[bytes], object], private_keys: list[Any], name: str) -> None:
    """Decrypt a file that arrives in pieces. `write` gets each piece after its checksum was verified.

    Raises AccessRefused if no key fits, BackupDamaged for a file that was changed or cut off, and what `chunks` or
    `write` raise. `name` is for messages.
    """
    pyrage = _pyrage()
    streams = _Streams(_with_header(chunks, name), write)
    try:
        pyrage.decrypt_io(streams, streams, private_keys)
    except (pyrage.DecryptError, OSError) as error:
        if streams.error:
            raise streams.error from None
        if "No matching keys" in str(error):
            raise AccessRefused(
                f"{name} is encrypted for another key than {_IDENTITY} or {_PASSPHRASE} gives",
                next_step=f"name the file of the private key:\nexport {_IDENTITY}=...",
            ) from error
        raise BackupDamaged(f"{name} cannot be decrypted: it was changed or cut off ({error})") from error


def could_hold(size: int | None, plain: int) -> bool:
    """Whether an encrypted file of `size` bytes (None: there is none) can hold `plain` bytes; needs no key."""
    if size is None:
        return False
    body = _NONCE + plain + _TAG * max(1, -(-plain // _CHUNK))
    return 0 < size - body <= _HEADER_LIMIT


def require_key(keys: CopyKeys, name: str) -> None:
    """Raise UsageProblem if there is no key to decrypt with."""
    if not keys.decrypt:
        raise UsageProblem(
            f"{name} is encrypted, and no key is set",
            next_step=f"name the file of the private key:\nexport {_IDENTITY}=...\nor that of the passphrase:\n"
            f"export {_PASSPHRASE}=...",
        )


def _with_header(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """The same pieces. Raises BackupDamaged if age's header does not end: pyrage would read on and on."""
    header, pieces = b"", iter(chunks)
    for piece in pieces:
        header += piece
        if _HEADER_END not in header and len(header) > _HEADER_LIMIT:
            raise BackupDamaged(f"{name} is not encrypted with age, or its header has no end")
        yield piece
        if _HEADER_END in header:
            break
    yield from pieces


class _Streams:
    """What pyrage reads (pieces of bytes) and writes (a function), as files.

    `error` is what either raised: pyrage keeps only its text.
    """

    def __init__(self, pieces: Iterator[bytes], write: Callable[[bytes], object]) -> None:
        self.error: BaseException | None = None
        self._pieces, self._write = filter(None, pieces), write
        self._left = b""

    @contextmanager
    def _error_saved(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.error = error
            raise

    def read(self, size: int) -> bytes:
        with self._error_saved():
            self._left = self._left or next(self._pieces, b"")
        found, self._left = self._left[:size], self._left[size:]
        return found

    def write(self, data: bytes) -> int:
        with self._error_saved():
            self._write(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: no bytes are buffered here."""


def _lines(path: Path, setting: str, *, comments: bool = True) -> list[str]:
    data = _secret(path.expanduser(), setting)
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{setting}: {path} is no text", next_step=f"file {quote(str(path))}") from error
    return [one for one in lines if one.strip() and not (comments and one.lstrip().startswith("#"))]


def _secret(path: Path, setting: str) -> bytes:
    """Read a file of keys. Raises UsageProblem if it cannot be read, or if it is secret and others may read it."""
    shown = quote(str(path))
    try:
        data, state = read_regular(path, _KEY_FILE_LIMIT)
    except OSError as error:
        raise UsageProblem(f"{setting}: {path} cannot be read: {error.strerror}", next_step=f"ls -l {shown}") from error
    if setting != _RECIPIENTS and state.st_mode & 0o077:
        raise UsageProblem(f"{setting}: other users may read {path}", next_step=f"chmod 600 {shown}")
    return data


def _pyrage() -> Any:
    if importlib.util.find_spec("pyrage") is None:
        message = "encrypted copies need the Python package 'pyrage', which is not installed here"
        raise UsageProblem(message, next_step="python -m pip install pyrage")
    import pyrage

    return pyrage
