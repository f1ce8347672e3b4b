"""Stage programs of states with the optimizer of some layers below, of our own runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from cost_models.decisions import Decisions
from cost_models.rooms import with_binding
from cost_models.stage_problem import Lowered, StageProblem, least_of
from cost_models.step import Assignments, Step
from planner.by_layer import best_count
from planner.dominance import undominated
from planner.offloads import HOST, fills_host
from planner.outcome import Program
from planner.refuted import unlimited
from planner.room import over_below
from planner.space import Space
from planner.stage_bounds import bound_lowered_ps, lower_bound_ps
from planner.stage_memory import surely_fits, surely_infeasible


def programs_below(
    space: Space, ways: Sequence[Decisions], laid: Assignments, known: Mapping[Decisions, Step],
    least: Mapping[Decisions, int], target: int, full: list[Decisions],
) -> Iterator[Program]:  # fmt: skip
    """The programs that may have a step below `target`, one for each set of operations that may be
    kept, and one with activations on the host by count of layers: without a pipeline each of the
    best count, with one of all counts. A stage's kernels and transfers are the same with any, as
    under a pipeline parameters are gathered once a step. known: steps of some ways. least: bounds
    if memory were in nobody's way, where known. full: is told of states beside which the host's
    memory may be too full."""

    def may_pay(d: Decisions) -> list[Decisions]:
        """Its schedules with one stage a rank that may be better with no optimizer below."""
        above, made = d.with_state(False).offload, space.schedules(d)
        return [one for one in made if one.virtual_stages == 1
                and least.get(replace(one, offload=above), 0) < target]  # fmt: skip

    states = [(d, may_pay(d)) for d in ways if space.by_layer(d)]
    states = [row for row in states if row[1]]
    both = {}  # steps with a second row of each kind, for layers below, as `Costs.step` has them
    for d, _ in states:
        none, every = (known.get(x) or space.costs.step(x, laid) for x in (d.with_state(False), d))
        both[d] = replace(none, rows=(*none.rows, *every.rows))
    if states and states[0][0].pp == 1:
        for d, _ in states:
            yield from _alone(space, d, both[d], laid, target, full)
        return
    schedules = dict(states)
    for d, step in undominated([*both.items()]):
        none, every = _ends(space, d, step)
        for one in schedules[d]:
            pairs = _pairs(space, _counted(one, 1), none, every, laid, target)
            for made, low, high, fills in pairs:
                full += [d] * fills
                problem = with_lowered(low, high)
                bound = bound_lowered_ps(problem)  # with none below it is another program
                if bound < target and not surely_infeasible(problem):
                    yield Program(bound_ps=bound, decisions=made, problem=problem)


def _counted(d: Decisions, *layers: int) -> Decisions:
    """The same with the optimizers of so many layers of each stage below, on the tier it names."""
    return d.on(f"{d.tiers['optimizer']}:" + "/".join(map(str, layers)))


def whole_below(d: Decisions) -> Decisions:
    """The state with the optimizers of all layers where those of some are, and with no activations
    below by count."""
    whole = d.with_state(True)
    below = (row for row in whole.offload if row[0] != "activations" or d.moved is None)
    return replace(whole, offload=tuple(below))


def _ends(space: Space, d: Decisions, step: Step) -> tuple[Step, Step]:
    """The steps with the optimizers of no layers below, and of all; step: of any count."""
    layers = len(space.costs.chain.layers)
    none = replace(step, kinds=space.costs.kind_of)
    return none, space.costs.lowered(step, _counted(d, layers))


def _alone(
    space: Space, d: Decisions, both: Step, laid: Assignments, target: int, full: list[Decisions]
) -> Iterator[Program]:
    """One stage: the programs of the best count."""
    costs, most = space.costs, len(space.costs.chain.layers)
    step = costs.lowered(both, _counted(d, 1))
    while most and over_below(costs.cluster, costs.lowered(step, _counted(d, most))):
        most -= 1
    for one in space.schedules(step.decisions):
        for made, low, high, fills in _pairs(space, one, *_ends(space, d, step), laid, target):
            full += [d] * fills
            every = _easier(low, high)
            if lower_bound_ps(every) >= target or surely_infeasible(every):
                continue
            n = best_count(low, high, most, target)
            if n is not None:
                yield _of_count(space, _counted(made, n), step, laid)


def _easier(none: StageProblem, every: StageProblem) -> StageProblem:
    """A problem that is no harder than one with the optimizers of any layers below, which one
    stage computes in other times: the least of both."""
    times = ("forward_ps", "input_grad_ps", "weight_grad_ps", "recompute_ps", "activation_bytes",
             "working_bytes", "tail_comm_ps")  # fmt: skip
    hidden = tuple(map(max, none.tail_hide_ps, every.tail_hide_ps))
    return replace(
        none, **least_of((none, every), times), tail_hide_ps=hidden, rooms=(),
        lowered=_lowered(every),
    )  # fmt: skip


def _of_count(space: Space, d: Decisions, step: Step, laid: Assignments) -> Program:
    """step: of another count."""
    costs = space.costs
    made = costs.lowered(step, d)
    if d.keep != space.kept:
        made = costs.kept_otherwise(made, d, laid)
    if d.moved is not None:
        made = costs.counted(made, d, laid)
    problem = with_binding(space.problem(made, d))
    return Program(bound_ps=lower_bound_ps(problem), decisions=d, problem=problem)


def _pairs(
    space: Space, d: Decisions, none: Step, every: Step, laid: Assignments, target: int
) -> Iterator[tuple[Decisions, StageProblem, StageProblem, bool]]:
    """Of each set that layers may keep and with activations by count, on each tier where the host's
    memory may be too full: the program with the optimizers of no layers below, and of all; and
    whether they may fill it."""
    pairs = [[(d, space.problem(end, d))] for end in (none, every)]
    above = pairs[0][0][1]
    if lower_bound_ps(unlimited(above)) >= target or surely_fits(above):
        return
    for found, end in zip(pairs, (none, every)):
        found += space.kept_otherwise(end, *found[0])
    for (made, low), (_, high) in zip(*pairs, strict=True):
        yield made, low, high, fills_host(with_binding(high))
    for moved in space.by_count(d):
        low, high = (
            space.problem(space.costs.counted(end, moved, laid), moved) for end in (none, every)
        )
        fills = any(fills_host(with_binding(end)) for end in (low, high))
        yield moved, low, high, fills
        if not fills and moved.tiers["activations"] == HOST:
            return


def _lowered(every: StageProblem) -> Lowered:
    return Lowered(
        state_bytes=every.state_bytes, gathered_bytes=every.gathered_bytes,
        tail_own_ps=every.tail_own_ps,
    )


def with_lowered(none: StageProblem, every: StageProblem) -> StageProblem:
    """A problem of both: of each layer what it has below in the one, and above in the other."""
    rooms = tuple(replace(here, lowered_bytes=there.state_bytes)
                  for here, there in zip(none.rooms, every.rooms))  # fmt: skip
    joined = replace(none, lowered=_lowered(every), rooms=rooms)
    count = (none.layers,)
    assert joined.lowering(count, count) == every, "layers below differ in what is not lowered"
    return with_binding(joined)


def named(d: Decisions, problem: StageProblem, below: Sequence[int] = ()) -> Decisions:
    """The decisions with what a program of all counts has below; of others as they are."""
    if problem.lowered is None:
        return d
    return _counted(d, *below) if any(below) else d.with_state(False)
