"""Stages: choices made better by annealing.

Where memory is tight, what a rank recomputes on which of its chunks decides as much as where
layers lie, and no single move betters most choices. Many choices are changed at once, a layer at a
time; a worse one is kept the seldomer the worse it is and the later it comes.
"""

from __future__ import annotations

import numpy as np

from cost_models.stage_many import Ints, Many
from cost_models.stage_problem import LEVELS, Found, StageProblem

CHOICES = 64  # that are changed at once
ROUNDS = 1_000
FIRST = 250  # of them, beside: what is then far from the best is left
FAR = 50  # from the best: further than one part in so many
HOPELESS = 12  # so far from it that nothing is tried
HEAT = 5e-3  # of the step: what a choice may be worse at first, in the mean
CHANGES = (1, 1, 2, 3)  # layers that are changed in a round, each number as likely
CULLED = 10  # rounds, after which the worst fourth makes room for the best one


def annealed(p: StageProblem, given: Found, below: int) -> Found:
    """The best choice found from this one on; given again where none is better. More is spent where
    a little comes near to a step of `below`."""
    if given.step_ps > below + below // HOPELESS:
        return given
    found = _annealed(p, given, FIRST)
    return found if found.step_ps > below + below // FAR else _annealed(p, found, ROUNDS)


def _annealed(p: StageProblem, given: Found, rounds: int) -> Found:
    """As `annealed`, in so many rounds."""
    able = np.array([level for level, name in enumerate(LEVELS) if name in p.levels])
    many, rng = Many(p), np.random.default_rng(0)
    start = np.array([(n - sum(pair), pair[1], pair[0])
                      for n, pair in zip(given.stages, given.recompute)])  # fmt: skip
    choices = np.repeat(start[None], CHOICES, axis=0)
    steps = np.full(CHOICES, given.step_ps)
    least, best = given.step_ps, start
    for turn in range(rounds):
        heat = HEAT * given.step_ps * (1 - turn / rounds)
        others = _changed(rng, choices, able)
        then = many.steps_ps(others)
        taken = then - steps <= heat * rng.standard_exponential(CHOICES)
        choices[taken], steps[taken] = others[taken], then[taken]
        first = int(steps.argmin())
        if steps[first] < least:
            least, best = int(steps[first]), choices[first].copy()
        if turn % CULLED == CULLED - 1:
            order, few = np.argsort(steps, kind="stable"), CHOICES // 4
            choices[order[-few:]], steps[order[-few:]] = choices[order[:few]], steps[order[:few]]
    if best is start:
        return given
    return Found(
        stages=tuple(best.sum(axis=1).tolist()), step_ps=least,
        recompute=tuple((full, selective) for _, selective, full in best.tolist()),
    )  # fmt: skip


def _changed(rng: np.random.Generator, choices: Ints, able: Ints) -> Ints:
    """Of each choice one of which a few layers have another level, another stage, or both."""
    found, (count, stages, _) = choices.copy(), choices.shape
    every, changes = np.arange(count), rng.choice(CHANGES, count)
    place = np.searchsorted(able, np.arange(len(LEVELS)))
    for change in range(max(CHANGES)):
        here, there = rng.integers(0, stages, (2, count))
        stays = rng.random(count) < 0.5
        there = np.where(stays, here, there)
        upto = found[every, here].cumsum(axis=1)
        layer = (rng.random(count) * upto[:, -1]).astype(np.int64)
        level = (layer[:, None] >= upto).sum(axis=1)  # each layer of the stage as likely
        to = level
        if len(able) > 1:
            other = able[(place[level] + rng.integers(1, len(able), count)) % len(able)]
            to = np.where(stays | (rng.random(count) < 0.5), other, level)
        on = (change < changes) & ((here == there) | (upto[:, -1] > 1))
        some = every[on]
        found[some, here[on], level[on]] -= 1
        found[some, there[on], to[on]] += 1
    return found
