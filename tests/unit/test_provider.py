"""Differences between OpenAI-compatible servers in a request, checked before it is sent."""

from __future__ import annotations

import sys

import pytest

from lib.clients.embeddings.client import Provider
from lib.dimensions import OLLAMA, OPENAI, VOYAGE, EmbeddingSpec
from lib.errors import UsageProblem

KEY = "sk-sandbox-0123456789abcdef"


def request_of(url, model="text-embedding-3-large", size=768, provider=OPENAI):
    """The request that `send` would make, built and not sent."""
    provider = Provider(EmbeddingSpec(url, model, size, provider), KEY, 5.0)
    seen = []
    provider.client()._client.event_hooks["request"] = [seen.append]
    with pytest.raises(Exception):  # noqa: B017 - nobody answers
        provider.send(["a text"])
    provider.close()
    return seen[0]


def body_of(request):
    import orjson

    return orjson.loads(request.content)


UNREACHABLE = "http://127.0.0.1:9"


def test_dimensions_are_sent_only_if_the_model_takes_them():
    assert body_of(request_of(UNREACHABLE))["dimensions"] == 768
    assert "dimensions" not in body_of(request_of(UNREACHABLE, size=3072))
    assert "dimensions" not in body_of(request_of(UNREACHABLE, "text-embedding-ada-002", 1536))
    assert "dimensions" not in body_of(request_of(UNREACHABLE, "nomic-embed-text", 512))


def test_the_texts_are_sent_as_they_are_and_base64_is_asked_for():
    body = body_of(request_of(UNREACHABLE))
    assert (body["input"], body["encoding_format"]) == (["a text"], "base64")


@pytest.mark.parametrize("host", ["me.openai.azure.com", "me.cognitiveservices.azure.com", "me.services.ai.azure.com"])
def test_azure_gets_the_key_in_the_api_key_header_and_its_version_in_the_query(host, monkeypatch):
    spec = EmbeddingSpec(f"https://{host}/openai/deployments/large?api-version=2024-10-21", "m", 8)
    client = Provider(spec, KEY, 5.0).client()
    assert client.default_headers["api-key"] == KEY
    assert str(client.base_url) == f"https://{host}/openai/deployments/large/"
    assert client.default_query == {"api-version": "2024-10-21"}


def test_nobody_else_gets_that_header():
    for url in ("", "https://openai.azure.com.example.org/v1", UNREACHABLE):
        assert "api-key" not in Provider(EmbeddingSpec(url, "m", 8), KEY, 5.0).client().default_headers


def test_voyage_is_asked_for_a_size_by_its_parameter_name():
    provider = Provider(EmbeddingSpec("https://api.voyageai.com/v1", "voyage-3-large", 512), KEY, 5.0)
    assert provider._extra == {"output_dimension": 512}
    assert "output_dimension" not in body_of(request_of(UNREACHABLE))


def test_voyage_gets_what_automem_sends_it_and_base64():
    body = body_of(request_of(UNREACHABLE, "voyage-4", 1024, VOYAGE))
    assert body == {"model": "voyage-4", "input": ["a text"], "output_dimension": 1024, "encoding_format": "base64"}


def test_ollama_gets_model_and_texts_alone():
    body = body_of(request_of(UNREACHABLE, "text-embedding-3-large", 768, OLLAMA))
    assert body == {"model": "text-embedding-3-large", "input": ["a text"], "encoding_format": "base64"}


def test_the_package_is_imported_only_to_send(tmp_path):
    import subprocess

    code = (
        "import sys; from lib.dimensions import EmbeddingSpec; from lib.clients.embeddings.client import EmbeddingClient;"
        "EmbeddingClient(EmbeddingSpec('', 'm', 8), 'sk-x').close(); print('openai' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_key_that_cannot_be_one_is_refused_before_that():
    with pytest.raises(UsageProblem, match="OPENAI_API_KEY"):
        Provider(EmbeddingSpec("", "m", 8), "sk-a b", 5.0)
