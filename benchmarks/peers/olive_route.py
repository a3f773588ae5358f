"""Olive's route to INT8 on a CPU for an ONNX model, run inside Olive's environment.

``OrtTransformersOptimization`` for models with attention or else ``OnnxPeepholeOptimizer``; then
``OnnxStaticQuantization`` for convolutions or else ``OnnxDynamicQuantization``; then ``OrtSessionParamsTuning`` over
the numbers of threads. Every pass has Olive's own defaults.

Source: Olive documentation, *How to configure* and *Quantization*; the order of passes is that of its ``auto-opt``.
"""

import copy
from pathlib import Path
from typing import Any

import olive
import torch
from olive.data.registry import Registry

from benchmarks.peers.protocol import feeds_of, is_convolutional, operators_of, serve

_SYSTEM = {
    "type": "LocalSystem",
    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
}
_LEAST_ATTENTION = 4


class Feeds(torch.utils.data.Dataset):  # type: ignore[misc]
    """The samples, each one feed and a label that nobody reads."""

    def __init__(self, model: str, data: str) -> None:
        self._feeds = feeds_of(model, data)

    def __len__(self) -> int:
        return len(self._feeds)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        if index >= len(self):
            raise IndexError(index)
        return {name: torch.from_numpy(array.copy()) for name, array in self._feeds[index].items()}, 0


@Registry.register_dataset("slipstream_feeds")  # type: ignore[untyped-decorator]
def feeds_dataset(model: str, data: str, **_: Any) -> Feeds:
    """Make the data set that the configuration names."""
    return Feeds(model, data)


def optimized(request: dict[str, Any]) -> dict[str, Any]:
    """Run the passes, then tune the session; see ``protocol.serve``."""
    notes = [f"Olive {olive.__version__}"]
    model = _passed(request, notes)
    return {"model": model, "session": _tuned(request, model, notes), "notes": notes}


def _passed(request: dict[str, Any], notes: list[str]) -> str:
    quantize: dict[str, Any] = {"type": "OnnxDynamicQuantization"}
    if is_convolutional(request["model"]):
        quantize = {"type": "OnnxStaticQuantization", "data_config": "samples"}
    attempts: list[dict[str, Any]] = [{"type": "OnnxPeepholeOptimizer"}]
    if operators_of(request["model"]).get("Softmax", 0) >= _LEAST_ATTENTION:
        attempts.insert(0, {"type": "OrtTransformersOptimization", "model_type": "bert", "opt_level": 0})
    for number, first in enumerate(attempts):
        chain = {"first": first, "quantize": quantize}
        try:
            result = _run(request, request["model"], f"passes-{number}", passes=chain)
            if result is None:
                raise RuntimeError("Olive returned no model; its log says why")
        except Exception as exc:
            notes.append(f"{first['type']} -> {quantize['type']} failed: {type(exc).__name__}: {str(exc)[:120]}")
            if first is attempts[-1]:
                raise
            continue
        notes.append(" -> ".join(str(step["type"]) for step in chain.values()))
        return str(result.model_path)
    raise RuntimeError("; ".join(notes))


def _tuned(request: dict[str, Any], model: str, notes: list[str]) -> dict[str, Any]:
    """Return the session options that Olive finds fastest; none if it cannot tune."""
    tried: dict[int, tuple[float, dict[str, Any]]] = {}
    for threads in sorted({1, request["cores"]}):
        tune = {
            "type": "OrtSessionParamsTuning",
            "data_config": "samples",
            "intra_thread_num_list": threads,
            "inter_thread_num_list": 1,
            "execution_mode_list": 0,
        }
        try:
            result = _run(request, model, f"tuning-{threads}", passes={"tune": tune}, measured=True)
            if result is None:
                raise RuntimeError("Olive returned no model; its log says why")
            latency = float(result.metrics_value["latency-avg"]["value"])
            tried[threads] = (latency, dict(result.get_inference_config().get("session_options") or {}))
        except Exception as exc:  # noqa: BLE001  (whatever Olive raises, the model is there)
            notes.append(f"tuning with {threads} threads failed: {type(exc).__name__}: {str(exc)[:120]}")
    if not tried:
        return {}
    best = min(tried, key=lambda threads: tried[threads][0])
    notes.append("tuned: " + ", ".join(f"{n} threads {ms:.3g} ms" for n, (ms, _) in tried.items()))
    return {key: value for key, value in tried[best][1].items() if value is not None}


def _run(request: dict[str, Any], model: str, name: str, *, passes: dict[str, Any], measured: bool = False) -> Any:
    """Run one workflow; return its best model, ``None`` when there is none."""
    output = Path(request["output"])
    sub_type = {"name": "avg", "priority": 1}
    latency = {"name": "latency", "type": "latency", "data_config": "samples", "sub_types": [sub_type]}
    config: dict[str, Any] = {
        "input_model": {"type": "ONNXModel", "model_path": model},
        "systems": {"here": _SYSTEM},
        "host": "here",
        "target": "here",
        "data_configs": [
            {
                "name": "samples",
                "load_dataset_config": {
                    "type": "slipstream_feeds",
                    "params": {"model": request["model"], "data": request["data"]},
                },
                "pre_process_data_config": {"type": "skip_pre_process"},
                "post_process_data_config": {"type": "skip_post_process"},
                "dataloader_config": {"type": "no_auto_batch_dataloader"},
            }
        ],
        "passes": passes,
        "output_dir": str(output / name),
        "cache_dir": str(output / "cache"),
    }
    if measured:
        # Without a type Olive 0.13.0 fails: it takes the evaluator for a path.
        config |= {"evaluators": {"speed": {"type": "OnnxEvaluator", "metrics": [latency]}}, "evaluator": "speed"}
    return olive.run(copy.deepcopy(config)).get_best_candidate()  # it changes what it is given


if __name__ == "__main__":
    serve(optimized)
