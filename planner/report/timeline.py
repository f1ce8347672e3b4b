"""The pipeline's timeline: every operation of the simulated schedule, in the order of its time.

Where a rank has too many operations to tell apart, the start and the end of the step are drawn and
what lies between is told in numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.decisions import Decisions
from cost_models.schedule import Event
from cost_models.simulated import TAIL, Simulated
from cost_models.units import format_seconds
from planner.names import many
from planner.report.charts import Section, figure, legend, sentences, spread, table, title_of
from planner.report.markup import Html, el, join

MOST_RANKS = 16
MOST_OPS = 320  # that a rank's row shows side by side; more, and it is drawn in two parts
# A line around each operation is left out where the usual one is so small a share of its row:
EDGED = (("dense", 1 / 160), ("tight", 1 / 40))  # in any, in a row of half the width
RESOLUTION = 1_000_000  # units that a window is wide: what hovering can tell apart
ROW_PX = 18
KINDS = {"F": "forward", "B": "input gradient", "W": "weight gradient", "BW": "backward",
         "R": "gradient reduction", "O": "optimizer", "D": "offload",
         "H": "host and jitter"}  # fmt: skip
TAIL_KINDS = dict(zip(TAIL, "ROD"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A part of the step, picoseconds."""

    start_ps: int
    end_ps: int

    @property
    def unit_ps(self) -> int:
        """What one unit of its drawing is."""
        return max(1, -(-(self.end_ps - self.start_ps) // RESOLUTION))


def section(s: Simulated, d: Decisions, scale_ps: int = 0) -> Section:
    """scale_ps: the step of another plan beside this one, so that times compare."""
    busy = [b / s.step_ps for b in s.line.busy_ps]
    virtual = f", {d.virtual_stages} virtual stages a rank" if d.virtual_stages > 1 else ""
    counts = ", ".join(f"{share.microbatches} on {share.part}" for share in d.shares)
    batches = many(d.microbatches, "micro-batch") + f" of {d.micro_batch}"
    fills = "They fill" if d.microbatches > 1 or counts else "It fills"
    lede = sentences(
        f"Of micro-batches of {d.micro_batch} a data rank runs {counts}." if counts
        else f"{batches} {'go' if d.microbatches > 1 else 'goes'} through {d.pp} pipeline ranks"
        f" in the order of {d.schedule}{virtual}." if d.pp > 1
        else f"Without a pipeline, {batches} follow each other." if d.microbatches > 1
        else f"Without a pipeline, {batches} is a step.",
        f"A rank computes {min(busy):.0%} to {max(busy):.0%} of the step." if len(busy) > 1
        else f"{fills} {busy[0]:.0%} of the step.",
        f"The pipeline takes {format_seconds(s.line.makespan_ps / 1e12)}, what follows its last"
        f" backward {format_seconds((s.step_ps - s.line.makespan_ps) / 1e12)}.",
    )
    return Section(key="timeline", title="Timeline of a step", lede=lede,
                   body=_figure(s, d, scale_ps))  # fmt: skip


def windows(s: Simulated, ranks: Sequence[int]) -> tuple[Window, ...]:
    """The whole step; or its start and its end, each of as many operations as can be drawn."""
    by_rank = [[e for e in s.line.events if e.rank == rank] for rank in ranks]
    if max(map(len, by_rank)) <= MOST_OPS:
        return (Window(start_ps=0, end_ps=s.step_ps),)
    half = MOST_OPS // 2
    first = min(events[half].start_ps for events in by_rank if len(events) > half)
    last = max(events[-half].end_ps for events in by_rank if len(events) > half)
    return Window(start_ps=0, end_ps=first), Window(start_ps=last, end_ps=s.step_ps)


def _figure(s: Simulated, d: Decisions, scale_ps: int) -> Html:
    ranks = spread(len(s.rows), MOST_RANKS)
    parts = windows(s, ranks)
    drawn = [_window(s, ranks, w, scale_ps if len(parts) == 1 else 0) for w in parts]
    if len(parts) == 2:
        drawn.insert(1, _between(s, parts[0].end_ps, parts[1].start_ps))
    kinds = [k for k in ("F", "BW", "B", "W") if any(e.op == k for e in s.line.events)]
    kinds += [k for name, k in TAIL_KINDS.items()
              if any(tail[TAIL.index(name)] for tail in s.tails_ps)]  # fmt: skip
    note = [
        f"{len(ranks)} of {len(s.rows)} ranks are drawn, evenly spaced. "
        if len(ranks) < len(s.rows) else None,
        "Lighter: later virtual stages. " if d.virtual_stages > 1 else None,
        "Point at an operation for its times; backward includes what is computed again."
        if d.recompute and any(map(sum, d.recompute)) else "Point at an operation for its times.",
    ]
    return figure(
        f"Simulated schedule of a step of {format_seconds(s.step_ps / 1e12)} on"
        + (f" replicas on {len(s.parts)} parts." if s.parts else f" {d.pp} pp ranks."),
        [legend([*((f"op-{k}", KINDS[k]) for k in kinds), ("op-H", KINDS["H"]), ("idle", "idle")]),
         *drawn],
        join([_rank_table(s), _stage_table(s)]), note=note,
    )  # fmt: skip


def _between(s: Simulated, start_ps: int, end_ps: int) -> Html:
    inside = [e for e in s.line.events if start_ps <= e.start_ps < end_ps]
    batches = sorted({e.microbatch for e in inside})
    span = f"micro-batches {batches[0]} to {batches[-1]}" if batches else "nothing"
    return el(
        "p", f"{format_seconds((end_ps - start_ps) / 1e12)} between are not drawn: {span},"
        f" {len(inside):,} operations in the same order.", class_="between",
    )  # fmt: skip


def _window(s: Simulated, ranks: Sequence[int], w: Window, scale_ps: int) -> Html:
    wide = max(scale_ps, w.end_ps - w.start_ps)
    window = Window(start_ps=w.start_ps, end_ps=w.start_ps + wide)
    lines = [
        el("div", el("div", s.rows[rank], class_="what"),
           el("div", _rank(s, rank, window), class_="drawn"),
           el("div", f"{s.line.busy_ps[rank] / s.step_ps:.0%}", class_="amount"), class_="row thin")
        for rank in ranks
    ]  # fmt: skip
    ticks = [w.start_ps + wide * i // 4 for i in range(5)]
    axis = el("div", el("div", class_="what"),
              el("div", [el("span", format_seconds(t / 1e12)) for t in ticks], class_="axis"),
              el("div", "busy", class_="amount"), class_="row thin")  # fmt: skip
    return el("div", lines, axis, class_="rows timeline")


def _rank(s: Simulated, rank: int, w: Window) -> Html:
    """A rank's operations: paths by kind and chunk, and their list for hovering."""
    ops: list[tuple[str, int, int, int, int]] = [
        (e.op, e.microbatch, e.chunk, e.start_ps, e.end_ps)
        for e in sorted(_of(s, rank), key=lambda e: e.start_ps)
    ]
    at = s.line.makespan_ps
    for name, size in zip(TAIL, s.tails_ps[rank]):
        if size:
            ops.append((TAIL_KINDS[name], -1, 0, at, at + size))
            at += size
    start = s.line.makespan_ps + s.tail_ps
    ops.append(("H", -1, 0, start, s.step_ps))
    unit, told, last = w.unit_ps, [], 0
    shapes: dict[tuple[str, int], list[str]] = {}
    for op, microbatch, chunk, begin, end in ops:
        if end <= w.start_ps or begin >= w.end_ps:
            continue
        x0 = max(0, begin - w.start_ps) // unit
        x1 = max(x0 + 1, (min(end, w.end_ps) - w.start_ps) // unit)
        shapes.setdefault((op, min(chunk, 3)), []).append(f"M{x0} 0h{x1 - x0}v10h{x0 - x1}z")
        told.append(f"{op},{microbatch},{chunk},{x0 - last},{x1 - x0}")
        last = x1
    width = -(-(w.end_ps - w.start_ps) // unit)
    lengths = sorted(int(text.rpartition(",")[2]) for text in told)
    usual = lengths[len(lengths) // 2] / width if lengths else 1.0
    dense = next((f" {kind}" for kind, share in EDGED if usual < share), "")
    paths = [
        el("path", d="".join(drawn), class_=f"k-op-{op} chunk-{chunk}{dense}")
        for (op, chunk), drawn in shapes.items()
    ]
    return el(
        "svg", paths, class_="ops", width="100%", height=ROW_PX, viewBox=f"0 0 {width} 10",
        preserveAspectRatio="none", aria_hidden="true", focusable="false", data_rank=rank,
        data_ops=" ".join(told), data_unit=f"{unit / 1e12:.6g}",
        data_chunks=1 + max((e.chunk for e in s.line.events), default=0),
        data_from=f"{w.start_ps / 1e12:.9g}",
    )  # fmt: skip


def _of(s: Simulated, rank: int) -> list[Event]:
    return [e for e in s.line.events if e.rank == rank]


def _rank_table(s: Simulated) -> Html:
    rows = []
    for rank, name in enumerate(s.rows):
        events = _of(s, rank)
        busy, first = s.line.busy_ps[rank], min(e.start_ps for e in events)
        last = max(e.end_ps for e in events)
        idle = s.line.makespan_ps - busy
        rows.append([
            name, f"{len(events):,}", format_seconds(busy / 1e12),
            format_seconds(idle / 1e12), format_seconds(first / 1e12),
            format_seconds(last / 1e12), format_seconds(sum(s.tails_ps[rank]) / 1e12),
        ])  # fmt: skip
    return table(
        "Each pp rank in a step",
        ["pp rank", "operations", "busy", "idle in the pipeline", "first begins", "last ends",
         "reduction, optimizer"], rows,
    )  # fmt: skip


def _stage_table(s: Simulated) -> Html:
    """What an operation of each stage is made of; stages in a row that are alike together."""
    names = list(dict.fromkeys(k for side in (s.forward_ps, s.backward_ps) for parts in side
                               for k, v in parts if v))  # fmt: skip
    groups: list[list[int]] = []
    for stage, pair in enumerate(zip(s.forward_ps, s.backward_ps)):
        if groups and pair == (s.forward_ps[groups[-1][0]], s.backward_ps[groups[-1][0]]):
            groups[-1].append(stage)
        else:
            groups.append([stage])

    def told(stages: list[int], way: str, parts: tuple[tuple[str, int], ...]) -> list[str]:
        where = f"stage {stages[0]}" + (f" to {stages[-1]}" if len(stages) > 1 else "")
        if s.parts:
            where = ", ".join(s.parts[k] for k in stages)
        sizes = dict(parts)
        total = format_seconds(sum(sizes.values()) / 1e12)
        return [where, way, total, *(format_seconds(sizes.get(n, 0) / 1e12) for n in names)]

    return table(
        "An operation of each stage, of one micro-batch",
        ["stage", "pass", "takes", *map(title_of, names)],
        [line for g in groups for line in (told(g, "forward", s.forward_ps[g[0]]),
                                           told(g, "backward", s.backward_ps[g[0]]))], words=2,
    )  # fmt: skip
