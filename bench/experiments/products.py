"""What one weight costs in ONNX Runtime's MatMulNBits by bits, block and zero points, at one token
and at 300, measured by turns. Two minutes on two cores.

    python -m lvr_lite.bench.experiments.products

Ten pairs of 1536 x 8960 and 8960 x 1536 in a row, 275 million weights: more than a cache holds at
any precision.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lvr_lite.bench.experiments.runner import CORES, Rounds, start, table
from lvr_lite.bench.machine import read_bandwidth

HIDDEN = 1536
INNER = 8960
PAIRS = 10
FORMS = ((4, 32), (4, 64), (4, 128), (4, 256), (8, 32), (8, 128))
TITLES = ("bits", "block", "zero points", "1 token, ms", "GB/s", "300 tokens, ms")


@dataclass
class Case:
    """One form of weights. size: their bytes. times: ms of each run, by the number of tokens."""

    bits: int
    block: int
    symmetric: bool
    size: int = 0
    times: dict[int, list[float]] = field(default_factory=lambda: {1: [], 300: []})

    def __post_init__(self) -> None:
        weights = [self._weights(i) for i in range(2 * PAIRS)]
        self.size = sum(array.nbytes for arrays in weights for array in arrays.values())
        options = ort.SessionOptions()
        options.intra_op_num_threads = CORES
        providers = ["CPUExecutionProvider"]
        graph = self._graph(weights).SerializeToString()
        self._session = ort.InferenceSession(graph, options, providers=providers)

    def _weights(self, i: int) -> dict[str, np.ndarray]:
        """Random weights, scales, and zero points in the middle."""
        columns, rows = _sizes(i)
        blocks = -(-columns // self.block)
        rng = np.random.default_rng(i)
        shape = (rows, blocks, self.block * self.bits // 8)
        arrays = {
            f"q{i}": rng.integers(0, 256, shape, dtype=np.uint8),
            f"s{i}": np.full((rows, blocks), 1e-3, np.float32),
        }
        if not self.symmetric:
            middle = 0x88 if self.bits == 4 else 128
            arrays[f"z{i}"] = np.full((rows, -(-blocks * self.bits // 8)), middle, np.uint8)
        return arrays

    def _graph(self, weights: list[dict[str, np.ndarray]]) -> onnx.ModelProto:
        """Products in a row, x -> y0 -> y1 …"""
        form = {"bits": self.bits, "block_size": self.block, "accuracy_level": 4}
        nodes = []
        tensors = []
        value = "x"
        for i, arrays in enumerate(weights):
            columns, rows = _sizes(i)
            inputs = [value, *arrays]
            value = f"y{i}"
            nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    inputs,
                    [value],
                    domain="com.microsoft",
                    K=columns,
                    N=rows,
                    **form,
                )
            )
            tensors += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, HIDDEN])
        y = helper.make_tensor_value_info(value, TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "products", [x], [y], tensors)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def run(self, x: np.ndarray) -> None:
        """Measure one run with x (tokens, HIDDEN)."""
        began = time.perf_counter()
        self._session.run(None, {"x": x})
        self.times[len(x)].append((time.perf_counter() - began) * 1e3)

    def cells(self) -> list[object]:
        one, many = (float(np.median(times)) for times in self.times.values())
        zero_points = "no" if self.symmetric else "yes"
        speed = self.size / one / 1e6
        return [self.bits, self.block, zero_points, f"{one:.1f}", f"{speed:.1f}", f"{many:.0f}"]


def _sizes(i: int) -> tuple[int, int]:
    """Columns and rows of the i-th product."""
    return (HIDDEN, INNER) if i % 2 == 0 else (INNER, HIDDEN)


def main(rounds: Rounds = 9) -> None:
    cases = [Case(*form, symmetric) for form in FORMS for symmetric in (True, False)]
    rng = np.random.default_rng(0)
    for number in range(rounds):
        for index in rng.permutation(len(cases)):
            for length, repeats in ((1, 4), (300, 1 if number % 3 == 0 else 0)):
                x = rng.standard_normal((length, HIDDEN)).astype(np.float32)
                for _ in range(repeats):
                    cases[index].run(x)
    print(table(TITLES, [case.cells() for case in cases]))
    print(f"memory read at {read_bandwidth(CORES):.1f} GB/s")


if __name__ == "__main__":
    start(main, __doc__)
