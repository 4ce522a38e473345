"""How the embedded model was made: `python -m lvr_lite.toy.pretrain --out DIR` (two CPU cores,
under an hour; a GPU if there is one).

May import: torch, transformers and all that stands above `toy`.

Stage 1 teaches the vision tower alone: each visual token is classified against the word embeddings
of what lies in its cell. Stage 2 trains everything on captions, grounding and questions without
latents, many packed turns a picture. Each turn sees the picture and itself alone, so that a packed
turn is exactly the single question that the model meets later. Questions are asked in short
("colour star"). Stage 3, a few steps, asks some in the suite's wording ("what colour is the star").
The train split's scenes are used alone (no held-out combination), from seeds that `data make` does
not reach.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lvr_lite.model.families.qwen2_5_vl import FAMILY
from lvr_lite.toy import build, questions
from lvr_lite.toy.packing import (
    IMAGE_SPEC,
    WORDS,
    Packed,
    Packer,
    Pictures,
    gather_pictures,
    turns,
)

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

# Where in WORDS each kind of words is.
KINDS = {
    "shape": slice(0, 8),
    "colour": slice(8, 16),
    "pattern": slice(16, 19),
    "letter": slice(19, 29),
}
# Pictures of a batch: of stage 1, and of stages 2 and 3.
VISION_BATCH = 64
BATCH = 16
EVAL_SEED = 777_777


def see(
    model: Qwen2_5_VLForConditionalGeneration, patches: Tensor, inputs: dict[str, Tensor]
) -> Tensor:
    """Visual tokens (B, N/4, H) of B pictures of one grid.

    patches: (B, N, 588), 0 … 255.
    inputs: what the tower needs beside patches (`Family.vision_inputs`).

    transformers attends window by window in a Python loop, which is ten times slower for many small
    pictures; a test holds the two together.
    """
    tower = model.model.visual
    window_index = inputs["window_index"]
    window_id = inputs["window_id"]
    # A still picture fills both temporal slots alike.
    weight = tower.patch_embed.proj.weight.sum(2).flatten(1)
    hidden = _in_windows(F.linear(_normalized(patches), weight), window_index)
    cos, sin = tower.rotary_pos_emb(hidden, inputs["position_ids"])
    cos = _in_windows(cos, window_index)[None, None]
    sin = _in_windows(sin, window_index)[None, None]
    elsewhere = window_id[:, None] != window_id[None]
    batch, count = hidden.shape[:2]
    for number, block in enumerate(tower.blocks):
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).reshape(batch, count, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = _rotated(q, cos, sin).to(v.dtype)
        k = _rotated(k, cos, sin).to(v.dtype)
        # Plain matmuls: the backward pass of the fused CPU kernel took 43 % of a step.
        scores = (q @ k.transpose(-1, -2)) * attention.scaling
        if number not in tower.fullatt_block_indexes:
            scores = scores.masked_fill(elsewhere, float("-inf"))
        mixed = scores.float().softmax(-1).to(v.dtype) @ v
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(batch, count, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    tokens: Tensor = tower.merger(hidden.reshape(batch * count, -1))
    return tokens.reshape(batch, count // 4, -1)[:, inputs["reverse_index"]]


def _normalized(patches: Tensor) -> Tensor:
    mean = torch.tensor(build.PREPROCESSOR["image_mean"], device=patches.device)
    std = torch.tensor(build.PREPROCESSOR["image_std"], device=patches.device)
    pixels = patches.shape[-1] // len(mean)
    scaled = patches.float() / 255
    return (scaled - mean.repeat_interleave(pixels)) / std.repeat_interleave(pixels)


def _in_windows(values: Tensor, window_index: Tensor) -> Tensor:
    """Values (…, N, D) of patches, those of one window after another; four patches, which are one
    visual token, stay together.
    """
    *batch, count, width = values.shape
    by_token = values.reshape(*batch, count // 4, 4, width)
    return by_token[..., window_index, :, :].reshape(*batch, count, width)


def _rotated(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = values.chunk(2, -1)
    return values * cos + torch.cat((-b, a), -1) * sin


@dataclass(frozen=True)
class Batch:
    """Pictures of one size that a step sees.

    chosen: (B,) their numbers among `pictures`.
    patches: (B, N, 588) uint8.
    inputs: what the tower needs beside patches.
    """

    pictures: Pictures
    chosen: np.ndarray
    patches: Tensor
    inputs: dict[str, Tensor]


class Pretrainer:
    """All stages over one optimizer; logs to `out/log.jsonl`, saves checkpoints into `out`.

    start: a checkpoint to go on from.
    """

    def __init__(self, out: Path, device: str, seed: int, start: Path | None = None) -> None:
        self.out = out
        self.device = device
        if start is None:
            self.tokenizer = build.make_tokenizer()
            model = build.make_model(self.tokenizer, seed)
        else:
            self.tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
            model = type(build.make_model(self.tokenizer)).from_pretrained(start)
        self.model = model.float().train().to(device)
        # As in `see`: faster to train on a CPU.
        self.model.model.language_model.set_attn_implementation("eager")
        self.packer = Packer(self.tokenizer)
        self.rng = np.random.default_rng(seed)
        word_ids = []
        for word in WORDS:
            (token,) = self.tokenizer.encode(word).ids
            word_ids.append(token)
        self.word_ids = torch.tensor(word_ids, device=device)
        # Row and column of a visual token; thrown away after training.
        self.place = torch.nn.Linear(self.model.config.text_config.hidden_size, 2).to(device)
        # Logarithm of the scale, and bias, of the scores of words.
        self.scale = torch.nn.Parameter(torch.tensor([4.0, -3.0], device=device))
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.place.parameters(), self.scale],
            lr=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.02,
            fused=True,
        )
        self.began = time.time()

    def batch(self, pools: list[Pictures], size: int) -> Batch:
        """Random pictures of one of the pools."""
        weights = np.array([len(pool.scenes) for pool in pools])
        pictures = pools[int(self.rng.choice(len(pools), p=weights / weights.sum()))]
        chosen = self.rng.integers(len(pictures.scenes), size=size)
        return Batch(
            pictures,
            chosen,
            self._tensor(pictures.patches[chosen]),
            {
                name: self._tensor(values)
                for name, values in FAMILY.vision_inputs([pictures.grid], IMAGE_SPEC).items()
            },
        )

    def vision_loss(self, tokens: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """How well visual tokens (B, N/4, H) tell the words and the place of their cells, and what
        to log of it.
        """
        truth = self._tensor(batch.pictures.words[batch.chosen]).float()
        scores = self._word_scores(tokens)
        weight = torch.tensor(3.0, device=self.device)
        named = F.binary_cross_entropy_with_logits(scores, truth, pos_weight=weight)
        rows = torch.arange(batch.pictures.grid.rows // 2) + 0.5
        columns = torch.arange(batch.pictures.grid.columns // 2) + 0.5
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(1, -1, 2)
        wanted = (centres.to(self.device) - 2.5).expand(len(tokens), -1, -1)
        placed = F.mse_loss(self.place(tokens.float()), wanted)
        shares = _right_words(scores.detach(), truth)
        shares["place"] = round(float(placed.detach()), 3)
        hits = (scores > 0) & (truth > 0)
        shares["hit"] = round(float(hits.sum() / truth.sum()), 3)
        return named * 3 + 0.3 * placed, shares

    def _word_scores(self, tokens: Tensor) -> Tensor:
        words = F.normalize(self.model.get_input_embeddings()(self.word_ids).float(), dim=-1)
        cosines = F.normalize(tokens.float(), dim=-1) @ words.T
        return cosines * self.scale[0].exp() + self.scale[1]

    def language_loss(self, tokens: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the tokens of answers, and for each of them whether it was
        right.

        tokens: visual, (B, N/4, H).
        """
        ids = self._tensor(packed.ids)
        embeds = self.model.get_input_embeddings()(ids)
        is_image = (ids == self.packer.image_id)[..., None]
        hidden = self.model.model.language_model(
            inputs_embeds=embeds.masked_scatter(is_image, tokens.to(embeds.dtype)),
            position_ids=self._tensor(packed.positions),
            attention_mask=self._tensor(packed.mask),
            use_cache=False,
        ).last_hidden_state
        labels = self._tensor(packed.labels)[:, 1:]
        learned = labels != -100
        logits = self.model.lm_head(hidden[:, :-1][learned]).float()
        right = logits.argmax(-1) == labels[learned]
        return F.cross_entropy(logits, labels[learned]), right

    def losses(
        self, pools: list[Pictures], captions: bool, worded: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The loss of language and that of vision on a random batch, and what to log of it."""
        batch = self.batch(pools, BATCH)
        pictures = batch.pictures
        conversations = [
            turns(self.rng, pictures.scenes[i], captions, worded) for i in batch.chosen
        ]
        packed = self.packer.pack(pictures, conversations)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            tokens = see(self.model, batch.patches, batch.inputs)
            language, right = self.language_loss(tokens, packed)
        vision, shares = self.vision_loss(tokens, batch)
        shares["token_accuracy"] = round(float(right.float().mean()), 3)
        return language, vision, shares

    def step(self, loss: Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, count: int = 240, worded: bool = False) -> dict[str, float]:
        """Share of exact teacher-forced answers by type of question, on test scenes (held-out
        combinations included).

        worded: ask in the suite's wording, else in short.
        """
        right: dict[str, list[bool]] = {}
        for _, scene, question, _ in questions.items(seed=EVAL_SEED, split="test", count=count):
            batch = self.batch([Pictures([scene])], 1)
            asked = question.text if worded else question.short
            packed = self.packer.pack(batch.pictures, [[(asked, question.answer)]])
            with torch.autocast(self.device, dtype=torch.bfloat16):
                tokens = see(self.model, batch.patches, batch.inputs)
                _, hits = self.language_loss(tokens, packed)
            right.setdefault(question.type, []).append(bool(hits.all()))
        right["all"] = [hit for hits_of_type in right.values() for hit in hits_of_type]
        return {
            kind: round(float(np.mean(hits_of_type)), 3) for kind, hits_of_type in right.items()
        }

    def learn_to_see(self, few: list[Pictures], many: list[Pictures], steps: int) -> None:
        """Stage 1: the vision tower alone, against the word embeddings.

        few, many: pictures with few figures, which come first, and with many.
        """
        for step in range(steps):
            batch = self.batch(few if step < steps // 4 else many, VISION_BATCH)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                tokens = see(self.model, batch.patches, batch.inputs)
            loss, shares = self.vision_loss(tokens, batch)
            self.step(loss, 1e-3 * min(1, (step + 1) / 50))
            if step % 50 == 0:
                self.log(stage="vision", step=step, loss=round(loss.item(), 4), **shares)

    def learn_to_answer(self, few: list[Pictures], many: list[Pictures], steps: int) -> None:
        """Stage 2: everything, on captions, grounding and short questions."""
        for step in range(steps):
            pools = few if step < steps // 10 else many
            language, vision, shares = self.losses(pools, captions=step % 4 == 0)
            rise = min(1, (step + 1) / 100)
            fall = 1 if step < 0.7 * steps else max(0.03, (steps - step) / (0.3 * steps))
            self.step(language + vision, 1e-3 * rise * fall)
            if step % 50 == 0:
                self.log(
                    stage="all",
                    step=step,
                    language=round(language.item(), 4),
                    vision=round(vision.item(), 4),
                    **shares,
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
            language, _, _ = self.losses(many, captions=step % 4 == 0, worded=True)
            self.step(language, 1e-4)
            if step % 5 == 4:
                self.log(stage="worded", step=step, **self.evaluate(worded=True))
                self.save(f"worded{step + 1}")

    def log(self, **row: object) -> None:
        row["minutes"] = round((time.time() - self.began) / 60, 2)
        print(json.dumps(row), flush=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, name: str) -> None:
        build.save(self.model, self.tokenizer, self.out / name, torch.bfloat16)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _right_words(scores: Tensor, truth: Tensor) -> dict[str, float]:
    """Share of the cells with one word of a kind where it has the highest score of its kind."""
    shares = {}
    for kind, span in KINDS.items():
        has_one = truth[..., span].sum(-1) == 1
        right = scores[..., span].argmax(-1) == truth[..., span].argmax(-1)
        shares[kind] = round(float(right[has_one].float().mean()), 3)
    return shares


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
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Pretrainer(options.out, options.device, options.seed, options.start)
    few = gather_pictures(options.pictures // 3, seed=0, fewest=2, most=4, odd_share=0.2)
    many = gather_pictures(options.pictures, seed=1, fewest=3, most=8, odd_share=0.3)
    trainer.log(stage="pictures drawn")
    if options.start is None:
        trainer.learn_to_see(few, many, options.vision_steps)
        trainer.learn_to_answer(few, many, options.steps)
        trainer.save("short")
    trainer.log(stage="eval", worded=False, **trainer.evaluate(1200))
    trainer.learn_the_wording(many, options.worded_steps)
    trainer.log(stage="eval", worded=True, **trainer.evaluate(1200, worded=True))
    trainer.save("last")


if __name__ == "__main__":
    main()
