"""Sanitize: the same computation in the form that the other passes and every runtime understand."""

from collections.abc import Sequence
from typing import ClassVar

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx import helper

from optimizers.errors import PassFailed
from optimizers.graph import IR_PORTABLE, OPSET_CEILING, graphs_of, opset_of
from optimizers.passes import PassContext, PassResult, PassSpec, copy_of
from optimizers.passes.settle import settle

_IR_WITHOUT_INITIALIZER_INPUTS = 8  # before IR version 4 every weight had to be a graph input as well


class Sanitize:
    """Inline functions, name every node, turn Constant nodes into initializers, infer shapes, lower the IR version.

    Constants inside a subgraph become initializers there; no name hides one of a graph around it. Weights that are also
    declared as inputs stop being inputs. The signature stays as it is: no axis is renamed, and what shape inference
    finds out about inputs and outputs is not written there.
    """

    spec: ClassVar[PassSpec] = PassSpec("sanitize", 2, "exact")

    def run(self, model: onnx.ModelProto, context: PassContext) -> PassResult:  # noqa: ARG002  (the interface)
        """Apply the pass.

        Raises:
            PassFailed: If the opset is above the ceiling, or if onnx-ir cannot read the model.
        """
        opset = opset_of(model)
        if opset > OPSET_CEILING:
            raise PassFailed(f"opset {opset} is above {OPSET_CEILING}; export the model with opset 17 to 21")
        try:
            # onnx-ir shares tensors with the model that it reads, and renames them there.
            tidy = ir.to_proto(_tidied(ir.from_proto(copy_of(model))))
        except (ValueError, TypeError, KeyError, ir.passes.PassError) as exc:
            raise PassFailed(f"onnx-ir cannot rewrite the model: {exc}") from exc
        tidy.ir_version = _portable_ir(model)
        settle(tidy, model)
        counts = _differences(model, tidy)
        return PassResult(tidy, changed=True, counts=counts, note=f"opset {opset}, IR version {tidy.ir_version}")


def _tidied(model: ir.Model) -> ir.Model:
    steps = ir.passes.Sequential(
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveInitializersFromInputsPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.NameFixPass(),
    )
    return steps(model).model


def _portable_ir(model: onnx.ModelProto) -> int:
    """Return the oldest IR version that suits the opset, between what initializers need and what is portable."""
    imports: Sequence[onnx.OperatorSetIdProto] = [e for e in model.opset_import if e.domain in ("", "ai.onnx")]
    least = max(_IR_WITHOUT_INITIALIZER_INPUTS, helper.find_min_ir_version_for(imports) if imports else 0)
    return max(least, min(model.ir_version, IR_PORTABLE))


def _differences(model: onnx.ModelProto, tidy: onnx.ModelProto) -> dict[str, int]:
    counts = {
        "functions_inlined": len(model.functions) - len(tidy.functions),
        "constants_lifted": sum(map(_constants, graphs_of(model))) - sum(map(_constants, graphs_of(tidy))),
        "initializers_removed_from_inputs": len(model.graph.input) - len(tidy.graph.input),
        "nodes_named": sum(not node.name for node in model.graph.node),
        "unused_nodes_removed": 0
        if model.functions
        else len(model.graph.node) - _constants(model.graph) - len(tidy.graph.node),
        "shapes_inferred": len(tidy.graph.value_info) - len(model.graph.value_info),
    }
    return {name: count for name, count in counts.items() if count > 0}


def _constants(graph: onnx.GraphProto) -> int:
    return sum(node.op_type == "Constant" for node in graph.node)
