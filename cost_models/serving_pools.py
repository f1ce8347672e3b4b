"""Pools: some GPUs read prompts, the others decode; each prompt's cache moves between them.

A closed loop of `batch` requests. A request waits for prompts before its own, is read, its cache
moves as far as its reading does not hide that, and decodes with what else is there, which no prompt
holds up. By Little's law as many decode as come in; where prompts come in no faster than they are
read, or moved, the rest waits for that.

Sources: DistServe (arXiv:2401.09670) and Splitwise (arXiv:2311.18677) for pools, and for sending a
layer's cache while the next one runs.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cost_models.collectives import collective_s
from cost_models.hardware import Cluster
from cost_models.serving import admitted, memory_of, prompt_steps, step_parts
from cost_models.serving_decisions import ServeLoad, Serving
from cost_models.serving_engines import ServingEngine
from cost_models.serving_kv import kv_bytes
from cost_models.serving_ops import Costs, FloatArray, step_of
from cost_models.serving_shapes import ServedModel

HELD = 2  # prompts whose caches a GPU that reads them has at once: one is read, one is sent
_WHOLE, _APART = 8, 1.25  # numbers of sequences that are costed: all to 8, then a quarter apart
_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """A replica that reads prompts: seconds of one alone, prompts a second where many wait, and
    bytes of its fullest GPU with the caches of HELD of them."""

    alone_s: float
    prompts_per_s: float
    held_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """A replica that decodes: a step's seconds by how many sequences it has, linear between those
    that are costed. room: sequences that it holds."""

    sequences: tuple[float, ...]
    parts: tuple[tuple[str, tuple[float, ...]], ...]
    steps_s: tuple[float, ...]
    room: float

    def step_s(self, running: float) -> float:
        return _between(self.sequences, self.steps_s, running)

    def parts_at(self, running: float) -> tuple[tuple[str, float], ...]:
        return tuple((name, _between(self.sequences, row, running)) for name, row in self.parts)


class Moves(NamedTuple):
    """A prompt's cache between the pools. exposed_s: what its reading does not hide. sending_s,
    receiving_s: that the busiest GPU's link on either side is taken for. bytes: of all GPUs."""

    exposed_s: float
    sending_s: float
    receiving_s: float
    bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """What requests see. ttft_s is what reading, moving, waiting and the engine take. decoding:
    sequences of all replicas. binds: prompts, moving, room, or "" where nothing is full."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    decoding: float
    waiting_s: float
    reading_s: float
    moves: Moves
    binds: str


def _between(at: tuple[float, ...], values: tuple[float, ...], x: float) -> float:
    """Linear between points; what is below the first is the first."""
    k = min(bisect.bisect_right(at, x), len(at) - 1)
    if k == 0 or x <= at[0]:
        return values[0]
    share = (x - at[k - 1]) / (at[k] - at[k - 1])
    return values[k - 1] + share * (values[k] - values[k - 1])


@functools.lru_cache(maxsize=4096)
def reads(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, prompt: float
) -> Reads:
    """One replica of the GPUs that read prompts. s: their division (`Serving.reading`)."""
    costs = Costs(cluster=cluster, engine=engine, serving=s, prompts_alone=True)
    chunk = s.prefill_chunk or engine.chunk_tokens
    group = max(chunk // prompt, 1.0)  # prompts of one step, of each attention replica
    counts = np.asarray([1.0, group]) * s.attention_dp
    none = 0.0 * counts
    found = prompt_steps(costs, model, none, none + prompt, none + prompt, counts)
    memory = memory_of(model, cluster, engine, s, ServeLoad(prompt=prompt, output=0.0))
    fixed = memory.capacity_bytes - memory.room_bytes
    return Reads(
        alone_s=float(found[0]), prompts_per_s=float((s.pp * counts / found).max()),
        held_bytes=fixed + HELD * memory.kv_bytes_per_sequence,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def decodes(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad
) -> Decodes:
    """One replica of the GPUs that decode. s: their division (`Serving.decoding`); `s.batch`
    sequences are the most that are costed."""
    costs = Costs(cluster=cluster, engine=engine, serving=s)
    at = [1.0]
    while at[-1] < s.batch:
        further = math.ceil(at[-1] * _APART) if at[-1] >= _WHOLE else at[-1] + 1
        at.append(float(min(further, s.batch)))
    grid = np.asarray(at)
    parts = step_parts(costs, model, step_of(grid, load.prompt + load.output / 2))
    rows = {name: np.broadcast_to(np.ravel(v), grid.shape) for name, v in parts.items()}
    steps: FloatArray = np.asarray(sum(rows.values()))
    return Decodes(
        sequences=tuple(at), steps_s=tuple(steps.tolist()),
        parts=tuple((name, tuple(row.tolist())) for name, row in rows.items()),
        room=float(admitted(model, cluster, engine, s, load)),
    )  # fmt: skip


def moves(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, prompt: float,
    alone_s: float,
) -> Moves:  # fmt: skip
    """The cache of one prompt from the GPUs that read it (in alone_s) to those that decode.

    Each of the former has its layers' share of what all the latter keep, each of which keeps its
    heads (or, where heads are fewer, or latent, all). Pieces leave when they are there: of the last
    stage all but the last hide behind what is read still, as far as they are quicker. The pools lie
    half of the GPUs apart: the level of the network between them is crossed by all.
    """
    p, d = s.prefill, s
    assert p is not None
    kept = float(kv_bytes(model, d, np.asarray(prompt))) * d.pp  # of one rank of tp, all layers
    chunks = math.ceil(prompt / (s.prefill_chunk or engine.chunk_tokens))
    layers = max(model.layer_count // p.pp, 1)
    stages = max(p.pp, d.pp)
    pieces, receivers = {
        "layer": (layers * chunks, layers * p.pp * chunks), "chunk": (chunks, stages * chunks),
        "prompt": (1, stages),
    }[engine.kv_sent]  # fmt: skip
    sent = kept * d.tp / (p.tp * p.pp)

    def seconds(size_bytes: float) -> float:
        return float(collective_s(cluster, "p2p", size_bytes, 2, max(s.devices // 2, 1)))

    piece_s = seconds(max(sent / pieces, kept / receivers))
    behind_s = alone_s / p.pp / pieces
    return Moves(
        exposed_s=(pieces - 1) * max(piece_s - behind_s, 0.0) + piece_s,
        sending_s=pieces * seconds(sent / pieces), receiving_s=seconds(kept / d.pp),
        bytes=kept * d.tp,
    )  # fmt: skip


def pooled(
    engine: ServingEngine, s: Serving, load: ServeLoad, read: Reads, decode: Decodes, moved: Moves
) -> Pooled:
    """What requests see of pools whose replicas read, and decode, so; `s.batch` are in flight."""
    p, d = s.prefill, s
    assert p is not None
    batch, output = float(s.batch), load.output
    arrives = {  # requests a second at most
        "prompts": p.replicas * read.prompts_per_s,
        "moving": min(p.replicas * p.attention_dp * p.pp / moved.sending_s,
                      d.replicas * d.attention_dp * d.pp / moved.receiving_s),
    }  # fmt: skip
    slowest = min(arrives, key=lambda name: arrives[name])
    # As in `serving.serve`: others' prompts that come at about the same time are read before.
    others = max(batch / p.replicas - 1, 0.0)
    before_s = min(engine.wait_prompts, others / 2) * read.alone_s / p.attention_dp
    alone_s = engine.request_host_s + read.alone_s + moved.exposed_s
    fixed_s = alone_s + before_s

    def step_s(decoding: float) -> float:
        return decode.step_s(max(decoding / d.replicas, 1.0))

    def why_not(decoding: float) -> str:
        """What keeps so many from decoding at once."""
        step = step_s(decoding)
        rate = decoding / (output * step)
        if rate > arrives[slowest]:
            return slowest
        return "requests" if decoding + rate * (fixed_s + step / 2) > batch else ""

    low, high = 0.0, min(batch, max(decode.room, 1.0) * d.replicas)
    binds = why_not(high)
    if not binds:
        low, binds = high, "room"
    for _ in range(_HALVINGS if binds != "room" else 0):
        middle = (low + high) / 2
        reason = why_not(middle)
        low, high, binds = (low, middle, reason) if reason else (middle, high, binds)
    step = step_s(low)
    rate = low / (output * step)
    ttft_s = batch / rate - output * step  # Little's law: who does not decode has no token yet
    waiting_s = ttft_s - alone_s
    return Pooled(
        ttft_s=ttft_s, tpot_s=step, tokens_per_s=rate * output, decoding=low, waiting_s=waiting_s,
        reading_s=read.alone_s, moves=moved, binds="" if binds == "requests" else binds,
    )  # fmt: skip
