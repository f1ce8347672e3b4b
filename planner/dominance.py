"""Ways to hold the state of a mesh that no other way beats."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.decisions import Decisions
from cost_models.step import Row, Step


def _profile(step: Step, tiers: Sequence[str]) -> tuple[int, ...]:
    """What a variant costs and holds, each number better when smaller: of every kind of row in the
    layers, and of what is before the first layer and behind the last, which lie together."""
    numbers: list[int] = [n for one in step.beside for n in _profile(one, tiers)]
    numbers += [sum(size for _, size in step.reserved), step.p2p_ps]
    slow = step.slow_sends or ((0, 0),) * step.decisions.pp
    numbers += [number for boundary in slow for number in boundary]
    layers, links = step.chain.layers, len(step.chain.links)
    for end in (range(layers[0]), range(layers[-1] + 1, links)):
        numbers += _together([step.row(i) for i in end], tiers)
    kinds = dict.fromkeys(step.kinds[layers[0] : layers[-1] + 1])
    more = range(max(step.kinds) + 1, len(step.rows))  # of layers whose optimizer lies below
    for k in (*kinds, *more):
        numbers += _together([step.rows[k]], tiers)
    return tuple(numbers)


def _together(rows: Sequence[Row], tiers: Sequence[str]) -> list[int]:
    """Of rows on one rank. Its tail, max(0, comm - hide) + own, is the larger of the sums of own
    and of own + comm - hide: it grows with these two, whatever their parts are."""
    own = [r.floor_ps + r.optimizer_ps + r.offload_ps for r in rows]
    states = [r.state for r in rows]
    return [
        sum(r.forward_ps for r in rows), sum(r.backward_ps for r in rows), sum(own),
        sum(own) + sum(r.tail_comm_ps - r.tail_hide_ps for r in rows),
        sum(s.parameter_bytes + s.gradient_bytes + s.optimizer_bytes for s in states),
        max((s.gathered_bytes for s in states), default=0),
        *(sum(size for r in rows for name, size in r.below if name == tier) for tier in tiers),
    ]  # fmt: skip


def undominated(found: list[tuple[Decisions, Step]]) -> list[tuple[Decisions, Step]]:
    """Variants that no other is at least as good as in every number, the first of equals."""
    kept: list[tuple[tuple[int, ...], tuple[Decisions, Step]]] = []
    tiers = [*dict.fromkeys(name for d, _ in found for name in ("cpu", *d.tiers.values()))]
    for d, step in found:
        mine = _profile(step, tiers)
        if any(all(a <= b for a, b in zip(theirs, mine)) for theirs, _ in kept):
            continue
        kept = [row for row in kept if not all(a <= b for a, b in zip(mine, row[0]))]
        kept.append((mine, (d, step)))
    return [row for _, row in kept]
