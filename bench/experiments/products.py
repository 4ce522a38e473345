"""What one weight costs in ONNX Runtime's MatMulNBits by bits, block and zero points, at one token
and at 300: interleaved, in one run.

    python docs/results/products.py        (two minutes on 2 cores)

Ten pairs of 1536 x 8960 and 8960 x 1536 in a row, 275 million weights: more than a cache holds at
any precision.
"""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lvr_lite.bench.machine import read_bandwidth
from lvr_lite.system import usable_cores

HIDDEN, INNER, PAIRS, ROUNDS = 1536, 8960, 10, 9
CASES = [
    (bits, block, symmetric)
    for bits, block in ((4, 32), (4, 64), (4, 128), (4, 256), (8, 32), (8, 128))
    for symmetric in (True, False)
]


def chain(bits: int, block: int, symmetric: bool) -> tuple[ort.InferenceSession, int]:
    """A session, and the bytes of its weights."""
    rng, nodes, weights, value = np.random.default_rng(0), [], [], "x"
    for i in range(2 * PAIRS):
        columns, rows = (HIDDEN, INNER) if i % 2 == 0 else (INNER, HIDDEN)
        blocks = -(-columns // block)
        arrays = {
            f"q{i}": rng.integers(0, 256, (rows, blocks, block * bits // 8), dtype=np.uint8),
            f"s{i}": np.full((rows, blocks), 1e-3, np.float32),
        }
        if not symmetric:
            arrays[f"z{i}"] = np.full(
                (rows, -(-blocks * bits // 8)), 0x88 if bits == 4 else 128, np.uint8
            )
        weights += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        form = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4}
        nodes.append(
            helper.make_node(
                "MatMulNBits", [value, *arrays], [f"y{i}"], domain="com.microsoft", **form
            )
        )
        value = f"y{i}"
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, HIDDEN]),
        helper.make_tensor_value_info(value, TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    size = sum(onnx.numpy_helper.to_array(w).nbytes for w in weights)
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ), size


def main() -> None:
    sessions = {case: chain(*case) for case in CASES}
    times: dict[tuple[tuple[int, int, bool], int], list[float]] = {}
    rng = np.random.default_rng(0)
    for number in range(ROUNDS):
        for index in rng.permutation(len(CASES)):
            case = CASES[index]
            for length, repeats in ((1, 4), (300, 1 if number % 3 == 0 else 0)):
                x = rng.standard_normal((length, HIDDEN)).astype(np.float32)
                for _ in range(repeats):
                    began = time.perf_counter()
                    sessions[case][0].run(None, {"x": x})
                    times.setdefault((case, length), []).append((time.perf_counter() - began) * 1e3)
    print(
        "| bits | block | zero points | 1 token, ms | GB/s | 300 tokens, ms |\n|---|---|---|---|---|---|"
    )
    for case in CASES:
        one, many = (float(np.median(times[case, length])) for length in (1, 300))
        print(
            f"| {case[0]} | {case[1]} | {'no' if case[2] else 'yes'} | {one:.1f} | {sessions[case][1] / one / 1e6:.1f} | {many:.0f} |"
        )
    print(f"memory read at {read_bandwidth(usable_cores()):.1f} GB/s")


if __name__ == "__main__":
    main()
