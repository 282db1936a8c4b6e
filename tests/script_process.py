"""The scripts as an operator starts them: called in the test's process, or forked from one with all modules imported.

Starting a Python with openai and qdrant-client costs more than most tests do. A forked script is a separate process:
it can be killed, signalled and stopped, and shares nothing with the test. What a start itself costs, and what an
import does, is tested with a new Python process (tests/guide, tests/unit).
"""

from __future__ import annotations

import atexit
import functools
import importlib
import io
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CALLING = threading.Lock()


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def is_for_python(environ: Mapping[str, str]) -> bool:
    """Whether the environment holds settings that Python reads at its start (PYTHONPATH)."""
    return any(name.startswith("PYTHON") for name in environ)


def do_not_wait() -> None:
    """Waits that are for real servers and scarce memory are switched off in this process, if Qdrant is the stand-in."""
    import redis.utils

    from lib.clients.embeddings import pricing
    from lib.clients.qdrant import collection
    from lib.reembed import plan as memories

    memories.forget_tokenizer = lambda: None  # 45 MB, and half a second to load them again
    pricing.count_tokens(["the tables are loaded"])
    # Each client looks up its package's version in the file system, which takes longer than to connect.
    redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)
    if not {"QDRANT_TEST_URL", "QDRANT_TEST_SERVER"} & os.environ.keys():
        collection.POLL_SECONDS = 0.02


# --- in the test's process ---------------------------------------------------------------------------------------


def call_script(script: str, words: tuple[str, ...], folder: Path, environ: Mapping[str, str]) -> Result | None:
    """`main()` of a script, with separate streams, arguments, environment and working directory.

    Returns None if that is impossible: in another thread than the main one (signals), or inside another call.
    """
    if threading.current_thread() is not threading.main_thread() or not _CALLING.acquire(blocking=False):
        return None
    try:
        module = importlib.import_module(f"scripts.{script}")
        out, err = _stream(), _stream()
        with _surroundings(folder, environ, [str(ROOT / "scripts" / f"{script}.py"), *words], out, err):
            try:
                code = module.main(list(words))
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
        return Result(code, _text(out), _text(err))
    finally:
        _CALLING.release()


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]


@contextmanager
def _surroundings(
    folder: Path, environ: Mapping[str, str], argv: list[str], out: io.TextIOWrapper, err: io.TextIOWrapper
) -> Iterator[None]:
    """Give the script separate process state; restore it afterwards and check that no thread of the script is left."""
    before = (dict(os.environ), Path.cwd(), sys.argv, sys.stdin, sys.stdout, sys.stderr)
    handlers, root = {number: signal.getsignal(number) for number in SIGNALS}, logging.getLogger()
    logged, root.handlers = root.handlers, []  # a log line goes to stderr, as in a script
    threads = set(threading.enumerate())
    with ExitStack() as stack:
        stack.callback(functools.partial(setattr, root, "handlers", logged))
        stack.callback(_restore, before, handlers)
        sys.stdin = stack.enter_context(Path(os.devnull).open())
        sys.argv, sys.stdout, sys.stderr = argv, out, err
        _set_environ(environ)
        os.chdir(folder)
        yield
    for one in set(threading.enumerate()) - threads:
        if not one.daemon:
            one.join(60)
            assert not one.is_alive(), f"the script left a thread: {one.name}"


def _set_environ(environ: Mapping[str, str]) -> None:
    for name in os.environ.keys() - environ.keys():
        os.unsetenv(name)
    for name, value in environ.items():
        os.putenv(name, value)
    os.environ = _like_environ(environ)  # noqa: B003 - a thread of the test's may be reading the one before
    tempfile.tempdir = None  # it is asked for again
    if "fsspec" in sys.modules:  # it reads the environment once, and keeps its connections
        from fsspec import AbstractFileSystem
        from fsspec.config import conf, set_conf_env

        conf.clear()
        set_conf_env(conf, os.environ)
        for kind in _kinds(AbstractFileSystem):
            kind.clear_instance_cache()


def _like_environ(environ: Mapping[str, str]) -> Any:
    before = os.environ
    data = {before.encodekey(name): before.encodevalue(value) for name, value in environ.items()}
    return type(before)(data, before.encodekey, before.decodekey, before.encodevalue, before.decodevalue)


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _kinds(one)


def _restore(before: tuple[Any, ...], handlers: dict[signal.Signals, Any]) -> None:
    environ, folder, sys.argv, sys.stdin, sys.stdout, sys.stderr = before
    _set_environ(environ)
    os.chdir(folder)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- as a process ------------------------------------------------------------------------------------------------


class ScriptProcess:
    """A forked script, used as a `subprocess.Popen[str]` is."""

    def __init__(self, pid: int, stdout: IO[str], stderr: IO[str], ended: int) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._ended = ended

    def poll(self) -> int | None:
        return self._look(0)

    def _look(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], seconds)[0]:
            line = os.read(self._ended, 32)
            os.close(self._ended)
            assert line, "the process that forks the scripts is gone"
            self.returncode = int(line)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("the script", timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """The rest of its output, once it has ended."""
        said: dict[str, str] = {}
        readers = [
            threading.Thread(target=lambda name=name, one=one: said.__setitem__(name, one.read()), daemon=True)
            for name, one in (("out", self.stdout), ("err", self.stderr))
        ]
        deadline = None if timeout is None else time.monotonic() + timeout
        for one in readers:
            one.start()
        for one in readers:
            one.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if one.is_alive():
                raise subprocess.TimeoutExpired("the script", timeout or 0)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self.stdout.close()
        self.stderr.close()
        return said["out"], said["err"]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start_script(
    script: str, words: tuple[str, ...], folder: Path, environ: Mapping[str, str], prelude: str = ""
) -> ScriptProcess:
    """Fork a process that runs the script; `prelude` is code that it executes before."""
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    ended, ended_end = os.pipe()
    order = {
        "script": str(ROOT / "scripts" / f"{script}.py"),
        "words": [str(one) for one in words],
        "folder": str(folder),
        "environ": dict(environ),
        "prelude": prelude,
    }
    line = _forker()
    body = json.dumps(order).encode()
    socket.send_fds(line, [len(body).to_bytes(4, "big")], [out_end, err_end, ended_end])
    line.sendall(body)
    pid = int.from_bytes(_exactly(line, 4), "big")
    for one in (out_end, err_end, ended_end):
        os.close(one)
    return ScriptProcess(pid, os.fdopen(out, encoding="utf-8"), os.fdopen(err, encoding="utf-8"), ended)


@functools.cache
def _forker() -> socket.socket:
    """The forking process, one for each test process; it ends with that process."""
    ours, its = socket.socketpair()
    words = [sys.executable, "-m", "tests.script_process", str(its.fileno())]
    process = subprocess.Popen(words, cwd=ROOT, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    its.close()

    def end() -> None:
        ours.close()
        process.wait(60)

    atexit.register(end)
    return ours


def _exactly(line: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = line.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


# --- the process that forks --------------------------------------------------------------------------------------


def serve(line: socket.socket) -> None:
    """Fork a script for each order, report its pid and exit code; end when the tests have ended."""
    _import_all()
    woken, wake = os.pipe()
    for one in (woken, wake):
        os.set_blocking(one, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the signal is for the tests; this process ends when they end
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([line, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(running)
        if line in ready:
            try:
                size, pipes, _, _ = socket.recv_fds(line, 4, 3)
                order = json.loads(_exactly(line, int.from_bytes(size, "big"))) if size else None
            except (EOFError, ConnectionError):
                order = None
            if order is None:
                return
            pid = os.fork()
            if pid == 0:
                line.close()
                signal.set_wakeup_fd(-1)
                for one in (woken, wake, pipes[2], *running.values()):
                    os.close(one)
                _become(order, *pipes[:2])
            running[pid] = pipes[2]
            for one in pipes[:2]:
                os.close(one)
            line.sendall(pid.to_bytes(4, "big"))


def _reap(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        ended = running.pop(pid)
        os.write(ended, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(ended)


def _import_all() -> None:
    """Import all modules that the scripts import at any time, except those that start a thread."""
    for path in sorted((ROOT / "lib").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if "sandbox" not in name and not name.endswith("__init__"):
            importlib.import_module(name)
    for name in (
        "openai",
        "qdrant_client",
        "falkordb.graph",
        "rich.progress",
        "tiktoken",
        "portalocker",
        "sqlite3",
    ):
        importlib.import_module(name)
    do_not_wait()
    assert threading.active_count() == 1, threading.enumerate()


def _become(order: dict[str, Any], out: int, err: int) -> None:
    """The child: be the script, and end as a Python does."""
    import runpy

    code = 1
    try:
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, number in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the process's own
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
        os.chdir(order["folder"])
        _set_environ(order["environ"])
        sys.argv = [order["script"], *order["words"]]
        exec(order["prelude"], {"__name__": "prelude"})
        runpy.run_path(order["script"], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does it
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
