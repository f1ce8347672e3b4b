"""A way to hold the state that is left out is beaten by one that is kept, whatever the stages."""

import random

import pytest
from tiny_models import costs_of, graph_of

from cost_models.stage_problem import evaluate
from planner.decisions import Pins
from planner.dominance import undominated
from planner.mesh import meshes
from planner.search import Searcher


def choices(problem, count, rng):
    """So many cuts of the layers, each with what it recomputes."""
    for _ in range(count):
        ends = sorted(rng.sample(range(1, problem.layers), problem.count - 1))
        stages = [b - a for a, b in zip([0, *ends], [*ends, problem.layers])]
        full = [rng.randint(0, n) for n in stages]
        yield stages, [(k, rng.randint(0, n - k)) for k, n in zip(full, stages)]


@pytest.mark.parametrize("model", ["llama", "moe"])
def test_what_is_left_out_is_beaten(model):
    """Step and bytes of every rank, simulated, of 1F1B, GPipe and no pipeline."""
    graph, rng = graph_of(model), random.Random(0)
    costs = costs_of(graph, "h100x16", seq_len=1024, global_batch=32)
    found = [m for m in meshes(costs.chain, costs.cluster, costs.workload, Pins()) if m.dp > 2]
    costs.points = tuple(dict.fromkeys((m.micro_batch, m.cp) for m in found))
    searcher, left_out = Searcher(costs=costs), 0
    for mesh in found[::23]:
        laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
        rows = [(d, costs.step(d, laid)) for d in searcher.variants(mesh)]
        kept = undominated(rows)
        for d, step in rows:
            if any(d == other for other, _ in kept):
                continue
            left_out += 1
            for made in searcher.schedules(d):
                if made.virtual_stages > 1:
                    continue
                problem = searcher.problem(step, made)
                tried = [*choices(problem, 3, rng)]
                at = [searcher.schedules(other) for other, _ in kept]
                rivals = [
                    searcher.problem(one, next(o for o in all_of if o.schedule == made.schedule))
                    for (_, one), all_of in zip(kept, at)
                ]
                mine = [evaluate(problem, *choice)[:2] for choice in tried]
                assert any(
                    all(a[0] <= b[0] and all(x <= y for x, y in zip(a[1], b[1]))
                        for a, b in zip([evaluate(p, *c)[:2] for c in tried], mine))
                    for p in rivals
                )  # fmt: skip
    assert left_out
