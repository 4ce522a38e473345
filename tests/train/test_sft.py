"""The batch, the loss and what is trained: compared with the same written out by hand on a small random model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvr_lite.ask import prepare_prompt
from lvr_lite.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.config import load_settings
from lvr_lite.data.boxes import tokens_in_box
from lvr_lite.data.samples import Sample
from lvr_lite.decode import Options, decode
from lvr_lite.errors import BundleError, DataError
from lvr_lite.latent import LatentSpec
from lvr_lite.quant import nf4
from lvr_lite.runtime.torch import TorchRuntime
from lvr_lite.train.batches import Collator, Examples, Item, check_answers
from lvr_lite.train.finetune import _write_side_files, adapted
from lvr_lite.train.sft import LatentSFT

STEPS = 4
SETTINGS = load_settings(None, ["lora.rank=4", "lora.alpha=16", "train.gradient_checkpointing=false", f"latent.steps={STEPS}"])


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(small_checkpoint)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Scenes of every question type, with one and with several boxes, in pictures of all sizes; every third answer made longer."""
    found = list(Examples.of_scenes(0, "train", 12).items())
    found = [(replace(s, answer=f"{s.answer} and {s.answer}") if i % 3 == 1 else s, pictures) for i, (s, pictures) in enumerate(found)]
    assert {len(sample.boxes) for sample, _ in found} >= {1, 2}
    assert len({picture.size for _, (picture,) in found}) == 3
    return found


def batch_of(checkpoint: Checkpoint, items: Sequence[Item], **settings: Any) -> dict[str, torch.Tensor]:
    return Collator(checkpoint, replace(SETTINGS.latent, **settings))(items)


def two_pictures(items: Sequence[Item]) -> Item:
    (sample, (first,)), (_, (second,)) = items[0], items[1]
    return sample, (first, second.resize((84, 112)))


def extent(batch: dict[str, torch.Tensor], row: int) -> tuple[int, int]:
    """The first column of a row that is not padding, and the one after its last."""
    columns = batch["mask"][row].nonzero().flatten().tolist()
    assert columns == list(range(columns[0], columns[-1] + 1)), "padding within a sample"
    return columns[0], columns[-1] + 1


# ---------------------------------------------------------------------------------------------------------- the batch


def test_a_response_is_markers_around_latents_then_the_answer_then_the_end(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch, tokens = batch_of(checkpoint, items), checkpoint.tokens
    for row, (sample, _) in enumerate(items):
        ids = batch["ids"][row, batch["mask"][row] == 1].tolist()
        start = ids.index(tokens.lvr_start)
        assert ids[start + 1 : start + 1 + STEPS] == [tokens.lvr] * STEPS
        assert ids[start + 1 + STEPS] == tokens.lvr_end
        assert checkpoint.tokenizer.decode(ids[start + 2 + STEPS :]).strip() == sample.answer
        assert ids[-1] == tokens.end[0]


def test_all_responses_begin_in_one_column(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items)
    column = int(batch["response"])
    assert (batch["ids"][:, column] == checkpoint.tokens.lvr_start).all()
    assert (batch["labels"][:, :column] == -100).all()
    extents = [extent(batch, row) for row in range(len(items))]
    assert min(first for first, _ in extents) == 0
    assert max(end for _, end in extents) == batch["ids"].shape[1], "more columns than the batch needs"
    assert len({first for first, _ in extents}) > 1, "no prompt is padded"
    assert len({end for _, end in extents}) > 1, "no response is padded"


def test_the_latents_alone_are_visual_tokens(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items)
    assert batch["latent_at"].sum(1).tolist() == [STEPS] * len(items)
    assert torch.equal(batch["latent_at"], batch["ids"] == checkpoint.tokens.lvr)


def test_markers_answer_and_end_are_learned_and_nothing_else(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch, tokens = batch_of(checkpoint, items), checkpoint.tokens
    for row in range(len(items)):
        ids, labels = batch["ids"][row].tolist(), batch["labels"][row].tolist()
        start, (_, end) = ids.index(tokens.lvr_start), extent(batch, row)
        learned = [start, *range(start + 1 + STEPS, end)]
        assert [i for i, label in enumerate(labels) if label != -100] == learned
        assert all(labels[i] == ids[i] for i in learned)


def test_a_training_prompt_is_the_prompt_that_the_model_meets_later(checkpoint: Checkpoint, items: list[Item]) -> None:
    runtime = SimpleNamespace(**checkpoint.__dict__, hidden_size=8, encode=lambda pixels, _: np.zeros((len(pixels) // 4, 8), np.float32))
    mixed = [*items[:3], two_pictures(items)]
    batch = batch_of(checkpoint, mixed)
    for row, (sample, pictures) in enumerate(mixed):
        prompt, _ = prepare_prompt(runtime, pictures, sample.question)  # type: ignore[arg-type]
        (first, _), response = extent(batch, row), int(batch["response"])
        assert batch["ids"][row, first:response].tolist() == prompt.ids.tolist()
        assert batch["ids"][row, response] == checkpoint.tokens.lvr_start
        np.testing.assert_array_equal(batch["positions"][:, row, first:response], prompt.positions)


def test_positions_of_a_response_go_on_one_by_one(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items)
    for row in range(len(items)):
        start, (_, end) = int(batch["response"]), extent(batch, row)
        first = int(batch["positions"][:, row, :start].max()) + 1
        for axis in range(3):
            assert batch["positions"][axis, row, start:end].tolist() == list(range(first, first + end - start))


def picture_rows(batch: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """For each picture of a batch: its first visual token, and its rows and columns of tokens."""
    found, first = [], 0
    for _, height, width in batch["grid_thw"].tolist():
        found.append((first, height // 2, width // 2))
        first += height * width // 4
    assert batch["pool"].shape[1] == first == len(batch["pixel_values"]) // 4
    return found


def test_each_latent_target_is_a_mean_over_visual_tokens_of_the_boxes(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items)
    features = torch.randn(batch["pool"].shape[1], 5)
    targets = (batch["pool"] @ features).split(STEPS)
    for (sample, _), (first, rows, columns), found, weights in zip(
        items, picture_rows(batch), targets, batch["pool"].split(STEPS), strict=True
    ):
        inside = {first + int(t) for box in sample.boxes for t in tokens_in_box(box, rows, columns)}
        used = [set(w.nonzero().flatten().tolist()) for w in weights]
        assert set().union(*used) == inside, "not the tokens of this sample's boxes in its own picture"
        for group, target in zip(used, found, strict=True):
            torch.testing.assert_close(target, features[sorted(group)].mean(0))


def test_boxes_lie_in_the_first_of_two_pictures(checkpoint: Checkpoint, items: list[Item]) -> None:
    sample, pictures = two_pictures(items)
    batch = batch_of(checkpoint, [items[2], (sample, pictures), items[3]])
    starts = [first for first, _, _ in picture_rows(batch)]
    used = [w.nonzero().flatten() for w in batch["pool"].split(STEPS)]
    own = batch["pool"][STEPS : 2 * STEPS].nonzero()[:, 1]
    assert len(used) == 3
    assert own.min() >= starts[1]
    assert own.max() < starts[2]
    assert batch["pool"][2 * STEPS :].nonzero()[:, 1].min() >= starts[3]


def test_all_takes_each_token_of_the_boxes_once_and_in_order(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items, targets="all")
    assert set(batch["pool"].unique().tolist()) == {0.0, 1.0}
    at = 0
    for row, ((sample, _), (first, rows, columns)) in enumerate(zip(items, picture_rows(batch), strict=True)):
        wanted = [first + int(t) for box in sample.boxes for t in tokens_in_box(box, rows, columns)]
        assert batch["latent_at"][row].sum() == len(wanted)
        assert batch["pool"][at : at + len(wanted)].argmax(1).tolist() == wanted
        at += len(wanted)


def test_all_is_cut_at_its_limit(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items, targets="all", max_targets=2)
    assert batch["latent_at"].sum(1).max() == 2


def test_a_sample_without_boxes_looks_at_its_whole_picture(checkpoint: Checkpoint, items: list[Item]) -> None:
    sample, pictures = items[0]
    batch = batch_of(checkpoint, [(replace(sample, boxes=()), pictures)])
    assert (batch["pool"].sum(0) > 0).all()


@pytest.mark.parametrize("token", ["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>", "<|image_pad|>"])
def test_an_answer_with_a_token_of_the_loop_is_refused_by_its_sample(checkpoint: Checkpoint, token: str) -> None:
    examples = Examples.of_samples([Sample("good", (), "q", "a"), Sample("bad", (), "q", f"a {token}")])
    with pytest.raises(DataError, match="sample bad: its answer contains a token"):
        check_answers(examples, checkpoint)


# ----------------------------------------------------------------------------------------------------------- the loss


BOTH = pytest.mark.parametrize("inputs", ["teacher", "free"])


class Watched(LatentSFT):
    """Keeps what its last pass fed (B, S, H) and the hidden states that came out (B, S, H)."""

    fed: torch.Tensor
    hidden: torch.Tensor
    detached = False  # feed latents that no gradient goes through

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        out = super().forward(**batch)
        self.fed, self.hidden = (torch.cat(part, 1) for part in zip(*self.parts, strict=True))
        return out

    def _states(self, embeds: torch.Tensor, batch: dict[str, torch.Tensor], span: slice, cache: Any = None) -> torch.Tensor:
        if self.detached and batch["latent_at"][:, span].all():
            embeds = embeds.detach()
        hidden = super()._states(embeds, batch, span, cache)
        self.parts.append((embeds, hidden))
        return hidden


def sft_of(model: Any, checkpoint: Checkpoint, **settings: Any) -> Watched:
    core = model if hasattr(model, "get_base_model") else SimpleNamespace(get_base_model=lambda: model)
    return Watched(core, checkpoint.tokens.image, replace(SETTINGS.latent, **settings))


def by_hand(model: Any, checkpoint: Checkpoint, item: Item, inputs: str = "teacher") -> tuple[float, float, int]:
    """Cross-entropy and regression of one sample, position by position and without a cache, and how many tokens were spoken."""
    sample, _ = item
    batch = batch_of(checkpoint, [item])
    ids, latent = batch["ids"][0].tolist(), checkpoint.tokens.lvr
    fed: list[torch.Tensor] = []

    def states() -> torch.Tensor:
        positions = batch["positions"][:, :, : len(fed)]
        return model.model.language_model(inputs_embeds=torch.stack(fed)[None], position_ids=positions).last_hidden_state[0]

    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(batch["pixel_values"], batch["grid_thw"]).pooler_output))
        ((_, rows, columns),) = picture_rows(batch)
        groups = [w.nonzero().flatten() for w in batch["pool"]]
        assert len(groups) == STEPS
        assert set(torch.cat(groups).tolist()) <= {int(t) for b in sample.boxes for t in tokens_in_box(b, rows, columns)}
        targets = [features[g].mean(0) for g in groups]
        seen, taught = iter(features), iter(targets)
        for token in ids:
            if token == checkpoint.tokens.image:
                fed.append(next(seen))
            elif token == latent:
                fed.append(next(taught) if inputs == "teacher" else states()[-1])
            else:
                fed.append(model.get_input_embeddings().weight[token])
        hidden = states()
        start = ids.index(checkpoint.tokens.lvr_start)
        ce, mse = [], []
        for i in range(start, len(ids)):
            if ids[i] == latent:
                mse.append(float(((hidden[i - 1] - targets[len(mse)]) ** 2).mean()))
            else:
                ce.append(-float(model.lm_head(hidden[i - 1]).log_softmax(-1)[ids[i]]))
    return sum(ce) / len(ce), sum(mse) / len(mse), len(ce)


@BOTH
@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_the_loss_is_cross_entropy_and_weighted_regression(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], weight: float, inputs: str
) -> None:
    ce, mse, _ = by_hand(small_model, checkpoint, items[0], inputs)
    out = sft_of(small_model, checkpoint, weight=weight, inputs=inputs)(**batch_of(checkpoint, items[:1]))
    assert float(out["ce"]) == pytest.approx(ce, rel=1e-4)
    assert float(out["mse"]) == pytest.approx(mse, rel=1e-4)
    assert float(out["loss"]) == pytest.approx(ce + weight * mse, rel=1e-4)


def test_what_the_latents_are_fed_matters(small_model: Any, checkpoint: Checkpoint, items: list[Item]) -> None:
    taught, free = (by_hand(small_model, checkpoint, items[0], inputs) for inputs in ("teacher", "free"))
    assert taught[0] != pytest.approx(free[0], rel=1e-2), "the tests of both would not tell them apart"


@BOTH
def test_a_samples_loss_does_not_hang_on_the_others_of_its_batch(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], inputs: str
) -> None:
    alone = [by_hand(small_model, checkpoint, item, inputs) for item in items[:4]]
    batch = batch_of(checkpoint, items[:4])
    assert (batch["mask"] == 0).any(), "nothing is padded"
    out = sft_of(small_model, checkpoint, inputs=inputs)(**batch)
    spoken = sum(n for _, _, n in alone)
    assert float(out["ce"]) == pytest.approx(sum(ce * n for ce, _, n in alone) / spoken, rel=1e-4)
    assert float(out["mse"]) == pytest.approx(sum(mse for _, mse, _ in alone) / len(alone), rel=1e-4)


@BOTH
def test_a_samples_hidden_states_do_not_hang_on_the_others_of_its_batch(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], inputs: str
) -> None:
    sft = sft_of(small_model, checkpoint, inputs=inputs)
    batch = batch_of(checkpoint, items)
    extents = [extent(batch, row) for row in range(len(items))]
    assert len({int(batch["response"]) - first for first, _ in extents}) > 1, "all prompts are equally long"
    sft(**batch)
    together = sft.hidden
    assert together.isfinite().all(), "what is not finite in padding reaches the rest through gradients"
    for row, (item, (first, end)) in enumerate(zip(items, extents, strict=True)):
        sft(**batch_of(checkpoint, [item]))
        torch.testing.assert_close(together[row, first:end], sft.hidden[0], rtol=1e-4, atol=1e-4)


@BOTH
def test_what_stands_in_padding_changes_nothing(small_model: Any, checkpoint: Checkpoint, items: list[Item], inputs: str) -> None:
    batch = batch_of(checkpoint, items[:2])
    padded = {k: v.clone() for k, v in batch.items()}
    for name, value in (("ids", 7), ("labels", -100), ("mask", 0), ("latent_at", False), ("positions", 3)):
        padded[name] = torch.nn.functional.pad(padded[name], (3, 5), value=value)
    padded["response"] += 3
    losses = [float(sft_of(small_model, checkpoint, inputs=inputs)(**b)["loss"]) for b in (batch, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Forced(TorchRuntime):
    """A runtime whose head says what it is told to, row by row; all rows are in text at the same time, until they are done."""

    def __init__(self, model: Any, checkpoint: Checkpoint, scripts: list[list[int]]) -> None:
        super().__init__(model, replace(checkpoint, latent=LatentSpec(steps=STEPS)))
        self.scripts, self.said = scripts, 0

    def head(self, hidden: np.ndarray) -> np.ndarray:
        said = [script[self.said] for script in self.scripts if len(script) > self.said]
        self.said += 1
        logits = np.zeros_like(super().head(hidden))
        logits[np.arange(len(said)), said] = 1
        return logits


def test_what_is_trained_freely_is_what_the_decode_loop_does(small_model: Any, checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items)
    sft = sft_of(small_model, checkpoint, inputs="free")
    sft(**batch)
    scripts = [row[row != -100].tolist() for row in batch["labels"]]
    scripts = [[t for t in script if t != checkpoint.tokens.lvr_end] for script in scripts]  # the loop closes by itself
    runtime = Forced(small_model, checkpoint, scripts)
    prompts = [prepare_prompt(runtime, pictures, sample.question)[0] for sample, pictures in items]
    results = decode(runtime, prompts, Options(max_tokens=max(map(len, scripts)), keep_hidden=True))
    response = int(batch["response"])
    for row, (result, script) in enumerate(zip(results, scripts, strict=True)):
        assert result.reason == "stop"
        assert result.tokens == script[1:-1], "another answer was fed"
        trained = sft.fed[row, batch["latent_at"][row]]
        assert torch.equal(trained, sft.hidden[row, response : response + STEPS]), "not h0 … h_{K-1}"
        np.testing.assert_allclose(trained, np.stack(result.latents), atol=1e-4, rtol=1e-4)
        _, end = extent(batch, row)  # of every other step too: the prompt's last one, <|lvr_end|> and the answer
        np.testing.assert_allclose(sft.hidden[row, response - 1 : end - 1], np.stack(result.hidden), atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.fixture
def tuned(checkpoint: Checkpoint) -> Any:
    """The 4-bit model with fresh adapters that were moved a little, so that they do something."""
    return moved(adapted(nf4.load_nf4(checkpoint, torch.float32), checkpoint, SETTINGS))


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@BOTH
def test_only_adapters_and_three_token_rows_get_gradients(tuned: Any, checkpoint: Checkpoint, items: list[Item], inputs: str) -> None:
    tuned.train()
    sft_of(tuned, checkpoint, inputs=inputs)(**batch_of(checkpoint, items[:2]))["loss"].backward()
    with_gradient = {n: p for n, p in tuned.named_parameters() if p.grad is not None}
    rows = {n: p for n, p in with_gradient.items() if "trainable_tokens" in n}
    adapters = {n for n in with_gradient if "lora_" in n}
    assert set(with_gradient) == set(rows) | adapters
    assert not [n for n in with_gradient if "visual" in n]
    layers = tuned.get_base_model().config.text_config.num_hidden_layers
    assert len(adapters) == layers * 7 * 2  # q, k, v, o, gate, up, down; A and B
    assert all(float(p.grad.abs().sum()) > 0 for p in with_gradient.values())
    assert {p.shape for p in rows.values()} == {(3, tuned.get_base_model().config.text_config.hidden_size)}
    assert all((p.grad.abs().sum(1) > 0).all() for p in rows.values()), "one of the three rows is not trained"


def test_the_answers_loss_trains_the_adapters_through_free_latents(tuned: Any, checkpoint: Checkpoint, items: list[Item]) -> None:
    """λ = 0. What goes through the latents is told from what goes around them by detaching them; both together are the loss's slope."""
    tuned.train()
    batch, sft = batch_of(checkpoint, items[:2]), sft_of(tuned, checkpoint, inputs="free", weight=0.0)
    names, trained = zip(*((n, p) for n, p in tuned.named_parameters() if p.requires_grad), strict=True)
    loss = sft(**batch)["loss"]
    latents = [fed for fed, _ in sft.parts[1 : 1 + STEPS]]
    for gradient in torch.autograd.grad(loss, latents, retain_graph=True):
        assert (gradient.abs().sum((1, 2)) > 0).all(), "a latent that the answer does not hang on"
    total = torch.autograd.grad(loss, trained)
    sft.detached = True
    around = torch.autograd.grad(sft(**batch)["loss"], trained, materialize_grads=True)
    through = [a - b for a, b in zip(total, around, strict=True)]
    assert all(float(g.norm()) > 1e-3 * float(t.norm()) for n, g, t in zip(names, through, total, strict=True) if "lora_" in n)

    length = float(torch.cat([g.flatten() for g in through]).norm())
    direction = [g / length for g in through]
    losses = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for parameter, along in zip(trained, direction, strict=True):
                parameter.add_(along, alpha=step)
            losses.append(float(sft(**batch)["loss"]))
    slope = (losses[0] - losses[1]) / 2e-3
    by_total, by_around = (float(sum((g * d).sum() for g, d in zip(gs, direction, strict=True))) for gs in (total, around))
    assert slope == pytest.approx(by_total, rel=0.02)
    assert slope != pytest.approx(by_around, rel=0.1)


def test_an_optimizer_step_leaves_every_other_embedding_row_as_it_was(tuned: Any, checkpoint: Checkpoint, items: list[Item]) -> None:
    tuned.train()
    core = tuned.get_base_model()
    every = torch.arange(core.config.text_config.vocab_size)
    before = core.get_input_embeddings()(every).detach().clone()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    sft_of(tuned, checkpoint)(**batch_of(checkpoint, items[:2]))["loss"].backward()
    optimizer.step()
    changed = (core.get_input_embeddings()(every) != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted((checkpoint.tokens.lvr_start, checkpoint.tokens.lvr, checkpoint.tokens.lvr_end))


def test_markers_begin_as_the_tokens_that_open_and_close_a_prompt(checkpoint: Checkpoint) -> None:
    base = nf4.load_nf4(checkpoint, torch.float32)
    model = adapted(base, checkpoint, SETTINGS).get_base_model()
    ids = [checkpoint.tokenizer.token_to_id(t) for t in ("<|vision_start|>", "<|image_pad|>")]
    closing = checkpoint.tokenizer.encode("<|im_start|>assistant").ids[-1]
    markers = [checkpoint.tokens.lvr_start, checkpoint.tokens.lvr, checkpoint.tokens.lvr_end]
    embed = model.get_input_embeddings()
    torch.testing.assert_close(embed(torch.tensor(markers)), embed(torch.tensor([*ids, closing])))


def test_a_marker_row_is_trained_as_an_output_too(tuned: Any, checkpoint: Checkpoint) -> None:
    """The head shares the embedding's weights: what is learned about a marker must show in its logit."""
    core = tuned.get_base_model()
    hidden = torch.randn(1, core.config.text_config.hidden_size)
    before = core.lm_head(hidden).detach().clone()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(1.0)
    changed = (core.lm_head(hidden) != before)[0].nonzero().flatten().tolist()
    assert changed == sorted((checkpoint.tokens.lvr_start, checkpoint.tokens.lvr, checkpoint.tokens.lvr_end))


def test_linears_of_the_language_model_are_in_4_bits_and_nothing_else(checkpoint: Checkpoint) -> None:
    import bitsandbytes as bnb

    model = nf4.load_nf4(checkpoint, torch.float32)
    four_bit = [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(four_bit) == 2 * 7
    assert all("language_model" in name for name in four_bit)
    plain = nf4.load_plain(checkpoint)
    for part in ("model.visual", "model.language_model.embed_tokens", "lm_head"):
        for (name, mine), (_, theirs) in zip(
            model.get_submodule(part).named_parameters(), plain.get_submodule(part).named_parameters(), strict=True
        ):
            assert torch.equal(mine, theirs), f"{part}.{name} is not as in the checkpoint"


def test_a_skip_list_that_matches_nothing_is_noticed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.family, "KEEP_UNQUANTIZED", ["visual"])  # transformers ignores it in silence (docs/decisions.md)
    with pytest.raises(BundleError, match="4-bit loading went wrong"):
        nf4.load_nf4(checkpoint, torch.float32)


def test_a_linear_that_stayed_in_full_precision_is_noticed(checkpoint: Checkpoint) -> None:
    with pytest.raises(BundleError, match="4-bit loading went wrong"):
        nf4.check_quantized(nf4.load_plain(checkpoint), checkpoint)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items[:2])
    found = []
    for on in (False, True):
        settings = replace(SETTINGS, train=replace(SETTINGS.train, gradient_checkpointing=on))
        model = moved(adapted(nf4.load_nf4(checkpoint, torch.float32), checkpoint, settings)).train()
        assert model.get_base_model().is_gradient_checkpointing is on
        loss = sft_of(model, checkpoint)(**batch)["loss"]
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (saving, others) = found
    assert saving == pytest.approx(plain, rel=1e-5)
    assert set(gradients) == set(others)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ saved and read


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tuned model in memory, and the folder that it was saved to."""
    model = moved(adapted(nf4.load_nf4(checkpoint, torch.float32), checkpoint, SETTINGS)).eval()
    folder = tmp_path_factory.mktemp("tuned") / "out"
    _write_side_files(folder, checkpoint, LatentSpec(steps=STEPS), SETTINGS)
    model.save_pretrained(str(folder), safe_serialization=True)
    return model, folder


def hidden_states(model: Any, checkpoint: Checkpoint, items: Sequence[Item]) -> tuple[list[list[int]], np.ndarray]:
    runtime = TorchRuntime(model, replace(checkpoint, latent=LatentSpec(steps=STEPS)))
    prompts = [prepare_prompt(runtime, pictures, sample.question)[0] for sample, pictures in items]
    results = decode(runtime, prompts, Options(max_tokens=4, min_tokens=4, keep_hidden=True))
    return [r.tokens for r in results], np.concatenate([np.stack(r.hidden) for r in results])


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_a_tuned_checkpoint_reads_back_as_it_was_trained(saved: tuple[Any, Path], checkpoint: Checkpoint, items: list[Item]) -> None:
    model, folder = saved
    again = nf4.load_trained(read_checkpoint(folder), torch.float32)
    (tokens, want), (same, got) = (hidden_states(m, checkpoint, items[:3]) for m in (model, again))
    assert same == tokens
    assert relative(got, want) < 1e-5
    _, untuned = hidden_states(nf4.load_nf4(checkpoint, torch.float32), checkpoint, items[:3])
    assert untuned.shape != want.shape or relative(untuned, want) > 1e-2, "the adapter does nothing, so nothing was tested"


def test_merging_keeps_what_was_trained(saved: tuple[Any, Path], checkpoint: Checkpoint, items: list[Item]) -> None:
    model, folder = saved
    merged = nf4.load_merged(read_checkpoint(folder))
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not [n for n, _ in merged.named_modules() if "lora" in n]
    (tokens, want), (same, got) = (hidden_states(m, checkpoint, items[:3]) for m in (model, merged))
    assert same == tokens
    assert relative(got, want) < 1e-3


def test_merging_keeps_the_marker_rows_in_embedding_and_head(saved: tuple[Any, Path], checkpoint: Checkpoint) -> None:
    model, folder = saved
    merged, core = nf4.load_merged(read_checkpoint(folder)), model.get_base_model()
    markers = torch.tensor([checkpoint.tokens.lvr_start, checkpoint.tokens.lvr, checkpoint.tokens.lvr_end])
    torch.testing.assert_close(merged.get_input_embeddings()(markers), core.get_input_embeddings()(markers))
    hidden = torch.randn(2, core.config.text_config.hidden_size)
    torch.testing.assert_close(merged.lm_head(hidden), core.lm_head(hidden), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_model_is_refused_by_name(saved: tuple[Any, Path], tmp_path: Path) -> None:
    import shutil

    _, folder = saved
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    from safetensors.torch import load_file, save_file

    weights = {n: t[..., : t.shape[-1] // 2].contiguous() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, other / "adapter_model.safetensors")
    with pytest.raises(BundleError, match=f"{other}: the adapter does not fit its base"):
        nf4.load_trained(read_checkpoint(other), torch.float32)


def test_a_loss_of_random_weights_is_about_that_of_guessing(checkpoint: Checkpoint, items: list[Item]) -> None:
    """The scale of the loss: a uniform guess over the vocabulary costs its logarithm."""
    from lvr_lite.tiny import build

    model = build.make_model(build.make_tokenizer(), seed=1).eval()
    ce = float(sft_of(model, checkpoint)(**batch_of(checkpoint, items[:4]))["ce"])
    assert ce == pytest.approx(math.log(checkpoint.config["text_config"]["vocab_size"]), rel=0.1)


def test_pictures_of_a_file_are_opened_when_they_are_asked_for(tmp_path: Path) -> None:
    examples = Examples.of_samples([Sample("a", (tmp_path / "a.png",), "q", "a"), Sample("b", (tmp_path / "b.png",), "q", "a")])
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "b.png")
    assert len(examples) == 2
    assert examples[1][1][0].getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(DataError, match=r"a\.png: no such picture"):
        examples[0]
