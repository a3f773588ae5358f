"""Where the exploration starts: each lossy form with its plain settings, and what can repair it. Pure.

Forms that this host cannot profit from are named with the reason instead of being tried.
"""

from collections.abc import Collection
from typing import Literal

import msgspec

from optimizers.passes import Pass
from optimizers.passes.adaround import AdaRound
from optimizers.passes.bf16 import Bf16
from optimizers.passes.bias_correction import BiasCorrection
from optimizers.passes.equalize import Equalize
from optimizers.passes.fp16 import Fp16
from optimizers.passes.int8_dynamic import Int8Dynamic
from optimizers.passes.int8_static import Int8Static
from optimizers.passes.low_rank import LowRank
from optimizers.passes.prune import PruneChannels
from optimizers.passes.ranges import Method
from optimizers.passes.smoothquant import SmoothQuant
from optimizers.passes.sparsity import Sparsity24
from optimizers.passes.weight_only import WeightOnly

_ALPHA = 0.7
"""SmoothQuant's share of the difficulty that goes to the weights; on MiniLM better than 0.5 (by 3 dB) and 0.3."""

_METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")


class Repair(msgspec.Struct, frozen=True):
    """A pass that may bring a quantized model nearer to the original.

    Attributes:
        step: The pass; one that makes FP32 goes before the quantization, any other behind it.
    """

    step: Pass

    def place(self, chain: tuple[Pass, ...]) -> tuple[Pass, ...]:
        """Return a chain with this repair in its place."""
        if self.step.spec.produces != "fp32":
            return (*chain, self.step)
        index = quantizer_index(chain)
        return (*chain[:index], self.step, *chain[index:])


class Root(msgspec.Struct, frozen=True):
    """One start of the exploration.

    Attributes:
        name: The candidate's name.
        family: Roots of one family differ in settings only; one of them goes on.
        precision: As the manifest shows it.
        chain: The passes behind the exact ones.
        repairs: What to try, in this order, when it is fast enough but not faithful enough.
        mixes: Whether layers can stay in float one by one.
        pruned: Why it is not tried on this host; empty when it is.
    """

    name: str
    family: str
    precision: str
    chain: tuple[Pass, ...]
    repairs: tuple[Repair, ...] = ()
    mixes: bool = False
    pruned: str = ""


def quantizer_index(chain: tuple[Pass, ...]) -> int:
    """Return the position of the pass that leaves FP32; the length of the chain when none does."""
    return next((i for i, step in enumerate(chain) if step.spec.produces != "fp32"), len(chain))


def roots_for(precisions: Collection[str], compressions: Collection[str], devices: Collection[str]) -> tuple[Root, ...]:
    """Return the roots, those first that pay most often.

    Args:
        precisions: ``fp32`` (which needs no root), ``fp16``, ``bf16``, ``int8``, ``int4``.
        compressions: ``low-rank``, ``prune-channels``, ``sparsity-2-4``.
        devices: ``cpu``, and ``cuda`` or ``tensorrt`` where they work.
    """
    roots: list[Root] = []
    if "int8" in precisions:
        roots += [_dynamic(), *(_static(method) for method in _METHODS), *_weight_only(8)]
    if "int4" in precisions:
        roots += _weight_only(4)
    if "low-rank" in compressions:
        roots.append(Root("low-rank", "low-rank", "fp32", (LowRank(),)))
    if "prune-channels" in compressions:
        roots.append(Root("prune-channels", "prune-channels", "fp32", (PruneChannels(),)))
    if "fp16" in precisions:
        roots.append(Root("fp16", "fp16", "fp16", (Fp16(),)))
    gpu = "" if "cuda" in devices else "onnxruntime's CPU kernels do not compute in BF16, and no GPU is in use"
    if "bf16" in precisions:
        roots.append(Root("bf16", "bf16", "bf16", (Bf16(),), pruned=gpu))
    sparse = (
        "" if "tensorrt" in devices else "2:4 sparsity is faster on NVIDIA GPUs through TensorRT only; none is in use"
    )
    if "sparsity-2-4" in compressions:
        roots.append(Root("sparsity-2-4", "sparsity-2-4", "fp32", (Sparsity24(),), pruned=sparse))
    return tuple(roots)


def _dynamic() -> Root:
    steps = (SmoothQuant(_ALPHA, insert=True), AdaRound(convolutions=False), BiasCorrection())
    repairs = tuple(Repair(step) for step in steps)
    return Root("int8-dynamic", "int8-dynamic", "int8-dynamic", (Int8Dynamic(),), repairs, mixes=True)


def _static(method: Method) -> Root:
    name = "int8-static" if method == "minmax" else f"int8-static-{method}"
    steps = (Equalize(), SmoothQuant(_ALPHA, insert=True), AdaRound(), BiasCorrection())
    repairs = tuple(Repair(step) for step in steps)
    return Root(name, "int8-static", "int8-static", (Int8Static(method=method),), repairs, mixes=True)


def _weight_only(bits: Literal[4, 8]) -> list[Root]:
    """Large blocks first: they are faster, small ones are nearer to the original."""
    family = f"int{bits}-weights"
    names = {128: family, 32: f"{family}-block32"}
    return [Root(name, family, family, (WeightOnly(bits=bits, block_size=size),)) for size, name in names.items()]
