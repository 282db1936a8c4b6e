"""The embedding client over real HTTP with the real openai package, against the sandbox's endpoint."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
import sys
import threading
import time

import numpy as np
import pytest

from lib.clients.embeddings import client as client_module
from lib.clients.embeddings.answers import BadAnswer, BadInput, WrongWidth
from lib.clients.embeddings.client import EmbeddingClient
from lib.concurrency import Cancelled
from lib.dimensions import EmbeddingSpec
from lib.errors import ProviderRefused, UsageProblem
from tests.certificate import self_signed
from tests.sandbox.openai_server import OpenAIServer
from tests.sandbox.process import free_port
from tests.sandbox.vectors import vectors_for

LARGE = "text-embedding-3-large"
KEY = "sk-sandbox-0123456789abcdef"
TEXTS = [
    "the graph is the source of truth",
    "vectors live in Qdrant",
    "一个记忆",
    "emoji 🙂",
    'quotes "and"\nlines',
]

pytestmark = pytest.mark.usefixtures("clean_endpoint")


@pytest.fixture(scope="module")
def server():
    with OpenAIServer() as running:
        yield running


def client_for(server, size=768, model=LARGE, key=KEY, **options):
    return EmbeddingClient(EmbeddingSpec(server.base_url, model, size), key, **options)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_is_asked_for_an_endpoint_of_this_machine(server, monkeypatch, variable):
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")  # nobody listens there
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    vectors = client_for(server).embed(TEXTS).vectors
    assert np.allclose(vectors, vectors_for(LARGE, TEXTS, 768), atol=1e-6)


def test_a_socks_proxy_without_its_package_is_no_traceback(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(UsageProblem, match="SOCKS proxy") as caught:
        EmbeddingClient(EmbeddingSpec("http://provider.example/v1", LARGE, 768), KEY).embed(TEXTS)
    assert "socksio" in caught.value.next_step


def test_an_untrusted_certificate_is_refused_at_once_and_the_named_variable_makes_it_trusted(tmp_path, monkeypatch):
    certificate, key = self_signed(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse_over_tls, args=(listener, context), daemon=True).start()
        spec = EmbeddingSpec(f"https://localhost:{listener.getsockname()[1]}/v1", LARGE, 768)
        with pytest.raises(ProviderRefused, match="TLS failed") as untrusted:
            EmbeddingClient(spec, KEY).embed(TEXTS)
        (variable,) = re.findall(r"export (\w+)=", untrusted.value.next_step)
        monkeypatch.setenv(variable, str(certificate))
        with pytest.raises(ProviderRefused, match="401"):
            EmbeddingClient(spec, KEY).embed(TEXTS)


def refuse_over_tls(listener: socket.socket, context: ssl.SSLContext) -> None:
    with contextlib.suppress(OSError):  # until the listener is closed
        while True:
            client, _ = listener.accept()
            with contextlib.suppress(OSError), context.wrap_socket(client, server_side=True) as encrypted:
                encrypted.recv(1 << 16)
                encrypted.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                while encrypted.recv(1 << 16):  # a close with bytes unread would reset the connection: no answer
                    pass


@pytest.mark.parametrize("no_base64", [False, True])
@pytest.mark.parametrize(
    ("model", "size"),
    [
        (LARGE, 3072),
        (LARGE, 768),
        ("text-embedding-3-small", 1536),
        ("text-embedding-ada-002", 1536),
        ("all-minilm", 384),
    ],
)
def test_vectors_arrive_bit_for_bit(server, model, size, no_base64):
    server.fault(no_base64=no_base64)
    client = client_for(server, size, model)
    answer = client.embed(TEXTS)
    assert answer.vectors.dtype == np.float32
    assert np.array_equal(answer.vectors, vectors_for(model, TEXTS, size))
    assert answer.tokens == server.stats()["tokens"] > 0
    assert client.pacer.buckets() == [None, None]


def test_an_answer_in_another_order_is_put_in_order(server):
    server.fault(wrong_order=True)
    assert np.array_equal(client_for(server).embed(TEXTS).vectors, vectors_for(LARGE, TEXTS, 768))


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500, "times": 2},
        {"status": 503, "times": 1},
        {"status": 408, "times": 1},
        {"status": 409, "times": 1},
        {"status": 429, "code": "rate_limit_exceeded", "retry_after": 0.2, "times": 2},
        {"status": 200, "code": 502, "times": 1},  # a proxy reports in this form that its model's host failed
        {"cut": 0.5, "times": 2},
        pytest.param({"hang_seconds": 300, "times": 1}, marks=pytest.mark.matrix),
    ],
)
def test_what_passes_is_tried_again(server, fault):
    server.fault(**fault)
    answer = client_for(server, timeout_seconds=2 if "hang_seconds" in fault else 60).embed(TEXTS)
    assert np.array_equal(answer.vectors, vectors_for(LARGE, TEXTS, 768))
    assert server.stats()["requests"] == 1 + fault["times"]


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (
            {"status": 429, "code": "insufficient_quota", "error_type": "insufficient_quota"},
            "insufficient_quota",
        ),
        ({"status": 429, "error_type": "insufficient_quota"}, "insufficient_quota"),
        ({"status": 429, "code": "credit_balance_exhausted"}, "credit_balance_exhausted"),
        ({"status": 429, "code": "organization_usage_limit_exceeded"}, "organization_usage_limit_exceeded"),
        ({"status": 429, "code": "organization_spend_limit_exceeded"}, "organization_spend_limit_exceeded"),
        ({"status": 429, "code": "project_spend_limit_exceeded"}, "project_spend_limit_exceeded"),
        ({"status": 401, "code": "invalid_api_key"}, "401 invalid_api_key"),
        ({"status": 402, "message": "out of credit"}, "out of credit"),
        ({"status": 200, "code": 402, "message": "out of credit"}, "out of credit"),
        ({"status": 403, "code": "unsupported_country"}, "unsupported_country"),
        ({"status": 404, "code": "model_not_found"}, "model_not_found"),
    ],
)
def test_what_does_not_pass_is_asked_once(server, fault, named):
    server.fault(**fault)
    with pytest.raises(ProviderRefused, match=named) as caught:
        client_for(server).embed(TEXTS)
    assert caught.value.exit_code == 6
    assert caught.value.next_step
    assert server.stats()["requests"] == 1


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_the_key_is_in_no_message_log_or_repr(server, status, caplog):
    key = "sk-proj-SecretSecretSecret"
    server.fault(
        status=status,
        code="insufficient_quota" if status == 429 else None,
        message=f"bad key {key} or {key[:9]}***ret",
    )
    client = client_for(server, key=key, max_wait_seconds=0.2)
    with caplog.at_level(logging.DEBUG), pytest.raises((ProviderRefused, BadInput)) as caught:
        client.embed(TEXTS)
    seen: BaseException | None = caught.value
    while seen is not None:
        assert "Secret" not in f"{seen} {seen!r} {getattr(seen, 'next_step', '')}"
        assert "***ret" not in str(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    assert "Secret" not in repr(client) + str(vars(client))
    assert "Secret" not in caplog.text


@pytest.mark.parametrize("key", ["sk-a b", "sk-a\n", "sk-naïve"])
def test_a_key_that_cannot_be_one_is_refused_without_a_request(server, key):
    with pytest.raises(UsageProblem, match="OPENAI_API_KEY") as caught:
        client_for(server, key=key)
    assert "sk-" not in str(caught.value)


def test_rate_limits_without_end_are_given_up(server):
    server.fault(status=429, code="rate_limit_exceeded", retry_after=0.1)
    with pytest.raises(ProviderRefused, match=r"^Rate limit exceeded during re-embedding") as caught:
        client_for(server, max_wait_seconds=0.5).embed(TEXTS)
    for remedy in ("off-peak", "limits", "--batch-size", "run the same command again"):
        assert remedy in caught.value.next_step


def test_a_rate_limit_that_lasts_longer_than_we_wait_is_given_up_at_once(server):
    server.fault(status=429, code="rate_limit_exceeded", retry_after=3600)
    started, client = time.monotonic(), client_for(server)
    with pytest.raises(ProviderRefused, match=r"^Rate limit exceeded .* \(the next request is allowed in 3,600 s\)"):
        client.embed(TEXTS)
    assert time.monotonic() - started < 30
    assert client.pacer.waiting_seconds() == 0  # else a run that ends says "next try in"
    assert server.stats()["requests"] == 1


def test_an_endpoint_that_is_not_there(server):
    spec = EmbeddingSpec(f"http://user:hidden@127.0.0.1:{free_port()}/v1", LARGE, 768)
    with pytest.raises(ProviderRefused, match="refused") as caught:
        EmbeddingClient(spec, KEY, max_wait_seconds=0.3).embed(TEXTS)
    assert "hidden" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"wrong_count": True}, "4 vectors came back for 5 texts"),
        ({"nan": True}, "not numbers"),
        ({"nan": True, "no_base64": True}, "not numbers"),
        ({"not_unit": 1.5}, "length 1.5 instead of 1"),
        ({"not_unit": 0.0}, "length 0 instead of 1"),
    ],
)
def test_an_answer_that_does_not_fit_is_not_used(server, fault, problem):
    server.fault(**fault)
    with pytest.raises(BadAnswer, match=problem):
        client_for(server).embed(TEXTS)
    assert server.stats()["requests"] == 1


def test_indices_that_do_not_fit_end_the_run(server):
    server.fault(wrong_indices=True)
    with pytest.raises(ProviderRefused, match="do not say which vector is which text's") as caught:
        client_for(server).embed(TEXTS)
    assert caught.value.exit_code == 6
    assert server.stats()["requests"] == 1


def test_another_width_is_the_operators_to_decide(server):
    server.fault(wrong_width=192)
    with pytest.raises(WrongWidth, match="192d vectors, VECTOR_SIZE is 768") as caught:
        client_for(server).embed(TEXTS)
    assert caught.value.exit_code == 2
    server.clear_faults()
    with pytest.raises(WrongWidth, match="768d vectors, VECTOR_SIZE is 512"):
        client_for(server, 512, "nomic-embed-text").embed(TEXTS)


def test_other_models_may_answer_with_other_lengths(server):
    server.fault(not_unit=3.0)
    vectors = client_for(server, 768, "nomic-embed-text").embed(TEXTS).vectors
    assert np.allclose(vectors, vectors_for("nomic-embed-text", TEXTS, 768), atol=1e-6)


def test_a_400_is_never_sent_again(server):
    with pytest.raises(BadInput, match="input' is invalid"):
        client_for(server).embed([*TEXTS, " "])
    assert server.stats()["requests"] == 1


def test_a_setting_the_endpoint_does_not_know_is_no_bad_text(server):
    with pytest.raises(ProviderRefused, match="dimensions"):
        client_for(server, 4000).embed(TEXTS)


@pytest.mark.parametrize("fault", [{"status": 429, "retry_after": 60}, {"status": 503}])
def test_a_stop_ends_the_waiting_at_once(server, fault, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE_SECONDS", 30)
    server.fault(**fault)
    stop = threading.Event()
    threading.Timer(0.4, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        client_for(server).embed(TEXTS, stop=stop)
    assert time.monotonic() - started < 20
