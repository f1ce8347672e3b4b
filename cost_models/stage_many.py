"""Many choices of one stage problem at once: their steps where they fit, as `evaluate` has them
one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.schedule import latencies_ps
from cost_models.schedule_many import Makespans
from cost_models.stage_problem import LEVELS, StageProblem, sends_ps, slow_of

Ints = NDArray[np.int64]
NEVER_PS = 1 << 62  # the step of a choice that does not fit


class Many:
    """Of one problem whose ranks are alike, no layer of it lowered.

    A choice is an array [stage, level] of layers, at least one on each stage, levels as LEVELS has
    them: a stage's first layers compute everything again, the next in part, the rest nothing.
    """

    def __init__(self, problem: StageProblem) -> None:
        p = self.problem = problem
        assert not p.ranks and p.lowered is None
        stages = range(p.count)
        self._rows: dict[str, tuple[Ints, Ints]] = {}  # by level and layer, and of stages beside

        def put(name: str, layers: ArrayLike, beside: ArrayLike) -> None:
            every = np.broadcast_to(np.array(layers, dtype=np.int64), (len(LEVELS), p.layers))
            self._rows[name] = every.ravel(), np.array(beside, dtype=np.int64)

        def ends(name: str, glue_ps: int = 0) -> list[int]:
            return [glue_ps + sum(getattr(e, name) for e in p.extras(k)) for k in stages]

        again = np.array([[0] * p.layers, p.recompute_ps[1], p.recompute_ps[0]])
        put("forward", p.forward_ps, ends("forward_ps", p.rank_glue_forward_ps))
        put("back", again + p.input_grad_ps, ends("input_grad_ps", p.rank_glue_backward_ps))
        put("weight", p.weight_grad_ps, ends("weight_grad_ps"))
        put("comm", np.subtract(p.tail_comm_ps, p.tail_hide_ps),
            np.subtract(ends("tail_comm_ps"), ends("tail_hide_ps")))  # fmt: skip
        put("own", p.tail_own_ps, ends("tail_own_ps"))
        put("state", p.state_bytes, ends("state_bytes"))
        put("held", p.activation_bytes, ends("activation_bytes"))
        for name in ("working_bytes", "gathered_bytes"):
            most = [max([0, *(getattr(e, name) for e in p.extras(k))]) for k in stages]
            put(name, getattr(p, name), most)
        for room in p.rooms:
            put(f"state {room.tier}", room.state_bytes, [room.beside_bytes(k, p.count)
                                                         for k in stages])  # fmt: skip
            put(f"held {room.tier}", room.aside_bytes, [0] * p.count)
        self._stages = np.array([p.stages_of(rank) for rank in range(p.pp)])  # [rank, chunk]
        moments = [p.in_flight(rank) for rank in range(p.pp)]
        longest = max(map(len, moments))  # [rank, moment, chunk]
        self._held = np.array([[*some, *some[:1] * (longest - len(some))] for some in moments])
        self._makespans = Makespans(
            p.schedule, p.pp, p.microbatches, p.virtual_stages,
            latencies_ps(p.schedule, p.pp, p.count, sends_ps(p)), [busy for _, busy in slow_of(p)],
        )  # fmt: skip

    def steps_ps(self, choices: Ints) -> Ints:
        """[choice]: the step, NEVER_PS where it does not fit. choices: [choice, stage, level]."""
        found = np.full(len(choices), NEVER_PS)
        fits = self._fits(_Laid.of(choices))
        if fits.any():
            laid = _Laid.of(choices[fits])
            forward, back, weight = (laid.sums(*self._rows[name])
                                     for name in ("forward", "back", "weight"))  # fmt: skip
            durations = np.stack([forward, back, weight, back + weight], axis=2)
            tails = np.maximum(self._of_ranks(laid, "comm"), 0) + self._of_ranks(laid, "own")
            spans = self._makespans.of(durations.reshape(len(forward), -1).T.copy())
            found[fits] = spans + tails.max(axis=1)
        return found

    def _fits(self, laid: _Laid) -> NDArray[np.bool_]:
        """[choice]: whether each rank holds it, and each tier below."""
        p, fits = self.problem, []
        used = p.constant_bytes + self._laid(laid, "state", "held")
        used += self._of_ranks(laid, "working_bytes", np.maximum)
        used += 2 * self._of_ranks(laid, "gathered_bytes", np.maximum)
        fits.append(used <= p.capacity_bytes)
        for room in p.rooms:
            limits = [room.of_rank(rank) for rank in range(p.pp)]
            below = self._laid(laid, f"state {room.tier}", f"held {room.tier}")
            fits.append(below <= limits)
        found: NDArray[np.bool_] = np.all(np.concatenate(fits, axis=1), axis=1)
        return found

    def _laid(self, laid: _Laid, state: str, held: str) -> Ints:
        """[choice, rank]: bytes of state, and at their peak those of micro-batches."""
        of_chunks = laid.sums(*self._rows[held])[:, self._stages]
        peak: Ints = np.einsum("krc,rmc->krm", of_chunks, self._held).max(axis=2)
        return self._of_ranks(laid, state) + peak

    def _of_ranks(self, laid: _Laid, name: str, add: np.ufunc = np.add) -> Ints:
        """[choice, rank]: over all its stages."""
        found: Ints = add.reduce(laid.sums(*self._rows[name], add)[:, self._stages], axis=2)
        return found


@dataclass(frozen=True, slots=True)
class _Laid:
    """Choices layer by layer. place: [choice, layer], in a row of all levels' layers. starts: of
    all stages of all choices, in a row of all choices' layers."""

    place: Ints
    starts: Ints
    stages: int

    @classmethod
    def of(cls, choices: Ints) -> _Laid:
        ends = choices.sum(axis=2).cumsum(axis=1)
        starts = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        layers, rows = int(ends[0, -1]), np.arange(len(choices))[:, None]
        turns = np.zeros((len(choices), layers + 1), dtype=np.int64)  # of the level
        at = starts
        np.add.at(turns, (rows, at), len(LEVELS) - 1)
        for level in range(len(LEVELS) - 1, 0, -1):
            at = at + choices[..., level]
            np.add.at(turns, (rows, at), -1)
        place = turns.cumsum(axis=1)[:, :-1] * layers + np.arange(layers)
        return cls(place, (starts + rows * layers).ravel(), choices.shape[1])

    def sums(self, layers: Ints, beside: Ints, add: np.ufunc = np.add) -> Ints:
        """[choice, stage]: of a number of layers by level, and of what the stage has beside."""
        each = add.reduceat(layers[self.place].ravel(), self.starts)
        found: Ints = add(each.reshape(-1, self.stages), beside)
        return found
