"""Formats of weights by block: the quickest, and what is given up of their time for fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from cost_models.hardware import Cluster
from cost_models.serving import busy_parts
from cost_models.serving_decisions import KV_PLANNED, WEIGHT_BYTES, ServeLoad, Serving
from cost_models.serving_engines import ServingEngine
from cost_models.serving_ops import Costs, Step, step_of
from cost_models.serving_shapes import ServedModel
from cost_models.serving_tiers import block_bytes
from ir.errors import UsageError
from planner.serving.asked import OWN_FORMAT, ServeAsked, ServePins

Row = dict[str, str]  # block: format
LEAST_S = 1e-12


def open_to(model: ServedModel, asked: ServeAsked, pins: ServePins) -> dict[str, tuple[str, ...]]:
    """The formats that each block may have. Raises UsageError where one is kept that the model has
    not."""
    kept = dict(asked.keep)
    for block, word in kept.items():
        if block not in model.block_elements():
            raise UsageError(f"--keep {block}={word}: {model.name} has no {block}",
                             why=f"its blocks: {', '.join(model.block_elements())}")  # fmt: skip
    if pins.weights:
        asked.check_format(pins.weights)
    allowed = (pins.weights,) if pins.weights else asked.formats
    return {b: (kept[b],) if b in kept else allowed
            for b in model.block_elements() if b not in OWN_FORMAT}  # fmt: skip


def caches(asked: ServeAsked, pins: ServePins) -> tuple[str, ...]:
    """The formats that the cache may have, the model's first."""
    if pins.kv:
        return (pins.kv,)
    own = asked.precision if asked.precision in KV_PLANNED else "bf16"
    return tuple(dict.fromkeys((own, *asked.allow_kv)))


def in_formats(s: Serving, row: Mapping[str, str]) -> Serving:
    """The decisions with a format for each of these blocks, those of the default unsaid."""
    return replace(s, weights=tuple((b, f) for b, f in row.items() if f != s.default))


def rows(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad,
    ways: Mapping[str, tuple[str, ...]],
) -> tuple[list[Row], Iterator[Row]]:  # fmt: skip
    """(the quickest formats, those of fewer and fewer bytes after them).

    Quickest are four: where all prompts of a wave count beside a request's decode steps, where its
    own does, and for a limit of either phase alone. Bytes are given up for time where they cost
    least of it, a block and a format a step: the convex hull of (seconds of a wave, bytes).
    """
    each = max(s.batch / s.replicas / s.attention_dp, 1.0)
    found = block_seconds(model, cluster, engine, s, load, ways)
    weighs = ((load.output, each), (load.output, 1.0), (0.0, 1.0), (1.0, 0.0))
    quickest = []
    for decode, prompt in weighs:
        spent = {key: decode * own[0] + prompt * own[1] for key, own in found.items()}
        row = {b: min(words, key=lambda f, b=b: (spent[b, f], -WEIGHT_BYTES[f]))  # type: ignore[misc]
               for b, words in ways.items()}  # fmt: skip
        if row not in quickest:
            quickest.append(row)
    wave = {key: load.output * own[0] + each * own[1] for key, own in found.items()}
    elements = {b: block_bytes(model, in_formats(s, {b: words[0]}), b) / WEIGHT_BYTES[words[0]]
                for b, words in ways.items()}  # fmt: skip
    return quickest, _smaller(quickest[0], wave, elements, ways)


def _smaller(
    first: Row, seconds: Mapping[tuple[str, str], float], elements: Mapping[str, float],
    ways: Mapping[str, tuple[str, ...]],
) -> Iterator[Row]:  # fmt: skip
    now = dict(first)
    while True:
        steps = []
        for block, words in ways.items():
            for word in words:
                saved = (WEIGHT_BYTES[now[block]] - WEIGHT_BYTES[word]) * elements[block]
                if saved > 0:
                    more = max(seconds[block, word] - seconds[block, now[block]], LEAST_S)
                    steps.append((more / saved, -saved, block, word))
        if not steps:
            return
        _, _, block, word = min(steps)
        now[block] = word
        yield dict(now)


def block_seconds(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad,
    ways: Mapping[str, tuple[str, ...]],
) -> dict[tuple[str, str], tuple[float, float]]:  # fmt: skip
    """(block, format): what more a decode step and a prompt take than in the default format."""
    costs = Costs(cluster=cluster, engine=engine, serving=replace(s, kv_tier="gpu"))
    steps = steps_of(s, load)
    own = busy_s(costs, model, steps)
    found = {}
    for block, word in ((b, f) for b, words in ways.items() for f in words):
        one = replace(costs, serving=in_formats(costs.serving, {block: word}))
        took = busy_s(one, model, steps) if word != s.default else own
        found[block, word] = took[0] - own[0], took[1] - own[1]
    return found


def steps_of(s: Serving, load: ServeLoad) -> tuple[Step, Step]:
    """A decode step of all sequences, half answered, and one prompt: each of one rank."""
    one = np.ones(1)
    each = s.batch / s.replicas / s.attention_dp
    return (
        step_of(each / s.pp * one, (load.prompt + load.output / 2) * one),
        step_of(0.0 * one, 0.0, one, load.prompt * one),
    )


def busy_s(costs: Costs, model: ServedModel, steps: tuple[Step, Step]) -> tuple[float, float]:
    """What these steps of one rank take its replica, launches that are behind kernels apart."""
    s = costs.serving
    took = [
        float(np.ravel(sum(busy_parts(costs, model, replace(
            step, sequences=step.sequences * s.attention_dp * s.pp,
            prompts=step.prompts * s.attention_dp,
        )).values()))[0])
        for step in steps
    ]  # fmt: skip
    return took[0], took[1]
