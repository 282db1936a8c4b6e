"""Places elsewhere, on this machine: a real S3 protocol server, and a real SSH server with SFTP that can misbehave."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko

from tests.sandbox.process import free_port

ACCESS_KEY, SECRET_KEY = "AKIAOFFSITE", "s3cr3t-of-the-bucket"
BUCKET = "automem-copies"
USER, PASSWORD = "keeper", "p4ss:w@rd/of sftp"
_S3 = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


@dataclass
class S3Server:
    """moto's S3 in a separate process; `environ` is what a client of it needs."""

    port: int = field(default_factory=free_port)

    def __enter__(self) -> S3Server:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _S3, str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).close()
            except OSError:
                assert self._process.poll() is None, "the S3 server ended"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.1)
            else:
                break
        self.client().create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        return s3_environ(self.url)

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )

    def objects(self, prefix: str) -> dict[str, int]:
        """The names below the prefix with their bytes."""
        found = self.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
        return {one["Key"].removeprefix(f"{prefix}/"): one["Size"] for one in found}


def s3_environ(url: str) -> dict[str, str]:
    """What an operator exports to use this S3."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass
class Mischief:
    """How the SFTP server misbehaves; the names are those of files or folders."""

    spoil: str = ""  # one byte of each file with this in its name is written wrong
    cut_after: int | None = None  # the connection breaks after so many written bytes
    deny: tuple[str, ...] = ()  # of open, mkdir, remove, rename
    hold: tuple[str, str] = ("", "")  # an operation and a part of a name: it waits there until `let_go`
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def wait_at(self, what: str, name: str) -> None:
        if self.hold[0] == what and self.hold[1] in name:
            self.reached.set()
            self.let_go.wait(600)


class _Login(paramiko.ServerInterface):
    def __init__(self, key: paramiko.PKey | None) -> None:
        self._key = key

    def check_auth_password(self, username: str, password: str) -> int:
        right = (username, password) == (USER, PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        right = username == USER and self._key is not None and key.asbytes() == self._key.asbytes()
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def get_allowed_auths(self, _username: str) -> str:
        return "password,publickey"

    def check_channel_request(self, kind: str, _chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED if kind == "session" else paramiko.OPEN_FAILED_UNKNOWN_CHANNEL_TYPE


class _Handle(paramiko.SFTPHandle):
    def __init__(self, files: _Files, path: Path, flags: int) -> None:
        super().__init__(flags)
        self._files, self._path = files, path
        mode = "r+b" if flags & (os.O_WRONLY | os.O_RDWR) else "rb"
        self.readfile = self.writefile = path.open(mode)

    def stat(self) -> Any:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self.readfile.fileno()))

    def chattr(self, attr: paramiko.SFTPAttributes) -> int:
        paramiko.SFTPServer.set_file_attr(str(self._path), attr)
        return paramiko.SFTP_OK

    def write(self, offset: int, data: bytes) -> int:
        mischief = self._files.server.mischief
        mischief.wait_at("write", self._path.name)
        if mischief.cut_after is not None:
            mischief.cut_after -= len(data)
            if mischief.cut_after < 0:
                self._files.server.cut()
                return paramiko.SFTP_FAILURE
        if mischief.spoil and mischief.spoil in self._path.name and offset == 0:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return super().write(offset, data)


class _Files(paramiko.SFTPServerInterface):
    """Files below the server's folder, as OpenSSH serves them."""

    def __init__(self, server: Any, *words: Any, **named: Any) -> None:
        super().__init__(server, *words, **named)
        self.server: SFTPServer = server.files

    def _path(self, path: str) -> Path:
        return self.server.folder / self.canonicalize(path).lstrip("/")

    def _do(self, what: str, call: Any) -> Any:
        if what in self.server.mischief.deny:
            return paramiko.SFTP_PERMISSION_DENIED
        try:
            return call()
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)

    def list_folder(self, path: str) -> Any:
        def listed() -> Any:
            found = []
            for one in self._path(path).iterdir():
                attributes = paramiko.SFTPAttributes.from_stat(one.stat())
                attributes.filename = one.name
                found.append(attributes)
            return found

        return self._do("list", listed)

    def stat(self, path: str) -> Any:
        return self._do("stat", lambda: paramiko.SFTPAttributes.from_stat(self._path(path).stat()))

    lstat = stat

    def open(self, path: str, flags: int, _attr: Any) -> Any:
        self.server.mischief.wait_at("open" if flags & os.O_CREAT else "read", path)

        def opened() -> Any:
            if flags & os.O_CREAT:
                os.close(os.open(self._path(path), flags, 0o666))
            return _Handle(self, self._path(path), flags)

        return self._do("open" if flags & os.O_CREAT else "read", opened)

    def remove(self, path: str) -> Any:
        return self._do("remove", lambda: self._path(path).unlink() or paramiko.SFTP_OK)

    def rename(self, oldpath: str, newpath: str) -> Any:
        self.server.mischief.wait_at("rename", newpath)
        if self._path(newpath).exists():  # as OpenSSH answers the plain rename
            return paramiko.SFTP_FAILURE
        return self._do("rename", lambda: self._path(oldpath).rename(self._path(newpath)) and paramiko.SFTP_OK)

    def mkdir(self, path: str, attr: Any) -> Any:
        mode = attr.st_mode if attr.st_mode is not None else 0o777
        return self._do("mkdir", lambda: self._path(path).mkdir(mode) or paramiko.SFTP_OK)


class SFTPServer:
    """An SSH server on a loopback port that serves `folder` by SFTP, in threads of the test."""

    def __init__(self, folder: Path, key: paramiko.PKey | None = None) -> None:
        self.folder = folder
        self.mischief = Mischief()
        self.logins = 0
        self.host_key = paramiko.ECDSAKey.generate()  # an RSA key takes a second
        self._key = key
        self._transports: list[paramiko.Transport] = []

    def __enter__(self) -> SFTPServer:
        logging.getLogger("paramiko").addHandler(logging.NullHandler())
        self.folder.mkdir(parents=True, exist_ok=True)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self.cut()

    def cut(self) -> None:
        """Break every connection."""
        for one in self._transports:
            one.sock.close()
            one.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            self._transports.append(transport)
            transport.add_server_key(self.host_key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files)
            login = _Login(self._key)
            login.files = self  # type: ignore[attr-defined]
            threading.Thread(target=self._greet, args=(transport, login), daemon=True).start()

    def _greet(self, transport: paramiko.Transport, login: _Login) -> None:
        try:
            transport.start_server(server=login)
            self.logins += 1
        except (paramiko.SSHException, EOFError, OSError):
            transport.close()

    def url(self, path: str, *, login: str = USER) -> str:
        return f"sftp://{login}@127.0.0.1:{self.port}{path}"

    def be_known(self, home: Path) -> None:
        """As after a first `ssh` whose question was answered with yes."""
        (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
        key = f"{self.host_key.get_name()} {self.host_key.get_base64()}"
        (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}\n")
