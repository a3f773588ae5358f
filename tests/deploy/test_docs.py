"""What the pages on deployment say exists: files, values, metrics, alerts."""

import re
from pathlib import Path

import pytest
import yaml

from server.metrics import Metrics
from tests.deploy.chart import CHART, ROOT, leaves

PAGES = [ROOT / "docs" / "kubernetes.md", CHART / "README.md", ROOT / "deploy" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_commands_exist(page: Path) -> None:
    for path in re.findall(r"(?:-f |install \S+ )(deploy/\S+)", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_values_that_are_named_exist(page: Path) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    known = leaves(values).keys()
    prefixes = {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 2)}
    text = page.read_text()
    named = {key for group in re.findall(r"--set (\S+)", text) for key in re.findall(r"([A-Za-z][\w.]*)=", group)}
    named |= {
        word for word in re.findall(r"`([a-z]\w*\.[\w.]+)(?::[^`]*|=[^`]*)?`", text) if word.split(".")[0] in values
    }
    assert named - prefixes == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_metrics_that_are_named_exist(page: Path) -> None:
    families = {family.name for family in Metrics().registry.collect()}
    exported = families | {f"{name}_{part}" for name in families for part in ("total", "sum", "count", "bucket")}
    assert set(re.findall(r"\bslipstream_\w+", page.read_text())) <= exported


def test_alerts_that_are_named_exist() -> None:
    alerts = re.findall(r"alert: (\w+)", (CHART / "templates" / "prometheusrule.yaml").read_text())
    for page in PAGES:
        assert set(re.findall(r"\bSlipstream[A-Z]\w+", page.read_text())) <= set(alerts)
