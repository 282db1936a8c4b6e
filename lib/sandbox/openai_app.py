"""The sandbox's `/v1/embeddings` as an ASGI application, with its switches under `/_sandbox/`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import uuid
from collections import Counter
from typing import TYPE_CHECKING

import orjson
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from lib.sandbox import openai_checks as checks
from lib.sandbox.openai_checks import ApiError, Wanted
from lib.sandbox.openai_faults import FloatArray, Rule, rule_from
from lib.sandbox.openai_limits import Limits, estimated_tokens
from lib.sandbox.vectors import vectors_for

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send


class CutResponse(Response):
    """Announces the whole body, sends a share of it and leaves: the server then ends the connection."""

    share = 0.5

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
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
