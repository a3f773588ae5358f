"""TensorRT engines of a run's candidates: built beside the artifact, recorded, and never the end of a run."""

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import msgspec
import numpy as np
import onnx

from optimizers.engine import EngineBuild, EngineOptions, build_engine
from optimizers.errors import OptimizerError
from optimizers.graph import load_model
from optimizers.passes.sparsity import GROUP, is_sparse
from optimizers.plans import PlanCache
from optimizers.records import EngineRecord
from server.artifact import Profile


class EnginePolicy(msgspec.Struct, frozen=True):
    """How the engines of a run are built.

    Attributes:
        cache: Folder of finished plans; ``None`` builds each one.
        options: For every engine.
    """

    cache: Path | None = None
    options: EngineOptions = EngineOptions()


def build_engines(
    models: Mapping[str, Path],
    profile: Profile,
    folder: Path,
    timeout_s: float,
    policy: EnginePolicy | None = None,
) -> tuple[EngineRecord, ...]:
    """Build one engine per model, each in a process of its own, which a crash or a hang of the builder ends alone.

    Args:
        models: Candidate -> ONNX file.
        profile: Shapes for the inputs.
        folder: Where the plans go, as ``<candidate>.plan``.
        timeout_s: Seconds for one build.
        policy: How to build; by default without a cache.
    """
    policy = policy or EnginePolicy()
    return tuple(
        _record(name, (policy, model, profile, folder / f"{name}.plan"), timeout_s) for name, model in models.items()
    )


def build_plan(policy: EnginePolicy, model: Path, profile: Profile, plan: Path) -> EngineBuild:
    """Build one plan or take it from the cache; a model with a 2:4 pattern may use sparse tensor cores.

    Raises:
        EngineBuildError: As ``engine.build_engine`` does.
        ModelError: If the model cannot be read.
    """
    options = policy.options
    if has_sparse_weights(load_model(model)):
        options = msgspec.structs.replace(options, sparse_weights=True)
    if policy.cache is None:
        return build_engine(model, profile, plan, options)
    return PlanCache(policy.cache).get_or_build(model, profile, plan, options)


def has_sparse_weights(model: onnx.ModelProto) -> bool:
    """Whether a MatMul, Gemm or Conv has at most 2 non-zeros in every 4 neighbouring inputs, and some at all."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        axis = _input_axis(node)
        if axis is None or len(node.input) <= 1 or node.input[1] not in weights:
            continue
        weight = onnx.numpy_helper.to_array(weights[node.input[1]])
        if weight.ndim <= axis or weight.shape[axis] % GROUP or not weight.any():
            continue
        rows = np.moveaxis(weight, axis, 0)
        if is_sparse(rows.reshape(len(rows), -1)):
            return True
    return False


def _input_axis(node: onnx.NodeProto) -> int | None:
    """Return the axis of a node's weight that counts its inputs; nothing for a node that is no layer."""
    if node.op_type == "Gemm":
        return next((attribute.i for attribute in node.attribute if attribute.name == "transB"), 0)
    return {"MatMul": 0, "Conv": 1}.get(node.op_type)


def _record(name: str, work: tuple[EnginePolicy, Path, Profile, Path], timeout_s: float) -> EngineRecord:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        built: EngineBuild = pool.submit(build_plan, *work).result(timeout_s)
    except OptimizerError as exc:
        return EngineRecord(f"{name}: refused", str(exc))
    except BrokenProcessPool:
        return EngineRecord(f"{name}: refused", "the builder's process ended without an answer")
    except TimeoutError:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        return EngineRecord(f"{name}: refused", f"stopped after {timeout_s:g} s")
    except Exception as exc:  # noqa: BLE001  (the stage's isolation: any failure of a builder is a refusal)
        return EngineRecord(f"{name}: refused", f"{type(exc).__name__}: {exc}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    facts = {
        "builder": f"{built.flavour} {built.version}",
        "compute capabilities": ", ".join(built.capabilities) or "of the GPU that was present",
        "plan": f"engines/{work[-1].name}, {built.plan_bytes} bytes",
        "seconds": f"{built.seconds:.1f}",
        "cache": "hit" if built.cached else "built now",
    }
    return EngineRecord(f"{name}: built", "a server tries it before it builds one of its own", facts)
