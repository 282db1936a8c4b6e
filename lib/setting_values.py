"""From texts to values: what a setting may be, how it is shown, and every fault told without a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from lib.env_files import Setting

SECRETS = {"FALKORDB_PASSWORD", "QDRANT_API_KEY", "OPENAI_API_KEY", "AUTOMEM_API_TOKEN"}
PRIVATE_KEY = "AGE-SECRET-KEY-"
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def masked(name: str, value: str) -> str:
    """The value as it may be shown: secrets as stars, addresses without credentials, query and fragment."""
    if name in SECRETS:
        return "****" if value else "(not set)"
    if PRIVATE_KEY in value.upper():
        return "****"
    if name.endswith("_URLS"):
        return ",".join(masked(name.removesuffix("S"), one) for one in _several(value))
    if not name.endswith(("_URL", "_HOST")):
        return value
    if "@" in value:
        scheme = value.split("://", 1)[0] + "://" if "://" in value else ""
        login, _, place = value.rpartition("@")
        value = f"{scheme}****@{'****' if set(login) & set('?#') else place}"  # or the @ is part of a query
    end = re.search(r"[?#]", value)
    return f"{value[: end.start()]}{end[0]}****" if end else value


def same_value(left: str, right: str) -> bool:
    """Whether two texts set the same value: blanks around them and the word for true or false do not matter."""
    one, other = left.strip(), right.strip()
    return one == other or any({one.lower(), other.lower()} <= words for words in (_TRUE, _FALSE))


def _several(value: str) -> list[str]:
    """The URLs between commas; a comma within a password parts nothing."""
    return [one for one in re.split(r"[\s,]*,\s*(?=[a-z]+://|$)", value.strip()) if one]


class Reader:
    """Turns texts into values and gathers every fault on the way."""

    def __init__(self, settings: Mapping[str, Setting], faults: list[str]) -> None:
        self.settings = settings
        self.faults = faults

    def text(self, name: str) -> str:
        """The value as it was written."""
        return self.settings[name].value

    def no_key(self, name: str) -> str:
        """The path of a file of keys, or public keys; a private key does not belong there."""
        if PRIVATE_KEY in self.text(name).upper():
            self.fault(name, "holds a private key: keep the key in a file of mode 600, and name the file")
        return self.text(name)

    def fault(self, name: str, why: str) -> None:
        """Note what is wrong with a setting, and where it came from."""
        one = self.settings[name]
        self.faults.append(f"{name}={masked(name, one.value)} ({one.origin}): {why}")

    def number(self, name: str, low: float, high: float, kind: type[int | float]) -> float:
        """A number from `low` to `high`."""
        try:
            value = kind(self.text(name))
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            self.fault(name, f"must be {word} from {low:g} to {high:g}")
            return low
        if not low <= value <= high:
            self.fault(name, f"must be from {low:g} to {high:g}")
            return low
        return value

    def port(self, name: str) -> int:
        """A TCP port."""
        return int(self.number(name, 1, 65535, int))

    def flag(self, name: str) -> bool:
        """True or false."""
        word = self.text(name).lower()
        if word not in _TRUE | _FALSE:
            self.fault(name, "must be true or false")
        return word in _TRUE

    def host(self, name: str) -> str:
        """A host's name or address alone."""
        value = self.text(name)
        if set(value) & set("/@?# ") or value.count(":") == 1:
            port = name.replace("_HOST", "_PORT")
            self.fault(name, f"must be a host alone, such as localhost (its port belongs into {port})")
        return value

    def url(self, name: str, example: str, default_port: int | None = None, *, query: bool = False) -> str:
        """An http(s) URL with its port, without a slash at its end. A query is a fault unless `query` is set."""
        return self._url(name, self.text(name), example, default_port, query=query)

    def urls(self, name: str, example: str, default_port: int | None = None) -> tuple[str, ...]:
        """Several of them between commas; none where nothing is set."""
        return tuple(self._url(name, one, example, default_port) for one in _several(self.text(name)))

    def _url(
        self, name: str, value: str, example: str, default_port: int | None, *, query: bool = False
    ) -> str:
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError:
            self.fault(name, f"is no URL such as {example}")
            return value
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            self.fault(name, f"must begin with http:// or https://, such as {example}")
            return value
        if parts.fragment or (parts.query and not query):
            what = "a fragment (from # on)" if parts.fragment else "a query (from ? on)"
            self.fault(name, f"{what} is not supported here, and nothing of it would be sent: leave it out")
            return value
        login, at, _place = parts.netloc.rpartition("@")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        place = f"{login}{at}{host}{f':{port}' if (port := port or default_port) else ''}"
        return urlunsplit((parts.scheme, place, parts.path.rstrip("/"), parts.query, ""))

    def name(self, name: str) -> str:
        """A name that becomes part of a file's name."""
        value = self.text(name)
        if "/" in value or value != value.strip() or not value.isprintable():
            self.fault(name, "must not hold a slash, blanks at its ends or what cannot be printed")
        if value in {".", ".."}:
            self.fault(name, "is a folder in every URL: it reaches no such collection or graph")
        return value

    def model(self, name: str) -> str:
        """A model's name."""
        value = self.text(name).strip()
        if not value.isprintable():
            self.fault(name, "holds characters that no model's name has")
        return value

    def header(self, name: str) -> str:
        """A secret that travels in an HTTP header."""
        value = self.text(name)
        if value and not (value.isascii() and value.isprintable() and value == value.strip()):
            self.fault(name, "holds blanks at its ends or characters that no HTTP header can carry")
        return value

    def folder(self, name: str) -> Path:
        """A folder's absolute path; `~` is the home folder."""
        value = self.text(name)
        if not value.strip():
            self.fault(name, "must not be blank: is a variable unset?")
        try:
            return Path(value).expanduser().absolute()
        except RuntimeError:
            self.fault(name, "has a ~ whose home folder is not known")
            return Path(value)
