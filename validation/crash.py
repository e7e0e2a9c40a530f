"""What happens to a run file that is killed, cut, flipped, or that meets a full disk.

    python -m validation crash [--kills N] [--disks N] [--truncated N] [--flipped N] [--seed S]

- kills: a process that writes records and checkpoints is sent SIGKILL at a random moment. Every
  record that it had reported must be there, with the value that it had; the file must open, with
  h5py alone too; its last checkpoint must be whole; and what is written after must join on.
- disks: the same with a disk that fills up: a tmpfs of random size where one can be mounted, else a
  limit of the system on the size of a file. The run must end with an error that says so, and
  everything reported must be there.
- truncated, flipped: a finished or killed file that loses its end, or a bit. It must be read right
  or refused; what can be recovered of it must be right.

Exits with 1 where anything was lost, did not open, or was read wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from hyperlearn.certificate import Certificate
from hyperlearn.runs import RecordError, RunFile, RunFileError, load_run
from hyperlearn.runs.state import last_checkpoint

EVERY = 37  # records between two checkpoints


@dataclass
class Outcome:
    """What a study has seen.

    Parameters
    ----------
    cases
        How many.
    counts
        Of what, by name; `faults` are those that must not be.
    faults
        In a sentence each.
    """

    name: str
    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        seen = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        lines = [f"{self.name}: {self.cases} cases, {len(self.faults)} faults; {seen}"]
        return "\n".join([*lines, *(f"  FAULT {fault}" for fault in self.faults[:10])])


# --- the run that is disturbed ----------------------------------------------------------------


def value_at(step: int) -> float:
    """The loss that is recorded at a step: known to whoever reads it."""
    return math.sin(1.0 + step)


def record_at(step: int) -> tuple[dict[str, float | int], Certificate | None]:
    """Record and certificate of a step; now and then a metric more, or a longer text."""
    record: dict[str, float | int] = {
        "step": step, "seconds": 0.25 * step, "oracle_calls": 3 * step, "loss": value_at(step),
    }  # fmt: skip
    if step >= 60:
        record["late"] = 2 * step
    if step % 3 == 0:
        return record, None
    reason = "because " * (1 + step // 40)
    certificate = Certificate(
        0.5, 1e-9, None, True, False, step, f"operator {step}", "CG", reason, gradient_norm=1.0
    )
    return record, certificate


def state_at(step: int) -> dict[str, Any]:
    """A checkpoint: some small, some of half a megabyte."""
    size = 60_000 if step % 2 else 100
    # By numpy: torch's threads do not survive a fork.
    return {"x": torch.from_numpy(np.full(size, float(step))), "n": step}


def write(path: Path, steps: int, report: Callable[[int], None], start: int | None = None) -> None:
    """Record so many steps, reporting each when it is in the file; a checkpoint every few."""
    if start is not None:
        opened = RunFile.reopened(path, start, {"kind": "crash"})
    else:
        settings: dict[str, Any] = {"config": {"kind": "crash"}, "environment": {"seed": 0}}
        opened = RunFile(path, **settings, state=state_at(0))
    with opened as file:
        begin = start or 0
        for step in range(begin, steps):
            if step > begin and step % EVERY == 0:
                file.checkpoint(step, state_at(step), keep=1 + step % 2)
            file.append(*record_at(step))
            report(step)
        file.finish("finished", "", {"x": torch.arange(4.0)})


def right(history: Any, certificates: Any) -> int:
    """Number of records, if each is what was written.

    Raises
    ------
    AssertionError
        One is not.
    """
    steps = history.get("step", np.empty(0, int))
    assert np.array_equal(steps, np.arange(len(steps))), f"steps {steps}"
    if len(steps):
        expected = [value_at(step) for step in range(len(steps))]
        assert np.array_equal(history["loss"], expected), "the loss"
        if "late" in history:
            late = history["late"]
            assert np.isnan(late[:60]).all(), "late, before it was there"
            assert np.array_equal(late[60:], 2.0 * steps[60:]), "late"
    for step, iterations, operator in zip(
        *(certificates.get(name, ()) for name in ("step", "iterations", "operator")), strict=True
    ):
        assert step == iterations, "a certificate"
        assert operator == f"operator {step}", "its text"
    return len(steps)


def check_whole(path: Path, reported: int, outcome: Outcome, where: str) -> None:
    """Everything reported is there; the file opens; the last checkpoint is whole."""
    try:
        with h5py.File(path, "r") as file:
            plain = int(file["records/history"][()])
            if plain:
                assert file["history/loss"][plain - 1] == value_at(plain - 1), "with h5py alone"
        run = load_run(path)
        found = right(run.history, run.certificates)
        if run.checkpoints:
            state, step, lengths = last_checkpoint(path)
            assert state["n"] == step, "the checkpoint"
            assert bool((state["x"] == step).all()), "the checkpoint's tensor"
            assert lengths["history"] == step, "the checkpoint's place"
        outcome.counts["records reported"] += reported
        outcome.counts["records lost"] += max(0, reported - found)
        if found < reported:
            outcome.faults.append(f"{where}: {reported} records were reported, {found} are there")
    except (OSError, RunFileError, AssertionError, KeyError) as error:
        outcome.faults.append(f"{where}: {type(error).__name__}: {error}")


# --- the disturbances -------------------------------------------------------------------------


def kills(count: int, seed: int = 0, steps: int = 1500, folder: Path | None = None) -> Outcome:
    """SIGKILL at random moments, of a process that does nothing but write."""
    outcome = Outcome("SIGKILL")
    random_moment = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "run.h5"
        started = time.perf_counter()
        _disturbed(path, steps, None)
        whole = time.perf_counter() - started
        for case in range(count):
            for old in Path(name).iterdir():
                old.unlink()
            moment = random_moment.uniform(0.0, whole)
            reported, died = _disturbed(path, steps, moment)
            outcome.cases += 1
            outcome.counts["killed while writing" if died else "already finished"] += 1
            if not path.exists():
                outcome.counts["before the file was there"] += 1
                if reported:
                    outcome.faults.append(f"kill {case}: {reported} reported and no file")
                continue
            check_whole(path, reported, outcome, f"kill {case} after {moment:.3f} s")
            if died and case % 5 == 0:
                _go_on(path, outcome, f"kill {case}")
    return outcome


def _disturbed(path: Path, steps: int, moment: float | None) -> tuple[int, bool]:
    """Write in a process of its own; records that it reported, and whether it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        torch.set_num_threads(1)
        code = 1
        try:
            write(path, steps, lambda step: os.write(writer, struct.pack("<q", step)) and None)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    received = b""
    deadline = math.inf if moment is None else time.perf_counter() + moment
    os.set_blocking(reader, False)
    died = False
    while True:
        try:
            part = os.read(reader, 1 << 16)
            if not part:
                break
            received += part
        except BlockingIOError:
            if time.perf_counter() < deadline:
                time.sleep(0.0002)
        if not died and time.perf_counter() >= deadline:
            os.kill(child, signal.SIGKILL)
            died = True
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    return len(received) // 8, died and os.WIFSIGNALED(status)


def _go_on(path: Path, outcome: Outcome, where: str) -> None:
    """Resume a killed run from its checkpoint, to its end."""
    try:
        _, step, _ = last_checkpoint(path)
        write(path, step + 50, lambda step: None, start=step)
        run = load_run(path)
        if right(run.history, run.certificates) != step + 50 or run.status != "finished":
            outcome.faults.append(f"{where}: resumed, {run!r}")
        outcome.counts["resumed"] += 1
    except (OSError, RunFileError, AssertionError) as error:
        outcome.faults.append(f"{where}: resuming: {type(error).__name__}: {error}")


def full_disks(count: int, seed: int = 0, steps: int = 1500) -> Outcome:
    """A disk that is full at some moment of a run."""
    outcome = Outcome("full disk")
    sizes = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        mountable = _mounted(Path(name), 1 << 20)
        if mountable:
            subprocess.run(["umount", name], check=True)
        for case in range(count):
            # From less than an empty run to more than a whole one.
            size = int(2 ** sizes.uniform(12, 21))
            outcome.cases += 1
            if mountable and case % 2 == 0:
                outcome.counts["on a small tmpfs"] += 1
                _mounted(Path(name), size)
                try:
                    _fill(Path(name), case, steps, None, outcome)
                finally:
                    subprocess.run(["umount", name], check=True)
            else:
                outcome.counts["under a limit on the file"] += 1
                _fill(Path(name), case, steps, size, outcome)
                for old in Path(name).iterdir():
                    old.unlink()
    return outcome


def _mounted(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _fill(folder: Path, case: int, steps: int, limit: int | None, outcome: Outcome) -> None:
    path = folder / "run.h5"
    reported = 0

    def report(step: int) -> None:
        nonlocal reported
        reported = step + 1

    try:
        with _limited(limit):
            write(path, steps, report)
        outcome.counts["had room for all"] += 1
    except RecordError:
        outcome.counts["ended by a record"] += 1
    except OSError:
        outcome.counts["ended by another write"] += 1
    except BaseException as error:
        outcome.faults.append(f"disk {case}: {type(error).__name__}: {error}")
    if path.exists():
        check_whole(path, reported, outcome, f"disk {case}")
    elif reported:
        outcome.faults.append(f"disk {case}: {reported} reported and no file")
    left = [old.name for old in folder.iterdir() if old.suffix == ".part"]
    if left:
        outcome.faults.append(f"disk {case}: {left} left behind")


@contextlib.contextmanager
def _limited(size: int | None) -> Iterator[None]:
    """No file may grow beyond `size`: the system's own refusal, in the middle of a write."""
    if size is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def damaged(count: int, kind: str, seed: int = 0, steps: int = 700) -> Outcome:
    """Files that have lost their end (``truncated``) or a bit (``flipped``)."""
    outcome = Outcome(kind)
    places = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        finished, killed = Path(name) / "finished.h5", Path(name) / "killed.h5"
        write(finished, steps, lambda step: None)
        with contextlib.suppress(_Enough):
            write(killed, steps, _enough_after(steps - 20))
        for case in range(count):
            source = finished if case % 2 == 0 else killed
            path = Path(name) / "damaged.h5"
            shutil.copyfile(source, path)
            size = path.stat().st_size
            place = places.randrange(size)
            with path.open("r+b") as raw:
                if kind == "truncated":
                    raw.truncate(place)
                else:
                    raw.seek(place)
                    byte = raw.read(1)[0]
                    raw.seek(place)
                    raw.write(bytes([byte ^ (1 << places.randrange(8))]))
            outcome.cases += 1
            _look(path, source, outcome, f"{kind} {case} at {place} of {size}")
    return outcome


class _Enough(Exception):
    pass


def _enough_after(steps: int) -> Callable[[int], None]:
    def report(step: int) -> None:
        if step >= steps:
            raise _Enough

    return report


def _look(path: Path, source: Path, outcome: Outcome, where: str) -> None:
    whole = load_run(source)
    records = len(whole.history["step"])
    try:
        run = load_run(path)
        found = right(run.history, run.certificates)
        if run.config != whole.config or run.environment != whole.environment:
            outcome.faults.append(f"{where}: settings were read wrong")
        x = run.result.get("x")
        if whole.x is not None and not (x is not None and torch.equal(x, whole.x)):
            outcome.faults.append(f"{where}: the result was read wrong")
        if run.checkpoints:
            state, step, _ = last_checkpoint(path)
            if not bool((state["x"] == step).all()):
                outcome.faults.append(f"{where}: a checkpoint was read wrong")
        if found != records:
            outcome.faults.append(f"{where}: {found} of {records} records, and no word")
        outcome.counts["read right"] += 1
        return
    except AssertionError as error:
        outcome.faults.append(f"{where}: read wrong: {error}")
        return
    except (RunFileError, MemoryError) as error:
        outcome.counts["refused"] += 1
        recovered = getattr(error, "recovered", None)
    except BaseException as error:
        outcome.faults.append(f"{where}: {type(error).__name__}: {error}")
        return
    if recovered is None:
        from hyperlearn.runs.recovery import recovered as salvage

        recovered = salvage(path)
    if recovered is None:
        outcome.counts["nothing to recover"] += 1
        return
    try:
        found = right(recovered.history, recovered.certificates)
        outcome.counts["recovered in part"] += 1
        outcome.counts["records recovered"] += found
        outcome.counts["of records"] += records
    except AssertionError as error:
        outcome.faults.append(f"{where}: recovered wrong: {error}")


def main(arguments: list[str] | None = None) -> bool:
    """Entry point; whether there was no fault."""
    parser = argparse.ArgumentParser(
        prog="python -m validation crash",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=50)
    parser.add_argument("--truncated", type=int, default=20)
    parser.add_argument("--flipped", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    outcomes = [
        kills(options.kills, options.seed),
        full_disks(options.disks, options.seed),
        damaged(options.truncated, "truncated", options.seed),
        damaged(options.flipped, "flipped", options.seed),
    ]
    for outcome in outcomes:
        print(outcome, flush=True)
    return not any(outcome.faults for outcome in outcomes)


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
