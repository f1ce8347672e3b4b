"""A plan's decisions on the smallest mesh that keeps their kind: an axis of 8 becomes 2, never 1.

A kind is what a decision is apart from its size: state sharded whole, in part or not, experts
inside or across the tensor-parallel ranks, stages even or not, layers recomputed all, some or none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from cost_models.decisions import Decisions, Share, Workload
from cost_models.state import ranks_of
from planner.legality import illegal, inconsistent

LENGTH = 32  # tokens a sample of the twin; divides among every cp and tp of a twin
AXES: tuple[str, ...] = ("pp", "dp", "cp", "tp")
LEVELS: tuple[str, ...] = ("full", "selective", "none")  # as they stand in a stage


def _sign(n: int) -> int:
    return (n > 0) - (n < 0)


def _kind(d: Decisions) -> tuple[object, ...]:
    """What a smaller mesh must keep."""
    dense, expert = ranks_of(d, False), ranks_of(d, True)
    return (
        dense.shard > 1, dense.replicas > 1, d.dp_outer > 1 and d.dp > d.dp_outer,
        bool(d.shares) and d.shard == d.dp * d.cp,
        d.ep * d.etp > 1 and (d.edp > 1, expert.shard > 1, expert.replicas > 1),
    )  # fmt: skip


def _across(d: Decisions) -> int:
    """Whether experts lie inside the tensor-parallel ranks, just on them, or across."""
    return _sign(d.ep * d.etp - d.tp) if d.ep * d.etp > 1 else 0


def meshes(d: Decisions, limit: int) -> Iterator[Decisions]:
    """Small meshes of these decisions' kind, the fewest processes first."""
    axes: list[tuple[int, ...]] = [
        (1,) if getattr(d, axis) == 1 else (2, 4, 8) for axis in AXES
    ]  # fmt: skip
    if min((tp for _, tp in d.tp_by_part), default=1) > 1:  # the twin's least is split as well
        axes[-1] = (4, 8)
    blocks = [(1,) if getattr(d, axis) == 1 else (2, 4, 8) for axis in ("ep", "etp")]
    found = []
    for (pp, dp, cp, tp), (ep, etp) in itertools.product(
        itertools.product(*axes), itertools.product(*blocks)
    ):
        ranks = dp * cp * tp
        if pp * ranks > limit or pp > 2 or ranks % (ep * etp):
            continue
        for shard in (n for n in range(1, dp * cp + 1) if (dp * cp) % n == 0):
            small = replace(d, pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp, shard=shard,
                            dp_outer=min(2, d.dp_outer))  # fmt: skip
            if _kind(small) == _kind(d):
                order = (small.gpus, _across(small) != _across(d), cp, tp, dp, ep, etp, shard)
                found.append((order, small))
    return (small for _, small in sorted(found, key=lambda pair: pair[0]))


def stage_count(d: Decisions) -> int:
    """Stages of the twin: two pipeline ranks, with two stages each where the plan has more."""
    return 1 if d.pp == 1 else 2 * min(2, d.virtual_stages)


def least_layers(d: Decisions) -> int:
    """How many layers the twin needs for every stage to keep its kinds, uneven if the plan's is."""
    uneven = len(set(d.stages)) > 1
    return stage_count(d) * max(len(levels) for levels in _levels(d)) + uneven


def _levels(d: Decisions) -> list[list[str]]:
    """The ways that each stage's layers are treated, as they stand in the stage; those offloaded
    by count as "selective"."""
    found = []
    for count, (full, some) in zip(d.stages, d.pairs):
        sizes = (("full", full), ("selective", some), ("none", count - full - some))
        found.append([level for level, size in sizes if size > 0])
    return found


def cut_stages(stages: tuple[int, ...], count: int, layers: int) -> tuple[int, ...]:
    """Share `layers` over `count` stages as unevenly as the plan does: one more where it has more,
    from its first stage to its last."""
    if count == 1:
        return (layers,)
    base, rest = divmod(layers, count)
    like = [stages[_place(k, count, len(stages))] for k in range(count)]
    order = sorted(range(count), key=lambda k: -like[k])
    cut = [base + (order.index(k) < rest) for k in range(count)]
    if len(set(stages)) > 1 and len(set(cut)) == 1 and base > 1:
        most, least = (order[0], order[-1]) if like[order[0]] > like[order[-1]] else (0, count - 1)
        cut[most] += 1
        cut[least] -= 1
    return tuple(cut)


def _place(k: int, count: int, of: int) -> int:
    """The stage of the plan that the twin's stage k stands for."""
    return round(k * (of - 1) / (count - 1)) if count > 1 else 0


def cut_recompute(d: Decisions, cut: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Each stage's kinds of recomputation on its fewer layers; a kind that only a stage between
    has goes to the stage with most layers to spare."""
    levels = _levels(d)
    mine = [list(levels[_place(k, len(cut), len(levels))]) for k in range(len(cut))]
    if len(cut) == 1:
        mine = [[x for x in LEVELS if any(x in row for row in levels)]]
    for level in LEVELS:
        used = any(level in row for row in levels)
        if used and not any(level in row[:n] for row, n in zip(mine, cut)):
            spare = max(range(len(cut)), key=lambda k: cut[k] - len(mine[k]))
            mine[spare].append(level)
    rows = []
    for names, count in zip(mine, cut):
        kept = [x for x in LEVELS if x in names][:count]
        sizes = dict.fromkeys(kept, 1)
        sizes[kept[-1]] += count - len(kept)
        rows.append((sizes.get("full", 0), sizes.get("selective", 0)))
    return tuple(rows)


def lost(d: Decisions, small: Decisions) -> tuple[str, ...]:
    """What of these decisions' kind the smaller ones do not keep, in words."""
    found = []
    if len(set(d.stages)) > 1 and len(set(small.stages)) == 1:
        found.append("the plan's stages are uneven, the twin's are not: it has too few layers")
    asked = {level for row in _levels(d) for level in row}
    kept = {level for row in _levels(small) for level in row}
    found += [f"no layer of the twin has recompute {level}" for level in sorted(asked - kept)]
    if len(d.shares) > len(small.shares):
        found.append(f"the plan's replicas are on {len(d.shares)} parts, the twin's on two")
    if d.tp_by_part and len(d.parts) > 2:
        found.append(f"the plan's stages are on {len(d.parts)} parts, the twin's on two")
    if d.formats:
        found.append("the twin's matmuls are in fp32, the plan's in fewer bits")
    return tuple(found)


def cut_decisions(
    d: Decisions, workload: Workload, mesh: Decisions, layers: int, length: int
) -> tuple[Decisions, Workload]:
    """The decisions on a small mesh: fewer micro-batches, samples, layers a stage."""
    keys = (*AXES, "ep", "etp", "dp_outer", "shard")
    small = replace(d, parts=(), **{key: getattr(mesh, key) for key in keys})
    if d.tp_by_part:
        small = cut_tp(d, small)
    count = stage_count(small)
    cut = cut_stages(d.stages, count, layers)
    many = 2 * small.pp if d.microbatches >= 2 * d.pp else small.pp
    batches = many if d.pp > 1 else min(2, d.microbatches)
    small = replace(
        small.cut(cut, cut_recompute(d, cut)), virtual_stages=count // small.pp,
        micro_batch=min(2, d.micro_batch), microbatches=batches, formats=(),
    )  # fmt: skip
    if d.shares:
        small = replace(small, shares=cut_shares(d, small, cut))
    parts = [small.recompute, *(share.recompute for share in small.shares)]
    if not any(some for rows in parts for _, some in rows):
        small = replace(small, keep=())
    engine = workload.engine
    if engine not in ("native", "native-compiled"):
        engine = "native-compiled" if d.compile else "native"
    return small, replace(
        workload, engine=engine, seq_len=length, precision="fp32",
        global_batch=small.micro_batch * sum(small.microbatches_by_data_rank),
    )  # fmt: skip


def cut_tp(d: Decisions, small: Decisions) -> Decisions:
    """Two stages, on the parts with the plan's least and largest tp, in the plan's order: the least
    is 1 where the plan's is."""
    (low, least), (high, _) = (pick(d.tp_by_part, key=lambda row: row[1]) for pick in (min, max))
    own = {low: 1 if least == 1 else small.tp // 2, high: small.tp}
    tps = tuple((name, own[name]) for name, _ in d.tp_by_part if name in own)
    return replace(small, tp_by_part=tps, parts=tuple((name, 1) for name, _ in tps))


def cut_shares(d: Decisions, small: Decisions, cut: tuple[int, ...]) -> tuple[Share, ...]:
    """Two parts with half of the twin's data ranks each: of the plan's, the one that runs the most
    micro-batches and the one that runs the fewest, which are fewer where the plan's are."""
    most = max(d.shares, key=lambda share: share.microbatches)
    least = min((s for s in d.shares if s is not most), key=lambda share: share.microbatches)
    fewer = least.microbatches < most.microbatches and small.microbatches > 1
    rows = [cut_recompute(d.on_part(share), cut) for share in (most, least)]
    counts = (small.microbatches, small.microbatches - fewer)
    return tuple(
        Share(part=share.part, dp=small.dp // 2, microbatches=count,
              recompute=() if again == small.recompute else again)
        for share, count, again in zip((most, least), counts, rows)
    )  # fmt: skip


def refused(d: Decisions, workload: Workload, layers: int) -> str | None:
    """Why the tables refuse a twin's decisions, or None."""
    return inconsistent(d, workload, layers=layers) or illegal(d, workload)


def pairs(d: Decisions) -> tuple[Decisions, ...]:
    """The decisions with every pair of their axes alone, for plans that no one twin holds."""
    axes = [axis for axis in AXES if getattr(d, axis) > 1]
    return tuple(only(d, pair) for pair in itertools.combinations(axes, 2)) or (d,)


def only(d: Decisions, axes: tuple[str, ...]) -> Decisions:
    """The decisions without the other axes; experts keep what ranks are left for them."""
    sizes: dict[str, Any] = {axis: getattr(d, axis) if axis in axes else 1 for axis in AXES}
    small = replace(d, **sizes)
    if small.pp == 1 or small.tp == 1:
        small = replace(small, tp_by_part=())
    if small.pp == 1 or small.dp == 1:
        small = replace(small, dp_outer=1, shares=small.shares if small.dp > 1 else ())
    ranks = small.dp * small.cp
    whole = d.shard == d.dp * d.cp
    shard = ranks if whole and d.zero else min(d.shard, ranks)
    small = replace(small, shard=next(n for n in range(shard, 0, -1) if ranks % n == 0))
    if small.pp == 1:
        total = sum(d.stages)
        levels = d.pairs or ((0, 0),)
        small = small.cut((total,), ((sum(f for f, _ in levels), sum(s for _, s in levels)),))
        small = replace(small, schedule="1f1b", virtual_stages=1, reshard=False)
    small = replace(small, sequence_parallel=d.sequence_parallel and small.tp > 1)
    block = small.dp * small.cp * small.tp
    ep = next(n for n in range(min(d.ep, block), 0, -1) if block % n == 0)
    etp = next(n for n in range(min(d.etp, block // ep), 0, -1) if block // ep % n == 0)
    return replace(small, ep=ep, etp=etp)


Fits = Callable[[Decisions, Workload], str | None]


def smallest(
    d: Decisions, workload: Workload, layers: int, length: int, limit: int, fits: Fits
) -> tuple[Decisions, Workload] | str:
    """The smallest mesh of the kind that the twin's graph holds; or why the last tried does not.

    fits: says what of the twin's graph the decisions contradict.
    """
    reason = f"no mesh of at most {limit} processes keeps the plan's kinds"
    for mesh in meshes(d, limit):
        small, work = cut_decisions(d, workload, mesh, layers, length)
        found = refused(small, work, layers) or fits(small, work)
        if found is None:
            return small, work
        reason = found
    return reason
