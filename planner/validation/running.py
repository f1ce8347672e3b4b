"""Runs predicted on a few processes: what each comes to, in the order of the file.

Runs of one model are one job, traced once. A run that cannot be predicted is kept with the reason;
one fault ends nothing but its own run.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from ir.errors import PlanError
from planner.options import Progress
from planner.validation.configure import Case, configure
from planner.validation.rows import Run, Skipped

if TYPE_CHECKING:
    from planner.validation.predict import Prediction

MOST_PROCESSES = 8  # each holds torch and a graph, some 700 MB
FROM_RATE = "measured time = our count of FLOPs at the printed rate"
RUNS_A_PROCESS = 6  # fewer are quicker here than in a process that imports torch again


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run beside its prediction. Measured values are None where the source has none.

    classes: (dimension, class) pairs. subject: the model and the GPUs, equal where runs may be
    ranked; configuration: what differs among them; workload: equal where a planner could choose
    between them. words: the layout, for people.
    """

    id: str
    words: str
    predicted_s: float
    measured_s: float | None
    tokens: int
    breakdown_s: tuple[tuple[str, float], ...]
    predicted_bytes: int
    measured_bytes: float | None
    capacity_bytes: int
    oom: bool
    classes: tuple[tuple[str, str], ...]
    defaults: tuple[str, ...]
    subject: str
    workload: str
    configuration: str

    @property
    def error(self) -> float | None:
        """Of the step time, relative to the measurement; positive where predicted too long."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A run that was not predicted, and why."""

    id: str
    reason: str


Outcome = Row | LeftOut


def predict_runs(
    runs: Sequence[Run], report: Progress | None = None, processes: int | None = None
) -> list[Outcome]:
    """What each run comes to, in order. processes: at most so many (default: one a core)."""
    found: dict[int, Outcome] = {}
    cases: dict[int, Case] = {}
    seen: set[str] = set()
    for i, run in enumerate(runs):
        if run.id in seen:
            found[i] = LeftOut(id=run.id, reason="its id is that of an earlier row")
            continue
        seen.add(run.id)
        made = _guarded(run.id, _configured, run)
        if isinstance(made, Case):
            cases[i] = made
        else:
            found[i] = made
    for i, outcome in _outcomes(_jobs(cases), processes):
        found[i] = outcome
        if report:
            report(f"{len(found)} of {len(runs)} runs")
    return [found[i] for i in range(len(runs))]


# --- one run ------------------------------------------------------------------------------------


def _configured(run: Run) -> Case:
    case = configure(run)
    if run.step_time_s is not None and not (0 < run.step_time_s < math.inf):
        raise Skipped(f"its measured time, {run.step_time_s} s, is no time")
    return case


def _predicted(case: Case) -> Row:
    from planner.validation.predict import predict, prepare

    prepared = prepare(case)
    return row_of(prepared.case, predict(prepared))


def _guarded(name: str, step: Any, argument: Any) -> Any:
    """What a step gives, or the run left out with what it raised."""
    try:
        return step(argument)
    except Skipped as reason:
        return LeftOut(id=name, reason=str(reason))
    except PlanError as fault:
        return LeftOut(id=name, reason=f"{fault.what}{': ' if fault.why else ''}{fault.why}")
    except (KeyError, TypeError, ValueError) as fault:
        words = f"{type(fault).__name__}: {fault}"
        return LeftOut(id=name, reason=f"a field is missing or of another form ({words})")
    except Exception as fault:  # ours: said with the run, the others are still predicted
        return LeftOut(id=name, reason=f"internal: {type(fault).__name__}: {fault}")


def row_of(case: Case, prediction: Prediction) -> Row:
    """A prediction with its classes, and with what it may be ranked against."""
    run, d = case.run, case.decisions
    estimate = prediction.estimate
    args = dict(case.args)
    device = case.cluster.spec.rpartition("x")[0]
    workload = f"seq {args.pop('seq_len')} batch {case.workload.global_batch}"
    args.pop("flash", None)
    args.pop("further", None)
    derived = prediction.measured_s is not None and run.step_time_s is None
    defaults = (*case.defaults, *([FROM_RATE] if derived else []))
    return Row(
        id=run.id, words=words_of(case, device), predicted_s=prediction.step_time_s,
        measured_s=prediction.measured_s, tokens=estimate.tokens,
        breakdown_s=tuple((name, ps / 1e12) for name, ps in estimate.breakdown_ps),
        predicted_bytes=prediction.peak_bytes, measured_bytes=prediction.measured_bytes,
        capacity_bytes=prediction.capacity_bytes, oom=prediction.oom,
        classes=classes_of(case, device), defaults=defaults,
        subject=f"{device} {estimate.gpus} {sorted(args.items())}", workload=workload,
        configuration=f"{workload} {case.workload.precision} {case.engine} {d} {case.recompute}"
        f" {case.cluster.inter} {case.workload.expert_imbalance}",
    )  # fmt: skip


def classes_of(case: Case, device: str) -> tuple[tuple[str, str], ...]:
    """(dimension, class) of a run: what its errors are told apart by."""
    run = case.run
    classes = [("model", "moe" if run.is_moe else "dense")]
    if run.model.get("hybrid"):
        classes.append(("model", "hybrid"))
    family = re.sub(r"-\d+gb$", "", device).upper()
    stated = "unstated" if case.recompute == "unstated" else "stated"
    return (
        *classes, ("hardware", family), ("framework", case.engine.name),
        ("precision", case.workload.precision), ("recompute", f"recompute {stated}"),
    )  # fmt: skip


def words_of(case: Case, device: str) -> str:
    """A run in a few words: what is trained where, and how it is laid out."""
    d = case.decisions
    degrees = (("tp", d.tp), ("pp", d.pp), ("cp", d.cp), ("ep", d.ep))
    name = str(case.run.model.get("name") or "a model")
    layout = " ".join(f"{axis}{n}" for axis, n in degrees if n > 1)
    return f"{name} {device}x{case.cluster.count} {layout}".strip()


# --- processes ----------------------------------------------------------------------------------

Job = list[tuple[int, Case]]


def _jobs(cases: dict[int, Case]) -> list[Job]:
    """Runs that share a graph together; those of most runs first."""
    groups: dict[object, Job] = {}
    for i, case in cases.items():
        groups.setdefault((case.args, case.workload.precision), []).append((i, case))
    return sorted(groups.values(), key=lambda job: -len(job))


def _outcomes(jobs: list[Job], processes: int | None) -> Iterator[tuple[int, Outcome]]:
    """Each run's outcome, as it comes."""
    runs = sum(map(len, jobs))
    most = min(processes or os.cpu_count() or 1, MOST_PROCESSES, runs // RUNS_A_PROCESS)
    if most > 1:
        yield from _spread(jobs, most)
        return
    for job in jobs:
        for i, case in job:
            yield i, _guarded(case.run.id, _predicted, case)


def _spread(jobs: list[Job], processes: int) -> Iterator[tuple[int, Outcome]]:
    """Jobs over processes, the next one to whichever is free."""
    waiting = list(reversed(jobs))
    with _pool(min(processes, len(jobs))) as free:
        busy: dict[Connection, Job] = {}
        while waiting or busy:
            while waiting and free:
                line = free.pop()
                busy[line] = waiting.pop()
                with _alive(busy[line]):
                    line.send(busy[line])
            ready = wait(list(busy))
            for line in [line for line in busy if line in ready]:
                with _alive(busy[line]):
                    i, outcome = line.recv()
                if outcome is None:
                    del busy[line]
                    free.append(line)
                else:
                    yield i, outcome


@contextmanager
def _alive(job: Job) -> Iterator[None]:
    """Talk to the process that has a job. Raises PlanError where it is gone."""
    try:
        yield
    except (EOFError, OSError):
        ids = ", ".join(case.run.id for _, case in job[:3])
        raise PlanError(f"the process that predicted {ids} ended",
                        why="was memory short?") from None  # fmt: skip


@contextmanager
def _pool(count: int) -> Iterator[list[Connection]]:
    """Lines to that many fresh processes, which end with the block, and with this process."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    started: list[Any] = []
    lines: list[Connection] = []
    with _interrupts_ignored():  # inherited: Ctrl-C is this process's to answer
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            lines.append(ours)
    try:
        yield lines
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(line: Connection) -> None:
    """Predict the jobs that come, an outcome at a time; (-1, None) ends each job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):  # whoever asked is gone
        while True:
            job: Job = line.recv()
            for i, case in job:
                line.send((i, _guarded(case.run.id, _predicted, case)))
            line.send((-1, None))
