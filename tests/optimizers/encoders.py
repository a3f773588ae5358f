"""Builds attention and embeddings as exporters write them."""

import numpy as np
import onnx

from tests.optimizers.graphs import NODE, model_of, normal

HIDDEN, HEADS, HEAD, ROWS, LONGEST = 32, 4, 8, 50, 12
LOWEST = float(np.finfo(np.float32).min)


def integers(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """Make these inputs INT64."""
    for value in model.graph.input:
        if value.name in names:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT64
    return model


def with_ranks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every output the type and number of axes that inference finds."""
    for value in model.graph.output:
        value.ClearField("type")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for value, found in zip(model.graph.output, inferred.graph.output, strict=True):
        value.type.CopyFrom(found.type)
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return model


def linear(source: str, name: str, gemm: bool = False) -> list[onnx.NodeProto]:
    """``name_out = source @ name + name_bias``."""
    if gemm:
        flat = [NODE("Reshape", [source, "flatten"], [f"{name}_flat"])]
        return [*flat, NODE("Gemm", [f"{name}_flat", name, f"{name}_bias"], [f"{name}_out"])]
    return [
        NODE("MatMul", [source, name], [f"{name}_product"]),
        NODE("Add", [f"{name}_bias", f"{name}_product"], [f"{name}_out"]),
    ]


def shape_of(source: str, parts: list[str | int], result: str) -> list[onnx.NodeProto]:
    """Assemble a shape by Shape, Gather, Unsqueeze and Concat; ``parts`` are axes of the source or names of numbers."""
    nodes, names = [NODE("Shape", [source], [f"{result}_shape"])], []
    for part in parts:
        if isinstance(part, int):
            nodes += [NODE("Gather", [f"{result}_shape", f"n{part}"], [f"{result}_{part}"])]
            nodes += [NODE("Unsqueeze", [f"{result}_{part}", "axis0"], [f"{result}_u{part}"])]
        names.append(f"{result}_u{part}" if isinstance(part, int) else part)
    return [*nodes, NODE("Concat", names, [result], axis=0)]


def attention(
    split: str = "constant",
    turn: str = "once",
    scale: str = "div",
    mask: str = "none",
    gemm: bool = False,
    sources: tuple[str, str, str] = ("x", "x", "x"),
    extra: tuple[onnx.NodeProto, ...] = (),
    join: tuple[int, ...] = (0, 2, 1, 3),
) -> onnx.ModelProto:
    """Attention of four heads over ``x`` [batch, length, 32], or over ``x`` and ``z`` [batch, others, 32]."""
    weights: dict[str, np.ndarray] = {name: normal(HIDDEN, HIDDEN, seed=i, scale=0.3) for i, name in enumerate("qkv")}
    weights |= {f"{name}_bias": normal(HIDDEN, seed=i + 5) for i, name in enumerate("qkv")}
    weights |= {"split": np.array([0, 0, HEADS, HEAD]), "join": np.array([0, 0, HIDDEN]), "axis0": np.array([0])}
    weights |= {"n0": np.array(0), "n1": np.array(1), "rest": np.array([-1]), "head": np.array([HEAD])}
    weights |= {"flatten": np.array([-1, HIDDEN]), "collapsed": np.array([-1, LONGEST, HEAD])}
    weights |= {"opened": np.array([-1, HEADS, HEAD, LONGEST]), "fixed": np.array([-1, LONGEST, HEADS, HEAD])}
    weights |= {"root": np.float32(np.sqrt(HEAD)), "inverse": np.float32(HEAD**-0.5), "fourth": np.float32(HEAD**-0.25)}
    nodes: list[onnx.NodeProto] = []
    for name, source in zip("qkv", sources, strict=True):
        nodes += linear(source, name, gemm)
        if split == "computed" or gemm:
            nodes += shape_of(source, [0, 1, "rest", "head"], f"{name}_target")
        target = f"{name}_target" if split == "computed" or gemm else {"fixed": "fixed"}.get(split, "split")
        nodes += [NODE("Reshape", [f"{name}_out", target], [f"{name}_split"])]
        whole = name == "k" and turn == "once"
        perm = [0, 2, 3, 1] if whole else [0, 2, 1, 3]
        nodes += [NODE("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=perm)]
    keys = "k_heads"
    if turn == "twice":
        nodes += [NODE("Transpose", ["k_heads"], ["k_turned"], perm=[0, 1, 3, 2])]
        keys = "k_turned"
    if turn == "collapsed":
        nodes += [NODE("Reshape", ["k_heads", "collapsed"], ["k_flat"])]
        nodes += [NODE("Transpose", ["k_flat"], ["k_back"], perm=[0, 2, 1])]
        nodes += [NODE("Reshape", ["k_back", "opened"], ["k_turned"])]
        keys = "k_turned"
    queries, scores = "q_heads", "scores"
    if scale == "both":
        nodes += [NODE("Mul", ["q_heads", "fourth"], ["q_scaled"]), NODE("Mul", ["fourth", keys], ["k_scaled"])]
        queries, keys = "q_scaled", "k_scaled"
    if scale == "before":
        nodes += [NODE("Div", ["q_heads", "root"], ["q_scaled"])]
        queries = "q_scaled"
    nodes += [NODE("MatMul", [queries, keys], ["scores"])]
    if scale in ("div", "mul"):
        factor = "root" if scale == "div" else "inverse"
        nodes += [NODE(scale.title(), ["scores", factor], ["scaled"])]
        scores = "scaled"
    added, more = _masked(mask, scores)
    nodes += added
    weights |= more
    nodes += [NODE("Softmax", ["masked" if mask != "none" else scores], ["shares"], axis=-1)]
    shares = "shares"
    if mask == "guarded":
        nodes += [NODE("IsNaN", ["shares"], ["nan"]), NODE("Where", ["nan", "zero", "shares"], ["guarded"])]
        shares = "guarded"
    nodes += [NODE("MatMul", [shares, "v_heads"], ["context"]), NODE("Transpose", ["context"], ["turned"], perm=join)]
    nodes += [NODE("Reshape", ["turned", "flatten" if gemm else "join"], ["y"], name="joined")]
    inputs: dict[str, list] = {
        "x": ["batch", LONGEST if "fixed" in (split, turn) or turn == "collapsed" else "length", 32]
    }
    inputs |= {"z": ["batch", "others", HIDDEN]} if "z" in sources else {}
    inputs["x"][0] = 1 if mask == "pair" else "batch"
    shapes = {
        "full": ["batch", "length", "length"],
        "heads": [HEADS, "length", "length"],
        "pair": [2, "length", "length"],
    }
    inputs |= {"mask": shapes.get(mask, ["batch", "length"])} if mask != "none" else {}
    outputs: dict[str, list] = {"y": None, **{node.output[0]: None for node in extra}}
    model = model_of([*nodes, *extra], inputs, outputs, {name: np.asarray(array) for name, array in weights.items()})
    return with_ranks(model if mask in ("none", "full", "heads", "pair") else integers(model, "mask"))


def _masked(mask: str, scores: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Return the nodes from ``mask`` and the scores to ``masked``, and their constants."""
    add = [NODE("Add", [scores, "bias"], ["masked"])]
    axes = [NODE("Unsqueeze", ["mask", "axes"], ["wide"])]
    consts: dict[str, np.ndarray] = {"axes": np.array([1, 2]), "zero": np.float32(0)}
    if mask == "heads":
        return [NODE("Add", ["mask", scores], ["masked"])], consts
    if mask in ("full", "pair"):
        return [NODE("Unsqueeze", ["mask", "axes"], ["bias"]), *add], consts | {"axes": np.array([1])}
    if mask == "additive":
        nodes = [*axes, NODE("Cast", ["wide"], ["float"], to=1), NODE("Sub", ["one", "float"], ["hidden"])]
        return [*nodes, NODE("Mul", ["hidden", "far"], ["bias"]), *add], consts | {
            "one": np.float32(1),
            "far": np.float32(-10000),
        }
    if mask in ("where", "guarded"):
        nodes = [*axes, NODE("Cast", ["wide"], ["seen"], to=9), NODE("Where", ["seen", "zero", "far"], ["bias"])]
        return [*nodes, *add], consts | {"far": np.float32(LOWEST if mask == "where" else -np.inf)}
    if mask in ("replaced", "replaced-near"):
        nodes = [*axes, NODE("Equal", ["wide", "none"], ["hidden"]), NODE("Shape", [scores], ["size"])]
        nodes += [NODE("Expand", ["hidden", "size"], ["everywhere"])]
        far = np.float32(LOWEST if mask == "replaced" else -10000)
        return [*nodes, NODE("Where", ["everywhere", "far", scores], ["masked"])], consts | {
            "far": far,
            "none": np.array(0),
        }
    return [], consts


def embeddings(
    positions: str = "slice-of-ids",
    segments: bool = True,
    rows: int = ROWS,
    extra: tuple[onnx.NodeProto, ...] = (),
) -> onnx.ModelProto:
    """Embeddings of ``ids`` [batch, length], with positions by one of several spellings."""
    weights: dict[str, np.ndarray] = {
        "words": normal(rows, HIDDEN, seed=1),
        "places": normal(LONGEST + 1, HIDDEN, seed=2),
    }
    weights |= {"kinds": normal(2, HIDDEN, seed=3), "gamma": normal(HIDDEN, seed=4) + 1, "beta": normal(HIDDEN, seed=5)}
    weights |= {"n0": np.array(0), "n1": np.array(1), "axis0": np.array([0]), "axis1": np.array([1])}
    weights |= {"every": np.arange(LONGEST)[None], "fixed": normal(1, 5, HIDDEN, seed=6), "pad": np.array(1)}
    nodes = [NODE("Gather", ["words", "ids"], ["w"])]
    counted = "w" if positions == "slice-by-words" else "ids"
    nodes += [NODE("Shape", [counted], ["shape"]), NODE("Gather", ["shape", "n1"], ["length"], axis=0)]
    nodes += [NODE("Unsqueeze", ["length", "axis0"], ["end"])]
    if positions in ("slice-of-ids", "slice-by-words"):
        nodes += [NODE("Slice", ["every", "axis0", "end", "axis1"], ["place_ids"])]
    if positions == "range":
        nodes += [NODE("Range", ["n0", "length", "n1"], ["r"]), NODE("Unsqueeze", ["r", "axis0"], ["place_ids"])]
    if positions == "counted":
        nodes += [NODE("Equal", ["ids", "pad"], ["padding"]), NODE("Not", ["padding"], ["real"])]
        nodes += [NODE("Cast", ["real"], ["ones"], to=6), NODE("CumSum", ["ones", "n1"], ["sums"])]
        nodes += [NODE("Mul", ["sums", "ones"], ["kept"]), NODE("Cast", ["kept"], ["place_ids"], to=7)]
    if positions == "slice-of-table":
        nodes += [NODE("Slice", ["places", "axis0", "end", "axis0"], ["p"])]
    elif positions != "constant":
        nodes += [NODE("Gather", ["places", "place_ids"], ["p"])]
    nodes += [NODE("Gather", ["kinds", "segments"], ["s"]), NODE("Add", ["w", "s"], ["ws"])] if segments else []
    place = "fixed" if positions == "constant" else "p"
    nodes += [NODE("Add", ["ws" if segments else "w", place], ["sum"])]
    nodes += [NODE("LayerNormalization", ["sum", "gamma", "beta"], ["y"], name="normed", epsilon=1e-12)]
    shape = ["batch", 5 if positions == "constant" else "length"]
    inputs = {"ids": shape, **({"segments": shape} if segments else {})}
    outputs: dict[str, list] = {"y": None, **{node.output[0]: None for node in extra}}
    return with_ranks(integers(model_of([*nodes, *extra], inputs, outputs, weights), *inputs))
