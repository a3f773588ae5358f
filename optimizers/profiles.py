"""Shape profiles of engines: from calibration data, from traffic, or as a user writes them.

Several profiles make one engine with tactics for each: a small batch is not run with what is best for a large one.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from optimizers.calibration import Samples
from optimizers.errors import EngineBuildError
from server.artifact import Profile
from server.tensors import Signature

_SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*)*")

_BATCH = -1

Shape = tuple[int, ...]


class _Seen(msgspec.Struct, frozen=True):
    requests: int
    inputs: dict[str, Shape]


class _Traffic(msgspec.Struct, frozen=True):
    """What ``GET /v2/models/NAME/shapes`` answers, the most frequent shapes first; -1 is the batch."""

    name: str
    version: str
    shapes: list[_Seen]


def profile_of(samples: Samples, max_rows: int, min_rows: int = 1) -> Profile:
    """Return shapes from ``min_rows`` to ``max_rows`` rows, best at ``max_rows``; other axes are those of the samples.

    Inputs without a batch axis keep their shape.
    """
    one = {name: array.shape for name, array in samples.batch(0, 1).items()}

    def at(rows: int) -> dict[str, Shape]:
        return {name: (rows, *shape[1:]) if samples.batched else shape for name, shape in one.items()}

    return Profile(at(min_rows), at(max_rows), at(max_rows))


def profiles_of(samples: Samples, max_rows: Sequence[int]) -> tuple[Profile, ...]:
    """Return one profile per batch size, each from the one below to its own: 8 and 32 give 1 to 8 and 9 to 32."""
    sizes = sorted(set(max_rows)) if samples.batched else [1]
    return tuple(profile_of(samples, size, below + 1) for below, size in zip([0, *sizes[:-1]], sizes, strict=True))


def profiles_of_traffic(document: bytes, max_rows: Sequence[int]) -> tuple[Profile, ...]:
    """Return profiles of what a server was asked: from the smallest sizes to the largest, best at the most frequent.

    Args:
        document: The answer to ``GET /v2/models/NAME/shapes``.
        max_rows: Largest batch of each profile, as in ``profiles_of``; ignored for a model that is not batched.

    Raises:
        EngineBuildError: If it is no such answer, if no request is counted, or if a batched model has no largest batch.
    """
    try:
        traffic = msgspec.json.decode(document, type=_Traffic)
    except msgspec.MsgspecError as exc:
        raise EngineBuildError(f"the traffic is no answer of /v2/models/NAME/shapes: {exc}") from exc
    if not traffic.shapes:
        raise EngineBuildError(f"{traffic.name} version {traffic.version} has had no requests yet")
    batched = any(shape[:1] == (_BATCH,) for shape in traffic.shapes[0].inputs.values())
    if batched and not max_rows:
        raise EngineBuildError("the model is batched: give the largest batch of each profile with --rows")
    best = traffic.shapes[0].inputs
    sizes = {name: list(zip(*(seen.inputs[name] for seen in traffic.shapes), strict=True)) for name in best}

    def at(bound: Callable[[Iterable[int]], int], rows: int) -> dict[str, Shape]:
        bounds = {name: tuple(bound(axis) for axis in axes) for name, axes in sizes.items()}
        return {name: _with_rows(shape, rows) for name, shape in bounds.items()}

    steps = sorted(set(max_rows)) if batched else [1]
    return tuple(
        Profile(at(min, below + 1), {name: _with_rows(shape, rows) for name, shape in best.items()}, at(max, rows))
        for below, rows in zip([0, *steps[:-1]], steps, strict=True)
    )


def reaching_down(profile: Profile, signature: Signature) -> Profile:
    """Return a profile whose smallest shapes have size 1 on every variable axis: shorter inputs run in it as well."""
    variable = {spec.name: [not isinstance(size, int) for size in spec.shape] for spec in signature.inputs}
    minimum = {
        name: tuple(1 if is_open else size for is_open, size in zip(variable[name], shape, strict=True))
        for name, shape in profile.minimum.items()
    }
    return msgspec.structs.replace(profile, minimum=minimum)


def parse_profiles(texts: Sequence[str]) -> tuple[Profile, ...]:
    """Read profiles as a command line has them: ``INPUT=MIN:BEST:MAX`` with shapes such as ``8x3x224x224``.

    ``INPUT=SHAPE`` is one shape for all three. An input that is named once is the same in every profile; one that is
    named several times has its first shapes in the first profile, its second in the second, and so on.

    Raises:
        EngineBuildError: If a text has another form, or if two inputs are named several times, but not equally often.
    """
    given: dict[str, list[tuple[Shape, ...]]] = defaultdict(list)
    for text in texts:
        name, _, shapes = text.rpartition("=")
        parts = shapes.split(":")
        if not name or len(parts) not in {1, 3} or not all(_SHAPE.fullmatch(part) for part in parts):
            raise EngineBuildError(
                f"profile {text!r}; it is INPUT=MIN:BEST:MAX or INPUT=SHAPE, a shape is like 8x64, sizes are at least 1"
            )
        bounds = tuple(tuple(int(size) for size in part.split("x")) for part in parts)
        given[name].append(bounds if len(bounds) > 1 else bounds * 3)
    counts = {name: len(bounds) for name, bounds in given.items() if len(bounds) > 1}
    if len(set(counts.values())) > 1:
        raise EngineBuildError(
            f"inputs have different numbers of profiles: {counts}; give each one, or the same number"
        )
    return tuple(_profile(given, index) for index in range(max(counts.values(), default=1)))


def _with_rows(shape: Shape, rows: int) -> Shape:
    return (rows, *shape[1:]) if shape[:1] == (_BATCH,) else shape


def _profile(given: dict[str, list[tuple[Shape, ...]]], index: int) -> Profile:
    chosen = {name: bounds[index if len(bounds) > 1 else 0] for name, bounds in given.items()}
    return Profile(*({name: bounds[place] for name, bounds in chosen.items()} for place in range(3)))
