"""A BERT sentence encoder with a classification head, written as an ONNX graph from its weight file."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from deploy.quickstart.graph import Array, GraphWriter

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# What a masked position adds to its attention score: after softmax nothing is left of it, in FP16 too.
_MASKED = -10000.0
_NUMPY_OF_SAFETENSORS = {"F32": np.float32, "I64": np.int64}

Weights = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """What the weight file does not say of itself; the fields of ``config.json`` that matter."""

    hidden: int
    heads: int
    layers: int
    epsilon: float


@dataclass(frozen=True, slots=True)
class Head:
    """A linear classifier on the sentence embedding.

    Attributes:
        weight: FP32 [classes, hidden].
        bias: FP32 [classes].
    """

    weight: Array
    bias: Array


def read_shape(config: Path) -> EncoderShape:
    """Read the encoder's shape from its ``config.json``."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    return EncoderShape(
        hidden=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        layers=fields["num_hidden_layers"],
        epsilon=fields["layer_norm_eps"],
    )


def read_weights(path: Path) -> dict[str, Array]:
    """Read a safetensors file: a header of JSON with its length before it, then the tensors one after the other."""
    content = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", content)
    start = 8 + header_bytes
    weights = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            dtype = np.dtype(_NUMPY_OF_SAFETENSORS[entry["dtype"]])
            begin, end = entry["data_offsets"]
            flat = np.frombuffer(content, dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
            weights[name] = flat.reshape(entry["shape"])
    return weights


def write_encoder(weights: Weights, shape: EncoderShape, path: Path, head: Head | None = None) -> None:
    """Write the encoder with mean pooling and normalization in the graph.

    Args:
        weights: The tensors of a BERT model, named as its reference implementation names them.
        shape: Its hyperparameters.
        path: The ONNX file to write. Inputs: ``input_ids``, ``attention_mask``, ``token_type_ids``, INT64
            [batch, sequence]. Outputs: with a head ``logits`` FP32 [batch, classes], which comes first because it is
            the decision; ``sentence_embedding`` FP32 [batch, hidden] of length 1.
        head: The classifier on the embedding.
    """
    encoder = _Encoder(weights, shape)
    encoder.pool(encoder.layers(encoder.embed()))
    outputs = [helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", shape.hidden])]
    if head is not None:
        encoder.classify(head)
        outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(head.weight)]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in INPUTS]
    encoder.graph.save(path, "minilm", inputs, outputs)


class _Encoder:
    """The parts of the encoder; every method takes and returns names of tensors."""

    def __init__(self, weights: Weights, shape: EncoderShape) -> None:
        self.graph = GraphWriter()
        self._weights, self._shape = weights, shape

    def embed(self) -> str:
        """Word, position and token type embeddings, normalized: FP32 [batch, sequence, hidden]."""
        graph = self.graph
        word = graph.op("Gather", self._weight("embeddings.word_embeddings.weight"), "input_ids")
        token_type = graph.op("Gather", self._weight("embeddings.token_type_embeddings.weight"), "token_type_ids")
        length = graph.op("Gather", graph.op("Shape", "input_ids"), graph.ints(1), axis=0)
        table = self._weight("embeddings.position_embeddings.weight")
        position = graph.op("Slice", table, graph.ints(0), length, graph.ints(0))
        return self._norm(graph.op("Add", graph.op("Add", word, token_type), position), "embeddings.LayerNorm")

    def layers(self, x: str) -> str:
        """All transformer layers."""
        graph = self.graph
        mask = graph.op("Cast", graph.op("Unsqueeze", "attention_mask", graph.ints(1, 2)), to=TensorProto.FLOAT)
        bias = graph.op("Mul", graph.op("Sub", graph.scalar(1.0), mask), graph.scalar(_MASKED))
        for index in range(self._shape.layers):
            layer = f"encoder.layer.{index}"
            attended = self._attention(x, bias, f"{layer}.attention.self")
            attended = self._linear(attended, f"{layer}.attention.output.dense")
            x = self._norm(graph.op("Add", attended, x), f"{layer}.attention.output.LayerNorm")
            grown = self._gelu(self._linear(x, f"{layer}.intermediate.dense"))
            shrunk = self._linear(grown, f"{layer}.output.dense")
            x = self._norm(graph.op("Add", shrunk, x), f"{layer}.output.LayerNorm")
        return x

    def pool(self, x: str) -> str:
        """Mean over the tokens that the mask lets through, scaled to length 1: FP32 [batch, hidden]."""
        graph = self.graph
        mask = graph.op("Cast", graph.op("Unsqueeze", "attention_mask", graph.ints(2)), to=TensorProto.FLOAT)
        total = graph.op("ReduceSum", graph.op("Mul", x, mask), graph.ints(1), keepdims=0)
        tokens = graph.op("Clip", graph.op("ReduceSum", mask, graph.ints(1), keepdims=0), graph.scalar(1.0))
        return graph.op("LpNormalization", graph.op("Div", total, tokens), output="sentence_embedding", axis=1, p=2)

    def classify(self, head: Head) -> str:
        """The head on the embedding: FP32 [batch, classes]."""
        weight, bias = self.graph.weight(head.weight, "head.weight"), self.graph.weight(head.bias, "head.bias")
        return self.graph.op("Gemm", "sentence_embedding", weight, bias, output="logits", transB=1)

    def _attention(self, x: str, bias: str, name: str) -> str:
        graph, shape = self.graph, self._shape
        size = shape.hidden // shape.heads
        query = self._split_heads(self._linear(x, f"{name}.query"), [0, 2, 1, 3])
        key = self._split_heads(self._linear(x, f"{name}.key"), [0, 2, 3, 1])
        value = self._split_heads(self._linear(x, f"{name}.value"), [0, 2, 1, 3])
        scores = graph.op("Div", graph.op("MatMul", query, key), graph.scalar(math.sqrt(size)))
        shares = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])
        return graph.op("Reshape", mixed, graph.ints(0, 0, shape.hidden))

    def _split_heads(self, x: str, order: list[int]) -> str:
        heads = self._shape.heads
        split = self.graph.op("Reshape", x, self.graph.ints(0, 0, heads, self._shape.hidden // heads))
        return self.graph.op("Transpose", split, perm=order)

    def _gelu(self, x: str) -> str:
        """x/2 (1 + erf(x/sqrt 2)), as the model was trained."""
        graph = self.graph
        error = graph.op("Erf", graph.op("Div", x, graph.scalar(math.sqrt(2))))
        return graph.op("Mul", graph.op("Mul", x, graph.op("Add", error, graph.scalar(1.0))), graph.scalar(0.5))

    def _linear(self, x: str, name: str) -> str:
        # Stored [out, in]; MatMul wants [in, out].
        weight = self.graph.weight(self._weights[f"{name}.weight"].T, f"{name}.weight")
        return self.graph.op("Add", self.graph.op("MatMul", x, weight), self._weight(f"{name}.bias"))

    def _norm(self, x: str, name: str) -> str:
        weight, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self.graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=self._shape.epsilon)

    def _weight(self, name: str) -> str:
        return self.graph.weight(self._weights[name], name)
