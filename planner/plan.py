"""A plan: what was decided, for what inputs, and what it is predicted to do; on disk and off."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cost_models.decisions import Decisions, Workload
from cost_models.fleet import Hardware, files_of, load_any, parts_of
from cost_models.hardware import summands
from cost_models.sharding import Sharding
from ir.errors import GateError, PlanError, UsageError
from ir.files import is_stream, may_wait
from ir.graph import Graph
from ir.stacks import as_written
from planner.score import AXIS_GAIN_PPM

if TYPE_CHECKING:
    from cost_models.ledger import Estimate
    from planner.serving.plan import ServingPlan

PLANNER_VERSION = "0.1.0"
MOST_CHARACTERS = 64_000_000  # of a plan or a graph: folded, they have thousands


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """How the search ended. status: OPTIMAL or FEASIBLE, or ESTIMATE where none was.
    pins: what the user decided, `tp=8`; the search is of what they leave. objective: what the
    bound is of: time, or of several kinds of GPUs cost or energy, told as a step on the same GPUs.
    axis_gain_ppm: of the step, what each axis beside data parallelism had to earn.
    """

    status: str = "ESTIMATE"
    gap_ppm: int = 0
    bound_us: int = 0
    meshes: int = 1
    meshes_solved: int = 1
    pins: tuple[str, ...] = ()
    objective: str = "time"
    axis_gain_ppm: int = AXIS_GAIN_PPM


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Decisions for a graph, under the hashes of what they were made for.

    graph: of the forward that the workload's engine runs (`forward_of`); the hash, and the file
    beside the plan, are of the model as it is written.
    hardware: the name as `--hardware` takes it. shardings: (unit class, placements) pairs, none
    where tp = 1. step_time_us and peak_memory_bytes are the estimate as it was written.
    """

    graph: Graph = field(repr=False, compare=False)
    graph_hash: str
    hardware: str
    hardware_hash: str
    constants_hash: str
    workload: Workload
    decisions: Decisions
    shardings: tuple[tuple[str, Sharding], ...] = ()
    step_time_us: int = 0
    peak_memory_bytes: int = 0
    solver: Solver = Solver()

    @property
    def sharding_by_unit(self) -> Mapping[str, Sharding]:
        return dict(self.shardings)

    def __repr__(self) -> str:
        from planner.displays import line

        return line(self)

    def __str__(self) -> str:
        from planner.displays import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from planner.displays import plan_html

        return plan_html(self)

    def save(self, target: str, *, embed: bool = False, overwrite: bool = False) -> None:
        """Write `target` and the graph beside it, each whole or not at all; `-` is stdout.

        embed: put the graph's text inside instead, as into what has nothing beside it: a pipe.
        overwrite: write over what is there and is no plan of ours too. Raises UsageError for such a
        file without it.
        """
        from ir.text import format_graph
        from planner.plan_text import to_text
        from planner.targets import require_target

        embed = embed or target == "-" or is_stream(target)
        if not overwrite:
            require_target(target, embed=embed, flag="")
        text = to_text(self, embed=embed)
        if target == "-":
            sys.stdout.write(text)
            return
        path = Path(target)
        if not embed:
            text_of_graph = format_graph(as_written(self.graph))
            write_whole(path.with_suffix(".graph"), text_of_graph)
        write_whole(path, text)


def hardware_name(spec: str) -> str:
    """The hardware's name as a plan keeps it: a file's path relative, never absolute."""
    parts = summands(spec)
    if len(parts) > 1:
        return "+".join(map(hardware_name, parts))
    if not spec.endswith(".toml"):
        return spec.lower()
    path = os.path.relpath(spec)
    return Path(spec).name if path.startswith("..") else Path(path).as_posix()


def load_cluster(plan: Plan | ServingPlan, folder: Path) -> Hardware:
    """The plan's hardware as it is today; a file is sought here, then beside the plan.

    A plan may be anybody's: a file that is read lies here or beside it, or below, links followed;
    and so do the files that it names as its parts.
    """
    allowed = [Path.cwd().resolve(), folder.resolve()]

    def within(path: Path) -> bool:
        return any(map(Path(os.path.realpath(path)).is_relative_to, allowed))

    def found(spec: str) -> str:
        if not spec.endswith(".toml"):
            return spec
        beside = folder / spec
        path = beside if not Path(spec).exists() and beside.exists() else Path(spec)
        said = Path(spec).is_absolute() or ".." in Path(spec).parts
        if said or not (within(path) and all(map(within, files_of(path)))):
            raise PlanError(f"the plan's hardware {spec!r} is outside of where the plan may read",
                            why="a plan names a file beside it or below")  # fmt: skip
        return str(path)

    try:
        return load_any("+".join(map(found, summands(plan.hardware, folder))))
    except UsageError as fault:
        raise PlanError(f"the plan's hardware {plan.hardware!r} cannot be read: {fault.what}",
                        where=fault.where, why=fault.why, hints=fault.hints) from fault  # fmt: skip


def constants_hash(hardware: Hardware) -> str:
    """The hash of today's cost constants for that hardware."""
    from cost_models.constants_table import load_constants

    digests = [load_constants(part.device.constants).digest for part in parts_of(hardware)]
    if len(digests) == 1:
        return digests[0]
    return "sha256:" + hashlib.sha256(" ".join(digests).encode()).hexdigest()


def step_time_us(estimate: Estimate) -> int:
    """The step as a plan stores it: whole microseconds, rounded half up."""
    return (estimate.step_time_ps + 500_000) // 1_000_000


def make_plan(
    graph: Graph,
    spec: str,
    hardware: Hardware,
    workload: Workload,
    decisions: Decisions,
    shardings: Mapping[str, Sharding],
    estimate: Estimate,
    solver: Solver,
) -> Plan:
    """The plan of these decisions under the hashes of today's inputs. spec: as `--hardware`."""
    from ir.text import format_graph, graph_hash

    return Plan(
        graph=graph,
        graph_hash=graph_hash(format_graph(as_written(graph))),
        hardware=hardware_name(spec),
        hardware_hash=hardware.digest,
        constants_hash=constants_hash(hardware),
        workload=workload,
        decisions=decisions,
        shardings=tuple(shardings.items()) if decisions.tp > 1 else (),
        step_time_us=step_time_us(estimate),
        peak_memory_bytes=estimate.peak_memory_bytes,
        solver=solver,
    )


def recost(plan: Plan, hardware: Hardware) -> Estimate:
    """Estimate the plan's decisions with today's hardware data and constants."""
    from cost_models.estimate import estimate

    found: Estimate = estimate(
        plan.graph, hardware, plan.workload, plan.decisions, plan.sharding_by_unit
    )
    return found


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one.

    A link stays one, and what it leads to is replaced. A pipe or a device is written to as it is:
    a file in its place would break whatever else uses it. Raises PlanError.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if is_stream(path):
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            return
        with open(beside, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as fault:
        reason = fault.strerror or type(fault).__name__
        raise PlanError(f"cannot write {path}", why=reason) from fault
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written to has been told
            beside.unlink(missing_ok=True)


def load(source: str, graph_path: str | None = None) -> Plan:
    """Read a plan of training as `load_plan` does. Raises PlanError for one of serving as well."""
    found = load_plan(source, graph_path)
    if not isinstance(found, Plan):
        raise PlanError("this is a plan of serving, and the command is about training",
                        where=source, hints=(f"plan show {source}",))
    return found


def load_plan(source: str, graph_path: str | None = None) -> Plan | ServingPlan:
    """Read a plan with its graph. source: a path, `-` (stdin), or REV:path (git).

    Raises PlanError for a file that is no plan, GateError where the graph is another one's.
    """
    from ir.check import check_graph
    from ir.text import graph_hash, parse_graph
    from planner.plan_text import parse_header, parse_text

    text = read(source)
    header = parse_header(text, source)
    graph_text = header.graph
    if graph_path is not None or graph_text is None:
        graph_text = _read_graph(source, graph_path)
    found = graph_hash(graph_text)
    if found != header.graph_hash:
        raise GateError(
            "the graph is not the one that the plan was made for",
            where=source,
            why=f"the plan names {header.graph_hash[:19]}, the graph is {found[:19]}",
            hints=("commit plan and graph together", "plan trace writes both anew"),
        )
    graph = parse_graph(graph_text)
    check_graph(graph)
    return parse_text(text, graph, source)


def _read_graph(source: str, graph_path: str | None) -> str:
    beside = graph_path or str(source.removesuffix(".json") + ".graph")
    if source == "-" and graph_path is None:
        raise PlanError("a plan on stdin needs its graph inside",
                        hints=("write it with plan trace -o - or --embed",))  # fmt: skip
    try:
        return read(beside)
    except PlanError as fault:
        raise PlanError(
            f"the plan's graph {beside} cannot be read",
            where=source,
            why=fault.why,
            hints=("commit it beside the plan, or write the plan with --embed",),
        ) from fault


def require_alike(old: Plan | ServingPlan, new: Plan | ServingPlan) -> None:
    """Raise UsageError where one plan serves and the other trains."""
    if isinstance(old, Plan) != isinstance(new, Plan):
        raise UsageError("one plan is of training, the other of serving",
                         hints=("compare two of a kind",))  # fmt: skip


def read(source: str) -> str:
    """The text of a path, of stdin (`-`), or of REV:path."""
    if source == "-":
        return _within(sys.stdin.read(MOST_CHARACTERS + 1), source)
    if source.partition(":")[2] and not Path(source).exists():
        from planner.revisions import read_revision

        return _within(read_revision(source), source)
    if may_wait(source):
        raise PlanError(f"cannot read {source}", why="it is no file",
                        hints=("'-' is stdin",))  # fmt: skip
    try:
        with open(source, encoding="utf-8") as file:
            return _within(file.read(MOST_CHARACTERS + 1), source)
    except OSError as fault:
        reason = fault.strerror or type(fault).__name__
        hints = ("plan trace MODEL --hardware HW writes one",)
        raise PlanError(f"cannot read {source}", why=reason, hints=hints) from fault
    except UnicodeDecodeError as fault:
        raise PlanError(f"{source} is not text", why=str(fault)) from fault


def _within(text: str, source: str) -> str:
    """Raises PlanError for more than any plan or graph has."""
    if len(text) > MOST_CHARACTERS:
        raise PlanError(f"{source} is too large", why=f"over {MOST_CHARACTERS:,} characters")
    return text
