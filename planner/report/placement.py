"""Where everything lies: layers across, parameters down, their placement on tp in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.chain import chain_of
from ir.graph import full_name
from planner.chain import stage_units
from planner.names import expand_text, fold_text
from planner.offloads import offload_words
from planner.placements import placements, tp_idle
from planner.plan import Plan
from planner.plan_text import recompute_records, stage_records
from planner.report.charts import Section, figure, legend, sentences, table
from planner.report.markup import Children, Html, el
from planner.share_words import tp_words

ROW_PX = 22
LEAST_SHARE = 0.035  # of the width that a unit which is no layer has: it must be seen
NAMED_SHARE = 0.10  # of the width: a narrower run has no room for its word
ZERO = {0: "nothing", 1: "the optimizer's state", 2: "the optimizer's state and gradients",
        3: "the optimizer's state, gradients and parameters"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One unit of the chain: from and to as shares of the width."""

    path: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Columns in a row that say the same."""

    columns: tuple[Column, ...]
    word: str

    @property
    def units(self) -> str:
        return fold_text([c.path for c in self.columns])


def section(plan: Plan) -> Section:
    d = plan.decisions
    over = d.shard if d.shard > 1 else d.dp * d.cp
    experts = f" Experts lie over {d.ep} ranks." if d.ep > 1 else ""
    offloaded = offload_words(d)
    lede = sentences(
        f"The {d.tp} tp ranks split nothing of this model, and all do the same."
        if tp_idle(d, plan.sharding_by_unit)
        else f"Matrices are split over {tp_words(d)} tp ranks as the map says." if d.tp > 1
        else "With tp 1 no matrix is split over tp.",
        f"Over {over} data ranks ZeRO-{d.zero} shards {ZERO[d.zero]}." if over > 1 else None,
        experts or None,
        f"Lower tiers: {', '.join(offloaded)}." if offloaded else None,
    )
    return Section(key="placement", title="Where everything lies", lede=lede, body=_figure(plan))


def columns(plan: Plan) -> tuple[Column, ...]:
    """Every unit in order; layers are equally wide, others at least to be seen."""
    links = chain_of(plan.graph).links
    layers = sum(link.is_layer for link in links) or len(links)
    least = max(1.0, LEAST_SHARE * layers)
    widths = [1.0 if link.is_layer else least for link in links]
    total, at, found = sum(widths), 0.0, []
    for link, width in zip(links, widths):
        found.append(Column(path=link.path, start=at / total, end=(at + width) / total))
        at += width
    return tuple(found)


def runs(cols: Sequence[Column], words: Sequence[str]) -> list[Run]:
    """Columns with a word each, those in a row that are alike together; "" is none."""
    found: list[list[int]] = []
    for i, word in enumerate(words):
        if found and words[found[-1][-1]] == word and found[-1][-1] == i - 1:
            found[-1].append(i)
        elif word:
            found.append([i])
    return [Run(columns=tuple(cols[i] for i in run), word=words[run[0]]) for run in found
            if words[run[0]]]  # fmt: skip


def parameter_rows(plan: Plan) -> list[tuple[str, tuple[str, ...]]]:
    """(names folded, the placement in each column): names inside a unit, those that lie alike
    everywhere together."""
    placed = placements(plan.sharding_by_unit, plan.graph)
    owner = dict(plan.graph.tied)
    links = chain_of(plan.graph).links
    rows: dict[str, list[str]] = {}
    for at, link in enumerate(links):
        for p in link.unit.parameters:
            if p.kind != "buffer":
                full = full_name(link.path, p.name)
                name = p.name if link.is_layer else full
                rows.setdefault(name, [""] * len(links))[at] = placed[owner.get(full, full)]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, words in rows.items():
        groups.setdefault(tuple(words), []).append(name)
    return [(fold_text(names), words) for words, names in groups.items()]


def _figure(plan: Plan) -> Html:
    cols, d = columns(plan), plan.decisions
    at = {c.path: i for i, c in enumerate(cols)}
    ranks, again = [""] * len(cols), ["none"] * len(cols)
    for record in stage_records(d, plan.graph):
        for path in expand_text(record["units"]):
            ranks[at[path]] = f"rank {record['pp_rank']}"
    for record in recompute_records(d, plan.graph):
        for path in expand_text(record["units"]):
            again[at[path]] = record["recompute"]
    kinds: dict[str, str] = {}
    rows = [_row("pp rank", runs(cols, ranks), kinds={})]
    if any(word != "none" for word in again):
        level = {"none": "again-none", "selective": "again-selective", "full": "again-full"}
        kinds |= {f"recompute {w}": level[w] for w in level if w in again}
        rows.append(_row("recompute", runs(cols, again), kinds=level))
    lines = parameter_rows(plan)
    for name, words in lines:
        named = {word: _kind(word) for word in words if word}
        kinds |= {_meaning(word): kind for word, kind in named.items()}
        rows.append(_row(el("code", name), runs(cols, words), kinds=named))
    behind = table(
        "Placement on tp of every parameter", ["parameter", "units", "placement"],
        [[name, run.units, _meaning(run.word)]
         for name, words in lines for run in runs(cols, words)], words=3,
    )  # fmt: skip
    stages = table(
        "Stages of the pipeline", ["stage", "pp rank", "units"],
        [[f"stage {k}", f"rank {record['pp_rank']}", fold_text(units)]
         for k, (record, units) in enumerate(zip(stage_records(d, plan.graph),
                                                 stage_units(plan.graph, d.stages)))], words=3,
    )  # fmt: skip
    return figure(
        f"Map of {len(cols)} units and where their parameters lie.",
        [legend([(kind, name) for name, kind in kinds.items()]),
         el("div", rows, class_="rows map")],
        Html(behind + stages),
        note=f"Across: {fold_text([c.path for c in cols])}, in the order they run.",
    )  # fmt: skip


def _row(name: Children, found: Sequence[Run], *, kinds: dict[str, str]) -> Html:
    """A line of the map. kinds: colours of words; none: runs are told apart, narrow ones named."""
    drawn, strip = [], not kinds
    for i, run in enumerate(found):
        start, end = run.columns[0].start, run.columns[-1].end
        kind = f"strip-{i % 2}" if strip else kinds[run.word]
        drawn.append(el("rect", x=f"{100 * start:.3f}%", width=f"{100 * (end - start):.3f}%", y=0,
                        height=ROW_PX, class_=f"k-{kind}",
                        data_tip=f"{run.units}: {run.word}"))  # fmt: skip
        text = run.word.removeprefix("rank ") if strip else run.word
        if end - start >= (0.03 if strip else NAMED_SHARE):
            drawn.append(el("text", text, x=f"{50 * (start + end):.3f}%", y=15))
    chart = el("svg", drawn, class_="bar map", width="100%", height=ROW_PX, aria_hidden="true",
               focusable="false")  # fmt: skip
    return el("div", el("div", name, class_="what"), el("div", chart, class_="drawn"),
              class_="row wide")  # fmt: skip


def _kind(word: str) -> str:
    """The colour of a placement."""
    if word == "R":
        return "place-r"
    return {"S(0)": "place-s0", "S(1)": "place-s1"}.get(word, "place-s2")


def _meaning(word: str) -> str:
    return "R: whole on every tp rank" if word == "R" else f"{word}: split along dim {word[2:-1]}"
