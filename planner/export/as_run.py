"""What a plan takes as the engine that it is exported to runs it: an estimate is of one engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cost_models.engines import load_engine
from cost_models.ledger import Estimate
from cost_models.units import format_bytes, format_seconds
from ir.errors import PlanError
from planner.export.header import MARK
from planner.export.target import APPROXIMATE, Exported, Lost
from planner.plan import Plan, load_cluster, recost

MOST = 3  # items of memory that are named
LEAST_BYTES = 50_000_000  # that an item differs by: less is not seen in GB with one digit


def with_memory(made: Exported, plan: Plan, engine: str, folder: Path) -> Exported:
    """The export with what the same decisions take under the engine, where the plan is of another:
    a note; where they do not fit, among what is lost, in the file's header too.

    engine: that of the cost models which runs the target. folder: where the plan lies. Compiled
    kernels are the plan's decision, but for Megatron-LM, which always has its own fused ones.
    """
    if plan.workload.engine.partition("-")[0] == engine.partition("-")[0]:
        return made
    try:
        hardware = load_cluster(plan, folder)
        mine = recost(plan, hardware)
        compiled = plan.decisions.compile or engine == "megatron"
        theirs = recost(
            replace(plan, workload=replace(plan.workload, engine=engine),
                    decisions=replace(plan.decisions, compile=compiled)), hardware,
        )  # fmt: skip
    except PlanError as fault:
        return replace(made, notes=(*made.notes, f"what it takes there is not known: {fault.what}"))
    here, there = (format_bytes(found.peak_memory_bytes) for found in (mine, theirs))
    words = (
        f"under {load_engine(engine).title}: {there} of"
        f" {format_bytes(theirs.capacity_of(theirs.fullest))} a GPU,"
        f" {format_seconds(theirs.step_time_s)} a step (the plan: {here},"
        f" {format_seconds(mine.step_time_s)}){_items(mine, theirs)}"
    )
    if theirs.fits or not mine.fits:
        return replace(made, notes=(*made.notes, words))
    words += "".join(f"; tier {use.said}" for use in theirs.tiers if not use.fits)
    row = Lost(decision="memory", fidelity=APPROXIMATE, note=f"does not fit {words}")
    files = tuple((name, _headed(text, f"lost: {row}")) for name, text in made.files)
    hint = f"plan trace --engine {engine} plans for it"
    return replace(made, files=files, lost=(*made.lost, row), notes=(*made.notes, hint))


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
