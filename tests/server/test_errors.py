import inspect
import re

import pytest

from server import errors
from server.errors import QueueFull, Refused, SlipstreamError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SlipstreamError)]
_DRAWN = re.compile(r"^ {4}(?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+) +(?P<status>\d{3}) (?P<code>\w+)")


def drawn_tree() -> dict[str, tuple[str, int, str]]:
    """Read the docstring's tree: class -> (parent, status, code)."""
    tree: dict[str, tuple[str, int, str]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := _DRAWN.match(line):
            depth = len(found["indent"]) // 4
            path[depth:] = [found["name"]]
            tree[found["name"]] = (path[depth - 1] if depth else "Exception", int(found["status"]), found["code"])
    return tree


def test_the_drawn_tree_is_the_real_one():
    real = {kind.__name__: (kind.__base__.__name__, kind.status, kind.code) for kind in CLASSES}
    assert drawn_tree() == real


def test_codes_are_unique_and_snake_case():
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_says_its_own_status_and_code(kind: type[SlipstreamError]):
    assert "code" in vars(kind)
    assert 400 <= kind.status < 600


def test_refusals_carry_when_to_retry():
    for kind in (kind for kind in CLASSES if issubclass(kind, Refused)):
        error = kind("full", 1.5)
        assert (str(error), error.retry_after_s, error.status) == ("full", 1.5, 429)
    with pytest.raises(TypeError):
        QueueFull("full")  # type: ignore[call-arg]
