"""Bounds of many meshes at once: their parts hold, against the costs they bound."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from test_hf import DEEPSEEK
from tiny_models import costs_of, graph_of, with_memory

from cost_models.decisions import Decisions
from cost_models.hardware import load_hardware
from cost_models.levels import Level
from cost_models.offload import update_kernels
from cost_models.schedule import schedule_illegal, simulate
from cost_models.state import ranks_of
from ir.capture import hf_cut
from planner.bound_chain import through_chain
from planner.bound_ranks import (
    Layers,
    Rows,
    bubble_s,
    flight,
    forced_s,
    least_layer,
    ranks_s,
)
from planner.bound_state import States
from planner.bounds import _Table, mesh_bounds_ps
from planner.capturing import capture
from planner.decisions import Pins
from planner.mesh import meshes
from planner.options import TraceOptions
from planner.search import Searcher
from planner.stages import solve
from planner.workload import Asked

ROUNDING = 1 + 1e-9


@pytest.mark.parametrize(("engine", "precision"), [
    ("native", "bf16"), ("native", "fp32"), ("megatron", "bf16"), ("deepspeed", "fp16"),
])  # fmt: skip
def test_every_way_to_hold_state_is_bounded(engine, precision):
    """Bytes of all units and of a layer, transient copies, what transfers add to a micro-batch, the
    tail and what hides of it, reserves: none is above what a variant of the mesh has, whatever
    ranks share it and rows that they do not divide. Of one way to share it the bytes are the
    variant's."""
    graph = graph_of("moe", precision)
    hardware = "h100x4" if precision == "bf16" else "t4x4"
    costs = costs_of(graph, hardware, seq_len=1024, global_batch=4, engine=engine,
                     precision=precision)  # fmt: skip
    found = list(meshes(costs.chain, costs.cluster, costs.workload, Pins()))[::3]
    costs.points = tuple(dict.fromkeys((m.micro_batch, m.cp) for m in found))
    searcher, states, seen, copied = Searcher(costs=costs), States(costs, Pins()), 0, 0
    layer = costs.kind_of[costs.chain.layers[0]]
    for mesh in found:
        laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
        sizes = states.sizes(laid, mesh.ep, mesh.etp, layer)
        ways = states.ways(mesh.pp > 1)
        axes = Decisions(tp=mesh.tp, sequence_parallel=mesh.sequence_parallel,
                         cp_kind=mesh.cp_kind, ep=mesh.ep, etp=mesh.etp)  # fmt: skip
        at = costs.points.index((mesh.micro_batch, mesh.cp))
        through = through_chain(costs, axes, laid)
        busy, ahead = through.kernels_s[at : at + 1], through.ahead_s[at : at + 1]
        known = [states, *(states.shared(n) for n in range(states.count(mesh)))]
        bounds = [{way: one.of(way, [mesh], [sizes], busy) for way in ways} for one in known]
        for d in searcher.variants(mesh):
            step = costs.step(d, laid)
            rows, all_rows = step.rows, [step.rows[k] for k in costs.kind_of]
            same = {(w.zero, w.reshard, w.offload): w for w in ways}
            alike = next((w for w in ways if w.zero and w.offload == d.offload), None)
            of_all, *of_each = (b[same.get((d.zero, d.reshard, d.offload), alike)] for b in bounds)
            ranks = ranks_of(d, False).shard, ranks_of(d, True).shard
            sharing = states.sharings.of(mesh, d.zero)
            nth = sharing.ranks.tolist().index([*ranks])
            tail = max(0, sum(r.tail_comm_ps - r.tail_hide_ps for r in all_rows))
            tail += sum(r.floor_ps + r.optimizer_ps + r.offload_ps for r in all_rows)
            added = (sum(sum(r.forward[-2:]) for r in all_rows),
                     sum(sum(r.backward[-2:]) for r in all_rows))  # fmt: skip
            for b in (of_all, of_each[nth]):
                assert b.state_bytes[0, 0] <= ROUNDING * sum(map(held_bytes, all_rows))
                assert b.state_bytes[0, 1] <= ROUNDING * held_bytes(rows[layer])
                assert b.gathered_bytes[0, 1] <= ROUNDING * rows[layer].state.gathered_bytes
                assert b.tail_s[0] * 1e12 <= ROUNDING * tail + 100
                share = costs.engine.fsdp_interference
                for each, kernels, more in zip(b.each_s, (ahead, busy - ahead), added):
                    assert max(share * each, each - kernels)[0] * 1e12 <= ROUNDING * more + 100
            if mesh.pp == 1:  # as it is costed, but for sums over tp and starts of updates
                beside = sum(costs.summed_s(d, r.state) for r in all_rows)
                starts = [
                    update_kernels(costs.engine, d, r.state) if "optimizer" in d.tiers else 1
                    for r in all_rows
                ]
                beside += costs.kernels.memory_bound_s(0, sum(starts))
                assert (of_each[nth].tail_s[0] + beside) * 1e12 * 1.001 + 100 >= tail
            assert of_each[nth].state_bytes[0, 1] * 1.01 >= held_bytes(rows[layer])
            copied += "params" in d.tiers and of_all.each_s[0, 0] > 0
            assert states.reserved(mesh) <= sum(size for _, size in step.reserved)
            seen += 1
    assert seen > 50 and (copied or engine != "native")


def held_bytes(row):
    return row.state.parameter_bytes + row.state.gradient_bytes + row.state.optimizer_bytes


def test_layers_that_ranks_can_take_equal_enumeration():
    """The least of the busiest rank over all numbers of layers by rank, recomputation by layer."""
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(60):
        pp, layers, m = int(rng.integers(2, 4)), int(rng.integers(4, 9)), int(rng.integers(1, 7))
        state, kept, room = rng.integers(1, 9) * 1e6, rng.integers(4, 9) * 1e6, rng.integers(9, 99)
        step, again = float(rng.integers(3, 9)), float(rng.integers(1, 4))
        way = rng.integers(0, 4, pp).cumsum() / 2
        freed = np.array([[kept / 2, again / kept], [kept / 4, 4 * again / kept]])
        below, price = rng.choice([0.0, 0.5]), float(rng.choice([0.3, 5.0])) * again / kept
        aside, sends = rng.choice([0.0, 6e6]) * bool(below), float(rng.integers(3)) / 2
        one = Rows(
            m=np.array([float(m)]), layer_s=np.array([step]), state_bytes=np.array([state]),
            kept_bytes=np.array([kept]), freed=freed[None], room_bytes=np.array([room * 1e6]),
            ends_s=np.array([[1.0, 2.0]]), ends_bytes=np.array([[2e6, 0.0]]),
            ends_kept=np.array([[0.0, 1e6]]), way_s=way[None],
            own_s=np.array([sends]), lowered=np.array([[state * below, price, aside]]),
        )  # fmt: skip
        flights = flight(pp, np.array([m]), "fused")[0]
        best = np.inf
        others = int(rng.integers(2))  # a layer of another kind, that a rank may have alone
        for counts in itertools.product(range(layers + 1), repeat=pp):
            if sum(counts) == layers and counts.count(0) <= others:
                busiest = 0.0
                for r, n in enumerate(counts):
                    if n == 0:
                        continue
                    first, last = float(r == 0), float(r == pp - 1)
                    held = n * kept + 1e6 * last
                    over = n * state + 2e6 * first + flights[r] * held
                    short = np.array([(over - room * 1e6) / flights[r]])
                    pieces = [*freed * np.array([[n, 1], [n, 1]])]
                    low = (n * state * below / flights[r], price * flights[r])
                    more = min(
                        forced_s(np.array(sorted(some, key=lambda p: p[1])), short + held_aside)[0]
                        for some, held_aside in (
                            (pieces, 0.0), ([*pieces, low], aside / flights[r])
                        )
                    )
                    each = n * step + more + first + 2 * last + sends
                    busiest = max(busiest, m * each + way[r])
                best = min(best, busiest)
        bound = ranks_s(one, pp, layers, "fused", None, others)[0]
        cap = m * (2 * -(-layers // pp) + 2) * step
        assert bound == pytest.approx(min(best, max(bound, cap)) if bound >= cap else best)
        found.add(bool(np.isinf(best)))
    assert found == {True, False}


def test_ranks_are_bounded_by_the_layers_that_hold_most(tmp_path):
    """Two layers of experts hold more than three without, and fill ranks before those do."""
    path = tmp_path / "config.json"
    small = hf_cut.cut(DEEPSEEK, 5, {"first_k_dense_replace": "3"}, "config.json")
    path.write_text(json.dumps({**small, "n_routed_experts": 16}))
    options = TraceOptions(model=str(path), hardware="h100x4", asked=Asked())
    costs = costs_of(capture(options), "h100x4", seq_len=256, global_batch=4)
    laid = Searcher(costs=costs).assign(1, False)
    through = through_chain(costs, Decisions(), laid)
    counts = [costs.kind_of.count(k) for k in range(len(costs.kinds))]
    assert 3 in counts and through.layer.count == counts[through.common] == 2
    assert any(node.op == "grouped_matmul" for node in costs.kinds[through.common][0].nodes)


def test_the_bubble_is_below_every_schedule_of_equal_layers():
    """Layers alike, cut evenly or at random: GPipe, 1F1B and interleaved as simulated. Where no
    interleaving is legal, 1F1B of equal stages comes close."""
    rng, tight = random.Random(1), []
    schedules = ("gpipe", "1f1b", "interleaved")
    for _ in range(400):
        pp, m, most = rng.randint(2, 6), rng.randint(1, 14), rng.randint(1, 3)
        layers, found = pp * most + rng.randint(0, pp - 1), []
        chunks = {"gpipe": (1,), "1f1b": (1,), "interleaved": range(2, most + 1)}
        for name, v in [(s, v) for s in schedules for v in chunks[s]]:
            if schedule_illegal(name, pp, m, v):
                continue
            n = [layers // (pp * v)] * (pp * v)
            for at in range(layers % (pp * v)):
                n[at if rng.random() < 0.5 else rng.randrange(pp * v)] += 1
            line = simulate(name, [100 * x for x in n], [200 * x for x in n], [0] * len(n),
                            [0] * (len(n) - 1), m, pp, v)  # fmt: skip
            found.append(line.makespan_ps)
        low = bubble_s(
            np.array([300.0 * layers]), np.array([m]), np.array([pp]), layers, schedules, 8
        )[0]  # fmt: skip
        assert 0 <= low <= min(found)
        tight += [low / min(found)] * (most == 1 and layers == pp)
    assert len(tight) > 10 and np.mean(tight) > 0.9


def test_a_shard_that_no_mesh_has_leaves_nothing_to_search():
    """Of 4 GPUs no data ranks divide by 3: without a fault, and without a plan."""
    costs = costs_of(graph_of("llama"), "h100x4", seq_len=128, global_batch=4)
    for zero in (1, 3):
        out = Searcher(costs=costs, pins=Pins(shard=3, zero=zero, micro_batch=1)).run()
        assert out.best is None and not out.solved


def bound_s(costs, pin, **more):
    """Bounds of meshes of a kind, each by itself, in seconds."""
    searcher = Searcher(costs=costs)
    found = list(meshes(costs.chain, costs.cluster, costs.workload, pin))
    costs.points = tuple(dict.fromkeys((m.micro_batch, m.cp) for m in found))
    bounds = mesh_bounds_ps(costs, found, searcher.assign, pins=pin, **more)
    return found, bounds.lower_ps / 1e12


def test_sends_take_of_every_ranks_time():
    """Over a slower network a pipeline's bound is longer by what its micro-batches' sends take of a
    rank's own time: of one stage a rank, or of two chunks, whichever is less."""
    graph, cluster = graph_of("llama", n_layers="8"), load_hardware("h100x4")
    found = {}
    for rate in (1e8, 1e9):
        inter = replace(cluster.inter, bytes_per_s=rate)
        costs = costs_of(graph, replace(cluster, domain_size=1, inter=inter), global_batch=8)
        found[rate] = bound_s(costs, Pins(pp=4, micro_batch=1))
    engine = costs.engine
    share = min(engine.p2p_exposed, 2 * engine.p2p_exposed_interleaved)
    for i, m in enumerate(found[1e8][0]):
        sent = sum(costs.boundary_bytes(Decisions(pp=4, dp=m.dp)))
        more = sent * (1 / 1e8 - 1 / 1e9) / inter.efficiency
        slower = found[1e8][1][i] - found[1e9][1][i]
        assert slower >= 0.999 * m.microbatches * 2 * share * more


def test_bounds_know_which_sends_cross_the_slow_level():
    """Two units of four GPUs far from each other: a pipeline sends over what joins them, or the
    data ranks reduce over it. No bound of a mesh is above the best of all its ways, those that ask
    of each sharing by itself are near, and far above what the nearest sends alone would take."""
    inner = Level(name="rail", kind="tree", ranks=4, bytes_per_s=1e10, efficiency=0.9,
                  latency_s=1e-5)  # fmt: skip
    far = replace(inner, name="wan", kind="wan", ranks=0, bytes_per_s=2e7, latency_s=6e-4)
    cluster = replace(load_hardware("h100x8"), domain_size=2, levels=(inner, far))
    costs = costs_of(graph_of("llama", n_layers="4"), cluster, global_batch=4, seq_len=512)
    searcher = Searcher(costs=costs)
    some = [m for m in meshes(costs.chain, cluster, costs.workload, Pins(micro_batch=1))
            if m.pp > 1 and m.cp == 1]  # fmt: skip
    costs.points = tuple(dict.fromkeys((m.micro_batch, m.cp) for m in some))
    both = [searcher._bounds(some, None, apart=apart).lower_ps for apart in (False, True)]
    near = []
    for m, once, apart in zip(some, *both):
        laid, best = searcher.assign(m.tp, m.sequence_parallel), None
        for d in searcher.variants(m):
            step = costs.step(d, laid)
            for one in searcher.schedules(d):
                found = solve(searcher.problem(step, one), incumbent_ps=best)
                best = found.step_ps if found.stages else best
        assert once <= apart <= best
        near.append((apart / best, once / best))
    apart, once = np.mean(near, axis=0)
    assert apart > 0.6 and apart > 2 * once


def test_what_is_never_computed_again_is_no_relief():
    """Compiled experts are not repeated under tp: where memory is short, no bound counts on it."""
    graph, cluster = graph_of("moe", size="8b-a1b", n_layers="4"), load_hardware("h100x4")
    tight = with_memory(cluster, int(30e9))
    found = {}
    for name, repeats in (("any", lambda tp: True), ("none", lambda tp: tp == 1)):
        costs = costs_of(graph, tight, global_batch=64, seq_len=8192)
        found[name] = bound_s(costs, Pins(tp=2, micro_batch=8), repeats=repeats)[1]
    assert not Searcher(costs=costs).repeats(2) and Searcher(costs=costs).repeats(1)
    assert np.all(found["none"] >= found["any"]) and np.any(found["none"] > 1.01 * found["any"])


TWO_KINDS = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 1024,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 1024,
    "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 1024,
    "layer_types": ["sliding_attention", "full_attention"] * 8,
}  # fmt: skip


def test_layers_of_kinds_almost_alike_fill_ranks_together(tmp_path, monkeypatch):
    """Where each of two kinds is half of the layers, ranks are bounded by what all of them are: by
    one kind alone half of their memory would be free."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TWO_KINDS))
    graph = capture(TraceOptions(model=str(path), hardware="h100x4", asked=Asked()))
    tight = with_memory(load_hardware("h100x4"), int(5e9))
    pin, found = Pins(pp=4, micro_batch=4, offload=()), {}
    for counted in ("both", "one"):
        if counted == "one":
            monkeypatch.setattr(_Table, "_counted", ("layer",))
        costs = costs_of(graph, tight, global_batch=32, seq_len=4096)
        found[counted] = bound_s(costs, pin, apart=True)[1]
    laid = Searcher(costs=costs).assign(1, False)
    through = through_chain(costs, Decisions(), laid)
    assert through.every.count == 16 and through.layer.count == 8
    assert np.all(found["both"] >= found["one"]) and np.any(found["both"] > 1.01 * found["one"])


def test_a_layer_no_harder_than_any_is_computed_again_for_no_more():
    rng = np.random.default_rng(0)
    for _ in range(50):
        kinds = []
        for pieces in rng.integers(1, 4, size=2):
            size = rng.integers(0, 5, size=(pieces, 1)) * 1e6
            rate = np.sort(rng.random((pieces, 1)), axis=0)
            freed = np.stack([size, np.where(size > 0, rate, 0.0)], axis=1)
            numbers = rng.random((3, 1))
            kinds.append(Layers(
                count=1, step_s=numbers[0], kept_bytes=numbers[1], working_bytes=numbers[2],
                freed=freed, again_freed=freed,
            ))  # fmt: skip
        least = least_layer(kinds)
        assert least.count == 2
        for kind, over in itertools.product(kinds, (0.0, 1e6, 5e6, 9e6)):
            assert least.step_s <= kind.step_s and least.kept_bytes <= kind.kept_bytes
            short = np.array([over])
            assert forced_s(least.freed, short) <= forced_s(kind.freed, short) * ROUNDING
