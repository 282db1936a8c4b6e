"""Network addresses without logins, in one canonical spelling; and the bounds and time limits of every HTTP client."""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from http.client import HTTPResponse

    import requests

_PRIVATE_DOMAINS = (".local", ".localhost", ".internal", ".lan", ".home.arpa", ".ts.net")
_THIS_MACHINE = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}  # noqa: S104 - as an address to connect to
PIECE_BYTES = 64 << 10  # received at a time; an inflated piece is at most 1,000 times larger
# One layer only: a second one could inflate each piece a thousand times again.
_ENCODINGS = {"", "identity", "gzip", "deflate"}
PROXIES = "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
INSTALL_SOCKS = "python -m pip install pysocks"  # what requests needs for a SOCKS proxy


def canonical_host(host: str) -> str:
    """Return the host in lower case; any name of this machine becomes 127.0.0.1."""
    name = host.lower().rstrip(".")
    return "127.0.0.1" if name in _THIS_MACHINE else name


def container_hint(host: str, variable: str) -> str:
    """Return what to try if a name without a domain does not resolve; "" for any other host."""
    if "." in host or ":" in host or canonical_host(host) == "127.0.0.1":
        return ""
    hint = f"if '{host}' is a container, its name resolves only inside Docker; if its port is published:"
    return f"{hint}\nexport {variable}\n"


def is_this_machine(url: str) -> bool:
    """Whether the URL's host is this machine, by any of its loopback names and addresses."""
    return is_loopback(urlsplit(url).hostname or "")


def is_loopback(host: str) -> bool:
    """Whether the host is this machine."""
    host = canonical_host(host)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.endswith(".localhost")


def is_private(host: str) -> bool:
    """Whether a host is this machine or on a private network, judged by its name or address."""
    name = canonical_host(host)
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_PRIVATE_DOMAINS)
    return not address.is_global  # which leaves out 100.64.0.0/10, too: carriers' and Tailscale's


def same_server(left: str, right: str) -> bool:
    """Whether two addresses (URLs, or `host:port`) name one server, judged by their spelling."""
    return _endpoint(left) == _endpoint(right)


def _endpoint(address: str) -> tuple[str, int | None, str]:
    if "://" not in address:
        host, _, port = address.rpartition(":")
        # FalkorDB's is written as FALKORDB_HOST and FALKORDB_PORT: an IPv6 address has no brackets then.
        address = f"//[{host}]:{port}" if ":" in host and "[" not in host else f"//{address}"
    parts = urlsplit(address)
    return canonical_host(parts.hostname or ""), parts.port, parts.path.rstrip("/")


def without_logins(text: str) -> str:
    """Return a text with the login of each URL masked."""
    return re.sub(r"://\S*@", "://***@", text)


def without_login(url: str) -> str:
    """Return the URL without user and password, as it may be shown."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}" if mark else url.rpartition("@")[2]


def login_of(url: str) -> tuple[str, str] | None:
    """Return user and password of the URL, or None if it has no login."""
    parts = urlsplit(url)
    return (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None


def without_password(url: str) -> str:
    """Return the URL of a copy as a command needs it: with sftp's user and Azure's container, without any password."""
    start, _, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    scheme, user = start.rpartition("=")[2].lower(), login.partition(":")[0]  # also of `--upload=sftp://...`
    if scheme == "sftp" or (scheme in {"az", "abfs", "abfss", "file"} and user == login):
        return f"{start}://{user}{at}{place}"
    return without_login(url)


def trust_step(variable: str, *, whose: str = "its certificate", how: str = "") -> str:
    """Return the next step if a certificate is not trusted; `variable` names the file of authorities."""
    return f"if {whose} is of an authority of your own{how}:\nexport {variable}=..."


class Unbounded(Exception):
    """The answer is too large, takes too long, or is compressed in an unexpected way."""


class _TimedReader(io.RawIOBase):
    """Reads of a socket that raise TimeoutError after `deadline` (monotonic seconds; None: no bound).

    The socket's own timeout bounds the wait for one byte, not for all headers.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw, self._sock, self._timeout = raw, sock, sock.gettimeout()
        self.deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int | None:
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left if self._timeout is None else min(left, self._timeout))
        return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


def _timed_answer(sock: socket.socket, *args: Any, **more: Any) -> HTTPResponse:
    """Make an answer whose headers, with interim answers (1xx), must be complete within the timeout of one read."""
    from http.client import HTTPResponse

    answer = HTTPResponse(sock, *args, **more)
    answer.fp = io.BufferedReader(_TimedReader(answer.fp.detach(), sock))
    return answer


def end_by(response: requests.Response, deadline: float) -> None:
    """Make reads of the body, also of chunk lines and trailers, raise TimeoutError after `deadline` (monotonic).

    Call it before the first read: until then the deadline of the headers counts.
    """
    # requests itself reads cookies through this private attribute. An answer without a body is closed already.
    answer: Any = response.raw._original_response  # noqa: SLF001
    if answer.fp:
        answer.fp.raw.deadline = deadline


def new_session(url: str, login: tuple[str, str] | None = None) -> requests.Session:
    """Make a session for this server: no login but `login`, and no proxy if it is this machine."""
    import requests
    from requests.adapters import HTTPAdapter
    from requests.auth import HTTPBasicAuth

    class TimedAdapter(HTTPAdapter):
        def get_connection_with_tls_context(self, *args: Any, **more: Any) -> Any:
            """Return the pool for a request; requests documents this method for overriding."""
            pool: Any = super().get_connection_with_tls_context(*args, **more)
            kind = pool.ConnectionCls
            if kind.response_class is not _timed_answer:
                pool.ConnectionCls = type(kind.__name__, (kind,), {"response_class": staticmethod(_timed_answer)})
            return pool

    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, TimedAdapter())
    # Without a callable that sends none, requests would send a login of ~/.netrc, even instead of a token.
    session.auth = HTTPBasicAuth(*(one.encode() for one in login)) if login else lambda request: request
    # Without trust_env, requests would not read REQUESTS_CA_BUNDLE either.
    session.verify = session.merge_environment_settings(url, {}, None, None, None)["verify"]
    session.trust_env = not is_this_machine(url)
    return session


def connect_error(error: requests.RequestException) -> OSError | None:
    """Return the system's error if requests could not connect; None if a connection was made, or to a proxy."""
    from urllib3.exceptions import NewConnectionError

    reason = getattr(error.args[0] if error.args else None, "reason", None)
    cause = reason.__cause__ or reason.__context__ if isinstance(reason, NewConnectionError) else None
    return cause if isinstance(cause, OSError) else None


def joined(pieces: Iterable[bytes], limit: int, seconds: float) -> bytes:
    """Join the pieces. Raises Unbounded if they are more than `limit` bytes, or take more than `seconds`."""
    body, deadline = bytearray(), time.monotonic() + seconds
    for piece in pieces:
        body += piece
        if len(body) > limit:
            raise Unbounded(f"the answer is larger than {limit >> 20} MiB")
        if time.monotonic() > deadline:
            raise _too_late(seconds)
    return bytes(body)


def _too_late(seconds: float) -> Unbounded:
    return Unbounded(f"the answer was not complete after {seconds:.0f} s")


def read_whole(response: requests.Response, limit: int, seconds: float) -> None:
    """Read the body of a streamed answer into its `content`. Raises Unbounded, requests' errors."""
    from requests import exceptions
    from urllib3.exceptions import DecodeError, HTTPError

    deadline = time.monotonic() + seconds
    try:
        end_by(response, deadline)
        # `iter_content` would wait until each piece is full.
        pieces = iter(partial(response.raw.read1, PIECE_BYTES, decode_content=True), b"")
        body = joined(pieces, limit, seconds)
    except DecodeError as error:
        raise exceptions.ContentDecodingError(error) from error
    except HTTPError as error:
        if time.monotonic() >= deadline:
            response.close()
            raise _too_late(seconds) from error
        broken = exceptions.ConnectionError if "timed out" in str(error) else exceptions.ChunkedEncodingError
        raise broken(error) from error
    except Unbounded:
        response.close()
        raise
    # As requests does when it has read a body. The server may name a codec that is not for text.
    vars(response).update(_content=body, _content_consumed=True, encoding="utf-8")


def httpx_hooks(limit: int, seconds: float) -> dict[str, list[Callable[..., Any]]]:
    """Return `event_hooks`: answers complete in `seconds`, errors within `limit` bytes. Read others with `joined`."""

    def bound_time(request: Any) -> None:
        request.headers["Accept-Encoding"] = "gzip, deflate"
        request.extensions["trace"] = lambda event, info: _bound_stream(event, info, seconds)

    def bound_refusal(response: Any) -> None:
        if response.headers.get("Content-Encoding", "").strip().lower() not in _ENCODINGS:
            raise Unbounded("the answer is compressed in a way that was not requested")
        response.encoding = "utf-8"  # the server may name a codec that is not for text
        if response.status_code >= 300:
            # As `response.read()` does, but with a bound.
            vars(response).update(_content=joined(response.iter_bytes(), limit, seconds))

    return {"request": [bound_time], "response": [bound_refusal]}


def _bound_stream(event: str, info: dict[str, Any], seconds: float) -> None:
    """Make reads of a new connection fail `seconds` after the last write, also if the headers arrive byte by byte.

    https://www.python-httpx.org/advanced/extensions/#trace, https://www.encode.io/httpcore/network-backends/
    """
    if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
        return
    stream = info["return_value"]
    read, write, deadline = stream.read, stream.write, time.monotonic() + seconds

    def bounded_read(max_bytes: int, timeout: float | None = None) -> Any:
        left = max(0.001, deadline - time.monotonic())
        try:
            return read(max_bytes, timeout=left if timeout is None else min(timeout, left))
        finally:
            if time.monotonic() >= deadline:
                raise _too_late(seconds)

    def noted_write(buffer: bytes, timeout: float | None = None) -> None:
        nonlocal deadline
        write(buffer, timeout=timeout)
        deadline = time.monotonic() + seconds

    stream.read, stream.write = bounded_read, noted_write
