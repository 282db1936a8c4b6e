from __future__ import annotations

import pytest

from lib.clients.embeddings.pricing import (
    PRICES_AS_OF,
    count_tokens,
    cut_to_tokens,
    input_limit,
    price_basis,
    price_of,
    price_text,
)
from lib.dimensions import LOCAL, LOCAL_MODELS, OLLAMA, OPENAI, VOYAGE


def test_tokens_are_counted_exactly_without_a_network(monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    # Counts as OpenAI's tokenizer page shows them for cl100k_base.
    assert count_tokens(["hello world", "", "tiktoken is great!", "antidisestablishmentarianism"]) == [
        2,
        0,
        6,
        6,
    ]


def test_text_that_looks_like_a_control_token_is_only_text():
    assert count_tokens(["<|endoftext|>"]) == [7]


def test_prices_by_model():
    assert price_of(1_000_000, "text-embedding-3-small") == 0.02
    assert price_of(1_000_000, "text-embedding-3-large") == 0.13
    assert price_of(1_000_000, "text-embedding-ada-002") == 0.10
    assert price_of(1_000_000, "nomic-embed-text") is None
    assert PRICES_AS_OF.startswith("20")
    assert input_limit("text-embedding-3-large") == 8192
    assert input_limit("nomic-embed-text") is None


def test_prices_and_limits_of_the_other_providers():
    assert price_of(1_000_000, "voyage-4", VOYAGE) == 0.06
    assert price_of(1_000_000, "voyage-9", VOYAGE) is None
    assert price_of(1_000_000, "nomic-embed-text", OLLAMA) == price_of(1_000_000, LOCAL_MODELS[768], LOCAL) == 0
    assert input_limit("voyage-4-lite", VOYAGE) == 32_000
    assert input_limit("nomic-embed-text", OLLAMA) == 2048
    assert input_limit(LOCAL_MODELS[384], LOCAL) == 512


def test_what_a_price_says_of_its_provider():
    assert price_text(0.0, OLLAMA) + price_basis(0.0, OLLAMA) == "free: runs on your Ollama server"
    assert price_text(0.0, LOCAL) + price_basis(0.0, LOCAL) == "free: runs on this machine"
    assert price_text(0.5, OPENAI) + price_basis(0.5, OPENAI) == f"$0.5000 (list prices of {PRICES_AS_OF})"
    assert price_text(0.5, VOYAGE) == "$0.5000"
    assert "an estimate" in price_basis(0.5, VOYAGE)
    assert price_text(None) + price_basis(None, OPENAI) == "unknown (no list price for this model)"


@pytest.mark.parametrize("text", ["word " * 9000, "这是一个很长的记忆。" * 2000, "🙂🙃" * 5000, "a" * 70000])
def test_a_long_text_is_cut_at_the_limit_and_not_inside_a_character(text):
    cut = cut_to_tokens(text, 8191)
    assert text.startswith(cut)
    assert 8185 <= count_tokens([cut])[0] <= 8191


def test_a_short_text_stays_as_it_is():
    assert cut_to_tokens("short", 8191) == "short"
