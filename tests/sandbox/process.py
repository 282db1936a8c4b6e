"""A server as a child process of a test or of the rehearsal: started, awaited, killed, never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

POLL_SECONDS = 0.02
LOG_TAIL_BYTES = 4000

# A shell that outlives the parent: the pipe from it closes when it is gone, however it died. Without the word `done`
# the server goes too, if its number still is the server's.
_UNDERTAKER = """
trap '' HUP INT TERM
read -r word
[ "$word" = done ] && exit
case $(ps -o args= -p "$1") in "$2"*) kill -9 "$1" ;; esac
"""


class ServerStartError(RuntimeError):
    """The child exited, or did not answer in time; the text ends with the tail of its log."""


# Below those that Linux and macOS give to whoever asks for just any port: such a one could be given to another before
# the server that it is for has started. Each process begins elsewhere, and takes none twice.
_PORTS = range(20_000, 32_000)
_choices = islice(cycle(_PORTS), os.getpid() * 997 % len(_PORTS), None)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that nobody listens on. Raises ServerStartError where there is none."""
    for port in islice(_choices, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ServerStartError(f"no port of {host} from {_PORTS.start} to {_PORTS.stop} is free")


class ServerProcess:
    """One child process. Its stdout and stderr are appended to `log`; it is signalled by its own pid only.

    It does not outlive its parent: a parent that is killed takes it along.

    The child leads a process group of its own, so a Ctrl-C meant for the parent does not reach it before the
    parent has tidied up.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.argv = [str(argument) for argument in argv]
        self.log = log
        self._env = dict(env or {})  # added to the parent's own environment
        self._cwd = cwd
        self._child: subprocess.Popen[bytes] | None = None
        self._undertaker: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The child's process id. Raises ServerStartError when there is no child."""
        if self._child is None:
            raise ServerStartError(f"{self.argv[0]} is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the child was started and has not exited."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> ServerProcess:
        """Start the child; does not wait for it to answer (see `wait_ready`)."""
        if self.running:
            raise ServerStartError(f"{self.argv[0]} is running already")
        self._dismiss()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._env},
                cwd=self._cwd,
                start_new_session=True,
            )
        self._undertaker = subprocess.Popen(
            ["/bin/sh", "-c", _UNDERTAKER, "sh", str(self._child.pid), self.argv[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def wait_ready(self, check: Callable[[], bool], seconds: float = 20.0) -> ServerProcess:
        """Wait until `check` returns True; OSError and ConnectionError from it mean "not yet".

        On an early exit or after `seconds` the child is stopped and ServerStartError is raised with the log's tail.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.running:
                raise ServerStartError(f"{self.argv[0]} exited with {self._code()}:\n{self.log_tail()}")
            with contextlib.suppress(OSError):
                if check():
                    return self
            time.sleep(POLL_SECONDS)
        self.stop()
        raise ServerStartError(f"{self.argv[0]} did not answer within {seconds:g} s:\n{self.log_tail()}")

    def kill(self) -> None:
        """SIGKILL, and wait until the child is gone. Nothing happens if it is gone already."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        self._dismiss()

    def stop(self, seconds: float = 5.0) -> None:
        """SIGTERM, and SIGKILL after `seconds`. Nothing happens if the child is gone already."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)
        self.kill()

    def _dismiss(self) -> None:
        """The child is gone: nobody is left to be taken along."""
        if self._undertaker is not None:
            with contextlib.suppress(BrokenPipeError):
                self._undertaker.communicate(b"done\n")
            self._undertaker = None

    def log_tail(self, size: int = LOG_TAIL_BYTES) -> str:
        """The last `size` bytes of the log, as text."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - size))
            return log.read().decode("utf-8", "replace")

    def _code(self) -> int | None:
        return None if self._child is None else self._child.returncode
