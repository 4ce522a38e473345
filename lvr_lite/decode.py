"""The one decode loop: prefill, text steps and latent steps over a batch, on any Runtime. May import: numpy and the core.

It knows ids and arrays, neither torch nor ONNX Runtime nor strings. Every row has its own state, so rows may be in text and in
latent steps at the same time:

    row state    input of its next step                    leaves the state when
    text         embedding of the chosen token             the token is <|lvr_start|> -> latent; an end id or the limit -> done
    latent       feedback(hidden), K times                 K latents were fed -> closing
    closing      embedding of <|lvr_end|> (never chosen)   at once -> text
    done         embedding of the end token, ignored       never
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lvr_lite import sampling
from lvr_lite.errors import UsageError
from lvr_lite.runtime.base import Runtime


@dataclass(frozen=True)
class Prompt:
    """ids (S,) int64 with the image token at each visual token's place; features (T, H) those tokens; positions (3, S)."""

    ids: np.ndarray
    features: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Options:
    """How to decode.

    max_tokens: text tokens at most, markers not counted. min_tokens: no end of turn before so many (benchmarks).
    steps: latent steps K; None takes the model's own, 0 forbids latents.
    temperature: 0 is greedy. top_p: in (0, 1]. seed: of the sampler. keep_hidden: keep the hidden state of every step (evaluation, parity).
    """

    max_tokens: int = 32
    min_tokens: int = 0
    steps: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    keep_hidden: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise UsageError(f"min_tokens must lie between 0 and max_tokens ({self.max_tokens}), not {self.min_tokens}")
        if self.steps is not None and self.steps < 0:
            raise UsageError(f"steps must be 0 or more, not {self.steps}")
        if not self.temperature >= 0:
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, not {self.seed}")


@dataclass(frozen=True)
class Event:
    """What one row did in one step. kind: "token" (id is a text token), "start", "latent", "end" (markers and latents) or "done"
    (reason: "stop" or "length"). at: seconds since decoding began, when the event was known."""

    row: int
    kind: str
    id: int = -1
    reason: str = ""
    at: float = 0.0


@dataclass
class Result:
    """One row's outcome. tokens: text ids without markers and end. latents: K arrays (H,), what was fed back. hidden: the state after
    the prompt and after every step (H,), where kept. reason: "stop" or "length". ttft, ttfa: seconds from the start of decoding to the
    first text token, and to the first one after the latents; None where there was none."""

    tokens: list[int] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    hidden: list[np.ndarray] = field(default_factory=list)
    reason: str = ""
    ttft: float | None = None
    ttfa: float | None = None


@dataclass
class Clock:
    """Seconds spent by stage over one batch; a latent step is one in which every row that is not done is fed a hidden state."""

    prefill: float = 0.0
    embed: list[float] = field(default_factory=list)
    latent_step: list[float] = field(default_factory=list)
    text_step: list[float] = field(default_factory=list)
    lm_head: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)


class _Row:
    def __init__(self, position: int, steps: int) -> None:
        self.state = "text"
        self.position = position
        self.steps = steps  # latent steps of this row; spent once
        self.left = 0
        self.result = Result()


class Decoding:
    """One batch on its way. Iterate it for events; then `results` and `clock` hold the outcome."""

    def __init__(self, runtime: Runtime, prompts: list[Prompt], options: Options) -> None:
        self.runtime, self.prompts, self.options = runtime, prompts, options
        self.clock = Clock()
        steps = runtime.latent.steps if options.steps is None else options.steps
        if steps and not runtime.latent.steps:
            raise UsageError(f"this model was not tuned for latent steps: use steps 0, not {steps}")
        self.rows = [_Row(int(p.positions.max()) + 1, steps) for p in prompts]
        # a generator a row, so that a row's draws do not hang on what else is in the batch
        self.rngs = [np.random.default_rng([options.seed, i]) for i in range(len(prompts))]
        self.began = 0.0

    @property
    def results(self) -> list[Result]:
        return [row.result for row in self.rows]

    def __iter__(self) -> Iterator[Event]:
        self.began = time.perf_counter()
        hidden = self._prefill()
        while True:
            feed, latent, events = self._advance(hidden)
            yield from events
            working = np.array([row.state != "done" for row in self.rows])
            if not working.any():
                return
            embeds = self._inputs(hidden, feed, latent)
            positions = np.array([row.position for row in self.rows], np.int64)
            stage = self.clock.latent_step if latent[working].all() else self.clock.text_step
            t = time.perf_counter()
            hidden = self.runtime.step(embeds, positions)
            stage.append(time.perf_counter() - t)
            for row in self.rows:
                row.position += 1

    def _prefill(self) -> np.ndarray:
        lengths = np.array([len(p.ids) for p in self.prompts], np.int64)
        longest = int(lengths.max())
        room = longest + max(row.steps for row in self.rows) + 2 + self.options.max_tokens
        t = time.perf_counter()
        self.runtime.start(len(self.prompts), room)
        ids = np.full((len(self.prompts), longest), self.runtime.tokens.end[0], np.int64)
        positions = np.zeros((3, len(self.prompts), longest), np.int64)
        for i, p in enumerate(self.prompts):
            ids[i, : lengths[i]], positions[:, i, : lengths[i]] = p.ids, p.positions
        embeds = self.runtime.embed(ids)
        for i, p in enumerate(self.prompts):
            embeds[i, : lengths[i]][p.ids == self.runtime.tokens.image] = p.features
        self.clock.embed.append(time.perf_counter() - t)
        t = time.perf_counter()
        hidden = self.runtime.prefill(embeds, positions, lengths)
        self.clock.prefill = time.perf_counter() - t
        return hidden

    def _inputs(self, hidden: np.ndarray, feed: np.ndarray, latent: np.ndarray) -> np.ndarray:
        """Input embeddings of the next step (B, H): hidden states for rows in latent steps, word embeddings for the others."""
        if latent.all():
            return hidden  # feedback "identity": what came out goes in, and a runtime may see that it is the same array
        t = time.perf_counter()
        embeds = self.runtime.embed(feed)[:, 0]
        embeds[latent] = hidden[latent]
        self.clock.embed.append(time.perf_counter() - t)
        return embeds

    def _advance(self, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Event]]:
        """The ids that rows feed next (B, 1), which rows feed their hidden state instead (B,), and what happened.

        The head runs once, for the rows that are in text."""
        tokens = self.runtime.tokens
        events: list[Event] = []
        if self.options.keep_hidden:
            for row, state in zip(self.rows, hidden, strict=True):
                if row.state != "done":
                    row.result.hidden.append(state.copy())
        chosen = self._choose(hidden)
        feed = np.full((len(self.rows), 1), tokens.end[0], np.int64)
        latent = np.zeros(len(self.rows), bool)
        for i, row in enumerate(self.rows):
            if row.state == "text":
                self._take(i, row, chosen[i], feed, events)
            elif row.state == "latent" and row.left > 0:
                row.left -= 1
                latent[i] = True
                row.result.latents.append(hidden[i].copy())
                events.append(self._event(i, "latent"))
            elif row.state == "latent":
                row.state = "text"
                feed[i] = tokens.lvr_end
                events.append(self._event(i, "end"))
        return feed, latent, events

    def _choose(self, hidden: np.ndarray) -> dict[int, int]:
        speaking = [i for i, row in enumerate(self.rows) if row.state == "text"]
        if not speaking:
            return {}
        tokens = self.runtime.tokens
        t = time.perf_counter()
        logits = self.runtime.head(hidden[speaking])
        self.clock.lm_head.append(time.perf_counter() - t)
        t = time.perf_counter()
        never = [tokens.lvr, tokens.lvr_end, tokens.image]
        chosen = {}
        for i, row_logits in zip(speaking, logits, strict=True):
            row = self.rows[i]
            scores = np.array(row_logits, np.float32)
            scores[never] = -np.inf
            if len(row.result.tokens) < self.options.min_tokens:
                scores[list(tokens.end)] = -np.inf
            if not row.steps:  # no latents asked for, or already spent
                scores[tokens.lvr_start] = -np.inf
            chosen[i] = sampling.sample(scores, self.options.temperature, self.options.top_p, self.rngs[i])
        self.clock.sampling.append(time.perf_counter() - t)
        return chosen

    def _take(self, i: int, row: _Row, token: int, feed: np.ndarray, events: list[Event]) -> None:
        """A row in text has chosen `token`: where that leads."""
        now = time.perf_counter() - self.began
        if token == self.runtime.tokens.lvr_start:
            row.state, row.left, row.steps = "latent", row.steps, 0
            feed[i] = token
            events.append(self._event(i, "start"))
            return
        result = row.result
        if token in self.runtime.tokens.end:
            row.state, result.reason = "done", "stop"
        else:
            result.tokens.append(token)
            if result.ttft is None:
                result.ttft = now
            if result.ttfa is None and (result.latents or not row.steps):
                result.ttfa = now
            events.append(self._event(i, "token", id=token))
            feed[i] = token
            if len(result.tokens) >= self.options.max_tokens:
                row.state, result.reason = "done", "length"
        if row.state == "done":
            events.append(self._event(i, "done", reason=result.reason))

    def _event(self, row: int, kind: str, **more: object) -> Event:
        return Event(row, kind, at=time.perf_counter() - self.began, **more)  # type: ignore[arg-type]


def decode(runtime: Runtime, prompts: list[Prompt], options: Options | None = None) -> list[Result]:
    """Decode a batch to its end; see `Decoding` for events and timing."""
    decoding = Decoding(runtime, prompts, options or Options())
    for _ in decoding:
        pass
    return decoding.results
