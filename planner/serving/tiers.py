"""Which layers' weights lie below the GPU, whether they stream or the CPU multiplies them, and in
which format.

For one set of degrees: an integer program over the blocks, how many layers of each lie on which
tier in which way, and in which of the formats that are open, that costs a request's own steps (its
prefill and its decode steps, each the longer of what runs and what streams) under the memory of the
GPU and of every tier. Experts are taken in steps of a sixteenth of them, the most wanted stay.
Solved to its optimum by CP-SAT.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cost_models.hardware import Cluster
from cost_models.serving import memory_of, step_s
from cost_models.serving_decisions import Held, ServeLoad, Serving
from cost_models.serving_engines import ServingEngine
from cost_models.serving_ops import Costs, Step, step_of
from cost_models.serving_shapes import ServedModel
from cost_models.serving_tiers import below, below_bytes, block_bytes, layers_of, sharers
from ir.errors import UsageError

STEPS = 16  # of a layer's experts, and of the layers of a block
_US, _KIB = 1e6, 1 << 10  # integers of microseconds, and of KiB
_LONGEST = 1 << 42  # microseconds: 50 days


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way for a block: how it lies, what it frees and takes, and of a decode step and a prefill
    what the GPU waits for, what is in the background on the link. word: its format; more_bytes: of
    the whole block, beyond what the given decisions have it in (slower kernels are in waits_s)."""

    held: Held | None
    freed_bytes: float
    ring_bytes: float
    waits_s: tuple[float, float]
    streams_s: tuple[float, float]
    word: str = ""
    more_bytes: float = 0.0


def choices(
    costs: Costs, model: ServedModel, block: str, steps: tuple[Step, Step]
) -> list[Choice]:
    """Every way for a block; on the GPU first. What the cache streams is not the block's."""
    s, cluster = replace(costs.serving, kv_tier="gpu"), costs.cluster
    found = [Choice(held=None, freed_bytes=0.0, ring_bytes=0.0, waits_s=(0.0, 0.0),
                    streams_s=(0.0, 0.0))]  # fmt: skip
    total = layers_of(model, block)
    most = total // s.ep if block == "routed_experts" else total
    kept = sorted({most * k // STEPS for k in range(STEPS)})
    for tier in cluster.tiers:
        for place in _places(block, tier.name):
            for resident in kept:
                held = Held(block=block, tier=tier.name, place=place, resident=resident)
                alone = replace(costs, serving=replace(s, tiers=(held,)))
                each = [below(alone, model, step) for step in steps]
                bytes_ = below_bytes(model, alone.serving)
                found.append(Choice(
                    held=held, freed_bytes=bytes_.total, ring_bytes=bytes_.buffers,
                    waits_s=_pair([b.fetched_s + b.on_host_s - b.saved_s for b in each]),
                    streams_s=_pair([b.stream_s for b in each]),
                ))  # fmt: skip
    return found


def _in_formats(
    model: ServedModel, costs: Costs, load: ServeLoad, block: str, words: Sequence[str]
) -> list[Choice]:
    """Every way for a block in each of the formats, against the one that it is given in."""
    s = costs.serving
    given = s.format_of(block)
    _, known = _alone(model, costs.cluster, costs.engine, _of(s, block, given), load, block, STEPS)
    found = []
    for word in words or (given,):
        other = _of(s, block, word)
        rows, runs = _alone(model, costs.cluster, costs.engine, other, load, block, STEPS)
        more = block_bytes(model, other, block) - block_bytes(model, s, block)
        for c in rows:
            decode, prefill = (w + a - b for w, a, b in zip(c.waits_s, runs, known))
            found.append(replace(c, word=word, more_bytes=more, waits_s=(decode, prefill)))
    return found


def _of(s: Serving, block: str, word: str) -> Serving:
    """What of the decisions a block's ways depend on: no other block's format, no cache's."""
    return replace(s, weights=((block, word),), kv=Serving().kv, kv_tier="gpu")


@functools.lru_cache(maxsize=4096)
def _alone(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad,
    block: str, steps: int,
) -> tuple[tuple[Choice, ...], tuple[float, float]]:  # fmt: skip
    """A block's ways in one format, and a decode step and a prefill with all on the GPU, whose
    differences between formats are the block's."""
    del steps  # of the grid: whoever asks for another has another answer
    costs, two = Costs(cluster=cluster, engine=engine, serving=s), steps_of(s, load)
    return tuple(choices(costs, model, block, two)), _runs_s(costs, model, two)


def steps_of(s: Serving, load: ServeLoad) -> tuple[Step, Step]:
    """A rank's part of a decode step, and a prompt read alone."""
    one = np.ones(1)
    each = s.batch / s.replicas / s.attention_dp
    return (
        step_of(each / s.pp * one, (load.prompt + load.output / 2) * one),
        step_of(0.0 * one, 0.0, one, load.prompt * one),
    )


def _runs_s(costs: Costs, model: ServedModel, steps: tuple[Step, Step]) -> tuple[float, float]:
    """A decode step and a prefill with all on the GPU."""
    s = costs.serving
    bare = replace(costs, serving=replace(s, kv_tier="gpu"))
    return _pair([step_s(bare, model, _whole(step, s)) for step in steps])


def _places(block: str, tier: str) -> tuple[str, ...]:
    """How a block may lie on a tier; a table of tokens is looked up where it is."""
    if block == "embeddings":
        return ("compute",) if tier == "cpu" else ()
    return ("stream", "compute") if tier == "cpu" else ("stream",)


def _pair(values: list[np.ndarray]) -> tuple[float, float]:
    first, second = (float(np.ravel(v)[0]) for v in values)
    return first, second


def best_tiers(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad,
    pinned: tuple[tuple[str, str], ...] | None = None,
    formats: Mapping[str, Sequence[str]] | None = None,
) -> Serving | None:  # fmt: skip
    """The decisions with the best place for every block, `s.batch` sequences being run; None where
    no tiers hold them. pinned: blocks and the tier that each lies on, the others on the GPU.
    formats: those that are open, by block; any other has the decisions'."""
    formats = formats or {}
    costs = Costs(cluster=cluster, engine=engine, serving=s)
    from ortools.sat.python import cp_model  # late: who reads a plan needs no solver

    each = s.batch / s.replicas / s.attention_dp
    steps = steps_of(s, load)
    memory = memory_of(model, cluster, engine, s, load)
    blocks = [b for b in model.block_elements() if b != "router"]
    ways = {block: _in_formats(model, costs, load, block, formats.get(block, ()))
            for block in blocks}  # fmt: skip
    if pinned is not None:
        wanted = dict(pinned)
        for block, word in wanted.items():
            cluster.tier(word)
            if block not in blocks:
                raise UsageError(f"--fix offload={block}:{word}: {model.name} has no {block}",
                                 why=f"its blocks: {', '.join(blocks)}")  # fmt: skip
        ways = {b: [c for c in rows if (c.held.tier if c.held else None) == wanted.get(b)]
                for b, rows in ways.items()}  # fmt: skip
    program = cp_model.CpModel()
    chosen = {
        (block, i): program.new_bool_var(f"{block}.{i}")
        for block, rows in ways.items() for i in range(len(rows))
    }  # fmt: skip
    for block, rows in ways.items():
        program.add_exactly_one(chosen[block, i] for i in range(len(rows)))
    pairs = [(chosen[block, i], row) for block, rows in ways.items() for i, row in enumerate(rows)]
    need = memory.weights_bytes + memory.workspace_bytes + memory.context_bytes
    need += each * memory.kv_bytes_per_sequence - memory.capacity_bytes
    ring = program.new_int_var(0, 1 << 40, "ring")
    layered = [(v, c) for v, c in pairs if c.held and c.held.block != "head"]
    program.add(ring >= sum(v * int(c.ring_bytes / _KIB) for v, c in layered))
    for v, c in pairs:
        if c.held and c.held.block == "head":
            program.add(ring >= v * int(c.ring_bytes / _KIB))
    program.add(
        sum(v * math.floor((c.freed_bytes - c.more_bytes) / _KIB) for v, c in pairs)
        >= ring + int(np.ceil(need / _KIB)) + 1
    )
    for tier in cluster.tiers:
        share = int(tier.bytes / sharers(cluster, s) / _KIB)
        used = [v * (int(c.freed_bytes / _KIB) + 1) for v, c in pairs
                if c.held and c.held.tier == tier.name]  # fmt: skip
        program.add(sum(used) <= share)
    weights = (max(1, round(load.output)), 1)
    spans = []
    for phase, (step, runs) in enumerate(zip(steps, _runs_s(costs, model, steps))):
        cache = below(costs, model, step)
        cached = int(float(np.ravel(cache.cached_s)[0]) * _US)
        gpu = int((runs + float(np.ravel(cache.fetched_s + cache.on_host_s)[0])) * _US)
        span = program.new_int_var(0, _LONGEST, f"step{phase}")
        program.add(span >= gpu + sum(v * round(c.waits_s[phase] * _US) for v, c in pairs))
        streams = sum(v * round(c.streams_s[phase] * _US) for v, c in pairs)
        program.add(span >= cached + streams)
        spans.append(span)
    program.minimize(sum(w * span for w, span in zip(weights, spans)))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = 5.0
    solver.parameters.catch_sigint_signal = False  # Ctrl-C is the search's, not this program's
    if solver.solve(program) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    taken = {block: row for block, rows in ways.items()
             for i, row in enumerate(rows) if solver.value(chosen[block, i])}  # fmt: skip
    words = dict(s.weights) | {b: taken[b].word for b in formats if b in taken}
    return replace(s, tiers=tuple(c.held for c in taken.values() if c.held),
                   weights=tuple((b, w) for b, w in words.items() if w != s.default))  # fmt: skip


def _whole(step: Step, s: Serving) -> Step:
    """The replica's step of one rank's."""
    return replace(step, sequences=step.sequences * s.attention_dp * s.pp,
                   prompts=step.prompts * s.attention_dp)  # fmt: skip


