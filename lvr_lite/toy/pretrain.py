"""How the embedded model was made: `python -m lvr_lite.toy.pretrain --out DIR` (two CPU cores,
under an hour; a GPU if there is one).

Stage 1 teaches the vision tower alone: each visual token is classified against the word embeddings
of what lies in its cell. Stage 2 trains everything on captions, grounding and questions without
latents, many packed turns a picture; each turn sees the picture and itself alone, so that a packed
turn is exactly the single question that the model meets later. Questions are asked in short
("colour star"); stage 3, a few steps, asks some in the suite's wording ("what colour is the star").
The train split's scenes are used alone (no held-out combination), from seeds that `data make` does
not reach.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from lvr_lite.model.families import Grid
from lvr_lite.model.families.qwen2_5_vl import FAMILY
from lvr_lite.model.prompt import render
from lvr_lite.toy import build, questions, scenes
from lvr_lite.toy.drawing import draw

SEED_BASE = 1_000_000  # scene seeds of pre-training; `data make --seed` takes 0 … 999,999
TURNS = 13
# Share of the questions in the suite's wording in stage 3: most where it is furthest from the short
# one.
WORDED = {"attribute": 0.02, "letter": 0.02, "position": 0.8, "count": 0.05, "odd": 0.1}
WORDS = (*scenes.SHAPES, *scenes.COLOURS, *scenes.PATTERNS, *scenes.GLYPHS)
IMAGE = FAMILY.image_token
IMAGE_SPEC = FAMILY.image_spec(
    {"vision_config": {"patch_size": 14, "spatial_merge_size": 2, "window_size": 56}},
    build.PREPROCESSOR,
)


class Pictures:
    """Drawn scenes of one size: uint8 patches without the temporal repeat (n, patches, 588), and
    per token which words lie in its cell.
    """

    def __init__(self, planned: list[scenes.Scene]) -> None:
        self.scenes = planned
        width, height = planned[0].width, planned[0].height
        self.grid = Grid(height // 14, width // 14)
        self.patches = np.stack([self._patches(draw(s)) for s in planned])
        self.words = np.stack([self._cell_words(s) for s in planned])

    def _patches(self, picture: Any) -> np.ndarray:
        rows, columns = self.grid
        x = (
            np.asarray(picture)
            .reshape(rows // 2, 2, 14, columns // 2, 2, 14, 3)
            .transpose(0, 3, 1, 4, 6, 2, 5)
        )
        return np.asarray(x.reshape(rows * columns, 588))

    def _cell_words(self, scene: scenes.Scene) -> np.ndarray:
        rows, columns = self.grid[0] // 2, self.grid[1] // 2
        out = np.zeros((rows, columns, len(WORDS)), bool)
        for t in scene.figures:
            for r in range(t.y // 28, min(rows, (t.y + t.size - 1) // 28 + 1)):
                for c in range(t.x // 28, min(columns, (t.x + t.size - 1) // 28 + 1)):
                    across = min(t.x + t.size, c * 28 + 28) - max(t.x, c * 28)
                    down = min(t.y + t.size, r * 28 + 28) - max(t.y, r * 28)
                    if across * down >= 0.3 * min(28 * 28, t.size**2):
                        out[
                            r, c, [WORDS.index(w) for w in (t.shape, t.colour, t.pattern, t.glyph)]
                        ] = True
        return out.reshape(rows * columns, -1)


def gather_pictures(
    count: int, seed: int, fewest: int, most: int, odd_share: float
) -> list[Pictures]:
    rng = np.random.default_rng(SEED_BASE + seed)
    by_size: dict[tuple[int, int], list[scenes.Scene]] = {size: [] for size in scenes.SIZES}
    for _ in range(count):
        odd = most >= 4 and rng.random() < odd_share
        things = (
            int(rng.integers(max(fewest, 4), min(most, 7) + 1))
            if odd
            else int(rng.integers(fewest, most + 1))
        )
        scene = scenes.plan(rng, "train", count=things, odd=odd)
        by_size[scene.width, scene.height].append(scene)
    return [Pictures(found) for found in by_size.values()]


def turns(
    rng: np.random.Generator, scene: scenes.Scene, captions: bool, worded: bool
) -> list[tuple[str, str]]:
    """Question and answer texts for one picture, none twice, in short; with `worded`, a share of
    them (WORDED) in the suite's wording.
    """
    asked: dict[str, questions.Question] = {}
    shares = {"attribute": 4, "letter": 3, "position": 3, "count": 3}
    kinds = [questions.ASK[kind] for kind, share in shares.items() for _ in range(share)]
    if questions.has_odd(scene):
        kinds.append(questions.ask_odd)
        asked["odd"] = questions.ask_odd(rng, scene)
    for _ in range(40):
        if len(asked) >= TURNS:
            break
        q = kinds[int(rng.integers(len(kinds)))](rng, scene)
        asked[q.short] = q
    out = [
        (q.text if worded and rng.random() < WORDED[q.type] else q.short, q.answer)
        for q in asked.values()
    ]
    thing = scene.figures[int(rng.integers(len(scene.figures)))]
    out.append((f"where {thing.shape}", scene.cell_words(thing)))
    if captions:
        out.append(("describe", questions.describe(scene)))
    return out


class Packer:
    """Turns of a batch as arrays: ids, mRoPE positions, the mask in which a turn sees the prefix
    and itself, and labels.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def pack(
        self, pictures: Pictures, conversations: list[list[tuple[str, str]]]
    ) -> dict[str, torch.Tensor]:
        rows, columns = FAMILY.token_grid(pictures.grid, IMAGE_SPEC)
        before, _ = render(build.TEMPLATE, "", 1).split(IMAGE)
        image_id = self.ids(IMAGE)[0]
        closing = self.ids("<|vision_end|>")
        prefix = self.ids(before) + [image_id] * (rows * columns) + closing
        prefix_positions = FAMILY.positions(np.array(prefix), image_id, [pictures.grid], IMAGE_SPEC)
        start = int(prefix_positions.max()) + 1
        samples = []
        for conversation in conversations:
            ids, answers, group, offsets = (
                list(prefix),
                [False] * len(prefix),
                [0] * len(prefix),
                [0] * len(prefix),
            )
            for number, (question, answer) in enumerate(conversation, 1):
                asked = self.ids(render(build.TEMPLATE, question, 1).split("<|vision_end|>")[1])
                said = self.ids(answer) + self.ids("<|im_end|>")
                ids += asked + said
                answers += [False] * len(asked) + [True] * len(said)
                group += [number] * (len(asked) + len(said))
                offsets += range(len(asked) + len(said))
            samples.append((ids, answers, group, offsets))
        longest = max(len(s[0]) for s in samples)
        n = len(samples)
        ids_a, labels = np.zeros((n, longest), np.int64), np.full((n, longest), -100, np.int64)
        group_a, positions = np.full((n, longest), -1), np.zeros((3, n, longest), np.int64)
        for k, (ids, answers, group, offsets) in enumerate(samples):
            length = len(ids)
            ids_a[k, :length], group_a[k, :length] = ids, group
            labels[k, :length] = np.where(answers, ids, -100)
            positions[:, k, :length] = start + np.array(offsets)
            positions[:, k, : len(prefix)] = prefix_positions
        t = torch.from_numpy
        groups = t(group_a)
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        mask = causal & ((groups[:, None, :] == 0) | (groups[:, None, :] == groups[:, :, None]))
        return {
            "ids": t(ids_a),
            "labels": t(labels),
            "positions": t(positions),
            "mask": torch.where(mask[:, None], 0.0, -1e9),
            "image_id": torch.tensor(image_id),
        }


def see(model: Any, patches: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Visual tokens (B, N/4, H) of B pictures of one grid from patches (B, N, 588) in 0 … 255.

    transformers attends window by window in a Python loop, ten times slower for many small
    pictures; a test holds the two together.
    """
    tower = model.model.visual
    mean, std = (
        torch.tensor(build.PREPROCESSOR[k], device=patches.device).repeat_interleave(196)
        for k in ("image_mean", "image_std")
    )
    x = (patches.float() / 255 - mean) / std
    weight = tower.patch_embed.proj.weight.sum(2).flatten(
        1
    )  # a still picture fills both temporal slots alike
    batch, count = x.shape[:2]

    def windowed(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(*t.shape[:-2], count // 4, 4, -1)[
            ..., inputs["window_index"], :, :
        ].reshape(*t.shape[:-2], count, -1)

    h = windowed(F.linear(x, weight))
    cos, sin = (windowed(t)[None, None] for t in tower.rotary_pos_emb(h, inputs["position_ids"]))
    same = inputs["window_id"][:, None] == inputs["window_id"][None]

    def rotate(t: torch.Tensor) -> torch.Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat((-b, a), -1) * sin

    for i, block in enumerate(tower.blocks):
        a = block.attn
        q, k, v = (
            a.qkv(block.norm1(h))
            .reshape(batch, count, 3, a.num_heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        q, k = rotate(q).to(v.dtype), rotate(k).to(v.dtype)
        scores = (
            q @ k.transpose(-1, -2)
        ) * a.scaling  # plain matmuls: the fused CPU kernel's backward took 43 % of a step
        if i not in tower.fullatt_block_indexes:
            scores = scores.masked_fill(~same, float("-inf"))
        o = scores.float().softmax(-1).to(v.dtype) @ v
        h = h + a.proj(o.transpose(1, 2).reshape(batch, count, -1))
        h = h + block.mlp(block.norm2(h))
    merged: torch.Tensor = tower.merger(h.reshape(batch * count, -1))
    return merged.reshape(batch, count // 4, -1)[:, inputs["reverse_index"]]


class Trainer:
    """All stages over one optimizer; logs to `out/log.jsonl`, saves checkpoints into `out`. start:
    a checkpoint to go on from.
    """

    def __init__(self, out: Path, device: str, seed: int, start: Path | None = None) -> None:
        self.out, self.device = out, device
        self.tokenizer = (
            build.make_tokenizer()
            if start is None
            else Tokenizer.from_file(str(start / "tokenizer.json"))
        )
        made = (
            build.make_model(self.tokenizer, seed)
            if start is None
            else type(build.make_model(self.tokenizer)).from_pretrained(start)
        )
        self.model = made.float().train().to(device)
        self.model.model.language_model.set_attn_implementation(
            "eager"
        )  # as in `see`: faster to train on a CPU
        self.packer = Packer(self.tokenizer)
        self.rng = np.random.default_rng(seed)
        words = [self.tokenizer.encode(w).ids for w in WORDS]
        assert all(len(w) == 1 for w in words)
        self.word_ids = torch.tensor([w[0] for w in words], device=device)
        hidden = self.model.config.text_config.hidden_size
        self.place = torch.nn.Linear(hidden, 2).to(
            device
        )  # row and column of a token; thrown away after training
        self.scale = torch.nn.Parameter(torch.tensor([4.0, -3.0], device=device))
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.place.parameters(), self.scale],
            lr=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.02,
            fused=True,
        )
        self.began = time.time()

    def batch(
        self, pools: list[Pictures], size: int
    ) -> tuple[Pictures, np.ndarray, torch.Tensor, dict[str, torch.Tensor]]:
        weights = np.array([len(p.scenes) for p in pools])
        pictures = pools[int(self.rng.choice(len(pools), p=weights / weights.sum()))]
        chosen = self.rng.integers(len(pictures.scenes), size=size)
        inputs = {
            k: torch.from_numpy(v).to(self.device)
            for k, v in FAMILY.vision_inputs([pictures.grid], IMAGE_SPEC).items()
        }
        return pictures, chosen, torch.from_numpy(pictures.patches[chosen]).to(self.device), inputs

    def vision_loss(
        self, tokens: torch.Tensor, pictures: Pictures, chosen: np.ndarray
    ) -> tuple[torch.Tensor, dict[str, float]]:
        truth = torch.from_numpy(pictures.words[chosen]).to(self.device).float()
        words = self.model.get_input_embeddings()(self.word_ids)
        scores = (
            F.normalize(tokens.float(), dim=-1)
            @ F.normalize(words.float(), dim=-1).T
            * self.scale[0].exp()
            + self.scale[1]
        )
        named = F.binary_cross_entropy_with_logits(
            scores, truth, pos_weight=torch.tensor(3.0, device=self.device)
        )
        rows, columns = pictures.grid[0] // 2, pictures.grid[1] // 2
        where = torch.stack(
            torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij"), -1
        ).reshape(1, -1, 2)
        placed = F.mse_loss(
            self.place(tokens.float()), (where.to(self.device) - 2.5).expand(len(chosen), -1, -1)
        )
        recall = {}
        with torch.no_grad():
            hit = (scores > 0) & (truth > 0)
            for name, span in (
                ("shape", slice(0, 8)),
                ("colour", slice(8, 16)),
                ("pattern", slice(16, 19)),
                ("letter", slice(19, 29)),
            ):
                one = truth[..., span].sum(-1) == 1
                recall[name] = round(
                    float(
                        (scores[..., span].argmax(-1) == truth[..., span].argmax(-1))[one]
                        .float()
                        .mean()
                    ),
                    3,
                )
        recall["place"] = round(float(placed.detach()), 3)
        recall["hit"] = round(float(hit.sum() / truth.sum()), 3)
        return named * 3 + 0.3 * placed, recall

    def step(self, loss: torch.Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def language_loss(
        self, tokens: torch.Tensor, packed: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean cross-entropy over answer tokens, and for each of them whether it was right and
        where it stands.
        """
        p = {k: v.to(self.device) for k, v in packed.items()}
        embeds = self.model.get_input_embeddings()(p["ids"])
        embeds = embeds.masked_scatter(
            (p["ids"] == p["image_id"])[..., None], tokens.to(embeds.dtype)
        )
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=p["positions"],
            attention_mask=p["mask"],
            use_cache=False,
        ).last_hidden_state
        labels = p["labels"][:, 1:]
        at = labels != -100
        logits = self.model.lm_head(hidden[:, :-1][at]).float()
        return F.cross_entropy(logits, labels[at]), (logits.argmax(-1) == labels[at]), at

    def forward(
        self, pools: list[Pictures], size: int, captions: bool, worded: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        pictures, chosen, patches, inputs = self.batch(pools, size)
        packed = self.packer.pack(
            pictures, [turns(self.rng, pictures.scenes[i], captions, worded) for i in chosen]
        )
        with torch.autocast(self.device, dtype=torch.bfloat16):
            tokens = see(self.model, patches, inputs)
            language, right, _ = self.language_loss(tokens, packed)
        vision, recall = self.vision_loss(tokens, pictures, chosen)
        return language, vision, recall | {"token_accuracy": round(float(right.float().mean()), 3)}

    @torch.no_grad()
    def evaluate(self, count: int = 240, worded: bool = False) -> dict[str, float]:
        """Teacher-forced exact answers by question type, on test scenes (held-out combinations
        included), in short or in full wording.
        """
        right: dict[str, list[bool]] = {}
        for _, scene, question, _ in questions.items(seed=777_777, split="test", count=count):
            pictures = Pictures([scene])
            _, _, patches, inputs = self.batch([pictures], 1)
            packed = self.packer.pack(
                pictures, [[(question.text if worded else question.short, question.answer)]]
            )
            with torch.autocast(self.device, dtype=torch.bfloat16):
                _, hits, _ = self.language_loss(see(self.model, patches, inputs), packed)
            right.setdefault(question.type, []).append(bool(hits.all()))
        out = {k: round(float(np.mean(v)), 3) for k, v in right.items()}
        return out | {"all": round(float(np.mean([x for v in right.values() for x in v])), 3)}

    def log(self, **row: Any) -> None:
        row["minutes"] = round((time.time() - self.began) / 60, 2)
        print(json.dumps(row), flush=True)
        with (self.out / "log.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")

    def save(self, name: str) -> None:
        build.save(self.model, self.tokenizer, self.out / name, torch.bfloat16)

    def learn_to_see(self, few: list[Pictures], many: list[Pictures], steps: int) -> None:
        """Stage 1: the vision tower alone, against the word embeddings."""
        for step in range(steps):
            pictures, chosen, patches, inputs = self.batch(few if step < steps // 4 else many, 64)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                tokens = see(self.model, patches, inputs)
            loss, recall = self.vision_loss(tokens, pictures, chosen)
            self.step(loss, 1e-3 * min(1, (step + 1) / 50))
            if step % 50 == 0:
                self.log(stage="vision", step=step, loss=round(loss.item(), 4), **recall)

    def learn_to_answer(self, few: list[Pictures], many: list[Pictures], steps: int) -> None:
        """Stage 2: everything, on captions, grounding and short questions."""
        for step in range(steps):
            lr = (
                1e-3
                * min(1, (step + 1) / 100)
                * (1 if step < 0.7 * steps else max(0.03, (steps - step) / (0.3 * steps)))
            )
            language, vision, recall = self.forward(
                few if step < steps // 10 else many, 16, captions=step % 4 == 0
            )
            self.step(language + vision, lr)
            if step % 50 == 0:
                self.log(
                    stage="all",
                    step=step,
                    language=round(language.item(), 4),
                    vision=round(vision.item(), 4),
                    **recall,
                )
            if step % 500 == 499:
                self.log(stage="eval", step=step, **self.evaluate())
                self.save(f"step{step + 1}")

    def learn_the_wording(self, many: list[Pictures], steps: int) -> None:
        """Stage 3: a few steps, with the vision tower frozen, in which some questions have the
        suite's wording.
        """
        self.model.model.visual.requires_grad_(False)
        for step in range(steps):
            language, _, _ = self.forward(many, 16, captions=step % 4 == 0, worded=True)
            self.step(language, 1e-4)
            if step % 5 == 4:
                self.log(stage="worded", step=step, **self.evaluate(240, worded=True))
                self.save(f"worded{step + 1}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, help="a folder `short` of an earlier run: stage 3 alone, from there"
    )
    parser.add_argument("--vision-steps", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--worded-steps", type=int, default=40)
    parser.add_argument("--pictures", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    t = Trainer(a.out, a.device, a.seed, a.start)
    few = gather_pictures(a.pictures // 3, 0, 2, 4, 0.2)
    many = gather_pictures(a.pictures, 1, 3, 8, 0.3)
    t.log(stage="pictures drawn")
    if a.start is None:
        t.learn_to_see(few, many, a.vision_steps)
        t.learn_to_answer(few, many, a.steps)
        t.save("short")
    t.log(stage="eval", worded=False, **t.evaluate(1200))
    t.learn_the_wording(many, a.worded_steps)
    t.log(stage="eval", worded=True, **t.evaluate(1200, worded=True))
    t.save("last")


if __name__ == "__main__":
    main()
