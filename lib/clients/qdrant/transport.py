"""One Qdrant server over REST: addresses, timeouts, errors of the server, retries on named conditions only."""

from __future__ import annotations

import re
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import orjson
import requests

from lib import network
from lib.errors import AccessRefused, MissingData, StoreFailed, StoreUnreachable, one_line

T = TypeVar("T")
CONNECT_SECONDS = 10.0
SEND_SECONDS = 30.0  # for one piece of a body: a server that refuses a request by its headers stops reading
PAUSES_SECONDS = (0.5, 1.0, 2.0)  # between attempts after a lost connection or a gateway's error
LONGEST_WAIT_SECONDS = 600.0  # for the rate limit, per request
LARGEST_ANSWER = 512 << 20  # a page of points with their vectors is some tens of MiB
LONGEST_ANSWER_SECONDS = 600.0  # from the end of its headers to its end
GATEWAY_ERRORS = (502, 503, 504)
_RATE_LIMIT = 429
_NOT_RECEIVED = 408  # the server did not get the whole request in time, as after a sleep of this machine
_SEND_BYTES = 256 << 10  # of a body, sent at once
_GZIP_WBITS = 31  # https://docs.python.org/3/library/zlib.html#zlib.compressobj
_TEXT_LIMIT = 600  # characters of a server's error text that are shown
_EXAMPLE = "correct QDRANT_URL, as in:\nexport QDRANT_URL=http://localhost:6333"

_PLAIN_HTTP = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # how OpenSSL names an answer without TLS
# The last two are what a full disk causes during a snapshot and during a restore, and hardly anything else does.
_DISK_FULL = ("No space left", "Not enough space available", "Error while copy WAL", "failed to unpack `")


class QdrantError(StoreFailed):
    """The server answered with an error: HTTP `status`, its message `text`, the header `retry_after` or None."""

    def __init__(
        self, display: str, status: int, text: str, *, retry_after: str | None = None, next_step: str = ""
    ) -> None:
        if status == 400 and ". Help: " in text:
            next_step = "strict mode of the collection forbids this: permit it there while these scripts run"
            next_step += " (strict_mode_config), then run the same command again"
        super().__init__(f"Qdrant at {display} answered {status}: {text}", next_step=next_step)
        self.status, self.text, self.retry_after = status, text, retry_after


class NotFound(QdrantError, MissingData):
    """404: the collection, point or snapshot does not exist."""


class NoAnswer(StoreUnreachable):
    """No answer came. The server may have received the request and carried it out."""


def unanswered(error: Exception) -> bool:
    """Whether no answer came from the server itself, so that it may be carrying out the request."""
    return isinstance(error, NoAnswer) or (isinstance(error, QdrantError) and error.status in GATEWAY_ERRORS)


def is_down(error: Exception) -> bool:
    """Whether the server does not answer, so that it may be restarting."""
    return isinstance(error, StoreUnreachable) or unanswered(error)


def is_disk_full(error: Exception) -> bool:
    """Whether the server refused because its disk is full."""
    return isinstance(error, QdrantError) and reports_full_disk(error.text)


def reports_full_disk(text: str) -> bool:
    """Whether the server's message says that its disk is full (as worded by 1.11.3 and 1.18.3)."""
    return any(sign in text for sign in _DISK_FULL)


def collection_path(name: str, *parts: str) -> str:
    """The URL path of a collection, or of something in it; every part is quoted."""
    return "/".join(["/collections", quote(name, safe=""), *(quote(part, safe="") for part in parts)])


def server_time(q: Qdrant) -> datetime:
    """The server's clock (UTC, whole seconds) from its `Date` header; this machine's if a proxy removed that."""
    date = q.call("GET", "/").headers.get("Date", "")
    try:
        return parsedate_to_datetime(date).astimezone(timezone.utc)
    except ValueError:
        return datetime.now(timezone.utc)


def curl_line(qdrant: Qdrant, method: str, *path: str, query: str = "") -> str:
    """The shell command that sends a request about a collection; it reads the key from QDRANT_API_KEY."""
    key = ' -H "api-key: $QDRANT_API_KEY"' if qdrant.api_key else ""
    return f"curl -s -X {method}{key} {shlex.quote(qdrant.display + collection_path(*path) + query)}"


def encode(value: object) -> bytes:
    """JSON bytes, numpy arrays included. Raises orjson.JSONEncodeError."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


@dataclass(frozen=True)
class Parts:
    """A request body in parts that are never joined: that would double the memory."""

    parts: Sequence[bytes]

    @property
    def len(self) -> int:
        """Bytes in all; requests reads it for Content-Length."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[bytes]:
        piece = bytearray()
        for part in self.parts:
            piece += part
            if len(piece) >= _SEND_BYTES:
                yield bytes(piece)
                piece.clear()
        if piece:
            yield bytes(piece)


def _gzipped(content: bytes | Parts) -> Parts:
    from isal import isal_zlib

    compressor = isal_zlib.compressobj(1, wbits=_GZIP_WBITS)
    pieces = [content] if isinstance(content, bytes) else content
    return Parts([*map(compressor.compress, pieces), compressor.flush()])


class Qdrant:
    """A server's address and key. Threads may share it; each uses its own connections.

    A user and password in `url` are the `login`, for basic authentication. `display` is the address without secrets.
    `reads_gzip`: whether large bodies are sent compressed (None: not known yet); to this machine they are not.
    """

    def __init__(
        self, url: str, api_key: str = "", timeout_seconds: float = 60.0, *, sleep: Callable[..., object] = time.sleep
    ) -> None:
        parts = urlsplit(url)
        self.base_url = self.display = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self.login = network.login_of(url)
        self.api_key = api_key
        self.timeout_seconds = timeout_seconds
        self.sleep = sleep
        self.reads_gzip = False if network.is_this_machine(self.base_url) else None
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"Qdrant({self.display!r})"

    def version(self) -> str:
        """The server's version, such as "1.11.3". Raises StoreFailed if something else answers."""
        try:
            body = self._decode(self.call("GET", "/"))
        except QdrantError as error:
            busy = error.status >= 500 or error.status in (_NOT_RECEIVED, _RATE_LIMIT)
            raise error if busy else self._not_qdrant() from error
        if not isinstance(body, dict) or "version" not in body or "qdrant" not in str(body.get("title")):
            raise self._not_qdrant()
        return str(body["version"])

    def json(self, method: str, path: str, body: object = None, **options: Any) -> Any:
        """Send JSON like `send`, and return the `result` of the answer, or None if it has none."""
        return self.result(self.send(method, path, body, **options))

    def send(
        self, method: str, path: str, body: object = None, *, compress: bool = False, **options: Any
    ) -> requests.Response:
        """Send JSON with the options of `call`. orjson serialises `body`, numpy arrays too; Parts are sent as they are.

        Raises StoreUnreachable, NoAnswer, AccessRefused, NotFound, QdrantError, StoreFailed.
        """
        content = body if isinstance(body, Parts | None) else encode(body)
        headers = {} if content is None else {"Content-Type": "application/json"}
        if content is not None and compress:
            content, headers["Content-Encoding"] = _gzipped(content), "gzip"
        return self.call(method, path, content, headers=headers, **options)

    def result(self, response: requests.Response) -> Any:
        """Return the `result` of an answer of JSON, or None if it has none. Raises StoreFailed."""
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
        """Send one request and return the answer if its status is below 300. Otherwise raises like `send`.

        A file object is streamed and never sent twice. `timeout` is in seconds between two pieces of the answer.
        With `retry` (default: for GET only) the request is repeated after a lost connection, a 408 or a gateway's 502
        to 504. By default another one is sent over a new connection: it could be lost if the server just closes an idle
        one.
        A 429 with Retry-After was not carried out, so it is always repeated.
        """
        streamed = not isinstance(content, bytes | Parts | None)
        repeat = (method == "GET" if retry is None else retry) and not streamed
        if retry is None and method != "GET":
            self.close()
        seconds, pauses = timeout or self.timeout_seconds, PAUSES_SECONDS if repeat else ()
        send = partial(self._send, method, path, content, seconds, stream=stream, params=params, headers=headers)
        return send() if streamed else self.repeated(send, pauses)

    def repeated(self, send: Callable[[], T], pauses: Iterable[float] = ()) -> T:
        """Call `send`, again after each of the pauses if it was not answered, and while a 429 names a time to wait."""
        following, waited = iter(pauses), 0.0
        while True:
            try:
                return send()
            except (StoreUnreachable, QdrantError) as error:
                if isinstance(error, QdrantError) and error.status not in (*GATEWAY_ERRORS, _NOT_RECEIVED):
                    pause = _rate_limit_pause(error)
                    waited += pause or 0.0
                else:
                    pause = next(following, None)
                if pause is None or waited > LONGEST_WAIT_SECONDS:
                    raise
            self.sleep(pause)

    def shown(self, text: str) -> str:
        """Return a text of the server's as it may be shown: one line, not too long, without the key and the login."""
        for secret in filter(None, (self.api_key, *(self.login or ()))):  # before it is cut within one
            text = text.replace(secret, "***")
        return one_line(text[:_TEXT_LIMIT])

    def close(self) -> None:
        """Close this thread's connections; the next request opens a new one."""
        self._session().close()

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            session = network.new_session(self.base_url, self.login)
            if self.api_key:
                session.headers["api-key"] = self.api_key
            if network.is_this_machine(self.base_url):
                session.headers["Accept-Encoding"] = "identity"  # compressing takes longer than sending
            self._local.session = session
        current: requests.Session = self._local.session
        return current

    def _send(
        self, method: str, path: str, content: Any, seconds: float, *, stream: bool, **options: Any
    ) -> requests.Response:
        # urllib3 bounds connecting and each send by the first of the two timeouts.
        options["timeout"] = (CONNECT_SECONDS if content is None else SEND_SECONDS, seconds)
        # No redirect is followed: the key would be sent to its target.
        options |= {"data": content, "allow_redirects": False, "stream": True}
        try:
            response = self._session().request(method, self.base_url + path, **options)
            framed = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
            if not framed and response.status_code != 204:
                response.close()
                raise requests.exceptions.ConnectionError("the connection broke within the headers of the answer")
            if not stream or response.status_code >= 300:
                network.read_whole(response, LARGEST_ANSWER, max(seconds, LONGEST_ANSWER_SECONDS))
        except requests.RequestException as error:
            self.close()
            raise _connection_error(self.display, error) from error
        except network.Unbounded as error:
            self.close()
            step = f"check the network, then run the same command again\nor {_EXAMPLE}"
            raise StoreFailed(f"Qdrant at {self.display}: {error}", next_step=step) from error
        if response.status_code < 300:
            return response
        if content is not None:
            # The server may not have read the whole body; the next request on this connection would hang.
            response.close()
            self.close()
        raise _status_error(self, response)

    def _decode(self, response: requests.Response) -> object:
        try:
            return orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise self._not_qdrant() from None

    def _not_qdrant(self) -> StoreFailed:
        return StoreFailed(f"what answers at {self.display} is not Qdrant's REST API", next_step=_EXAMPLE)


def _rate_limit_pause(error: QdrantError) -> float | None:
    """Seconds to wait as the server asks to; None if it does not."""
    asked = error.retry_after or ""
    return max(1.0, float(asked)) if error.status == _RATE_LIMIT and asked.isdecimal() else None


def _connection_error(display: str, error: requests.RequestException) -> StoreUnreachable:
    """Return StoreUnreachable if no connection was made, else NoAnswer."""
    text, cause, hint, reason = str(error), network.connect_error(error), "", ""
    if isinstance(error, requests.exceptions.SSLError):
        if any(sign in text for sign in _PLAIN_HTTP):
            step = f"export QDRANT_URL={display.replace('https:', 'http:')}"
            return StoreUnreachable(f"Qdrant at {display}: TLS failed: the server speaks plain HTTP", next_step=step)
        found = re.search(r"\] (.+?) \(_ssl", text)
        text = f"Qdrant at {display}: TLS failed: {found[1] if found else one_line(text[:_TEXT_LIMIT])}"
        return StoreUnreachable(text, next_step=network.trust_step("REQUESTS_CA_BUNDLE"))
    if isinstance(error, requests.exceptions.ProxyError | requests.exceptions.InvalidSchema):
        # InvalidSchema: a SOCKS proxy, without the package for it.
        step = f"correct that variable; for a SOCKS proxy:\n{network.INSTALL_SOCKS}\nor use no proxy:\n"
        step += f"export NO_PROXY={urlsplit(display).hostname}"
        text = f"Qdrant at {display} is unreachable through the proxy of {network.PROXIES}"
        return StoreUnreachable(text, next_step=step)
    if isinstance(error, requests.ConnectTimeout):
        reason = "connecting timed out"
    elif isinstance(cause, socket.gaierror):
        reason = "its name is not known"
        hint = network.container_hint(urlsplit(display).hostname or "", "QDRANT_URL=http://localhost:6333")
    elif cause:
        reason = (cause.strerror or "no connection can be made").lower()
    if reason:
        step = f"{hint}start it, in AutoMem's folder:\ndocker compose up -d qdrant\nor correct QDRANT_URL"
        return StoreUnreachable(f"Qdrant at {display} is unreachable: {reason}", next_step=step)
    broken = "timed out" if "timed out" in text else "the connection broke"
    return NoAnswer(f"Qdrant at {display} gave no answer: {broken}")


def _status_error(q: Qdrant, response: requests.Response) -> AccessRefused | QdrantError:
    """The error for an answer of status 300 and above."""
    try:
        text = str(orjson.loads(response.content)["status"]["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text = response.text.strip()  # the middleware and the download route answer in plain text
    text, display, status = q.shown(text or response.reason or "no text"), q.display, response.status_code
    if status in {401, 403}:
        step = "export QDRANT_API_KEY=...\na key that may manage the whole server"
        return AccessRefused(f"Qdrant at {display} refuses access: {status} {text}", next_step=step)
    if status == 404:
        return NotFound(display, status, text)
    step = ""
    if reports_full_disk(text):
        step = "free disk space on the Qdrant server, then run the same command again"
        step += "\nif it has room and still answers this: docs/worst-day.md"
    if status == _RATE_LIMIT:
        step = "the server, or a proxy before it, limits the requests: wait a minute, then run the same command again"
    if status == 413:  # Qdrant itself answers 400
        step = "a proxy limits the size of a request: raise its limit, or set QDRANT_URL to Qdrant's own address"
    return QdrantError(display, status, text, retry_after=response.headers.get("Retry-After"), next_step=step)
