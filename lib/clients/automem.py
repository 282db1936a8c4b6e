"""AutoMem's API: health, recall, and storing one memory. Each is one short request, without retries."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lib.errors import AccessRefused, StoreFailed, StoreUnreachable, one_line
from lib.network import Unbounded, connect_error, is_this_machine, login_of, new_session, read_whole, without_login

if TYPE_CHECKING:
    import requests

_HEALTH_SECONDS = 3.0
_LARGEST_ANSWER, _LONGEST_SECONDS = 64 << 20, 10.0
# Any other status but 2xx may come from a gateway, a login or a proxy in front of AutoMem.
_NOT_FOUND = {404, 405, 410}
# For a loopback address: the system does not have it (IPv6 is off), so nothing can listen on it.
_NO_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EHOSTUNREACH}

Presence = Literal["running", "silent", "unresolved", "absent"]


@dataclass(frozen=True)
class AutoMemApi:
    """The address of AutoMem's API, and the token. A login in the URL is for a proxy. The repr shows neither."""

    url: str = field(repr=False)
    token: str = field(default="", repr=False)
    timeout_seconds: float = 30.0


@dataclass(frozen=True)
class HealthAnswer:
    """The answer at `/health`; `health` is AutoMem's own, None for any other answer.

    `presence`: "running"; "silent" if AutoMem may be running although it did not answer; "unresolved" if the host's
    name is unknown here, so that no request was sent; "absent" if nothing listens there, or another service answers.
    `seen` describes the answer; it is empty only if nothing listens.
    """

    presence: Presence
    seen: str = ""
    health: dict[str, Any] | None = None

    @property
    def summary(self) -> str:
        """Describe the answer, for messages."""
        return self.seen or "nothing listens there"


@dataclass(frozen=True)
class RecallAnswer:
    """The answer to one recall: the API's rows, and the HTTP method that the server accepted."""

    method: str
    results: list[dict[str, Any]]
    milliseconds: float


def _send(api: AutoMemApi, method: str, path: str, **sent: Any) -> Any:
    """Send one request. Raises requests.RequestException, also for an answer that is too large or too slow."""
    import requests

    with new_session(api.url, login_of(api.url)) as session:
        # A redirect is not followed, since the token would be sent to its target.
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
    if headers and login_of(api.url):  # which takes that header; AutoMem accepts both
        headers = {"X-API-Key": api.token}
    try:
        return _send(api, method, path, headers=headers, timeout=api.timeout_seconds, **sent)
    except requests.RequestException as error:
        text = f"AutoMem's API does not answer at {without_login(api.url)}: {_failed_request(error, api.url).summary}"
        raise StoreUnreachable(text, next_step="start AutoMem, or set AUTOMEM_API_URL to its address") from None


def _checked(response: Any) -> dict[str, Any]:
    if response.status_code in {401, 403}:
        step = "export AUTOMEM_API_TOKEN=...\nthe one that the service was started with"
        raise AccessRefused(f"AutoMem's API refused the token (HTTP {response.status_code})", next_step=step)
    if response.status_code >= 400:
        text = f"AutoMem's API answered {response.status_code}: {one_line(response.text[:200])}"
        raise StoreFailed(text, next_step="look at AutoMem's log, in its folder:\ndocker compose logs flask-api")
    try:
        return dict(response.json())
    except (ValueError, TypeError, RecursionError) as error:
        step = "set AUTOMEM_API_URL to AutoMem's address"
        raise StoreFailed("what answers at AUTOMEM_API_URL is not AutoMem: it sent no JSON", next_step=step) from error


def ask_health(api: AutoMemApi) -> HealthAnswer:
    """Send `GET /health`, also to the root of the host if something else answers at the path. Raises nothing."""
    answer, parts = _health(api), urlsplit(api.url)
    root = f"{parts.scheme}://{parts.netloc}"
    if answer.presence == "absent" and answer.seen and root != api.url:
        above = _health(AutoMemApi(root))
        if above.presence == "running":
            return HealthAnswer("silent", f"AutoMem answers at {without_login(root)}, and not at that path")
    return answer


def _health(api: AutoMemApi) -> HealthAnswer:
    import requests

    try:
        response = _send(api, "GET", "/health", timeout=_HEALTH_SECONDS)
    except requests.RequestException as error:
        return _failed_request(error, api.url)
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
    is_other = 200 <= response.status_code < 300 or response.status_code in _NOT_FOUND
    return HealthAnswer("absent" if is_other else "silent", seen)


def _failed_request(error: requests.RequestException, url: str) -> HealthAnswer:
    """Interpret a failed request. Only a connection that the host itself refused shows that nothing listens."""
    import requests

    cause, seen = connect_error(error), f"no complete answer ({type(error).__name__})"
    if isinstance(error, requests.exceptions.ProxyError):
        seen = "the proxy of HTTP_PROXY or HTTPS_PROXY did not reach it"
    elif isinstance(error, requests.ConnectTimeout):
        seen = "no connection in time"
    elif isinstance(cause, socket.gaierror):
        return HealthAnswer("unresolved", f"the name of its host does not resolve here ({cause.strerror})")
    elif isinstance(cause, ConnectionRefusedError) or (cause and is_this_machine(url) and cause.errno in _NO_ADDRESS):
        return HealthAnswer("absent")
    elif cause:
        seen = f"no connection ({cause.strerror})"
    elif isinstance(error, requests.Timeout):
        seen = "it accepts connections and does not answer"
    return HealthAnswer("silent", seen)


def recall(api: AutoMemApi, query: str, limit: int) -> RecallAnswer:
    """Send `POST /recall`, as AutoMem's guide does, and `GET` if the server answers 405, as released versions do."""
    method = "POST"
    response = _request(api, "POST", "/recall", json={"query": query, "limit": limit})
    if response.status_code == 405:
        method = "GET"
        response = _request(api, "GET", "/recall", params={"query": query, "limit": str(limit)})
    results = _checked(response).get("results")
    if not isinstance(results, list):
        raise StoreFailed("AutoMem's /recall answered without `results`")
    return RecallAnswer(method, results, response.elapsed.total_seconds() * 1000)


def remember(api: AutoMemApi, content: str, tags: list[str], importance: float) -> str:
    """Send `POST /memory`. Returns the id of the memory."""
    body = {"content": content, "tags": tags, "importance": importance}
    answer = _checked(_request(api, "POST", "/memory", json=body))
    return str(answer.get("memory_id") or answer.get("id") or "")
