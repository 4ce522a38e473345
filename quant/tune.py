"""Training after rounding, so that a decoder's answers and latents stay those of fp32. May import:
torch, numpy and what stands above `quant`.

GPTQ keeps each product close, one by one; what their errors do together shows only at the end. Here
the integers stay fixed. Block scales and norms are trained on the calibration prompts, end to end,
on the KL divergence of the distributions over words and on the drift of the latents (scales alone:
EfficientQAT, arXiv 2407.11062, section 3.3). Sizes and speed do not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lvr_lite import terminal
from lvr_lite.generate.onnx import open_session
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.bundle import Bundle
from lvr_lite.quant.products import Products, Reading
from lvr_lite.quant.reports import TuningReport
from lvr_lite.quant.torchgraph import TorchGraph

# Of Adam: of each scale relative to itself, and of a norm's weights.
RATE = 5e-4
# Readings a step.
BATCH = 4
# Steps over which the rate rises.
WARM_UP = 5
# One prompt of so many is not trained on; it decides whether the trained values are kept.
HELD_OUT = 8


@dataclass(frozen=True)
class Tuner:
    """Trains the scales and norms of a bundle that was rounded for these products.

    runtime: has the head that turns fp32's states into the distributions to keep.
    steps: of the optimizer.
    progress: is told one line.
    """

    runtime: Runtime
    products: Products
    steps: int
    progress: Callable[[str], None]

    def tune(self, bundle: Bundle) -> TuningReport:
        """Change the decoder of a bundle in its files, where that is better."""
        report = Tuning(bundle, self.runtime, self.products.readings()).run(self.steps)
        outcome = "no better, so not kept"
        if report.kept:
            outcome = "kept"
        self.progress(
            f"scales and norms: {self.steps} steps, loss held out {report.loss_before:.2e} -> "
            f"{report.loss_after:.2e}, {outcome}"
        )
        return report


class Tuning:
    """A quantized bundle beside what fp32 makes of the same readings; see `Tuner`."""

    def __init__(self, bundle: Bundle, runtime: Runtime, readings: list[Reading]) -> None:
        self._decoder = TorchGraph(bundle.path("decoder"))
        self._head = TorchGraph(bundle.path("lm_head"))
        self._embed = open_session(bundle.path("embed_tokens"))
        self._deepstack = bundle.manifest.graphs["decoder"].inputs.get("deepstack_embeds")
        self._runtime = runtime
        self._tokens = runtime.processor.tokens
        self._held_out = [reading for reading in readings if reading.prompt % HELD_OUT == 0]
        self._trained_on = [reading for reading in readings if reading.prompt % HELD_OUT]

    def run(self, steps: int) -> TuningReport:
        """Train for so many steps, and write the result only where the readings held out came
        nearer to fp32's.
        """
        before = self._loss_held_out()
        optimizer = torch.optim.Adam(self._decoder.parameters(), RATE, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate_at, steps))
        rng = np.random.default_rng(0)
        order: list[int] = []
        for _ in terminal.bar(range(steps), "scales and norms"):
            for _ in range(BATCH):
                order = order or list(rng.permutation(len(self._trained_on)))
                loss = self._loss(self._trained_on[order.pop()]) / BATCH
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        after = self._loss_held_out()
        if after < before:
            self._decoder.write()
        return TuningReport(
            steps=steps,
            loss_before=before,
            loss_after=after,
            kept=after < before,
            held_out=len(self._held_out),
        )

    def states(self, reading: Reading) -> Tensor:
        """The quantized decoder's (S, H): words are embedded by its own table, visual tokens and
        latents are those that fp32 was fed.
        """
        words = ~np.isin(reading.ids, (self._tokens.image, self._tokens.lvr))
        embeds = reading.call.hidden.copy()
        ids = reading.ids[None, words]
        (word_embeds,) = self._embed.run(None, {"input_ids": ids})
        embeds[0, words] = word_embeds[0]
        inputs = {"inputs_embeds": embeds, "position_ids": reading.call.positions}
        if self._deepstack is not None:
            added = reading.call.added
            if added is None:
                width = int(self._deepstack.axes[-1])
                added = np.zeros((*embeds.shape[:2], width), np.float32)
            inputs["deepstack_embeds"] = added
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return self._decoder(tensors)[0]

    def _loss_held_out(self) -> float:
        with torch.no_grad():
            return float(np.mean([float(self._loss(reading)) for reading in self._held_out]))

    def _loss(self, reading: Reading) -> Tensor:
        """KL of the distributions after each word, in nats, plus 1 - cosine of the states that are
        latents: means of both.
        """
        tokens = self._tokens
        latents = (reading.ids == tokens.lvr) | (reading.ids == tokens.lvr_start)
        words = ~latents & (reading.ids != tokens.image)
        states = self.states(reading)
        logits = self._head({"last_hidden_state": states[words]})
        wanted = torch.from_numpy(self._runtime.head(reading.states[words]))
        loss = functional.kl_div(
            logits.log_softmax(-1),
            wanted.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        if not latents.any():
            return loss
        reference = torch.from_numpy(reading.states[latents])
        cosine = functional.cosine_similarity(states[latents], reference)
        return loss + (1 - cosine).mean()


def _rate_at(steps: int, step: int) -> float:
    """Part of the full rate: it rises over WARM_UP steps, and falls to 0 as a cosine does."""
    rise = min(1, (step + 1) / WARM_UP)
    return rise * (1 + math.cos(math.pi * step / steps)) / 2
