"""`quickstart.py serve`: the sandbox on the guide's ports, and its control from another terminal.

The process that serves listens on a Unix socket in a folder of this user alone. A request is one line of JSON
(`{"server", "word", "size", "model"}`), the answer a line with `error` (empty if it was done) and `text`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lib.errors import MigrationError, UsageProblem
from lib.files import private_dir
from tests.sandbox.process import ServerStartError
from tests.sandbox.stack import GUIDE_PORTS, KEY, TOKEN, Stack
from tests.sandbox.tour import SMALL

AUTOMEM, PROVIDER = "automem", "provider"
# What `quickstart.py provider WORD` makes the endpoint do: the settings of one Fault.
FAULTS: dict[str, dict[str, object]] = {
    "ok": {},
    "slow": {"hang_seconds": 3.0},
    "429": {"status": 429, "code": "rate_limit_exceeded", "message": "Rate limit reached", "retry_after": 2.0},
    "quota": {"status": 429, "code": "insufficient_quota", "message": "You exceeded your current quota"},
    "key": {"status": 401, "code": "invalid_api_key", "message": "Incorrect API key provided"},
    "500": {"status": 500, "message": "The server had an error"},
}
WORDS = {AUTOMEM: ("stop", "start", "restart"), PROVIDER: tuple(FAULTS)}
_ANSWER_SECONDS = 60.0
_SERVE = "python scripts/quickstart.py serve"


def _socket_path() -> Path:
    return private_dir(Path(tempfile.gettempdir()) / f"automem-sandbox-{os.getuid()}") / "control"


def serve(folder: Path, memories: int, say: Callable[[str], None]) -> None:
    """Run the sandbox on the guide's own ports, and do what other terminals ask for, until KeyboardInterrupt."""
    with Stack(folder, GUIDE_PORTS) as stack, _listening() as listener:
        stack.load(memories, SMALL[1], SMALL[0])
        stack.start_automem(SMALL[1], SMALL[0])
        say(
            f"FalkorDB 6379, Qdrant 6333, AutoMem 8001, {memories:,} memories at 768d. In another terminal, in this folder:\n\n"
            f"{_activate()}"
            f"export OPENAI_BASE_URL={stack.openai.openai_url}\n"
            f"export OPENAI_API_KEY={KEY}\n"
            f"export AUTOMEM_API_TOKEN={TOKEN}\n"
            'echo "VECTOR_SIZE=768" >> .env\n'
            'echo "EMBEDDING_MODEL=text-embedding-3-small" >> .env\n\n'
            "The last two are in .env because the guide changes them there: an export would hide that change.\n"
            "Remove the lines that you added to .env when you are done.\n\n"
            "then follow MIGRATION.md. Where it stops or restarts AutoMem, in that terminal:\n\n"
            "python scripts/quickstart.py automem stop\n"
            "python scripts/quickstart.py automem restart\n\n"
            "It gets VECTOR_SIZE and EMBEDDING_MODEL as they are set there. To make the embeddings endpoint fail:\n\n"
            f"python scripts/quickstart.py provider 429\n\n"
            f"or another of {', '.join(FAULTS)}.\n\n"
            "Ctrl-C here stops the sandbox."
        )
        while True:
            with contextlib.suppress(OSError, ValueError):  # of a client that left or wrote no JSON
                _answer(stack, listener.accept()[0], say)


def _activate() -> str:
    """The line that makes `python` the interpreter of this process, if it is that of a virtual environment."""
    script = Path(sys.prefix) / "bin" / "activate"
    return f"source {shlex.quote(str(script))}\n" if script.exists() else ""


@contextlib.contextmanager
def _listening() -> Iterator[socket.socket]:
    path = _socket_path()
    path.unlink(missing_ok=True)  # of a process that was killed: the ports show that no other one serves
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
            path.parent.rmdir()


def _answer(stack: Stack, client: socket.socket, say: Callable[[str], None]) -> None:
    with client, client.makefile("rw", encoding="utf-8") as stream:
        client.settimeout(_ANSWER_SECONDS)
        wanted = json.loads(stream.readline())
        answer = {"error": "", "text": ""}
        try:
            answer["text"] = _obey(stack, **wanted)
        except ServerStartError as error:
            answer["error"] = str(error)
        say(f"{wanted['server']} {wanted['word']}: {answer['text'] or 'failed'}")
        stream.write(json.dumps(answer) + "\n")


def _obey(stack: Stack, server: str, word: str, size: int, model: str) -> str:
    if server == PROVIDER:
        stack.openai.clear_faults()
        if FAULTS[word]:
            stack.openai.fault(**FAULTS[word])
        return "the embeddings endpoint answers as usual" if word == "ok" else f"every request now gets: {word}"
    if word == "stop":
        stack.stop_automem()
        return "AutoMem is stopped"
    stack.start_automem(size, model)
    return f"AutoMem runs with VECTOR_SIZE={size} and EMBEDDING_MODEL={model}"


def require_word(server: str, word: str | None) -> None:
    """Raise UsageProblem unless `word` is one that `server` takes; `serve` takes none."""
    words = WORDS.get(server, ())
    if word not in words:
        raise UsageProblem(
            f"{server} takes {'one of ' + ', '.join(words) if words else 'no further word'}"
            + (f", not '{word}'" if word else ""),
            next_step="python scripts/quickstart.py --help",
        )


def ask(server: str, word: str | None, size: int, model: str) -> str:
    """Ask the process that serves; returns what it did. Raises MigrationError if it could not, or if none serves."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_ANSWER_SECONDS)
        try:
            client.connect(str(_socket_path()))
        except OSError as error:
            raise MigrationError("no sandbox is served on this machine by this user", next_step=_SERVE) from error
        with client.makefile("rw", encoding="utf-8") as stream:
            stream.write(json.dumps({"server": server, "word": word, "size": size, "model": model}) + "\n")
            stream.flush()
            answer: dict[str, Any] = json.loads(stream.readline() or '{"error": "the sandbox has ended", "text": ""}')
    if answer["error"]:
        raise MigrationError(
            f"{server} {word}: {answer['error']}", next_step="look at what the sandbox printed in its terminal"
        )
    return str(answer["text"])
