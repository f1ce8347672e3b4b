"""The search over pools: GPUs that read prompts beside GPUs that decode, each divided its own way.

Every pair of divisions whose replicas fill the GPUs is looked at. What one replica of a division
does is costed once; a pair is put together from two of them (`cost_models/serving_pools.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from cost_models.hardware import Cluster
from cost_models.serving_decisions import Pool, ServeLoad, Serving
from cost_models.serving_engines import ServingEngine, engines_with_pools
from cost_models.serving_kv import forgetful
from cost_models.serving_pools import Decodes, Pooled, Reads, decodes, moves, pooled, reads
from cost_models.serving_shapes import ServedModel
from ir.errors import UsageError
from planner.mesh import divisors
from planner.serving.asked import FORCED, ServePins


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Decisions with pools, and what requests see. missing_bytes: that its fullest GPU lacks, or
    infinite where that is a sequence's cache; 0 where it fits."""

    serving: Serving
    seen: Pooled
    missing_bytes: float = 0.0


def considered(cluster: Cluster, engine: ServingEngine, pins: ServePins) -> bool:
    """Whether pools are looked at. Raises UsageError where they are pinned and cannot be."""
    if pins.pools:
        if not engine.kv_sent:
            raise UsageError(f"{engine.name} has no pools of prefill and decode",
                             why=f"{', '.join(engines_with_pools())} have",
                             hints=("--engine vllm",))  # fmt: skip
        if pins.offload or pins.kv_tier == "cpu":
            raise UsageError("pools are pinned, and weights or the cache below the GPU",
                             why="each pool keeps all of the model on its GPUs")  # fmt: skip
        if pins.pools != FORCED and sum(pins.pools) > cluster.count:
            raise UsageError(f"--fix pools={pins.pools[0]}+{pins.pools[1]}: {cluster.spec} has"
                             f" {cluster.count} GPUs")  # fmt: skip
    below = pins.offload or pins.kv_tier == "cpu"
    return bool(engine.kv_sent) and cluster.count > 1 and pins.pools != () and not below


def instances(model: ServedModel, cluster: Cluster, pins: ServePins) -> list[Pool]:
    """Divisions of one replica over fewer GPUs than there are, by degrees that divide them all or
    are powers of two."""
    heads = [a.heads for layer in model.layers for a in layer.attention]
    experts = [e.experts for layer in model.layers for e in layer.experts]
    twos = (1 << k for k in range(cluster.count.bit_length()))
    all_ = sorted({*divisors(cluster.count), *(n for n in twos if n < cluster.count)})
    found = []
    for tp in all_ if pins.tp is None else [pins.tp]:
        if any(h % tp for h in heads) or tp > cluster.domain_ranks:
            continue
        for pp in all_ if pins.pp is None else [pins.pp]:
            for adp in (all_ if experts else [1]) if pins.attention_dp is None else [
                pins.attention_dp
            ]:  # fmt: skip
                if pp > model.layer_count or tp * pp * adp >= cluster.count:
                    continue
                for ep in divisors(tp * adp) if experts else (1,):
                    pool = Pool(tp=tp, pp=pp, ep=ep, etp=tp * adp // ep, attention_dp=adp)
                    if pins.ep in (None, ep) and pins.etp in (None, pool.etp) and not any(
                        e % ep for e in experts
                    ):  # fmt: skip
                        found.append(pool)
    return found


def filled(count: int, prefill: int, decode: int, pins: ServePins) -> list[tuple[int, int]]:
    """(replicas that read, replicas that decode), of so many GPUs each, that fill `count` GPUs."""
    return [
        (r, (count - r * prefill) // decode) for r in range(1, (count - 1) // prefill + 1)
        if not (count - r * prefill) % decode
        and pins.replicas in (None, r) and pins.replicas in (None, (count - r * prefill) // decode)
        and pins.pools in (None, FORCED, (r * prefill, count - r * prefill))
    ]  # fmt: skip


def candidates(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, load: ServeLoad,
    bases: Sequence[Serving], counts: Sequence[int], pins: ServePins,
    formats: Callable[[Serving], Iterator[Serving]],
) -> Iterator[Candidate]:  # fmt: skip
    """Every pair of divisions. bases: decisions but for degrees, a batch each. counts: of GPUs that
    are filled. formats: decisions with formats of a division's."""
    rows = instances(model, cluster, pins)
    for base in bases:
        words = dict.fromkeys((made.weights, made.kv) for row in rows
                              for made in formats(divided(base, row)))  # fmt: skip
        for weights, kv in words:
            named = replace(base, weights=weights, kv=kv)
            lossy = forgetful(model, base.kv_window, base.kv_policy)
            yield from _pairs(lossy, cluster, engine, load, named, rows, counts, pins)


def _pairs(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, load: ServeLoad, base: Serving,
    rows: Sequence[Pool], counts: Sequence[int], pins: ServePins,
) -> Iterator[Candidate]:  # fmt: skip
    read = {row: reads(model, cluster, engine, replace(divided(base, row), batch=1), load.prompt)
            for row in rows}  # fmt: skip
    decode = {row: decodes(model, cluster, engine, divided(base, row), load) for row in rows}
    most = cluster.device.memory_bytes * engine.memory_share
    decoders = _worthwhile(decode)
    for p in _quickest(read):
        lacks = max(read[p].held_bytes - most, 0.0)
        for d in decoders:
            if not _apart(cluster, p.tp, d.tp):
                continue
            for count in counts:
                for r, k in filled(count, p.devices, d.devices, pins):
                    s = replace(divided(base, replace(d, replicas=k)),
                                prefill=replace(p, replicas=r))  # fmt: skip
                    moved = moves(model, cluster, engine, s, load.prompt, read[p].alone_s)
                    yield Candidate(
                        serving=s, seen=pooled(engine, s, load, read[p], decode[d], moved),
                        missing_bytes=lacks if decode[d].room >= 1 else float("inf"),
                    )  # fmt: skip


def _apart(cluster: Cluster, *degrees: int) -> bool:
    """Whether no tp group lies across two domains, the pool of the greater tp being first."""
    low, high = sorted(degrees)
    return cluster.domain_ranks == cluster.count or not (high % low or cluster.domain_ranks % high)


def divided(base: Serving, pool: Pool) -> Serving:
    """The decisions with a pool's degrees."""
    return replace(base, **{f.name: getattr(pool, f.name) for f in fields(Pool)})


def _quickest(read: Mapping[Pool, Reads]) -> list[Pool]:
    """Of divisions that differ in how experts lie, the quickest: all else is alike."""
    best: dict[tuple[int, int, int], Pool] = {}
    for pool, one in read.items():
        key = (pool.tp, pool.pp, pool.attention_dp)
        if key not in best or (one.alone_s, -one.prompts_per_s) < (
            read[best[key]].alone_s, -read[best[key]].prompts_per_s
        ):  # fmt: skip
            best[key] = pool
    return list(best.values())


def _worthwhile(decode: Mapping[Pool, Decodes]) -> list[Pool]:
    """Divisions but those to which another, that differs in how experts lie alone, is preferable at
    every number of sequences."""
    found: list[Pool] = []
    for pool, one in decode.items():
        if not any(
            (other.tp, other.pp, other.attention_dp) == (pool.tp, pool.pp, pool.attention_dp)
            and all(a <= b for a, b in zip(decode[other].steps_s, one.steps_s))
            for other in found
        ):  # fmt: skip
            found.append(pool)
    return found
