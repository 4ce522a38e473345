"""The one decode loop: prefill, text steps and latent steps over a batch, on any Runtime.

May import: numpy, lvr_lite.model, this folder.

    decoding = Decoding(runtime, [prompt], Options(max_tokens=32))
    for event in decoding:
        ...
    result = decoding.results[0]

The loop knows ids and arrays, neither torch nor ONNX Runtime nor strings. Every row has its own
state, so rows may be in text and in latent steps at the same time:

    state     input of its next step                    leaves the state when
    text      embedding of the chosen token             <|lvr_start|> is chosen, or forced as the
                                                        first choice (`look`) -> latent;
                                                        an end id, or the limit -> done
    latent    feedback(hidden), K times                 open: K were fed -> closing
                                                        bottleneck: K are known -> text
    closing   embedding of <|lvr_end|> (never chosen)   at once -> text
    done      embedding of the end token, ignored       never

In a bottleneck a row is handed over from latent to text: its K/V is dropped, and its prompt is read
again in one call, with the K latents in place of its visual tokens, and with the words that came
before <|lvr_start|> after it (lvr_lite/model/latents.py). The last latent is never fed to the pass
that sees the picture, and no <|lvr_end|> is needed.

Shapes in comments: B rows, S columns, T visual tokens, K latent steps, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from time import perf_counter

import numpy as np

from lvr_lite.generate import sampling
from lvr_lite.generate.records import Clock, Event, EventKind, Options, Prompt, Result
from lvr_lite.generate.runtime import Chooser, Runtime
from lvr_lite.model.latents import second_reading
from lvr_lite.model.padding import PaddedBatch

# What is decoded, how, and what comes of it, is imported from here together with the loop.
__all__ = [
    "Clock",
    "Decoding",
    "Event",
    "Options",
    "Prompt",
    "Result",
    "Row",
    "State",
    "decode",
    "embedded",
]


class State(str, Enum):
    """Where a row is; see the table at the top of this module."""

    TEXT = "text"
    LATENT = "latent"
    CLOSING = "closing"
    DONE = "done"


@dataclass
class Row:
    """One answer on its way.

    number: its place in the batch.
    prompt: what is answered.
    position: of the row's next input.
    steps: latent steps that it takes, should it choose <|lvr_start|>.
    may_start: whether it may still choose <|lvr_start|>, which it does at most once.
    must_start: whether its first choice is <|lvr_start|>, whatever the head says.
    forced: latents (K, H) that are fed instead of its own states, or None.
    random: its own random numbers, so that its draws do not depend on the rest of the batch.
    steps_left: latent steps that are still to take.
    next_token, next_latent: what its next step is fed: a latent (H,), or else a token's embedding.
    """

    number: int
    prompt: Prompt
    position: int
    steps: int
    may_start: bool
    must_start: bool
    forced: np.ndarray | None
    random: np.random.Generator
    state: State = State.TEXT
    steps_left: int = 0
    next_token: int = -1
    next_latent: np.ndarray | None = None
    result: Result = field(default_factory=Result)


class Decoding:
    """One batch on its way. Iterate it for events; then `results` and `clock` hold the outcome.

    latents: one entry a prompt: None, or what its latent steps are fed instead of its own states,
        (K_i, H) float32; K_i = 0 leaves the markers alone (lvr_lite/eval/interventions.py).
    draws: the number of each row's stream of random numbers; its place in the batch by default.

    Raises UsageError for latent steps, or a forced look, that the model was not tuned for.
    """

    def __init__(
        self,
        runtime: Runtime,
        prompts: list[Prompt],
        options: Options,
        latents: Sequence[np.ndarray | None] | None = None,
        draws: Sequence[int] | None = None,
    ) -> None:
        self.runtime = runtime
        self.prompts = prompts
        self.options = options
        self.tokens = runtime.processor.tokens
        self.clock = Clock()
        self.rows: list[Row] = []
        self._events: list[Event] = []
        self._began = 0.0
        # Ids that no row may ever choose.
        self._never = (self.tokens.lvr, self.tokens.lvr_end, self.tokens.image)
        self._placeholder: np.ndarray | None = None

        steps = options.steps_of(runtime)
        latents = [None] * len(prompts) if latents is None else latents
        draws = draws or range(len(prompts))
        for prompt, forced, draw in zip(prompts, latents, draws, strict=True):
            row = Row(
                number=len(self.rows),
                prompt=prompt,
                position=int(prompt.positions.max()) + 1,
                steps=steps if forced is None else len(forced),
                may_start=steps > 0 or forced is not None,
                must_start=options.look == "always",
                forced=forced,
                random=np.random.default_rng([options.seed, draw]),
            )
            self.rows.append(row)
        own_latents = all(row.forced is None for row in self.rows)
        # Whether what a latent step is fed is the hidden state just as it came out.
        self._feeds_states = runtime.latent.feedback == "identity" and own_latents

    @property
    def results(self) -> list[Result]:
        return [row.result for row in self.rows]

    def __iter__(self) -> Iterator[Event]:
        self._began = perf_counter()
        hidden = self._prefill()  # (B, H)
        while True:
            self._keep_hidden(hidden, self.rows)
            hidden = self._advance_latents(hidden)
            self._advance_text(hidden)
            yield from self._new_events()
            if all(row.state is State.DONE for row in self.rows):
                return
            hidden = self._step(self._inputs(hidden))

    # ---------------------------------------------------------------------------------------------
    # reading prompts

    def _prefill(self) -> np.ndarray:
        """Read the prompts. Returns the hidden state after each (B, H)."""
        began = perf_counter()
        longest = max(len(prompt.ids) for prompt in self.prompts)
        latents = max(row.steps for row in self.rows)
        markers = 2
        room = longest + latents + markers + self.options.max_tokens
        self.runtime.start(len(self.prompts), room)
        prefix = self.prompts[0].prefix if len(self.prompts) == 1 else None
        if prefix is not None and prefix.filled:
            prefix.restore(self.runtime)
            return self._prefill_rest(self.prompts[0], prefix.length)
        batch = PaddedBatch.of(
            [prompt.ids for prompt in self.prompts],
            [prompt.positions for prompt in self.prompts],
            filler=self.tokens.end[0],
        )
        features = [prompt.features for prompt in self.prompts]
        embeds = embedded(self.runtime, batch, self.tokens.image, features)
        self.clock.embed.append(_since(began))
        began = perf_counter()
        hidden = self.runtime.prefill(embeds, batch.positions, batch.lengths)
        if prefix is not None:
            prefix.fill(self.runtime)
        self.clock.prefill = _since(began)
        return hidden

    def _prefill_rest(self, prompt: Prompt, known: int) -> np.ndarray:
        """Read a prompt after its first `known` ids, whose K/V the runtime has.

        All visual tokens are among these.
        """
        began = perf_counter()
        embeds = self.runtime.embed(prompt.ids[None, known:])
        self.clock.embed.append(_since(began))
        began = perf_counter()
        positions = prompt.positions[:, None, known:]
        lengths = np.array([len(prompt.ids) - known], np.int64)
        hidden = self.runtime.prefill(embeds, positions, lengths, past=known)
        self.clock.prefill = _since(began)
        return hidden

    def _hand_over(self, hidden: np.ndarray, rows: list[Row]) -> np.ndarray:
        """Let rows whose latents are known read their prompt again, with these for its picture.

        Their K/V, which have seen the picture, are dropped.

        Returns the hidden states (B, H) with new ones of these rows.
        """
        began = perf_counter()
        readings = []
        vectors = []
        for row in rows:
            # All words so far came before the latents.
            prompt = row.prompt.followed_by(row.result.tokens)
            latents = self._latents_of(row)
            reading = second_reading(
                prompt.ids,
                prompt.positions,
                prompt.features,
                latents,
                self.tokens,
            )
            row.state = State.TEXT
            row.position = int(reading.positions.max()) + 1
            readings.append(reading)
            vectors.append(reading.shares @ latents)
        batch = PaddedBatch.of(
            [reading.ids for reading in readings],
            [reading.positions for reading in readings],
            filler=self.tokens.end[0],
        )
        embeds = embedded(self.runtime, batch, self.tokens.lvr, vectors)
        numbers = [row.number for row in rows]
        states = self.runtime.prefill(embeds, batch.positions, batch.lengths, numbers)
        # A copy, for what a runtime returns may be its own buffer.
        hidden = np.array(hidden)
        hidden[numbers] = states
        self._keep_hidden(hidden, rows)
        self.clock.hand_over += _since(began)
        return hidden

    def _latents_of(self, row: Row) -> np.ndarray:
        """All latents (K, H) that a row was fed."""
        if row.result.latents:
            return np.stack(row.result.latents)
        return np.zeros((0, self.runtime.hidden_size), np.float32)

    # ---------------------------------------------------------------------------------------------
    # one step

    def _advance_latents(self, hidden: np.ndarray) -> np.ndarray:
        """Take every row in latent steps one further.

        Returns the hidden states (B, H), with new ones of rows that were handed over.
        """
        mode = self.runtime.latent.mode
        known = []
        for row in self.rows:
            row.next_latent = None
            if row.state is not State.LATENT:
                continue
            if row.steps_left > 0:
                row.next_latent = self._next_latent(row, hidden[row.number])
                row.steps_left -= 1
                row.result.latents.append(np.array(row.next_latent))
                self._note(row, "latent")
            elif mode == "open":
                row.state = State.CLOSING
                self._note(row, "end")
            if row.steps_left == 0 and mode == "bottleneck":
                row.next_latent = None
                known.append(row)
                self._note(row, "end")
        return self._hand_over(hidden, known) if known else hidden

    def _next_latent(self, row: Row, hidden: np.ndarray) -> np.ndarray:
        """What a row is fed (H,) after the state `hidden` (H,)."""
        latent = self.runtime.latent
        if row.forced is not None:
            count = len(row.result.latents)
            return np.asarray(row.forced[count], np.float32)
        if latent.feedback != "token":
            return np.asarray(latent.fed(hidden))
        if self._placeholder is None:
            ids = np.array([[self.tokens.lvr]])
            self._placeholder = self.runtime.embed(ids)[0, 0]
        return self._placeholder

    def _advance_text(self, hidden: np.ndarray) -> None:
        """Let every row in text choose a token, and feed the marker to every row after its latents.

        hidden: (B, H).
        """
        speaking = [row for row in self.rows if row.state is State.TEXT]
        for row in self.rows:
            row.next_token = self.tokens.end[0]
            if row.state is State.CLOSING:
                row.state = State.TEXT
                row.next_token = self.tokens.lvr_end
        if speaking:
            chosen = self._choose(hidden, speaking)
            for row, token in zip(speaking, chosen, strict=True):
                self._take(row, token)

    def _choose(self, hidden: np.ndarray, rows: list[Row]) -> list[int]:
        """The token that each of these rows chooses; the head runs once, for them alone."""
        began = perf_counter()
        if len(rows) < len(self.rows):
            numbers = [row.number for row in rows]
            hidden = hidden[numbers]
        if isinstance(self.runtime, Chooser):
            tokens = self._let_choose(self.runtime, hidden, rows)
            self.clock.lm_head.append(_since(began))
            return tokens
        logits = self.runtime.head(hidden)  # (rows, V)
        self.clock.lm_head.append(_since(began))
        began = perf_counter()
        tokens = [self._sample(row, own) for row, own in zip(rows, logits, strict=True)]
        self.clock.sampling.append(_since(began))
        return tokens

    def _let_choose(self, runtime: Chooser, hidden: np.ndarray, rows: list[Row]) -> list[int]:
        """`_choose` by a runtime that chooses where its logits are."""
        options = self.options
        tokens = runtime.choose(
            hidden,
            [self._closed(row) for row in rows],
            [row.random.random() if options.temperature else 0.0 for row in rows],
            options.temperature,
            options.top_p,
        )
        return [
            self._start_of(row) if row.must_start else token
            for row, token in zip(rows, tokens, strict=True)
        ]

    def _closed(self, row: Row) -> list[int]:
        """Ids that a row cannot choose now."""
        closed = list(self._never)
        if len(row.result.tokens) < self.options.min_tokens:
            closed += self.tokens.end
        if not row.may_start:
            closed.append(self.tokens.lvr_start)
        return closed

    def _sample(self, row: Row, logits: np.ndarray) -> int:
        """The token that a row chooses by logits (V,), which are changed."""
        if row.must_start:
            return self._start_of(row)
        options = self.options
        logits[self._closed(row)] = -np.inf
        return sampling.sample(logits, options.temperature, options.top_p, row.random)

    def _start_of(self, row: Row) -> int:
        """<|lvr_start|> as a row's first choice, whatever the head says."""
        row.must_start = False
        row.result.look_forced = True
        return self.tokens.lvr_start

    def _take(self, row: Row, token: int) -> None:
        """Do what follows from the token that a row in text has chosen."""
        now = _since(self._began)
        result = row.result
        result.choices.append(token)
        if token == self.tokens.lvr_start:
            row.state = State.LATENT
            row.steps_left = row.steps
            row.may_start = False
            row.next_token = token
            self._note(row, "start")
            return
        if token in self.tokens.end:
            self._finish(row, "stop")
            return
        result.tokens.append(token)
        if result.ttft is None:
            result.ttft = now
        if result.ttfa is None and not row.may_start:
            result.ttfa = now
        row.next_token = token
        self._note(row, "token", token)
        if len(result.tokens) >= self.options.max_tokens:
            self._finish(row, "length")

    def _finish(self, row: Row, reason: str) -> None:
        row.state = State.DONE
        row.result.reason = reason
        self._note(row, "done", reason=reason)

    def _inputs(self, hidden: np.ndarray) -> np.ndarray:
        """Embeddings (B, H) of what the rows are fed next, after the states hidden (B, H)."""
        latents = [row.next_latent for row in self.rows if row.next_latent is not None]
        if len(latents) == len(self.rows):
            if self._feeds_states:
                # The very array: a runtime whose buffer it is need not copy it (OnnxRuntime.step).
                return hidden
            return np.stack(latents)
        began = perf_counter()
        tokens = [[row.next_token] for row in self.rows]
        ids = np.array(tokens, np.int64)  # (B, 1)
        embeds = self.runtime.embed(ids)[:, 0]
        for row in self.rows:
            if row.next_latent is not None:
                embeds[row.number] = row.next_latent
        self.clock.embed.append(_since(began))
        return embeds

    def _step(self, embeds: np.ndarray) -> np.ndarray:
        """Feed every row one further input; embeds (B, H). Returns the hidden states (B, H)."""
        working = [row for row in self.rows if row.state is not State.DONE]
        stage = self.clock.text_step
        if all(row.next_latent is not None for row in working):
            stage = self.clock.latent_step
        positions = np.array([row.position for row in self.rows], np.int64)
        began = perf_counter()
        hidden = self.runtime.step(embeds, positions)
        stage.append(_since(began))
        for row in self.rows:
            row.position += 1
        return hidden

    # ---------------------------------------------------------------------------------------------
    # what came of it

    def _keep_hidden(self, hidden: np.ndarray, rows: Sequence[Row]) -> None:
        """Note the hidden states of rows, where the options ask for it; hidden (B, H)."""
        if not self.options.keep_hidden:
            return
        for row in rows:
            if row.state is not State.DONE:
                row.result.hidden.append(hidden[row.number].copy())

    def _note(
        self,
        row: Row,
        kind: EventKind,
        token: int = -1,
        reason: str = "",
    ) -> None:
        at = _since(self._began)
        self._events.append(
            Event(
                row.number,
                kind,
                token,
                reason,
                at,
            )
        )

    def _new_events(self) -> list[Event]:
        events = self._events
        self._events = []
        return events


def _since(began: float) -> float:
    return perf_counter() - began


def embedded(
    runtime: Runtime,
    batch: PaddedBatch,
    placeholder: int,
    vectors: Sequence[np.ndarray],
) -> np.ndarray:
    """Inputs (B, S, H) of a batch, in which `vectors` stand in the places of the id `placeholder`.

    vectors: one array (n, H) a row, in reading order. Where they are wider, so are the inputs.
    """
    embeds = runtime.embed(batch.ids)  # (B, S, H)
    width = max(own.shape[1] for own in vectors)
    wider = width - embeds.shape[2]
    if wider:
        embeds = np.pad(embeds, ((0, 0), (0, 0), (0, wider)))
    for row, ids, own in zip(embeds, batch.ids, vectors, strict=True):
        width = own.shape[1]
        places = ids == placeholder
        row[places, :width] = own
    return embeds


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
