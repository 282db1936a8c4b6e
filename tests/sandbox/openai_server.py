"""An OpenAI-compatible embeddings endpoint: its application, and its process."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from tests.sandbox import openai_rules as checks
from tests.sandbox.openai_rules import ApiError, FloatArray, Limits, Rule, Wanted, estimated_tokens, rule_from
from tests.sandbox.process import ServerProcess, free_port
from tests.sandbox.vectors import vectors_for

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send


class CutResponse(Response):
    """Announces the whole body, sends a share of it and leaves: the server then ends the connection."""

    share = 0.5

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers and a share of the body, then return as if all were said."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        part = self.body[: int(len(self.body) * self.share)]
        await send({"type": "http.response.body", "body": part, "more_body": True})


class Ledger:
    """What was asked, refused and charged since the last reset."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.statuses: Counter[int] = Counter()
        self.in_flight = self.peak_in_flight = self.largest_batch = 0
        self._paid: Counter[bytes] = Counter()

    def charge(self, wanted: Wanted, tokens: int) -> None:
        """Count a request as bought, whether or not its answer arrives."""
        self.tokens += tokens
        self.largest_batch = max(self.largest_batch, len(wanted.texts))
        for text in wanted.texts:
            bought = f"{wanted.model}\0{wanted.size}\0{text}".encode("utf-8", "surrogatepass")
            self._paid[hashlib.blake2b(bought, digest_size=8).digest()] += 1

    def report(self) -> dict[str, object]:
        """`texts` were charged; `paid_twice` of them had been charged before, same model and size."""
        texts = sum(self._paid.values())
        return {
            "requests": self.requests,
            "texts": texts,
            "distinct_texts": len(self._paid),
            "paid_twice": texts - len(self._paid),
            "tokens": self.tokens,
            "statuses": {str(status): times for status, times in self.statuses.items()},
            "peak_in_flight": self.peak_in_flight,
            "largest_batch": self.largest_batch,
        }


class EmbeddingsApp:
    """State of one sandbox endpoint and its routes."""

    def __init__(self, limits: Limits, latency_seconds: float) -> None:
        self._limits = limits
        self._latency = latency_seconds
        self._ledger = Ledger()
        self._rules: list[Rule] = []
        self._dropped = asyncio.Event()  # of the rules that there are; the next ones get another

    def asgi(self) -> Starlette:
        """The application to serve."""
        return Starlette(
            routes=[
                Route("/v1/embeddings", self.embeddings, methods=["POST"]),
                Route("/_sandbox/stats", self.stats),
                Route("/_sandbox/reset", self.reset, methods=["POST"]),
                Route("/_sandbox/faults", self.add_faults, methods=["POST"]),
                Route("/_sandbox/faults", self.clear_faults, methods=["DELETE"]),
            ]
        )

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        ledger = self._ledger
        ledger.requests += 1
        ledger.in_flight += 1
        ledger.peak_in_flight = max(ledger.peak_in_flight, ledger.in_flight)
        try:
            answer = await self._answer(request)
        except ApiError as error:
            answer = _json(error.body, error.status, error.headers)
        finally:
            ledger.in_flight -= 1
        ledger.statuses[answer.status_code] += 1
        answer.headers["x-request-id"] = f"req_{uuid.uuid4().hex}"
        return answer

    async def _answer(self, request: Request) -> Response:
        checks.check_key(request.headers.get("authorization", ""))
        body = _parsed(await request.body())
        given = body.get("input", "") if isinstance(body, dict) else ""
        texts = [text for text in (given if isinstance(given, list) else [given]) if isinstance(text, str)]
        rules, dropped = [rule for rule in self._rules if rule.fires(texts)], self._dropped
        refusal = self._limits.take(estimated_tokens(texts))
        headers = {} if any(rule.no_headers for rule in rules) else self._limits.headers()
        try:
            _raise_ordered(rules)
            wanted = checks.checked_request(body)
            if refusal is not None:
                raise checks.rate_limit_error(refusal, wanted.model)
            counts = checks.token_counts(texts)
            checks.check_tokens(counts)
        except ApiError as error:
            await _hang(rules, dropped)
            error.headers = {**headers, **error.headers}
            raise
        self._ledger.charge(wanted, sum(counts))
        await asyncio.sleep(self._latency)
        await _hang(rules, dropped)
        return _success(wanted, sum(counts), rules, headers)

    async def stats(self, _: Request) -> Response:
        """GET /_sandbox/stats: see Ledger.report."""
        return _json(self._ledger.report())

    async def reset(self, _: Request) -> Response:
        """POST /_sandbox/reset: forget the counts."""
        self._ledger = Ledger()
        return _json({"ok": True})

    async def add_faults(self, request: Request) -> Response:
        """POST /_sandbox/faults: one Rule as JSON, or a list of them."""
        wanted = orjson.loads(await request.body())
        try:
            self._rules += [rule_from(each) for each in (wanted if isinstance(wanted, list) else [wanted])]
        except (TypeError, ValueError) as error:
            return _json({"error": str(error)}, 400)
        return _json({"ok": True, "rules": len(self._rules)})

    async def clear_faults(self, _: Request) -> Response:
        """DELETE /_sandbox/faults."""
        self._rules.clear()
        self._dropped.set()
        self._dropped = asyncio.Event()
        return _json({"ok": True})


async def _hang(rules: list[Rule], dropped: asyncio.Event) -> None:
    """As long as the rules say, or until they are dropped."""
    seconds = sum(rule.hang_seconds for rule in rules)
    if seconds:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(dropped.wait(), seconds)


def _raise_ordered(rules: list[Rule]) -> None:
    for rule in rules:
        if rule.status is not None:
            message = rule.message or f"The sandbox was told to answer {rule.status}."
            error = ApiError(rule.status, message, rule.error_type or "sandbox_fault", code=rule.code)
            if rule.retry_after is not None:
                error.headers["retry-after"] = f"{rule.retry_after:g}"
            raise error


def _success(wanted: Wanted, tokens: int, rules: list[Rule], headers: dict[str, str]) -> Response:
    vectors = vectors_for(wanted.model, wanted.texts, wanted.size)
    for rule in rules:
        vectors = rule.bend(vectors, wanted.texts)
    in_base64 = wanted.base64 and not any(rule.no_base64 for rule in rules)
    first = 1 if any(rule.wrong_indices for rule in rules) else 0
    data = [
        {"object": "embedding", "index": first + at, "embedding": _encoded(vector, in_base64=in_base64)}
        for at, vector in enumerate(vectors)
    ]
    if any(rule.omit_zero for rule in rules):
        del data[0]["index"]
    if any(rule.wrong_count for rule in rules):
        data.pop()
    if any(rule.wrong_order for rule in rules):
        data.reverse()
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": wanted.model, "usage": usage}
    cuts = [rule.cut for rule in rules if rule.cut is not None]
    answer = _json(body, headers=headers, kind=CutResponse if cuts else Response)
    if isinstance(answer, CutResponse):
        answer.share = min(cuts)
    return answer


def _encoded(vector: FloatArray, *, in_base64: bool) -> object:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if in_base64 else vector.tolist()


def _parsed(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _json(
    body: object, status: int = 200, headers: dict[str, str] | None = None, kind: type[Response] = Response
) -> Response:
    # A NaN becomes null with orjson, as with servers written in Go or JavaScript.
    content = orjson.dumps(body)
    return kind(content, status, headers, media_type="application/json")


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
        argv: list[str] = [sys.executable, "-m", "tests.sandbox.openai_server", "--port", str(self.port)]
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
        """Order a fault; see tests/sandbox/openai_faults.Rule for the settings."""
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

    from tests.sandbox.openai_rules import Limits

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
