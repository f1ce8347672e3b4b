"""`plan verify`, whole: is the plan's model this one, does a twin compute what it should, and does
the plan's ledger say what its ranks would do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from cost_models.units import format_count
from ir.errors import GateError, PlanError
from planner.check import require_model
from planner.console import progress
from planner.decisions_json import decisions_json
from planner.offloads import offload_words
from planner.options import Progress, TraceOptions
from planner.plan import Plan, load_cluster
from planner.runnable import NATIVE
from planner.share_words import microbatch_words, tp_words
from planner.workload import Asked

if TYPE_CHECKING:
    from planner.runtime.verify.compare import Compared
    from planner.runtime.verify.ledger import LedgerResult
    from planner.runtime.verify.twin import Twin
    from planner.runtime.world import RankFailure
    from planner.serving.plan import ServingPlan

WIDTH = 80
MOST_ROWS = 20  # of a table of differences; --json has all


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """The arguments of `plan verify`. args, changes: texts, as `--arg` and `--twin` give them."""

    model: str
    args: Mapping[str, str]
    changes: Mapping[str, str]
    folder: Path = Path()
    processes: int = 32
    ledger: bool = True
    cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found of a plan: each twin with its comparison, and the ledger's, if asked for."""

    plan: Plan
    twins: tuple[tuple[Twin, Compared], ...]
    ledger: LedgerResult | None

    @property
    def holds(self) -> bool:
        return all(found.holds for _, found in self.twins) and (
            self.ledger is None or self.ledger.equal
        )


def run_command(plan: Plan, options: VerifyOptions) -> Verified:
    """`verify`, saying what it does on a terminal."""
    with progress() as say:
        return verify(plan, options, say)


def require_same_model(
    plan: Plan | ServingPlan, options: VerifyOptions, precision: str
) -> None:
    """Trace the model anew. Raises GateError where the plan is another model's."""
    from planner.capturing import capture

    traced = capture(
        TraceOptions(
            model=options.model, hardware=plan.hardware, args=tuple(options.args.items()),
            cache=options.cache, asked=Asked(precision=precision),
        ),
        load_cluster(plan, options.folder),
    )  # fmt: skip
    require_model(plan, traced, options.model)


def verify(plan: Plan, options: VerifyOptions, report: Progress | None = None) -> Verified:
    """Compare the plan with the model and with what runs.

    Raises GateError where the plan is another model's, naming the first unit that differs;
    UsageError for a twin that cannot be asked for; PlanError where it cannot be made or run.
    """
    say = report or (lambda line: None)
    require_same_model(plan, options, plan.workload.precision)
    from planner.runtime.verify.run import verify_twin
    from planner.runtime.verify.twin import make_twins
    from planner.runtime.world import PRELOAD_COMPILED, PRELOAD_HF, RankFailure, local_world

    say("making the twin")
    twins = make_twins(plan, options.model, options.args, options.changes, options.processes)
    found = []
    preload: tuple[str, ...] = PRELOAD_HF if twins[0].recipe.config else ()
    if plan.decisions.compile:
        preload += PRELOAD_COMPILED
    with local_world(preload) as world:
        for number, twin in enumerate(twins, 1):
            say(f"twin {number} of {len(twins)}: {twin.plan.decisions.gpus} processes")
            try:
                found.append((twin, verify_twin(world, twin)))
            except RankFailure as failure:
                raise explained(failure) from failure
    say("the ledger")
    ledger = _ledger(plan, options) if options.ledger and _native(plan) else None
    return Verified(plan=plan, twins=tuple(found), ledger=ledger)


def _native(plan: Plan) -> bool:
    return plan.workload.engine in NATIVE


def explained(failure: RankFailure) -> PlanError:
    """What a rank raised, once, with the rank: a fault of the input as it is, else its last line
    and where it was."""
    fault = failure.fault
    if isinstance(fault, PlanError):
        kind = GateError if isinstance(fault, GateError) else PlanError
        what = f"rank {failure.rank}: {fault.what}"
        return kind(what, where=fault.where, why=fault.why, hints=fault.hints)
    what, place = _first_cause(failure.traceback)
    return PlanError(
        f"rank {failure.rank} failed: {what or failure.what}", where=place,
        hints=("-vv shows the whole traceback",) if place else (),
    )  # fmt: skip


def _first_cause(traceback: str) -> tuple[str, str]:
    """The exception that began it, in a line, and the line of code that raised it."""
    first = re.split(r"\n\n(?:The above exception|During handling)", traceback)[0]
    lines = first.strip().splitlines()
    raised = [i for i, line in enumerate(lines) if line.startswith("  File ")]
    if not raised:
        return (lines[-1].strip() if lines else ""), ""
    after = [line for line in lines[raised[-1] + 1 :] if line and not line.startswith(" ")]
    found = re.fullmatch(r'  File "(.*)", line (\d+), in (.*)', lines[raised[-1]])
    return (after[0] if after else ""), f"{found[1]}:{found[2]} in {found[3]}" if found else ""


def _ledger(plan: Plan, options: VerifyOptions) -> LedgerResult:
    """The plan's ledger against a step on a fake process group of the plan's size."""
    from ir.capture.export import default_loss
    from ir.capture.real import build, recipe_of
    from planner.runtime.meta import meta
    from planner.runtime.verify.ledger import check_ledger

    with meta():
        real = build(recipe_of(options.model, options.args), hollow=True)
    return check_ledger(
        plan, real.model, real.inputs, real.loss or default_loss, targets=real.targets,
        folder=options.folder,
    )  # fmt: skip


# --- what is printed ----------------------------------------------------------------------------


def text(found: Verified) -> str:
    """The result at 80 columns: each twin, what was compared, what differs."""
    lines = [f"{found.plan.graph.name} on {found.plan.hardware}", _verdict(found)]
    for twin, compared in found.twins:
        lines += ["", *_twin_lines(found.plan, twin), *_compared_lines(compared)]
    if found.ledger is not None:
        lines += ["", *_ledger_lines(found.ledger)]
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines)


def _verdict(found: Verified) -> str:
    many = len(found.twins)
    ranks = found.twins[0][0].plan.decisions.gpus
    ran = f"{many} twins" if many > 1 else f"a twin on {ranks} ranks"
    if not all(compared.holds for _, compared in found.twins):
        return f"differs: {ran} computed something else than the unsharded model"
    if not found.holds:
        return "differs: the ledger is not what the ranks would do"
    return f"holds: {ran} computed what the unsharded model does"


def _twin_lines(plan: Plan, twin: Twin) -> list[str]:
    small, w = twin.plan, twin.plan.workload
    length = f" x {w.seq_len} tokens" if small.graph.seq_in_input else " samples"
    return [
        _row("twin", f"{_mesh(small)}" + (f"   of axes {twin.axes}" if twin.axes else "")),
        _row("of", _mesh(plan)),
        _row("state", f"ZeRO-{small.decisions.zero} over {small.decisions.shard}, recompute"
             f" {_levels(small)}" + _offloaded(small)),
        _row("model", f"{sum(small.decisions.stages)} layers,"
             f" {format_count(small.graph.parameter_count)} parameters,"
             f" {w.global_batch}{length}, fp32, no dropout"),
        _row("steps", f"micro-batches {microbatch_words(small.decisions)} x"
             f" {small.decisions.micro_batch}, {small.decisions.schedule}, stages of"
             f" {'/'.join(map(str, small.decisions.stages))} layers"),
        *(_row("not kept", note) for note in twin.notes),
    ]  # fmt: skip


def _levels(plan: Plan) -> str:
    from planner.decisions import recompute_words

    return recompute_words(plan.decisions)


def _offloaded(plan: Plan) -> str:
    d = plan.decisions
    compiled = ", compiled" if d.compile else ", eager"
    return compiled + "".join(f", {words}" for words in offload_words(d))


def _mesh(plan: Plan) -> str:
    d = plan.decisions
    axes = ["pp", "dp", "cp", "tp", *(["ep", "etp"] if d.ep * d.etp > 1 else [])]
    sizes = {axis: str(getattr(d, axis)) for axis in axes} | {"tp": tp_words(d)}
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items()) + f" = {d.gpus} ranks"


def _compared_lines(c: Compared) -> list[str]:
    lines = [_entry("compared", "worst error", "allowed", "tensor")]
    for row in checks(c):
        error, allowed = f"{row['error']:.1e}", f"{row['allowed']:.0e}"
        lines.append(_entry(row["what"], error, allowed, row["tensor"]))
    ops = sum(times for _, _, times in c.replicated)
    lines.append(_row("replicated", f"{ops} operations ran whole on every tp rank" if ops
                      else "no operation"))  # fmt: skip
    lines += [_row("", f"{unit} {op}: {times}") for unit, op, times in c.replicated[:MOST_ROWS]]
    if c.loose_edges:
        edges = f"{len(c.loose_edges)} planned changes of placement left to DTensor"
        lines.append(_row("loose", edges))
        lines += [_row("", edge) for edge in c.loose_edges[:MOST_ROWS]]
    if c.uncompiled:
        lines.append(_row("uncompiled", "these run eager, against the plan:"))
        for unit, why in c.uncompiled[:MOST_ROWS]:
            lines += [_row("", x) for x in wrap(f"{unit}: {why}", WIDTH - 13,
                                                subsequent_indent="  ")]
    if c.differences:
        lines += ["", _entry("difference", "error", "allowed", "tensor")]
        for d in sorted(c.differences, key=lambda d: -d.error)[:MOST_ROWS]:
            lines.append(_entry(d.what, f"{d.error:.1e}", f"{d.allowed:.0e}", d.name))
        more = len(c.differences) - MOST_ROWS
        lines += [f"  and {more} more (--json has all)"] if more > 0 else []
    return lines


def checks(c: Compared) -> list[dict[str, Any]]:
    """What was compared, each with its worst error."""
    from planner.runtime.verify.compare import TENSOR

    rows: list[dict[str, Any]] = [
        {"what": n.what, "count": 1, "error": n.error, "allowed": n.allowed, "tensor": ""}
        for n in c.numbers
    ]
    names = {"gradient": "gradients", "parameter": "parameters after AdamW"}
    for key, what in names.items() if c.tensors else ():
        worst = c.worst(key)
        count, error = len(c.tensors), getattr(worst, key)
        rows.append({"what": f"{count} {what}", "count": count, "error": error,
                     "allowed": TENSOR, "tensor": worst.name})  # fmt: skip
    return rows


def _ledger_lines(ledger: LedgerResult) -> list[str]:
    bad = ledger.differences
    lines = [_row("ledger", f"{len(ledger.rows) - len(bad)} of {len(ledger.rows)} rows as planned,"
                  " at full size")]  # fmt: skip
    for row in sorted(bad, key=lambda row: bool(row.reason))[:MOST_ROWS]:
        lines += [_row("", text) for text in wrap(str(row), WIDTH - 13, subsequent_indent="  ")]
    more = len(bad) - MOST_ROWS
    return lines + ([_row("", f"and {more} more (--json has all)")] if more > 0 else [])


def _entry(what: str, error: str, allowed: str, tensor: str) -> str:
    """A line of a table; of a long name, the end."""
    left = WIDTH - 50
    name = tensor if len(tensor) <= left else "..." + tensor[3 - left :]
    return f"  {what:26}{error:>11}{allowed:>9}  {name}".rstrip()


def _row(name: str, words: str) -> str:
    return f"  {name:11}{words}"


def document(found: Verified, source: str, model: str) -> dict[str, Any]:
    """The result as one JSON document."""
    return {
        "schema": "verify/1",
        "plan": source,
        "model": model,
        "holds": found.holds,
        "twins": [
            {
                "axes": twin.axes,
                "decisions": decisions_json(twin.plan.decisions)
                | {"stages": list(twin.plan.decisions.stages)},
                "workload": asdict(twin.plan.workload),
                "parameters": twin.plan.graph.parameter_count,
                "seed": c.seed,
                "holds": c.holds,
                "checks": checks(c),
                "differences": [asdict(d) for d in c.differences],
                "replicated": [
                    {"unit": u, "operation": op, "times": n} for u, op, n in c.replicated
                ],
                "loose_edges": list(c.loose_edges),
                "uncompiled": [{"unit": unit, "reason": why} for unit, why in c.uncompiled],
                "not_kept": list(twin.notes),
            }
            for twin, c in found.twins
        ],
        "ledger": None
        if found.ledger is None
        else {
            "equal": found.ledger.equal,
            "rows": len(found.ledger.rows),
            "differences": [asdict(row) for row in found.ledger.differences],
        },
    }


def require_holds(found: Verified, source: str) -> None:
    """Raise GateError where something differed."""
    if found.holds:
        return
    count = sum(len(c.differences) for _, c in found.twins)
    if count:
        raise GateError(
            f"the plan does not compute what the model does: {count} differences", where=source,
            hints=("plan verify --json lists all of them",),
        )  # fmt: skip
    raise GateError("the plan's ledger is not what its ranks would do", where=source)
