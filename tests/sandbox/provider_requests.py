"""How the endpoints of OpenAI, Voyage and Ollama differ: what each takes, what it cuts, and how it words a refusal.

Voyage: https://docs.voyageai.com/reference/embeddings-api, and the texts of answers that its users reported.
Ollama: https://github.com/ollama/ollama (middleware/openai.go and server/routes.go, August 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.sandbox import openai_requests as openai
from tests.sandbox.openai_requests import ApiError, EmbeddingRequest
from tests.sandbox.vectors import NATIVE_SIZES

VOYAGE_MODELS = frozenset(model for model in NATIVE_SIZES if model.startswith("voyage-"))
VOYAGE_SIZES = (256, 512, 1024, 2048)
VOYAGE_INPUTS = 1000
VOYAGE_INPUT_TOKENS = 32_000
VOYAGE_BATCH_TOKENS = {
    "voyage-4-lite": 1_000_000,
    "voyage-3.5-lite": 1_000_000,
    "voyage-4": 320_000,
    "voyage-3.5": 320_000,
}
WRONG_VOYAGE_KEY = "pa-wrong"
# The 429 of an account without a payment method, as users reported it.
PAYMENT_NEEDED = (
    "You have not yet added your payment method in the billing page and will have reduced rate limits of 3 RPM and "
    "10K TPM. Please add your payment method in the billing page to unlock our standard rate limits."
)
OLLAMA_MODELS = frozenset(["nomic-embed-text", "mxbai-embed-large", "all-minilm"])  # those that are pulled
OLLAMA_CONTEXT = {"nomic-embed-text": 2048, "mxbai-embed-large": 512, "all-minilm": 256}
OLLAMA_LENGTH = 21.0  # of the vectors of /api/embeddings, which does not scale them to 1


@dataclass(frozen=True)
class Dialect:
    """One provider's endpoint.

    `fitted` returns the request with its texts as they are embedded, and the tokens to charge. `error_body` words an
    ApiError. `paced`: the limits of the key hold; `announced`: headers report them. `native`: AutoMem's /api/embeddings.
    """

    check_key: Callable[[str], None]
    checked: Callable[[Any], EmbeddingRequest]
    fitted: Callable[[EmbeddingRequest, Sequence[int]], tuple[EmbeddingRequest, int]]
    error_body: Callable[[ApiError], object]
    paced: bool = True
    announced: bool = False
    native: bool = False


def _openai_fitted(wanted: EmbeddingRequest, counts: Sequence[int]) -> tuple[EmbeddingRequest, int]:
    openai.check_tokens(counts)
    return wanted, sum(counts)


def _voyage_key(authorization: str) -> None:
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip() or key.startswith(WRONG_VOYAGE_KEY):
        raise ApiError(401, "Provided API key is invalid.", "")


def _voyage_request(body: Any) -> EmbeddingRequest:
    model, texts = body.get("model"), body.get("input")
    size, encoding = body.get("output_dimension", 1024), body.get("encoding_format")
    texts = [texts] if isinstance(texts, str) else texts
    if model not in VOYAGE_MODELS:
        raise ApiError(400, f"Model {model} is not supported. Supported models are {sorted(VOYAGE_MODELS)}.", "")
    if encoding not in (None, "base64"):
        raise ApiError(400, _not_valid(encoding, "encoding_format", ["base64"]), "")
    if size not in VOYAGE_SIZES:
        raise ApiError(400, _not_valid(size, "output_dimension", VOYAGE_SIZES), "")
    unknown = sorted(
        body.keys() - {"model", "input", "input_type", "truncation", "output_dimension", "encoding_format"}
    )
    if unknown:
        raise ApiError(400, f"Argument '{unknown[0]}' is not supported by our API.", "")
    if not isinstance(texts, list) or not all(isinstance(one, str) and one for one in texts):
        raise ApiError(400, "Input cannot contain empty strings or empty lists", "")
    if len(texts) > VOYAGE_INPUTS:
        raise ApiError(400, f"The batch size limit is {VOYAGE_INPUTS}. Your batch size is {len(texts)}.", "")
    return EmbeddingRequest(model, texts, size, encoding == "base64")


def _not_valid(value: object, argument: str, accepted: Sequence[object]) -> str:
    return f"Value '{value}' supplied for argument '{argument}' is not valid -- accepted values are {list(accepted)}."


def _voyage_fitted(wanted: EmbeddingRequest, counts: Sequence[int]) -> tuple[EmbeddingRequest, int]:
    wanted, total = _cut(wanted, counts, VOYAGE_INPUT_TOKENS)
    most = VOYAGE_BATCH_TOKENS.get(wanted.model, 120_000)
    if total > most:
        message = (
            f"Request to model '{wanted.model}' failed. The max allowed tokens per submitted batch is {most}. Your batch "
            f"has {total} tokens after truncation. Please lower the number of tokens in the batch."
        )
        raise ApiError(400, message, "")
    return wanted, total


def _ollama_request(body: Any) -> EmbeddingRequest:
    model = str(body.get("model")).removesuffix(":latest")
    texts = body.get("input", body.get("prompt"))
    if model not in OLLAMA_MODELS:
        raise ApiError(404, f"model '{body.get('model')}' not found", "not_found_error")
    if not texts:
        raise ApiError(400, "invalid input", "invalid_request_error")
    texts = [texts] if isinstance(texts, str) else texts
    size = min(body.get("dimensions") or NATIVE_SIZES[model], NATIVE_SIZES[model])
    return EmbeddingRequest(model, texts, size, body.get("encoding_format") == "base64")


def _ollama_fitted(wanted: EmbeddingRequest, counts: Sequence[int]) -> tuple[EmbeddingRequest, int]:
    return _cut(wanted, counts, OLLAMA_CONTEXT[wanted.model])


def _cut(wanted: EmbeddingRequest, counts: Sequence[int], limit: int) -> tuple[EmbeddingRequest, int]:
    texts = [
        openai.cut_text(text, limit) if count > limit else text
        for text, count in zip(wanted.texts, counts, strict=True)
    ]
    return replace(wanted, texts=texts), sum(min(count, limit) for count in counts)


def _detail(error: ApiError) -> object:
    return {"detail": str(error)}


def _ollama_error(error: ApiError) -> object:
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    kind = kinds.get(error.status, "api_error")
    return {"error": {"message": str(error), "type": kind, "param": None, "code": None}}


def _native_error(error: ApiError) -> object:
    return {"error": str(error)}


def _no_key(_authorization: str) -> None:
    """Ollama asks for none."""


OPENAI = Dialect(openai.check_key, openai.checked_request, _openai_fitted, lambda error: error.body, announced=True)
VOYAGE = Dialect(_voyage_key, _voyage_request, _voyage_fitted, _detail)
OLLAMA = Dialect(_no_key, _ollama_request, _ollama_fitted, _ollama_error, paced=False)
OLLAMA_NATIVE = replace(OLLAMA, error_body=_native_error, native=True)
# By path below the server's root.
DIALECTS = {
    "/v1/embeddings": OPENAI,
    "/voyage/v1/embeddings": VOYAGE,
    "/ollama/v1/embeddings": OLLAMA,
    "/ollama/api/embeddings": OLLAMA_NATIVE,
}
