"""The plan that the search chooses beside the configurations that experts published.

    python benchmarks/published_plans.py RUNS.yaml [--gpus 64] [--groups WORD] [--effort N]
                                         [--axis-gain 0%] [--part 1/8] [--json]

For each group of runs of one model, cluster and workload on so many GPUs or more: the predicted
step of every published configuration, and of the plan chosen for the same model, cluster, workload,
engine, switches and format of gradients. What is compared is predicted time, so an axis need earn
nothing unless --axis-gain says so (`plan trace` has 2%). A row says by how much the plan is quicker
than the quickest published configuration that fits by prediction; those that do not fit are no
plans of the space. Exit 1 where one is slower.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from cost_models.chain import chain_of
from cost_models.estimate import whole_step_ps
from cost_models.step import Costs
from ir.errors import PlanError
from planner.decisions import Pins
from planner.limits import parse_share
from planner.mesh import meshes
from planner.search import Searcher
from planner.validation.configure import Case, configure
from planner.validation.predict import costs_of, predict, prepare
from planner.validation.rows import Skipped, read_runs

SAME = 1e-6  # of a step: rounding
WORDS = ("pp", "dp", "cp", "tp", "ep", "etp", "zero", "micro_batch", "schedule", "virtual_stages")


def groups_of(path: Path, gpus: int) -> dict[tuple[str, ...], list[Case]]:
    """Cases between which a planner could choose: equal in all but the decisions."""
    found: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for run in read_runs(path):
        try:
            case = configure(run)
        except (Skipped, PlanError, KeyError, TypeError, ValueError):
            continue
        if case.cluster.count >= gpus and not run.oom:
            key = (run.group, repr(case.args), case.cluster.spec, repr(case.workload),
                   case.engine.name, repr(case.switches), case.decisions.grad_dtype)  # fmt: skip
            found[key].append(case)
    return found


def costs_of_all(case: Case, graph: Any) -> Costs:
    """As `costs_of`, at every work point of the space and of the published configuration."""
    from dataclasses import replace

    made = costs_of(case, graph)
    chain = chain_of(graph)
    points = dict.fromkeys(
        (m.micro_batch, m.cp) for m in meshes(chain, case.cluster, case.workload, Pins())
    )
    points[1, 1] = None
    return replace(made, points=tuple(points))


def compare(cases: list[Case], effort: int | None, gain_ppm: int) -> dict[str, Any]:
    """A group's row. Raises Skipped where none of its configurations can be laid out."""
    published, reasons = [], []
    for case in cases:
        try:
            prepared = prepare(case)
            made = predict(prepared)
        except (Skipped, PlanError) as fault:
            reasons.append(str(fault))
            continue
        published.append((made.step_time_s, made.peak_bytes <= made.capacity_bytes, prepared, made))
    if not published:
        raise Skipped(reasons[0])
    best = min(published, key=lambda row: (not row[1], row[0]))
    first = best[2]
    costs = costs_of_all(first.case, first.graph)
    numerics = Pins(grad_dtype=first.case.decisions.grad_dtype)  # theirs to choose, as precision
    searcher = Searcher(costs=costs, pins=numerics)
    searcher.effort, searcher.gain_ppm = effort or searcher.effort, gain_ppm
    start = time.perf_counter()
    out = searcher.run()
    seconds = time.perf_counter() - start
    d = out.best.decisions if out.best else None
    chosen = whole_step_ps(costs, out.best.objective_ps) / 1e12 if out.best else None
    return {
        "group": first.case.run.group, "gpus": first.case.cluster.count,
        "kind": "moe" if first.case.run.is_moe else "dense", "published": len(published),
        "published_s": best[0], "published_fits": best[1], "chosen_s": chosen,
        "quicker": best[0] / chosen - 1 if chosen else None, "gap": out.gap,
        "decisions": {k: getattr(d, k) for k in WORDS} if d else None,
        "theirs": {k: getattr(best[2].case.decisions, k) for k in WORDS},
        "theirs_id": best[2].case.run.id, "search_s": seconds,
    }  # fmt: skip


def summary(found: list[dict[str, Any]], slower: list[dict[str, Any]], over: int) -> str:
    """By how much, and of how many groups no published configuration fits."""
    text = f"{len(found)} groups"
    if found:
        by = sorted(r["quicker"] for r in found)
        text += f": quicker by {by[0]:.1%} to {by[-1]:.1%}, {median(by):.1%} (median)"
    text += f"; slower than a published configuration: {len(slower)}"
    return text + f"; of {over} more none that fits by prediction was published" * (over > 0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--groups", default="", help="only groups with this in their name")
    parser.add_argument("--effort", type=int)
    parser.add_argument("--axis-gain", default="0%", help="as of plan trace")
    parser.add_argument("--part", default="1/1", help="every so many groups: 2/8 is 2nd, 10th ...")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    rows = []
    named = [row for row in groups_of(asked.runs, asked.gpus).items() if asked.groups in row[0][0]]
    first, parts = map(int, asked.part.split("/"))
    for key, cases in named[first - 1 :: parts]:
        try:
            row = compare(cases, asked.effort, round(parse_share(asked.axis_gain, "gain") * 1e6))
        except (Skipped, PlanError) as fault:
            print(f"{key[0]}: skipped, {fault}", file=sys.stderr)
            continue
        rows.append(row)
        said = "no plan" if row["quicker"] is None else f"{row['quicker']:+7.1%}"
        fits = "" if row["published_fits"] else "  (published: over memory)"
        if not asked.json:
            print(f"{row['group'][:44]:45}{row['gpus']:6} {row['published_s']:9.3f} s"
                  f" {row['chosen_s'] or 0:9.3f} s {said} gap {row['gap']:5.1%}"
                  f" {row['search_s']:5.1f} s{fits}", flush=True)  # fmt: skip
    if asked.json:
        json.dump(rows, sys.stdout, indent=1)
    found = [r for r in rows if r["quicker"] is not None and r["published_fits"]]
    slower = [r for r in found if r["quicker"] < -SAME]
    if rows and not asked.json:
        print(summary(found, slower, len(rows) - len(found)))
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
