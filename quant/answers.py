"""How far the answers of a quantized bundle are from the fp32 one's, latents included. May import:
numpy and what stands above `quant`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvr_lite.generate.decode import Decoding, Options, Prompt, Result, State
from lvr_lite.generate.runtime import Runtime
from lvr_lite.quant.reports import AnswerLoss

# Prompts decoded together.
BATCH = 16
# Text tokens of an answer at most.
TOKENS = 24


@dataclass(frozen=True)
class Reference:
    """What the fp32 bundle answered to one prompt.

    choices: the ids that its head chose, <|lvr_start|> and the end among them.
    log_probabilities: (V,) float32, at each choice.
    hidden: (H,) float32, the state after the prompt and after each step.
    latents: of `hidden`, the states that became latents.
    """

    choices: list[int]
    log_probabilities: list[np.ndarray]
    hidden: list[np.ndarray]
    latents: slice


class _ScriptedRuntime:
    """A runtime whose head records the logits of each row.

    scripts: the ids that each row of the batch has to choose; None leaves the choice to it.
    """

    def __init__(self, runtime: Runtime, scripts: Sequence[Sequence[int]] | None) -> None:
        self._runtime = runtime
        self._scripts = scripts
        self.logits: dict[int, list[np.ndarray]] = {}
        self.decoding: Decoding | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        assert self.decoding is not None
        logits = np.array(self._runtime.head(hidden))
        rows = [i for i, row in enumerate(self.decoding.rows) if row.state is State.TEXT]
        for place, row in enumerate(rows):
            recorded = self.logits.setdefault(row, [])
            recorded.append(logits[place].copy())
            if self._scripts is not None:
                choice = self._scripts[row][len(recorded) - 1]
                logits[place] = -np.inf
                logits[place, choice] = 0
        return logits


def reference_answers(runtime: Runtime, prompts: list[Prompt]) -> list[Reference]:
    """What a bundle answers by itself."""
    answers = []
    for part in _batches(len(prompts)):
        for result, scores in _decode(runtime, prompts[part], None):
            latents = _latent_states(result, runtime.processor.tokens.lvr_start)
            answers.append(
                Reference(
                    choices=result.choices,
                    log_probabilities=scores,
                    hidden=result.hidden,
                    latents=latents,
                )
            )
    return answers


def _latent_states(result: Result, start: int) -> slice:
    """The hidden states of an answer that became its latents; start: <|lvr_start|>.

    Until the loop opens, each choice was made from one state. The one that chose <|lvr_start|> is
    followed by those that became latents.
    """
    if start not in result.choices:
        return slice(0)
    first = result.choices.index(start) + 1
    return slice(first, first + len(result.latents))


def answer_loss(runtime: Runtime, prompts: list[Prompt], references: list[Reference]) -> AnswerLoss:
    """How far a bundle is from the fp32 one, made to choose the same tokens, but fed with its own
    latents.
    """
    divergences: list[float] = []
    gaps: list[float] = []
    for part in _batches(len(prompts)):
        scripts = [reference.choices for reference in references[part]]
        answers = _decode(runtime, prompts[part], scripts)
        for (result, scores), reference in zip(answers, references[part], strict=True):
            for own, wanted in zip(scores, reference.log_probabilities, strict=True):
                divergences.append(_divergence(wanted, own))
            steps = reference.latents
            for wanted, own in zip(reference.hidden[steps], result.hidden[steps], strict=True):
                gaps.append(1 - _cosine(wanted, own))
    drift = 0.0
    if gaps:
        drift = float(np.mean(gaps))
    return AnswerLoss(
        kl=float(np.mean(divergences)),
        drift=drift,
    )


def _divergence(wanted: np.ndarray, own: np.ndarray) -> float:
    """KL of one choice's log-probabilities (V,) from those wanted."""
    weighed = np.exp(wanted) * (wanted - own)
    return float(weighed.sum())


def _decode(
    runtime: Runtime, prompts: list[Prompt], scripts: Sequence[Sequence[int]] | None
) -> list[tuple[Result, list[np.ndarray]]]:
    """Each prompt's result, and the log-probabilities (V,) at each of its choices."""
    scripted = _ScriptedRuntime(runtime, scripts)
    options = Options(max_tokens=TOKENS, keep_hidden=True)
    decoding = Decoding(scripted, prompts, options)
    scripted.decoding = decoding
    for _ in decoding:
        pass
    return [
        (result, [_log_softmax(logits) for logits in scripted.logits[row]])
        for row, result in enumerate(decoding.results)
    ]


def _batches(count: int) -> Iterator[slice]:
    for first in range(0, count, BATCH):
        yield slice(first, first + BATCH)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max()
    total = np.log(np.exp(x).sum())
    return np.asarray(x - total, np.float32)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / max(lengths, 1e-30)
