"""`lvr-lite grpo`: reinforcement learning on a tuned model (arXiv 2509.24251, stage 2; GRPO: arXiv
2402.03300). No boxes are needed, only answers that can be checked. May import: torch, transformers,
peft and the core.

A step: several answers to each question are drawn by the one decode loop, with the latents that the
model finds; each is rewarded, and its advantage is how far that lies above the mean of its
question's answers, in standard deviations. Each answer is then read once more in one teacher-forced
pass, and the choices of the head become more or less likely. The choice to reason is one of them;
latents have no probabilities. With `grpo.latents=recorded` they are constants, those of the drawing
(the paper); with `recomputed` they are found anew on the way, and the gradient goes through them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvr_lite.config import Settings
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError, UsageError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Decoding, Options, Prompt, Result, decode
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.train.batches import Examples, Item, check_samples
from lvr_lite.train.finetune import (
    SMALL,
    arguments,
    begin,
    keep_less,
    load_examples,
    marker,
    train_to_end,
    trainer_class,
    training_device,
    training_dtype,
    write_side_files,
)
from lvr_lite.train.policy import Policy, Rollout, batches_of, readings
from lvr_lite.train.rewards import Answer, Scoring, read_rewards

FLAT = 1e-6  # a standard deviation of rewards below this tells nothing


def advantages(rewards: Sequence[float]) -> list[float]:
    """How far each reward of a group lies above their mean, in standard deviations; all 0 where
    they are equal.
    """
    values = np.array(rewards, np.float64)
    spread = float(values.std())
    return (
        [0.0] * len(values)
        if spread < FLAT
        else [float(v) for v in (values - values.mean()) / spread]
    )


def objective(
    new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip: float
) -> torch.Tensor:
    """The clipped objective (n,) of choices, to be made large; new, old: log-probabilities now and
    when they were drawn (PPO, arXiv 1707.06347).
    """
    ratio = (new - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def divergence(now: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Of each choice (n,), an estimate of KL(now, start) that is never negative, from their
    log-probabilities (Schulman's k3).
    """
    gap = start - now
    return gap.exp() - gap - 1


class Repeated(torch.utils.data.Sampler[int]):
    """Indices in random order, in blocks of one step each, every block `updates` times. What no
    whole block is left for ends the epoch.
    """

    def __init__(self, count: int, block: int, updates: int, seed: int) -> None:
        self._count, self._block, self._updates, self._seed, self._epoch = (
            count,
            block,
            updates,
            seed,
            0,
        )

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count // self._block * self._block * self._updates

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._count)
        for first in range(0, self._count - self._block + 1, self._block):
            for _ in range(self._updates):
                yield from (int(i) for i in order[first : first + self._block])


class Roller:
    """Draws answers with a runtime and rewards them. donors: of a sample with a `pair`, the other
    one (`donors_of`).
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings,
        scoring: Scoring,
        donors: Callable[[Sample], Item | None],
    ) -> None:
        self.runtime, self.settings, self.scoring, self.donors = runtime, settings, scoring, donors

    def __call__(self, items: Sequence[Item], first: int) -> list[Rollout]:
        """`grpo.group` rollouts of each item, those of one after another. first: the number of the
        first one in all of the run, which its random numbers hang on, whatever it is drawn
        beside.
        """
        g = self.settings.grpo
        options = Options(
            max_tokens=g.max_tokens,
            temperature=g.temperature,
            seed=self.settings.train.seed,
            keep_scores=True,
        )
        asked = [
            (sample, prepare_prompt(self.runtime, pictures, sample.question)[0])
            for sample, pictures in items
        ]
        rows = [(sample, prompt) for sample, prompt in asked for _ in range(g.group)]
        found: list[Rollout] = []
        for place in range(0, len(rows), g.rows):
            part = rows[place : place + g.rows]
            draws = range(first + place, first + place + len(part))
            decoding = Decoding(self.runtime, [prompt for _, prompt in part], options, draws=draws)
            for _ in decoding:
                pass
            found += [
                Rollout(*row, result) for row, result in zip(part, decoding.results, strict=True)
            ]
        said = [
            self._with_donor(sample, prompt) if self.scoring.needs_donor else (None, None)
            for sample, prompt in asked
        ]
        for i, group in enumerate(found[k : k + g.group] for k in range(0, len(found), g.group)):
            for rollout in group:
                rollout.rewards = self.scoring(
                    rollout.sample, self._answer(rollout.result, *said[i])
                )
            for rollout, advantage in zip(
                group, advantages([r.rewards["reward"] for r in group]), strict=True
            ):
                rollout.advantage = advantage
        return found

    def _answer(self, result: Result, own: str | None, donor: str | None) -> Answer:
        start = self.runtime.processor.tokens.lvr_start
        before = result.choices.index(start) if start in result.choices else 0
        return Answer(
            self.runtime.processor.text(result.tokens),
            len(result.latents),
            before,
            result.reason == "stop",
            donor,
            own,
        )

    def _with_donor(self, sample: Sample, prompt: Prompt) -> tuple[str | None, str | None]:
        """What is said with a prompt's own latents and with those of its donor, without drawing by
        lot.
        """
        item = self.donors(sample)
        if item is None:
            return None, None
        options = Options(max_tokens=self.settings.grpo.max_tokens)
        other, _ = prepare_prompt(self.runtime, item[1], item[0].question)
        own, donor = decode(self.runtime, [prompt, other], options)
        if not donor.latents:
            return None, None
        (swapped,) = decode(self.runtime, [prompt], options, [np.stack(donor.latents)])
        return self.runtime.processor.text(own.tokens), self.runtime.processor.text(swapped.tokens)


def donors_of(examples: Examples) -> Callable[[Sample], Item | None]:
    """Finds the sample that shares a sample's `pair`, asks the same and is answered otherwise.
    Raises DataError where no pair is one.
    """
    pairs: dict[str, list[int]] = {}
    for i, sample in enumerate(examples.samples):
        if sample.pair is not None:
            pairs.setdefault(sample.pair, []).append(i)

    def other(sample: Sample) -> Item | None:
        for i in pairs.get(sample.pair or "", ()):
            found = examples.samples[i]
            if found.question == sample.question and found.answer != sample.answer:
                return examples[i]
        return None

    if not any(other(examples.samples[group[0]]) for group in pairs.values()):
        raise DataError(
            "grpo.rewards: latent-use needs pairs of samples (`pair`) that ask the same and differ in their answer; none is here"
        )
    return other


def grpo(
    checkpoint: Checkpoint,
    load_trained: Callable[[Checkpoint, torch.dtype, str, int], Any],
    data: str,
    out: Path,
    settings: Settings,
    resume: bool = False,
    accuracy: Callable[[Runtime, Iterable[Item]], float] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Go on with the adapter of a tuned `checkpoint` on `data` into `out`; returns the metrics that
    metrics.json holds.

    load_trained: loads the 4-bit model with its adapter (checkpoint, dtype, device, parameters
    below which it is unpacked); the other arguments and the files as in
    `lvr_lite.train.finetune.finetune`. Raises UsageError for a checkpoint without latents, for a
    step that takes more questions than there are, or where `out` holds another run; LvrError for a
    reward that fails.
    """
    import transformers

    started = time.time()
    if not (checkpoint.adapter and checkpoint.latent.steps):
        raise UsageError(
            f"{checkpoint.folder}: was not tuned with latents; tune it with `lvr-lite finetune` first"
        )
    if settings.data.replay is not None:
        raise UsageError(
            "data.replay is for finetune: stage 2 has no labels to replay; leave it out"
        )
    if settings.train.save_every % settings.grpo.updates:
        raise UsageError(
            f"train.save_every must be a multiple of grpo.updates ({settings.grpo.updates}), so that a run can go on from there"
        )
    scoring = read_rewards(settings.grpo.rewards)
    device = training_device()
    dtype = training_dtype(settings, device)
    begin_from = begin(out, resume, checkpoint)
    # pictures stay as large as the checkpoint was tuned on, unless said otherwise
    max_pixels = settings.max_pixels or checkpoint.processor.image.max_pixels
    settings = replace(settings, max_pixels=max_pixels)
    checkpoint = replace(checkpoint, processor=checkpoint.processor.with_max_pixels(max_pixels))
    train, held_out = load_examples(
        data, replace(settings, latent=replace(settings.latent, samples="all"))
    )
    for examples in (train, held_out):
        check_samples(examples, checkpoint)
    donors = donors_of(train) if scoring.needs_donor else lambda _: None
    unpacked_below = SMALL if device == "cpu" and settings.train.dequantize == "auto" else 0
    model = _trainable(load_trained(checkpoint, dtype, device, unpacked_below))
    if settings.train.gradient_checkpointing:
        keep_less(model)
    g = settings.grpo
    policy = Policy(
        model, checkpoint.processor.tokens, checkpoint.latent, g.temperature, g.latents, g.beta > 0
    )
    write_side_files(out, checkpoint, checkpoint.latent, settings)
    runtime = TorchRuntime(model, checkpoint)
    trainer = _trainer(transformers)(
        model=policy,
        args=arguments(transformers, out, settings, dtype, device),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=list,
        callbacks=[marker(transformers, out, checkpoint, checkpoint.latent, settings)],
    )
    block = settings.train.batch * settings.train.accumulation * trainer.args.world_size
    if len(train) < block:
        raise UsageError(
            f"{data}: {len(train)} samples for training, fewer than the {block} of a step; lower train.batch or train.accumulation"
        )
    trainer.roller, trainer.settings = Roller(runtime, settings, scoring, donors), settings
    trainer.sampler = Repeated(len(train), block, settings.grpo.updates, settings.train.seed)
    if accuracy is not None:
        trainer.answer_accuracy = lambda: accuracy(runtime, held_out.items())
    say(
        f"{g.group} answers to each of {block} questions a step, {g.updates} updates with them; rewards {g.rewards}"
    )
    return train_to_end(trainer, out, settings, begin_from, device, started, say)


def _trainable(model: Any) -> Any:
    """The adapter of a loaded checkpoint made trainable again, without dropout: what is scored must
    be what was drawn.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "trainable_tokens" in name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def _trainer(transformers: Any) -> Any:
    class GrpoTrainer(trainer_class(transformers)):  # type: ignore[misc]
        """A step draws answers, or takes those drawn before, and learns from them; the rest is as
        in fine-tuning.
        """

        roller: Roller
        settings: Settings

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.drawn: list[list[Rollout]] = []
            self.old: dict[
                tuple[int, int], torch.Tensor
            ] = {}  # by batch of a step and part of it: log-probabilities before the first update
            self.calls: int | None = None

        def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            args, updates = self.args, self.settings.grpo.updates
            if self.calls is None:
                self.calls = self.state.global_step * args.gradient_accumulation_steps
            step, slot = divmod(self.calls, args.gradient_accumulation_steps)
            self.calls += 1
            if step % updates == 0:
                self.drawn = self.drawn[:slot]
                self.old = {place: scores for place, scores in self.old.items() if place[0] < slot}
                number = (
                    (step // updates * args.gradient_accumulation_steps + slot) * args.world_size
                    + args.process_index
                ) * len(inputs)
                model.eval()
                with self.compute_loss_context_manager():
                    self.drawn.append(self.roller(inputs, number * self.settings.grpo.group))
                self.note_drawn(self.drawn[slot])
            model.train()
            return self.learn(model, slot)

        def learn(self, model: Any, slot: int) -> torch.Tensor:
            """Gradients of the loss of the rollouts of one batch, which is returned; a few of them
            at once.
            """
            rollouts = self.drawn[slot]
            g, policy = self.settings.grpo, self.model
            learning = [r for r in rollouts if r.advantage or g.beta] or rollouts[
                :1
            ]  # equal rewards teach nothing
            learning.sort(key=lambda r: len(r.prompt.ids) + len(r.result.choices))
            parts = [learning[i : i + g.rows] for i in range(0, len(learning), g.rows)]
            total = torch.zeros((), device=self.args.device)
            for number, part in enumerate(parts):
                made = [
                    (r, readings(r.prompt, r.result, policy.tokens, policy.spec.mode)) for r in part
                ]
                batches = [
                    self._prepare_inputs(batch) for batch in batches_of([rows for _, rows in made])
                ]
                owners = [
                    r
                    for i in (0, 1)
                    for r, rows in made
                    for row in rows[i : i + 1]
                    for _ in row.chosen
                ]
                each = torch.tensor(
                    [1 / len(r.result.choices) for r in owners], device=self.args.device
                )
                advantage = torch.tensor([r.advantage for r in owners], device=self.args.device)
                with nullcontext() if part is parts[-1] else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        new = model(batches)
                        old = self.old.setdefault((slot, number), new.detach())
                        gain = objective(new, old, advantage, g.clip)
                        if g.beta:
                            with torch.no_grad(), policy.at_start():
                                start = model(batches)
                            apart = divergence(new, start)
                            self.note("kl", float(apart.detach().mean()))
                            gain = gain - g.beta * apart
                    loss = -(gain * each).sum() / len(rollouts)
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
                total += loss.detach()
                self.note(
                    "clipped",
                    float((((new.detach() - old).exp() - 1).abs() > g.clip).float().mean()),
                )
            total /= self.current_gradient_accumulation_steps
            return total

        def note(self, name: str, value: float) -> None:
            self.parts.setdefault(name, []).append(value)

        def note_drawn(self, rollouts: list[Rollout]) -> None:
            for name in rollouts[0].rewards:
                self.note(name, float(np.mean([r.rewards[name] for r in rollouts])))
            groups = [
                rollouts[i : i + self.settings.grpo.group]
                for i in range(0, len(rollouts), self.settings.grpo.group)
            ]
            self.note(
                "flat", float(np.mean([not any(r.advantage for r in group) for group in groups]))
            )
            self.note("latents", float(np.mean([bool(r.result.latents) for r in rollouts])))
            self.note("tokens", float(np.mean([len(r.result.tokens) for r in rollouts])))

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """Free-running accuracy on held-out samples; there is no other loss to look at."""
            self.model.eval()
            found = (
                {}
                if self.answer_accuracy is None or not self.is_world_process_zero()
                else {"eval_accuracy": self.answer_accuracy()}
            )
            if found:
                self.log(dict(found))
            self.model.train()
            return found

    return GrpoTrainer
