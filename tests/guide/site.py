"""A deployment as the guide's reader has it: AutoMem's folder, this checkout next to it, a shell, the four servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from dotenv import dotenv_values

from lib.clients.qdrant.transport import Qdrant
from tests.guide.documents import ROOT, Block
from tests.sandbox.stack import COLLECTION, GRAPH, KEY, TOKEN, Stack
from tests.sandbox.state import State, state_of

MEMORIES = 100
SMALL, LARGE = ("768", "text-embedding-3-small"), ("3072", "text-embedding-3-large")
PROVIDER = ("EMBEDDING_PROVIDER", "VOYAGE_API_KEY")
STAMP = "YYYYMMDD_HHMMSS"

# Enough of jq for the documents: -r and a path of keys and indexes.
_JQ = """\
import json, re, sys
raw = sys.argv[1] == "-r"
value = json.load(sys.stdin)
for key, index in re.findall(r"\\.(\\w+)|\\[(\\d+)\\]", sys.argv[-1]):
    value = value[key] if key else value[int(index)]
print(value if raw and isinstance(value, str) else json.dumps(value, indent=2))
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass
class Site:
    """`shell` runs one block; what it exports, the next one sees, as in a terminal."""

    folder: Path
    stack: Stack
    environ: dict[str, str] = field(default_factory=dict)
    stamp: str = ""

    @property
    def checkout(self) -> Path:
        return self.folder / "automem-migration"

    @property
    def backups(self) -> Path:
        return self.checkout / "backups"

    @property
    def automem_env(self) -> Path:
        return self.folder / "automem" / ".env"

    def set_up(self, size: str, model: str) -> None:
        """Both folders, the stores filled at 768d, the service up; the last line of AutoMem's .env has no newline."""
        for name in ("lib", "scripts"):
            shutil.copytree(ROOT / name, self.checkout / name)
        self._shorten_polls()
        self._put_commands(self.folder / "bin")
        self.stack.load(MEMORIES, int(SMALL[0]), SMALL[1])
        self.stack.start_automem(int(SMALL[0]), SMALL[1])
        settings = self.stack.settings(int(size), model)
        self.automem_env.parent.mkdir()
        lines = [f"{name}={value}" for name, value in settings.items()]
        self.automem_env.write_text("\n".join(lines), encoding="utf-8")
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environ = {
            "PATH": path,
            "HOME": str(self.folder),
            "AUTOMEM_API_TOKEN": TOKEN,
            "OPENAI_API_KEY": KEY,
        }

    def _shorten_polls(self) -> None:
        """As tests/script_process.py does: the stand-in builds no index, and its status is asked for three times."""
        path = self.checkout / "lib" / "clients" / "qdrant" / "collection.py"
        text, line = path.read_text(encoding="utf-8"), "\nPOLL_SECONDS = 0.25\n"
        assert line in text
        path.write_text(text.replace(line, "\nPOLL_SECONDS = 0.02\n"), encoding="utf-8")

    def _put_commands(self, folder: Path) -> None:
        folder.mkdir()
        self._put(folder / "python", f'exec "{sys.executable}" "$@"')
        if shutil.which("jq") is None:
            (folder / "jq.py").write_text(_JQ, encoding="utf-8")
            self._put(folder / "jq", f'exec "{sys.executable}" "{folder / "jq.py"}" "$@"')

    @staticmethod
    def _put(path: Path, line: str) -> None:
        path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        path.chmod(0o755)

    def shell(self, block: Block) -> Ran:
        """Type a block into the shell; it stops at the first command that fails."""
        after = self.folder / "environment"
        text = f'set -eo pipefail\n{self.here(block.text)}\nenv -0 > "{after}"\n'
        ran = self.run(["bash", "-c", text])
        if ran.code == 0:
            pairs = after.read_bytes().rstrip(b"\0").split(b"\0")
            seen = dict(pair.decode().split("=", 1) for pair in pairs)
            self.environ = {name: value for name, value in seen.items() if name not in {"_", "SHLVL", "PWD", "OLDPWD"}}
        return ran

    def run(self, words: list[str], **more: str) -> Ran:
        done = subprocess.run(
            words,
            cwd=self.checkout,
            env={**self.environ, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def script(self, name: str, *words: str, **more: str) -> Ran:
        return self.run(["python", f"scripts/{name}.py", *words], **more)

    def here(self, text: str) -> str:
        """The text with this site's addresses and folder, and the first backup's time for the placeholder."""
        assert self.stack.automem is None or self.stack.automem.url
        automem = self.stack.automem.url if self.stack.automem else "http://127.0.0.1:1"
        text = text.replace("http://localhost:6333", self.stack.qdrant.url).replace("=pa-...", f"={KEY}")
        text = text.replace("/mnt/copies", str(self.folder / "copies")).replace("/mnt/larger", str(self.folder))
        text = text.replace("/var/lib/node_exporter", str(self.folder))
        return text.replace("http://localhost:8001", automem).replace(STAMP, self.stamp or STAMP)

    def do(self, reason: str) -> None:
        """What a block that is not run would have done to the service."""
        if "the service is stopped" in reason:
            self.stack.stop_automem()
        if "the service is restarted" in reason:
            settings = dotenv_values(self.automem_env)
            size, model = int(str(settings["VECTOR_SIZE"])), str(settings["EMBEDDING_MODEL"])
            self.stack.start_automem(
                size, model, **{name: str(settings[name]) for name in PROVIDER if name in settings}
            )

    def size(self) -> int:
        answer = requests.get(f"{self.stack.qdrant.url}/collections/{COLLECTION}", timeout=30).json()
        return int(answer["result"]["config"]["params"]["vectors"]["size"])

    def state(self) -> State:
        return state_of(self.stack.falkordb.address, GRAPH, Qdrant(self.stack.qdrant.url), COLLECTION)

    def recall(self, query: str) -> list[dict[str, Any]]:
        assert self.stack.automem is not None
        answer = requests.get(
            f"{self.stack.automem.url}/recall",
            params={"query": query, "limit": "3"},
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=30,
        )
        return list(answer.json()["results"])

    def manifests(self) -> list[Path]:
        return sorted(self.backups.glob("backup_*.json"))
