"""A disk that fills up at a random byte while a command writes: one line, the earlier result whole,
and once there is space again the command succeeds.

python -m lvr_lite.bench.experiments.disk_full --out build/disk-full --tries 50

Each job's folder is a small file system in memory (tmpfs), which needs root; elsewhere it says so
and measures nothing. A file of ballast leaves a random part of what the command needs.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lvr_lite.bench.experiments import victims
from lvr_lite.bench.experiments.runner import Out, Page, launch, publish, table, write_results
from lvr_lite.bench.experiments.victims import Job

TITLES = (
    "command", "tries", "disk full", "had room", "one line, exit code 1", "earlier result whole",
    "succeeds with space again",
)  # fmt: skip
# Of the file system, in bytes: what the largest job needs, several times.
SIZE = 512 << 20
BALLAST = "ballast"
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Tally:
    """What full disks did to one command; full: tries in which the disk was too small.

    needed: bytes that an undisturbed run takes at most.
    """

    command: str
    needed: int = 0
    tries: int = 0
    full: int = 0
    fitted: int = 0
    in_one_line: int = 0
    whole: int = 0
    recovered: int = 0
    faults: list[str] = field(default_factory=list)

    def row(self) -> list[object]:
        own = [self.command, self.tries, self.full, self.fitted]
        return [*own, self.in_one_line, self.whole, self.recovered]


def main(
    out: Out,
    tries: int = 50,
    seed: int = 0,
    only: str | None = None,
    page: Page = None,
) -> None:
    random.seed(seed)
    began = time.time()
    victims.import_all()
    materials = victims.make_materials(out / "materials")
    jobs = victims.jobs(materials, out / "work")
    tallies = []
    for name in (only or ",".join(jobs)).split(","):
        with _small_disk(jobs[name].folder):
            tallies.append(_fill(jobs[name], tries))
    minutes = (time.time() - began) / 60
    name = f"disk-full-{only.replace(',', '-')}.json" if only else "disk-full.json"
    write_results(out / name, {"seed": seed, "minutes": minutes, "commands": tallies})
    text = table(TITLES, [tally.row() for tally in tallies])
    print(f"{text}\n{minutes:.0f} min, seed {seed}")
    publish(text, page, "disk full")
    if faults := [fault for tally in tallies for fault in tally.faults]:
        raise SystemExit("\n".join(faults))


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of SIZE bytes at `folder`. Raises SystemExit where none may be mounted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"skipped: no file system may be mounted here ({done.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(job: Job, tries: int) -> Tally:
    tally = Tally(job.name)
    job.begin(-2)
    before = _used(job.folder)
    tally.needed = _peak_of(job) - before
    print(f"{job.name}: needs {tally.needed / 1e6:.2f} MB", flush=True)
    for number in range(tries):
        job.begin(number)
        earlier = job.state()
        _leave(job.folder, int(random.random() * tally.needed))
        tally.tries += 1
        ended = victims.run(job, job.arguments(number))
        if fault := _fault(job, ended, earlier, tally):
            tally.faults.append(f"{job.name}, try {number}: {fault}")
        (job.folder / BALLAST).unlink()
        if ended.code:
            _with_space(job, number, tally)
    return tally


def _used(folder: Path) -> int:
    return shutil.disk_usage(folder).used


def _peak_of(job: Job) -> int:
    """Bytes on the disk while a command runs, at most."""
    child = victims.start(job.arguments(-2), job.log)
    peak = 0
    while (code := victims.wait(child, 0)) is None:
        peak = max(peak, _used(job.folder))
        time.sleep(0.001)
    assert code == 0, job.log.read_text(encoding="utf-8", errors="replace")[-3000:]
    return peak


def _leave(folder: Path, free: int) -> None:
    """Fill a disk up to so many bytes, whole pages as tmpfs counts them."""
    ballast = max(shutil.disk_usage(folder).free - free, 0) // PAGE * PAGE
    with (folder / BALLAST).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(ballast, 1))


def _fault(job: Job, ended: victims.Ended, earlier: object, tally: Tally) -> str | None:
    """Count what a full disk did; what was wrong, in words."""
    if ended.code == 0:
        tally.fitted += 1
        return None
    tally.full += 1
    fault = None
    if ended.code == 1 and ended.error:
        tally.in_one_line += 1
    else:
        fault = f"exit code {ended.code}: {ended.text[-2000:]}"
    try:
        state = job.state()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    # A training and a file of answers may have come further; a bundle is the earlier one.
    kept = state == earlier if isinstance(earlier, str) else int(str(state)) >= int(str(earlier))
    tally.whole += kept
    return fault if kept else f"{earlier} before, {state} after"


def _with_space(job: Job, number: int, tally: Tally) -> None:
    trained = job.name in ("finetune", "grpo")
    if trained and not job.state():
        job.begin(number)
    line = job.arguments(number) if trained and not job.state() else job.going_on(number)
    ended = victims.run(job, line)
    if ended.code == 0:
        tally.recovered += 1
    else:
        tally.faults.append(f"{job.name}, try {number}: with space: {ended.text[-500:]}")


if __name__ == "__main__":
    launch(main, __doc__)
