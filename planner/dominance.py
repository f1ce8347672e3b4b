"""Ways to hold the state of a mesh that no other way beats."""

from __future__ import annotations

from cost_models.decisions import Decisions
from cost_models.step import Step


def _profile(step: Step) -> tuple[int, ...]:
    """What a variant costs and holds, each number better when smaller."""
    numbers: list[int] = [n for one in step.beside for n in _profile(one)]
    numbers += [sum(size for _, size in step.reserved), step.p2p_ps]
    slow = step.slow_sends or ((0, 0),) * step.decisions.pp
    numbers += [number for boundary in slow for number in boundary]
    for r in step.rows:
        s = r.state
        numbers += [
            r.forward_ps, r.backward_ps, r.tail_comm_ps, -r.tail_hide_ps,
            r.floor_ps + r.optimizer_ps + r.offload_ps,
            s.parameter_bytes + s.gradient_bytes + s.optimizer_bytes, s.gathered_bytes,
            sum(size for _, size in r.below),
        ]  # fmt: skip
    return tuple(numbers)


def undominated(found: list[tuple[Decisions, Step]]) -> list[tuple[Decisions, Step]]:
    """Variants that no other is at least as good as in every number, the first of equals."""
    kept: list[tuple[tuple[int, ...], tuple[Decisions, Step]]] = []
    for d, step in found:
        mine = _profile(step)
        if any(all(a <= b for a, b in zip(theirs, mine)) for theirs, _ in kept):
            continue
        kept = [row for row in kept if not all(a <= b for a, b in zip(mine, row[0]))]
        kept.append((mine, (d, step)))
    return [row for _, row in kept]
