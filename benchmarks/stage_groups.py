"""Whether another tp on the first and on the last stages pays on one kind of GPU.

    python benchmarks/stage_groups.py --size 70b --hardware h100x96 --global-batch 512
                                      --seq-len 2048 [--model FILE] [--effort N] [--axis-gain 0%]

The plan of the hardware as one group, then every division of it into two groups of whole nodes
(`h100x48+h100x48`; of one node, of so many GPUs), each for pipelines with a tp of each group alone,
beginning from the best so far. What is compared is predicted time, so an axis need earn nothing
unless --axis-gain says so. At most 16 divisions are tried, evenly spaced.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cost_models.estimate import whole_step_ps  # noqa: E402
from cost_models.fleet import Fleet, load_any  # noqa: E402
from cost_models.hardware import load_hardware  # noqa: E402
from ir.errors import PlanError  # noqa: E402
from planner.capturing import Clock, capture  # noqa: E402
from planner.fleet_search import FleetSearch, searchers  # noqa: E402
from planner.fleet_space import FleetSearcher  # noqa: E402
from planner.limits import parse_share  # noqa: E402
from planner.options import TraceOptions  # noqa: E402
from planner.tracing import attempt  # noqa: E402
from planner.workload import Asked, resolve  # noqa: E402

if TYPE_CHECKING:
    from cost_models.decisions import Decisions

MOST_DIVISIONS = 16


def words(d: Decisions) -> str:
    """The mesh of a plan, and its stages."""
    tps = "/".join(str(tp) for _, tp in d.tp_by_part) or d.tp
    parts = f", stages {'+'.join(str(n) for _, n in d.parts)}" if d.tp_by_part else ""
    return f"pp {d.pp} dp {d.dp} cp {d.cp} tp {tps}, {d.schedule}{parts}"


def divisions(spec: str) -> list[str]:
    """The hardware in two groups, as `--hardware` takes them."""
    whole = load_hardware(spec)
    unit = whole.node_size if whole.count > whole.node_size else 1
    firsts = range(unit, whole.count, unit)
    some = {firsts[i * len(firsts) // MOST_DIVISIONS] for i in range(MOST_DIVISIONS)}
    name = whole.spec.rpartition("x")[0]
    return [f"{name}x{n}+{name}x{whole.count - n}" for n in sorted(some)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "llama.py"))
    parser.add_argument("--size", default="8b")
    parser.add_argument("--hardware", required=True, metavar="NAMExCOUNT")
    parser.add_argument("--global-batch", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--effort", type=int, default=0, help="of one group, half for a division")
    parser.add_argument("--axis-gain", default="0%", help="as of plan trace")
    asked = parser.parse_args(arguments)
    options = TraceOptions(
        model=asked.model, hardware=asked.hardware, args=(("size", asked.size),),
        asked=Asked(global_batch=asked.global_batch, seq_len=asked.seq_len), effort=asked.effort,
        gain_ppm=round(parse_share(asked.axis_gain, "gain") * 1e6),
    )  # fmt: skip
    cluster = load_hardware(asked.hardware)
    graph = capture(options, cluster)
    workload, _ = resolve(graph, cluster, options.asked, options.pins)
    result, searcher, out = attempt(graph, options, cluster, Clock())
    best, costs = out.best, searcher.costs
    if result is not None and best is not None:
        step_ps = whole_step_ps(costs, best.objective_ps)
        print(f"{asked.hardware}: {step_ps / 1e12:.4g} s, gap {out.gap:.1%},"
              f" {words(best.decisions)}", flush=True)  # fmt: skip
    for spec in divisions(asked.hardware):
        fleet = load_any(spec)
        assert isinstance(fleet, Fleet)
        found = FleetSearch(fleet=fleet, workload=workload)
        if best is not None:
            found.know(best, costs)
        first = tuple(part.name for part in fleet.parts)
        for one in searchers(graph, fleet, workload, options):
            if (isinstance(one, FleetSearcher) and one.apart
                    and tuple(part.name for part in one.clusters) == first):  # fmt: skip
                found.search(one)
        if found.best is best or found.best is None or found.costs is None:
            print(f"{spec}: none better", flush=True)
            continue
        less = found.step_ps / whole_step_ps(costs, best.objective_ps) - 1 if best else 0
        print(f"{spec}: {found.step_ps / 1e12:.4g} s ({less:+.2%}), {words(found.decisions)}",
              flush=True)  # fmt: skip
        best, costs = found.best, found.costs
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except PlanError as fault:
        raise SystemExit("\n".join(fault.lines())) from fault
