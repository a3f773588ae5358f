import importlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimizers.engine import EngineOptions, build_engine
from optimizers.errors import EngineBuildError
from optimizers.graph import save_model
from optimizers.passes.bf16 import Bf16
from optimizers.passes.fp16 import Fp16
from optimizers.passes.fusion import Fuse
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.sanitize import Sanitize
from server.artifact import Profile
from server.host import HostFacts
from tests.models import save_cnn, save_mlp, save_strings, save_two_inputs
from tests.optimizers.encoders import attention
from tests.optimizers.graphs import context_of, normal

RTX = EngineOptions(flavour="tensorrt-rtx")

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: extra 'rtx'"
)


def profile(name: str, *shape: int) -> Profile:
    return Profile(*({name: (rows, *shape)} for rows in (1, 8, 32)))


MLP, CNN = profile("x", 64), profile("image", 3, 16, 16)


@rtx
@pytest.mark.parametrize(("save", "shapes"), [(save_mlp, MLP), (save_cnn, CNN)])
def test_a_model_becomes_a_plan_and_the_facts_describe_it(tmp_path: Path, save: object, shapes: Profile) -> None:
    plan = tmp_path / "new" / "model.plan"
    built = build_engine(save(tmp_path / "model.onnx"), shapes, plan, RTX)
    assert built.flavour == "tensorrt-rtx"
    assert built.version
    assert built.capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert built.plan_bytes == plan.stat().st_size > 1000
    assert built.seconds > 0
    assert [path.name for path in plan.parent.iterdir()] == ["model.plan"]


@rtx
def test_the_same_model_gives_the_same_plan(tmp_path: Path) -> None:
    model = save_cnn(tmp_path / "model.onnx")
    plans = [tmp_path / name for name in ("one.plan", "two.plan", "other.plan")]
    for plan, source in zip(plans, (model, model, save_cnn(tmp_path / "other.onnx", seed=1)), strict=True):
        build_engine(source, CNN, plan, RTX)
    assert plans[0].read_bytes() == plans[1].read_bytes()
    assert plans[0].read_bytes() != plans[2].read_bytes()


@rtx
def test_capabilities_decide_the_plan_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    model = save_mlp(tmp_path / "model.onnx")
    one = EngineOptions(flavour="tensorrt-rtx", capabilities=("8.9",))
    assert build_engine(model, MLP, tmp_path / "a.plan", one).capabilities == ("8.9",)
    for wrong in ("9.0", "x"):
        hopper = EngineOptions(flavour="tensorrt-rtx", capabilities=("8.9", wrong))
        with pytest.raises(EngineBuildError, match=rf"compute capability {wrong}; it can for .*'8\.9'"):
            build_engine(model, MLP, tmp_path / "b.plan", hopper)
    assert not (tmp_path / "b.plan").exists()


def quantized(tmp_path: Path, step: Int8Static, save: Callable[[Path], Path] = save_cnn) -> Path:
    data = {"image": normal(16, 3, 16, 16)} if save is save_cnn else {"x": normal(16, 64)}
    context = context_of(tmp_path, [data])
    model = onnx.load(save(tmp_path / "model.onnx"))
    for exact in (Sanitize(), Fuse(("conv",))):
        model = exact.run(model, context).model
    save_model(step.run(model, context).model, tmp_path / "int8.onnx")
    return tmp_path / "int8.onnx"


@rtx
@pytest.mark.parametrize(
    ("save", "shapes", "reason"),
    [
        (save_cnn, CNN, r"DequantizeLinear.* has type Int32 but must have type"),  # biases
        (save_mlp, MLP, r"QuantizeLinear.* Non-zero zero point is not supported"),  # activations
    ],
)
def test_int8_for_cpus_is_refused_with_the_reason_of_the_parser(
    tmp_path: Path, save: Callable[[Path], Path], shapes: Profile, reason: str
) -> None:
    model = quantized(tmp_path, Int8Static(), save)
    with pytest.raises(EngineBuildError, match=rf"cannot read .*int8\.onnx: .*{reason}") as refusal:
        build_engine(model, shapes, tmp_path / "int8.plan", RTX)
    assert "cudaError" not in str(refusal.value)


def save_attention(path: Path) -> Path:
    """x FP32 [batch,length,32] -> y FP32 [batch,length,32]: attention of four heads, without a mask."""
    save_model(attention(), path)
    return path


ATTENTION = Profile(*({"x": shape} for shape in ((1, 1, 32), (8, 12, 32), (32, 24, 32))))
WITH_GPU = HostFacts("a CPU", ("avx2",), 2, ("NVIDIA L4",))  # without one, BF16 is made of a few operators only
FORMS = {
    "mlp": (save_mlp, MLP, ("x", 64)),
    "cnn": (save_cnn, CNN, ("image", 3, 16, 16)),
    "transformer": (save_attention, ATTENTION, ("x", 12, 32)),
}


def in_precision(folder: Path, name: str, precision: str) -> Path:
    save, _, (feed, *shape) = FORMS[name]
    plain, made = save(folder / "plain.onnx"), folder / f"{precision}.onnx"
    if precision == "fp32":
        return plain
    context = context_of(folder, [{feed: normal(16, *shape)}], WITH_GPU)
    model = onnx.load(plain)
    for exact in (Sanitize(), Fuse(("conv",))):
        model = exact.run(model, context).model
    step = {"fp16": Fp16(), "bf16": Bf16(), "int8": Int8Static(target="tensorrt")}[precision]
    save_model(step.run(model, context).model, made)
    return made


@rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_builds_for_each_capability_and_always_the_same(tmp_path: Path, name: str, precision: str) -> None:
    model, shapes = in_precision(tmp_path, name, precision), FORMS[name][1]
    plans = []
    for capability in ("8.6", "12.0"):
        options = EngineOptions(flavour="tensorrt-rtx", capabilities=(capability,))
        for again in range(2):
            plans.append(tmp_path / f"{capability}-{again}.plan")
            assert build_engine(model, shapes, plans[-1], options).capabilities == (capability,)
    ampere, same, blackwell, equal = (plan.read_bytes() for plan in plans)
    assert ampere == same
    assert blackwell == equal
    assert ampere != blackwell


def save_quantized(path: Path, kind: int) -> Path:
    """x FP32 [batch,64] -> y FP32 [batch,16], inputs and weights through pairs of this type with zero point 0."""
    constants = [
        helper.make_tensor("zero", kind, [], [0]),
        numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
        numpy_helper.from_array(normal(64, 16), "w"),
    ]
    nodes = []
    for name in ("x", "w"):
        nodes.append(
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"], name=f"{name}_quantize")
        )
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"]))
    nodes.append(helper.make_node("MatMul", ["x_d", "w_d"], ["y"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", size]) for name, size in (("x", 64), ("y", 16))
    ]
    graph = helper.make_graph(nodes, "quantized", ends[:1], ends[1:], constants)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


@rtx
def test_uint8_that_the_parser_would_take_for_int8_is_refused(tmp_path: Path) -> None:
    model = save_quantized(tmp_path / "model.onnx", TensorProto.UINT8)
    with pytest.raises(EngineBuildError, match=r"would take UINT8 for INT8 in 4 nodes of .* \(x_quantize, x_d, w_quan"):
        build_engine(model, MLP, tmp_path / "model.plan", RTX)
    signed = save_quantized(tmp_path / "signed.onnx", TensorProto.INT8)
    assert build_engine(signed, MLP, tmp_path / "model.plan", RTX).plan_bytes > 1000


@rtx
def test_fp8_builds_where_the_hardware_has_it_and_is_refused_elsewhere(tmp_path: Path) -> None:
    model = save_quantized(tmp_path / "model.onnx", TensorProto.FLOAT8E4M3FN)
    ada = msgspec.structs.replace(RTX, capabilities=("8.9", "12.0"))
    assert build_engine(model, MLP, tmp_path / "model.plan", ada).plan_bytes > 1000
    with pytest.raises(EngineBuildError, match=r"Cannot compile for target\(s\) sm80, sm86, because .* fp8_e4m3"):
        build_engine(model, MLP, tmp_path / "ampere.plan", RTX)
    other = save_quantized(tmp_path / "e5m2.onnx", TensorProto.FLOAT8E5M2)
    with pytest.raises(EngineBuildError, match=r"cannot read .*e5m2\.onnx"):
        build_engine(other, MLP, tmp_path / "e5m2.plan", ada)


@rtx
@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (Profile({}, {}, {}), r"no shapes for 'x' \[-1, 64\]"),
        (profile("z", 64), r"the profile names \['z'\]; the model takes \['x'\]"),
        (profile("x", 64, 2), r"has shapes .*; the model takes \[-1, 64\]"),
        (profile("x", 65), "fixed sizes must stay"),
        (Profile({"x": (8, 64)}, {"x": (1, 64)}, {"x": (32, 64)}), "minimum <= optimum <= maximum"),
        (Profile({"x": (0, 64)}, {"x": (1, 64)}, {"x": (32, 64)}), "minimum <= optimum <= maximum"),
        (Profile({}, {"x": (8, 64)}, {"x": (32, 64)}), r"has shapes \[\(\)"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(tmp_path: Path, shapes: Profile, reason: str) -> None:
    with pytest.raises(EngineBuildError, match=reason):
        build_engine(save_mlp(tmp_path / "model.onnx"), shapes, tmp_path / "model.plan", RTX)


@rtx
def test_several_inputs_need_shapes_each(tmp_path: Path) -> None:
    model = save_two_inputs(tmp_path / "model.onnx")
    both = Profile(*(dict.fromkeys("ab", (rows, 4)) for rows in (1, 8, 32)))
    assert build_engine(model, both, tmp_path / "model.plan", RTX).plan_bytes > 0
    with pytest.raises(EngineBuildError, match="no shapes for 'b'"):
        build_engine(model, profile("a", 4), tmp_path / "model.plan", RTX)


@rtx
def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"none\.onnx is missing"):
        build_engine(tmp_path / "none.onnx", MLP, tmp_path / "model.plan", RTX)
    for content in (b"", b"no model at all " * 10):
        (tmp_path / "text.onnx").write_bytes(content)
        with pytest.raises(EngineBuildError, match=r"cannot read .*text\.onnx"):
            build_engine(tmp_path / "text.onnx", MLP, tmp_path / "model.plan", RTX)
    with pytest.raises(EngineBuildError, match=r"cannot read .*strings\.onnx"):
        build_engine(save_strings(tmp_path / "strings.onnx"), Profile({}, {}, {}), tmp_path / "model.plan", RTX)
    assert not (tmp_path / "model.plan").exists()


@rtx
def test_fp32_is_fp32_unless_tf32_is_asked_for(tmp_path: Path) -> None:
    model = save_mlp(tmp_path / "model.onnx")
    for name, options in (("fp32", RTX), ("tf32", msgspec.structs.replace(RTX, tf32=True))):
        build_engine(model, MLP, tmp_path / f"{name}.plan", options)
    assert (tmp_path / "fp32.plan").read_bytes() != (tmp_path / "tf32.plan").read_bytes()


@rtx
def test_one_engine_has_several_profiles(tmp_path: Path) -> None:
    model = save_mlp(tmp_path / "model.onnx")
    small = Profile({"x": (1, 64)}, {"x": (4, 64)}, {"x": (8, 64)})
    one = build_engine(model, MLP, tmp_path / "one.plan", RTX)
    two = build_engine(model, [small, MLP], tmp_path / "two.plan", RTX)
    assert two.plan_bytes > one.plan_bytes
    with pytest.raises(EngineBuildError, match=r"names \['z'\]"):
        build_engine(model, [small, profile("z", 64)], tmp_path / "none.plan", RTX)


@rtx
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"level": 3}, "does not know a builder level; leave it out"),
        ({"hardware_compatibility": "ampere-plus"}, "does not know hardware compatibility"),
        ({"version_compatible": True, "level": 0}, "a builder level, version compatibility"),
        ({"level": 6}, "builder level 6; it is 0 to 5"),
        ({"level": -1}, "builder level -1; it is 0 to 5"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path: Path, options: dict[str, object], reason: str) -> None:
    model = save_mlp(tmp_path / "model.onnx")
    with pytest.raises(EngineBuildError, match=reason):
        build_engine(model, MLP, tmp_path / "model.plan", msgspec.structs.replace(RTX, **options))


@rtx
def test_sparse_weights_are_an_option_of_both(tmp_path: Path) -> None:
    model = save_mlp(tmp_path / "model.onnx")
    sparse = msgspec.structs.replace(RTX, sparse_weights=True)
    assert build_engine(model, MLP, tmp_path / "model.plan", sparse).plan_bytes > 1000


@rtx
def test_progress_is_reported_in_shares(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []

    def observe(phase: str, share: float) -> bool:
        seen.append((phase, share))
        return True

    build_engine(save_mlp(tmp_path / "model.onnx"), MLP, tmp_path / "model.plan", RTX, observe)
    assert len({phase for phase, _ in seen}) > 2
    assert all(0 < share <= 1 for _, share in seen)
    assert max(share for _, share in seen) == 1


@rtx
def test_a_build_can_be_cancelled_and_leaves_the_old_plan(tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"the old one")
    with pytest.raises(EngineBuildError, match="cancelled"):
        build_engine(save_mlp(tmp_path / "model.onnx"), MLP, tmp_path / "model.plan", RTX, lambda _phase, _share: False)
    assert (tmp_path / "model.plan").read_bytes() == b"the old one"
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.plan"}


@rtx
def test_builds_share_one_logger_and_say_nothing_above_debug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "optimizers.engine"):
        for name in ("a", "b"):
            build_engine(save_mlp(tmp_path / "model.onnx"), MLP, tmp_path / f"{name}.plan", RTX)
    assert caplog.records == []


def test_a_builder_that_is_not_installed_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no module {name}")

    model = save_mlp(tmp_path / "model.onnx")
    monkeypatch.setattr("optimizers.engine.importlib.import_module", missing)
    with pytest.raises(EngineBuildError, match=r"pip install 'slipstream-server\[gpu\]' or 'slipstream-server\[rtx\]'"):
        build_engine(model, MLP, tmp_path / "model.plan")
    with pytest.raises(
        EngineBuildError, match=r"no module tensorrt\. Install one: pip install 'slipstream-server\[gpu\]'"
    ):
        build_engine(model, MLP, tmp_path / "model.plan", EngineOptions(flavour="tensorrt"))


def test_a_library_that_does_not_load_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("optimizers.engine.importlib.import_module", broken)
    with pytest.raises(EngineBuildError, match=r"tensorrt: libnvinfer\.so\.10: cannot open"):
        build_engine(save_mlp(tmp_path / "model.onnx"), MLP, tmp_path / "model.plan", EngineOptions(flavour="tensorrt"))
