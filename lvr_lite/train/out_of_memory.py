"""What a run says when memory is used up: how much there was, and the first setting to lower.

May import: torch and what stands above `train`; `run_folder`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lvr_lite.config import Settings
from lvr_lite.errors import LvrError
from lvr_lite.system import is_out_of_memory, memory_gib, peak_rss_mb
from lvr_lite.train.run_folder import last_whole_checkpoint

GIB = 2**30
# Below these, a setting gives little memory, or a model that is worth little.
SMALLEST_PICTURE = 64 * 28 * 28
LOWEST_RANK = 4
FEWEST_STEPS = 1


@dataclass(frozen=True)
class Advice:
    """A setting to lower.

    flags: what to add to the command.
    resumes: whether a run may go on with it; else it is for a new one.
    """

    flags: str
    resumes: bool


@contextlib.contextmanager
def told_in_one_line(
    out: Path, settings: Settings, max_pixels: int, device: str, stage: int
) -> Iterator[None]:
    """A block that trains. Raises LvrError where its memory is used up, and where another of the
    processes that train together has ended.

    max_pixels: of pictures, where the settings name none.
    device: "cpu", or a card as torch names it.
    stage: 1 for `finetune`, 2 for `grpo`.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            advice = first_to_lower(settings, settings.max_pixels or max_pixels, stage)
            if "DataLoader worker" in str(error):
                advice = Advice("--set train.workers=0", resumes=True)
            raise LvrError(_line(out, advice, device)) from error
        if isinstance(error, RuntimeError) and _is_of_another_process(error):
            raise LvrError(
                "another process of this run has ended; what it said stands above"
            ) from error
        raise


def first_to_lower(settings: Settings, max_pixels: int, stage: int) -> Advice | None:
    """The first setting that is not yet at its lowest, what costs least first; None where all
    are.

    Arguments as those of `told_in_one_line`.
    """
    train = settings.train
    grpo = settings.grpo
    if stage == 2 and grpo.rows > 1:
        return Advice(f"--set grpo.rows={grpo.rows // 2}", resumes=True)
    if stage == 1 and train.batch > 1:
        samples = train.batch * train.accumulation
        smaller = max(n for n in range(1, train.batch) if samples % n == 0)
        flags = f"--set train.batch={smaller} --set train.accumulation={samples // smaller}"
        return Advice(flags, resumes=True)
    if not train.gradient_checkpointing:
        return Advice("--set train.gradient_checkpointing=true", resumes=True)
    if stage == 2 and grpo.group > 2:
        return Advice(f"--set grpo.group={max(2, grpo.group // 2)}", resumes=False)
    if stage == 2 and grpo.max_tokens > 1:
        return Advice(f"--set grpo.max_tokens={grpo.max_tokens // 2}", resumes=False)
    if max_pixels > SMALLEST_PICTURE:
        return Advice(f"--set max_pixels={max(SMALLEST_PICTURE, max_pixels // 2)}", resumes=False)
    # Stage 2 trains the adapter and the latent loop of its checkpoint.
    if stage == 1 and settings.lora.rank > LOWEST_RANK:
        return Advice(f"--set lora.rank={settings.lora.rank // 2}", resumes=False)
    if stage == 1 and settings.latent.steps > FEWEST_STEPS:
        return Advice(f"--set latent.steps={settings.latent.steps // 2}", resumes=False)
    return None


def _line(out: Path, advice: Advice | None, device: str) -> str:
    last = last_whole_checkpoint(out)
    saved = "" if last is None else f"; {last} is whole"
    if advice is None:
        return f"out of memory: {_used(device)}; it needs a larger one{saved}"
    lower = f"lower it with {advice.flags}"
    if last is not None and advice.resumes:
        lower = f"go on with --resume {advice.flags}"
    elif last is not None:
        saved += ", and --resume goes on from it where there is more memory"
    return f"out of memory: {_used(device)}; {lower}{saved}"


def _used(device: str) -> str:
    """The peak, and the size of the card or of the machine's memory."""
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        peak = torch.cuda.max_memory_allocated(device) / GIB
        return f"{peak:.1f} GiB were taken of the {card.total_memory / GIB:.1f} GiB of {card.name}"
    total, _ = memory_gib()
    machine = "this machine" if total is None else f"this machine's {total:.1f} GiB"
    peak_mb = peak_rss_mb()
    return machine if peak_mb is None else f"{peak_mb / 1024:.1f} GiB were taken of {machine}"


def _is_of_another_process(error: RuntimeError) -> bool:
    """Whether a collective failed because its other side is gone."""
    if "WORLD_SIZE" not in os.environ:
        return False
    is_distributed = isinstance(error, torch.distributed.DistError)
    return is_distributed or "gloo" in str(error) or "onnection closed by peer" in str(error)
