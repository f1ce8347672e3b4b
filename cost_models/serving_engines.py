"""What serves a model: an engine's host time, its scheduling of prompts, the kernels it uses.

One table, `serving_engines.toml`; each constant with its source, samples and errors.
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cost_models.checked_toml import read_toml
from cost_models.constants_table import FIT_WORDS
from cost_models.serving_handling import Handling, told
from ir.errors import UsageError

NATIVE = "native"  # our own runtime, which runs the model's own forward
_TABLE = Path(__file__).with_name("serving_engines.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEngine:
    """One engine.

    start_share: of a kernel's start and end, as benchmarks of single kernels see it, what a step
    pays: inside a CUDA graph one kernel starts while the last ends. step_host_s: host time of a
    step that the device waits for (scheduling, sampling). sequence_host_s: of each sequence of it.
    request_host_s: host time of a request before its first step (tokenizing, transport).
    arrival_host_s: of requests that arrive at once, what the host takes for each before the next
    (tokenizing, admission), one after another.
    routed_op_host_s: host time of an op of a routed layer in a step that reads prompts, which are
    launched one by one (no CUDA graph has their shapes) while the device waits; none where one
    kernel does all that experts do (`Costs.routed_host_s`).
    kernel_host_s: host time to launch a kernel where steps are no CUDA graphs; 0 where they are.
    chunk_tokens: tokens of prompts a step at most; chunks: whether a flag says how many. mixes:
    such a step decodes too; else decoding waits. static: requests come as one batch, read and
    decoded to the end together.
    wait_prompts: prompts that are read between a request's arrival and its own, in a steady
    state: arrivals come in groups.
    memory_share: of the device's memory that it takes. reserves: a sequence is admitted with room
    for all it will write; else for what it has, and half of what it will write.
    kv_sent: what of a prompt's cache leaves a pool of prefill at a time, as soon as it is there:
    layer, chunk or prompt; "" where the engine has no such pools.
    expands_latents: of models that cache latents (MLA) a step makes all heads' keys and values
    again, of all that is cached; else it decodes in the latent space.
    all_reduce: kernel family; library is NCCL's. skew: exponent of the power law of experts' loads
    under the prompts of benchmarks (0: uniform at random). handling: what it does with weights and
    caches beside its kernels, a table of its own where it is not the default.
    """

    name: str
    title: str
    start_share: float
    step_host_s: float
    sequence_host_s: float
    request_host_s: float
    arrival_host_s: float
    routed_op_host_s: float
    kernel_host_s: float
    chunk_tokens: int
    chunks: bool
    mixes: bool
    static: bool
    wait_prompts: float
    memory_share: float
    reserves: bool
    kv_sent: str
    expands_latents: bool
    all_reduce: str
    skew: float
    source: str
    handling: Handling = field(default_factory=Handling)


_WORDS = ("median_error", "p90_error", "samples", *FIT_WORDS)


@functools.cache
def _engines() -> dict[str, ServingEngine]:
    raw: dict[str, Any] = read_toml(_TABLE, "table of serving engines")
    keys = {f.name for f in fields(ServingEngine)} - {"name", "handling"}
    found = {}
    for name, row in raw.items():
        given = {key: value for key, value in row.items() if key not in (*_WORDS, "handling")}
        if given.keys() != keys:
            odd = ", ".join(sorted(given.keys() ^ keys))
            raise UsageError(f"serving engine {name} has not the keys it should: {odd}")
        handling = told(Handling(), row.get("handling", {}))
        found[name] = ServingEngine(name=name, handling=handling, **given)
    return found


def error_of(name: str) -> float:
    """Relative, of the time between tokens: what nine rows in ten are within; of an engine that no
    rows were fitted to, the greatest of those that have."""
    raw: dict[str, Any] = read_toml(_TABLE, "table of serving engines")
    known = {engine: float(row["p90_error"]) for engine, row in raw.items() if "p90_error" in row}
    return known.get(name, max(known.values()))


def serving_engines() -> tuple[str, ...]:
    """Names of the engines there are, in order."""
    return tuple(sorted(_engines()))


def engines_with_pools() -> tuple[str, ...]:
    """Names of those that hand caches from GPUs that read prompts to GPUs that decode."""
    return tuple(name for name in serving_engines() if _engines()[name].kv_sent)


def load_serving_engine(name: str) -> ServingEngine:
    """The engine of that name. Raises UsageError listing those there are."""
    found = _engines().get(name)
    if found is None:
        near = difflib.get_close_matches(name, _engines(), n=1)
        raise UsageError(
            f"unknown serving engine {name!r}", why=f"one of {', '.join(serving_engines())}",
            hints=tuple(f"did you mean {word}?" for word in near),
        )  # fmt: skip
    return found
