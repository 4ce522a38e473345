"""kill -9 at random moments, a run after each: does anything broken stay, is anything lost?

python -m lvr_lite.bench.experiments.kill --out build/kill --kills 200

Three kills in four come after a random part of what the command usually takes. One in four is
aimed at saving: it waits for the first sign of it (a checkpoint that is not whole yet, the manifest
of the bundle to come, the first answers) and a random moment more. Two processes, with --only
finetune,grpo and --only export,quantize,eval, share two cores.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field

from lvr_lite.bench.experiments import victims
from lvr_lite.bench.experiments.runner import Out, Page, launch, publish, table, write_results
from lvr_lite.bench.experiments.victims import SAVE_EVERY, STEPS, Job
from lvr_lite.train.run_folder import COMPLETE

TRAININGS = ("finetune", "grpo")
PHASES = ("nothing written", "half written", "done")
TITLES = (
    "command", "kills", "aimed at saving", "in the last 5 %", "nothing written yet", "half written",
    "done", "lost at most", "broken or missing", "run after failed",
)  # fmt: skip
# What one process in four is given after the first sign of saving: seconds of a training, of the
# others a part of their usual time.
AIMED_SECONDS = 0.05
AIMED_SHARE = 0.25


@dataclass
class Tally:
    """What the kills of one command did.

    lost: steps of a training or answers that were there and are no more, at most.
    phases: where the kills came: "nothing written", "half written" or "done".
    faults: what must not have happened, in words.
    """

    command: str
    kills: int = 0
    ended: int = 0
    aimed: int = 0
    late: int = 0
    lost: int = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    broken: int = 0
    failed: int = 0
    faults: list[str] = field(default_factory=list)

    def row(self) -> list[object]:
        phases = [self.phases[name] for name in PHASES]
        unit = {"eval": " answers", "finetune": " steps", "grpo": " steps"}.get(self.command)
        lost = f"{self.lost}{unit}" if unit else "–"
        own = [self.command, self.kills, self.aimed, self.late, *phases, lost]
        return [*own, self.broken, self.failed]


def main(
    out: Out,
    kills: int = 200,
    seed: int = 0,
    only: str | None = None,
    page: Page = None,
) -> None:
    random.seed(seed)
    began = time.time()
    victims.import_all()
    materials = victims.make_materials(out / "materials")
    jobs = victims.jobs(materials, out / "work")
    tallies = [_kill(jobs[name], kills) for name in (only or ",".join(jobs)).split(",")]
    minutes = (time.time() - began) / 60
    name = f"kill-{only.replace(',', '-')}.json" if only else "kill.json"
    write_results(out / name, {"seed": seed, "minutes": minutes, "commands": tallies})
    text = table(TITLES, [tally.row() for tally in tallies])
    print(f"{text}\n{minutes:.0f} min, seed {seed}; trainings save every {SAVE_EVERY} steps")
    publish(text, page, "kills")
    if faults := [fault for tally in tallies for fault in tally.faults]:
        raise SystemExit("\n".join(faults))


def _kill(job: Job, kills: int) -> Tally:
    """Kill one command so often."""
    tally = Tally(job.name)
    usual = [_undisturbed(job, number) for number in (-3, -2)]
    number = 0
    while tally.kills < kills:
        job.begin(number)
        before = job.state()
        again = job.name in TRAININGS and number % 2 == 1 and before
        line = job.going_on(number) if again else job.arguments(number)
        if not _killed(job, line, statistics.median(usual), tally):
            tally.ended += 1
        elif not _judged(job, number, before, tally, usual):
            job.begin(0)
        number += 1
        if number % 20 == 0:
            print(
                f"{job.name}: {tally.kills} kills, usually {statistics.median(usual):.1f} s",
                flush=True,
            )
    return tally


def _undisturbed(job: Job, number: int) -> float:
    """Seconds of a run that nobody disturbs."""
    job.begin(number)
    return victims.must_end_well(job, job.arguments(number)).seconds


def _killed(job: Job, line: list[str], usual: float, tally: Tally) -> bool:
    """Start a command and kill it; False where it had ended by itself."""
    aimed = random.random() < 0.25
    began = time.monotonic()
    child = victims.start(line, job.log)
    if aimed:
        over = _await_saving(job, child, usual * 3)
        longest = AIMED_SECONDS if job.name in TRAININGS else AIMED_SHARE * usual
    else:
        over = False
        longest = usual
    if over or victims.wait(child, random.uniform(0, longest)) is not None:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tally.kills += 1
    tally.aimed += aimed
    tally.late += time.monotonic() - began > 0.95 * usual
    return True


def _await_saving(job: Job, child: int, seconds: float) -> bool:
    """Wait for the first sign of saving; True where the command ended before. A random number of
    such signs of a training is let pass.
    """
    until = time.monotonic() + seconds
    left = random.randrange(STEPS // SAVE_EVERY) if job.name in TRAININGS else 0
    seen = False
    while time.monotonic() < until:
        if victims.wait(child, 0) is not None:
            return True
        now = job.late()
        left -= seen and not now
        if now and left <= 0:
            break
        seen = now
        time.sleep(0.001)
    return False


def _judged(job: Job, number: int, before: object, tally: Tally, usual: list[float]) -> bool:
    """Note what a kill left, and what the run after it makes of that; False after a fault."""
    try:
        after = job.state()
    except Exception as error:  # noqa: BLE001
        tally.broken += 1
        tally.faults.append(f"{job.name}, try {number}: {type(error).__name__}: {error}")
        return False
    tally.phases[_phase(job, before, after)] += 1
    fault = _lost(job, before, after, tally)
    ended = None
    if not fault:
        goes_on = job.name not in TRAININGS or after
        if not goes_on:
            job.begin(number)
        ended = victims.run(job, job.going_on(number) if goes_on else job.arguments(number))
        fault = _fault_of_run_after(job, number, ended.code, ended.text)
        tally.failed += bool(fault)
    if fault:
        tally.faults.append(f"{job.name}, try {number}: {fault}")
        return False
    if ended and job.name not in TRAININGS:
        # What the machine does beside this changes over an hour.
        usual[:] = [*usual[-6:], ended.seconds]
    return True


def _phase(job: Job, before: object, after: object) -> str:
    if job.name in TRAININGS:
        done = (job.target / COMPLETE).is_file()
        begun = job.target.exists()
    elif job.name == "eval":
        done = after == victims.ANSWERS
        begun = after != before
    else:
        done = after != before
        # The lock's file alone is nothing yet.
        begun = any(not name.endswith(".lock") for name in job.beside)
    return "done" if done else "half written" if begun else "nothing written"


def _lost(job: Job, before: object, after: object, tally: Tally) -> str | None:
    """What was lost though it must not be, in words."""
    if job.name in TRAININGS:
        lost = max(job.reached() - int(str(after)), 0)
        tally.lost = max(tally.lost, lost)
        if lost > SAVE_EVERY or int(str(after)) < int(str(before)):
            return f"reached step {job.reached()}, and {after} is kept; {before} before"
    elif job.name == "eval":
        lost = int(str(before)) - int(str(after))
        tally.lost = max(tally.lost, lost)
        if lost > 0:
            return f"{before} answers before, and {after} after"
    return None


def _fault_of_run_after(job: Job, number: int, code: int, text: str) -> str | None:
    if code != 0:
        return f"the run after ended with {code}: {text[-500:]}"
    state = job.state()
    if job.name in TRAININGS and state != STEPS:
        return f"the run after ended at step {state}"
    if job.name == "eval" and state != victims.ANSWERS:
        return f"the run after left {state} answers"
    if job.name in ("export", "quantize") and state != _wanted(job, number):
        return f"the run after left {state}"
    return f"left beside the target: {job.beside}" if job.beside else None


def _wanted(job: Job, number: int) -> str:
    if job.name == "export":
        return f"fp32 {victims.SIZES[number % 2]}"
    precision = ("int8", "fp16")[number % 2]
    return f"{precision} {str(job.state()).split()[1]}"


if __name__ == "__main__":
    launch(main, __doc__)
