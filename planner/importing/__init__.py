"""`plan import`: an existing configuration as a fully pinned plan, costed as any other.

Files are untrusted: they are read up to a size, nothing in them is run, no other file is opened.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from cost_models.chain import chain_of
from cost_models.engines import engine_names
from cost_models.fleet import Fleet, load_any
from cost_models.forward import forward_of
from ir.errors import InfeasibleError, PlanError, UsageError
from ir.graph import Graph
from planner.classic import classic_places
from planner.decisions import Pins, parse_pins
from planner.export.pinned import pinned
from planner.importing import accelerate, deepspeed, megatron, torchtitan
from planner.importing.origins import contradicted, of_the_file
from planner.importing.settings import Facts, Settings, Setup, steps
from planner.mesh import facts_of
from planner.options import Progress, TraceOptions, TraceResult
from planner.workload import Asked

MOST_BYTES = 1 << 20  # of a configuration: far more than any has


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An engine whose files are read. pinned: its list of real settings, by the file's name."""

    parse: Callable[[str, str], Settings]
    precision: Callable[[Settings], str]
    decide: Callable[[Settings, Facts], Setup]
    pinned: Callable[[str], str]


SOURCES: dict[str, Source] = {
    "megatron": Source(parse=megatron.parse, precision=megatron.precision,
                       decide=megatron.decide, pinned=lambda _: "megatron"),
    "deepspeed": Source(parse=deepspeed.parse, precision=deepspeed.precision,
                        decide=deepspeed.decide, pinned=lambda _: "deepspeed"),
    "torchtitan": Source(
        parse=torchtitan.parse, precision=torchtitan.precision, decide=torchtitan.decide,
        pinned=lambda p: "torchtitan" if torchtitan.is_python(p) else "torchtitan-toml"),
    "accelerate": Source(parse=accelerate.parse, precision=accelerate.precision,
                         decide=accelerate.decide, pinned=lambda _: "accelerate"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A configuration, costed. aside: settings that do not touch the layout; unknown: those that
    were not understood, or in part; notes: what the file leaves to code."""

    result: TraceResult
    aside: tuple[str, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


def source_of(engine: str) -> Source:
    """The reader of an engine's files. Raises UsageError for one that there is not."""
    if engine not in SOURCES:
        near = get_close_matches(engine, SOURCES, n=1)
        raise UsageError(
            f"--from {engine} is not read by this version", why=f"known: {', '.join(SOURCES)}",
            hints=tuple(f"--from {name}" for name in near),
        )  # fmt: skip
    return SOURCES[engine]


def read_file(path: str) -> str:
    """The text of a file. Raises PlanError for one that is too large, or no text."""
    file = Path(path)
    try:
        if not file.is_file():
            raise PlanError(f"cannot read {path}", why="it is no file")
        with open(file, "rb") as opened:
            raw = opened.read(MOST_BYTES + 1)
        text = raw.decode("utf-8")
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or type(fault).__name__
        raise PlanError(f"cannot read {path}", why=reason) from fault
    if len(raw) > MOST_BYTES:
        raise PlanError(f"{path} is larger than a configuration", why="at most 1 MiB is read")
    return text


def run(
    engine: str, path: str, options: TraceOptions, progress: Progress | None = None
) -> Imported:
    """Read a configuration and cost it. options: as of trace; its pins and workload are what the
    file leaves open.

    Raises PlanError for a file that is not read or cannot be planned, UsageError where a flag
    contradicts it, InfeasibleError where it does not fit.
    """
    from planner.capturing import Clock, capture
    from planner.objectives import plan_for

    source = source_of(engine)
    settings = source.parse(read_file(path), path)
    hardware = load_any(options.hardware)
    if isinstance(hardware, Fleet):
        raise UsageError("plan import is for hardware of one kind",
                         why=f"{options.hardware} has several")  # fmt: skip
    precision = _precision(source, settings, options.asked.precision)
    clock = Clock()
    options = replace(options, asked=replace(options.asked, precision=precision))
    graph = capture(options, hardware, clock, progress)
    if engine in engine_names():
        graph = forward_of(graph, engine)
    setup = source.decide(settings, facts(graph, precision, hardware.count))
    known = pinned(source.pinned(path))
    against = partial(contradicted, engine=engine, settings=settings, known=known)
    asked = _asked(setup, options.asked, against)
    pins, batch = _pins(setup, options, path, against)
    aside, unknown = settings.left(known)
    tp_note: tuple[str, ...] = ()
    if (pins.tp or 1) > 1:
        try:
            pins = replace(pins, place=pins.place or classic_places(graph))
        except PlanError as fault:
            tp_note = (f"the layout over tp is the planner's own: {fault.what}",)
    asked_for = dict(options.pins.items())
    theirs = [(key, pins.said(key)) for key, _ in pins.items() if key not in asked_for]
    options = replace(options, pins=pins, asked=replace(asked, global_batch=batch))
    try:
        result = plan_for(graph, options, hardware, clock, progress)
    except (UsageError, InfeasibleError) as fault:
        own = of_the_file(fault, theirs, engine, settings, known)
        if isinstance(fault, UsageError):
            raise PlanError(f"the configuration cannot be planned: {own.what}", where=path,
                            why=own.why, hints=own.hints) from fault  # fmt: skip
        own.hints += (f"{_trace_words(options)}: what fits as it is run",)
        raise own from fault
    return Imported(
        result=result, aside=aside, unknown=unknown, notes=(*setup.notes, *tp_note)
    )


def _trace_words(options: TraceOptions) -> str:
    """`plan trace` of the same work, on the same hardware and engine."""
    asked = options.asked
    given = (("--engine", asked.engine), ("--global-batch", asked.global_batch),
             ("--seq-len", asked.seq_len), ("--precision", asked.precision),
             ("--optimizer", asked.optimizer))  # fmt: skip
    words = ["plan", "trace", options.model, "--hardware", options.hardware]
    words += [str(word) for flag, value in given if value for word in (flag, value)]
    words += [word for name, value in options.args for word in ("--arg", f"{name}={value}")]
    return shlex.join(words)


def facts(graph: Graph, precision: str, gpus: int) -> Facts:
    """What readers may know."""
    found = facts_of(chain_of(graph))
    sizes = (math.prod(d.at(1, 1) for d in p.tensor.shape) for p in graph.parameters.values())
    return Facts(precision=precision, layers=found.layers, experts=bool(found.experts),
                 parameters=sum(sizes), gpus=gpus)  # fmt: skip


def _precision(source: Source, settings: Settings, asked: str | None) -> str:
    try:
        found = source.precision(settings)
    except PlanError:
        if asked is None:
            raise
        return asked
    if asked not in (None, found):
        raise UsageError(f"--precision {asked}, but {settings.source} is in {found}")
    return found


def _pins(
    setup: Setup, options: TraceOptions, path: str, against: Callable[[str, str, str], UsageError]
) -> tuple[Pins, int]:
    """All pins, and the global batch: what the file says, what `--fix` adds, defaults last.
    against: the error of a flag that contradicts the file: (flag, what the file has, key)."""
    said = dict(setup.pins)
    theirs = parse_pins([f"{k}={v}" for k, v in said.items()])
    for key, value in options.pins.items():
        if getattr(theirs, key, None) not in (None, value):
            raise against(f"--fix {options.pins.said(key)}", theirs.said(key), key)
    pins = replace(theirs, **dict(options.pins.items()), place=options.pins.place)
    dp = pins.dp or 1
    batch = options.asked.global_batch or int(setup.asked.get("global_batch", 0))
    if pins.micro_batch is None and not batch:
        raise PlanError(f"{path} does not say the micro-batch", hints=(
            "--fix micro_batch=N: samples a rank runs at once", *setup.notes))  # fmt: skip
    settings = Settings(source=path, values={})
    if pins.micro_batch is None:
        pins = replace(pins, micro_batch=steps(settings, batch, dp, pins.microbatches or 1))
    micro = pins.micro_batch or 1
    count = pins.microbatches or (steps(settings, batch, dp, micro) if batch else 1)
    if batch not in (0, dp * micro * count):
        raise PlanError(f"a global batch of {batch} is not {dp} data ranks x {count} micro-batches"
                        f" of {micro}", where=path)  # fmt: skip
    defaults = parse_pins(["recompute=none", "compile=off"])
    return replace(
        pins, microbatches=count, dp_outer=1, shares=(), tp_by_part=(),
        recompute=pins.recompute if pins.recompute is not None else defaults.recompute,
        compile=pins.compile if pins.compile is not None else defaults.compile,
    ), dp * micro * count  # fmt: skip


def _asked(setup: Setup, asked: Asked, against: Callable[[str, str, str], UsageError]) -> Asked:
    """The workload: what the file says, else what was asked."""
    found = asked
    for key, text in setup.asked.items():
        value: object = int(text) if text.isdigit() else text
        given = getattr(asked, key)
        if given not in (None, value):
            raise against(f"--{key.replace('_', '-')} {given}", text, key)
        found = replace(found, **{key: value})  # type: ignore[arg-type]
    return replace(found, engine=asked.engine or setup.engine)
