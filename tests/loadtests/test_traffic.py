"""Mixes of requests, and their bodies from a real server's metadata."""

import json
from pathlib import Path

import pytest

from loadtests.payloads import PayloadError
from loadtests.traffic import make_kind, prepare, read_kinds, ready_models
from tests.end_to_end.process import ROOT, Server

DEFAULTS = {"model": "mlp", "rows": 2}


def test_a_mix_fills_up_from_the_defaults():
    first, second = read_kinds(
        '[[request]]\nmodel = "a"\n[[request]]\nrows = 4\nweight = 0.5\npriority = 9\nwire = "json"\n', DEFAULTS
    )
    assert (first.model, first.rows, first.title) == ("a", 2, "a: 2 rows, binary")
    assert (second.model, second.rows, second.weight) == ("mlp", 4, 0.5)
    assert second.title == "mlp: 4 rows, json, priority 9"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[request", "not TOML"),
        ("[request]\n", "tables and nothing else"),
        ("[[request]]\n[other]\n", "tables and nothing else"),
        ("[[request]]\nrow = 3\n", "unknown field `row`"),
        ('[[request]]\nrows = "3"\n', "Expected `int`, got `str`"),
        ("[[request]]\nrows = 0\n", "Expected `int` >= 1"),
        ('[[request]]\nwire = "xml"\n', "Invalid enum value 'xml'"),
        ("[[request]]\npriority = 10\n", "Expected `int` <= 9"),
    ],
)
def test_a_wrong_mix_is_refused_with_its_reason(text: str, said: str):
    with pytest.raises(PayloadError) as caught:
        read_kinds(text, DEFAULTS)
    assert said in str(caught.value)


def test_a_request_needs_a_model():
    with pytest.raises(PayloadError, match="--model"):
        make_kind({"model": ""})


def test_the_shipped_mix_is_valid():
    kinds = read_kinds((ROOT / "loadtests" / "mixed.toml").read_text(), {"model": ""})
    assert {kind.model for kind in kinds} == {"minilm-l6", "magika"}


def test_bodies_carry_the_parameters_and_have_the_answers_of_the_server(server: Server):
    kind = make_kind(
        {
            "model": "mlp",
            "rows": 3,
            "wire": "json",
            "priority": 2,
            "timeout_ms": 1500,
            "client": "a",
            "variant": "unoptimized",
        }
    )
    (prepared,) = prepare(server.url + "/", [kind], bodies=2, seed=5)
    assert len(prepared.exchanges) == 2
    exchange = prepared.exchanges[0]
    parameters = json.loads(exchange.payload.body)["parameters"]
    assert (parameters["priority"], parameters["timeout"]) == (2, 1_500_000)
    assert exchange.payload.headers["slipstream-client"] == "a"
    assert exchange.payload.headers["slipstream-variant"] == "unoptimized"
    (output,) = exchange.expected.values()
    assert output.shape[0] == 3
    assert exchange.payload.body != prepared.exchanges[1].payload.body


def test_what_cannot_be_asked_is_said(server: Server, tmp_path: Path):
    with pytest.raises(PayloadError, match="answers with 404"):
        prepare(server.url, [make_kind({"model": "nothing"})], 1, 0)
    with pytest.raises(PayloadError, match=r"cannot be reached: .*refused"):
        prepare("http://127.0.0.1:9", [make_kind({"model": "mlp"})], 1, 0)


def test_models_are_found(server: Server):
    assert ready_models(server.url) == ["mlp", "slow", "two_inputs"]
