"""One Qdrant server over REST: addresses, time-outs, refusals as errors, retries on named conditions only."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, urlsplit

import orjson
import requests

from lib.errors import AccessRefused, MissingData, StoreFailed, StoreUnreachable, UsageProblem, one_line
from lib.network import Unbounded, container_hint, is_this_machine, new_session, read_whole

# What a URL without a port means to qdrant-client, hence to AutoMem
# (https://github.com/qdrant/qdrant-client, qdrant_remote.py).
DEFAULT_PORT = 6333

_EXAMPLE = "export QDRANT_URL=http://localhost:6333"


class Login(NamedTuple):
    """User and password of basic authentication, as a proxy before the server may want them."""

    user: str
    password: str


def split_login(url: str) -> tuple[str, Login | None]:
    """The URL without user and password and with a port, and these two. Raises UsageProblem."""
    parts = urlsplit(url.strip() if "://" in url else f"http://{url.strip()}")
    try:
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        raise UsageProblem("QDRANT_URL has a port that is none", next_step=_EXAMPLE) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageProblem("QDRANT_URL is not an http(s) address", next_step=_EXAMPLE)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    login = Login(parts.username or "", parts.password or "") if parts.username or parts.password else None
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}", login


def check_key(api_key: str) -> None:
    """Raise UsageProblem for a key that no header can carry (the error of requests would show it)."""
    if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise UsageProblem(
            "QDRANT_API_KEY holds characters that no header can carry", next_step="set it anew"
        )


def collection_path(name: str, *parts: str) -> str:
    """The path of a collection, or of something in it; every part is quoted."""
    return "/".join(["/collections", quote(name, safe=""), *(quote(part, safe="") for part in parts)])


def curl_line(qdrant: Qdrant, method: str, *path: str, query: str = "") -> str:
    """The command that sends a request about a collection; the key stays in its variable."""
    key = ' -H "api-key: $QDRANT_API_KEY"' if qdrant.api_key else ""
    return f"curl -s -X {method}{key} {shlex.quote(qdrant.display + collection_path(*path) + query)}"


_SENT_AT_ONCE_BYTES = 256 << 10


@dataclass(frozen=True)
class Parts:
    """A body that is never put together: its parts are sent one after the other, anew where a request is repeated."""

    parts: Sequence[bytes]

    @property
    def len(self) -> int:
        """Bytes in all, as requests asks for them."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[bytes]:
        few: list[bytes] = []
        size = 0
        for part in self.parts:
            few.append(part)
            size += len(part)
            if size >= _SENT_AT_ONCE_BYTES:
                yield b"".join(few)
                few, size = [], 0
        if few:
            yield b"".join(few)


TEXT_LIMIT = 600  # characters of a server's error text that are worth showing

_NOT_CONNECTED = {
    "Connection refused": "connection refused",
    "NameResolutionError": "its name is not known",
    "Name or service not known": "its name is not known",
    "ConnectTimeoutError": "connecting timed out",
    "No route to host": "no route to the host",
    "Network is unreachable": "the network is unreachable",
    "Failed to establish a new connection": "no connection can be made",
    "Tunnel connection failed": "the proxy refuses",
}
_UNRESOLVED = {"NameResolutionError", "Name or service not known"}


_FULL = (
    "No space left",
    "Not enough space available",
    # How a full disk is told over a snapshot and over a restore, and hardly anything else.
    "Error while copy WAL",
    "failed to unpack `",
)


class QdrantError(StoreFailed):
    """The server answered with an error status.

    `status` is the HTTP status, `text` the server's own words, `waitable` whether it said when to come again.
    """

    def __init__(
        self, display: str, status: int, text: str, *, waitable: bool = False, next_step: str = ""
    ) -> None:
        super().__init__(f"Qdrant at {display} answered {status}: {text}", next_step=next_step)
        self.status = status
        self.text = text
        self.waitable = waitable


class NotFound(QdrantError, MissingData):
    """404: the collection, point or snapshot is not there."""


class NoAnswer(StoreUnreachable):
    """The request may have reached the server, but no answer came: it may have been carried out."""


def is_disk_full(error: Exception) -> bool:
    """Whether the server refused because its disk has no room."""
    return isinstance(error, QdrantError) and tells_full(error.text)


def tells_full(text: str) -> bool:
    """Whether the server says here that its disk has no room (its words on 1.11.3 and 1.18.3)."""
    return any(sign in text for sign in _FULL)


def _hint(display: str) -> str:
    host = urlsplit(display).hostname or ""
    return container_hint(host, "QDRANT_URL=http://localhost:6333")


def lost(display: str, error: Exception) -> StoreUnreachable:
    """What a broken connection means: StoreUnreachable where none was made, else NoAnswer."""
    text = str(error)
    if isinstance(error, requests.exceptions.SSLError):
        return StoreUnreachable(
            f"Qdrant at {display}: TLS failed", next_step="check QDRANT_URL (http or https)"
        )
    for sign, meaning in _NOT_CONNECTED.items():
        if sign in text:
            return StoreUnreachable(
                f"Qdrant at {display} is unreachable: {meaning}",
                next_step=(_hint(display) if sign in _UNRESOLVED else "")
                + "start it (docker compose up -d qdrant) or check QDRANT_URL",
            )
    meaning = "timed out" if "timed out" in text else "the connection broke"
    return NoAnswer(
        f"Qdrant at {display} gave no answer: {meaning}", next_step="look at the server's log, then run again"
    )


def refusal(display: str, response: requests.Response, secrets: Iterable[str]) -> AccessRefused | QdrantError:
    """The error that an answer of status 300 and above stands for; `secrets` are cut out of its text."""
    status, text = response.status_code, _error_text(response)
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    if status in {401, 403}:
        return AccessRefused(
            f"Qdrant at {display} refuses access: {status} {text}",
            next_step="export QDRANT_API_KEY=... (a key that may manage the whole server)",
        )
    if status == 404:
        return NotFound(display, status, text)
    step = "free disk space on the Qdrant server" if tells_full(text) else ""
    waitable = "Retry-After" in response.headers
    return QdrantError(display, status, text, waitable=waitable, next_step=step)


def not_qdrant(display: str) -> StoreFailed:
    """Something else answers at this address."""
    return StoreFailed(f"what answers at {display} is not Qdrant", next_step="check QDRANT_URL")


def _error_text(response: requests.Response) -> str:
    try:
        text = str(orjson.loads(response.content)["status"]["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text = response.text.strip()  # the middleware and the download route answer in plain text
    except requests.RequestException:
        text = "(the text of the answer broke off)"
    return one_line(text[:TEXT_LIMIT] or response.reason or "no text")


CONNECT_SECONDS = 10.0
SEND_SECONDS = 30.0  # for one piece of a body: a server that refuses from the headers stops reading it
PAUSES_SECONDS = (0.5, 1.0, 2.0)  # between tries after a lost connection or a gateway's 502, 503, 504
LONGEST_WAIT_SECONDS = 600.0  # of rate limits, for one request
LARGEST_ANSWER = 512 << 20  # a page of points with their vectors is some tens of MiB
LONGEST_ANSWER_SECONDS = 600.0  # from its head to its end

_GATEWAY_TROUBLE = (502, 503, 504)


class Qdrant:
    """A server's address and key. Threads may share it: each keeps connections of its own.

    `url` without a port means 6333, as it does to AutoMem; a user and password in it become basic
    authentication. `sleep` is there for tests. Raises UsageProblem for a URL or key that cannot be one.
    """

    def __init__(
        self,
        url: str,
        api_key: str = "",
        timeout_seconds: float = 60.0,
        *,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        check_key(api_key)
        self.base_url, self._login = split_login(url)
        self.api_key = api_key
        self.timeout_seconds = timeout_seconds
        self.sleep = sleep
        self._local = threading.local()

    @property
    def display(self) -> str:
        """The address without any secret."""
        return self.base_url

    def __repr__(self) -> str:
        return f"Qdrant({self.base_url!r})"

    def version(self) -> str:
        """The server's version, such as "1.11.3". Raises StoreFailed where something else answers."""
        try:
            body = self._decode(self.call("GET", "/"))
        except QdrantError as error:
            raise not_qdrant(self.display) if error.status < 500 else error from error
        if not isinstance(body, dict) or "version" not in body or "qdrant" not in str(body.get("title")):
            raise not_qdrant(self.display)
        return str(body["version"])

    def json(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        params: Mapping[str, str] | None = None,
        timeout: float | None = None,
        retry: bool | None = None,
    ) -> Any:
        """Send JSON and return the answer's `result` (None where it has none).

        `body` is serialised by orjson (numpy arrays too); bytes and Parts are sent as they are. `retry` repeats the
        request after a lost connection and a gateway's 502 to 504 (default: for GET alone); a 429 that says when to
        come again was not carried out and is waited out always.
        Raises StoreUnreachable, NoAnswer, AccessRefused, NotFound, QdrantError, StoreFailed.
        """
        content = body if isinstance(body, bytes | Parts | None) else encode(body)
        headers = {} if content is None else {"Content-Type": "application/json"}
        response = self.call(
            method, path, content, params=params, headers=headers, timeout=timeout, retry=retry
        )
        decoded = self._decode(response)
        return decoded.get("result") if isinstance(decoded, dict) else decoded

    def call(
        self,
        method: str,
        path: str,
        content: bytes | Parts | BinaryIO | None = None,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        retry: bool | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """One request and its answer, of a status below 300; a file object is streamed (say retry=False then).

        `timeout` is in seconds between two pieces of the answer. Raises like `json`.
        """
        streamed = not isinstance(content, bytes | Parts | None)
        patience = _Patience(allowed=(method == "GET") if retry is None else retry, streamed=streamed)
        options = {"params": params, "headers": headers, "stream": stream}
        while True:
            try:
                response = self._send(method, path, content, timeout or self.timeout_seconds, options)
            except StoreUnreachable:
                if not patience.after_connection():
                    raise
            else:
                if response.status_code < 300:
                    return response
                error = self._refusal(response, has_body=content is not None)
                if not patience.after_status(response):
                    raise error
            self.sleep(patience.pause)

    def close(self) -> None:
        """Close this thread's connections; the next request opens a new one."""
        self._session().close()

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = self._new_session()
        return session

    def _new_session(self) -> requests.Session:
        session = new_session(self.base_url, self._login)
        if self.api_key:
            session.headers["api-key"] = self.api_key
        if is_this_machine(self.base_url):
            session.headers["Accept-Encoding"] = "identity"  # compressing costs more than the way
        return session

    def _send(
        self,
        method: str,
        path: str,
        content: bytes | Parts | BinaryIO | None,
        seconds: float,
        options: dict[str, Any],
    ) -> requests.Response:
        # urllib3 bounds connecting and each send by the first of the two timeouts.
        timeout = (CONNECT_SECONDS if content is None else SEND_SECONDS, seconds)
        url = self.base_url + path
        # The key would go along to wherever a redirect points: none is followed.
        more = {"timeout": timeout, "allow_redirects": False, "stream": True}
        try:
            response = self._session().request(method, url, data=content, **{**options, **more})
            _require_framed(response)
            if not options["stream"] or response.status_code >= 300:
                read_whole(response, LARGEST_ANSWER, max(seconds, LONGEST_ANSWER_SECONDS))
        except requests.RequestException as error:
            self.close()
            raise lost(self.display, error) from error
        except Unbounded as error:
            self.close()
            raise StoreFailed(
                f"Qdrant at {self.display}: {error}",
                next_step="check QDRANT_URL: is it a Qdrant that answers there?",
            ) from error
        return response

    def _refusal(self, response: requests.Response, *, has_body: bool) -> Exception:
        error = refusal(self.display, response, (self.api_key, *(self._login or ())))
        if has_body:
            # The server may have left the body unread, and the next request on this connection would hang.
            response.close()
            self.close()
        return error

    def _decode(self, response: requests.Response) -> object:
        try:
            return orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise not_qdrant(self.display) from None


class _Patience:
    """How often, and how long, one request may be repeated; `pause` is the next wait in seconds."""

    def __init__(self, *, allowed: bool, streamed: bool) -> None:
        self.pause = 0.0
        self._allowed = allowed and not streamed
        self._streamed = streamed
        self._tries = 0
        self._waited = 0.0

    def after_connection(self) -> bool:
        if not self._allowed or self._tries == len(PAUSES_SECONDS):
            return False
        self.pause = PAUSES_SECONDS[self._tries]
        self._tries += 1
        return True

    def after_status(self, response: requests.Response) -> bool:
        if response.status_code in _GATEWAY_TROUBLE:
            return self.after_connection()
        told = response.headers.get("Retry-After", "")
        if self._streamed or response.status_code != 429 or not told.isdecimal():
            return False
        self.pause = max(1.0, float(told))
        self._waited += self.pause
        return self._waited <= LONGEST_WAIT_SECONDS


def encode(value: object) -> bytes:
    """JSON bytes, numpy arrays included. Raises orjson.JSONEncodeError."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _require_framed(response: requests.Response) -> None:
    """Raise requests' ConnectionError where the head broke off: Python's http.client takes its end for the head's end.

    Every answer with a body tells its length, or comes in chunks; one that just ends with the connection may be cut.
    """
    framed = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
    if not framed and response.status_code != 204:
        response.close()
        raise requests.exceptions.ConnectionError("the head of the answer broke off")
