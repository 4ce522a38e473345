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
IMAGE_SPEC = FAMILY.image_spec(
    {"vision_config": {"patch_size": PATCH, "spatial_merge_size": 2, "window_size": 56}},
    build.PREPROCESSOR,
)

# A question and its answer.
Turn = tuple[str, str]


class Pictures:
    """Drawn scenes of one size.

    grid: rows and columns of patches.
    patches: (n, patches, 588) uint8, without the temporal repeat.
    words: (n, visual tokens, WORDS) bool, which words lie in the cell of each token.
    """

    def __init__(self, planned: list[scenes.Scene]) -> None:
        self.scenes = planned
        self.grid = Grid(planned[0].height // PATCH, planned[0].width // PATCH)
        self.patches = np.stack([self._patches(draw(scene)) for scene in planned])
        self.words = np.stack([self._cell_words(scene) for scene in planned])

    def _patches(self, picture: Image.Image) -> np.ndarray:
        rows, columns = self.grid
        split = np.asarray(picture).reshape(rows // 2, 2, PATCH, columns // 2, 2, PATCH, 3)
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
            least = COVERED * min(CELL**2, figure.size**2)
            for row in range(rows):
                for column in range(columns):
                    across = _overlap(figure.x, figure.size, column)
                    down = _overlap(figure.y, figure.size, row)
                    if across > 0 and down > 0 and across * down >= least:
                        holds[row, column, words] = True
        return holds.reshape(rows * columns, -1)


def _overlap(start: int, size: int, cell: int) -> int:
    """Pixels that a figure and a cell share along one axis; negative where they are apart."""
    return min(start + size, (cell + 1) * CELL) - max(start, cell * CELL)


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
        low = max(fewest, 4) if odd else fewest
        high = min(most, 7) if odd else most
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
    chosen: dict[str, questions.Question] = {}
    kinds = [questions.ASK[kind] for kind, share in SHARES.items() for _ in range(share)]
    if questions.has_odd(scene):
        kinds.append(questions.ask_odd)
        chosen["odd"] = questions.ask_odd(rng, scene)
    for _ in range(40):
        if len(chosen) >= TURNS:
            break
        question = kinds[int(rng.integers(len(kinds)))](rng, scene)
        chosen[question.short] = question
    conversation = []
    for question in chosen.values():
        in_words = worded and rng.random() < WORDED[question.type]
        conversation.append((question.text if in_words else question.short, question.answer))
    figure = scene.figures[int(rng.integers(len(scene.figures)))]
    conversation.append((f"where {figure.shape}", scene.cell_words(figure)))
    if captions:
        conversation.append(("describe", questions.describe(scene)))
    return conversation


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
        self.ids += ids
        self.labels += ids if learned else [-100] * len(ids)
        self.turns += [turn] * len(ids)
        self.offsets += range(offset, offset + len(ids))


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
        shape = (len(rows), max(len(row.ids) for row in rows))
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
        same_turn = of_turn[:, None, :] == of_turn[:, :, None]
        of_prefix = of_turn[:, None, :] == 0
        sees = np.tril(same_turn | of_prefix)
        mask = np.where(sees[:, None], np.float32(0), np.float32(-1e9))
        return Packed(ids, labels, positions, mask)

    def _prefix(self, grid: Grid) -> list[int]:
        """The prompt up to the end of the picture."""
        rows, columns = FAMILY.token_grid(grid, IMAGE_SPEC)
        before, _ = render(build.TEMPLATE, "", 1).split(FAMILY.image_token)
        picture = [self.image_id] * (rows * columns)
        return self.ids(before) + picture + self.ids("<|vision_end|>")

    def _row(self, prefix: list[int], conversation: list[Turn]) -> _Row:
        row = _Row()
        row.add(prefix, turn=0)
        for turn, (question, answer) in enumerate(conversation, 1):
            prompt = self.ids(render(build.TEMPLATE, question, 1).split("<|vision_end|>")[1])
            row.add(prompt, turn)
            response = self.ids(answer) + self.ids("<|im_end|>")
            row.add(response, turn, learned=True, offset=len(prompt))
        return row
