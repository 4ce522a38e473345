"""What one weight costs in ONNX Runtime's MatMulNBits by bits, block and zero points, at one token
and at 300, measured by turns. Two minutes on two cores.

    python -m lvr_lite.bench.experiments.products

Ten pairs of 1536 x 8960 and 8960 x 1536 in a row, 275 million weights: more than a cache holds at
any precision.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lvr_lite.bench.experiments.runner import CORES, Rounds, launch, table
from lvr_lite.bench.machine import read_bandwidth

HIDDEN = 1536
INNER = 8960
PAIRS = 10
FORMS = ((4, 32), (4, 64), (4, 128), (4, 256), (8, 32), (8, 128))
TITLES = ("bits", "block", "zero points", "1 token, ms", "GB/s", "300 tokens, ms")


@dataclass(frozen=True)
class Case:
    """A form of weights."""

    bits: int
    block: int
    symmetric: bool


def weights_of(case: Case, i: int) -> dict[str, np.ndarray]:
    """Of the i-th product: random values, scales, and zero points in the middle."""
    columns, rows = sizes_of(i)
    blocks = -(-columns // case.block)
    block_bytes = case.block * case.bits // 8
    rng = np.random.default_rng(i)
    weights: dict[str, np.ndarray] = {
        f"q{i}": rng.integers(
            0,
            256,
            (rows, blocks, block_bytes),
            dtype=np.uint8,
        ),
        f"s{i}": np.full((rows, blocks), 1e-3, np.float32),
    }
    if not case.symmetric:
        middle = 0x88 if case.bits == 4 else 128
        zero_bytes = -(-blocks * case.bits // 8)
        weights[f"z{i}"] = np.full((rows, zero_bytes), middle, np.uint8)
    return weights


def sizes_of(i: int) -> tuple[int, int]:
    """Columns and rows of the i-th product."""
    if i % 2 == 0:
        return (HIDDEN, INNER)
    return (INNER, HIDDEN)


def chain(case: Case) -> tuple[ort.InferenceSession, int]:
    """Products in a row, x -> y0 -> y1 …: a session, and the bytes of its weights."""
    nodes = []
    tensors = []
    value = "x"
    for i in range(2 * PAIRS):
        weights = weights_of(case, i)
        columns, rows = sizes_of(i)
        output = f"y{i}"
        node = helper.make_node(
            "MatMulNBits",
            [value, *weights],
            [output],
            domain="com.microsoft",
            bits=case.bits,
            block_size=case.block,
            accuracy_level=4,
            K=columns,
            N=rows,
        )
        nodes.append(node)
        tensors += [numpy_helper.from_array(array, name) for name, array in weights.items()]
        value = output
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, HIDDEN])
    y = helper.make_tensor_value_info(value, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "products", [x], [y], tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = CORES
    session = ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return session, sum(len(tensor.raw_data) for tensor in tensors)


def main(rounds: Rounds = 9) -> None:
    cases = []
    for bits, block in FORMS:
        cases.append(Case(bits, block, symmetric=True))
        cases.append(Case(bits, block, symmetric=False))
    chains = [chain(case) for case in cases]
    # ms of each run by case and number of tokens.
    times: dict[tuple[Case, int], list[float]] = defaultdict(list)
    rng = np.random.default_rng(0)
    for number in range(rounds):
        # Long ones in every third round.
        repeats = {1: 4, 300: 1 if number % 3 == 0 else 0}
        for index in rng.permutation(len(cases)):
            session, _ = chains[index]
            for length, count in repeats.items():
                x = rng.standard_normal((length, HIDDEN)).astype(np.float32)
                for _ in range(count):
                    began = time.perf_counter()
                    session.run(None, {"x": x})
                    seconds = time.perf_counter() - began
                    times[cases[index], length].append(seconds * 1e3)
    rows: list[list[object]] = []
    for case, (_, size) in zip(cases, chains, strict=True):
        one = float(np.median(times[case, 1]))
        many = float(np.median(times[case, 300]))
        cells: list[object] = [
            case.bits,
            case.block,
            "no" if case.symmetric else "yes",
            f"{one:.1f}",
            f"{size / one / 1e6:.1f}",
            f"{many:.0f}",
        ]
        rows.append(cells)
    print(table(TITLES, rows))
    print(f"memory read at {read_bandwidth(CORES):.1f} GB/s")


if __name__ == "__main__":
    launch(main, __doc__)
