"""A server as a child process of a test or of quickstart. It never outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

PROJECT_ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.02
LOG_TAIL_BYTES = 4000

# A shell that outlives the parent. Its pipe from the parent closes when the parent ends, even by SIGKILL. Without the
# word `done` it then kills the server, if the process id still belongs to the server.
_CLEANUP_WATCHDOG = """
trap '' HUP INT TERM
read -r word
[ "$word" = done ] && exit
case $(ps -o args= -p "$1") in "$2"*) kill -9 "$1" ;; esac
"""


class ServerStartError(RuntimeError):
    """The child exited, or did not answer in time. The text ends with the tail of its log."""


# Below the ports that Linux and macOS assign by themselves: such a port could be given to another process before the
# server starts. Each process begins at another port and returns none twice.
_PORTS = range(20_000, 32_000)
_choices = islice(cycle(_PORTS), os.getpid() * 997 % len(_PORTS), None)


def free_port(host: str = "127.0.0.1") -> int:
    """Find a TCP port of `host` that nothing listens on. Raises ServerStartError if there is none."""
    for port in islice(_choices, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ServerStartError(f"no port of {host} from {_PORTS.start} to {_PORTS.stop} is free")


class ServerProcess:
    """One child process, and a context manager that starts and stops it.

    Args:
        log: stdout and stderr are appended to it; a temporary file if None.
        env: added to the parent's environment.

    The child leads a new process group: a Ctrl-C for the parent does not reach it before the parent has cleaned up.
    If the parent is killed, the child is killed as well.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.argv = [str(argument) for argument in argv]
        self._temporary = None if log else tempfile.TemporaryDirectory(prefix="automem-sandbox-")
        self.log = log or Path(self._temporary.name if self._temporary else "", "server.log")
        self._env = dict(env or {})
        self._cwd = cwd
        self._child: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The child's process id. Raises ServerStartError if it was never started."""
        if self._child is None:
            raise ServerStartError(f"{self.argv[0]} is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the child was started and has not exited."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> Self:
        """Start the child. A subclass for one kind of server also waits until it answers."""
        if self.running:
            raise ServerStartError(f"{self.argv[0]} is running already")
        self._dismiss_watchdog()
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
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _CLEANUP_WATCHDOG, "sh", str(self._child.pid), self.argv[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def wait_ready(self, check: Callable[[], bool], seconds: float = 20.0) -> Self:
        """Wait until `check` returns True; an OSError from it means "not yet".

        If the child exits, or after `seconds`, it is stopped and ServerStartError is raised with the log's tail.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._child is not None and self._child.poll() is not None:
                code = self._child.returncode
                self.stop()
                raise ServerStartError(f"{self.argv[0]} exited with {code}:\n{self.log_tail()}")
            with contextlib.suppress(OSError):
                if check():
                    return self
            time.sleep(POLL_SECONDS)
        self.stop()
        raise ServerStartError(f"{self.argv[0]} did not answer within {seconds:g} s:\n{self.log_tail()}")

    def kill(self) -> None:
        """Send SIGKILL and wait until the child has ended. Does nothing if it has ended already."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        self._dismiss_watchdog()

    def stop(self, seconds: float = 5.0) -> None:
        """Send SIGTERM, and SIGKILL after `seconds`. Does nothing if the child has ended already."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)
        self.kill()

    def restart(self) -> Self:
        """Stop the child and start it again, with the same port and data."""
        self.stop()
        return self.start()

    def log_tail(self, size: int = LOG_TAIL_BYTES) -> str:
        """Read the last `size` bytes of the log, as text."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - size))
            return log.read().decode("utf-8", "replace")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _dismiss_watchdog(self) -> None:
        """End the watchdog; the child has ended."""
        if self._watchdog is not None:
            with contextlib.suppress(BrokenPipeError):
                self._watchdog.communicate(b"done\n")
            self._watchdog = None
