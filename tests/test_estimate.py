"""An estimate adds up, says what the search minimised, and its ledger is the textbook's."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from tiny_models import costs_of, graph_of, with_memory

from cost_models.decisions import Decisions
from cost_models.estimate import estimate, estimate_step, whole_step_ps
from cost_models.hardware import load_hardware
from cost_models.ledger import BREAKDOWN, MEMORY
from cost_models.schedule import rank_of
from cost_models.words import sharding_of
from planner.decisions import Pins, Recompute
from planner.mesh import meshes
from planner.search import Searcher

SEQ = 8192


def planned(name, hardware="h100x8", batch=8, *, memory=None, compiled=True, args=None, **pins):
    """(costs, best of the search under pins, its estimate)."""
    graph = graph_of(name, **(args or {}))
    cluster = load_hardware(hardware)
    cluster = cluster if memory is None else with_memory(cluster, memory)
    costs = costs_of(graph, cluster, seq_len=SEQ, global_batch=batch)
    found = meshes(costs.chain, cluster, costs.workload, Pins(**pins))
    costs.points = (*dict.fromkeys((m.micro_batch, m.cp) for m in found), (3, 1), (1, 4))
    costs.compiled = compiled
    best = Searcher(costs=costs, pins=Pins(**pins)).run().best
    assert best is not None
    d = best.decisions
    return costs, best, estimate_step(costs, costs.step(d, best.assignments), d)


FULL = Recompute(full=(-1,))
BELOW = (("optimizer", "cpu"), ("params", "cpu"))
CASES = {
    **{f"zero {z}": {"zero": z, "tp": 1, "cp": 1, "pp": 1} for z in range(4)},
    "zero 3, gathered again": {"zero": 3, "reshard": True, "pp": 1, "tp": 1, "cp": 1},
    **{f"zero {z} under a pipeline": {"zero": z, "pp": 2} for z in range(4)},
    **{f"cp {kind}": {"cp": 2, "cp_kind": kind} for kind in ("ring", "allgather", "ulysses")},
    **{f"schedule {s}": {"pp": 2, "schedule": s} for s in ("1f1b", "gpipe", "interleaved")},
    **{f"schedule {s}": {"pp": 2, "schedule": s, "compiled": False}
       for s in ("zbh1", "zbv", "dualpipev")},
    "groups": {"hardware": "h100x16", "batch": 16, "zero": 3, "shard": 8, "pp": 1, "tp": 1},
    "recomputed": {"recompute": FULL, "pp": 2},
    "in part": {"recompute": Recompute(selective=(-1,)), "tp": 2},
    "host": {"offload": (("optimizer", "cpu"),)},
    "activations": {"offload": (("activations", "cpu"),), "pp": 2},
    "activations recomputed": {"offload": (("activations", "cpu"),), "recompute": FULL},
    "some recomputed": {"offload": (("activations", "cpu"),), "recompute": Recompute(full=(1,))},
    "all below": {"offload": (*BELOW, ("activations", "cpu")), "zero": 3, "pp": 1, "tp": 1},
    "params under a pipeline": {"offload": BELOW, "zero": 3, "pp": 2},
    "disk": {"offload": (("optimizer", "nvme"),)},
    "tp": {"tp": 4, "sequence_parallel": True},
    "tp whole": {"tp": 4, "sequence_parallel": False},
    "ep": {"ep": 4, "zero": 1},
    "ep etp": {"ep": 2, "etp": 2, "pp": 2},
    "all": {"pp": 2, "tp": 2, "cp": 2},
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    """(costs, best, estimate): a dense model, a mixture where experts are laid out."""
    pins = CASES[request.param]
    name = "moe" if {"ep", "zero", "cp"} & set(pins) else "llama"
    return planned(name, args={"n_layers": 4}, **pins)


def test_breakdown_sums_to_the_step(case):
    _, _, e = case
    assert [k for k, _ in e.breakdown_ps] == list(BREAKDOWN)
    assert sum(v for _, v in e.breakdown_ps) == e.step_time_ps
    assert all(v >= 0 for _, v in e.breakdown_ps), e.breakdown_ps


def test_memory_sums_to_the_peak(case):
    _, _, e = case
    for rank in e.ranks:
        assert [k for k, _ in rank.memory_bytes] == list(MEMORY)
        assert all(v >= 0 for _, v in rank.memory_bytes), rank.memory_bytes
    assert e.peak_memory_bytes == max(sum(v for _, v in r.memory_bytes) for r in e.ranks)
    assert e.fits


def test_estimate_is_what_the_search_minimised(case):
    """From words and decisions alone, as a plan file has them."""
    costs, best, e = case
    assert e.step_time_ps == whole_step_ps(costs, best.objective_ps)
    words = {unit.name: sharding_of(unit, a) for (unit, _), a in best.assignments.items()}
    if costs.compiled:
        d = best.decisions
        assert estimate(costs.graph, costs.cluster, costs.workload, d, words) == e


def test_pins_hold(case):
    """Each rank's ledger has the axes that the decisions use, and no others."""
    _, best, e = case
    d = best.decisions
    used = {c.axis for r in e.ranks for c in r.collectives}
    assert ("tp" in used) == (d.tp > 1)
    assert ("cp" in used) == (d.cp > 1)
    assert ("pp" in used) == (d.pp > 1)
    assert ("ep" in used) == (d.ep > 1)
    assert ("etp" in used) == (d.etp > 1)
    assert ("dp" in used) == (d.dp * d.cp > 1)


def sent(rank, axis, where=""):
    """(kind, bytes) -> count of one rank's collectives of an axis."""
    found = Counter()
    for c in rank.collectives:
        if c.axis == axis and where in c.where:
            found[c.kind, c.size_bytes] += c.count
    return found


def layer_name(costs):
    return next(u.name for u, is_layer, _ in costs.kinds if is_layer)


def test_tensor_parallel_traffic_of_a_llama_layer():
    """2 all-gathers and 2 reduce-scatters each way, per layer and micro-batch, of b s H."""
    args = {"size": "8b", "n_layers": 2}
    costs, best, e = planned("llama", args=args, tp=8, sequence_parallel=True, pp=1,
                             micro_batch=1, recompute=Recompute())  # fmt: skip
    m, layers = best.decisions.microbatches, 2
    size = 1 * SEQ * 4096 * 2
    assert sent(e.ranks[0], "tp", f"{layer_name(costs)}:") == {
        ("all_gather", size): 4 * layers * m,
        ("reduce_scatter", size): 4 * layers * m,
    }
    _, best, again = planned("llama", args=args, tp=8, sequence_parallel=True, pp=1,
                             micro_batch=1, recompute=FULL)  # fmt: skip
    assert sent(again.ranks[0], "tp", f"{layer_name(costs)}:") == {
        ("all_gather", size): 6 * layers * m,  # the forward's once more
        ("reduce_scatter", size): 6 * layers * m,
    }


PSI = 4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64  # of a tiny Llama's layer: q, o 64x64,
# k, v half as wide, three feed-forward weights, two norms


@pytest.mark.parametrize(
    ("pins", "gathers", "reduces"),
    [
        ({"zero": 3, "reshard": True}, lambda m: 2 * m, lambda m: m),
        ({"zero": 3, "reshard": False}, lambda m: m, lambda m: m),
        ({"zero": 2}, lambda m: 1, lambda m: m),
        ({"zero": 1}, lambda m: 1, lambda m: 1),
        ({"zero": 3, "pp": 2}, lambda m: 1, lambda m: 1),
        ({"zero": 2, "pp": 2}, lambda m: 1, lambda m: 1),
    ],
)  # fmt: skip
def test_data_parallel_traffic(pins, gathers, reduces):
    """Gathers of 2 bytes and fp32 reductions of 4, of each layer's parameters."""
    more = {"pp": 1, "tp": 1, "cp": 1, "micro_batch": 1} | pins
    costs, best, e = planned("llama", batch=32, args={"n_layers": 2}, **more)
    d = best.decisions
    m, layers = d.microbatches, 2 // d.pp
    assert m == 32 // d.dp > 1
    assert sent(e.ranks[0], "dp", layer_name(costs)) == {
        ("all_gather", 2 * PSI): gathers(m) * layers,
        ("reduce_scatter", 4 * PSI): reduces(m) * layers,
    }


def test_norm_gradients_are_summed_over_tp_once_a_step():
    """Under sequence parallelism a norm's weight is whole and sees a share of the tokens: the
    gradient of each of a layer's two, hidden wide, is all-reduced once. FSDP2 sums each before it
    reduces it, with one micro-batch as it was computed: 2 bytes an element."""
    args = {"size": "8b", "n_layers": 2}  # wide enough that its matrices are split
    costs, best, estimate = planned("llama", args=args, pp=1, tp=8, sequence_parallel=True)
    assert best.decisions.microbatches == 1
    unit = costs.chain.links[costs.chain.layers[0]].unit
    norms = [p.tensor.numel() for p in unit.parameters if len(p.tensor.shape) == 1]
    assert norms == [4096, 4096]
    rows = [c for c in estimate.ranks[0].collectives if c.where == f"{unit.name} gradients"]
    assert [(c.kind, c.axis, c.size_bytes, c.count) for c in rows] == [
        ("all_reduce", "tp", 2 * 4096, len(norms) * len(costs.chain.layers))
    ]


def test_replicated_gradients_are_all_reduced_once():
    costs, _, e = planned("llama", batch=32, args={"n_layers": 2}, pp=1, tp=1, cp=1, zero=0)
    assert sent(e.ranks[0], "dp", layer_name(costs)) == {("all_reduce", 4 * PSI): 2}


def test_groups_also_reduce_their_shards():
    """HSDP, 2 groups of 8: beside FSDP's, an all-reduce of a rank's eighth, each micro-batch."""
    costs, best, e = planned("llama", "h100x16", 32, args={"n_layers": 2}, pp=1, tp=1, cp=1,
                             zero=3, reshard=True, shard=8, micro_batch=1)  # fmt: skip
    m = best.decisions.microbatches
    assert sent(e.ranks[0], "dp", layer_name(costs)) == {
        ("all_gather", 2 * PSI): 2 * m * 2,
        ("reduce_scatter", 4 * PSI): m * 2,
        ("all_reduce", 4 * PSI // 8): m * 2,
    }


@pytest.mark.parametrize(("ep", "etp"), [(4, 1), (2, 2), (8, 1)])
def test_expert_traffic(ep, etp):
    """Dispatch and combine: two all-to-alls forward, two backward, of b s k H each."""
    _, best, e = planned("moe", args={"n_layers": 2}, ep=ep, etp=etp, pp=1, tp=1, cp=1,
                             micro_batch=1, recompute=Recompute(), zero=1)  # fmt: skip
    m, size = best.decisions.microbatches, SEQ * 2 * 64 * 2
    assert sent(e.ranks[0], "ep") == {("all_to_all", size): 4 * 2 * m}
    if etp > 1:
        assert sent(e.ranks[0], "etp") == {
            ("all_gather", size * etp): 2 * 2 * m, ("reduce_scatter", size * etp): 2 * 2 * m,
        }  # fmt: skip
    experts = 3 * 8 * 64 * 128 // (ep * etp)
    dp = sent(e.ranks[0], "edp")
    edp = 8 // (ep * etp)
    assert dp == ({("all_gather", 2 * experts): 2, ("reduce_scatter", 4 * experts): 2}
                  if edp > 1 else {})  # fmt: skip


@pytest.mark.parametrize("cp", [2, 4])
def test_context_traffic(cp):
    """Ring: cp - 1 sends of K and V, in backward again, and of their gradients. The others once for
    each tensor."""
    more = {"args": {"n_layers": 2}, "batch": 4, "hardware": "h100x4", "pp": 1, "tp": 1, "cp": cp,
            "micro_batch": 1, "recompute": Recompute()}  # fmt: skip
    local = SEQ // cp
    q, kv = 2 * local * 64, 2 * local * 64  # two key heads of 16, K and V
    _, best, e = planned("llama", cp_kind="ring", **more)
    m = best.decisions.microbatches
    assert sent(e.ranks[0], "cp") == {("p2p", kv): 3 * (cp - 1) * 2 * m}
    _, _, e = planned("llama", cp_kind="allgather", **more)
    assert sent(e.ranks[0], "cp") == {
        ("all_gather", kv * cp): 2 * 2 * m, ("reduce_scatter", kv * cp): 2 * m,
    }  # fmt: skip
    if cp == 2:  # two key heads
        _, _, e = planned("llama", cp_kind="ulysses", **more)
        rows = [c for c in e.ranks[0].collectives if c.axis == "cp"]
        assert {c.kind for c in rows} == {"all_to_all"}
        # q and o, then k and v, of a rank, each way
        assert sum(c.size_bytes * c.count for c in rows) == 2 * 2 * m * (2 * q + kv)


@pytest.mark.parametrize(
    ("schedule", "virtual"),
    [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zbh1", 1), ("zbv", 2), ("dualpipev", 2)],
)
def test_pipeline_traffic(schedule, virtual):
    """Over all ranks: every boundary between ranks is crossed once each way a micro-batch."""
    pp = 2
    _, best, e = planned(
        "llama", args={"n_layers": 4}, pp=pp, tp=1, cp=1, micro_batch=1, schedule=schedule,
        virtual_stages=virtual, compiled=schedule not in ("zbh1", "zbv", "dualpipev"), batch=32,
    )  # fmt: skip
    stages = pp * virtual
    crossed = sum(rank_of(schedule, pp, k) != rank_of(schedule, pp, k + 1)
                  for k in range(stages - 1))  # fmt: skip
    found = [sent(r, "pp") for r in e.ranks]
    assert {key for f in found for key in f} == {("p2p", SEQ * 64 * 2)}
    total = sum(n for f in found for n in f.values())
    assert total == 2 * best.decisions.microbatches * crossed


def test_seconds_of_the_ledger_are_within_the_step(case):
    """Nothing is exposed longer than it takes, and one rank's exposed time fits in the step."""
    _, _, e = case
    for rank in e.ranks:
        assert all(0 <= c.exposed_s <= c.total_s * (1 + 1e-9) for c in rank.collectives)
        assert sum(c.exposed_s for c in rank.collectives) <= e.step_time_s


def test_nvme_is_slower_than_host_memory_than_none():
    times = [
        planned("llama", args={"size": "8b", "n_layers": 2}, pp=1, tp=1, cp=1, zero=1,
                micro_batch=1, recompute=Recompute(), offload=o)[2]
        for o in ((), (("optimizer", "cpu"),), (("optimizer", "nvme"),))
    ]  # fmt: skip
    assert times[0].step_time_ps < times[1].step_time_ps < times[2].step_time_ps
    parts = [dict(t.breakdown_ps) for t in times]
    assert parts[0]["offload"] == 0 < parts[1]["offload"] < parts[2]["offload"]
    assert parts[0]["optimizer"] > 0 == parts[1]["optimizer"] == parts[2]["optimizer"]
    assert times[0].peak_memory_bytes > times[1].peak_memory_bytes == times[2].peak_memory_bytes


def test_cost_is_monotone_in_bytes():
    """More layers, a longer sequence, a larger batch: never quicker, never smaller."""
    base = Decisions(dp=8, zero=3, shard=8, recompute=((0, 0),))

    def step(args, seq, batch):
        graph = graph_of("llama", **args)
        costs = costs_of(graph, "h100x8", ((1, 1),), seq_len=seq, global_batch=batch)
        d = replace(base, microbatches=batch // 8, stages=(args["n_layers"],))
        laid = Searcher(costs=costs).assign(1, False)
        return estimate_step(costs, costs.step(d, laid), d)

    for a, b in itertools.pairwise([
        step({"n_layers": 2}, 2048, 8), step({"n_layers": 2}, 4096, 8),
        step({"n_layers": 4}, 4096, 8), step({"n_layers": 4}, 4096, 16),
    ]):  # fmt: skip
        assert a.step_time_ps < b.step_time_ps
        assert a.peak_memory_bytes <= b.peak_memory_bytes
        assert a.model_flop < b.model_flop


def test_model_flop_is_6n_and_attention():
    """Llama 8B: 6 FLOPs a token and parameter beside the table, 12 L s H of full attention."""
    graph = graph_of("llama", size="8b")
    _, _, e = planned("llama", args={"size": "8b"}, batch=32)
    n = graph.parameter_count - 128256 * 4096  # looked up, not multiplied
    n -= 65 * 4096  # norms
    expected = (6 * n + 12 * 32 * SEQ * 4096) * SEQ * 32
    assert abs(e.model_flop / expected - 1) < 1e-6
    assert e.tokens == SEQ * 32


def test_a_step_of_another_schedule_is_the_step_costed_anew():
    """GPT's head is its embedding: on a V both ends are on one rank, and nothing is sent there."""
    costs = costs_of(graph_of("gpt"), "h100x4", seq_len=32, global_batch=32, engine="native")
    assign = Searcher(costs=costs).assign(1, False)
    ways = [
        Decisions(pp=2, dp=2, zero=1, shard=2, microbatches=16, compile=False, schedule=name,
                  virtual_stages=1 if name in ("1f1b", "zbh1") else 2)
        for name in ("1f1b", "zbh1", "interleaved", "zbv", "dualpipev")
    ]  # fmt: skip
    steps = [costs.step(d, assign) for d in ways]
    assert any(row.copied for row in steps[0].rows)
    assert steps[0].rows != steps[3].rows
    for step in steps:
        for d, anew in zip(ways, steps):
            assert costs.rescheduled(step, d) == anew
