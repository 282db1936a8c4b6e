"""A tiny ONNX model in a folder of models, under the name of one of AutoMem's local models, for fastembed to load.

It has the files, the inputs and the output size of the real one. Its vector of a text is the sum of one random
direction per word, so that texts that share words are near each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_FLOAT, _INT64 = 1, 7  # TensorProto.DataType
_INT, _INTS = 2, 7  # AttributeProto.AttributeType
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write_local_model(models_dir: Path, model: str, texts: Iterable[str], context: int = 512) -> None:
    """Write the model into the cache folder as huggingface_hub lays it out. It knows the words of `texts`.

    `model` is a name that the installed fastembed knows; longer texts are cut to `context` tokens.
    """
    from fastembed import TextEmbedding
    from huggingface_hub.file_download import repo_folder_name

    known = next(one for one in TextEmbedding.list_supported_models() if one["model"] == model)
    repo = models_dir / repo_folder_name(repo_id=known["sources"]["hf"], repo_type="model")
    folder = repo / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    words = _write_tokenizer(folder, texts, context)
    (folder / "config.json").write_text(json.dumps({"pad_token_id": 0}))
    table = np.random.default_rng(len(model)).standard_normal((words, known["dim"])).astype("<f4")
    table[: len(SPECIAL)] = 0  # padding must not change a vector
    (folder / known["model_file"]).write_bytes(_onnx(table))


def _write_tokenizer(folder: Path, texts: Iterable[str], context: int) -> int:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel({}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=list(SPECIAL)))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_max_length": context, "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return int(tokenizer.get_vocab_size())


def _onnx(table: np.ndarray) -> bytes:
    """The model as ONNX's protobuf (onnx.proto3): ReduceSum(Gather(table, input_ids)) over the tokens of a text."""
    axes = _field(1, "axes") + _number(8, 1) + _number(20, _INTS)
    keepdims = _field(1, "keepdims") + _number(3, 0) + _number(20, _INT)
    gather = _field(1, "table") + _field(1, "input_ids") + _field(2, "words") + _field(4, "Gather")
    added = _field(1, "words") + _field(2, "sentence_embedding") + _field(4, "ReduceSum")
    added += _field(5, axes) + _field(5, keepdims)
    tensor = b"".join(_number(1, size) for size in table.shape)
    tensor += _number(2, _FLOAT) + _field(8, "table") + _field(9, table.tobytes())
    graph = _field(1, gather) + _field(1, added) + _field(2, "tiny") + _field(5, tensor)
    graph += _field(11, _value("input_ids", _INT64, ["batch", "tokens"]))
    graph += _field(12, _value("sentence_embedding", _FLOAT, ["batch", table.shape[1]]))
    return _number(1, 7) + _field(7, graph) + _field(8, _field(1, "") + _number(2, 12))


def _value(name: str, kind: int, shape: list[str | int]) -> bytes:
    sizes = (_field(2, one) if isinstance(one, str) else _number(1, one) for one in shape)
    dims = b"".join(_field(1, one) for one in sizes)
    return _field(1, name) + _field(2, _field(1, _number(1, kind) + _field(2, dims)))


def _field(number: int, value: bytes | str) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
