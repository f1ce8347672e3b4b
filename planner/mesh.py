"""Candidate meshes: what the axes may be for one model on one cluster, before any cost.

Every divisor counts. Ranks lie inside out: tp, cp, dp, pp; where the hardware lists levels of its
network, some of the dp may lie outside the pipeline (one pipeline a pod, a datacentre). tp stays
inside one NVLink (or PCIe) domain unless pinned, or goes over the network where each GPU is a
domain of its own, and must split some matmul of a layer; cp needs a model whose sequence is mixed
by attention alone, and long enough, or ranks that there are no samples for.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cost_models.chain import Chain
from cost_models.decisions import Decisions, Workload
from cost_models.hardware import Cluster
from cost_models.layout import options
from planner.decisions import Pins

MOST_MICRO_BATCH = 64  # samples; more only fills kernels that are full
LEAST_CP_TOKENS = 4096  # tokens a cp rank: of 44 published runs with cp, 42 have as many or more,
SHORT_CP_TOKENS = 1024  # none under 2,048; so few where samples do not divide among data ranks
# else: attention is measured at these. Below, the search does not go unless pinned
MOST_FLAT_TP = 8  # where each GPU is a domain of its own: what fits no other way rarely needs more
SHARD_SPREADS = (1, 2, 4, 8)  # HSDP: shard groups of so many whole domains, beside all ranks
CP_KINDS = ("ring", "allgather", "ulysses")
MIXES_SEQUENCE = ("scan", "delta_rule", "linear_attention", "causal_conv1d")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Degrees and micro-batch of one candidate, in the order that ties break by."""

    pp: int
    tp: int
    cp: int
    ep: int
    etp: int
    dp: int
    micro_batch: int
    microbatches: int
    sequence_parallel: bool
    cp_kind: str
    tp_by_part: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What limits the axes of a model."""

    layers: int
    pipeline_reason: str
    experts: tuple[int, ...]
    expert_features: tuple[int, ...]
    heads: tuple[int, ...]
    sequence: bool
    attention_only: bool


def divisors(n: int) -> tuple[int, ...]:
    """Every divisor, ascending."""
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return tuple(sorted({*small, *(n // i for i in small)}))


@functools.cache
def facts_of(chain: Chain) -> Facts:
    """Read the limits off the units."""
    units = list(dict.fromkeys(link.unit for link in chain.links))
    nodes = [(u, n) for u in units for n in u.nodes]
    # [experts, k, n] as they are multiplied: a parameter may hold them in other shapes
    weights = [u.values[n.inputs[1]] for u, n in nodes if n.op == "grouped_matmul"]
    heads = [
        u.values[r].shape[1].at(1, 1)
        for u, n in nodes if n.op == "attention" for r in n.inputs[:2]
    ]  # fmt: skip
    mixes = any(
        n.op in MIXES_SEQUENCE or (n.op == "conv" and any(d.seq for d in n.outputs[0].shape))
        for _, n in nodes
    )
    return Facts(
        layers=len(chain.layers), pipeline_reason=chain.pipeline_reason,
        experts=tuple(dict.fromkeys(w.shape[0].at(1, 1) for w in weights)),
        expert_features=tuple(dict.fromkeys(d.at(1, 1) for w in weights for d in w.shape[1:])),
        heads=tuple(dict.fromkeys(heads)),
        sequence=any(d.seq for link in chain.links for _, t in link.unit.inputs for d in t.shape),
        attention_only=bool(heads) and not mixes,
    )  # fmt: skip


def widest_tp(domain_ranks: int) -> int:
    """The most that tp is searched to be, where so many ranks are a domain."""
    return domain_ranks if domain_ranks > 1 else MOST_FLAT_TP


def splits_something(chain: Chain, tp: int) -> bool:
    """Whether tp splits the weight of some matmul of the layers."""
    for unit in dict.fromkeys(link.unit for link in chain.links if link.is_layer):
        found = options(unit, tp)
        for node in unit.nodes:
            if node.op in ("linear", "matmul", "einsum", "dispatch"):
                for option in found[node.name]:
                    if any(
                        at >= 0 for r, at in zip(node.inputs, option.ins)
                        if r in unit.parameter_names or node.op == "dispatch"
                    ):  # fmt: skip
                        return True
    return False


def _choices(pinned: int | None, found: tuple[int, ...]) -> tuple[int, ...]:
    return found if pinned is None else (pinned,)


def _cps(facts: Facts, workload: Workload, pins: Pins, ranks: int, every: int) -> list[int]:
    """How many of a stage's ranks beside tp may share a sequence: as many as have LEAST_CP_TOKENS
    each; where with none of these the batch is dealt to all data ranks, also the least with which
    it is. every: the ranks of all parts, where a batch is shared unequally, else the same."""
    seq, batch = workload.seq_len, workload.global_batch
    if pins.cp is not None:
        return [] if ranks % pins.cp or seq % pins.cp else [pins.cp]

    def dealt(cp: int) -> bool:
        return batch % (ranks // cp) == 0 and every // cp <= batch

    fits = [c for c in divisors(ranks) if seq % c == 0] if facts.attention_only else [1]
    found = [c for c in fits if c == 1 or seq >= c * LEAST_CP_TOKENS]
    if not any(map(dealt, found)):
        short = [c for c in fits if c not in found and seq >= c * SHORT_CP_TOKENS]
        found += [c for c in short if dealt(c)][:1]
    return found


def shorter_cp(facts: Facts, workload: Workload, d: Decisions) -> int | None:
    """Of a plan with at most two micro-batches a stage the least cp beyond those searched with
    which there is one for each stage, which may be quicker; None where there is none, or no such
    plan."""
    ranks, seq = d.dp * d.cp, workload.seq_len
    if d.pp == 1 or d.microbatches > 2 * d.pp or not facts.attention_only:
        return None
    for cp in divisors(ranks):
        samples, left = divmod(workload.global_batch * cp, ranks)
        if cp > d.cp and seq % (2 * cp) == left == 0 and samples >= d.pp:
            return cp if LEAST_CP_TOKENS > seq // cp >= SHORT_CP_TOKENS else None
    return None


def _batches(samples: int, pins: Pins) -> list[tuple[int, int]]:
    """(micro-batch, micro-batches) of so many samples of a data rank."""
    return [
        (b, samples // b) for b in divisors(samples)
        if pins.micro_batch in (None, b) and (b <= MOST_MICRO_BATCH or pins.micro_batch)
        and pins.microbatches in (None, samples // b)
    ]  # fmt: skip


def meshes(chain: Chain, cluster: Cluster, workload: Workload, pins: Pins) -> Iterator[Mesh]:
    """Every candidate that the pins, the model and the cluster allow, in a fixed order."""
    return laid_out(chain, cluster.count, cluster.domain_ranks, workload, pins)


def laid_out(
    chain: Chain, gpus: int, domain_ranks: int, workload: Workload, pins: Pins
) -> Iterator[Mesh]:
    """Every candidate on so many GPUs, tp inside a domain of so many unless pinned or there is one
    GPU in each."""
    facts = facts_of(chain)
    most_pp = 1 if facts.pipeline_reason else facts.layers
    tps = _choices(pins.tp, tuple(
        t for t in divisors(gpus)
        if t == 1 or (t <= widest_tp(domain_ranks) and splits_something(chain, t))
    ))  # fmt: skip
    batch = workload.global_batch
    for pp in _choices(pins.pp, tuple(p for p in divisors(gpus) if p <= most_pp)):
        for tp in tps:
            if gpus % (pp * tp):
                continue
            ranks = gpus // (pp * tp)
            for cp in _cps(facts, workload, pins, ranks, ranks):
                dp = ranks // cp
                if pins.dp in (None, dp) and batch % dp == 0:
                    counts = _batches(batch // dp, pins)
                    yield from _filled(facts, workload, pins, (pp, tp, cp, dp), ranks * tp, counts)


def shared_out(
    chain: Chain, gpus: Sequence[int], domain_ranks: int, workload: Workload, pins: Pins
) -> Iterator[Mesh]:
    """Every candidate of replicas on parts of so many GPUs each, all with the same tp and cp and
    no pipeline; `microbatches` is the mean of the data ranks, rounded up."""
    facts, common = facts_of(chain), math.gcd(*gpus)
    tps = _choices(pins.tp, tuple(
        t for t in divisors(common)
        if t == 1 or (t <= widest_tp(domain_ranks) and splits_something(chain, t))
    ))  # fmt: skip
    for tp in tps:
        if common % tp:
            continue
        every = sum(gpus) // tp
        for cp in _cps(facts, workload, pins, common // tp, every):
            dp = every // cp
            if pins.dp not in (None, dp):
                continue
            near = common // (tp * cp)  # each part's data ranks are so many, some times
            batches = [
                b for b in divisors(workload.global_batch // near)
                if workload.global_batch % (near * b) == 0
                and pins.micro_batch in (None, b) and (b <= MOST_MICRO_BATCH or pins.micro_batch)
                and b * dp <= workload.global_batch
            ]  # fmt: skip
            counts = [(b, -(-workload.global_batch // (b * dp))) for b in batches]
            yield from _filled(facts, workload, pins, (1, tp, cp, dp), common, counts)


def parted(
    chain: Chain, parts: Sequence[Cluster], workload: Workload, pins: Pins
) -> Iterator[Mesh]:
    """Every candidate of a pipeline over these parts of which each has a tp of its own, not all
    alike, inside a domain of its own; each divides the next larger, so that a piece of a value goes
    to or comes from one rank. dp is the same, and there is no cp and no experts' axis."""
    facts, names = facts_of(chain), [part.name for part in parts]
    pinned = dict(pins.tp_by_part or ())
    if facts.pipeline_reason or pins.tp is not None or pins.cp not in (None, 1):
        return
    choices = [
        _choices(pinned.get(part.name), tuple(
            t for t in divisors(part.count)
            if t == 1 or (t <= widest_tp(part.domain_ranks) and splits_something(chain, t))
        )) for part in parts
    ]  # fmt: skip
    for tps in itertools.product(*choices):
        rising = sorted(tps)
        if rising[0] == rising[-1] or any(b % a for a, b in itertools.pairwise(rising)):
            continue
        own = dict(zip(names, tps))
        for dp in divisors(workload.global_batch):
            if pins.dp not in (None, dp) or any(p.count % (dp * own[p.name]) for p in parts):
                continue
            pp = sum(part.count // (dp * own[part.name]) for part in parts)
            if pins.pp not in (None, pp) or pp > facts.layers:
                continue
            samples = workload.global_batch // dp
            counts = _batches(samples, pins)
            axes = (pp, rising[-1], 1, dp)
            for mesh in _filled(facts, workload, pins, axes, 1, counts):
                yield replace(mesh, tp_by_part=tuple(own.items()))


def outside(mesh: Mesh, cluster: Cluster, pinned: int | None) -> tuple[int, ...]:
    """How many of the dp may lie outside the pipeline: none, or one for each unit of a level, so
    that no pipeline crosses what joins them."""
    units = [cluster.count // span for span in cluster.spans[1:-1]] if mesh.pp > 1 else []
    return tuple(
        n for n in dict.fromkeys([1, *units] if pinned is None else [pinned])
        if mesh.dp % n == 0 and mesh.dp // n * mesh.cp * mesh.tp % (mesh.ep * mesh.etp) == 0
    )


def shard_sizes(
    mesh: Mesh, clusters: Sequence[Cluster], pins: Pins, zero: int, outer: int
) -> tuple[int, ...]:
    """How many data ranks may share the state under a ZeRO stage with so much of dp outside the
    pipeline: all, or so many whole domains; over PCIe also a part of one, as few ranks are quicker
    there than the whole domain by more than the network loses."""
    ranks, near = mesh.dp * mesh.cp, mesh.dp * mesh.cp // outer
    nested = [s for s in divisors(ranks)[::-1] if near % s == 0 or s % near == 0]
    if pins.shard is not None:
        nested = [s for s in nested if s == pins.shard]
    elif zero == 0:
        return (1,)
    else:
        spreads: set[int] = set()
        own = dict(mesh.tp_by_part)
        for cluster in clusters:
            tp = own.get(cluster.name, mesh.tp)
            inside = max(1, cluster.domain_ranks // tp)
            spreads |= {inside * k for k in SHARD_SPREADS}
            spreads |= {cluster.spans[-2] // tp}
            if cluster.intra.kind == "pcie":
                spreads |= set(divisors(inside))
        if outer > 1:  # laid apart to keep shards together, or where no shards are apart
            spreads = {near}
        nested = [s for s in nested if s == ranks or s in spreads]
    alone = zero > 0 and pins.zero is None  # nobody shares: what ZeRO-0 is
    return tuple(s for s in nested if not (alone and s == 1 < ranks))


def _filled(
    facts: Facts, workload: Workload, pins: Pins, axes: tuple[int, int, int, int], ranks: int,
    counts: Sequence[tuple[int, int]],
) -> Iterator[Mesh]:  # fmt: skip
    """The same mesh with every expert layout and way to share the sequence. axes: pp, tp, cp, dp.
    ranks: among which experts lie. counts: (micro-batch, micro-batches) pairs."""
    pp, tp, cp, dp = axes
    splits = facts.sequence and workload.seq_len // cp % tp == 0 and tp > 1
    ways = (False, True) if splits else (False,)
    ways = ways if pins.sequence_parallel is None else (pins.sequence_parallel,)
    for ep, etp in _expert_layouts(facts, pins, ranks):
        for kind in _cp_kinds(facts, workload, pins, tp, cp):
            for split in ways:
                for b, n in counts:
                    yield Mesh(pp, tp, cp, ep, etp, dp, b, n, split, kind)


def _expert_layouts(facts: Facts, pins: Pins, ranks: int) -> list[tuple[int, int]]:
    """(ep, etp): ep divides every layer's experts, etp their features; both a stage's ranks."""
    if not facts.experts:
        return [(pins.ep or 1, pins.etp or 1)]
    eps = _choices(pins.ep, tuple(
        e for e in divisors(ranks) if all(n % e == 0 for n in facts.experts)
    ))  # fmt: skip
    etps = _choices(pins.etp, tuple(
        t for t in divisors(ranks) if t <= 8 and all(n % t == 0 for n in facts.expert_features)
    ))  # fmt: skip
    return [(e, t) for e in eps for t in etps if ranks % (e * t) == 0]


def _cp_kinds(facts: Facts, workload: Workload, pins: Pins, tp: int, cp: int) -> list[str]:
    if cp == 1:
        return [pins.cp_kind or "ring"]
    return [
        kind for kind in CP_KINDS
        if pins.cp_kind in (None, kind) and cp_reason(facts, workload, kind, tp, cp) is None
    ]  # fmt: skip


def cp_reason(facts: Facts, workload: Workload, kind: str, tp: int, cp: int) -> str | None:
    """Why cp cannot share this model's sequence in that way, or None."""
    if cp == 1:
        return None
    if not facts.attention_only:
        return "the model mixes its sequence by more than attention (scan, convolution)"
    if kind == "ring" and workload.seq_len % (2 * cp):
        return f"a balanced ring needs --seq-len to be a multiple of {2 * cp}"
    if kind == "ulysses" and any(h % (tp * cp) for h in facts.heads):
        return f"Ulysses shares heads: {facts.heads} do not all divide by tp*cp = {tp * cp}"
    return None
