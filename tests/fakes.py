"""Models made of numpy: whole runtimes (mypy holds them to the protocol) without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.model.families import Grid
from lvr_lite.model.spec import LatentSpec, TokenIds


class Fake:
    """What the fakes share: ids and pictures are those of the embedded model.

    A subclass says what the hidden state (H,) of a row is: `read` after a whole input, `advance`
    after one further step. batches: rows of every batch that was started.
    """

    def __init__(self, name: str, hidden_size: int, latent: LatentSpec | None = None) -> None:
        self.name = name
        self.hidden_size = hidden_size
        self.latent = latent or LatentSpec()
        self.processor = read_checkpoint("tiny").processor
        self.vocabulary = self.processor.tokenizer.get_vocab_size()
        self.capacity = 0
        self.batches: list[int] = []
        self._inputs: list[np.ndarray] = []

    def read(self, row: int, inputs: np.ndarray) -> np.ndarray:
        """inputs (S, H + 3): embeddings, and positions in the last three columns."""
        raise NotImplementedError

    def advance(self, row: int, embed: np.ndarray, position: int) -> np.ndarray:
        raise NotImplementedError

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        tokens = sum(self.processor.visual_tokens(grid) for grid in grids)
        return np.zeros((tokens, self.hidden_size), np.float32)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Every channel is the id."""
        return np.repeat(ids[..., None].astype(np.float32), self.hidden_size, -1)

    def start(self, batch: int, capacity: int) -> None:
        self.batches.append(batch)
        self.capacity = capacity
        self._inputs = [np.zeros((0, self.hidden_size + 3), np.float32)] * batch

    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        states = []
        for i, row in enumerate(range(len(self._inputs)) if rows is None else rows):
            new = np.concatenate([embeds[i], positions[:, i].T], 1)[: lengths[i]]
            self._inputs[row] = np.concatenate([self._inputs[row][:past], new])
            states.append(self.read(row, self._inputs[row]))
        return np.stack(states)

    def keep(self, length: int) -> list[np.ndarray]:
        return [self._inputs[0][:length].copy()]

    def put_back(self, kept: list[np.ndarray]) -> None:
        self._inputs = list(kept)

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        rows = enumerate(zip(embeds, positions, strict=True))
        return np.stack([self.advance(row, embed, int(at)) for row, (embed, at) in rows])

    def head(self, hidden: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Around:
    """A runtime that hands everything on to another; a subclass watches or changes some of it."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.name = runtime.name
        self.processor = runtime.processor
        self.latent = runtime.latent
        self.hidden_size = runtime.hidden_size

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        return self.runtime.encode(pixel_values, grids)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.runtime.embed(ids)

    def start(self, batch: int, capacity: int) -> None:
        self.runtime.start(batch, capacity)

    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        return self.runtime.prefill(embeds, positions, lengths, rows, past)

    def keep(self, length: int) -> list[np.ndarray]:
        return self.runtime.keep(length)

    def put_back(self, kept: list[np.ndarray]) -> None:
        self.runtime.put_back(kept)

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.runtime.step(embeds, positions)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        return self.runtime.head(hidden)


# --------------------------------------------------------------------------------------------------
# one that computes, for the decode loop

IMAGE, END, OTHER_END, START, LVR, CLOSE, A, B, C, D = range(10)


@dataclass(frozen=True)
class Read:
    """One call of prefill."""

    embeds: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    rows: list[int] | None
    state: np.ndarray


class Recurrent(Fake):
    """state = tanh(input + mixed state + position): every input and every position changes all that
    follows. Its ten tokens are IMAGE … D.

    step_inputs, positions: of each step.
    states: of all rows, after each prefill and each step.
    head_inputs: hidden states.
    reads: calls of prefill.
    """

    axes = np.array([0.05, 0.03, 0.02], np.float32)

    def __init__(self, spec: LatentSpec) -> None:
        super().__init__("recurrent", 6, spec)
        tokens = TokenIds(IMAGE, (END, OTHER_END), lvr_start=START, lvr=LVR, lvr_end=CLOSE)
        self.processor = replace(self.processor, tokens=tokens)
        # Weights with which the prompts of test_decode enter latents at many different times.
        rng = np.random.default_rng(107)
        self.table = rng.normal(size=(10, 6)).astype(np.float32)
        self.mix = rng.normal(size=(6, 6)).astype(np.float32)
        self.out = rng.normal(size=(6, 10)).astype(np.float32)
        self.step_inputs: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.states: list[np.ndarray] = []
        self.head_inputs: list[np.ndarray] = []
        self.reads: list[Read] = []

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.table[ids])

    def start(self, batch: int, capacity: int) -> None:
        super().start(batch, capacity)
        self.state = np.zeros((batch, 6), np.float32)
        self.used = np.zeros(batch, np.int64)

    def read(self, row: int, inputs: np.ndarray) -> np.ndarray:
        self.state[row] = 0
        for one in inputs:
            self._advance(row, one[:6], one[6:])
        self.used[row] = len(inputs)
        return np.array(self.state[row])

    def advance(self, row: int, embed: np.ndarray, position: int) -> np.ndarray:
        self._advance(row, embed, np.full(3, position))
        return np.array(self.state[row])

    def _advance(self, row: int, embed: np.ndarray, position: np.ndarray) -> None:
        at = self.axes @ position.astype(np.float32)
        self.state[row] = np.tanh(embed + self.state[row] @ self.mix + at)

    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        assert rows is None or (self.reads and 0 < len(rows) == len(set(rows))), (
            "a first call for some rows, or a row twice"
        )
        again = len(self.state) if rows is None else len(rows)
        assert embeds.shape == (again, max(lengths), 6)
        assert positions.shape == (3, *embeds.shape[:2])
        state = super().prefill(embeds, positions, lengths, rows, past)
        self.states.append(self.state.copy())
        self.reads.append(Read(embeds.copy(), positions.copy(), lengths.copy(), rows, state))
        return np.array(state)

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self.used += 1
        assert self.used.max() <= self.capacity, "more steps than start() made room for"
        self.step_inputs.append(embeds.copy())
        self.positions.append(positions.copy())
        self.states.append(super().step(embeds, positions))
        return np.array(self.states[-1])

    def head(self, hidden: np.ndarray) -> np.ndarray:
        self.head_inputs.append(hidden.copy())
        # One row at a time: a batched product may round differently, and equality is tested.
        return np.stack([h @ self.out for h in hidden])


class Scripted(Recurrent):
    """Says these tokens, one a call of the head, whatever it is fed; a token that may not be chosen
    is the second best.
    """

    def __init__(self, *script: int, spec: LatentSpec) -> None:
        super().__init__(spec)
        self.script = list(script)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        super().head(hidden)
        logits = np.zeros((1, 10), np.float32)
        logits[0, self.script.pop(0)] = 9
        logits[0, D] = 5
        return logits


# --------------------------------------------------------------------------------------------------
# some that answer


class Table(Fake):
    """Answers by question: the longest one that stands in the prompt.

    A hidden state holds which answer it is in and how far: (answer, place, 0, 0).
    """

    def __init__(self, answers: Mapping[str, str], latent_steps: int = 0) -> None:
        super().__init__("table", 4, LatentSpec(latent_steps))
        self.questions = list(answers)
        self.scripts = [script(self, answer) for answer in answers.values()]
        self.state: dict[int, np.ndarray] = {}

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        features = super().encode(pixel_values, grids)
        return np.asarray(features + np.float32(self.processor.tokens.image))

    def read(self, row: int, inputs: np.ndarray) -> np.ndarray:
        text = self.processor.text(inputs[:, 0].astype(int).tolist())
        question = max((q for q in self.questions if q in text), key=len)
        self.state[row] = np.array([self.questions.index(question), 0, 0, 0], np.float32)
        return self.state[row]

    def advance(self, row: int, embed: np.ndarray, position: int) -> np.ndarray:
        self.state[row] = self.state[row] + np.array([0, 1, 0, 0], np.float32)
        return self.state[row]

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(hidden), self.vocabulary), np.float32)
        for row, (which, place) in enumerate(hidden[:, :2].astype(int)):
            ids = self.scripts[which]
            logits[row, ids[min(place, len(ids) - 1)]] = 1
        return logits


def script(runtime: Fake, answer: str) -> list[int]:
    """Ids of an answer and the end of the turn."""
    ids: Sequence[int] = runtime.processor.tokenizer.encode(answer, add_special_tokens=False).ids
    return [*ids, runtime.processor.tokens.end[0]]


def never(name: str) -> Runtime:
    """Opens no model."""
    raise AssertionError(f"{name} was opened")


class OneWord(Fake):
    """Opens the latent loop where it was tuned for it, then says one word, and then prefers the end
    of the turn, where that is allowed.

    noise: added to the first channel of its hidden states, which are ones.
    """

    def __init__(
        self, name: str, latent: LatentSpec | None = None, word: int = 300, noise: float = 0.0
    ) -> None:
        super().__init__(name, 4, LatentSpec(3) if latent is None else latent)
        self.word = word
        self.state = np.array([1 + noise, 1, 1, 1], np.float32)
        self.spoken = 0

    def start(self, batch: int, capacity: int) -> None:
        super().start(batch, capacity)
        self.spoken = 0

    def read(self, row: int, inputs: np.ndarray) -> np.ndarray:
        return self.state

    def advance(self, row: int, embed: np.ndarray, position: int) -> np.ndarray:
        return self.state

    def head(self, hidden: np.ndarray) -> np.ndarray:
        tokens = self.processor.tokens
        logits = np.zeros((len(hidden), self.vocabulary), np.float32)
        logits[:, tokens.lvr_start] = 3 if self.latent.steps else -1
        logits[:, tokens.end[0]] = 2 if self.spoken > bool(self.latent.steps) else 0
        logits[:, self.word] = 1
        self.spoken += 1
        return logits


class NeverLooks(OneWord):
    """Has latent steps, and never opens the loop by itself, as random weights do."""

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = super().head(hidden)
        logits[:, self.processor.tokens.lvr_start] = -9
        return logits


# --------------------------------------------------------------------------------------------------
# one that looks, for the probe

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "purple": (255, 0, 255),
}
# First channel of a token's embedding: this + its id.
IS_TOKEN = 1000.0


class Looks(Fake):
    """Finds the one coloured visual token, puts its colour into the first latent and a constant
    into the others, then names a colour.

    uses: "latents" (the colour of the first vector that its latent steps were fed) or "picture"
    (what it saw in the prompt). silent: words of a question that it answers without latents. A
    hidden state holds the colour (1–3) and the constant (4) in latent steps, and the id of the
    token that comes next (5) in text steps.
    """

    def __init__(self, uses: str, spec: LatentSpec | None = None, silent: str = "") -> None:
        super().__init__("looks", 8, spec or LatentSpec(steps=3))
        self.uses = uses
        self.silent = silent
        self.scripts = [script(self, word) for word in COLOURS]
        self.palette = np.array(list(COLOURS.values()), np.float32) - 128

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        image = self.processor.image
        pixels = pixel_values.reshape(len(pixel_values) // 4, 4, 3, -1).mean((1, 3))
        colours = pixels * np.array(image.std) + np.array(image.mean) - 128 / 255
        return np.pad(colours, ((0, 0), (1, 4))).astype(np.float32)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        embeds = np.zeros((*ids.shape, self.hidden_size), np.float32)
        embeds[..., 0] = IS_TOKEN + ids
        return embeds

    def start(self, batch: int, capacity: int) -> None:
        super().start(batch, capacity)
        self.colours = np.zeros((batch, 3), np.float32)
        self.latents: list[list[np.ndarray]] = [[] for _ in range(batch)]
        self.words: list[list[int]] = [[] for _ in range(batch)]

    def read(self, row: int, inputs: np.ndarray) -> np.ndarray:
        colours = inputs[inputs[:, 0] == 0, 1:4]
        self.colours[row] = colours[np.abs(colours).sum(1).argmax()]
        ids = (inputs[inputs[:, 0] > 0, 0] - IS_TOKEN).astype(int).tolist()
        quiet = self.silent and self.silent in self.processor.text(ids)
        start = [self.processor.tokens.lvr_start]
        self.words[row] = self.name_of(self.colours[row]) if quiet else start
        return self._text(row)

    def name_of(self, colour: np.ndarray) -> list[int]:
        lengths = np.linalg.norm(self.palette, axis=1)
        return list(self.scripts[int((self.palette @ colour / lengths).argmax())])

    def advance(self, row: int, embed: np.ndarray, position: int) -> np.ndarray:
        tokens = self.processor.tokens
        token = int(embed[0] - IS_TOKEN) if embed[0] >= IS_TOKEN else tokens.lvr
        if token == tokens.lvr:
            self.latents[row].append(embed.copy())
        if token in (tokens.lvr, tokens.lvr_start):
            return self._latent(row)
        if token == tokens.lvr_end:
            self.words[row] = self.name_of(self._colour(row))
        else:
            self.words[row] = self.words[row][1:] or [tokens.end[0]]
        return self._text(row)

    def _colour(self, row: int) -> np.ndarray:
        if self.uses == "picture":
            return np.asarray(self.colours[row])
        return self.latents[row][0][1:4] if self.latents[row] else np.zeros(3, np.float32)

    def _latent(self, row: int) -> np.ndarray:
        hidden = np.zeros(self.hidden_size, np.float32)
        hidden[1:4] = 0 if self.latents[row] else self.colours[row]
        hidden[4] = bool(self.latents[row])
        return hidden

    def _text(self, row: int) -> np.ndarray:
        hidden = np.zeros(self.hidden_size, np.float32)
        hidden[5] = self.words[row][0]
        return hidden

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(hidden), self.vocabulary), np.float32)
        logits[:, self.processor.tokens.end[0]] = 1
        logits[np.arange(len(hidden)), hidden[:, 5].astype(int)] = 2
        return logits


TILE_QUESTIONS = ("what colour is it", "which one is there")


def tiles(count: int = 48) -> Iterator[Item]:
    """Grey pictures of 5 x 5 visual tokens, one of them coloured, with a box around it; two
    questions, six colours, in turn.
    """
    for i in range(count):
        row, column = 1 + i % 4, 1 + i // 4 % 4
        picture = Image.new("RGB", (140, 140), (128, 128, 128))
        word = list(COLOURS)[i // 2 % 6]
        picture.paste(COLOURS[word], (28 * column, 28 * row, 28 * column + 28, 28 * row + 28))
        box = (column / 5, row / 5, (column + 1) / 5, (row + 1) / 5)
        yield (
            Sample(f"s{i}", (), TILE_QUESTIONS[i % 2], word, None, (box,), f"type {i % 2}"),
            (picture,),
        )
