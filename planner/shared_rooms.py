"""Stage programs whose best choice is too much for a tier that GPUs of several stages share: parts
of them, by what each rank may lay there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cost_models.decisions import Decisions
from cost_models.hardware import Cluster
from cost_models.stage_problem import Room, StageProblem
from cost_models.tiers import sharing


def parts_of(
    problem: StageProblem, d: Decisions, cluster: Cluster, laid: Mapping[str, Sequence[int]]
) -> list[StageProblem]:
    """Programs that together have every choice whose GPUs fit a tier, and none the choice that lays
    so much; empty where no room of the program is too full. laid: by tier, of each rank, a GPU.

    Of the ranks that share it one lays less, or all lay more than there is: the n-th part has the
    n-th rank lay its share of the excess less, and those before it more than that.
    """
    for place, room in enumerate(problem.rooms):
        tier, used = cluster.tier(room.tier), laid.get(room.tier, ())
        for some in sharing(d, cluster.sharers(tier)) if used else ():
            over = sum(count * used[rank] for rank, count in some.items()) - tier.bytes
            if over > 0:
                limits = _limits(problem, room, some, used, over, tier.bytes)
                rooms = [
                    (*problem.rooms[:place], replace(room, limits_bytes=row),
                     *problem.rooms[place + 1 :])
                    for row in limits
                ]  # fmt: skip
                return [replace(problem, rooms=row) for row in rooms]
    return []


def _limits(
    problem: StageProblem, room: Room, some: Mapping[int, int], used: Sequence[int], over: int,
    tier_bytes: int,
) -> list[tuple[int, ...]]:  # fmt: skip
    """What each rank may lay in each part. some: GPUs of each rank that share the tier."""
    found, now = [], [room.of_rank(rank) for rank in range(problem.pp)]
    least: dict[int, int] = {}  # of the ranks before, what each lays at least
    for rank in sorted(some, key=lambda rank: -used[rank]):
        mine = used[rank] - -(-over // (len(some) * some[rank]))  # so that all with more are over
        if mine >= 0:
            limits = list(now)
            for other, count in some.items():
                beside = sum(some[k] * size for k, size in least.items() if k != other)
                limits[other] = min(limits[other], (tier_bytes - beside) // count)
            limits[rank] = min(limits[rank], mine)
            if min(limits) >= 0:
                found.append(tuple(limits))
        least[rank] = mine + 1
    return found
