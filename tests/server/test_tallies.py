"""Histograms of our own against those of the client library."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest

from server.tallies import Tallies

BOUNDS = (0.1, 0.5, 1.0, 8.0)


def text_of(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_exposition_is_that_of_the_client_library() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies = Tallies("seconds", "How long.", ("model", "version"), BOUNDS, ours)
    histogram = Histogram("seconds", "How long.", ("model", "version"), buckets=BOUNDS, registry=theirs)
    values = [*np.random.default_rng(0).exponential(1.0, 100).tolist(), *BOUNDS, 0.0, 9.0, 100.0]
    for labels in (("a", "1"), ("a", "2"), ('quo"te', "3")):
        for value in values:
            tallies.labels(*labels).observe(value)
            histogram.labels(*labels).observe(value)
    assert text_of(ours) == text_of(theirs)


def test_metric_without_values_is_there() -> None:
    registry = CollectorRegistry()
    Tallies("seconds", "How long.", (), BOUNDS, registry)
    assert text_of(registry) == ["# HELP seconds How long.", "# TYPE seconds histogram"]


def test_two_metrics_of_one_name_are_refused() -> None:
    registry = CollectorRegistry()
    Tallies("seconds", "How long.", (), BOUNDS, registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Tallies("seconds", "How long.", (), BOUNDS, registry)


def test_wrong_number_of_labels_is_refused() -> None:
    tallies = Tallies("seconds", "How long.", ("model",), BOUNDS, CollectorRegistry())
    with pytest.raises(ValueError, match="has the labels"):
        tallies.labels("a", "b")
