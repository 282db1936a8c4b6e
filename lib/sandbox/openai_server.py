"""An OpenAI-compatible embeddings endpoint for tests and rehearsals: `python -m lib.sandbox.openai_server --port N`.

It keeps to the real endpoint's limits, error bodies and rate-limit headers
(https://platform.openai.com/docs/api-reference/embeddings, https://platform.openai.com/docs/guides/rate-limits);
the vectors are stand-ins (lib/sandbox/vectors.py) and cost nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.sandbox.process import ServerProcess, free_port

HOST = "127.0.0.1"
PROJECT_ROOT = Path(__file__).resolve().parents[2]


class OpenAIServer:
    """Handle on the endpoint as a child process; also a context manager.

    Args:
        port: a free one where None.
        latency_seconds: added to every good answer.
        tokens_per_minute, requests_per_minute: refilling limits, announced in the headers; None: no limit, no header.
        log: the child's output; a temporary file where None.
    """

    def __init__(
        self,
        port: int | None = None,
        latency_seconds: float = 0.0,
        tokens_per_minute: float | None = None,
        requests_per_minute: float | None = None,
        log: Path | None = None,
    ) -> None:
        self.port = port or free_port()
        self._log_dir = None if log else tempfile.TemporaryDirectory(prefix="openai-sandbox-")
        log = log or Path(self._log_dir.name if self._log_dir else "", "server.log")
        argv: list[str] = [sys.executable, "-m", "lib.sandbox.openai_server", "--port", str(self.port)]
        argv += ["--latency", str(latency_seconds)]
        argv += ["--tokens-per-minute", str(tokens_per_minute or 0)]
        argv += ["--requests-per-minute", str(requests_per_minute or 0)]
        # One thread of linear algebra: the server shares its cores with what it is there to test.
        self._process = ServerProcess(argv, log, {"OPENBLAS_NUM_THREADS": "1"}, PROJECT_ROOT)

    @property
    def base_url(self) -> str:
        """For OPENAI_BASE_URL."""
        return f"http://{HOST}:{self.port}/v1"

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def start(self) -> OpenAIServer:
        """Start and wait until it answers; raises ServerStartError."""
        self._process.start().wait_ready(lambda: bool(self.stats()))
        return self

    def stop(self) -> None:
        """End the child and remove its log where it was a temporary one."""
        self._process.stop()
        if self._log_dir:
            self._log_dir.cleanup()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def stats(self) -> dict[str, Any]:
        """requests, texts charged, distinct_texts, paid_twice, tokens, statuses, peak_in_flight, largest_batch."""
        return dict(self._call("GET", "stats"))

    def reset(self) -> None:
        """Forget the counts."""
        self._call("POST", "reset")

    def fault(self, **settings: object) -> None:
        """Order a fault; see lib/sandbox/openai_faults.Rule for the settings."""
        self._call("POST", "faults", settings)

    def clear_faults(self) -> None:
        """Drop every ordered fault."""
        self._call("DELETE", "faults")

    def _call(self, method: str, name: str, body: object = None) -> Any:
        import requests

        answer = requests.request(method, f"http://{HOST}:{self.port}/_sandbox/{name}", json=body, timeout=10)
        if not answer.ok:
            raise ValueError(answer.text)
        return answer.json()

    def __enter__(self) -> OpenAIServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    import uvicorn

    from lib.sandbox.openai_app import EmbeddingsApp
    from lib.sandbox.openai_limits import Limits

    parser = argparse.ArgumentParser(description="OpenAI-compatible embeddings for tests and rehearsals")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to every good answer")
    parser.add_argument("--tokens-per-minute", type=float, default=0, help="0: no limit")
    parser.add_argument("--requests-per-minute", type=float, default=0, help="0: no limit")
    given = parser.parse_args(argv)
    app = EmbeddingsApp(Limits(given.tokens_per_minute, given.requests_per_minute), given.latency)
    uvicorn.run(
        app.asgi(),
        host=HOST,
        port=given.port,
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=0,
        lifespan="off",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
