"""A model's graph: from the cache, or traced anew; where there is a second core in a process of its
own, while this one loads what plans it."""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cost_models.fleet import Hardware, load_any
from ir import errors
from ir.errors import PlanError
from ir.graph import Graph
from planner.options import Progress, Timing, TraceOptions
from planner.plan import write_whole
from planner.twin import Later, beside, forks
from planner.workload import precision_of

SOLVERS = "ortools.linear_solver.pywraplp", "ortools.math_opt.python.mathopt"


class Clock:
    """Wall seconds of the parts, each since the last mark."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.took(part, now - self.last)

    def took(self, part: str, seconds: float) -> None:
        """Of the time since the last mark so much was for this."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds
        self.last += seconds

    def timing(self) -> Timing:
        return Timing(**self.parts, total_s=time.perf_counter() - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A traced graph as text. import_s: of the seconds that took, those of loading torch."""

    text: str
    import_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault of the user's that ended a trace in a second process. stack: where, as text."""

    kind: str
    what: str
    where: str
    why: str
    hints: tuple[str, ...]
    stack: str

    @classmethod
    def of(cls, fault: PlanError) -> Fault:
        kind = next(c.__name__ for c in type(fault).__mro__ if c.__module__ == errors.__name__)
        return cls(
            kind=kind, what=fault.what, where=fault.where, why=fault.why, hints=fault.hints,
            stack="".join(traceback.format_exception(fault)),
        )  # fmt: skip

    def meet(self) -> PlanError:
        """The same, to be raised here."""
        fault: PlanError = getattr(errors, self.kind)(
            self.what, where=self.where, why=self.why, hints=self.hints
        )
        fault.there = self.stack
        return fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A trace that was begun in a second process. clock: since then."""

    key: str
    later: Later[Traced | Fault]
    clock: Clock


@contextmanager
def begun(options: TraceOptions, hardware: Hardware) -> Iterator[Begun | None]:
    """A trace in a second process, for `capture`, which is ended at the end; None where the cache
    may have the graph, where no process may be forked, or where torch is here already."""
    later: Later[Traced | Fault] | None = None
    one: Begun | None = None
    if _alone() and forks() and not options.base:  # which says the precision, once it is read
        try:
            key, precision = _key(options, hardware)
        except (PlanError, OSError):  # told by `capture`, after what is wrong before it
            key = ""
        if key and not (options.cache and _path(key).exists()):
            clock = Clock()
            later = Later(partial(_told, options, precision))
            one = Begun(key=key, later=later, clock=clock)
    try:
        yield one
    finally:
        if later is not None:
            later.end()


def capture(
    options: TraceOptions,
    hardware: Hardware | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
    ahead: Begun | None = None,
) -> Graph:
    """The model's graph: from the cache if nothing it depends on changed, else traced, unless that
    was begun already."""
    from ir.text import parse_graph

    clock = clock or Clock()
    key, precision = _key(options, hardware or load_any(options.hardware))
    path = _path(key)
    if options.cache and path.exists():
        graph = parse_graph(path.read_text(encoding="utf-8"))
        clock.mark("trace_s")
        return graph
    if progress:
        progress("tracing")
    made = _awaited(ahead, options.model) if ahead is not None and ahead.key == key else None
    if isinstance(made, Fault):
        raise made.meet()
    if made is None:
        made = _traced(options, precision)
    clock.took("import_s", made.import_s)
    if options.cache:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, made.text)
        except OSError as fault:  # a cache that cannot be written costs time, not the plan
            if progress:
                progress(f"the graph is not cached: {fault}")
    graph = parse_graph(made.text)  # what a later command reads is what was planned
    clock.mark("trace_s")
    return graph


def _alone() -> bool:
    """Whether this process has no threads, which a fork leaves out, and torch is not loaded."""
    return threading.active_count() == 1 and "torch" not in sys.modules


def _awaited(ahead: Begun, model: str) -> Traced | Fault | None:
    """What the second process traced; None where it has no answer. Until then this one loads what
    the search will need."""
    with _uncollected():
        for name in SOLVERS:
            importlib.import_module(name)
    found = ahead.later.answer()
    if ahead.later.ended is not None:
        _require_killed(model, ahead.later.ended)
    return found


def _require_killed(model: str, ended: int) -> None:
    """Go on where the process that traced was killed, as the system does where memory is short: it
    may be traced here. What else ended it would end this process too, without a word."""
    from planner.console import say

    if ended == -signal.SIGINT:
        raise KeyboardInterrupt
    if ended == -signal.SIGKILL:
        say(f"the process that traced {model} was killed (out of memory?): it is traced again")
        return
    how = f"with exit status {ended}" if ended >= 0 else f"by {signal.Signals(-ended).name}"
    raise PlanError(
        f"{model} ended the interpreter that traced it, {how}",
        why="its code, or what that imports, called os._exit"
        if ended >= 0 else "a crash in what it imports, or a signal that was sent",
        hints=("an exception is told with its line",) if ended >= 0 else
              ("PYTHONFAULTHANDLER=1 says where a crash was",),
    )  # fmt: skip


def _told(options: TraceOptions, precision: str) -> Traced | Fault:
    """In a second process: a fault of the user's is told, another is for the first to meet."""
    try:
        return _traced(options, precision)
    except PlanError as fault:
        return Fault.of(fault)


def _traced(options: TraceOptions, precision: str) -> Traced:
    """Trace the model here."""
    from ir.text import format_graph

    start, first = time.perf_counter(), "torch" not in sys.modules
    with _uncollected(), _aside():
        import ir.capture.export  # noqa: F401  (torch, timed apart from what we do with it)

        import_s = time.perf_counter() - start
        from ir.capture import capture_graph
        from ir.capture.load import load as load_model

        source = load_model(options.model, dict(options.args))
        if first:  # what is loaded by now stays, and is not walked through again
            gc.freeze()
        graph = capture_graph(
            source, precision=precision, fold=options.fold, beside=beside
        )
    return Traced(text=format_graph(graph), import_s=import_s)


@contextmanager
def _aside() -> Iterator[None]:
    """However the user's code prints, stdout is the result's alone: it goes to stderr."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # nobody has stdout
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without searches for cycles: torch's modules are a million objects that all stay, and are
    walked through again and again while they load.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _key(options: TraceOptions, hardware: Hardware) -> tuple[str, str]:
    """What the graph depends on, in one word; and the precision that it is traced in."""
    from ir.capture.load import source_key

    precision, _ = precision_of(options.asked, hardware)
    source = source_key(options.model, dict(options.args))
    key = f"{source} {precision} {options.fold} {_own_digest()}"
    return hashlib.sha256(key.encode()).hexdigest()[:32], precision


def _path(key: str) -> Path:
    """Where the cache has a graph."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "meshwright" / f"{key}.graph"


def _own_digest() -> str:
    """The text of the IR's own code: another version may make another graph."""
    import ir

    digest = hashlib.sha256()
    for path in sorted(Path(str(ir.__file__)).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


__all__ = ["Begun", "Clock", "begun", "capture"]
