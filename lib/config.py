"""The configuration: one frozen Config, built once in `main`. Each value has its origin."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lib import dimensions
from lib.backup.age import CopyKeys
from lib.backup.catalog import Deployment
from lib.dimensions import AUTO, LOCAL, OLLAMA, OPENAI, PROVIDER, SETTING_NAMES, VOYAGE, EmbeddingChoice, EmbeddingSpec
from lib.env_files import DEFAULT, Setting, read_settings
from lib.errors import ConfigError, UsageProblem, is_utf8, not_utf8
from lib.network import canonical_host, is_private, without_login

SECRETS = {"FALKORDB_PASSWORD", "QDRANT_API_KEY", "OPENAI_API_KEY", "VOYAGE_API_KEY", "AUTOMEM_API_TOKEN"}
PRIVATE_KEY = "AGE-SECRET-KEY-"
PROJECT_ROOT = Path(__file__).resolve().parent.parent
VOYAGE_URL = "https://api.voyageai.com/v1"
OLLAMA_URL = "http://localhost:11434"
_QDRANT_PORT = 6333  # of a URL that names none, as in qdrant-client's qdrant_remote.py and so in AutoMem
# What examples have in the place of a key: sk-proj-your-key-here, <key>, ...
_PLACEHOLDER = re.compile(r"your[\w -]*key|^<.*>$|\.\.\.$|^x+$|^change.?me", re.IGNORECASE)
# Qdrant refuses these in a collection's name. A file of Qdrant's has the name in its own, with up to 70 bytes more for
# `__next`, the node, the time and its endings; a file's name has 255 bytes (1.11.3 and 1.19.0).
_NOT_IN_COLLECTION, _COLLECTION_BYTES = set('<>:"\\|?*'), 180
_GRAPH_BYTES = 220  # the files of its backups have its name, with up to 32 bytes more
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def masked(name: str, value: str) -> str:
    """Return the value as it may be shown: secrets as stars, addresses without credentials, query and fragment."""
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
        login, _, host = value.rpartition("@")
        # After ? or # the @ is not the end of a login, but part of a query.
        value = f"{scheme}****@{'****' if set(login) & set('?#') else host}"
    end = re.search(r"[?#]", value)
    return f"{value[: end.start()]}{end[0]}****" if end else value


def same_value(left: str, right: str) -> bool:
    """Whether two texts set the same value: blanks around them, and which word for true or false, do not matter."""
    one, other = left.strip(), right.strip()
    return one == other or any({one.lower(), other.lower()} <= words for words in (_TRUE, _FALSE))


def _several(value: str) -> list[str]:
    """Split URLs at commas, but not at a comma within a password."""
    return [one for one in re.split(r"[\s,]*,\s*(?=[a-z]+://|$)", value.strip()) if one]


class Reader:
    """Turns texts into values, and collects the fault of each that is wrong."""

    def __init__(self, settings: dict[str, Setting], faults: list[str]) -> None:
        self.settings = settings
        self.faults = faults

    def text(self, name: str) -> str:
        """Return the value as it was written."""
        return self.settings[name].value

    def no_key(self, name: str) -> str:
        """Return the path of a key file, or public keys. A private key is a fault."""
        if PRIVATE_KEY in self.text(name).upper():
            self.fault(name, "holds a private key: keep the key in a file of mode 600, and name the file")
        return self.text(name)

    def fault(self, name: str, why: str) -> None:
        """Add a fault: the setting, its origin, and what is wrong."""
        one = self.settings[name]
        self.faults.append(f"{name}={masked(name, one.value)} ({one.origin}): {why}")

    def number(self, name: str, low: float, high: float, kind: type[int | float] = float) -> float:
        """Return a number from `low` to `high`."""
        try:
            value: float = kind(self.text(name))
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            word = "a whole number" if kind is int else "a number"
            self.fault(name, f"must be {word} from {low:g} to {high:g}")
            return low
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        return int(self.number(name, low, high, int))

    def flag(self, name: str) -> bool:
        """Return true or false."""
        word = self.text(name).lower()
        if word not in _TRUE | _FALSE:
            self.fault(name, "must be true or false")
        return word in _TRUE

    def host(self, name: str) -> str:
        """Return a host's name or address, without a port and without the brackets of an IPv6 address."""
        value = self.text(name)
        value = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        if set(value) & set("/@?# []") or value.count(":") == 1:
            port = name.replace("_HOST", "_PORT")
            self.fault(name, f"must be a host alone, such as localhost (set its port with {port})")
            return "localhost"
        return value

    def url(self, name: str, *, port: int | None = None, query: bool = False, value: str | None = None) -> str:
        """Return an http(s) URL with its port (default: `port`), no closing slash. `value`: one of several."""
        example = DEFAULTS[name] or f"http://localhost:{_QDRANT_PORT}"
        value = self.text(name) if value is None else value
        try:
            parts = urlsplit(value)
            port = port if parts.port is None else parts.port
            if "[" in parts.netloc.rpartition("@")[2]:
                IPv6Address(parts.hostname or "")  # urlsplit itself looks into the brackets from Python 3.11.4 on
        except ValueError:
            self.fault(name, f"is not a URL such as {example}")
            return value
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            self.fault(name, f"must begin with http:// or https://, such as {example}")
            return value
        if parts.fragment or (parts.query and not query):
            what = "a fragment (from # on)" if parts.fragment else "a query (from ? on)"
            self.fault(name, f"{what} is not supported here and would not be sent: leave it out")
            return value
        login, at, _host = parts.netloc.rpartition("@")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        netloc = f"{login}{at}{host}" + (f":{port}" if port else "")
        return urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), parts.query, ""))

    def urls(self, name: str) -> tuple[str, ...]:
        """Return the URLs of Qdrant nodes, given with commas between them."""
        return tuple(self.url(name, port=_QDRANT_PORT, value=one) for one in _several(self.text(name)))

    def qdrant_url(self, name: str) -> str:
        """Return QDRANT_URL, else the URL of QDRANT_HOST and QDRANT_PORT, from any source, as AutoMem does."""
        if self.text(name):
            return self.url(name, port=_QDRANT_PORT)
        host, port = self.host("QDRANT_HOST"), self.integer("QDRANT_PORT", 1, 65535)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        origins = {one: self.settings[one].origin for one in ("QDRANT_HOST", "QDRANT_PORT")}
        set_by = ", ".join(f"{one} ({origin})" for one, origin in origins.items() if origin != DEFAULT)
        self.settings[name] = Setting(url, set_by or DEFAULT)
        return self.url(name)

    def size(self, name: str) -> int:
        """Return VECTOR_SIZE, else QDRANT_VECTOR_SIZE, its older name, as AutoMem does."""
        older = self.settings["QDRANT_VECTOR_SIZE"]
        if self.settings[name].origin == DEFAULT and older.origin != DEFAULT:
            self.settings[name] = older
        return self.integer(name, 1, 65536)

    def username(self, name: str) -> str:
        """Return FalkorDB's user, which is `default` if only a password is set."""
        return self.text(name) or ("default" if self.text("FALKORDB_PASSWORD") else "")

    def name(self, name: str) -> str:
        """Return a name that can be part of a file's name."""
        value = self.text(name)
        if "/" in value or value != value.strip() or not value.isprintable():
            self.fault(name, "must not have a slash, blanks at its ends or characters that cannot be printed")
        if value in {".", ".."}:
            self.fault(name, "means a folder, in URLs and in the names of files")
        return value

    def graph(self, name: str) -> str:
        """Return the graph's name, which the files of its backups have in theirs."""
        value = self.name(name)
        if len(os.fsencode(value)) > _GRAPH_BYTES:
            self.fault(name, f"is longer than {_GRAPH_BYTES} bytes: the files of its backups would have too long names")
        return value

    def collection(self, name: str) -> str:
        """Return the collection's name, of which Qdrant can also make snapshots and temporary collections."""
        value = self.name(name)
        if found := sorted(set(value) & _NOT_IN_COLLECTION):
            self.fault(name, f"has characters that Qdrant permits in no name: {' '.join(found)}")
        if len(os.fsencode(value)) > _COLLECTION_BYTES:
            self.fault(name, f"is longer than {_COLLECTION_BYTES} bytes: Qdrant cannot make snapshots of it")
        return value

    def model(self, name: str) -> str:
        """Return a model's name."""
        value = self.text(name).strip()
        if not value.isprintable():
            self.fault(name, "has characters that cannot be printed")
        return value

    def header(self, name: str) -> str:
        """Return a secret that is sent in an HTTP header."""
        value = self.text(name)
        if value and not (value.isascii() and value.isprintable() and value == value.strip()):
            self.fault(name, "has blanks at its ends or characters that an HTTP header cannot hold")
        return value

    def folder(self, name: str) -> Path:
        """Return a folder's absolute path; `~` is the home folder."""
        value = self.text(name)
        if not value.strip():
            self.fault(name, "must not be blank: is a variable unset?")
        elif any(ord(one) < 32 for one in value):  # no command takes such an argument
            self.fault(name, "has a control character")
        try:
            path = Path(value).expanduser().absolute()
            if name == "AUTOMEM_BACKUP_DIR" and is_utf8(value) and not is_utf8(str(path)):
                self.fault(name, "is in a folder whose name is not UTF-8: name another one")
            return path
        except RuntimeError:
            if self.settings[name].origin != DEFAULT:  # that one is of local models, which report it
                self.fault(name, "begins with a ~ whose home folder is unknown")
            return Path("/", value)


def _setting(name: str, default: str, read: Callable[[Reader, str], Any], *, shown: bool = True) -> Any:
    """Declare a field of Config: the setting, its default as text, and the method of Reader that reads it."""
    return field(repr=shown, metadata={"name": name, "default": default, "read": read})


@dataclass(frozen=True)
class Config:
    """Everything that the scripts need, validated. Its repr shows no secret."""

    falkordb_host: str = _setting("FALKORDB_HOST", "localhost", Reader.host)
    falkordb_port: int = _setting("FALKORDB_PORT", "6379", partial(Reader.integer, low=1, high=65535))
    falkordb_username: str = _setting("FALKORDB_USERNAME", "", Reader.username)
    falkordb_password: str = _setting("FALKORDB_PASSWORD", "", Reader.text, shown=False)
    falkordb_tls: bool = _setting("FALKORDB_TLS", "false", Reader.flag)
    graph: str = _setting("FALKORDB_GRAPH", "memories", Reader.graph)
    scratch_server: str = _setting("FALKORDB_SCRATCH_SERVER", "", Reader.text)
    scratch_module: str = _setting("FALKORDB_SCRATCH_MODULE", "", Reader.text)
    qdrant_url: str = _setting("QDRANT_URL", "", Reader.qdrant_url, shown=False)
    # Used by qdrant_url alone, which also checks them.
    qdrant_host: str = _setting("QDRANT_HOST", "localhost", Reader.text)
    qdrant_port: str = _setting("QDRANT_PORT", str(_QDRANT_PORT), Reader.text)
    qdrant_node_urls: tuple[str, ...] = _setting("QDRANT_NODE_URLS", "", Reader.urls, shown=False)
    qdrant_api_key: str = _setting("QDRANT_API_KEY", "", Reader.header, shown=False)
    collection: str = _setting("QDRANT_COLLECTION", "memories", Reader.collection)
    qdrant_timeout: float = _setting("QDRANT_TIMEOUT_SECONDS", "60", partial(Reader.number, low=1, high=86400))
    vector_size: int = _setting("VECTOR_SIZE", "3072", Reader.size)
    older_vector_size: str = _setting("QDRANT_VECTOR_SIZE", "", Reader.text)  # used by `size` alone
    embedding_provider: str = _setting(PROVIDER, AUTO, Reader.text)  # used by `choice` alone
    embedding_model: str = _setting("EMBEDDING_MODEL", "text-embedding-3-large", Reader.model)
    openai_api_key: str = _setting("OPENAI_API_KEY", "", Reader.header, shown=False)
    openai_base_url: str = _setting(
        "OPENAI_BASE_URL", dimensions.OPENAI_BASE_URL, partial(Reader.url, query=True), shown=False
    )
    voyage_api_key: str = _setting("VOYAGE_API_KEY", "", Reader.header, shown=False)
    voyage_model: str = _setting("VOYAGE_MODEL", dimensions.DEFAULT_MODELS[VOYAGE], Reader.model)
    # AutoMem always asks Voyage's own endpoint: this one is for tests and proxies.
    voyage_base_url: str = _setting("VOYAGE_BASE_URL", VOYAGE_URL, Reader.url, shown=False)
    ollama_base_url: str = _setting("OLLAMA_BASE_URL", OLLAMA_URL, Reader.url, shown=False)
    ollama_model: str = _setting("OLLAMA_MODEL", dimensions.DEFAULT_MODELS[OLLAMA], Reader.model)
    ollama_timeout: float = _setting("OLLAMA_TIMEOUT", "30", partial(Reader.number, low=0.1, high=86400))
    models_dir: Path = _setting("AUTOMEM_MODELS_DIR", "~/.config/automem/models", Reader.folder)
    api_url: str = _setting("AUTOMEM_API_URL", "http://localhost:8001", Reader.url, shown=False)
    api_token: str = _setting("AUTOMEM_API_TOKEN", "", Reader.header, shown=False)
    backup_dir: Path = _setting("AUTOMEM_BACKUP_DIR", str(PROJECT_ROOT / "backups"), Reader.folder)
    recipients: str = _setting("AUTOMEM_BACKUP_RECIPIENTS", "", Reader.no_key)
    passphrase_file: str = _setting("AUTOMEM_BACKUP_PASSPHRASE_FILE", "", Reader.no_key)
    identity: str = _setting("AUTOMEM_BACKUP_IDENTITY", "", Reader.no_key)
    settings: Mapping[str, Setting] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def copies(self) -> CopyKeys:
        """The keys of encrypted copies."""
        return CopyKeys(self.recipients, self.passphrase_file, self.identity)

    @property
    def choice(self) -> EmbeddingChoice:
        """The provider and model that AutoMem chooses with these settings."""
        return dimensions.choose(self.settings, self.vector_size)

    @property
    def spec(self) -> EmbeddingSpec:
        """What decides a vector, and the provider: OpenAI if nothing decides it. A missing key is reported later."""
        choice = self.choice
        urls_and_models = {
            VOYAGE: (self.voyage_base_url, self.voyage_model),
            OLLAMA: (f"{self.ollama_base_url}/v1", self.ollama_model),
            LOCAL: (dimensions.LOCAL_URL, choice.model),
        }
        if choice.setting and choice.provider in urls_and_models:
            url, model = urls_and_models[choice.provider]
            return EmbeddingSpec(url, model, self.vector_size, choice.provider)
        return EmbeddingSpec(self.openai_base_url, self.embedding_model, self.vector_size)

    @property
    def embedding_key(self) -> str:
        """The provider's key; Ollama and local models need none."""
        return {OPENAI: self.openai_api_key, VOYAGE: self.voyage_api_key}.get(self.spec.provider, "")

    def targets(self) -> list[str]:
        """Return the graph and the collection by address and name, without a secret. One target has one spelling."""
        host = canonical_host(self.falkordb_host)
        parts = urlsplit(self.qdrant_url)
        qdrant = f"{canonical_host(parts.hostname or '')}:{parts.port}{parts.path}"
        return [f"falkordb {host}:{self.falkordb_port} {self.graph}", f"qdrant {qdrant} {self.collection}"]

    def deployment(self) -> Deployment:
        """Return the stores whose backup sets belong to this configuration."""
        graph_server = f"{self.falkordb_host}:{self.falkordb_port}"
        return Deployment(graph_server, self.graph, self.qdrant_url, self.collection)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return each setting as (name, value with secrets masked, origin)."""
        return [(name, masked(name, one.value), one.origin) for name, one in self.settings.items()]


_SETTINGS = [one for one in fields(Config) if one.metadata]
DEFAULTS: dict[str, str] = {one.metadata["name"]: one.metadata["default"] for one in _SETTINGS}


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        text = "the working directory does not exist any more: it was removed or replaced"
        step = f"change to a folder that exists, then run the same command again:\ncd {quote(str(PROJECT_ROOT))}"
        raise UsageProblem(text, next_step=step) from error


def load_config(
    environ: Mapping[str, str],
    *,
    env_file: str | None = None,
    backup_dir: str | None = None,
    cwd: Path | None = None,
    root: Path = PROJECT_ROOT,
) -> Config:
    """Read and check every setting. Raises ConfigError with all faults.

    Precedence: environment, `env_file` (or AUTOMEM_ENV_FILE), `.env` in `cwd`, `.env` in `root`,
    `~/.config/automem/.env`, defaults. An empty value counts as not set.
    """
    settings, faults, warnings = read_settings(environ, DEFAULTS, env_file, cwd or _working_directory(), root)
    if backup_dir:
        settings["AUTOMEM_BACKUP_DIR"] = Setting(backup_dir, "--backup-dir")
    reader = Reader(settings, faults)
    for name, one in settings.items():
        if not is_utf8(one.value):
            reader.fault(name, f"is {not_utf8()}")
    values = {one.name: one.metadata["read"](reader, one.metadata["name"]) for one in _SETTINGS}
    config = Config(**values, settings=settings)
    faults += _proxies(environ)
    if faults:
        raise ConfigError(faults)
    return replace(config, warnings=(*warnings, *_in_clear_text(config)))


def _in_clear_text(config: Config) -> Iterator[str]:
    """Yield a warning for each key that would be sent over a public network without encryption."""
    urls = {
        "QDRANT_API_KEY": (config.qdrant_api_key, (config.qdrant_url, *config.qdrant_node_urls)),
        "OPENAI_API_KEY": (config.openai_api_key, (config.openai_base_url,)),
        "VOYAGE_API_KEY": (config.voyage_api_key, (config.voyage_base_url,)),
        "AUTOMEM_API_TOKEN": (config.api_token, (config.api_url,)),
    }
    for name, (key, addresses) in urls.items():
        for url in addresses:
            if key and url.startswith("http://") and not is_private(urlsplit(url).hostname or ""):
                yield f"{name} is sent in clear text to {without_login(url)}: use https://, or a tunnel"
    if config.falkordb_password and not config.falkordb_tls and not is_private(config.falkordb_host):
        where = config.falkordb_host
        yield f"FALKORDB_PASSWORD is sent in clear text to {where}: set FALKORDB_TLS=true, or use a tunnel"


def _proxies(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a fault for each proxy that is not a URL. Its value is not shown: it may be part of a password."""
    for name, value in environ.items():
        if not value or name.lower() not in {"http_proxy", "https_proxy", "all_proxy"}:
            continue
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            sound = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
        except ValueError:
            sound = False
        if not sound:
            what = "is not the URL of a proxy such as http://host:3128 (in a password, # is %23, / is %2F, @ is %40)"
            yield f"{name} (environment): {what}"


def config_of(env_file: str | None, backup_dir: str | None) -> Config:
    """Return the configuration of this process."""
    return load_config(os.environ, env_file=env_file, backup_dir=backup_dir)


def require_embedding(config: Config) -> None:
    """Raise UsageProblem if no key is set, or if the model cannot make VECTOR_SIZE. Sends nothing."""
    require_embedding_key(config)
    dimensions.check_model(config.spec.model, config.vector_size, config.spec.provider)


def require_embedding_key(config: Config) -> None:
    """Raise UsageProblem if the provider's key is an example's, or if the provider is OpenAI and no key is set."""
    name = SETTING_NAMES[config.spec.provider].key
    if _PLACEHOLDER.search(config.embedding_key):
        fault = f"{name} ({config.settings[name].origin}) is a placeholder, not a key"
        raise UsageProblem(fault, next_step=f"export {name}=...\nwith the key of your account")
    if config.spec.provider != OPENAI or config.openai_api_key:
        return
    step = "export OPENAI_API_KEY=...\n(a local server that needs no key accepts any word)"
    if not config.choice.setting:
        step += f"\nwithout a key AutoMem itself uses its local model; to use it here, too:\nexport {PROVIDER}={LOCAL}"
    raise UsageProblem("OPENAI_API_KEY is not set: embeddings cannot be made", next_step=step)
