"""What a prompt waits for before it is read, in a closed loop: all in steps of the engine.

A request comes when another's answer ends, and answers end where a step does. So arrivals are so
many a decode step, however long the steps are that read prompts: the loop cannot outrun itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cost_models.serving_ops import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests reach an engine, numbers or arrays over the loads of a call.

    waves: how many times the concurrency is sent in all. The first arrives at once; inf is a steady
    state, 1 a burst. bunched: arrivals that a request sees about it over what they would be, were
    they spread evenly (`bunching`). looked_every: decode steps between two looks for arrivals.
    gathered_prompts, gathered_steps: prompts wait for so many to be read together, but no longer
    than so many steps.
    """

    waves: FloatArray | float = math.inf
    bunched: FloatArray | float = 1.0
    looked_every: FloatArray | float = 1.0
    gathered_prompts: FloatArray | float = 1.0
    gathered_steps: FloatArray | float = 0.0


STEADY = Arrivals()


def bunching(spread: float, waves: int) -> float:
    """How much denser arrivals are about a request than evenly, over all waves but the first.

    Requests that start together end apart by their lengths alone, uniform over `spread` of the
    mean; after j answers the ends are normal with j times the variance, and the density that one
    of them sees of the others is 1 / (2 sqrt(pi) s), s the deviation; 1 once they fill the loop.
    """
    deviation = spread / math.sqrt(12)
    seen = [1 / (2 * math.sqrt(math.pi * j) * deviation) for j in range(1, waves)]
    return sum(max(one, 1.0) for one in seen) / len(seen)


def gathered(
    arrivals: Arrivals, a_step: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(steps that a prompt is left waiting on the mean, others that come meanwhile).

    The first to come waits for all, those after it for what is left, the last of enough for none;
    a_step: arrivals a step.
    """
    more = np.maximum(np.asarray(arrivals.gathered_prompts, dtype=np.float64) - 1, 0.0)
    long = np.asarray(arrivals.gathered_steps, dtype=np.float64)
    enough = more / np.maximum(a_step, 1e-12)
    steps = np.minimum(long, enough)
    others = a_step * steps
    patient = (steps + others * steps / 2) / (1 + others)
    return np.where(enough < long, steps / 2, patient), others


def read_before(others: FloatArray, group: FloatArray) -> FloatArray:
    """Prompts read no later than one's own among `others` that wait too, of which `group` share a
    step: all of them where they fit its step, else half and the rest of the step."""
    return np.minimum(others, np.maximum((others + group - 1) / 2, 0.0))


def turns(before: FloatArray, at_once: FloatArray | float) -> FloatArray:
    """Times that so many prompts before one's own are read, if so many are at once: one's own
    turn has all but one of those."""
    return np.asarray(np.maximum(before - (at_once - 1), 0.0) / at_once)


def shared(
    arrivals: Arrivals, a_step: FloatArray, group: FloatArray, looked: FloatArray | float = 1.0
) -> FloatArray:
    """Share that a prompt has of what a step takes however many it reads. Those that come between
    two looks (Poisson), or that are waited for, are read together as far as they fit a step."""
    came = np.maximum(a_step * looked, 1e-12)
    together = np.maximum(came / -np.expm1(-came), 1 + gathered(arrivals, a_step)[1])
    return np.asarray(1 / np.clip(together, 1.0, np.maximum(group, 1.0)))


def mixed_s(
    arrivals: Arrivals, others: FloatArray, output: FloatArray, decode_s: FloatArray,
    own_s: FloatArray, steps: FloatArray, group: FloatArray, at_once: FloatArray | float = 1.0,
    host_s: float = 0.0,
) -> FloatArray:  # fmt: skip
    """Seconds from arrival to first token where prompts are read in steps that decode too.

    others: requests beside it. own_s: of a prompt's `steps` steps, decoding included; host_s: what
    of each is the same for however many prompts. Half of the
    step that runs, longer by the prompts it reads (an arrival falls anywhere in time, so the
    likelier in a longer step); then a step with those that came during it. at_once: prompts that
    those steps read beside one another, one each of as many replicas of attention.
    """
    a_step = others / output * arrivals.bunched
    prompt_s = np.maximum(own_s - steps * (decode_s + host_s), 0.0)
    each_s = prompt_s + steps * host_s * shared(arrivals, a_step, group)
    mean_s = decode_s + each_s * a_step / at_once / steps
    # of the step that an arrival falls in; the prompts of a step are Poisson
    met_s = mean_s + each_s**2 * a_step / at_once / mean_s
    held, more = gathered(arrivals, a_step)
    before = read_before(a_step * met_s / mean_s + more, group)
    late = np.maximum((before + 1) / group - steps, 0.0)
    waited_s = prompt_s * turns(before, at_once) + late * (decode_s + host_s)
    return held * decode_s + met_s / 2 + own_s + waited_s


def prior_s(
    arrivals: Arrivals, others: FloatArray, output: FloatArray, decode_s: FloatArray,
    own_s: FloatArray, steps: FloatArray, group: FloatArray, at_once: FloatArray | float = 1.0,
    host_s: float = 0.0,
) -> FloatArray:  # fmt: skip
    """The same where prompts are read before anything is decoded. own_s: of a prompt alone.

    An engine that decodes looks for arrivals once in so many steps, and after each read.
    """
    a_step = others / output * arrivals.bunched
    between_s = arrivals.looked_every * decode_s
    prompt_s = own_s - steps * host_s
    share = shared(arrivals, a_step, group, arrivals.looked_every)
    prompts_s = a_step / at_once * (prompt_s + steps * host_s * share)
    reads = prompts_s / (decode_s + prompts_s)  # share of the time
    held, more = gathered(arrivals, a_step)
    before = read_before(a_step * arrivals.looked_every + more, group)
    running_s = (1 - reads) * between_s / 2 + reads * own_s / 2
    late = np.maximum((before + 1) / group - steps, 0.0)
    waited_s = prompt_s * turns(before, at_once) + late * host_s
    return held * decode_s + running_s + own_s + waited_s
