"""What the embedded model is pre-trained on: drawn scenes with the words of their cells, and many
questions to one picture in one row.

May import: numpy, tokenizers and all that stands above `toy`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from lvr_lite.model.families import Grid
from lvr_lite.model.families.qwen2_5_vl import FAMILY
from lvr_lite.model.prompt import render
from lvr_lite.toy import build, questions, scenes
from lvr_lite.toy.drawing import draw

# Seeds of the scenes begin here; `data make --seed` takes 0 … 999,999.
SEED_BASE = 1_000_000
# Questions to one picture, beside "where" and the caption.
TURNS = 13
# How often each type is drawn beside the others.
SHARES = {"attribute": 4, "letter": 3, "position": 3, "count": 3}
# Share of the questions in the suite's wording in stage 3: most where it is furthest from the short
# one.
WORDED = {"attribute": 0.02, "letter": 0.02, "position": 0.8, "count": 0.05, "odd": 0.1}
WORDS = (*scenes.SHAPES, *scenes.COLOURS, *scenes.PATTERNS, *scenes.GLYPHS)
# Pixels along the side of a patch, and of a visual token.
PATCH = 14
CELL = 2 * PATCH
# Share of a cell, or of a figure, that a figure must cover for the cell to hold its words.
COVERED = 0.3
VISION_CONFIG = {"patch_size": PATCH, "spatial_merge_size": 2, "window_size": 56}
IMAGE_SPEC = FAMILY.image_spec({"vision_config": VISION_CONFIG}, build.PREPROCESSOR)

# A question and its answer.
Turn = tuple[str, str]


class Pictures:
    """Drawn scenes of one size.

    grid: rows and columns of patches.
    patches: (n, patches, 588) uint8, without the temporal repeat.
    words: (n, visual tokens, WORDS) bool, which words lie in the cell of each token.
    """

    def __init__(self, planned: list[scenes.Scene]) -> None:
        first = planned[0]
        self.scenes = planned
        self.grid = Grid(first.height // PATCH, first.width // PATCH)
        patches = [self._patches(draw(scene)) for scene in planned]
        words = [self._cell_words(scene) for scene in planned]
        self.patches = np.stack(patches)
        self.words = np.stack(words)

    def _patches(self, picture: Image.Image) -> np.ndarray:
        rows, columns = self.grid
        pixels = np.asarray(picture)
        split = pixels.reshape(rows // 2, 2, PATCH, columns // 2, 2, PATCH, 3)
        # Patches of one visual token follow each other; within a patch, colours come first.
        patches = split.transpose(0, 3, 1, 4, 6, 2, 5)
        return np.reshape(patches, (rows * columns, 3 * PATCH**2))

    def _cell_words(self, scene: scenes.Scene) -> np.ndarray:
        rows = self.grid.rows // 2
        columns = self.grid.columns // 2
        holds = np.zeros((rows, columns, len(WORDS)), bool)
        for figure in scene.figures:
            own = (figure.shape, figure.colour, figure.pattern, figure.glyph)
            words = [WORDS.index(word) for word in own]
            # pixels that it shares with each row and column of cells, 0 where it lies beside them
            down = [_overlap(figure.y, figure.size, row) for row in range(rows)]
            across = [_overlap(figure.x, figure.size, column) for column in range(columns)]
            area = np.outer(down, across)
            least = COVERED * min(CELL**2, figure.size**2)
            for row, column in np.argwhere((area > 0) & (area >= least)):
                holds[row, column, words] = True
        return holds.reshape(rows * columns, -1)


def _overlap(start: int, size: int, cell: int) -> int:
    """Pixels that a figure and a cell share along one axis; 0 where they are apart."""
    first = max(start, cell * CELL)
    end = min(start + size, (cell + 1) * CELL)
    return max(0, end - first)


def gather_pictures(
    count: int, seed: int, fewest: int, most: int, odd_share: float
) -> list[Pictures]:
    """Scenes of the train split, by their size.

    fewest, most: figures of a scene.
    odd_share: share of the scenes in which one figure is the odd one.
    """
    rng = np.random.default_rng(SEED_BASE + seed)
    by_size: dict[tuple[int, int], list[scenes.Scene]] = {size: [] for size in scenes.SIZES}
    for _ in range(count):
        odd = most >= 4 and rng.random() < odd_share
        low = fewest
        high = most
        if odd:
            low = max(fewest, 4)
            high = min(most, 7)
        figures = int(rng.integers(low, high + 1))
        scene = scenes.plan(rng, "train", count=figures, odd=odd)
        by_size[scene.width, scene.height].append(scene)
    return [Pictures(planned) for planned in by_size.values()]


def turns(
    rng: np.random.Generator, scene: scenes.Scene, captions: bool, worded: bool
) -> list[Turn]:
    """Questions and answers about one picture, none twice, in short.

    captions: whether the last one asks for a caption.
    worded: ask a share of them (WORDED) in the suite's wording.
    """
    conversation = []
    for question in _draw_questions(rng, scene):
        text = question.short
        if worded and rng.random() < WORDED[question.type]:
            text = question.text
        conversation.append((text, question.answer))
    number = int(rng.integers(len(scene.figures)))
    figure = scene.figures[number]
    conversation.append((f"where {figure.shape}", scene.cell_words(figure)))
    if captions:
        conversation.append(("describe", questions.describe(scene)))
    return conversation


def _draw_questions(rng: np.random.Generator, scene: scenes.Scene) -> list[questions.Question]:
    """At most TURNS questions, of which no two have the same short text."""
    kinds: list[questions.Ask] = []
    for kind, share in SHARES.items():
        kinds += [questions.ASK[kind]] * share
    chosen: dict[str, questions.Question] = {}
    if questions.has_odd(scene):
        kinds.append(questions.ask_odd)
        chosen["odd"] = questions.ask_odd(rng, scene)
    for _ in range(40):
        if len(chosen) >= TURNS:
            break
        ask = kinds[int(rng.integers(len(kinds)))]
        question = ask(rng, scene)
        chosen[question.short] = question
    return list(chosen.values())


@dataclass
class _Row:
    """One picture and its turns.

    ids, labels: as in Packed.
    turns: of each id its turn, from 1 on; 0 for the picture before them.
    offsets: of each id its place within its turn.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, ids: list[int], turn: int, learned: bool = False, offset: int = 0) -> None:
        count = len(ids)
        self.ids += ids
        self.labels += ids if learned else [-100] * count
        self.turns += [turn] * count
        self.offsets += range(offset, offset + count)


@dataclass(frozen=True)
class Packed:
    """A batch of B rows of S ids.

    ids: (B, S) int64.
    labels: (B, S) int64, -100 outside of answers.
    positions: (3, B, S) int64; each turn begins right after the picture.
    mask: (B, 1, S, S) float32, added to attention scores: a turn sees the picture and itself.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    mask: np.ndarray


class Packer:
    """Packs many turns about a picture into one row, each as if it were the only one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        (self.image_id,) = self.ids(FAMILY.image_token)

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            self._known[text] = encoding.ids
        return self._known[text]

    def pack(self, pictures: Pictures, conversations: list[list[Turn]]) -> Packed:
        """One row a conversation, each about a picture of this size."""
        prefix = self._prefix(pictures.grid)
        prefix_positions = FAMILY.positions(
            np.array(prefix), self.image_id, [pictures.grid], IMAGE_SPEC
        )
        rows = [self._row(prefix, conversation) for conversation in conversations]
        longest = max(len(row.ids) for row in rows)
        shape = (len(rows), longest)
        ids = np.zeros(shape, np.int64)
        labels = np.full(shape, -100, np.int64)
        of_turn = np.full(shape, -1)
        positions = np.zeros((3, *shape), np.int64)
        first = int(prefix_positions.max()) + 1
        for number, row in enumerate(rows):
            length = len(row.ids)
            ids[number, :length] = row.ids
            labels[number, :length] = row.labels
            of_turn[number, :length] = row.turns
            positions[:, number, :length] = first + np.array(row.offsets)
            positions[:, number, : len(prefix)] = prefix_positions
        return Packed(ids, labels, positions, _mask(of_turn))

    def _prefix(self, grid: Grid) -> list[int]:
        """The prompt up to the end of the picture."""
        rows, columns = FAMILY.token_grid(grid, IMAGE_SPEC)
        text = render(build.TEMPLATE, "", 1)
        before, _ = text.split(FAMILY.image_token)
        picture = [self.image_id] * (rows * columns)
        return self.ids(before) + picture + self.ids("<|vision_end|>")

    def _row(self, prefix: list[int], conversation: list[Turn]) -> _Row:
        row = _Row()
        row.add(prefix, turn=0)
        for turn, (question, answer) in enumerate(conversation, 1):
            text = render(build.TEMPLATE, question, 1)
            _, after_picture = text.split("<|vision_end|>")[:2]
            prompt = self.ids(after_picture)
            row.add(prompt, turn)
            response = self.ids(answer) + self.ids("<|im_end|>")
            row.add(response, turn, learned=True, offset=len(prompt))
        return row


def _mask(of_turn: np.ndarray) -> np.ndarray:
    """`Packed.mask`. of_turn (B, S): the turn of each id, 0 for the picture, -1 for padding."""
    queries = of_turn[:, :, None]
    keys = of_turn[:, None, :]
    same_turn = keys == queries
    of_prefix = keys == 0
    sees = np.tril(same_turn | of_prefix)
    mask = np.where(sees, np.float32(0), np.float32(-1e9))
    return np.asarray(mask[:, None])
