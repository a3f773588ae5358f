"""Where elements of a tensor come from: its axes as products of named parts, followed through Reshape and Transpose.

Exporters write "split into heads" in many ways. Two of them are equal when they move the parts (batch, length, heads,
head size) to the same places, whatever the shapes were computed from. Sizes are those that shape inference found: a
number or a name; equal names are equal sizes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from optimizers.passes.rules import producer, scalar

Label = Literal["batch", "length", "hidden", "heads", "head"]
"""Parts of an axis; only ``hidden`` can be split, into ``heads`` and ``head``."""


@dataclass(frozen=True, slots=True)
class Size:
    """A number times named sizes, each name sorted and repeated as often as it is a factor."""

    number: int = 1
    names: tuple[str, ...] = ()

    def times(self, other: "Size") -> "Size":
        """Return the product."""
        return Size(self.number * other.number, tuple(sorted((*self.names, *other.names))))

    def over(self, other: "Size") -> "Size | None":
        """Return the quotient, or ``None`` where it is not a whole number for every value of the names."""
        mine, others = Counter(self.names), Counter(other.names)
        if not other.number or self.number % other.number or others - mine:
            return None
        return Size(self.number // other.number, tuple(sorted((mine - others).elements())))


ONE = Size()
_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Where"})


@dataclass(frozen=True, slots=True)
class Part:
    """Something that an axis consists of."""

    label: Label
    size: Size


Axes = tuple[tuple[Part, ...], ...]
"""One entry for each axis, slowest part first; parts of size 1 are left out, since they are anywhere."""


@dataclass(frozen=True, slots=True)
class Trail:
    """How a value is made of another one by Reshape, Transpose and constant factors.

    Attributes:
        source: Where it starts.
        steps: The values that Reshape and Transpose made, first one first.
        factor: The product of the constants.
        between: Every value between, and the last one.
    """

    source: ir.Value
    steps: tuple[ir.Value, ...]
    factor: float
    between: tuple[ir.Value, ...]


def axes_of(*axes: Sequence[Part]) -> Axes:
    """Return axes without the parts of size 1."""
    return tuple(tuple(part for part in parts if part.size != ONE) for parts in axes)


def sizes_of(value: ir.Value) -> list[Size | None] | None:
    """Return the size of each axis, ``None`` for one that inference does not know; ``None`` if it knows no shape."""
    return None if value.shape is None else [_size(dim) for dim in value.shape]


def trail_of(value: ir.Value) -> Trail:
    """Return how a value is made, from as far up as Reshape, Transpose and constant factors reach."""
    steps: list[ir.Value] = []
    between: list[ir.Value] = []
    factor = 1.0
    while True:
        moved = producer(value, "Reshape") or producer(value, "Transpose")
        scaled = scaled_from(value)
        if moved is not None and moved.inputs[0] is not None:
            steps.insert(0, value)
            before = moved.inputs[0]
        elif scaled is not None:
            before, factor = scaled[0], factor * scaled[1]
        else:
            return Trail(value, tuple(steps), factor, tuple(between))
        between.append(value)
        value = before


def scaled_from(value: ir.Value) -> tuple[ir.Value, float] | None:
    """Return ``x`` and ``c`` if the value is ``x * c`` or ``x / c`` with a constant, else ``None``."""
    product, quotient = producer(value, "Mul"), producer(value, "Div")
    node = product or quotient
    if node is None:
        return None
    a, b = node.inputs[0], node.inputs[1]
    if a is not None and (number := scalar(b, a)) is not None:
        if product is not None:
            return a, number
        return (a, 1 / number) if number else None
    if product is not None and b is not None and (number := scalar(a, b)) is not None:
        return b, number
    return None


def followed(axes: Axes, steps: Sequence[ir.Value], known: Mapping[str, Size] | None = None) -> Axes | None:
    """Return where the parts are after some steps.

    Args:
        axes: Where they are before.
        steps: Values that Reshape and Transpose made, each of the one before.
        known: Names that inference gave to sizes which are known.

    Returns:
        The axes, or ``None`` where a shape is not known well enough or cuts a part other than ``hidden``.
    """
    for value in steps:
        turned = producer(value, "Transpose")
        if turned is None:
            sizes = sizes_of(value)
            after = None if sizes is None else _reshaped(axes, [_renamed(size, known or {}) for size in sizes])
        else:
            order = turned.attributes.get_ints("perm", tuple(range(len(axes)))[::-1])
            after = tuple(axes[axis] for axis in order) if len(order) == len(axes) else None
        if after is None:
            return None
        axes = after
    return axes


def names_of(value: ir.Value, sizes: Sequence[Size]) -> dict[str, Size]:
    """Return name -> size for the names that inference gave to the axes of a value whose sizes are known otherwise."""
    seen = sizes_of(value) or []
    return {old.names[0]: new for old, new in zip(seen, sizes, strict=False) if old is not None and old.names}


def unify_sizes(graph: ir.Graph | ir.Function, known: Mapping[str, Size]) -> None:
    """Replace the names that inference gave to sizes which are known, in the shape of every value.

    Inference gives a new name to each axis of a sum, product or selection whose operands have different names there;
    where they turn out to be one size, so is the result.

    Args:
        graph: Its nodes are in order; edited in place.
        known: Name -> what it really is.
    """
    found = dict(known)
    for node in graph:
        if node.op_type in _BROADCASTING:
            found |= _agreed(node)
        for value in node.outputs:
            sizes = sizes_of(value) or []
            new = [_renamed(size, found) for size in sizes]
            if new != sizes:
                value.shape = ir.Shape([None if size is None else _dim(size) for size in new])


def product(parts: Sequence[Part]) -> Size:
    """Return the size of an axis of these parts."""
    size = ONE
    for part in parts:
        size = size.times(part.size)
    return size


def _reshaped(axes: Axes, sizes: Sequence[Size | None]) -> Axes | None:
    """Return the parts, in order, on axes of other sizes; one size may be unknown, the number of elements tells it."""
    flat = [part for parts in axes for part in parts]
    names = {name for part in flat for name in part.size.names}
    told = [size if size is not None and names.issuperset(size.names) else None for size in sizes]
    rest: Size | None = product(flat)
    for size in told:
        rest = rest.over(size) if rest is not None and size is not None else rest
    if rest is None or told.count(None) > 1 or (None not in told and rest != ONE):
        return None
    made = []
    for size in told:
        taken = _taken(flat, rest if size is None else size)
        if taken is None:
            return None
        made.append(tuple(taken))
    return tuple(made)


def _taken(flat: list[Part], size: Size) -> list[Part] | None:
    """Remove parts from the front that make up a size, and return them; ``hidden`` may be cut in two."""
    taken: list[Part] = []
    while size != ONE:
        if not flat:
            return None
        part = flat.pop(0)
        left = size.over(part.size)
        if left is None:
            head = part.size.over(size)
            if head is None or part.label != "hidden":
                return None
            flat.insert(0, Part("head", head))
            part, left = Part("heads", size), ONE
        taken.append(part)
        size = left
    return taken


def _size(dim: int | ir.SymbolicDim) -> Size | None:
    if isinstance(dim, int):
        return Size(dim)
    return None if dim.value is None else Size(1, (str(dim.value),))


def _agreed(node: ir.Node) -> dict[str, Size]:
    """Return name -> size for the axes of a result on which all operands have one size, or size 1."""
    result = sizes_of(node.outputs[0])
    operands = [sizes_of(value) for value in node.inputs if value is not None]
    agreed: dict[str, Size] = {}
    if result is None or None in operands:
        return agreed
    for axis, size in enumerate(reversed(result), start=1):
        seen = {sizes[-axis] for sizes in operands if sizes is not None and len(sizes) >= axis} - {ONE}
        only = seen.pop() if len(seen) == 1 else None
        if size is not None and size.names and only is not None:
            agreed[size.names[0]] = only
    return agreed


def _dim(size: Size) -> int | str:
    return size.names[0] if size.names else size.number


def _renamed(size: Size | None, known: Mapping[str, Size]) -> Size | None:
    return known.get(size.names[0], size) if size is not None and size.names else size
