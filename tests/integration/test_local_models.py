"""Models that run in this process: fastembed's own loading code, on a tiny model that the test writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from lib.clients.embeddings import client as clients
from lib.clients.embeddings.answers import WrongWidth
from lib.clients.embeddings.cache import EmbeddingCache, TextRow
from lib.clients.embeddings.client import EmbeddingClient
from lib.clients.embeddings.worker_pool import embed_missing
from lib.concurrency import Cancelled
from lib.dimensions import LOCAL, LOCAL_MODELS, LOCAL_URL, EmbeddingSpec
from lib.errors import ProviderRefused, UsageProblem
from tests.sandbox.automem_embedding import EMBEDDING_DEFAULTS, Embedder
from tests.sandbox.local_model import write_local_model

needs_fastembed = pytest.mark.skipif(
    importlib.util.find_spec("fastembed") is None, reason="pip install -r requirements-local.txt"
)
TEXTS = [f"memory {n} about {topic}" for n in range(20) for topic in ("the graph", "vectors", "coffee")]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for size in LOCAL_MODELS:
        write_local_model(folder, LOCAL_MODELS[size], TEXTS, context=64)
    return folder


def client_for(folder, size=384, model=""):
    return EmbeddingClient(EmbeddingSpec(LOCAL_URL, model or LOCAL_MODELS[size], size, LOCAL), "", models_dir=folder)


@needs_fastembed
@pytest.mark.parametrize("size", LOCAL_MODELS)
def test_each_model_makes_its_size_and_automem_the_same_vectors(models_dir, size):
    client = client_for(models_dir, size)
    rows = client.embed(TEXTS[:3]).vectors
    assert rows.shape == (3, size)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    settings = {**EMBEDDING_DEFAULTS, "EMBEDDING_PROVIDER": "local", "AUTOMEM_MODELS_DIR": str(models_dir)}
    assert np.allclose(Embedder(settings, size).embed(TEXTS[1]), rows[1], atol=1e-5)
    assert client.billed_tokens == 0
    client.close()


@needs_fastembed
def test_a_model_that_automem_downloaded_with_an_older_fastembed_is_found(tmp_path):
    """fastembed 0.4.2, which AutoMem 0.16 pins, writes the folder's name in lower case."""
    write_local_model(tmp_path, LOCAL_MODELS[384], TEXTS)
    (folder,) = tmp_path.iterdir()
    folder.rename(tmp_path / folder.name.lower())
    assert client_for(tmp_path).embed(TEXTS[:2]).vectors.shape == (2, 384)


@needs_fastembed
def test_the_workers_store_every_vector_once_and_for_nothing(models_dir, tmp_path):
    client = client_for(models_dir)
    with EmbeddingCache(tmp_path / "cache" / "memories.sqlite3") as cache:
        rows = [TextRow(cache.text_key(client.spec, text), text, f"id-{n}") for n, text in enumerate(TEXTS)]
        outcome = embed_missing(client, rows, cache.put_vectors, workers=4, batch_size=100)
        found = cache.get_vectors([row.key for row in rows])
    assert (outcome.embedded, outcome.requests, outcome.tokens, outcome.refused) == (len(TEXTS), 4, 0, [])
    stored = np.array([np.frombuffer(found[row.key], "<f4") for row in rows])
    assert np.allclose(stored, client.embed(TEXTS).vectors, atol=1e-5)
    near = stored @ stored.T
    assert near[0, 3] > near[0, 1] + 0.1  # `memory 1 about the graph` and `memory 0 about vectors`


@needs_fastembed
def test_a_text_over_the_context_is_cut_by_the_model_and_reported(models_dir, tmp_path):
    long = "graph " * 600
    client = client_for(models_dir)
    outcome = embed_missing(client, [TextRow(b"k" * 16, long, "m1")], lambda _pairs: None, workers=1, batch_size=10)
    assert (outcome.embedded, outcome.cut) == (1, ["m1"])
    assert np.allclose(client.embed([long]).vectors, client.embed(["graph " * 64]).vectors, atol=1e-5)


@needs_fastembed
def test_another_width_than_the_models_is_refused(models_dir):
    with pytest.raises(WrongWidth, match="384d vectors, VECTOR_SIZE is 512"):
        client_for(models_dir, 512, LOCAL_MODELS[384]).embed(TEXTS)


@needs_fastembed
def test_a_run_that_ends_stops_before_the_next_batch(models_dir):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        client_for(models_dir).embed(TEXTS, stop=stop)


_ENDS_WHILE_IT_EMBEDS = """
import importlib.util, sys, threading, time
from pathlib import Path
from lib.clients.embeddings.client import LocalModel
from lib.dimensions import EmbeddingSpec

class Model:
    def embed(self, texts):
        started.set()
        time.sleep(0.5)
        print("embedded", flush=True)
        return [[1.0]]

def embed():
    while True:
        model.send(["a"])

started = threading.Event()
importlib.util.find_spec = lambda name: name
LocalModel._load = lambda self: Model()
model = LocalModel(EmbeddingSpec("", "m", 1, "local"), Path())
threading.Thread(target=embed, daemon=True).start()
started.wait()
sys.exit(130)
"""


def test_a_process_that_ends_waits_for_the_batch_that_is_computed():
    """Otherwise onnxruntime aborts it: exit code 134."""
    done = subprocess.run([sys.executable, "-c", _ENDS_WHILE_IT_EMBEDS], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.split()) == (130, [b"embedded"])


@needs_fastembed
@pytest.mark.parametrize("damage", ["absent", "damaged"])
def test_a_model_that_cannot_be_loaded_names_its_folder(tmp_path, monkeypatch, damage):
    from fastembed.common import model_management

    monkeypatch.setattr(model_management.time, "sleep", lambda _seconds: None)  # its own pauses between downloads
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if damage == "damaged":
        write_local_model(tmp_path / "models", LOCAL_MODELS[384], TEXTS)
        (weights,) = (tmp_path / "models").rglob("*.onnx")
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageProblem, match="could not be loaded from") as caught:
        client_for(tmp_path / "models").embed(TEXTS)
    assert str(tmp_path / "models") in str(caught.value)
    assert "AUTOMEM_MODELS_DIR" in caught.value.next_step


@needs_fastembed
def test_a_model_that_fails_while_it_embeds_ends_the_run_with_a_next_step(tmp_path):
    """As with a file of another version, or too little memory: onnxruntime's errors share no class."""
    write_local_model(tmp_path, LOCAL_MODELS[384], TEXTS)
    (tokenizer,) = tmp_path.rglob("tokenizer.json")
    tokens = json.loads(tokenizer.read_text())
    words = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {word: number + 10_000 * (number > 3) for word, number in words.items()}
    tokenizer.write_text(json.dumps(tokens))
    with pytest.raises(ProviderRefused, match=r"on this machine failed: .*out of data bounds") as caught:
        client_for(tmp_path).embed(TEXTS)
    assert str(tmp_path) in caught.value.next_step


def test_a_missing_package_is_named_before_anything_is_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr(clients.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageProblem, match="'fastembed', which is not installed here") as caught:
        client_for(tmp_path)
    assert caught.value.exit_code == 2
    assert caught.value.next_step == "python -m pip install -r requirements-local.txt"
    assert list(tmp_path.iterdir()) == []


@needs_fastembed
def test_nothing_of_it_is_loaded_before_the_first_text(tmp_path):
    code = (
        "import sys; from lib.dimensions import EmbeddingSpec; from lib.clients.embeddings.client import EmbeddingClient;"
        f"spec = EmbeddingSpec({LOCAL_URL!r}, {LOCAL_MODELS[384]!r}, 384, 'local');"
        "from pathlib import Path; EmbeddingClient(spec, '', models_dir=Path()).close();"
        "print({'fastembed', 'onnxruntime', 'openai'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
