"""The space of plans, enumerated from its documentation: no bounds, no dominance, no order.

A decision is a row of AXES: its name and, given what is decided before it, the values it may take.
A new decision is a new row, or a value of one; what a stage may have is `stage_choices`'.
docs/search.md has the space; `random_problems` makes problems small enough.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

from cost_models.decisions import Decisions
from cost_models.estimate import stage_problem
from cost_models.schedule import schedule_illegal, simulate
from cost_models.stage_problem import LEVELS, evaluate, rank_bytes, sends_ps, slow_of, tail_ps
from cost_models.step import Costs, Step
from planner.mesh import Mesh
from planner.score import score_of
from planner.search import Outcome, Searcher

NATIVE = ("native", "native-compiled")
TWO_CHUNKS = ("zbv", "dualpipev")
SPLIT = ("zbh1", *TWO_CHUNKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A problem. limits: what the model's axes divide, by hand: heads, experts, features. by_layer:
    whether the optimizer of the first layers alone is tried below, which takes half as long again;
    a search that finds such a plan where it was not tried has another best."""

    costs: Costs
    searcher: Searcher
    heads: tuple[int, ...] = ()
    experts: int = 0
    features: tuple[int, ...] = ()
    by_layer: bool = False
    units: tuple[int, ...] = ()  # ranks in a unit of each level of the network, but the outermost
    known: dict | None = None  # objectives of its plans that another enumeration found, if shared

    @property
    def gpus(self) -> int:
        return self.costs.cluster.count

    @property
    def layers(self) -> int:
        return len(self.costs.chain.layers)

    @property
    def domain(self) -> int:
        return min(self.costs.cluster.domain_size, self.gpus)


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


# --- the decisions: (name, values given the problem and what is decided) -------------------------


def _tp(p, d):
    widest = p.domain if p.domain > 1 else 8  # over the network, where no GPUs share a domain
    return [n for n in divisors(p.gpus // d.pp) if n <= widest]


def _cp(p, d):
    w, ranks = p.costs.workload, p.gpus // (d.pp * d.tp)
    fits = [c for c in divisors(ranks) if w.seq_len % c == 0]
    long = [c for c in fits if c == 1 or w.seq_len // c >= 4096]
    dealt = [c for c in fits if w.global_batch % (ranks // c) == 0 and w.seq_len // c >= 1024]
    return long if {*long} & {*dealt} else long + [c for c in dealt if c not in long][:1]


def _dp(p, d):
    dp = p.gpus // (d.pp * d.tp * d.cp)
    return [dp] * (p.costs.workload.global_batch % dp == 0)


def _ep(p, d):
    return [e for e in divisors(d.dp * d.cp * d.tp) if p.experts % e == 0] if p.experts else [1]


def _etp(p, d):
    ranks = d.dp * d.cp * d.tp
    return [t for t in divisors(ranks) if t <= 8 and all(f % t == 0 for f in p.features)
            and ranks % (d.ep * t) == 0] if p.experts else [1]  # fmt: skip


def _micro_batch(p, d):
    return [b for b in divisors(p.costs.workload.global_batch // d.dp) if b <= 64]


def _sequence_parallel(p, d):
    return [False] + [True] * (d.tp > 1 and p.costs.workload.seq_len // d.cp % d.tp == 0)


def _cp_kind(p, d):
    shares = ["ulysses"] * all(h % (d.tp * d.cp) == 0 for h in p.heads)
    if d.cp == 1:
        return ["ring"]
    if p.costs.workload.engine == "deepspeed":
        return shares
    return ["ring"] * (p.costs.workload.seq_len % (2 * d.cp) == 0) + ["allgather", *shares]


def _dp_outer(p, d):
    parts = {p.gpus // span for span in p.units} if d.pp > 1 else set()
    if p.costs.workload.engine not in NATIVE:
        parts = set()
    block = d.ep * d.etp
    return [n for n in sorted({1, *parts})
            if d.dp % n == 0 and d.dp // n * d.cp * d.tp % block == 0]  # fmt: skip


def _zero(p, d):
    return list(p.costs.engine.pp_zero) if d.pp > 1 else [0, 1, 2, 3]


def _shard(p, d):
    ranks = d.dp * d.cp
    if d.zero == 0:
        return [1]
    spreads = {max(1, p.domain // d.tp) * k for k in (1, 2, 4, 8)}
    spreads |= {span // d.tp for span in p.units[-1:] or [p.domain]}
    if p.costs.cluster.intra.kind == "pcie":
        spreads |= set(divisors(max(1, p.domain // d.tp)))
    near = ranks // d.dp_outer
    if d.dp_outer > 1:
        spreads = {near}
    return [s for s in divisors(ranks)
            if (s == ranks or s in spreads) and (s > 1 or ranks == 1)
            and (near % s == 0 or s % near == 0)]  # fmt: skip


def _reshard(p, d):
    return [False, True] if d.zero == 3 and d.pp == 1 else [False]


def _offload(p, d):
    if not any(tier.name == "cpu" for tier in p.costs.cluster.tiers):
        return [()]
    fsdp = p.costs.engine.name not in ("megatron", "deepspeed")
    with_parameters = fsdp and d.zero >= 2 and d.pp == 1  # FSDP2 keeps shards beside theirs
    both = (("optimizer", "cpu"), ("params", "cpu"))
    found = [()] if with_parameters else [(), both[:1]]
    found += [both] * (d.zero == 3)
    some = p.by_layer and p.costs.engine.name in NATIVE and d.pp == 1  # elsewhere by stage
    counts = [f"cpu:{n}" for n in range(1, p.layers + 1)] if some else []
    return [*found, *((("optimizer", n), *way[1:]) for way in found if way for n in counts)]


def _schedule(p, d):
    engine = p.costs.engine
    runs = engine.compiled_schedules if engine.fused else engine.schedules
    few = d.microbatches < d.pp and "gpipe" not in runs  # an engine's own 1F1B is GPipe then
    return [*runs, *(["gpipe"] * few)] if d.pp > 1 else ["1f1b"]


def _virtual_stages(p, d):
    if d.schedule == "interleaved":
        counts = range(2, 9)
    else:
        counts = [2] if d.schedule in TWO_CHUNKS else [1]
    return [v for v in counts if d.pp * v <= p.layers
            and schedule_illegal(d.schedule, d.pp, d.microbatches, v) is None]  # fmt: skip


def _formats(p, d):
    w, groups = p.costs.workload, ("attention", "experts" if p.experts else "mlp")
    found = []
    for words in itertools.product(("", *w.allowed_formats), repeat=len(groups)):
        together = w.engine in ("megatron", "deepspeed") and len(set(words)) > 1
        if not together:
            found.append(tuple((g, word) for g, word in zip(groups, words) if word))
    return found


def _keep(p, d):
    """What the engine can keep in part: the rungs of its ladder, whose front test_keep has."""
    may = d.schedule not in SPLIT and not (d.cp > 1 and d.cp_kind == "ulysses") and not d.formats
    return [(), *(p.searcher.keeps(d.tp, d.sequence_parallel) if may else ())]


MESH_AXES = (
    ("pp", lambda p, d: [n for n in divisors(p.gpus) if n <= p.layers]),
    ("tp", _tp),
    ("cp", _cp),
    ("dp", _dp),
    ("ep", _ep),
    ("etp", _etp),
    ("micro_batch", _micro_batch),
    ("microbatches", lambda p, d: [p.costs.workload.global_batch // d.dp // d.micro_batch]),
    ("sequence_parallel", _sequence_parallel),
    ("cp_kind", _cp_kind),
    ("tp_by_part", lambda p, d: [()]),  # of several kinds of hardware: test_fleet's
)
STATE_AXES = (
    ("compile", lambda p, d: [p.costs.engine.fused]),
    ("grad_dtype", lambda p, d: [p.costs.engine.grad_dtype]),
    ("dp_outer", _dp_outer),
    ("zero", _zero),
    ("shard", _shard),
    ("reshard", _reshard),
    ("offload", _offload),
    ("formats", _formats),
)
SCHEDULE_AXES = (("schedule", _schedule), ("virtual_stages", _virtual_stages), ("keep", _keep))
AXES = (*MESH_AXES, *STATE_AXES, *SCHEDULE_AXES)


def product(p: Tiny, axes, chosen: dict | None = None, pins: dict | None = None) -> Iterator[dict]:
    """Every combination of the axes' values that keeps the pins."""
    chosen = chosen or {}
    if not axes:
        yield chosen
        return
    (name, values), *rest = axes
    for value in values(p, SimpleNamespace(**chosen)):
        if value == (pins or {}).get(name, value):
            yield from product(p, rest, {**chosen, name: value}, pins)


def with_tp_by_part(p):
    """Every mesh of which the two parts have another tp each."""
    clusters = [side.cluster for side in p.costs.sides]
    counts = [c.count for c in clusters]
    for tps in itertools.product(*(divisors(n) for n in counts)):
        for dp in divisors(min(counts)):
            stages = [n / (dp * tp) for n, tp in zip(counts, tps)]
            fits = all(n == int(n) for n in stages) and sum(stages) <= p.layers
            if not fits or tps[0] == tps[1] or max(tps) % min(tps):
                continue
            own = tuple((c.name, tp) for c, tp in zip(clusters, tps))
            first = {"pp": int(sum(stages)), "tp": max(tps), "cp": 1, "dp": dp}
            rows = MESH_AXES[len(first) :]
            assert rows[-1][0] == "tp_by_part"
            for d in product(p, rows[:-1], first):
                yield d | {"tp_by_part": own}


def every_mesh(p: Tiny) -> list[Mesh]:
    names = [f.name for f in fields(Mesh)]
    return [Mesh(**{name: d[name] for name in names}) for d in product(p, MESH_AXES)]


# --- by stage: its layers, and what they compute again --------------------------------------------


def cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for places in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *places, layers)))


def stage_choices(problem, layers):
    """(full, selective): the first so many layers of a stage, and the next."""
    return [(full, some) for full in range(layers + 1) for some in range(layers + 1 - full)
            if ("full" in problem.levels or not full)
            and ("selective" in problem.levels or not some)
            and ("none" in problem.levels or full + some == layers)]  # fmt: skip


@functools.cache
def best_of_problem(problem) -> int | None:
    """The least step of every partition and recomputation that fits, by trying them all; what
    depends on a part of a choice is computed once for it, and the best is evaluated as a whole."""
    best = min(plans_of(problem), default=None)
    if best is None:
        return None
    step, stages, recompute = best
    assert evaluate(problem, stages, recompute)[::2] == (step, True), problem
    return step


def plans_of(
    problem, fitting=None
) -> Iterator[tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """(step, partition, recomputation) of all that fit; fitting: in place of `_fitting`."""
    sends, slow = sends_ps(problem), [busy for _, busy in slow_of(problem)]
    for stages in cuts(problem.layers, problem.count):
        tail = tail_ps(problem, stages)
        forward, backward, weight = zip(*(_times(problem, stages, k) for k in range(len(stages))))
        for ranks in itertools.product(*(fitting or _fitting)(problem, stages)):
            recompute = tuple(pair for _, pair in sorted(itertools.chain(*ranks)))
            run = simulate(
                problem.schedule, forward, [b[pair] for b, pair in zip(backward, recompute)],
                weight, sends, problem.microbatches, problem.pp, problem.virtual_stages,
                busy_ps=slow,
            )
            yield run.makespan_ps + tail, stages, recompute


def _times(problem, stages, k) -> tuple[int, dict[tuple[int, int], int], int]:
    """A stage's forward, its input gradient by (full, selective), and its weights' gradients."""
    at, q = range(sum(stages[:k]), sum(stages[: k + 1])), problem.at(problem.rank_of(k))
    beside = [q.first] * (k == 0) + [q.last] * (k == len(stages) - 1)
    forward = sum(q.forward_ps[i] for i in at) + sum(e.forward_ps for e in beside)
    weight = sum(q.weight_grad_ps[i] for i in at) + sum(e.weight_grad_ps for e in beside)
    plain = sum(q.input_grad_ps[i] for i in at) + sum(e.input_grad_ps for e in beside)
    full, selective = q.recompute_ps
    backward = {
        (a, b): plain + q.rank_glue_backward_ps + sum(full[i] for i in at[:a])
        + sum(selective[i] for i in at[a : a + b])
        for a, b in stage_choices(problem, stages[k])
    }  # fmt: skip
    return forward + q.rank_glue_forward_ps, backward, weight


def _fitting(problem, stages) -> list[list[tuple[tuple[int, tuple[int, int]], ...]]]:
    """By rank, the recomputation of its own stages, (stage, (full, selective)), that it holds."""
    found = []
    for rank in range(problem.pp):
        mine, room = problem.stages_of(rank), problem.at(rank).capacity_bytes
        found.append([])
        for pairs in itertools.product(*(stage_choices(problem, stages[k]) for k in mine)):
            row = [(0, 0)] * len(stages)  # of the others: they are not on this rank
            for k, pair in zip(mine, pairs):
                row[k] = pair
            if rank_bytes(problem, stages, row)[rank] <= room:
                found[-1].append(tuple(zip(mine, pairs)))
    return found


@functools.cache
def best_with_below(above, below) -> int | None:
    """The least step of every partition, recomputation and number of first layers of each stage
    that are as in the other problem, one stage a rank: each rank takes the shortest tail that fits,
    as no other rank's depends on its number."""
    shortest: dict[tuple, int] = {}  # by partition, rank and its recomputation

    def fitting(_, stages):
        found: list[dict] = [{} for _ in stages]
        for most in range(max(stages) + 1):
            low = [place < most for n in stages for place in range(n)]
            rows = {name: tuple(b if x else a for x, a, b in zip(
                low, getattr(above, name), getattr(below, name)
            )) for name in ("state_bytes", "gathered_bytes", "tail_own_ps")}  # fmt: skip
            mixed = replace(above, **rows)
            tails = _tails(mixed, stages)
            for rank, some in enumerate(_fitting(mixed, stages)):
                for one in some:
                    found[rank][one] = min(tails[rank], found[rank].get(one, tails[rank]))
        shortest.update({(stages, one): t for row in found for (one,), t in row.items()})
        return [list(row) for row in found]

    steps = (
        step - tail_ps(above, stages) + max(shortest[stages, one] for one in enumerate(recompute))
        for step, stages, recompute in plans_of(above, fitting)
    )
    return min(steps, default=None)


def _tails(problem, stages) -> list[int]:
    """What each rank of one stage does after its last backward."""
    found = []
    for stage in range(len(stages)):
        ends, rows = problem.extras(stage), slice(sum(stages[:stage]), sum(stages[: stage + 1]))
        comm = sum(problem.tail_comm_ps[rows]) - sum(problem.tail_hide_ps[rows])
        comm += sum(e.tail_comm_ps - e.tail_hide_ps for e in ends)
        own = sum(problem.tail_own_ps[rows]) + sum(e.tail_own_ps for e in ends)
        found.append(max(0, comm) + own)
    return found


def recomputed(p: Tiny, d: Decisions) -> tuple[str, ...]:
    """The levels of recomputation that go with a schedule and an engine."""
    if d.schedule in SPLIT:
        return ("none",)
    if p.experts and d.tp > 1 and p.costs.workload.engine == "native-compiled":
        return ("none", "selective")  # torch cannot compute compiled experts again under tp
    return LEVELS


def moves(p: Tiny, d: Decisions, pins: dict) -> bool:
    """Whether layers' activations may lie on the host, by count: as our own runtime does it."""
    free = "offload" not in pins and d.schedule not in SPLIT
    host = any(tier.name == "cpu" for tier in p.costs.cluster.tiers)
    return free and host and p.costs.workload.engine in NATIVE


def some_below(p: Tiny, d: Decisions, pins: dict) -> bool:
    """Whether the optimizer may be below of the first layers of each stage alone."""
    free = p.by_layer and "offload" not in pins and p.costs.workload.engine in NATIVE
    return free and d.pp > 1 and d.virtual_stages == 1 and "optimizer" in d.tiers


def without_state(d: Decisions) -> Decisions:
    """The same with all state on the GPU."""
    return replace(d, offload=tuple(row for row in d.offload if row[0] == "activations"))


def programmed(p: Tiny, d: Decisions, laid, steps: dict[tuple, Step]):
    """The stage program of decisions. steps: known ones, by what is kept and offloaded."""
    key = d.keep, d.offload
    if key not in steps:
        steps[key] = p.costs.step(d, laid)
    return stage_problem(p.costs, p.costs.rescheduled(steps[key], d), levels=recomputed(p, d))


def objectives_of(p: Tiny, way: Decisions, laid, steps, below: bool) -> tuple[int | None, ...]:
    """The least of all stages of a way; below: and with the optimizer below of some layers."""
    known = {} if p.known is None else p.known
    if (way, below) not in known:
        problem = programmed(p, way, laid, steps)
        known[way, below] = (best_of_problem(problem),)
        if below:
            above = programmed(p, without_state(way), laid, steps)
            known[way, below] += (best_with_below(above, problem),)
    return known[way, below]


def least_by_mesh(p: Tiny, refused: tuple = (), **pins) -> dict[Mesh, int | None]:
    """The least objective of every mesh among what has the pinned values, and none of the refused
    (key, value), nor all that is refused to lie below the device, alone or beside more; None:
    nothing fits."""

    def has(d, key, value):
        if key != "offload" or not value:
            return d.get(key) == value
        tiers = {what: tier.partition(":")[0] for what, tier in d.get(key, ())}
        return all(tiers.get(what) == tier for what, tier in value)

    def left(rows):
        return (d for d in rows if not any(has(d, key, value) for key, value in refused))

    alone = [pins.get("schedule", "1f1b")]  # of one stage: what is pinned is what it runs
    schedules = (("schedule", lambda p, d: _schedule(p, d) if d.pp > 1 else alone),
                 *SCHEDULE_AXES[1:])  # fmt: skip
    found: dict[Mesh, int | None] = {}
    names = [f.name for f in fields(Mesh)]
    for d in left(product(p, MESH_AXES, pins=pins)):
        mesh = Mesh(**{name: d[name] for name in names})
        laid = p.searcher.assign(mesh.tp, mesh.sequence_parallel)
        objectives = []
        for state in left(product(p, STATE_AXES, d, pins)):
            steps: dict[tuple, Step] = {}  # another schedule's is the same but for what is reserved
            for full in left(product(p, schedules, state, pins)):
                made = Decisions(**full)
                ways = [made]
                if moves(p, made, pins):  # activations of so many layers on the host, by stage
                    ways.append(replace(made, offload=(*made.offload, ("activations", "cpu:"))))
                for way in ways:
                    objectives += objectives_of(p, way, laid, steps, some_below(p, way, pins))
        found[mesh] = min((x for x in objectives if x is not None), default=None)
    return found


def least_score(least: dict[Mesh, int | None]) -> int | None:
    """The least score of all plans, or None: nothing fits."""
    return min((score_of(x, mesh) for mesh, x in least.items() if x is not None), default=None)


def difference(p: Tiny, by_mesh: dict[Mesh, int | None], out: Outcome) -> str:
    """What a search says otherwise than enumeration (`least_by_mesh`); empty where nothing."""
    least = least_score(by_mesh)
    if least is None:
        return f"found where none fits: {out.best.decisions}" if out.best else ""
    if out.best is None:
        return f"no plan was found, the best is {least}"
    for tried in (out.searched, out.best):
        d, laid = tried.decisions, tried.assignments
        problem = stage_problem(p.costs, p.costs.step(d, laid))
        if evaluate(problem, d.stages, d.pairs)[::2] != (tried.objective_ps, True):
            return f"the plan is not what it was said to be: {d}"
    if out.searched.score != least:
        return f"found {out.searched.score}, enumeration {least}: {d}"
    if out.best.score > least:  # laid as engines have it, it is below
        return f"{out.best.score} laid otherwise, {least} as searched"
    return "" if out.proved and out.gap == 0 else f"the best was found and not proved: {out.bound}"
