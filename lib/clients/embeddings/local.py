"""Embeddings by a model in this process, loaded through the optional package fastembed as AutoMem loads it."""

from __future__ import annotations

import atexit
import importlib.util
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.concurrency import Cancelled
from lib.dimensions import EmbeddingSpec
from lib.errors import UsageProblem, one_line

if TYPE_CHECKING:
    from fastembed import TextEmbedding


class LocalModel:
    """One model on this machine, with the methods of `client.Provider`. Thread-safe.

    Args:
        models_dir: the folder of downloaded models; fastembed downloads a model that is not in it.

    Raises UsageProblem if the package is not installed.
    """

    def __init__(self, spec: EmbeddingSpec, models_dir: Path) -> None:
        if importlib.util.find_spec("fastembed") is None:
            raise UsageProblem(
                f"{spec.model} runs on this machine with the Python package 'fastembed', which is not installed here",
                next_step="python -m pip install -r requirements-local.txt",
            )
        self.name = f"{spec.model} on this machine"
        self._spec, self._models_dir = spec, models_dir
        self._model: TextEmbedding | None = None
        # One batch at a time: the model itself uses every core.
        self._running = threading.Lock()
        self._ended = False

    def client(self) -> TextEmbedding:
        """The loaded model: the first call loads it. Raises UsageProblem if it cannot be loaded or downloaded."""
        with self._running:
            if self._model is None:
                self._model = self._load()
                atexit.register(self._end)
            return self._model

    def send(self, texts: Sequence[str]) -> tuple[Mapping[str, str], bytes]:
        """No headers, and the vectors of the texts: float32, one after the other. Raises Cancelled at the end."""
        import numpy as np

        model = self.client()
        with self._running:
            if self._ended:
                raise Cancelled
            rows = list(model.embed(list(texts)))
        return {}, np.asarray(rows, dtype=np.float32).tobytes()

    def opened(self, texts: Sequence[str], _headers: Mapping[str, str], content: bytes) -> dict[str, Any]:
        """The vectors in the form of an answer of OpenAI's API. They cost no tokens."""
        import numpy as np

        rows = np.frombuffer(content, dtype=np.float32).reshape(len(texts), -1)
        return {"data": [{"embedding": row} for row in rows]}

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    def _end(self) -> None:
        """Wait for the batch that is computed, and begin no other: onnxruntime aborts a process that ends meanwhile."""
        self._ended = True
        self._running.acquire()

    def _load(self) -> TextEmbedding:
        try:
            from fastembed import TextEmbedding
            from loguru import logger

            logger.disable("fastembed")  # it logs what is reported as an error here

            self._models_dir.mkdir(parents=True, exist_ok=True)
            return TextEmbedding(model_name=self._spec.model, cache_dir=str(self._models_dir))
        except Exception as error:  # onnxruntime and tokenizers raise classes that share no other base
            raise UsageProblem(
                f"{self._spec.model} could not be loaded from {self._models_dir}, nor downloaded into it:"
                f" {one_line(str(error))}",
                next_step="connect to the network, or name the folder into which AutoMem downloaded the model:\n"
                "export AUTOMEM_MODELS_DIR=...\nthen run the same command again",
            ) from error
