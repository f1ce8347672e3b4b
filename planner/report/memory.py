"""Memory: every pp rank against its GPU's capacity, and one of them as a waterfall of its items."""

from __future__ import annotations

from cost_models.ledger import Estimate, RankLedger
from cost_models.units import format_bytes
from planner.report.charts import (
    Mark,
    Section,
    bar,
    figure,
    legend,
    row,
    sentences,
    spread,
    stacked,
    table,
    title_of,
)
from planner.report.markup import Html, el

MOST_ROWS = 16
SLACK = 1.02  # of the larger of capacity and peak: the width of a bar


def section(e: Estimate, prefix: str, scale_bytes: float = 0) -> Section:
    """scale_bytes: of another plan's beside this one, so that bars compare."""
    worst = e.fullest
    name, most = max(worst.memory_bytes, key=lambda item: item[1])
    capacity = e.capacity_of(worst)
    total = f"{format_bytes(worst.peak_bytes)} of {format_bytes(capacity)}"
    lede = sentences(
        f"The fullest GPU{f' is on {worst.name} and' if len(e.ranks) > 1 else ''} holds"
        f" {total} at its peak; most of it is {title_of(name)}, {format_bytes(most)}.",
        _in_flight(worst),
        *(f"Tier {use.said}{'' if use.fits else ': it does not fit'}." for use in e.tiers),
    )
    return Section(key="memory", title="Memory", lede=lede,
                   body=_figure(e, prefix, max(scale_bytes, scale_of(e))))  # fmt: skip


def _in_flight(rank: RankLedger) -> str | None:
    """Whose activations it holds at the peak."""
    count = sum(rank.in_flight)
    if count < 2:
        return None
    stages = len(rank.in_flight)
    each = f", counted in each of its {stages} virtual stages" if stages > 1 else " at once"
    return f"It holds activations of {count} micro-batches{each}."


def scale_of(e: Estimate) -> float:
    """Bytes that a bar is wide."""
    return SLACK * max(max(r.peak_bytes, e.capacity_of(r)) for r in e.ranks)


def folded(e: Estimate) -> list[list[RankLedger]]:
    """Ranks in a row that hold the same, together."""
    groups: list[list[RankLedger]] = []
    for rank in e.ranks:
        alike = groups and groups[-1][0].memory_bytes == rank.memory_bytes
        if alike and e.capacity_of(groups[-1][0]) == e.capacity_of(rank):
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return groups


def _figure(e: Estimate, prefix: str, scale: float) -> Html:
    groups = folded(e)
    fullest = next(i for i, group in enumerate(groups) if e.fullest in group)
    drawn = spread(len(groups), MOST_ROWS, always=(fullest,))
    names = [name for name, _ in e.ranks[0].memory_bytes]
    used = [name for name in names if any(dict(r.memory_bytes)[name] for r in e.ranks)]
    rows = [
        row(_chooser(groups[i], f"{prefix}-waterfall-{i}", i == fullest, len(groups) > 1),
            _stack(e, groups[i][0], scale), format_bytes(groups[i][0].peak_bytes))
        for i in drawn
    ]  # fmt: skip
    waterfalls = [
        el("div", _waterfall(e, groups[i], scale), id=f"{prefix}-waterfall-{i}",
           class_="waterfall", hidden=i != fullest)
        for i in drawn
    ]  # fmt: skip
    left = len(groups) - len(drawn)
    note = sentences(
        "The line is what the driver reports of a GPU.",
        "Choose a rank to take it apart." if len(groups) > 1 else None,
        f"{left} more ranks are in the table alone." if left else None,
    )
    behind = table(
        "Bytes at the peak by pp rank", ["pp rank", *map(title_of, used), "peak", "capacity"],
        [
            [_ranks(g), *(format_bytes(dict(g[0].memory_bytes)[n]) for n in used),
             format_bytes(g[0].peak_bytes), format_bytes(e.capacity_of(g[0]))]
            for g in groups
        ],
    )  # fmt: skip
    return figure(
        f"Memory by pp rank, the fullest {format_bytes(e.peak_memory_bytes)} of "
        f"{format_bytes(e.capacity_bytes)}.",
        [legend([(f"m-{name}", title_of(name)) for name in used]),
         el("div", rows, class_="rows", role="group", aria_label="pp ranks")
         if len(groups) > 1 else None,
         waterfalls],
        behind, note=note,
    )  # fmt: skip


def _chooser(group: list[RankLedger], target: str, chosen: bool, several: bool) -> Html | str:
    """The button that shows a rank's waterfall."""
    if not several:
        return _ranks(group)
    return el("button", _ranks(group), type="button", class_="choose", aria_controls=target,
              aria_pressed="true" if chosen else "false")  # fmt: skip


def _ranks(group: list[RankLedger]) -> str:
    if group[0].part:  # each has replicas of its own, of one rank
        return ", ".join(rank.part for rank in group)
    first, last = group[0].pp_rank, group[-1].pp_rank
    return f"rank {first}" if first == last else f"ranks {first} to {last}"


def _stack(e: Estimate, rank: RankLedger, scale: float) -> Html:
    parts = [
        (f"m-{name}", size, f"{title_of(name)}: {format_bytes(size)}")
        for name, size in rank.memory_bytes
    ]
    capacity = e.capacity_of(rank)
    return bar(stacked(parts, scale), lines=[(capacity / scale, _capacity(capacity))])


def _waterfall(e: Estimate, group: list[RankLedger], scale: float) -> Html:
    rank, at = group[0], 0
    capacity = e.capacity_of(rank)
    line = [(capacity / scale, _capacity(capacity))]
    rows = []
    for name, size in rank.memory_bytes:
        if size:
            tip = f"{title_of(name)}: {format_bytes(size)}, {format_bytes(at + size)} so far"
            mark = Mark(start=at / scale, end=(at + size) / scale, kind=f"m-{name}", tip=tip)
            rows.append(row(title_of(name), bar([mark], lines=line), format_bytes(size)))
        at += size
    left = capacity - at
    total = Mark(start=0, end=at / scale, kind="total", tip=f"peak: {format_bytes(at)}")
    return el(
        "div",
        el("h4", f"{_ranks(group).capitalize()}, item by item") if len(e.ranks) > 1 else None,
        el("div", rows,
           row("peak", bar([total], lines=line), format_bytes(at), "row sum"),
           row("left" if left >= 0 else "too little", "", format_bytes(abs(left))),
           class_="rows"),
    )  # fmt: skip


def _capacity(size: int) -> str:
    return f"capacity: {format_bytes(size)}"
