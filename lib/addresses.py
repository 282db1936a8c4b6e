"""Network addresses: one spelling for one place, so that they can be compared, and none with a login in it."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

_PRIVATE_DOMAINS = (".local", ".localhost", ".internal", ".lan", ".home.arpa", ".ts.net")
_SHARED = ipaddress.ip_network("100.64.0.0/10")  # carriers' and Tailscale's
_THIS_MACHINE = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}  # noqa: S104 - as an address to connect to


def one_spelling(host: str) -> str:
    """The host in lower case; this machine by its number, however it is called."""
    name = host.lower().rstrip(".")
    return "127.0.0.1" if name in _THIS_MACHINE else name


def container_hint(host: str, variable: str) -> str:
    """What to try if a name without a domain does not resolve; empty for any other host."""
    if "." in host or ":" in host or one_spelling(host) == "127.0.0.1":
        return ""
    return (
        f"if '{host}' is the name of a container, it resolves only inside Docker: from here,"
        f" export {variable}, if the port is published\n"
    )


def is_this_machine(url: str) -> bool:
    """Whether the URL's host is this very machine, by any of its loopback names and numbers."""
    return is_loopback(urlsplit(url).hostname or "")


def is_loopback(host: str) -> bool:
    """Whether the host is this very machine."""
    host = one_spelling(host)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.endswith(".localhost")


def is_private(host: str) -> bool:
    """Whether a host is this machine or on a private network, as far as its name or number tells."""
    name = one_spelling(host)
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_PRIVATE_DOMAINS)
    return address.is_private or address.is_loopback or address.is_link_local or address in _SHARED


def same_server(left: str, right: str) -> bool:
    """Whether two addresses (URLs, or `host:port`) are of one server, as far as their spelling tells."""
    return _place(left) == _place(right)


def _place(address: str) -> tuple[str, int | None, str]:
    parts = urlsplit(address if "://" in address else f"//{address}")
    return one_spelling(parts.hostname or ""), parts.port, parts.path.rstrip("/")


def without_logins(text: str) -> str:
    """A text with the logins of all URLs in it masked."""
    return re.sub(r"://\S*@", "://***@", text)


def without_login(url: str) -> str:
    """The URL without user and password, as it may be shown."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}" if mark else url.rpartition("@")[2]
