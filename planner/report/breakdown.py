"""The time of a step by part, and the collectives of its busiest rank."""

from __future__ import annotations

from cost_models.ledger import Collective, Estimate
from cost_models.units import format_bytes, format_seconds
from planner.report.charts import (
    Mark,
    Section,
    bar,
    figure,
    row,
    sentences,
    stacked,
    table,
    title_of,
)
from planner.report.markup import Html, el, join

MOST_COLLECTIVES = 24
SMALL = 0.0005  # of the step: parts smaller than what the eye can see are in the table alone


def section(e: Estimate, scale_ps: int = 0) -> Section:
    """scale_ps: the step of another plan beside this one, so that bars compare."""
    wide = max(scale_ps, e.step_time_ps)
    parts = sorted(((k, v) for k, v in e.breakdown_ps if v), key=lambda part: -part[1])
    shown = [(k, v) for k, v in parts if v >= SMALL * e.step_time_ps]
    waits = sum(v for k, v in parts if k.endswith("_comm"))
    lede = sentences(
        f"A step takes {format_seconds(e.step_time_s)}; its parts are the exposed time of the"
        " busiest rank, and sum to the step.",
        f"{waits / e.step_time_ps:.1%} of it is communication that nothing hides." if waits
        else "No communication is exposed.",
    )
    whole = bar(stacked([(f"t-{k}", v, _tip(k, v, e)) for k, v in parts], wide), height=34)
    rows = [
        row(title_of(k), bar([Mark(start=0, end=v / wide, kind=f"t-{k}", tip=_tip(k, v, e))]),
            f"{format_seconds(v / 1e12)} {v / e.step_time_ps:>6.1%}")
        for k, v in shown
    ]  # fmt: skip
    left = len(parts) - len(shown)
    behind = table(
        "Parts of a step", ["part", "time", "share"],
        [
            *([title_of(k), format_seconds(v / 1e12), f"{v / e.step_time_ps:.2%}"]
              for k, v in parts),
            ["step", format_seconds(e.step_time_s), "100%"],
        ], total=True,
    )  # fmt: skip
    return Section(
        key="time", title="Where the time goes", lede=lede,
        body=figure(
            f"Parts of a step of {format_seconds(e.step_time_s)}.",
            [el("div", whole, class_="whole"), el("div", rows, class_="rows")],
            join([behind, _collectives(e)]),
            note=f"Less than {SMALL:.2%} each, in the table alone: {left}." if left else None,
        ),
    )  # fmt: skip


def _tip(name: str, ps: int, e: Estimate) -> str:
    return f"{title_of(name)}: {format_seconds(ps / 1e12)}, {ps / e.step_time_ps:.1%} of the step"


def _collectives(e: Estimate) -> Html | None:
    """What the rank that waits for most sends in a step, the most exposed first."""
    def exposed(c: Collective) -> tuple[float, float, str, str]:
        return (-c.exposed_s, -c.total_s, c.kind, c.where)

    rank = max(e.ranks, key=lambda r: (sum(c.exposed_s for c in r.collectives), -r.pp_rank))
    ordered = sorted(rank.collectives, key=exposed)
    if not ordered:
        return None
    left = len(ordered) - MOST_COLLECTIVES
    also = f"; the {MOST_COLLECTIVES} of {len(ordered)} most exposed" if left > 0 else ""
    return table(
        f"Collectives of {rank.name} in a step{also}",
        ["where", "kind", "axis", "count", "bytes each", "on the wire", "exposed"],
        [[c.where, title_of(c.kind), c.axis, f"{c.count:,}", format_bytes(c.size_bytes),
          format_seconds(c.total_s), format_seconds(c.exposed_s)]
         for c in ordered[:MOST_COLLECTIVES]], words=3,
    )  # fmt: skip
