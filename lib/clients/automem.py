"""AutoMem's own API: health, recall, and storing one memory. One short request each, nothing retried."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from lib.errors import AccessRefused, StoreFailed, StoreUnreachable, one_line
from lib.network import Unbounded, is_this_machine, new_session, read_whole, without_login

_OPTIONAL_SECONDS = 3.0
_LARGEST_ANSWER, _LONGEST_SECONDS = 64 << 20, 10.0
# All other answers than these and 2xx may be of a gateway, a login or a proxy in front of a service.
_NOT_THERE = {404, 405, 410}
# Of a loopback address: the system lacks it (IPv6 is off), so that nothing can listen on it.
_NO_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EHOSTUNREACH}

Presence = Literal["running", "silent", "unresolved", "absent"]


@dataclass(frozen=True)
class AutoMemApi:
    """Where AutoMem's API is and how to speak to it; the token stays out of reprs."""

    url: str
    token: str = field(default="", repr=False)
    timeout_seconds: float = 30.0


@dataclass(frozen=True)
class HealthAnswer:
    """What answered at `/health`. `health` is AutoMem's own answer, None if it was anything else.

    `presence`: "running"; "silent" if it may be running all the same; "unresolved" if the host's name is unknown here,
    so that nobody was asked; "absent" if nothing listens there, or another service answers. `seen` says in words what
    came; it is empty only if nothing listens.
    """

    presence: Presence
    seen: str = ""
    health: dict[str, Any] | None = None

    @property
    def summary(self) -> str:
        """What came, for messages."""
        return self.seen or "nothing listens there"


@dataclass(frozen=True)
class Recall:
    """The answer to one recall: rows as the API gives them, and the method that the server took."""

    method: str
    results: list[dict[str, Any]]
    milliseconds: float


def _send(api: AutoMemApi, method: str, path: str, **sent: Any) -> Any:
    """One request. Raises requests.RequestException, also for an answer without end."""
    import requests

    with new_session(api.url) as session:
        # The token would go along to wherever a redirect points: none is followed.
        sent |= {"allow_redirects": False, "stream": True}
        response = session.request(method, api.url + path, **sent)
        try:
            read_whole(response, _LARGEST_ANSWER, max(_LONGEST_SECONDS, sent["timeout"]))
        except Unbounded as error:
            raise requests.exceptions.ContentDecodingError(str(error)) from error
        return response


def _request(api: AutoMemApi, method: str, path: str, **sent: Any) -> Any:
    import requests

    headers = {"Authorization": f"Bearer {api.token}"} if api.token else {}
    try:
        return _send(api, method, path, headers=headers, timeout=api.timeout_seconds, **sent)
    except requests.RequestException as error:
        raise StoreUnreachable(
            f"AutoMem's API does not answer at {without_login(api.url)}: {_without_answer(error, api.url).summary}",
            next_step="start AutoMem, or set AUTOMEM_API_URL",
        ) from None


def _checked(response: Any) -> dict[str, Any]:
    if response.status_code in {401, 403}:
        raise AccessRefused(
            f"AutoMem's API refused the token (HTTP {response.status_code})",
            next_step="export AUTOMEM_API_TOKEN=... (the one that the service was started with)",
        )
    if response.status_code >= 400:
        raise StoreFailed(f"AutoMem's API answered {response.status_code}: {one_line(response.text[:200])}")
    try:
        return dict(response.json())
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreFailed("what answers at AUTOMEM_API_URL is not AutoMem: no JSON") from error


def ask_health(api: AutoMemApi) -> HealthAnswer:
    """`GET /health`, whatever its status: a degraded service runs too. Raises nothing.

    If something else answers below the path of the URL, the host itself is asked, too: the path may be wrong.
    """
    answer, parts = _asked(api), urlsplit(api.url)
    root = f"{parts.scheme}://{parts.netloc}"
    if answer.presence == "absent" and answer.seen and root != api.url:
        above = _asked(AutoMemApi(root))
        if above.presence == "running":
            return HealthAnswer("silent", f"AutoMem answers at {without_login(root)}, and not at that path")
    return answer


def _asked(api: AutoMemApi) -> HealthAnswer:
    """One question, of 3 seconds at most."""
    import requests

    try:
        response = _send(api, "GET", "/health", timeout=_OPTIONAL_SECONDS)
    except requests.RequestException as error:
        return _without_answer(error, api.url)
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict) and "falkordb" in answer:
        return HealthAnswer("running", "AutoMem", answer)
    server = response.headers.get("Server", "")
    seen = f"HTTP {response.status_code}{f' from {one_line(server[:60])}' if server else ''}, not AutoMem's health"
    if location := response.headers.get("Location"):
        seen += f", a redirect to {one_line(urlsplit(location).netloc.rpartition('@')[2])}"
    there = 200 <= response.status_code < 300 or response.status_code in _NOT_THERE
    return HealthAnswer("absent" if there else "silent", seen)


def _without_answer(error: Exception, url: str) -> HealthAnswer:
    """What a failed request shows: only a connection that the machine itself refused shows that nothing listens."""
    import requests

    if isinstance(error, requests.exceptions.ProxyError):
        return HealthAnswer("silent", "the proxy of HTTP_PROXY or HTTPS_PROXY did not reach it")
    if isinstance(error, requests.ConnectTimeout):
        return HealthAnswer("silent", "no connection in time")
    if (cause := _cause(error)) is not None:
        return _unconnected(cause, url)
    if isinstance(error, requests.Timeout):
        return HealthAnswer("silent", "it takes connections and does not answer")
    return HealthAnswer("silent", f"no complete answer ({type(error).__name__})")


def _unconnected(cause: OSError, url: str) -> HealthAnswer:
    if isinstance(cause, socket.gaierror):
        return HealthAnswer("unresolved", f"the name of its host does not resolve here ({cause.strerror})")
    if isinstance(cause, ConnectionRefusedError) or (is_this_machine(url) and cause.errno in _NO_ADDRESS):
        return HealthAnswer("absent")
    return HealthAnswer("silent", f"no connection ({cause.strerror})")


def _cause(error: Exception) -> OSError | None:
    """What the system said when no connection came about; None if there was one, or for a time limit."""
    from urllib3.exceptions import NewConnectionError

    reason = getattr(error.args[0] if error.args else None, "reason", None)
    cause = reason.__cause__ or reason.__context__ if isinstance(reason, NewConnectionError) else None
    return cause if isinstance(cause, OSError) else None


def recall(api: AutoMemApi, query: str, limit: int) -> Recall:
    """POST /recall as the guide writes it; GET where the server answers 405, as released versions do."""
    method = "POST"
    response = _request(api, "POST", "/recall", json={"query": query, "limit": limit})
    if response.status_code == 405:
        method = "GET"
        response = _request(api, "GET", "/recall", params={"query": query, "limit": str(limit)})
    results = _checked(response).get("results")
    if not isinstance(results, list):
        raise StoreFailed("AutoMem's /recall answered without `results`")
    return Recall(method, results, response.elapsed.total_seconds() * 1000)


def remember(api: AutoMemApi, content: str, tags: list[str], importance: float) -> str:
    """`POST /memory`; the id of the memory."""
    body = {"content": content, "tags": tags, "importance": importance}
    answer = _checked(_request(api, "POST", "/memory", json=body))
    return str(answer.get("memory_id") or answer.get("id") or "")
