"""Tiers below the device that are too full for all that would be laid there."""

import itertools
import random
import re
from dataclasses import fields, replace

import pytest
from enumerated import (
    MESH_AXES,
    SCHEDULE_AXES,
    STATE_AXES,
    _schedule,
    cuts,
    product,
    recomputed,
    stage_choices,
)
from random_problems import BIG_MOE, INTER, SMALL, WIDE, make, small_cluster
from test_offload_layers import BASE, stepped
from test_stages import choices, weigh
from test_stages import tiny as tiny_problem
from tiny_models import costs_of, graph_of

from cost_models.decisions import Decisions
from cost_models.estimate import stage_problem
from cost_models.hardware import load_hardware
from cost_models.rank_ledger import tier_uses
from cost_models.stage_problem import Room, below_bytes, evaluate
from cost_models.tiers import Tier, fullest, together
from planner.decisions import Pins, parse_pins
from planner.infeasible import infeasible
from planner.legality import illegal
from planner.mesh import Mesh
from planner.score import score_of
from planner.search import Searcher
from planner.shared_rooms import parts_of
from planner.stage_paths import Known
from planner.stage_planes import Effort, applies, refute
from planner.stages import lower_bound_ps, solve, surely_infeasible

TIERS = ("cpu", "disk")
DISK = Tier(name="disk", bytes=10**13, read_bytes_per_s=8e9, write_bytes_per_s=6e9)


def tiny(folder, gigabytes, host_gigabytes, gpus=2, example="llama", **workload):
    """Three wide layers over small GPUs, a small host's memory and a disk behind it."""
    cluster = small_cluster(folder, SMALL.format(memory=int(gigabytes * 1e9), inter=INTER), gpus)
    host = replace(cluster.tiers[0], bytes=int(host_gigabytes * 1e9))
    cluster = replace(cluster, tiers=(host, DISK))
    args, limits = {"llama": ({"size": "8b", "n_layers": 3}, WIDE),
                    "moe": ({"size": "8b-a1b", "n_layers": 3}, BIG_MOE)}[example]  # fmt: skip
    return make(example, args, limits, cluster, **{"global_batch": 4, "seq_len": 1024, **workload})


def offloads(p, d):
    """What of the state may lie where: nothing, or the optimizer, or parameters with it, each on
    either tier, of all units or of the first layers."""
    def on(tier):
        optimizer = [(("optimizer", tier),)] * (d.zero < 2 or d.pp > 1)
        return optimizer + [(("optimizer", tier), ("params", other))
                            for other in TIERS * (d.zero == 3)]  # fmt: skip

    return [(), *on("cpu"), *on("disk")]


def counted(way, stages):
    """A way with the optimizers of any numbers of layers of each stage below."""
    if not way:
        return
    for counts in itertools.product(*(range(n + 1) for n in stages)):
        if any(counts):
            word = f"{dict(way)['optimizer']}:" + "/".join(map(str, counts))
            yield (("optimizer", word), *way[1:])


def least_by_mesh(p, allowed=lambda d: True, **pins):
    """The least objective of every mesh: every plan is costed, and kept if its GPUs and all tiers
    hold it, and it is allowed."""
    costs, alone = p.costs, [pins.get("schedule", "1f1b")]
    axes = [(name, offloads if name == "offload" else values) for name, values in STATE_AXES]
    schedules = [("schedule", lambda p, d: _schedule(p, d) if d.pp > 1 else alone),
                 *SCHEDULE_AXES[1:2], ("keep", lambda p, d: [()])]  # fmt: skip
    found, names = {}, [f.name for f in fields(Mesh)]
    for row in product(p, MESH_AXES, pins=pins):
        mesh = Mesh(**{name: row[name] for name in names})
        laid, steps = p.searcher.assign(mesh.tp, mesh.sequence_parallel), {}
        found[mesh] = None
        for full in product(p, [*axes, *schedules], row, pins):
            way = Decisions(**full)
            for stages in cuts(p.layers, way.pp * way.virtual_stages):
                states = [way.offload]
                states += counted(way.offload, stages) if way.virtual_stages == 1 else ()
                for state, moved in itertools.product(states, ("", *TIERS)):
                    below = (*state, ("activations", f"{moved}:")) if moved else state
                    d = replace(way, offload=below, stages=stages)
                    if illegal(d, costs.workload):
                        continue
                    best = best_cut(p, d, laid, steps, allowed)
                    if best is not None:
                        found[mesh] = min(best, found[mesh] or best)
    return found


def best_cut(p, d, laid, steps, allowed):
    """Of one partition and one state, the least over all that its stages compute again or move."""
    key = d.offload, d.zero, d.shard, d.reshard, d.dp_outer, d.grad_dtype, d.formats
    if key not in steps:
        steps[key] = p.costs.step(d, laid)
    step = p.costs.rescheduled(steps[key], d)
    if d.below is not None:
        step = p.costs.lowered(step, d)
    problem, best = stage_problem(p.costs, step, levels=recomputed(p, d)), None
    for pairs in itertools.product(*(stage_choices(problem, n) for n in d.stages)):
        objective, _, fits = evaluate(problem, d.stages, pairs)
        if not fits or (best is not None and objective >= best):
            continue
        cut = d.cut(d.stages, pairs)
        if not allowed(cut):
            continue
        uses = tier_uses([(p.costs.cluster, step)] * d.pp, cut, problem)
        if all(use.fits for use in uses):
            best = objective
    return best


CASES = [
    ("llama", 17, 4, {"pp": 2, "zero": 1, "schedule": "1f1b"}),
    ("llama", 17, 12, {"pp": 2, "zero": 0, "schedule": "gpipe"}),
    ("llama", 15, 8, {"pp": 1, "zero": 1}),
    ("llama", 16, 7, {"pp": 1, "zero": 3}),
    ("llama", 17, 4, {"pp": 1, "zero": 3}),
    ("moe", 6, 8, {"pp": 1, "zero": 3}),
    ("moe", 13, 4, {"pp": 2, "zero": 0, "schedule": "gpipe"}),
    ("moe", 10, 8, {"pp": 2, "zero": 1, "schedule": "1f1b"}),
]


@pytest.mark.parametrize(("example", "gigabytes", "host", "pins"), CASES)
def test_a_full_host(tmp_path, example, gigabytes, host, pins):
    check_against_enumeration(tiny(tmp_path, gigabytes, host, example=example), pins)


@pytest.mark.parametrize(("gigabytes", "host", "seq_len", "batch", "zero"), [
    (15.222, 8.249, 1024, 2, 1), (15.15, 5.88, 512, 4, 3), (17.8, 3.78, 2048, 4, 1),
])  # fmt: skip
def test_ranks_that_share_a_host(tmp_path, gigabytes, host, seq_len, batch, zero):
    """Two stages of which one may lay more below if the other lays less: of the last there is no
    plan where each lays no more than half."""
    p = tiny(tmp_path, gigabytes, host, seq_len=seq_len, global_batch=batch)
    check_against_enumeration(p, {"pp": 2, "zero": zero, "schedule": "1f1b"})


def again(count):
    """Plans whose stages compute so many layers again in full, or all, and none in part."""
    return lambda d: all(
        full == min(count, n) and (d.moved is not None or not part)
        for (full, part), n in zip(d.pairs, d.stages)
    )


def aside(offload, count):
    """Plans with the activations of so many layers of each stage below, and the state as said."""
    return lambda d: (
        d.tiers == dict(offload) and d.moved == tuple(min(count, n) for n in d.stages)
        and d.below is None
    )  # fmt: skip


BOTH = (("optimizer", "cpu"), ("activations", "cpu"))


@pytest.mark.parametrize(("gigabytes", "seq_len", "zero", "fix", "allowed"), [
    (20, 2048, 1, "recompute=full:1", again(1)),
    (14, 2048, 3, "recompute=full:2", again(2)),
    (11.9, 4096, 1, "offload=optimizer:cpu,activations:cpu:1", aside(BOTH, 1)),
    (15.64, 8192, 1, "offload=optimizer:cpu,activations:cpu:1", aside(BOTH, 1)),
])  # fmt: skip
def test_a_pin_of_one_leaves_the_other_open(tmp_path, gigabytes, seq_len, zero, fix, allowed):
    """What is computed again is searched beside what is pinned below, and the other way."""
    p = tiny(tmp_path, gigabytes, 64, seq_len=seq_len)
    d = check_against_enumeration(p, {"pp": 1, "zero": zero}, fix, allowed).best.decisions
    assert any(full for full, _ in d.pairs) and any(d.moved)


@pytest.mark.parametrize("gigabytes", [12, 30])
def test_activations_of_all_layers_below(tmp_path, gigabytes):
    """All may be computed again as well, or none, whichever is quicker."""
    p, found = tiny(tmp_path, gigabytes, 64, seq_len=4096), {}
    for again in ([], ["recompute=none"], ["recompute=full"]):
        pins = parse_pins(["pp=1", "offload=optimizer:cpu,activations:cpu", *again])
        out = p.searcher.under(pins).run()
        assert out.proved or out.best is None
        found[(*again,)] = out.searched.score if out.best else None
    assert found[()] == min(score for score in found.values() if score is not None)


def check_against_enumeration(p, pins, *fix_and_allowed):
    """The search finds what costing every plan finds, proves it, and no mesh's bound is above."""
    fix, *allowed = fix_and_allowed or (None,)
    pinned = Pins(**pins) if fix is None else replace(parse_pins([fix]), **pins)
    least, searching = least_by_mesh(p, *allowed, **pins), p.searcher.under(pinned)
    out, bounds = searching.run(), searching.bounds([*least]).lower_ps
    assert all(low <= x for low, x in zip(bounds, least.values()) if x is not None)
    best = min(score_of(x, mesh) for mesh, x in least.items() if x is not None)
    assert out.searched.score == best and out.proved and out.gap == 0
    return out


def test_what_fits_only_with_layers_on_the_disk(tmp_path):
    """Two GPUs of 16 GB and a host of 8: neither all optimizers nor none fit any of them, and the
    moments of some layers lie on the disk."""
    out = tiny(tmp_path, 15, 8).searcher.under(Pins(pp=1, zero=1)).run()
    d = out.best.decisions
    assert d.tiers["optimizer"] == "disk" and d.below[0] > 0
    whole = parse_pins(["pp=1", "zero=1", "offload=optimizer:disk"])
    assert tiny(tmp_path, 15, 8).searcher.under(whole).run().best is None


@pytest.mark.parametrize("offload", [
    (("optimizer", "cpu"), ("activations", "cpu:1/2")), (("optimizer", "nvme"),),
    (("optimizer", "cpu:1/2"), ("activations", "cpu:1/1")), (("activations", "cpu"),),
    (("optimizer", "nvme:0/1"), ("params", "cpu")),
    (("optimizer", "cpu:1/2"), ("params", "nvme"), ("activations", "nvme:1/1")),
])  # fmt: skip
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_rooms_are_what_tiers_hold(zero, offload):
    """What the stage program counts of a tier is what the plan's estimate says of it."""
    d = replace(
        BASE, pp=2, dp=4, shard=4 if zero else 1, zero=zero, stages=(2, 2), microbatches=4,
        recompute=((0, 0), (0, 0)), offload=offload,
    )  # fmt: skip
    costs, step, e = stepped(d)
    problem, uses = stage_problem(costs, step), {use.name: use for use in e.tiers}
    assert {room.tier for room in problem.rooms} == {*uses}
    for room in problem.rooms:
        use = uses[room.tier]
        laid = below_bytes(problem, room, d.stages, d.pairs)
        assert fullest(d, laid, use.gpus) == use.used_bytes > 0
        assert room.sure_bytes <= room.mean_bytes <= room.most_bytes


@pytest.mark.parametrize(("pp", "ranks", "outer"), [(4, 4, 1), (4, 8, 2), (2, 6, 1), (3, 2, 1)])
@pytest.mark.parametrize("gpus", [1, 2, 4, 6, 8, 16])
def test_gpus_of_a_rank_that_share_a_tier(pp, ranks, outer, gpus):
    """Where a rank has the most of those that share one, it has so many at least."""
    d = Decisions(pp=pp, dp=ranks, dp_outer=outer)
    most = min(fullest(d, [int(r == rank) for r in range(pp)], gpus) for rank in range(pp))
    assert 1 <= together(d.pipeline // pp, d.pipeline, min(gpus, d.gpus)) <= most


def with_room(p, rng):
    """A random problem, its layers' activations below at the level between none and full, and a
    tier with room for a part of what they would lay there."""
    aside = tuple(x - y for x, y in zip(p.activation_bytes[0], p.activation_bytes[1]))
    none = (0,) * p.layers
    room = Room(
        tier="host", most_bytes=(most := rng.randint(20, 300)), mean_bytes=most, sure_bytes=most,
        state_bytes=tuple(rng.randint(0, 30) for _ in none), aside_bytes=(none, aside, none),
        ends_bytes=(rng.randint(0, 20), rng.randint(0, 20)),
    )  # fmt: skip
    other = random.Random(most)
    limits = tuple(other.randint(most // 2, most) for _ in range(p.pp) if most % 3 == 0)
    return replace(p, rooms=(replace(room, limits_bytes=limits),))


def keeps_to(p, room, choice):
    """Whether no rank lays more on a tier than it may."""
    laid = below_bytes(p, room, *choice)
    return all(used <= (room.limits_bytes or [room.most_bytes] * p.pp)[rank]
               for rank, used in enumerate(laid))  # fmt: skip


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved", "zbh1"])
def test_stage_programs_keep_to_their_rooms(schedule):
    """Random problems with a tier that is too small for some choices: what is found is what trying
    all finds, no bound is above it, and what planes refute does not exist."""
    rng, kept, tight, refuted = random.Random(schedule), 0, 0, 0
    for seed in range(60):
        p = with_room(tiny_problem(seed, schedule), rng)
        weighed = [(weigh(p, *choice), choice) for choice in choices(p)]
        fits = [(step, choice) for (step, _, fit), choice in weighed if fit]
        (room,) = p.rooms
        free = min((step for step, _ in fits), default=None)
        rooms = [keeps_to(p, room, choice) for _, choice in fits]
        best = min((step for (step, _), left in zip(fits, rooms) if left), default=None)
        found = solve(p)
        if best is None:
            assert found.status == "INFEASIBLE", seed
            continue
        kept += 1
        tight += best > free
        assert (found.status, found.step_ps, found.bound_ps) == ("OPTIMAL", best, best), seed
        assert keeps_to(p, room, (found.stages, found.recompute))
        assert lower_bound_ps(p) <= best and not surely_infeasible(p)
        if applies(p):
            effort = Effort(programs=50, nodes=200)
            answer = refute(p, best + 1, Known.of(p), effort)
            assert not answer.refuted and answer.least_ps <= best
            low = (free + best) // 2
            refuted += best > free and refute(p, low, Known.of(p), effort).refuted
    assert kept > 15 and tight > 3 and (schedule == "zbh1" or refuted > 0)


def test_a_tier_is_named_where_more_of_it_would_do(tmp_path):
    """The hint's room is enough; and where no room would do, no tier is named."""
    pins = parse_pins(["pp=1", "zero=1"])
    small = tiny(tmp_path, 15, 1).searcher.under(pins)
    out = small.run()
    assert out.best is None and out.full.name == "cpu"
    told = infeasible(small, out)
    assert "tier cpu" in told.why
    (gigabytes,) = re.findall(r"^([\d.,]+) GB of tier cpu for 2 GPUs hold it", told.hints[0])
    enough = tiny(tmp_path, 15, float(gigabytes) + 0.1).searcher.under(pins).run()
    assert 1 < float(gigabytes) <= 8 and enough.best is not None
    tight = tiny(tmp_path, 4, 1).searcher.under(pins)
    told = infeasible(tight, tight.run())
    assert "tier" not in "\n".join(told.lines())


def test_parameters_lie_on_the_disk_where_the_host_is_full():
    """Four layers of 8B on two GPUs of 14 GB, a host of 12 GB: with parameters on the host nothing
    fits, and what is found, pinned, is found again."""
    h100, points = load_hardware("h100x2"), tuple((n, 1) for n in (1, 2, 4))
    cpu, nvme = h100.tiers
    small = replace(h100, tiers=(replace(cpu, bytes=12 * 10**9), nvme),
                    device=replace(h100.device, memory_bytes=14 * 10**9))  # fmt: skip
    costs = costs_of(graph_of("llama", size="8b", n_layers=4), small, points, seq_len=2048,
                     global_batch=4, engine="native-compiled")  # fmt: skip
    searcher = Searcher(costs=costs)
    out = searcher.run()
    d = out.best.decisions
    assert d.tiers["params"] == "nvme" and out.proved and out.full.name == "cpu"
    word = "offload=" + ",".join(f"{what}:{tier}" for what, tier in d.offload)
    pinned = searcher.under(parse_pins([word])).run()
    assert pinned.searched.score == out.searched.score
    for word in ("offload=optimizer:cpu,params:cpu", "offload=optimizer:nvme,params:cpu"):
        assert searcher.under(parse_pins([word])).run().best is None


def test_parts_of_a_program_leave_out_what_overflows_alone():
    """Of random bytes that ranks lay on a tier they share: a choice that fits is in one part at
    least, and the one that was too much in none."""
    rng, seen = random.Random(5), 0
    for _ in range(400):
        pp, tp = rng.choice([(2, 1), (2, 2), (3, 1), (4, 2), (4, 1)])
        gpus, d = rng.choice([2, 4, 8]), Decisions(pp=pp, tp=tp)
        cluster = replace(load_hardware("h100x8"), tiers=(
            Tier(name="cpu", bytes=rng.randint(20, 90), read_bytes_per_s=1e9,
                 write_bytes_per_s=1e9, gpus=gpus),
        ))  # fmt: skip
        none = (0,) * 4
        room = Room(
            tier="cpu", most_bytes=99, mean_bytes=99, sure_bytes=99, state_bytes=none,
            aside_bytes=(none, none, none), ends_bytes=(0, 0),
        )  # fmt: skip
        p = replace(tiny_problem(0, "1f1b"), pp=pp, rooms=(room,))
        used = [rng.randint(0, 40) for _ in range(pp)]
        share, most = cluster.sharers(cluster.tiers[0]), cluster.tiers[0].bytes
        parts = parts_of(p, d, cluster, {"cpu": used})
        assert bool(parts) <= (fullest(d, used, share) > most)
        if fullest(d, used, share) <= most:
            continue
        limits = [part.rooms[0].limits_bytes for part in parts]
        assert not any(all(map(int.__le__, used, row)) for row in limits)
        for _ in range(60):
            other = [rng.randint(0, 40) for _ in range(pp)]
            if fullest(d, other, share) <= most:
                seen += 1
                assert any(all(map(int.__le__, other, row)) for row in limits)
    assert seen > 1000
