"""The one decode loop: prefill, text steps and latent steps over a batch, on any Runtime. May
import: numpy and the core.

It knows ids and arrays, neither torch nor ONNX Runtime nor strings. Every row has its own state, so
rows may be in text and in latent steps at the same time:

    row state    input of its next step                    leaves the state when
    text         embedding of the chosen token             the token is <|lvr_start|> -> latent; an end id or the limit -> done
    latent       feedback(hidden), K times                 open: K were fed -> closing; bottleneck: K are known -> handed over -> text
    closing      embedding of <|lvr_end|> (never chosen)   at once -> text
    done         embedding of the end token, ignored       never

Handing over (lvr_lite/model/spec.py): the row's K/V is dropped, and its prompt is read again, in
one call, with the K latents in place of its visual tokens. The last latent is never fed to the pass
that sees the picture, and no <|lvr_end|> is needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lvr_lite.errors import UsageError
from lvr_lite.generate import sampling
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.latents import likeness
from lvr_lite.model.spec import TokenIds


@dataclass
class Prefix:
    """The first `length` ids of several prompts about the same pictures. kept: their K/V
    (`Runtime.keep`), once one of these prompts was decoded; the others, decoded alone, then read
    only what comes after.
    """

    length: int
    kept: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Prompt:
    """ids (S,) int64 with the image token at each visual token's place; features (T, H) those
    tokens; positions (3, S).

    features may be wider than H: what lies beyond is for the runtime to add in later layers
    (families/qwen3_vl.py). prefix: where other prompts begin with the same ids and features, what
    they share.
    """

    ids: np.ndarray
    features: np.ndarray
    positions: np.ndarray
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Options:
    """How to decode.

    max_tokens: text tokens at most, markers not counted. min_tokens: no end of turn before so many
    (benchmarks). steps: latent steps K; None takes the model's own, 0 forbids latents. temperature:
    0 is greedy. top_p: in (0, 1]. seed: of the sampler. keep_hidden: keep the hidden state of every
    step (evaluation, parity). keep_scores: keep the log-probability of every choice, as it was
    drawn (reinforcement learning).
    """

    max_tokens: int = 32
    min_tokens: int = 0
    steps: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    keep_hidden: bool = False
    keep_scores: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise UsageError(
                f"min_tokens must lie between 0 and max_tokens ({self.max_tokens}), not {self.min_tokens}"
            )
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
    """What one row did in one step. kind: "token" (id is a text token), "start", "latent", "end"
    (markers and latents) or "done" (reason: "stop" or "length"). at: seconds since decoding began,
    when the event was known.
    """

    row: int
    kind: str
    id: int = -1
    reason: str = ""
    at: float = 0.0


@dataclass
class Result:
    """One row's outcome. tokens: text ids without markers and end. choices: all ids that the head
    chose, <|lvr_start|> and the end among them; scores: their log-probabilities, where kept.
    latents: K arrays (H,), what was fed back. hidden: the state after the prompt and after every
    step (H,), where kept. reason: "stop" or "length". ttft, ttfa: seconds from the start of
    decoding to the first text token, and to the first one after the latents; None where there was
    none.
    """

    tokens: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    hidden: list[np.ndarray] = field(default_factory=list)
    reason: str = ""
    ttft: float | None = None
    ttfa: float | None = None


@dataclass
class Clock:
    """Seconds spent by stage over one batch. A latent step is one in which every row that is not
    done is fed a latent; hand_over: reading the latents without the picture (bottleneck).
    """

    prefill: float = 0.0
    hand_over: float = 0.0
    embed: list[float] = field(default_factory=list)
    latent_step: list[float] = field(default_factory=list)
    text_step: list[float] = field(default_factory=list)
    lm_head: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)


class _Row:
    def __init__(self, position: int, steps: int, given: np.ndarray | None) -> None:
        self.state = "text"
        self.position = position
        self.given = given  # latents (K, H) to feed instead of its own
        self.steps = steps if given is None else len(given)
        self.may_start = steps > 0 or given is not None  # once
        self.left = 0
        self.result = Result()


class Decoding:
    """One batch on its way. Iterate it for events; then `results` and `clock` hold the outcome.

    latents: one entry a prompt: None, or what its latent steps are fed instead of its own states,
    (K_i, H) float32; K_i = 0 leaves the markers alone (interventions: lvr_lite/eval/probe.py).
    draws: the number of each row's stream of random numbers; its place in the batch by default.
    """

    def __init__(
        self,
        runtime: Runtime,
        prompts: list[Prompt],
        options: Options,
        latents: Sequence[np.ndarray | None] | None = None,
        draws: Sequence[int] | None = None,
    ) -> None:
        self.runtime, self.prompts, self.options = runtime, prompts, options
        self.tokens = runtime.processor.tokens
        self.clock = Clock()
        steps = runtime.latent.steps if options.steps is None else options.steps
        if steps and not runtime.latent.steps:
            raise UsageError(f"this model was not tuned for latent steps: use steps 0, not {steps}")
        given = [None] * len(prompts) if latents is None else latents
        self.rows = [
            _Row(int(p.positions.max()) + 1, steps, g) for p, g in zip(prompts, given, strict=True)
        ]
        self._placeholder: np.ndarray | None = None
        self._never = np.array(
            [self.tokens.lvr, self.tokens.lvr_end, self.tokens.image]
        )  # is chosen
        # a generator a row, so that a row's draws do not hang on what else is in the batch
        self.rngs = [np.random.default_rng([options.seed, i]) for i in draws or range(len(prompts))]
        self.began = 0.0

    @property
    def results(self) -> list[Result]:
        return [row.result for row in self.rows]

    def __iter__(self) -> Iterator[Event]:
        self.began = time.perf_counter()
        hidden = self._prefill()
        while True:
            hidden, fed, events = self._reason(hidden)
            feed, chosen_events = self._speak(hidden)
            yield from events + chosen_events
            working = [i for i, row in enumerate(self.rows) if row.state != "done"]
            if not working:
                return
            embeds = self._inputs(hidden, feed, fed)
            positions = np.array([row.position for row in self.rows], np.int64)
            stage = (
                self.clock.latent_step if all(i in fed for i in working) else self.clock.text_step
            )
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
        prefix = self.prompts[0].prefix if len(self.prompts) == 1 else None
        if prefix is not None and prefix.kept is not None:
            self.runtime.put_back(prefix.kept)
            return self._read_on(self.prompts[0], prefix.length)
        ids = np.full((len(self.prompts), longest), self.tokens.end[0], np.int64)
        positions = np.zeros((3, len(self.prompts), longest), np.int64)
        for i, p in enumerate(self.prompts):
            ids[i, : lengths[i]], positions[:, i, : lengths[i]] = p.ids, p.positions
        embeds = self.runtime.embed(ids)
        wider = max(p.features.shape[1] for p in self.prompts) - embeds.shape[2]
        if wider:
            embeds = np.pad(embeds, ((0, 0), (0, 0), (0, wider)))
        for i, p in enumerate(self.prompts):
            embeds[i, : lengths[i]][p.ids == self.tokens.image, : p.features.shape[1]] = p.features
        self.clock.embed.append(time.perf_counter() - t)
        t = time.perf_counter()
        hidden = self.runtime.prefill(embeds, positions, lengths)
        if prefix is not None:
            prefix.kept = self.runtime.keep(prefix.length)
        self.clock.prefill = time.perf_counter() - t
        return hidden

    def _read_on(self, prompt: Prompt, known: int) -> np.ndarray:
        """The rest of a prompt after the `known` ids whose K/V are there; all its visual tokens lie
        among these.
        """
        t = time.perf_counter()
        embeds = self.runtime.embed(prompt.ids[None, known:])
        self.clock.embed.append(time.perf_counter() - t)
        t = time.perf_counter()
        rest = np.array([len(prompt.ids) - known], np.int64)
        hidden = self.runtime.prefill(embeds, prompt.positions[:, None, known:], rest, past=known)
        self.clock.prefill = time.perf_counter() - t
        return hidden

    def _inputs(
        self, hidden: np.ndarray, feed: np.ndarray, fed: dict[int, np.ndarray]
    ) -> np.ndarray:
        """Input embeddings of the next step (B, H): latents for the rows in `fed`, word embeddings
        for the others.
        """
        if len(fed) == len(self.rows):
            if self.runtime.latent.feedback == "identity" and all(
                row.given is None for row in self.rows
            ):
                return (
                    hidden  # what came out goes in, and a runtime may see that it is the same array
                )
            return np.stack([fed[i] for i in range(len(fed))])
        t = time.perf_counter()
        embeds = self.runtime.embed(feed)[:, 0]
        for i, vector in fed.items():
            embeds[i] = vector
        self.clock.embed.append(time.perf_counter() - t)
        return embeds

    def _reason(self, hidden: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray], list[Event]]:
        """Take rows in latent steps one further: hidden states (B, H), new ones where a row was
        handed over; what is fed next by row.
        """
        self._keep(hidden, range(len(self.rows)))
        fed: dict[int, np.ndarray] = {}
        events: list[Event] = []
        handed = []
        for i, row in enumerate(self.rows):
            if row.state != "latent":
                continue
            if row.left > 0:
                fed[i] = self._next_latent(row, hidden[i])
                row.left -= 1
                row.result.latents.append(np.array(fed[i]))
                events.append(self._event(i, "latent"))
            elif self.runtime.latent.mode == "open":
                row.state = "closing"
                events.append(self._event(i, "end"))
            if row.left == 0 and self.runtime.latent.mode == "bottleneck":
                fed.pop(i, None)
                handed.append(i)
                events.append(self._event(i, "end"))
        return (self._hand_over(hidden, handed) if handed else hidden), fed, events

    def _next_latent(self, row: _Row, hidden: np.ndarray) -> np.ndarray:
        if row.given is not None:
            return np.asarray(row.given[len(row.result.latents)], np.float32)
        if self.runtime.latent.feedback != "token":
            return np.asarray(self.runtime.latent.fed(hidden))
        if self._placeholder is None:
            self._placeholder = self.runtime.embed(np.array([[self.tokens.lvr]]))[0, 0]
        return self._placeholder

    def _hand_over(self, hidden: np.ndarray, handed: list[int]) -> np.ndarray:
        """Rows whose latents are known read their prompt again with these as its picture; all that
        has seen the picture is dropped.
        """
        t = time.perf_counter()
        read = [
            second_reading(self.prompts[i], self._given_latents(i), self.tokens) for i in handed
        ]
        lengths = np.array([len(ids) for ids, _, _ in read], np.int64)
        ids = np.full((len(handed), int(lengths.max())), self.tokens.end[0], np.int64)
        positions = np.zeros((3, *ids.shape), np.int64)
        for row, (row_ids, row_positions, _) in enumerate(read):
            ids[row, : len(row_ids)], positions[:, row, : len(row_ids)] = row_ids, row_positions
        embeds = self.runtime.embed(ids)
        for row, (row_ids, _, shares) in enumerate(read):
            embeds[row, : len(row_ids)][row_ids == self.tokens.lvr] = shares @ self._given_latents(
                handed[row]
            )
        states = self.runtime.prefill(embeds, positions, lengths, handed)
        hidden = np.array(hidden)
        for i, state, (_, row_positions, _) in zip(handed, states, read, strict=True):
            hidden[i] = state
            self.rows[i].state, self.rows[i].position = "text", int(row_positions.max()) + 1
        self._keep(hidden, handed)
        self.clock.hand_over += time.perf_counter() - t
        return hidden

    def _given_latents(self, row: int) -> np.ndarray:
        fed = self.rows[row].result.latents
        return np.stack(fed) if fed else np.zeros((0, self.runtime.hidden_size), np.float32)

    def _keep(self, hidden: np.ndarray, rows: Iterable[int]) -> None:
        for i in rows:
            if self.options.keep_hidden and self.rows[i].state != "done":
                self.rows[i].result.hidden.append(hidden[i].copy())

    def _speak(self, hidden: np.ndarray) -> tuple[np.ndarray, list[Event]]:
        """The ids (B, 1) that rows in text feed next, and what happened; the head runs once, for
        these rows.
        """
        tokens = self.tokens
        events: list[Event] = []
        chosen = self._choose(hidden)
        feed = np.full((len(self.rows), 1), tokens.end[0], np.int64)
        for i, row in enumerate(self.rows):
            if row.state == "text":
                self._take(i, row, chosen[i], feed, events)
            elif row.state == "closing":
                row.state = "text"
                feed[i] = tokens.lvr_end
        return feed, events

    def _choose(self, hidden: np.ndarray) -> dict[int, int]:
        speaking = [i for i, row in enumerate(self.rows) if row.state == "text"]
        if not speaking:
            return {}
        tokens = self.tokens
        t = time.perf_counter()
        logits = self.runtime.head(hidden if len(speaking) == len(self.rows) else hidden[speaking])
        self.clock.lm_head.append(time.perf_counter() - t)
        t = time.perf_counter()
        chosen = {}
        for i, scores in zip(speaking, logits, strict=True):
            row = self.rows[i]
            scores[self._never] = -np.inf
            if len(row.result.tokens) < self.options.min_tokens:
                scores[list(tokens.end)] = -np.inf
            if not row.may_start:  # no latents asked for, or already spent
                scores[tokens.lvr_start] = -np.inf
            chosen[i] = sampling.sample(
                scores, self.options.temperature, self.options.top_p, self.rngs[i]
            )
            if self.options.keep_scores:
                p = sampling.probabilities(
                    scores, self.options.temperature or 1.0, self.options.top_p
                )
                row.result.scores.append(float(np.log(p[chosen[i]])))
        self.clock.sampling.append(time.perf_counter() - t)
        return chosen

    def _take(self, i: int, row: _Row, token: int, feed: np.ndarray, events: list[Event]) -> None:
        """A row in text has chosen `token`: where that leads."""
        now = time.perf_counter() - self.began
        row.result.choices.append(token)
        if token == self.tokens.lvr_start:
            row.state, row.left, row.may_start = "latent", row.steps, False
            feed[i] = token
            events.append(self._event(i, "start"))
            return
        result = row.result
        if token in self.tokens.end:
            row.state, result.reason = "done", "stop"
        else:
            result.tokens.append(token)
            if result.ttft is None:
                result.ttft = now
            if result.ttfa is None and not row.may_start:
                result.ttfa = now
            events.append(self._event(i, "token", id=token))
            feed[i] = token
            if len(result.tokens) >= self.options.max_tokens:
                row.state, result.reason = "done", "length"
        if row.state == "done":
            events.append(self._event(i, "done", reason=result.reason))

    def _event(self, row: int, kind: str, **more: object) -> Event:
        return Event(row, kind, at=time.perf_counter() - self.began, **more)  # type: ignore[arg-type]


def second_reading(
    prompt: Prompt, latents: np.ndarray, tokens: TokenIds
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids (S,), positions (3, S), shares (N, K)) of the prompt with N <= K times <|lvr|> for its
    visual tokens: one a place that `latents` (K, H) are nearest to, fed their mean, which is shares
    @ latents. Without a picture all come last. Other positions stay as they were.
    """
    seen = prompt.ids == tokens.image
    shares = np.eye(len(latents), dtype=np.float32)
    if seen.any():
        near = likeness(latents, prompt.features).argmax(-1)
        places = list(dict.fromkeys(near.tolist()))
        shares = (near == np.array(places, np.int64)[:, None]).astype(np.float32)
        shares /= shares.sum(1, keepdims=True)
        at, positions = int(seen.argmax()), prompt.positions[:, seen][:, places]
    else:
        at, positions = (
            len(prompt.ids),
            prompt.positions.max()
            + 1
            + np.broadcast_to(np.arange(len(latents)), (3, len(latents))),
        )
    before, after = np.flatnonzero(~seen[:at]), at + np.flatnonzero(~seen[at:])
    ids = np.concatenate([prompt.ids[before], np.full(len(shares), tokens.lvr), prompt.ids[after]])
    return (
        ids,
        np.concatenate([prompt.positions[:, before], positions, prompt.positions[:, after]], 1),
        shares,
    )


def decode(
    runtime: Runtime,
    prompts: list[Prompt],
    options: Options | None = None,
    latents: Sequence[np.ndarray | None] | None = None,
) -> list[Result]:
    """Decode a batch to its end; see `Decoding` for events, timing and `latents`."""
    decoding = Decoding(runtime, prompts, options or Options(), latents)
    for _ in decoding:
        pass
    return decoding.results
