"""Texts, tokens and the head of the text model."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from deploy.quickstart.minilm import SEQUENCE, LabelledTexts, choose, encode, fit_head, open_tokenizer, read_texts


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(100)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    # The real file pads to 128 tokens; opening it must switch that off.
    made.enable_padding(length=128)
    made.save(str(tmp_path / "tokenizer.json"))
    return open_tokenizer(tmp_path / "tokenizer.json")


def test_texts_are_padded_to_the_longest(tokenizer: Tokenizer) -> None:
    inputs = encode(tokenizer, ["w0 w1 w2", "w3"])
    assert inputs["input_ids"].tolist() == [[2, 3, 4], [5, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert not inputs["token_type_ids"].any()
    assert {array.dtype for array in inputs.values()} == {np.dtype(np.int64)}


def test_fixed_length_pads_and_cuts(tokenizer: Tokenizer) -> None:
    inputs = encode(tokenizer, [" ".join(["w1"] * 90), "w2"], SEQUENCE)
    assert inputs["input_ids"].shape == (2, SEQUENCE)
    assert inputs["attention_mask"].sum(axis=1).tolist() == [SEQUENCE, 1]


def test_csv_with_line_breaks_in_texts_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,label\n"two\nlines, one ""text""",1\nplain,0\n', encoding="utf-8")
    found = read_texts(tmp_path / "t.csv")
    assert found.texts == ['two\nlines, one "text"', "plain"]
    assert found.labels.tolist() == [1, 0]


def test_chosen_texts_are_distinct_and_not_among_the_excluded() -> None:
    source = LabelledTexts([f"t{i % 50}" for i in range(100)], [i % 50 % 2 for i in range(100)])
    excluded = LabelledTexts([f"t{i}" for i in range(10)], [0] * 10)
    chosen = choose(source, 30, without=excluded)
    assert len(set(chosen.texts)) == 30
    assert not set(chosen.texts) & set(excluded.texts)
    assert all(int(text[1:]) % 2 == label for text, label in zip(chosen.texts, chosen.labels, strict=True))
    assert choose(source, 30, without=excluded).texts == chosen.texts
    assert len(choose(source, 1000, without=excluded).texts) == 40


def test_head_separates_what_is_separable() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    embeddings = rng.standard_normal((200, 8)).astype(np.float32) + 3 * labels[:, None] + 5
    head = fit_head(embeddings, labels)
    logits = embeddings @ head.weight.T + head.bias
    assert head.weight.dtype == head.bias.dtype == np.float32
    assert (logits.argmax(axis=1) == labels).mean() > 0.98


def test_head_shrinks_with_the_ridge_but_keeps_the_prior() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((100, 4)).astype(np.float32)
    labels = np.array([1] * 80 + [0] * 20)
    head = fit_head(embeddings, labels, ridge=1e9)
    assert np.abs(head.weight).max() < 1e-6
    np.testing.assert_allclose(head.bias, [-0.6, 0.6], atol=1e-5)
