"""AutoMem's own API: health, recall, and storing one memory. One short request each, nothing retried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lib.addresses import without_login
from lib.errors import AccessRefused, StoreFailed, StoreUnreachable

_OPTIONAL_SECONDS = 3.0
_GATEWAY_TIMEOUT = 504
_NOBODY = ("Failed to establish a new connection", "NameResolutionError", "Connection refused")

Presence = Literal["running", "silent", "absent"]


@dataclass(frozen=True)
class AutoMemApi:
    """Where AutoMem's API is and how to speak to it; the token stays out of reprs."""

    url: str
    token: str = field(default="", repr=False)
    timeout_seconds: float = 30.0


@dataclass(frozen=True)
class Recall:
    """The answer to one recall: rows as the API gives them, and the method that the server took."""

    method: str
    results: list[dict[str, Any]]
    milliseconds: float


def _request(api: AutoMemApi, method: str, path: str, *, seconds: float, **sent: Any) -> Any:
    import requests

    headers = {"Authorization": f"Bearer {api.token}"} if api.token else {}
    try:
        return requests.request(method, api.url + path, headers=headers, timeout=seconds, **sent)
    except requests.RequestException as error:
        raise StoreUnreachable(
            f"AutoMem's API does not answer at {without_login(api.url)} ({type(error).__name__})",
            next_step="start AutoMem, or set AUTOMEM_API_URL",
        ) from None


def _checked(response: Any) -> dict[str, Any]:
    if response.status_code in {401, 403}:
        raise AccessRefused(
            f"AutoMem's API refused the token (HTTP {response.status_code})",
            next_step="export AUTOMEM_API_TOKEN=... (the one that the service was started with)",
        )
    if response.status_code >= 400:
        raise StoreFailed(f"AutoMem's API answered {response.status_code}: {response.text[:200]}")
    try:
        return dict(response.json())
    except ValueError as error:
        raise StoreFailed("what answers at AUTOMEM_API_URL is not AutoMem: no JSON") from error


def health(api: AutoMemApi) -> dict[str, Any] | None:
    """`GET /health`, whatever its status (a degraded service runs too); None where no AutoMem answers there."""
    try:
        response = _request(api, "GET", "/health", seconds=_OPTIONAL_SECONDS)
        answer = response.json()
    except (StoreUnreachable, ValueError):
        return None
    return answer if isinstance(answer, dict) and "falkordb" in answer else None


def presence(api: AutoMemApi) -> Presence:
    """Whether AutoMem may be at work there: only what nobody listens at, or what answers as another, is "absent".

    "silent": a connection was taken and no answer came within 3 seconds, as of a service that is busy or hangs.
    """
    import requests

    try:
        response = requests.get(f"{api.url}/health", timeout=_OPTIONAL_SECONDS)
    except requests.ConnectTimeout:
        return "absent"
    except requests.ConnectionError as error:
        return "absent" if any(sign in str(error) for sign in _NOBODY) else "silent"
    except requests.RequestException as error:
        return "silent" if isinstance(error, requests.Timeout) else "absent"
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "falkordb" in answer:
        return "running"
    return "silent" if response.status_code == _GATEWAY_TIMEOUT else "absent"


def recall(api: AutoMemApi, query: str, limit: int) -> Recall:
    """POST /recall as the guide writes it; GET where the server answers 405, as released versions do."""
    method = "POST"
    response = _request(
        api, "POST", "/recall", seconds=api.timeout_seconds, json={"query": query, "limit": limit}
    )
    if response.status_code == 405:
        method = "GET"
        response = _request(
            api, "GET", "/recall", seconds=api.timeout_seconds, params={"query": query, "limit": str(limit)}
        )
    results = _checked(response).get("results")
    if not isinstance(results, list):
        raise StoreFailed("AutoMem's /recall answered without `results`")
    return Recall(method, results, response.elapsed.total_seconds() * 1000)


def remember(api: AutoMemApi, content: str, tags: list[str], importance: float) -> str:
    """`POST /memory`; the id of the memory."""
    body = {"content": content, "tags": tags, "importance": importance}
    answer = _checked(_request(api, "POST", "/memory", seconds=api.timeout_seconds, json=body))
    return str(answer.get("memory_id") or answer.get("id") or "")
