"""The embeddings endpoints of OpenAI, Voyage and Ollama: their faults for tests, the application, and its process."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from tests.sandbox import openai_requests as checks
from tests.sandbox.openai_requests import ApiError, EmbeddingRequest, LimitReached, Limits, estimated_tokens
from tests.sandbox.process import PROJECT_ROOT, ServerProcess, free_port
from tests.sandbox.provider_requests import DIALECTS, OLLAMA_LENGTH, Dialect
from tests.sandbox.vectors import FloatArray, vectors_for

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

HOST = "127.0.0.1"


@dataclass
class Fault:
    """One fault.

    It applies to `times` requests (None: all) after the first `after`. If given, only to requests with
    `poisoned_text` in one of their inputs, or with more than `more_than` inputs. `poisoned_text` without another
    effect answers 400.

    Before the answer: `status` with the error body's `code`, `error_type` and `message` (and `retry_after`
    seconds); nothing is charged. `hang_seconds` delays the answer, at most until the faults are cleared; the answer
    is charged.

    On the answer: `cut` ends the connection after that share of the body (0..1). `wrong_count` leaves out the last
    vector. `omit_zero` leaves out an index that is 0. `wrong_order` reverses the list but keeps the indices.
    `wrong_indices` numbers from 1. `wrong_width` answers that many dimensions. `nan` puts one into the vectors (of
    the poisoned inputs, or the first). `not_unit` scales the vectors. `other_model` answers those of other weights under the same
    name. `no_base64` answers lists even if base64 was requested. `no_headers` omits the limits.
    """

    status: int | None = None
    code: str | None = None
    error_type: str | None = None
    message: str | None = None
    retry_after: float | None = None
    times: int | None = None
    after: int = 0
    poisoned_text: str | None = None
    more_than: int | None = None
    hang_seconds: float = 0.0
    cut: float | None = None
    wrong_count: bool = False
    omit_zero: bool = False
    wrong_order: bool = False
    wrong_indices: bool = False
    wrong_width: int | None = None
    nan: bool = False
    not_unit: float | None = None
    other_model: bool = False
    no_base64: bool = False
    no_headers: bool = False

    def __post_init__(self) -> None:
        rows = (self.wrong_count, self.omit_zero, self.wrong_order, self.wrong_indices, self.no_base64)
        vectors = (self.wrong_width, self.nan, self.not_unit, self.other_model)
        if self.poisoned_text and self.status is None and not any((*rows, *vectors, self.cut)):
            self.status = 400

    def applies(self, texts: Sequence[str]) -> bool:
        """Whether the fault applies to this request. Counts the request."""
        if self.poisoned_text and not any(self.poisoned_text in text for text in texts):
            return False
        if self.more_than is not None and len(texts) <= self.more_than:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
            return self.times >= 0
        return True

    def error(self) -> ApiError | None:
        """Build the error to answer with, if the fault has a status."""
        if self.status is None:
            return None
        message = self.message or f"The sandbox was asked to answer {self.status}."
        error = ApiError(self.status, message, self.error_type or "sandbox_fault", code=self.code)
        if self.retry_after is not None:
            error.headers["retry-after"] = f"{self.retry_after:g}"
        return error

    def change_vectors(self, vectors: FloatArray, texts: Sequence[str]) -> FloatArray:
        """Apply the fault to the (n, size) float32 vectors."""
        if self.wrong_width is not None:
            vectors = np.resize(vectors, (len(vectors), self.wrong_width))
        if self.other_model:
            vectors = vectors[:, ::-1]
        if self.not_unit is not None:
            vectors = vectors * np.float32(self.not_unit)
        if self.nan:
            hit = [at for at, text in enumerate(texts) if (self.poisoned_text or "") in text]
            vectors = vectors.copy()
            vectors[hit if self.poisoned_text else hit[:1], 0] = np.nan
        return vectors

    def change_rows(self, rows: list[dict[str, object]]) -> None:
        """Apply the fault to the rows of the answer, in place."""
        if self.wrong_indices:
            for at, row in enumerate(rows):
                row["index"] = at + 1
        if self.omit_zero:
            del rows[0]["index"]
        if self.wrong_count:
            rows.pop()
        if self.wrong_order:
            rows.reverse()


class CutResponse(Response):
    """Announces the whole body of an answer but sends only a share of it. The server then ends the connection."""

    def __init__(self, answer: Response, share: float) -> None:
        super().__init__(answer.body, answer.status_code)
        self.raw_headers = answer.raw_headers
        self._share = share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers and a share of the body, then return as if the body were complete."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        part = self.body[: int(len(self.body) * self._share)]
        await send({"type": "http.response.body", "body": part, "more_body": True})


class Counts:
    """What was requested, refused and charged since the last reset."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.statuses: Counter[int] = Counter()
        self.in_flight = self.peak_in_flight = self.largest_batch = 0
        self.models: Counter[str] = Counter()
        self._paid: Counter[bytes] = Counter()

    def charge(self, wanted: EmbeddingRequest, tokens: int) -> None:
        """Count a request as paid, whether or not its answer arrives."""
        self.tokens += tokens
        self.models[wanted.model] += len(wanted.texts)
        self.largest_batch = max(self.largest_batch, len(wanted.texts))
        for text in wanted.texts:
            paid = f"{wanted.model}\0{wanted.size}\0{text}".encode("utf-8", "surrogatepass")
            self._paid[hashlib.blake2b(paid, digest_size=8).digest()] += 1

    def report(self) -> dict[str, object]:
        """Report the counts. `paid_twice` of the charged `texts` were charged before for the same model and size.

        `models` are the charged texts by model.
        """
        texts = sum(self._paid.values())
        return {
            "requests": self.requests,
            "texts": texts,
            "distinct_texts": len(self._paid),
            "paid_twice": texts - len(self._paid),
            "tokens": self.tokens,
            "models": dict(self.models),
            "statuses": {str(status): times for status, times in self.statuses.items()},
            "peak_in_flight": self.peak_in_flight,
            "largest_batch": self.largest_batch,
        }


class EmbeddingsApp:
    """The endpoint's state and its routes."""

    def __init__(self, limits: Limits, latency_seconds: float) -> None:
        self._limits = limits
        self._latency = latency_seconds
        self._counts = Counts()
        self._faults: list[Fault] = []
        self._cleared = asyncio.Event()  # of the current faults; later ones have another event

    def asgi(self) -> Starlette:
        """Build the application."""
        return Starlette(
            routes=[
                *(Route(path, partial(self.embeddings, one), methods=["POST"]) for path, one in DIALECTS.items()),
                Route("/_sandbox/stats", self.stats),
                Route("/_sandbox/reset", self.reset, methods=["POST"]),
                Route("/_sandbox/faults", self.add_faults, methods=["POST"]),
                Route("/_sandbox/faults", self.clear_faults, methods=["DELETE"]),
            ]
        )

    async def embeddings(self, dialect: Dialect, request: Request) -> Response:
        """POST to the endpoint of one provider."""
        counts = self._counts
        counts.requests += 1
        counts.in_flight += 1
        counts.peak_in_flight = max(counts.peak_in_flight, counts.in_flight)
        try:
            answer = await self._answer(dialect, request)
        except ApiError as error:
            answer = _json(dialect.error_body(error), error.status, error.headers)
        finally:
            counts.in_flight -= 1
        counts.statuses[answer.status_code] += 1
        answer.headers["x-request-id"] = f"req_{uuid.uuid4().hex}"
        return answer

    async def _answer(self, dialect: Dialect, request: Request) -> Response:
        dialect.check_key(request.headers.get("authorization", ""))
        body = _parsed(await request.body())
        given = body.get("input", body.get("prompt", "")) if isinstance(body, dict) else ""
        texts = [text for text in (given if isinstance(given, list) else [given]) if isinstance(text, str)]
        faults, cleared = [fault for fault in self._faults if fault.applies(texts)], self._cleared
        refusal = self._limits.take(estimated_tokens(texts))
        silent = not dialect.announced or any(fault.no_headers for fault in faults)
        headers = {} if silent else self._limits.headers()
        try:
            for fault in faults:
                if error := fault.error():
                    raise error
            wanted = dialect.checked(body)
            if refusal is not None and dialect.paced:
                raise _rate_limit_error(refusal, wanted.model, announced=dialect.announced)
            wanted, tokens = dialect.fitted(wanted, checks.token_counts(texts))
        except ApiError as error:
            await _hang(faults, cleared)
            error.headers = {**headers, **error.headers}
            raise
        self._counts.charge(wanted, tokens)
        await asyncio.sleep(self._latency)
        await _hang(faults, cleared)
        return _success(wanted, tokens, faults, headers, native=dialect.native)

    async def stats(self, _: Request) -> Response:
        """GET /_sandbox/stats: see Counts.report."""
        return _json(self._counts.report())

    async def reset(self, _: Request) -> Response:
        """POST /_sandbox/reset: set the counts to 0."""
        self._counts = Counts()
        return _json({"ok": True})

    async def add_faults(self, request: Request) -> Response:
        """POST /_sandbox/faults: the settings of one Fault."""
        settings = orjson.loads(await request.body())
        unknown = settings.keys() - Fault.__dataclass_fields__.keys()
        if unknown:
            return _json({"error": f"unknown fault settings: {', '.join(sorted(unknown))}"}, 400)
        self._faults.append(Fault(**settings))
        return _json({"ok": True})

    async def clear_faults(self, _: Request) -> Response:
        """DELETE /_sandbox/faults."""
        self._faults.clear()
        self._cleared.set()
        self._cleared = asyncio.Event()
        return _json({"ok": True})


async def _hang(faults: list[Fault], cleared: asyncio.Event) -> None:
    """Wait for the seconds of the faults, or until they are cleared."""
    seconds = sum(fault.hang_seconds for fault in faults)
    if seconds:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(cleared.wait(), seconds)


def _rate_limit_error(refusal: LimitReached, model: str, *, announced: bool) -> ApiError:
    error = checks.rate_limit_error(refusal, model)
    if not announced:
        error.headers = {}
    return error


def _success(
    wanted: EmbeddingRequest, tokens: int, faults: list[Fault], headers: dict[str, str], *, native: bool
) -> Response:
    vectors = vectors_for(wanted.model, wanted.texts, wanted.size)
    for fault in faults:
        vectors = fault.change_vectors(vectors, wanted.texts)
    if native:
        return _json({"embedding": (vectors[0] * OLLAMA_LENGTH).tolist()})
    in_base64 = wanted.base64 and not any(fault.no_base64 for fault in faults)
    rows: list[dict[str, object]] = [
        {"object": "embedding", "index": at, "embedding": _encoded(vector, in_base64=in_base64)}
        for at, vector in enumerate(vectors)
    ]
    for fault in faults:
        fault.change_rows(rows)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": rows, "model": wanted.model, "usage": usage}
    answer = _json(body, headers=headers)
    cuts = [fault.cut for fault in faults if fault.cut is not None]
    return CutResponse(answer, min(cuts)) if cuts else answer


def _encoded(vector: FloatArray, *, in_base64: bool) -> object:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if in_base64 else vector.tolist()


def _parsed(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # orjson writes a NaN as null, as servers written in Go or JavaScript do.
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


class OpenAIServer(ServerProcess):
    """The endpoints as a child process: `base_url` of a gateway, `openai_url` of OpenAI, `voyage_url`, and `ollama_url` without its /v1.

    Args:
        port: a free one if None.
        latency_seconds: added to every successful answer.
        tokens_per_minute, requests_per_minute: refilling limits, announced in the headers; None: no limit, no header.
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
        root = f"http://{HOST}:{self.port}"
        self.base_url = f"{root}/v1"  # for OPENAI_BASE_URL
        # AutoMem sends `dimensions` only if OPENAI_BASE_URL contains this.
        self.openai_url = f"{root}/api.openai.com/v1"
        self.voyage_url, self.ollama_url = f"{root}/voyage/v1", f"{root}/ollama"
        argv = [sys.executable, "-m", "tests.sandbox.openai_server", "--port", str(self.port)]
        argv += ["--latency", str(latency_seconds)]
        argv += ["--tokens-per-minute", str(tokens_per_minute or 0)]
        argv += ["--requests-per-minute", str(requests_per_minute or 0)]
        # One thread of linear algebra: the server shares its cores with the program under test.
        super().__init__(argv, log, {"OPENBLAS_NUM_THREADS": "1"}, PROJECT_ROOT)

    def start(self) -> OpenAIServer:
        """Start it and wait until it answers. Raises ServerStartError."""
        return super().start().wait_ready(lambda: bool(self.stats()))

    def stats(self) -> dict[str, Any]:
        """Read the counts since the last reset: see Counts.report."""
        return dict(self._call("GET", "stats"))

    def reset(self) -> None:
        """Set the counts to 0."""
        self._call("POST", "reset")

    def fault(self, **settings: object) -> None:
        """Add a Fault with these settings. Raises ValueError for an unknown one."""
        self._call("POST", "faults", settings)

    def clear_faults(self) -> None:
        """Remove every fault."""
        self._call("DELETE", "faults")

    def _call(self, method: str, name: str, body: object = None) -> Any:
        import requests  # not in the server's process: it starts faster without

        answer = requests.request(method, f"http://{HOST}:{self.port}/_sandbox/{name}", json=body, timeout=10)
        if not answer.ok:
            raise ValueError(answer.text)
        return answer.json()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    import uvicorn

    parser = argparse.ArgumentParser(description="OpenAI-compatible embeddings for tests and quickstart")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to every successful answer")
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
