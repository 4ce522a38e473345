"""`lvr-lite grpo`: reinforcement learning on a tuned model (stage 2).

arXiv 2509.24251, section 3; GRPO: arXiv 2402.03300. No boxes are needed, only answers that can be
checked. May import: torch and what stands above `train`; this folder.

A step: several answers to each question are drawn by the one decode loop, with the latents that the
model finds. Each is rewarded, and its advantage is how far its reward lies above the mean of its
question's answers, in standard deviations. Each answer is then read once more in one teacher-forced
pass, and the choices of the head become more or less likely. The choice to reason is one of them;
latents have no probabilities. With `grpo.latents=recorded` they are constants from the drawing (the
paper); with `recomputed` they are computed again on the way, and the gradient goes through them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvr_lite.config import GrpoSettings, Settings
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item, Source
from lvr_lite.data.validate import check_samples, special_tokens
from lvr_lite.errors import DataError, NotFiniteError, UsageError
from lvr_lite.export.weights import check_names
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Decoding, Options, Prompt, Result, decode
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.train.device import training_device, training_dtype
from lvr_lite.train.examples import load_examples
from lvr_lite.train.load import kept_tokens, load_to_reinforce
from lvr_lite.train.out_of_memory import told_in_one_line
from lvr_lite.train.policy import Policy, Reading, Replay, Rollout, batches_of, readings
from lvr_lite.train.rewards import Answer, Scoring, read_rewards
from lvr_lite.train.run_folder import (
    begin_writing,
    check_resumed,
    is_first_process,
    origin_of,
    resume_point,
    run_folder,
)
from lvr_lite.train.trainer import LatentTrainer, Run

# A standard deviation of rewards below this tells nothing.
FLAT = 1e-6


def advantages(rewards: Sequence[float]) -> list[float]:
    """How far each reward of a group lies above their mean, in standard deviations; all 0 where
    they are equal.

    Raises NotFiniteError where the rewards are so large that this is no finite number.
    """
    values = np.array(rewards, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        spread = float(values.std())
    if not np.isfinite(spread):
        raise NotFiniteError(f"the spread of the rewards is {spread}: they are too large")
    if spread < FLAT:
        return [0.0] * len(values)
    return [float(value) for value in (values - values.mean()) / spread]


def objective(
    new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip: float
) -> torch.Tensor:
    """The clipped objective (n,) of choices, to be made large (PPO, arXiv 1707.06347).

    new, old: log-probabilities (n,) now and when they were drawn.
    """
    ratio = (new - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def divergence(now: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Of each choice (n,), an estimate of KL(now, start) that is never negative, from their
    log-probabilities (Schulman's k3)."""
    gap = start - now
    return gap.exp() - gap - 1


class Repeated(torch.utils.data.Sampler[int]):
    """Indices in random order, in blocks of one step each, every block `updates` times. Indices
    after the last full block are dropped, and the epoch ends."""

    def __init__(self, count: int, block: int, updates: int, seed: int) -> None:
        self._count = count
        self._block = block
        self._updates = updates
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count // self._block * self._block * self._updates

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._count)
        for first in range(0, self._count - self._block + 1, self._block):
            for _ in range(self._updates):
                yield from (int(i) for i in order[first : first + self._block])


class Donors:
    """Finds the sample that shares a sample's `pair`, asks the same and is answered otherwise.

    Raises DataError where no pair of the source is one.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pairs: dict[str, list[int]] = {}
        for i, sample in enumerate(source.samples):
            if sample.pair is not None:
                self._pairs.setdefault(sample.pair, []).append(i)
        firsts = (source.samples[group[0]] for group in self._pairs.values())
        if not any(self.donor_of(sample) for sample in firsts):
            raise DataError(
                "grpo.rewards: latent-use needs pairs of samples (`pair`) that ask the same and "
                "differ in their answer; none is here"
            )

    def donor_of(self, sample: Sample) -> Item | None:
        for i in self._pairs.get(sample.pair or "", ()):
            other = self._source.samples[i]
            if other.question == sample.question and other.answer != sample.answer:
                return self._source[i]
        return None


class Roller:
    """Draws answers with a runtime and rewards them.

    donors: where a reward asks for donors' latents; else None.
    """

    def __init__(
        self, runtime: Runtime, settings: Settings, scoring: Scoring, donors: Donors | None
    ) -> None:
        self.runtime = runtime
        self.settings = settings
        self.scoring = scoring
        self.donors = donors

    def __call__(self, items: Sequence[Item], first: int) -> list[Rollout]:
        """`grpo.group` rollouts of each item, those of one after another.

        first: the number of the first rollout in all of the run. Its random numbers depend on that
            alone, whatever it is drawn beside.
        """
        group = self.settings.grpo.group
        prompts = [
            prepare_prompt(self.runtime, pictures, sample.question)[0] for sample, pictures in items
        ]
        rollouts: list[Rollout] = []
        for (sample, _), prompt in zip(items, prompts, strict=True):
            rollouts += [Rollout(sample, prompt, Result()) for _ in range(group)]
        self._draw(rollouts, first)
        for number, ((sample, _), prompt) in enumerate(zip(items, prompts, strict=True)):
            own, donated = self._answers_with_donor(sample, prompt)
            answers = rollouts[number * group : (number + 1) * group]
            for rollout in answers:
                answer = self._answer(rollout.result, own, donated)
                rollout.rewards = self.scoring(sample, answer)
            rewards = [rollout.rewards["reward"] for rollout in answers]
            for rollout, advantage in zip(answers, advantages(rewards), strict=True):
                rollout.advantage = advantage
        return rollouts

    def _draw(self, rollouts: list[Rollout], first: int) -> None:
        """Decode rollouts, `grpo.rows` at once."""
        grpo = self.settings.grpo
        options = Options(
            max_tokens=grpo.max_tokens,
            temperature=grpo.temperature,
            seed=self.settings.train.seed,
        )
        for start in range(0, len(rollouts), grpo.rows):
            rows = rollouts[start : start + grpo.rows]
            draws = range(first + start, first + start + len(rows))
            decoding = Decoding(self.runtime, [row.prompt for row in rows], options, draws=draws)
            for _ in decoding:
                pass
            for row, result in zip(rows, decoding.results, strict=True):
                row.result = result

    def _answer(self, result: Result, own: str | None, donated: str | None) -> Answer:
        start = self.runtime.processor.tokens.lvr_start
        return Answer(
            text=self.runtime.processor.text(result.tokens),
            latents=len(result.latents),
            before=result.choices.index(start) if start in result.choices else 0,
            ended=result.reason == "stop",
            donor=donated,
            own=own,
        )

    def _answers_with_donor(self, sample: Sample, prompt: Prompt) -> tuple[str | None, str | None]:
        """The greedy answers to a prompt with its own latents and with those of its donor; None
        where there is no donor, or it is not looked for."""
        item = self.donors.donor_of(sample) if self.donors is not None else None
        if item is None:
            return None, None
        options = Options(max_tokens=self.settings.grpo.max_tokens)
        donor_sample, pictures = item
        donor_prompt, _ = prepare_prompt(self.runtime, pictures, donor_sample.question)
        own, donor = decode(self.runtime, [prompt, donor_prompt], options)
        if not donor.latents:
            return None, None
        (swapped,) = decode(self.runtime, [prompt], options, [np.stack(donor.latents)])
        text = self.runtime.processor.text
        return text(own.tokens), text(swapped.tokens)


@dataclass(frozen=True)
class Learned:
    """What some rollouts teach.

    loss: (), summed over them.
    scores: (n,), log-probabilities of their choices, without gradients.
    clipped: (), the share of choices whose probability has moved beyond `grpo.clip`.
    apart: (), the mean divergence from the policy at the start; None where it is not asked for.
    """

    loss: torch.Tensor
    scores: torch.Tensor
    clipped: torch.Tensor
    apart: torch.Tensor | None


def learn_from(
    model: torch.nn.Module,
    policy: Policy,
    rollouts: Sequence[Rollout],
    batches: Sequence[Replay],
    grpo: GrpoSettings,
    old: torch.Tensor | None,
) -> Learned:
    """The loss of some rollouts.

    model: the policy, or what a library has put around it.
    batches: of `readings_of` the rollouts, on the model's device.
    old: log-probabilities (n,) when they were drawn; None where they are those of now.
    """
    rows = readings_of(policy, rollouts)
    # First the choices of all first readings, then those of all second ones (`batches_of`).
    owners = [
        rollout
        for reading in (0, 1)
        for rollout, of_rollout in zip(rollouts, rows, strict=True)
        for row in of_rollout[reading : reading + 1]
        for _ in row.chosen
    ]
    device = batches[0]["ids"].device
    each = torch.tensor([1 / len(r.result.choices) for r in owners], device=device)
    advantage = torch.tensor([r.advantage for r in owners], device=device)
    new = model(batches)
    scores = new.detach()
    old = scores if old is None else old
    gain = objective(new, old, advantage, grpo.clip)
    apart = None
    if grpo.beta:
        with torch.no_grad(), policy.at_start():
            start = model(batches)
        divergences = divergence(new, start)
        gain = gain - grpo.beta * divergences
        apart = divergences.detach().mean()
    ratio = (scores - old).exp()
    clipped = ((ratio - 1).abs() > grpo.clip).float().mean()
    return Learned(-(gain * each).sum(), scores, clipped, apart)


def readings_of(policy: Policy, rollouts: Sequence[Rollout]) -> list[list[Reading]]:
    """What was read for each of some rollouts."""
    tokens = policy.tokens
    mode = policy.spec.mode
    return [readings(rollout.prompt, rollout.result, tokens, mode) for rollout in rollouts]


class GrpoTrainer(LatentTrainer):
    """A step draws answers, or takes those drawn before, and learns from them; the rest is as in
    stage 1."""

    def __init__(self, run: Run, roller: Roller, policy: Policy, **kwargs: Any) -> None:
        super().__init__(run, policy, roller.runtime, collator=list, **kwargs)
        self.roller = roller
        # The rollouts of each batch of a step; none where numbers were not finite.
        self.drawn: list[list[Rollout]] = []
        # Log-probabilities before the first update, by batch of a step and part of it.
        self.old: dict[tuple[int, int], torch.Tensor] = {}
        self.calls: int | None = None

    def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        batches_a_step = self.args.gradient_accumulation_steps
        updates = self.run.settings.grpo.updates
        if self.calls is None:
            self.calls = self.state.global_step * batches_a_step
        step, slot = divmod(self.calls, batches_a_step)
        self.calls += 1
        if step % updates == 0:
            self.drawn = self.drawn[:slot]
            self.old = {place: scores for place, scores in self.old.items() if place[0] < slot}
            batch_number = step // updates * batches_a_step + slot
            first = (batch_number * self.args.world_size + self.args.process_index) * len(inputs)
            model.eval()
            self.drawn.append(self.draw(inputs, first * self.run.settings.grpo.group))
        model.train()
        if not self.drawn[slot]:
            self.step.add([sample.id for sample, _ in inputs], is_finite=False)
            return torch.full((), torch.nan, device=self.args.device)
        loss = self.learn(model, slot)
        names = [rollout.sample.id for rollout in self.drawn[slot]]
        self.step.add(list(dict.fromkeys(names)), is_finite=bool(torch.isfinite(loss)))
        return loss

    def draw(self, items: Sequence[Item], first: int) -> list[Rollout]:
        """The rewarded rollouts of a batch; none where logits, rewards or advantages are not finite
        in this process or in another one. All processes then leave the step out together: they wait
        for each other in its backward pass.

        first: as `Roller` takes it.
        """
        rollouts: list[Rollout] = []
        try:
            with self.compute_loss_context_manager():
                rollouts = self.roller(items, first)
        except NotFiniteError as error:
            self.lines.tell(f"step {self.state.global_step + 1}: {error}")
        (failed,) = self.agreed(int(not rollouts))
        if failed:
            return []
        self.note_drawn(rollouts)
        return rollouts

    def learn(self, model: Any, slot: int) -> torch.Tensor:
        """Gradients of the loss of one batch's rollouts, `grpo.rows` at once; returns the loss."""
        rollouts = self.drawn[slot]
        grpo = self.run.settings.grpo
        # Equal rewards teach nothing; without any other, one rollout keeps all processes in step.
        learning = [r for r in rollouts if r.advantage or grpo.beta] or rollouts[:1]
        learning.sort(key=lambda r: len(r.prompt.ids) + len(r.result.choices))
        parts = [learning[i : i + grpo.rows] for i in range(0, len(learning), grpo.rows)]
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts):
            last = part is parts[-1]
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self._loss(model, part, (slot, number)) / len(rollouts)
                self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            total += loss.detach()
        total /= self.current_gradient_accumulation_steps
        return total

    def _loss(self, model: Any, part: list[Rollout], place: tuple[int, int]) -> torch.Tensor:
        """The loss of some rollouts, summed over them; place: its key in `old`."""
        grpo = self.run.settings.grpo
        policy = self.model
        rows = readings_of(policy, part)
        batches = [self._prepare_inputs(batch) for batch in batches_of(rows)]
        learned = learn_from(model, policy, part, batches, grpo, self.old.get(place))
        self.old.setdefault(place, learned.scores)
        if learned.apart is not None:
            self.note("kl", float(learned.apart))
        self.note("clipped", float(learned.clipped))
        return learned.loss

    def note_drawn(self, rollouts: list[Rollout]) -> None:
        """What the next log line tells of drawn answers: rewards, the share of flat groups, how
        many looked, and how long they are."""
        for name in rollouts[0].rewards:
            self.note(name, float(np.mean([r.rewards[name] for r in rollouts])))
        size = self.run.settings.grpo.group
        groups = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        flat = [not any(r.advantage for r in group) for group in groups]
        self.note("flat", float(np.mean(flat)))
        self.note("latents", float(np.mean([bool(r.result.latents) for r in rollouts])))
        self.note("tokens", float(np.mean([len(r.result.tokens) for r in rollouts])))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Free-running accuracy on held-out samples; there is no other loss to look at."""
        return self.free_running_accuracy()


def grpo(
    checkpoint: Checkpoint,
    data: str,
    out: Path,
    settings: Settings,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Go on with the adapter of a tuned `checkpoint` on `data` into `out`; returns the metrics that
    metrics.json holds. Arguments and files are those of `lvr_lite.train.finetune.finetune`.

    Raises UsageError for a checkpoint without latents, for settings that are for stage 1, for a
    step that takes more questions than there are, or where `out` holds another run; LvrError for a
    reward that fails.
    """
    _refuse_misfits(checkpoint, settings)
    device = training_device()
    max_pixels = checkpoint.processor.image.max_pixels
    with run_folder(out), told_in_one_line(out, settings, max_pixels, device, stage=2):
        return _grpo(checkpoint, data, out, settings, resume, say)


def _grpo(
    checkpoint: Checkpoint,
    data: str,
    out: Path,
    settings: Settings,
    resume: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """`grpo` in a folder that is this run's alone."""
    began = time.time()
    scoring = read_rewards(settings.grpo.rewards)
    device = training_device()
    dtype = training_dtype(settings, device)
    resume_from = resume_point(out, resume, checkpoint)
    # Pictures stay as large as the checkpoint was tuned on, unless the settings say otherwise.
    max_pixels = settings.max_pixels or checkpoint.processor.image.max_pixels
    settings = replace(settings, max_pixels=max_pixels)
    origin = origin_of(data, settings, checkpoint)
    if resume_from is not None:
        check_resumed(resume_from, settings, origin)
    check_names(checkpoint)
    checkpoint = replace(checkpoint, processor=checkpoint.processor.with_max_pixels(max_pixels))
    all_look = replace(settings, latent=replace(settings.latent, samples="all"))
    train, held_out = load_examples(data, all_look)
    tokens = special_tokens(checkpoint.processor)
    check_samples(train, tokens)
    check_samples(held_out, tokens)
    donors = Donors(train) if scoring.needs_donor else None
    model = load_to_reinforce(checkpoint, dtype, device, settings)
    options = settings.grpo
    policy = Policy(
        model,
        checkpoint.processor.tokens,
        checkpoint.latent,
        options.temperature,
        options.latents,
        keep_start=options.beta > 0,
    )
    if is_first_process():
        begin_writing(out, checkpoint, settings, origin)
    run = Run(checkpoint, out, settings, device, dtype, resume_from, began, origin)
    runtime = TorchRuntime(model, checkpoint, kept_tokens(checkpoint, settings))
    roller = Roller(runtime, settings, scoring, donors)
    # Answers are not kept with a checkpoint: a run goes on where new ones are drawn.
    trainer = GrpoTrainer(
        run, roller, policy, train=train, held_out=held_out, steps_to_stop=options.updates
    )
    block = settings.train.batch * settings.train.accumulation * trainer.args.world_size
    if len(train) < block:
        raise UsageError(
            f"{data}: {len(train)} samples for training, fewer than the {block} of a step; "
            "lower train.batch or train.accumulation"
        )
    trainer.sampler = Repeated(len(train), block, options.updates, settings.train.seed)
    say(
        f"{options.group} answers to each of {block} questions a step, {options.updates} updates "
        f"with them; rewards {options.rewards}"
    )
    return trainer.to_end(say)


def _refuse_misfits(checkpoint: Checkpoint, settings: Settings) -> None:
    if not (checkpoint.adapter and checkpoint.latent.steps):
        raise UsageError(
            f"{checkpoint.folder}: was not tuned with latents; "
            "tune it with `lvr-lite finetune` first"
        )
    if settings.data.replay is not None:
        raise UsageError(
            "data.replay is for finetune: stage 2 has no labels to replay; leave it out"
        )
    updates = settings.grpo.updates
    if settings.train.save_every % updates:
        raise UsageError(
            f"train.save_every must be a multiple of grpo.updates ({updates}), "
            "so that a run can go on from there"
        )
