"""From a torch module to an ONNX graph without weights that knows where each weight comes from.

May import: torch, onnx, onnx_ir, numpy.

The module is a part of an empty model, whose parameters hold one signaling NaN each
(`lvr_lite.export.weights`). torch's exporter writes them into the graph as they are, reshaped or
transposed; so the NaN in a weight of the graph tells which parameter it is, and a model of any size
is exported in little memory.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lvr_lite.errors import LvrError
from lvr_lite.export.graphs.operators import OPSET
from lvr_lite.export.graphs.spec import GraphSpec
from lvr_lite.export.onnxfile import declared


@dataclass(frozen=True)
class Origin:
    """Where an initializer's values come from.

    parameter: its name in the model; the values are the same, reshaped to the initializer's shape.
    transposed: whether the initializer is (in, out), the parameter (out, in).
    rows: which rows of the parameter, in which order; None for all.
    """

    parameter: str
    transposed: bool
    rows: np.ndarray | None = None


def structure(
    spec: GraphSpec, codes: Mapping[int, str]
) -> tuple[onnx.ModelProto, dict[str, Origin]]:
    """The ONNX graph of a part of an empty model, its weights declared but not there, and
    {initializer: its origin}. A part can be used once.

    codes: `lvr_lite.export.weights.origins` of the model. Raises LvrError where a linear layer did
    not become a MatMul with a constant weight (it would stay unquantized unnoticed), and where a
    constant was computed from weights, which are not there.
    """
    assert not any(isinstance(m, _Product) for m in spec.module.modules()), (
        "this empty model was exported before; make another"
    )
    name = type(spec.module).__name__
    transposed = set(_as_products(spec.module))
    model = _exported(spec)
    _name_nodes(model)
    _check_linears(transposed, model, name)
    origins: dict[str, Origin] = {}
    initializers: list[onnx.TensorProto] = []
    parameters = dict(spec.module.named_parameters())
    for key, value in model.graph.initializers.items():
        array = value.const_value.numpy()
        parameter = None
        if key in parameters:
            parameter = codes.get(_code_in(array))
        if parameter is not None:
            origins[key] = Origin(parameter, key in transposed, spec.rows.get(key))
            initializers.append(declared(key, np.float32, array.shape))
        elif array.dtype.kind == "f" and np.isnan(array).any():
            raise LvrError(
                f"{name}: the exporter computed {key} from weights, which it must not; "
                "nothing was written"
            )
        else:
            initializers.append(onnx.numpy_helper.from_array(array, key))
        # The exporter's own copy is not needed any more: it would hold a weight's full size.
        value.const_value = ir.tensor(np.zeros(0, np.float32), name=key)
    proto = ir.to_proto(model)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(initializers)
    return proto, origins


def _exported(spec: GraphSpec) -> ir.Model:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            spec.module.eval(),
            spec.arguments,
            dynamo=True,
            input_names=spec.inputs,
            output_names=spec.outputs,
            dynamic_shapes=spec.varying,
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    # With dynamo=True and no file name, the program is what comes back.
    assert program is not None
    return program.model


def _code_in(array: np.ndarray) -> int:
    """The code of the parameter that these values stand for, if they stand for one; else 0."""
    if array.dtype != np.float32 or array.size == 0:
        return 0
    return int(array.reshape(-1)[:1].view(np.int32)[0])


class _Product(nn.Module):
    """A linear layer with its weight as (in, out), so that it leaves as MatMul without a
    transposition; an adapter stays beside it:

        x ─┬─ @ weight ─────────── + ──(+ bias)
           └─ @ lora_A ── @ lora_B ┘
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = _transposed(linear.weight)
        self.bias = linear.bias
        # `TrainedWeights(…, unmerged=True)` puts adapters on the linears of its empty model.
        adapter = [p for name, p in linear.named_parameters() if name in ("lora_A", "lora_B")]
        self.adapted = bool(adapter)
        if adapter:
            self.lora_A, self.lora_B = map(_transposed, adapter)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        if self.adapted:
            y = y + (x @ self.lora_A) @ self.lora_B
        if self.bias is None:
            return y
        return y + self.bias


def _transposed(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().t(), requires_grad=False)


def _as_products(module: nn.Module) -> list[str]:
    """Turns all linear layers below `module` into products; returns the names of the weights that
    they hold transposed.
    """
    transposed = []
    for path, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            product = _Product(child)
            setattr(parent, name, product)
            place = f"{path}.{name}" if path else name
            matrices = [key for key, p in product.named_parameters() if p.dim() == 2]
            transposed += [f"{place}.{key}" for key in matrices]
    return transposed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter says that is not about our graphs; everything else still shows."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch.export pickles its own tree specifications through a class that it deprecates
            # itself.
            warnings.filterwarnings(
                "ignore",
                message=r"`isinstance\(treespec, LeafSpec\)` is deprecated",
                category=FutureWarning,
            )
            # numpy, of the NaNs that stand for weights
            warnings.filterwarnings(
                "ignore", message="invalid value encountered", category=RuntimeWarning
            )
            # One Dim serves several inputs on purpose; the exporter says so once an axis.
            warnings.filterwarnings(
                "ignore", message="# The axis name: .* will not be used", category=UserWarning
            )
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _module_path(node: ir.Node) -> str:
    """The module that a node comes from, e.g. "language_model.layers.0.mlp.up_proj"; empty for the
    module that was exported.
    """
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    if len(scopes) < 2:
        return ""
    return str(scopes[-2])


def _name_nodes(model: ir.Model) -> None:
    """Names nodes after their modules ("….up_proj/MatMul"), and drops the exporter's traces, which
    hold this machine's paths.
    """
    counts: Counter[str] = Counter()
    for node in model.graph:
        path = _module_path(node)
        name = f"{path}/{node.op_type}" if path else node.op_type
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _check_linears(weights: set[str], model: ir.Model, name: str) -> None:
    """Raises LvrError where one of these weights is not the second input of a MatMul."""
    multiplied = {
        node.inputs[1].name
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None
    }
    lost = sorted(weights - multiplied)
    if lost:
        raise LvrError(
            f"{name}: {len(lost)} of {len(weights)} linear layers are not MatMul nodes "
            f"(first: {lost[0]}); nothing was written"
        )
