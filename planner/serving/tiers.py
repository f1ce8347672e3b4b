"""Which layers' weights lie below the GPU, in which formats, and whether they stream or the CPU
multiplies them.

For one set of degrees: an integer program over the blocks, the format of each, how many layers of
it lie on which tier in which way, that costs a wave's steps (the prompts of all sequences and their
decode steps, each the longer of what runs and what streams) under the memory of the GPU and of
every tier. Experts are taken in steps of a sixteenth of them, the most wanted stay. Solved to its
optimum by CP-SAT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cost_models.hardware import Cluster
from cost_models.serving import launched_s, memory_of, weight_bytes, workspace_bytes
from cost_models.serving_cpu import CPU
from cost_models.serving_decisions import Held, ServeLoad, Serving
from cost_models.serving_engines import ServingEngine
from cost_models.serving_ops import Costs, Step
from cost_models.serving_shapes import ServedModel
from cost_models.serving_tiers import below, below_bytes, layers_of, sharers
from ir.errors import UsageError
from planner.serving.formats import busy_s, in_formats, steps_of

STEPS = 16  # of a layer's experts, and of the layers of a block
BLOCK_GAIN = 0.001  # of the time that each block below the GPU, and the cache, must earn: a plan
# with fewer is simpler to run, and ties are many where a link has time left
_US, _KIB = 1e6, 1 << 10  # integers of microseconds, and of KiB
_LONGEST = 1 << 42  # microseconds: 50 days
_MOST_WEIGHT = 1 << 18  # of a step in what is minimised


def charged(score: float, s: Serving) -> float:
    """What is minimised, with what each block below the GPU, and the cache, must earn."""
    share = 1 + BLOCK_GAIN * (len(s.tiers) + (s.kv_tier != "gpu"))
    return score * share if score > 0 else score / share


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way for a block: its format, how it lies, the bytes below the GPU, what it frees of those
    on the GPU and takes, against all of it there in its own format; and of a decode step and a
    prefill what more the GPU and the CPU run, what is waited for, what is in the background on
    the link."""

    word: str
    held: Held | None
    below_bytes: float
    freed_bytes: float
    ring_bytes: float
    runs_s: tuple[float, float]
    waits_s: tuple[float, float]
    streams_s: tuple[float, float]


def choices(
    costs: Costs, model: ServedModel, block: str, steps: tuple[Step, Step], words: tuple[str, ...],
    only: str | None = None,
) -> list[Choice]:  # fmt: skip
    """Every way for a block in each of these formats; on the GPU first. What the cache streams is
    not the block's. only: of the tiers below, where not all are asked for; "" is none."""
    own, cluster = replace(costs.serving, kv_tier="gpu", tiers=()), costs.cluster
    found = []
    before_s, total = busy_s(replace(costs, serving=own), model, steps), layers_of(model, block)
    most = total // own.ep if block == "routed_experts" else total
    kept = sorted({most * k // STEPS for k in range(STEPS)})
    for word in words:
        s = own
        if word != own.format_of(block):
            s = in_formats(own, dict(own.weights) | {block: word})
        more_s, fewer = (0.0, 0.0), 0.0
        if s is not own:
            after_s = busy_s(replace(costs, serving=s), model, steps)
            more_s = after_s[0] - before_s[0], after_s[1] - before_s[1]
            fewer = weight_bytes(model, own) - weight_bytes(model, s)
        found.append(Choice(word=word, held=None, below_bytes=0.0, freed_bytes=fewer,
                            ring_bytes=0.0, runs_s=more_s, waits_s=(0.0, 0.0),
                            streams_s=(0.0, 0.0)))  # fmt: skip
        for tier in (t for t in cluster.tiers if only in (None, t.name)):
            for place in _places(block, tier.name):
                for resident in kept:
                    held = Held(block=block, tier=tier.name, place=place, resident=resident)
                    alone = replace(costs, serving=replace(s, tiers=(held,)))
                    each = [below(alone, model, step) for step in steps]
                    bytes_ = below_bytes(model, alone.serving)
                    runs = _pair([b.on_host_s - b.saved_s for b in each])
                    found.append(Choice(
                        word=word, held=held, below_bytes=bytes_.total,
                        freed_bytes=bytes_.total + fewer, ring_bytes=bytes_.buffers,
                        runs_s=(runs[0] + more_s[0], runs[1] + more_s[1]),
                        waits_s=_pair([b.fetched_s for b in each]),
                        streams_s=_pair([b.stream_s for b in each]),
                    ))  # fmt: skip
    return found


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
    formats: Mapping[str, tuple[str, ...]] | None = None, tilt: int = 0,
) -> Serving | None:  # fmt: skip
    """The decisions with the best place, and format, for every block, `s.batch` sequences being
    run; None where no tiers hold them. pinned: blocks and the tier that each lies on, the others
    on the GPU. formats: what blocks may be in, others as they are. tilt: a decode step counts for
    2^tilt of a wave's, or where it is negative a prompt for so many."""
    costs = Costs(cluster=cluster, engine=engine, serving=s)
    from ortools.sat.python import cp_model  # late: who reads a plan needs no solver

    each, steps = s.batch / s.replicas / s.attention_dp, steps_of(s, load)
    memory = memory_of(model, cluster, engine, s, load)
    blocks = [b for b in model.block_elements() if b != "router"]
    words = {b: (formats or {}).get(b, (s.format_of(b),)) for b in blocks}
    wanted = dict(pinned or ())
    for block, word in wanted.items():
        cluster.tier(word)
        if block not in blocks:
            raise UsageError(f"--fix offload={block}:{word}: {model.name} has no {block}",
                             why=f"its blocks: {', '.join(blocks)}")  # fmt: skip
    ways = {
        block: choices(
            costs, model, block, steps, words[block],
            None if pinned is None else wanted.get(block, ""),
        ) for block in blocks
    }  # fmt: skip
    if pinned is not None:
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
    need = memory.weights_bytes + memory.context_bytes
    need += memory.workspace_bytes if cluster.device.family == CPU else workspace_bytes(
        model, engine, s, load, each
    )  # fmt: skip
    need += each * memory.kv_bytes_per_sequence - memory.capacity_bytes
    ring = program.new_int_var(0, 1 << 40, "ring")
    layered = [(v, c) for v, c in pairs if c.held and c.held.block != "head"]
    program.add(ring >= sum(v * int(c.ring_bytes / _KIB) for v, c in layered))
    for v, c in pairs:
        if c.held and c.held.block == "head":
            program.add(ring >= v * int(c.ring_bytes / _KIB))
    program.add(
        sum(v * int(c.freed_bytes / _KIB) for v, c in pairs) >= ring + int(np.ceil(need / _KIB)) + 1
    )
    for tier in cluster.tiers:
        cached = each * memory.kv_below_bytes_per_sequence * (s.kv_tier == tier.name)
        share = int((tier.bytes / sharers(cluster, s) - cached) / _KIB)
        used = [v * (int(c.below_bytes / _KIB) + 1) for v, c in pairs
                if c.held and c.held.tier == tier.name]  # fmt: skip
        program.add(sum(used) <= share)
    weights = _weights(load.output * 2.0 ** max(tilt, 0), each * 2.0 ** max(-tilt, 0))
    spans, least, bare = [], 0, replace(costs, serving=replace(s, kv_tier="gpu", tiers=()))
    held = sum(v for v, c in pairs if c.held)
    for phase, own_s in enumerate(busy_s(bare, model, steps)):
        cache = below(costs, model, steps[phase])
        launches_s = launched_s(bare, model)
        first_s = launches_s if cluster.device.family == CPU else 0.0  # a CPU is its own host
        runs = _us(own_s + cache.on_host_s) + sum(v * _us(c.runs_s[phase]) for v, c in pairs)
        waits = _us(cache.fetched_s + first_s) + sum(v * _us(c.waits_s[phase]) for v, c in pairs)
        streams = sum(v * _us(c.streams_s[phase]) for v, c in pairs)
        cached, parts = _us(cache.cached_s), engine.handling.splits
        span = program.new_int_var(0, _LONGEST, f"step{phase}")
        # as `cost_models/serving.py` has it: what streams hides behind what runs, of the cache a
        # part of it behind each part of a batch
        program.add(span >= runs + waits)
        program.add(span >= streams + cached + waits)
        program.add(parts * span >= (parts - 1) * runs + parts * (streams + waits) + cached)
        program.add(parts * span >= runs + parts * waits + (parts - 1) * cached)
        program.add(span >= _us(launches_s))
        spans.append(span)
        least += weights[phase] * _us(own_s)
    program.minimize(
        sum(w * span for w, span in zip(weights, spans)) + round(BLOCK_GAIN * least) * held
    )
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = 5.0
    solver.parameters.catch_sigint_signal = False  # Ctrl-C is the search's, not this program's
    if solver.solve(program) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    taken = [c for v, c in pairs if solver.value(v)]
    if formats is not None:
        s = in_formats(s, {b: c.word for b, c in zip(ways, taken) if b in formats})
    return replace(s, tiers=tuple(c.held for c in taken if c.held))


def _weights(*counts: float) -> tuple[int, ...]:
    """What a phase's step counts for, whole: small enough that times the longest step none is
    beyond the solver's integers."""
    share = min(1.0, _MOST_WEIGHT / max(counts))
    return tuple(max(1, round(n * share)) for n in counts)


def _us(seconds: np.ndarray | float) -> int:
    return round(float(np.ravel(seconds)[0]) * _US)
