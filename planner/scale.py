"""Steps that are too large to plan: costs are whole picoseconds, and there is no such training."""

from __future__ import annotations

from cost_models.decisions import Decisions, Workload
from cost_models.hardware import Cluster
from cost_models.step import Costs, replicated
from ir.errors import UsageError
from ir.graph import Graph
from planner.mesh import MOST_MICRO_BATCH

LONGEST_STEP_S = 86_400  # on all GPUs: a day. Searches have room for ten times it (NEVER_PS)
LIGHT = 1e16, 1 << 20  # parameters * tokens a GPU, and tokens a sample, that are surely within both
LONGEST_UNIT_S = 10_000  # of one sample on one GPU; the layouts' program has room for ten times it


def check_scale(graph: Graph, cluster: Cluster, workload: Workload) -> None:
    """Raise UsageError for a batch or a sequence whose step no search can count."""
    tokens = workload.global_batch * workload.seq_len / cluster.count
    if graph.parameter_count * tokens <= LIGHT[0] and workload.seq_len <= LIGHT[1]:
        return
    batch = MOST_MICRO_BATCH  # of small units launches are most of what a single sample takes
    d = Decisions(micro_batch=batch)
    costs = Costs(graph=graph, cluster=cluster, workload=workload, points=((batch, 1),))
    took = [
        sum((*point.forward, *point.backward, point.weight_ps)) / batch / 1e12
        for point in (costs.at(d, unit, is_layer, replicated(unit, 1))
                      for unit, is_layer, _ in costs.kinds)
    ]  # fmt: skip
    longest = max(took)
    if longest > LONGEST_UNIT_S:
        raise UsageError(
            f"--seq-len {workload.seq_len}: a sample takes {longest:,.0f} s in one unit of"
            f" {graph.name} alone",
            why=f"planned are units of {LONGEST_UNIT_S:,} s a sample at most, on one GPU",
            hints=("a shorter --seq-len",),
        )  # fmt: skip
    sample_s = sum(took[kind] for kind in costs.kind_of)
    step_s = sample_s * workload.global_batch / cluster.count
    if step_s > LONGEST_STEP_S:
        raise UsageError(
            f"a step of {workload.global_batch:,} samples of {workload.seq_len:,} tokens takes"
            f" some {step_s / 86_400:,.0f} days on {cluster.spec}",
            why="planned are steps of a day at most",
            hints=("a smaller --global-batch", "more GPUs"),
        )  # fmt: skip
