"""The encoder's graph against the same arithmetic in numpy."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from deploy.quickstart.encoder import EncoderShape, Head, read_shape, read_weights, write_encoder

SHAPE = EncoderShape(hidden=8, heads=2, layers=2, epsilon=1e-12)
WORDS, POSITIONS, INTERMEDIATE = 20, 16, 12


def make_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = SHAPE.hidden
    shapes = {
        "embeddings.word_embeddings.weight": (WORDS, hidden),
        "embeddings.position_embeddings.weight": (POSITIONS, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for i in range(SHAPE.layers):
        linears = {f"attention.self.{kind}": (hidden, hidden) for kind in ("query", "key", "value")}
        linears |= {"attention.output.dense": (hidden, hidden)}
        linears |= {"intermediate.dense": (INTERMEDIATE, hidden), "output.dense": (hidden, INTERMEDIATE)}
        for name, shape in linears.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = shapes[f"encoder.layer.{i}.{name}.bias"] = (hidden,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def embed_in_numpy(w: dict[str, np.ndarray], ids: np.ndarray, types: np.ndarray) -> np.ndarray:
    """One text without padding -> its embedding, in float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    erf = np.vectorize(math.erf)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + SHAPE.epsilon)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][types]
    x = norm(x + w["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    size = SHAPE.hidden // SHAPE.heads
    for i in range(SHAPE.layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{layer}.attention.self.{kind}") for kind in ("query", "key", "value"))
        heads = []
        for head in range(SHAPE.heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        attended = linear(np.concatenate(heads, -1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        grown = linear(x, f"{layer}.intermediate.dense")
        grown = grown / 2 * (1 + erf(grown / math.sqrt(2)))
        x = norm(x + linear(grown, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return make_weights()


def run(path: Path, ids: list[list[int]], mask: list[list[int]]) -> list[np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.array(ids), "attention_mask": np.array(mask), "token_type_ids": np.ones_like(ids)}
    return session.run(None, feed)


def test_embedding_is_the_reference_arithmetic(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_encoder(weights, SHAPE, tmp_path / "m.onnx")
    ids = np.array([3, 7, 19, 1, 4])
    (embedding,) = run(tmp_path / "m.onnx", [ids.tolist()], [[1] * 5])
    # FP32 against float64 over two layers.
    np.testing.assert_allclose(embedding[0], embed_in_numpy(weights, ids, np.ones(5, int)), rtol=1e-4, atol=1e-5)


def test_padding_and_neighbours_do_not_change_an_embedding(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_encoder(weights, SHAPE, tmp_path / "m.onnx")
    (alone,) = run(tmp_path / "m.onnx", [[3, 7, 19]], [[1, 1, 1]])
    padded = [[3, 7, 19, 0, 0], [5, 5, 5, 5, 5]]
    (together,) = run(tmp_path / "m.onnx", padded, [[1, 1, 1, 0, 0], [1] * 5])
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-5, atol=1e-6)


def test_head_comes_first_and_acts_on_the_embedding(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    head = Head(np.ones((2, SHAPE.hidden), np.float32), np.array([0.5, -0.5], np.float32))
    write_encoder(weights, SHAPE, tmp_path / "m.onnx", head)
    assert [node.name for node in onnx.load(tmp_path / "m.onnx").graph.output] == ["logits", "sentence_embedding"]
    logits, embedding = run(tmp_path / "m.onnx", [[3, 7]], [[1, 1]])
    np.testing.assert_allclose(logits[0], embedding[0].sum() + np.array([0.5, -0.5]), rtol=1e-5, atol=1e-6)


def test_safetensors_file_is_read(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7, -8], np.int64)
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + a.tobytes() + b.tobytes())
    found = read_weights(tmp_path / "w")
    assert set(found) == {"a", "b"}
    np.testing.assert_array_equal(found["a"], a)
    np.testing.assert_array_equal(found["b"], b)


def test_config_is_read(tmp_path: Path) -> None:
    fields = {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 6, "layer_norm_eps": 1e-12, "x": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_shape(tmp_path / "config.json") == EncoderShape(384, 12, 6, 1e-12)
