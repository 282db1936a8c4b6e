"""A stand-in for a Qdrant server, over the server's own storage engine (qdrant-edge-py).

It is made for tests and for rehearsing a migration. It is not a server for data that anyone cares about: it plays one
node of version 1.11.3 or 1.18.3 as recordings of real ones show them, keeps all points of a collection in one shard
whatever `shard_number` says, builds no vector index (searches are exact) and knows no JWT.

    python -m tests.sandbox.qdrant_server --version 1.18.3 --data DIR [--host 127.0.0.1] [--port 0]

The API keys come from QDRANT__SERVICE__API_KEY and QDRANT__SERVICE__READ_ONLY_API_KEY, as with the real server, so
that they are not in the list of processes. The address is printed once it listens, and its port written to DIR/port.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

import uvicorn

from tests.sandbox.qdrant_server.app import Keys, build, protocol
from tests.sandbox.qdrant_server.request import StartRefused
from tests.sandbox.qdrant_server.settings import DIALECTS
from tests.sandbox.qdrant_server.storage import Storage

BACKLOG = 256
START_REFUSED = 101  # what the real server exits with when it panics


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes; 0, or 101 where the data directory cannot be started with."""
    options = _parser().parse_args(argv)
    s3 = os.environ.get("QDRANT__STORAGE__SNAPSHOTS_CONFIG__SNAPSHOTS_STORAGE") == "s3"
    storage = Storage(options.data, DIALECTS[options.version], s3=s3)
    try:
        storage.open()
    except StartRefused as refused:
        sys.stderr.write(f"Panic: {refused}\n")
        return START_REFUSED
    keys = Keys(
        os.environ.get("QDRANT__SERVICE__API_KEY") or options.api_key,
        os.environ.get("QDRANT__SERVICE__READ_ONLY_API_KEY") or options.read_only_key,
    )
    try:
        _serve(storage, keys, options.host, options.port)
    finally:
        storage.close()
    return 0


def _serve(storage: Storage, keys: Keys, host: str, port: int) -> None:
    # The protocol is named so that asyncio sets TCP_NODELAY: without it every answer waits 40 ms for an ACK.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        port = listener.getsockname()[1]
        (storage.folder / "port").write_text(f"{port}\n")
        sys.stdout.write(f"http://{host}:{port}\n")
        sys.stdout.flush()
        config = uvicorn.Config(
            build(storage, keys),
            http=protocol(storage.dialect),
            ws="none",
            lifespan="off",
            loop="asyncio",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sandbox.qdrant_server", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--version", choices=sorted(DIALECTS), default="1.18.3", help="the version to play")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on; 0 for any free one")
    parser.add_argument("--data", type=Path, required=True, help="the data directory, made if missing")
    parser.add_argument("--api-key", help="better set in QDRANT__SERVICE__API_KEY")
    parser.add_argument("--read-only-key", help="better set in QDRANT__SERVICE__READ_ONLY_API_KEY")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
