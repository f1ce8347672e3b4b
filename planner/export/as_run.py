"""What a plan takes as the engine that it is exported to runs it: an estimate is of one engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cost_models.engines import load_engine
from cost_models.fleet import Hardware
from cost_models.forward import forward_of
from cost_models.ledger import Estimate
from cost_models.units import format_bytes, format_seconds
from ir.errors import PlanError
from planner.classic import classic_places
from planner.decisions import parse_pins, pins_of
from planner.export.header import MARK
from planner.export.target import APPROXIMATE, Exported, Lost
from planner.plan import Plan, load_cluster, recost

MOST = 3  # items of memory that are named
OF_WORK = ("precision", "optimizer")  # of the workload, what a file may have otherwise
LEAST_BYTES = 50_000_000  # that an item differs by: less is not seen in GB with one digit


def with_memory(made: Exported, plan: Plan, target: str, engine: str, folder: Path) -> Exported:
    """The export with what the file that is written takes under the engine that runs it, where
    that is not the plan: a note; where it does not fit, among what is lost, in the file's header
    too.

    engine: that of the cost models which runs the target. folder: where the plan lies.
    """
    alike = plan.workload.engine.partition("-")[0] == engine.partition("-")[0]
    if alike and not made.lost:
        return made
    try:
        hardware = load_cluster(plan, folder)
        mine = recost(plan, hardware)
        written, doubts = as_written(made, plan, target)
        if alike:  # one engine, of which the plan may have another version
            written = replace(written, graph=plan.graph, workload=replace(
                written.workload, engine=plan.workload.engine))  # fmt: skip
        other = _changed(plan, written)
        laid = any(row.decision == "placements" for row in made.lost)
        if alike and not other and not laid:
            return made
        shared = plan.decisions.sequence_parallel == written.decisions.sequence_parallel
        anew = laid or written.graph is not plan.graph or not shared
        theirs = (_laid_out(written, hardware) if anew and written.decisions.tp > 1
                  else recost(written, hardware))  # fmt: skip
    except PlanError as fault:
        return replace(made, notes=(*made.notes, f"what it takes there is not known: {fault.what}"))
    apart = [*other, *(["its layout over tp"] if laid else [])]
    as_it_is = f", as the file has it ({', '.join(apart)})" if apart else ""
    here, there = (format_bytes(found.peak_memory_bytes) for found in (mine, theirs))
    words = (
        f"under {load_engine(written.workload.engine).title}{as_it_is}: {there} of"
        f" {format_bytes(theirs.capacity_of(theirs.fullest))} a GPU,"
        f" {format_seconds(theirs.step_time_s)} a step (the plan: {here},"
        f" {format_seconds(mine.step_time_s)}){_items(mine, theirs)}"
    )
    if theirs.fits or not mine.fits:
        return replace(made, notes=(*made.notes, words, *doubts))
    words += "".join(f"; tier {use.said}" for use in theirs.tiers if not use.fits)
    row = Lost(decision="memory", fidelity=APPROXIMATE, note=f"does not fit {words}")
    files = tuple((name, _headed(text, f"lost: {row}")) for name, text in made.files)
    pins = "".join(f" --fix {word}" for word in other if word.partition("=")[0] not in OF_WORK)
    hint = f"plan trace --engine {engine}{pins} plans for it"
    return replace(made, files=files, lost=(*made.lost, row), notes=(*made.notes, *doubts, hint))


def as_written(made: Exported, plan: Plan, target: str) -> tuple[Plan, tuple[str, ...]]:
    """The plan as the exported file says it, read back as an import of it is: a decision that the
    target does in part, or has no word for, is the file's. What it leaves to code is the plan's.
    And what of the file the cost models have in part.

    Raises PlanError for what an import of the file refuses.
    """
    from planner.importing import SOURCES, facts

    ((name, text),) = made.files
    source = SOURCES[target.partition("-")[0]]
    settings = source.parse(text, name)
    precision = source.precision(settings)
    setup = source.decide(settings, facts(plan.graph, precision, plan.decisions.gpus))
    pins = parse_pins([f"{key}={value}" for key, value in setup.pins.items()])
    said: dict[str, Any] = {"dp_outer": 1, "keep": (), **dict(pins.items())}
    if pins.recompute is not None:
        stages = pins.stages or plan.decisions.stages
        said["recompute"] = pins.recompute.counts(stages)
    asked: dict[str, Any] = {
        key: int(word) if word.isdigit() else word for key, word in setup.asked.items()
    }
    workload = replace(plan.workload, engine=setup.engine, precision=precision, **asked)
    decisions = replace(plan.decisions, **said)
    graph = forward_of(plan.graph, setup.engine)
    return replace(plan, graph=graph, decisions=decisions, workload=workload), tuple(
        settings.doubts
    )  # fmt: skip


def _changed(plan: Plan, written: Plan) -> list[str]:
    """What the file has otherwise, as pins say it: `recompute=full`."""
    old, new = pins_of(plan.decisions), pins_of(written.decisions)
    words = [new.said(key) for key, value in new.items() if value != getattr(old, key)]
    words += [
        f"{key}={getattr(written.workload, key)}" for key in OF_WORK
        if getattr(written.workload, key) != getattr(plan.workload, key)
    ]  # fmt: skip
    return words


def _laid_out(plan: Plan, hardware: Hardware) -> Estimate:
    """What a plan takes whose matrices lie over tp as engines have them: the operations between
    are laid out anew. A model that is not read so has the planner's own, as an import of it has."""
    from cost_models.estimate import estimate_step, jointly
    from cost_models.fleet import used_parts
    from cost_models.step import Costs
    from planner.decisions import Pins
    from planner.search import Searcher

    d = plan.decisions
    try:
        place = classic_places(plan.graph)
    except PlanError:
        place = ()
    points = tuple(dict.fromkeys([(1, 1), (d.micro_batch, d.cp)]))  # laid out at the first
    costs = jointly(hardware, [
        Costs(graph=plan.graph, cluster=part, workload=plan.workload, compiled=d.compile,
              points=points)
        for part in used_parts(hardware, d)
    ], d)  # fmt: skip
    laid = Searcher(costs=costs, pins=Pins(place=place)).assign(d.tp, d.sequence_parallel)
    return estimate_step(costs, costs.step(d, laid), d)


def _items(mine: Estimate, theirs: Estimate) -> str:
    """Where the fullest ranks differ, the most first."""
    here, there = dict(mine.fullest.memory_bytes), dict(theirs.fullest.memory_bytes)
    apart = sorted((-abs(there[name] - here[name]), name) for name in here)
    found = [
        f"{name} {there[name] / 1e9:.1f} GB, not {here[name] / 1e9:.1f}"
        for less, name in apart[:MOST] if -less >= LEAST_BYTES
    ]  # fmt: skip
    return "".join(f"; {row}" for row in found)


def _headed(text: str, line: str) -> str:
    """The file with a line more in its header, in the form that the header's own lines have."""
    at = next(row for row in text.splitlines(keepends=True) if MARK in row)
    return text.replace(at, at + at.replace(MARK, line), 1)
