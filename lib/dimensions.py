"""Embedding models, the sizes that they make, the dimension check; the provider and model that AutoMem chooses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from shlex import quote
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from lib.env_files import DEFAULT, Setting
from lib.errors import DimensionMismatch, UsageProblem, did_you_mean
from lib.network import is_this_machine

UNKNOWN_MODEL = "unknown"  # in a manifest, if nothing says which model made the vectors
# The providers that AutoMem can use (its EMBEDDING_PROVIDER), but for placeholder vectors.
OPENAI, VOYAGE, OLLAMA, LOCAL = "openai", "voyage", "ollama", "local"
OPENAI_BASE_URL = "https://api.openai.com/v1"
LOCAL_URL = "local:fastembed"  # the endpoint of models that run in this process
# The models that AutoMem chooses by size for the provider `local`.
LOCAL_MODELS = {384: "BAAI/bge-small-en-v1.5", 768: "BAAI/bge-base-en-v1.5", 1024: "BAAI/bge-large-en-v1.5"}


class SettingNames(NamedTuple):
    """The settings that an operator changes to use another key, model or endpoint of one provider."""

    key: str
    model: str
    endpoint: str


SETTING_NAMES = {
    OPENAI: SettingNames("OPENAI_API_KEY", "EMBEDDING_MODEL", "OPENAI_BASE_URL"),
    VOYAGE: SettingNames("VOYAGE_API_KEY", "VOYAGE_MODEL", "VOYAGE_BASE_URL"),
    OLLAMA: SettingNames("", "OLLAMA_MODEL", "OLLAMA_BASE_URL"),
    LOCAL: SettingNames("", "EMBEDDING_PROVIDER", "AUTOMEM_MODELS_DIR"),
}


class ModelFacts(NamedTuple):
    """`native`: the size of an answer to a request that names none. `unit`: documented to be vectors of length 1.

    `sizes` are the others that the model is trained for: a larger vector of it, cut to one of them and scaled to
    length 1, is its vector of that size.
    """

    native: int | None
    sizes: Collection[int] = ()
    unit: bool = True


# https://platform.openai.com/docs/guides/embeddings, https://docs.voyageai.com/docs/embeddings. Ollama's
# nomic-embed-text and the local models make one size: AutoMem asks them for none.
_VOYAGE = ModelFacts(1024, (256, 512, 2048))
_MODELS = {
    "text-embedding-3-small": ModelFacts(1536, range(1, 1536)),
    "text-embedding-3-large": ModelFacts(3072, range(1, 3072)),
    "text-embedding-ada-002": ModelFacts(1536),
    **dict.fromkeys(("voyage-4-large", "voyage-4", "voyage-4-lite", "voyage-3-large"), _VOYAGE),
    **dict.fromkeys(("voyage-3.5", "voyage-3.5-lite", "voyage-code-3"), _VOYAGE),
    "nomic-embed-text": ModelFacts(768, unit=False),
    **{model: ModelFacts(size, unit=False) for size, model in LOCAL_MODELS.items()},
}


@dataclass(frozen=True)
class EmbeddingSpec:
    """The endpoint, model and size that decide a text's vector. The endpoint's URL may hold a login or a key.

    Each provider has its own endpoint, so that `provider` decides nothing more: it names the protocol and its limits.
    """

    base_url: str = field(repr=False)
    model: str
    size: int
    provider: str = field(default=OPENAI, compare=False)


def bare_model(model: str) -> str:
    """Return the model without a gateway's prefix (`openai/text-embedding-3-large`) and Ollama's tag `:latest`."""
    model = model.removesuffix(":latest")
    name = model.rpartition("/")[2]
    return name if name in _MODELS else model


def same_model(one: object, other: object) -> bool:
    """Whether two names mean one model."""
    return bare_model(str(one)) == bare_model(str(other))


def provider_of(record: Mapping[str, Any]) -> str:
    """Return the provider that a stamp, a manifest's component or a journal names. One without is OpenAI's."""
    return str(record.get("provider") or OPENAI)


def provider_fact(provider: str) -> dict[str, str]:
    """Return what such a record holds of the provider: nothing if it is OpenAI, as in records of earlier versions."""
    return {} if provider == OPENAI else {"provider": provider}


def is_model_of(record: Mapping[str, Any], spec: EmbeddingSpec) -> bool:
    """Whether a stamp names the model and the provider of `spec`."""
    return same_model(record.get("model"), spec.model) and provider_of(record) == spec.provider


def facts_of(model: str) -> ModelFacts:
    """Return what is known of the model; of an unknown one `native` is None."""
    return _MODELS.get(bare_model(model), ModelFacts(None, unit=False))


def similar_model(model: str) -> str:
    """Return ` (did you mean ...?)` if an unknown model's name resembles a known one's, else an empty text."""
    return did_you_mean(model.rpartition("/")[2], _MODELS) if facts_of(model).native is None else ""


def takes_dimensions(model: str) -> bool:
    """Whether OpenAI's API accepts `dimensions` for this model."""
    return bare_model(model).startswith("text-embedding-3-")


def model_fault(model: str, size: int, provider: str = OPENAI) -> str | None:
    """Return why `model` cannot make vectors of `size`, or None. An unknown model is checked by its first answer."""
    native, others, _ = facts_of(model)
    if native is None or size == native or size in others:
        return None
    every = "d, ".join(map(str, sorted([*others, native])))
    made = f"at most {native}d vectors" if isinstance(others, range) else f"{every}d vectors only"
    name = "local model" if provider == LOCAL else SETTING_NAMES[provider].model
    return f"{name} {model} makes {made}, VECTOR_SIZE is {size}"


def check_model(model: str, size: int, provider: str = OPENAI) -> None:
    """Raise UsageProblem if `model` cannot make vectors of `size`."""
    fault = model_fault(model, size, provider)
    if fault is None:
        return
    native, others, _ = facts_of(model)
    sizes = LOCAL_MODELS if provider == LOCAL else [native or size, *others]
    step = f"export VECTOR_SIZE={min(sizes, key=lambda one: (abs(one - size), one))}"
    if provider == OPENAI:
        larger = "text-embedding-3-large" if size <= 3072 else "..."
        step = f"export EMBEDDING_MODEL={larger}\nor:\nexport VECTOR_SIZE={native}"
    raise UsageProblem(fault, next_step=step)


def check_dimension(collection: str, actual: int, configured: int) -> None:
    """Raise DimensionMismatch if the sizes differ; stderr then starts with its ValueError, as AutoMem's guide says."""
    if actual == configured:
        return
    raise DimensionMismatch(
        f"VECTOR DIMENSION MISMATCH\nQdrant collection '{collection}': {actual}d\nConfig VECTOR_SIZE: {configured}d",
        next_step=f"keep the collection:\nexport VECTOR_SIZE={actual}\n"
        "or migrate it:\npython scripts/backup_automem.py && python scripts/reembed_embeddings.py",
    )


def public_url(base_url: str) -> str:
    """Return `base_url` without credentials, query and closing slash; OpenAI's URL if it is empty."""
    parts = urlsplit(base_url.strip() or OPENAI_BASE_URL)
    host = parts.netloc.rpartition("@")[2].lower()
    return urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), "", ""))


AUTO, PLACEHOLDER = "auto", "placeholder"
PROVIDER = "EMBEDDING_PROVIDER"
_OPENAI_KEY, _VOYAGE_KEY = "OPENAI_API_KEY", "VOYAGE_API_KEY"
# With EMBEDDING_PROVIDER=auto the first of these that is set decides.
_DECIDING = {_VOYAGE_KEY: VOYAGE, _OPENAI_KEY: OPENAI, "OLLAMA_BASE_URL": OLLAMA, "OLLAMA_MODEL": OLLAMA}
# AutoMem's defaults; the guide's EMBEDDING_MODEL is text-embedding-3-large. VECTOR_SIZE decides the local model.
DEFAULT_MODELS = {VOYAGE: "voyage-4", OPENAI: "text-embedding-3-small", OLLAMA: "nomic-embed-text"}
_KEYS = {one: SETTING_NAMES[one].key for one in (VOYAGE, OPENAI)}
MODEL_SETTINGS = {one: SETTING_NAMES[one].model for one in DEFAULT_MODELS}
ENDPOINT_SETTINGS = {one: SETTING_NAMES[one].endpoint for one in DEFAULT_MODELS}
# AutoMem replaces the small model by the large one if VECTOR_SIZE is more than the small one makes.
_SMALL, _LARGE, _SMALL_SIZE = "text-embedding-3-small", "text-embedding-3-large", 1536
_SIZES = {VOYAGE: (256, 512, 1024, 2048), LOCAL: tuple(LOCAL_MODELS)}
_NAMES = {VOYAGE: "Voyage", OPENAI: "OpenAI", OLLAMA: "Ollama", LOCAL: "the local model"}
# AutoMem sends `dimensions` only if OPENAI_BASE_URL contains this.
_OPENAI_HOST = "api.openai.com"


class EmbeddingChoice(NamedTuple):
    """What AutoMem uses, the setting that decided it ("" if none), why, and why it cannot embed so ("" if it can)."""

    provider: str
    model: str
    setting: str
    reason: str
    fault: str = ""


def choose(settings: Mapping[str, Setting], size: int) -> EmbeddingChoice:
    """Return what AutoMem chooses if `size` is its VECTOR_SIZE. A default of these scripts counts as not set."""
    values = {name: one.value for name, one in settings.items() if one.origin != DEFAULT}
    provider = values.get(PROVIDER, AUTO).strip().lower()
    setting, reason = PROVIDER, "no provider is set"
    unfit = _VOYAGE_KEY in values and size not in _SIZES[VOYAGE]
    if provider == AUTO:
        usable = [name for name in _DECIDING if name in values and not (name == _VOYAGE_KEY and unfit)]
        setting = usable[0] if usable else ""
        provider = _DECIDING.get(setting, LOCAL)
    if setting:
        what = f"is {provider}" if setting == PROVIDER else "is set"
        reason = f"{setting} {what} in {settings[setting].place}"
    if setting != PROVIDER and unfit:
        reason += f", and Voyage (VOYAGE_API_KEY in {settings[_VOYAGE_KEY].place}) makes no {size}d vectors"
    model = LOCAL_MODELS.get(size, LOCAL_MODELS[768]) if provider == LOCAL else ""
    if provider in DEFAULT_MODELS:
        model = values.get(MODEL_SETTINGS[provider], DEFAULT_MODELS[provider]).strip()
    if provider == OPENAI and size > _SMALL_SIZE and model.endswith(_SMALL):
        model = model.removesuffix(_SMALL) + _LARGE
    return EmbeddingChoice(provider, model, setting, reason, _fault(provider, values, size))


def _fault(provider: str, values: Mapping[str, str], size: int) -> str:
    """Return why this provider cannot embed with these settings, or ""."""
    if provider == PLACEHOLDER:
        return f"{PROVIDER}={PLACEHOLDER} makes vectors without meaning: recall finds nothing with them"
    if provider not in _NAMES:
        return f"{PROVIDER} must be one of {', '.join([AUTO, *_NAMES])}"
    key = _KEYS.get(provider)
    if key and key not in values:
        return f"{key} is not set: embeddings cannot be made"
    if size not in _SIZES.get(provider, (size,)):
        possible = ", ".join(map(str, _SIZES[provider]))
        return f"{_NAMES[provider]} makes vectors of {possible} dimensions, VECTOR_SIZE is {size}"
    return ""


def is_plain(settings: Mapping[str, Setting], provider: str) -> bool:
    """Whether the provider is OpenAI and no other one has a setting that could choose it: the guide's case."""
    others = [name for name, one in _DECIDING.items() if one != OPENAI]
    return provider == OPENAI and all(settings[name].origin == DEFAULT for name in others)


def reason_shown(settings: Mapping[str, Setting], spec: EmbeddingSpec) -> str:
    """Return why the provider of `spec` is used, as the plan prints it; "" in the guide's case."""
    if is_plain(settings, spec.provider):
        return ""
    other = "" if spec.provider == OPENAI else f"; {PROVIDER}={OPENAI} chooses OpenAI"
    return f"because {choose(settings, spec.size).reason}{other}"


def model_settings(provider: str, model: str, *, named: bool) -> dict[str, str]:
    """Return the settings that select a model; VECTOR_SIZE selects a local one. `named`: even the provider OpenAI."""
    settings = {PROVIDER: provider} if named or provider != OPENAI else {}
    setting = MODEL_SETTINGS.get(provider)
    return {**settings, setting: model} if setting else settings


def provider_problem(settings: Mapping[str, Setting], spec: EmbeddingSpec) -> UsageProblem | None:
    """Return why no vectors can be made (but for OPENAI_API_KEY), or why AutoMem would ask with another model's."""
    choice, name = choose(settings, spec.size), MODEL_SETTINGS[OPENAI]
    if problem := _unusable(settings, choice, spec.size) or _other_choice(settings, choice, spec.size):
        return problem
    if spec.provider == OPENAI and settings[name].origin == DEFAULT and spec.size <= _SMALL_SIZE:
        fault = f"{name} is not set: at {spec.size}d AutoMem then uses {_SMALL}, these scripts {spec.model}"
        step = f"export {name}={_SMALL}\n(or {spec.model}), and write that line into AutoMem's .env, without export"
        return UsageProblem(fault, next_step=step)
    fault = native_size_fault(spec)
    if fault and not is_this_machine(spec.base_url):  # which may be a proxy that shortens the vectors
        size, url = facts_of(spec.model).native, f"https://{_OPENAI_HOST}/v1"
        return UsageProblem(fault, next_step=f"export VECTOR_SIZE={size}\nor:\nexport OPENAI_BASE_URL={url}")
    return None


def _unusable(settings: Mapping[str, Setting], choice: EmbeddingChoice, size: int) -> UsageProblem | None:
    """Return the problem that the provider that is set cannot embed. A missing OPENAI_API_KEY is left to the caller."""
    if not choice.fault or not choice.setting or choice.provider == OPENAI:
        return None
    steps = [f"export {PROVIDER}={OPENAI}"]
    key, sizes = _KEYS.get(choice.provider), _SIZES.get(choice.provider)
    if key and settings[key].origin == DEFAULT:
        steps.insert(0, f"export {key}=...")
    elif sizes:
        steps.insert(0, f"export VECTOR_SIZE={min(sizes, key=lambda one: (abs(one - size), -one))}")
    return UsageProblem(f"{choice.fault} ({choice.reason})", next_step="\nor:\n".join(steps))


def _other_choice(settings: Mapping[str, Setting], ours: EmbeddingChoice, size: int) -> UsageProblem | None:
    """Return the problem that AutoMem's own files choose another provider or model than all settings together."""
    names = (PROVIDER, *_DECIDING, *MODEL_SETTINGS.values())
    automems = {name: [one for one in (settings[name], *settings[name].hidden) if one.automem] for name in names}
    own = {name: found[0] for name, found in automems.items() if found}
    if not own.keys() - {MODEL_SETTINGS[OPENAI]}:
        return None  # AutoMem has them from elsewhere
    theirs = choose(own, size)
    if not theirs.setting:  # its keys are in its environment, as they are here
        theirs = choose({**{name: settings[name] for name in _DECIDING}, **own}, size)
    alike = theirs.provider == OPENAI or same_model(theirs.model, ours.model)
    if theirs.provider == ours.provider and alike:
        return None
    decisive = own.get(theirs.setting) or next(iter(own.values()))
    file = decisive.origin.rpartition(":")[0]
    steps = [f"in {file}:", *(f"  {line}" for line in _lines(ours))]
    if theirs.provider in _NAMES:
        steps += ["or here:", f"export {' '.join(_lines(theirs))}"]
    return UsageProblem(
        f"AutoMem will use {_named(theirs)}, because {theirs.reason}.\n"
        f"These settings choose {_named(ours)}, because {ours.reason}: recall would find nothing",
        next_step="\n".join(steps),
    )


def _lines(choice: EmbeddingChoice) -> list[str]:
    settings = model_settings(choice.provider, choice.model, named=True)
    return [f"{name}={quote(value)}" for name, value in settings.items()]


def _named(choice: EmbeddingChoice) -> str:
    return f"{choice.model} of {_NAMES[choice.provider]}" if choice.provider in _NAMES else f"'{choice.provider}'"


def native_size_fault(spec: EmbeddingSpec) -> str:
    """Return why AutoMem would get vectors of another size from a gateway than from OpenAI's own endpoint, or ""."""
    native = facts_of(spec.model).native
    shortened = native is not None and spec.size < native and takes_dimensions(spec.model)
    if spec.provider != OPENAI or not shortened or _OPENAI_HOST in spec.base_url:
        return ""
    gets = f"it gets {native}d vectors of {spec.model}, not {spec.size}d, and stores placeholder vectors"
    return f"AutoMem sends no `dimensions` to {urlsplit(spec.base_url).hostname} (OPENAI_BASE_URL): {gets}"
