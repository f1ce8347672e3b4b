"""The search: every way to divide the GPUs, formats by block, tiers where memory binds.

All divisions of the GPUs that the model allows are predicted: the space is small enough to look at
whole. Formats are chosen by block, the quickest first. Where the weights do not fit, or the cache
lets fewer run than were asked for, from the quickest to the fewest bytes (`formats.py`), and an
integer program chooses each block's format and what of it lies on the tiers below (`tiers.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from cost_models.hardware import Cluster
from cost_models.serving_decisions import WEIGHT_BYTES, Pool, ServeLoad, Serving
from cost_models.serving_engines import NATIVE, ServingEngine, load_serving_engine
from cost_models.serving_shapes import ServedModel
from ir.errors import InfeasibleError, UsageError
from planner.mesh import divisors
from planner.serving.asked import MOST_STEPS, ServeAsked, ServePins, check_steps, serve_pins_said
from planner.serving.formats import Row, caches, in_formats, open_to, rows
from planner.serving.meeting import for_limits, limits_used, used
from planner.serving.pools import candidates, considered
from planner.serving.predict import Prediction, predict
from planner.serving.relief import NOTHING, relief
from planner.serving.runnable import ExpertsOf, unservable
from planner.serving.tiers import best_tiers, charged

CHUNKS = tuple(512 << k for k in range(7))  # tokens of prompts a step: powers of two to 32768
CHUNKED = 8  # divisions, the best first, that other chunks are tried in
BISECTED = 24  # divisions, the best first, in which numbers of requests between these are tried
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # tried where the load leaves it open


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best plan, those beside it on the way, how many were looked at."""

    best: Prediction
    others: tuple[Prediction, ...]
    tried: int


def search(
    model: ServedModel, cluster: Cluster, asked: ServeAsked, pins: ServePins,
    progress: Callable[[str], None] | None = None, experts: ExpertsOf | None = None,
) -> Found:  # fmt: skip
    """The best plan by the objective within the limits. Raises InfeasibleError with what binds."""
    seen, tried = predictions(model, cluster, asked, pins, progress, experts)
    fits = [p for p in seen if p.fits]
    if not fits:
        raise _nothing_fits(cluster, model, seen, asked)
    within = [p for p in fits if limits_used(p, asked) <= 1]
    if not within:
        raise _limits(fits, asked, pins)
    ordered = best_first(within, asked, cluster)
    return Found(best=ordered[0], others=_apart(ordered), tried=tried)


def _in_chunks(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, asked: ServeAsked,
    seen: list[Prediction],
) -> list[Prediction]:  # fmt: skip
    """The best plans with prompts in other chunks than the engine's own."""
    fits = [p for p in seen if p.fits]
    within = [p for p in fits if limits_used(p, asked) <= 1] or fits
    if not engine.chunks or not within:
        return []
    ordered = best_first(within, asked, cluster)
    rows = [p.serving for p in (ordered[0], *_apart(ordered, CHUNKED))]
    load = ServeLoad(prompt=asked.prompt, output=asked.output)
    return [
        predict(model, cluster, engine, replace(s, prefill_chunk=chunk), load)
        for s in rows for chunk in CHUNKS
        if chunk != (s.prefill_chunk or engine.chunk_tokens) and asked.prompt <= chunk * MOST_STEPS
    ]  # fmt: skip


def _in_batches(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, asked: ServeAsked,
    seen: list[Prediction],
) -> list[Prediction]:  # fmt: skip
    """The best divisions with more requests, where the load leaves them open: as many below twice
    theirs as the limits allow, by bisection."""
    fits = [p for p in seen if p.fits and limits_used(p, asked) <= 1]
    if asked.batch or asked.objective == "latency" or not fits:
        return []
    load = ServeLoad(prompt=asked.prompt, output=asked.output)
    ordered, found = best_first(fits, asked, cluster), []
    for s in (p.serving for p in (ordered[0], *_apart(ordered, BISECTED))):
        each = s.replicas * s.attention_dp
        low, high = s.batch // each, min(2 * s.batch, BATCHES[-1] + 1) // each
        while high - low > 1:
            n = (low + high) // 2
            p = predict(model, cluster, engine, replace(s, batch=n * each), load)
            if p.fits and limits_used(p, asked) <= 1:
                low = n
                found.append(p)
            else:
                high = n
    return found


def predictions(
    model: ServedModel, cluster: Cluster, asked: ServeAsked, pins: ServePins,
    progress: Callable[[str], None] | None = None, experts: ExpertsOf | None = None,
) -> tuple[list[Prediction], int]:  # fmt: skip
    """Plans, whether they fit or not, and how many were looked at: all, but of those with pools the
    best. experts: what is known of the model's, where its graph is there. Raises UsageError where
    the pins, or what the engine runs, leave no way to divide the GPUs."""
    engine = load_serving_engine(asked.engine)
    check_steps(asked, pins.prefill_chunk or 0)
    if pins.prefill_chunk and not engine.chunks and engine.name != NATIVE:
        raise UsageError(f"--fix prefill_chunk={pins.prefill_chunk}: no flag of {engine.title} says"
                         " how many tokens of prompts a step reads",
                         hints=("leave it out",))  # fmt: skip
    load = ServeLoad(prompt=asked.prompt, output=asked.output)
    experts = replace(
        experts or ExpertsOf(routed=any(layer.experts for layer in model.layers)),
        latent=any(a.latent for layer in model.layers for a in layer.attention),
    )
    seen: list[Prediction] = []
    refused: list[str] = []
    pools = considered(cluster, engine, pins)
    ways = open_to(model, asked, pins)
    for s in space(model, cluster, asked, pins) if not pins.pools else ():
        for kv in caches(asked, pins):
            made = replace(s, kv=kv)
            reason = unservable(engine.name, made, experts)
            if reason:
                refused.append(reason)
            else:
                seen += _held(model, cluster, engine, made, asked, ways, pins)
        if progress and seen:
            progress(f"solving: {len(seen)} plans predicted")
    tried = len(seen)
    if pools:
        best, more = _with_pools(model, cluster, engine, asked, pins, load)
        seen, tried = [*seen, *best], tried + more
    if not seen:
        raise UsageError(
            f"{model.name} cannot be divided over {cluster.spec} as pinned",
            why="; ".join(dict.fromkeys(refused)) or "tp divides the heads, ep the experts, and"
            " tp*attention_dp*pp*replicas the GPUs",
        )
    others = _in_batches(model, cluster, engine, asked, seen)
    if pins.prefill_chunk is None:
        others += _in_chunks(model, cluster, engine, asked, [*seen, *others])
    return [*seen, *others], tried + len(others)


def _with_pools(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, asked: ServeAsked, pins: ServePins,
    load: ServeLoad,
) -> tuple[list[Prediction], int]:  # fmt: skip
    """The best plans with pools, and of how many: within the limits, of those in which all requests
    run at once, nearest to the limits; of those that do not fit, the one that lacks least."""
    bases = [
        Serving(batch=batch, prefill_chunk=pins.prefill_chunk or 0, default=asked.precision,
                kv_window=asked.kv_window, kv_policy=asked.kv_policy)
        for batch in ((asked.batch,) if asked.batch else BATCHES)
    ]  # fmt: skip
    counts = divisors(cluster.count) if asked.objective == "cost" else (cluster.count,)
    best: dict[str, tuple[tuple[object, ...], Serving]] = {}
    tried = 0

    def keep(name: str, s: Serving, *rank: object) -> None:
        if name not in best or (*rank, _key(s)) < best[name][0]:
            best[name] = ((*rank, _key(s)), s)

    for c in candidates(model, cluster, engine, load, bases, counts, pins,
                        lambda s: _formats(model, cluster, engine, s, load, asked, pins)):
        tried += 1
        share = used(c.seen.ttft_s, c.seen.tpot_s, asked)
        if c.missing_bytes:
            keep("lacks", c.serving, c.missing_bytes)
        elif share > 1:
            keep("near", c.serving, share)
        else:
            score = _scored(c.seen.ttft_s, c.seen.tpot_s, c.seen.tokens_per_s, c.serving.devices,
                            asked)
            keep("best", c.serving, score)
            if c.seen.binds != "room":
                keep("whole", c.serving, score)
    fits = [s for name, (_, s) in best.items() if name != "lacks"]
    chosen = dict.fromkeys(fits or [s for _, s in best.values()])
    return [predict(model, cluster, engine, s, load) for s in chosen], tried


def _formats(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad,
    asked: ServeAsked, pins: ServePins,
) -> Iterator[Serving]:  # fmt: skip
    quickest, smaller = rows(model, cluster, engine, s, load, open_to(model, asked, pins))
    for row, kv in itertools.product((*quickest, *smaller), caches(asked, pins)):
        yield replace(in_formats(s, row), kv=kv)


def best_first(
    rows: Sequence[Prediction], asked: ServeAsked, cluster: Cluster
) -> list[Prediction]:
    """Plans by the objective, in which what is below the GPU must earn a little; those alike by
    what is simplest."""
    return sorted(rows, key=lambda p: (
        charged(_scored(p.ttft_s, p.tpot_s, p.tokens_per_s, p.serving.devices, asked), p.serving),
        _key(p.serving),
    ))  # fmt: skip


def _apart(ordered: list[Prediction], most: int = 6) -> tuple[Prediction, ...]:
    """The best of every other division of the GPUs, the best first: one less than `most`."""
    rows: dict[tuple[object, ...], Prediction] = {}
    for p in ordered:
        s = p.serving
        rows.setdefault((s.tp, s.pp, s.ep, s.attention_dp, s.replicas, s.prefill), p)
    return tuple(rows.values())[1:most]


def _scored(
    ttft_s: float, tpot_s: float, tokens_per_s: float, gpus: int, asked: ServeAsked
) -> float:
    """What is minimised. Throughput a GPU that is used, so that none is used for nothing."""
    if asked.objective == "latency":
        return ttft_s + (asked.output - 1) * tpot_s
    return -tokens_per_s if asked.objective == "throughput" else gpus / tokens_per_s


def _key(s: Serving) -> tuple[object, ...]:
    """Ties go to fewer axes, and to the model's own formats."""
    p = s.prefill or Pool()
    return (len(s.tiers), s.prefill is not None, s.tp > 1, s.pp > 1, s.attention_dp > 1, s.ep > 1,
            s.devices, s.tp, s.pp, s.ep, s.batch, s.prefill_chunk, s.weights, s.kv, p.tp, p.pp,
            p.ep, p.replicas)  # fmt: skip


# --- the space --------------------------------------------------------------------------------


def space(
    model: ServedModel, cluster: Cluster, asked: ServeAsked, pins: ServePins
) -> Iterator[Serving]:
    """Every division of the GPUs, batch and chunk of prompts."""
    heads = [a.heads for layer in model.layers for a in layer.attention]
    experts = [e.experts for layer in model.layers for e in layer.experts]
    counts = [cluster.count] if asked.objective != "cost" else divisors(cluster.count)
    engine = load_serving_engine(asked.engine)
    for count in counts:
        for tp in _of(pins.tp, divisors(count)):
            if any(h % tp for h in heads) or count % tp or tp > cluster.domain_ranks * (
                4 if pins.tp else 1
            ):  # fmt: skip
                continue
            for pp in _of(pins.pp, divisors(count // tp)):
                if pp > model.layer_count or count % (tp * pp):
                    continue
                left = count // (tp * pp)
                for adp in _of(pins.attention_dp, divisors(left) if experts else (1,)):
                    if left % adp:
                        continue
                    replicas = left // adp
                    if pins.replicas not in (None, replicas):
                        continue
                    for ep in _of(pins.ep, divisors(tp * adp) if experts else (1,)):
                        if any(e % ep for e in experts) or (tp * adp) % ep:
                            continue
                        etp = tp * adp // ep
                        if pins.etp not in (None, etp):
                            continue
                        for batch in (asked.batch,) if asked.batch else BATCHES:
                            if batch < replicas * adp and batch != asked.batch:
                                continue
                            for chunk in _chunks(asked, engine, pins):
                                yield Serving(
                                    tp=tp, pp=pp, ep=ep, etp=etp, attention_dp=adp,
                                    replicas=replicas, batch=batch, prefill_chunk=chunk,
                                    default=asked.precision, kv_window=asked.kv_window,
                                    kv_policy=asked.kv_policy,
                                )  # fmt: skip


def _of(pin: int | None, all_: tuple[int, ...]) -> tuple[int, ...]:
    return all_ if pin is None else (pin,)


def _chunks(asked: ServeAsked, engine: ServingEngine, pins: ServePins) -> tuple[int, ...]:
    if pins.prefill_chunk is not None:
        return (pins.prefill_chunk,)
    if not engine.mixes or asked.max_tpot_s is None:
        return (0,)
    return (0, *(c for c in (512, 2048) if c < min(engine.chunk_tokens, asked.prompt)))


def _held(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, asked: ServeAsked,
    ways: Mapping[str, tuple[str, ...]], pins: ServePins,
) -> list[Prediction]:  # fmt: skip
    """Plans of one division and one format of the cache: in the quickest formats and, where that
    does not fit or runs fewer than asked for, in fewer bytes, the cache below, and with the formats
    and places that an integer program chooses."""
    load = ServeLoad(prompt=asked.prompt, output=asked.output)
    found: list[Prediction] = []
    first = pins.kv_tier or "gpu"
    if first != "gpu":
        cluster.tier(first)
    lower = pins.offload != () and bool(cluster.tiers)
    apart = lower and pins.kv_tier is None and any(t.name == "cpu" for t in cluster.tiers)
    quickest, smaller = rows(model, cluster, engine, s, load, ways)
    fewer = [*smaller]
    for kv_tier in ("gpu", "cpu") if apart else (first,):
        kept = replace(s, kv_tier=kv_tier)

        def whole(row: Row, kept: Serving = kept) -> bool:
            found.append(predict(model, cluster, engine, in_formats(kept, row), load))
            return found[-1].running >= s.batch and found[-1].fits

        if not pins.offload:
            every = [whole(row) for row in quickest]
            if any(every):
                if kv_tier == first:
                    break
                continue
            any(whole(row) for row in fewer)
        if not lower and all(len(words) == 1 for words in ways.values()):
            continue
        base = in_formats(kept, quickest[0])
        found.extend(
            _below(model, cluster, engine, base, asked, pins.offload if lower else (), ways)
        )
    return found


def _below(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, asked: ServeAsked,
    pinned: tuple[tuple[str, str], ...] | None, ways: Mapping[str, tuple[str, ...]],
) -> list[Prediction]:  # fmt: skip
    """Plans with the formats and places that an integer program chooses."""
    load = ServeLoad(prompt=asked.prompt, output=asked.output)

    def solved(batch: int, tilt: int) -> Prediction | None:
        best = best_tiers(model, cluster, engine, replace(s, batch=batch), load, pinned, ways, tilt)
        if best is None:
            return None
        return predict(model, cluster, engine, replace(best, batch=s.batch), load)

    for batch in dict.fromkeys((s.batch, max(1, s.batch // 4), s.replicas * s.attention_dp)):
        if (first := solved(batch, 0)) is not None:
            return [first, *for_limits(first, asked, partial(solved, batch))]
    return []


# --- where nothing does -----------------------------------------------------------------------


def _nothing_fits(
    cluster: Cluster, model: ServedModel, seen: list[Prediction], asked: ServeAsked
) -> InfeasibleError:
    nearest = min(seen, key=lambda p: p.memory.weights_bytes - sum(
        size for name, size in p.tiers if name != "gpu"))  # fmt: skip
    total = sum(model.block_elements().values())
    hints = []
    if not asked.allow and not asked.max_bits:
        narrow = total * WEIGHT_BYTES["int4"] / 1e9
        hints.append(f"--allow int8,int4: in int4 the weights are {narrow:.0f} GB")
    hints.append("more GPUs, or a host with more memory: plan size --task serve")
    return InfeasibleError(
        f"{model.name} does not fit {cluster.spec}: {nearest.missing}",
        why=f"{total / 1e9:.1f}B weights are {total * WEIGHT_BYTES[asked.precision] / 1e9:.0f} GB"
        f" in {asked.precision}; {cluster.spec} has"
        f" {cluster.count * cluster.device.memory_bytes / 1e9:.0f} GB on its GPUs and "
        + ", ".join(f"{t.bytes * cluster.nodes / 1e9:.0f} GB of {t.name}" for t in cluster.tiers),
        hints=tuple(hints),
    )


def _limits(fits: list[Prediction], asked: ServeAsked, pins: ServePins) -> InfeasibleError:
    """By how much the limits are missed, and the nearest that can be met."""
    near = min(fits, key=lambda p: limits_used(p, asked))
    said, flags = [], []
    for flag, value, most in (("--max-ttft", near.ttft_s, asked.max_ttft_s),
                              ("--max-tpot", near.tpot_s, asked.max_tpot_s)):  # fmt: skip
        if most is not None:
            said.append(f"{flag} {most * 1e3:g}ms: the nearest plan takes {value * 1e3:.4g} ms"
                        f" ({value / most - 1:+.0%})")  # fmt: skip
            flags.append(f"{flag} {_above(value * 1e3)}ms")
    helps = relief(near, asked, serve_pins_said(pins))
    return InfeasibleError(
        "no plan meets the limits", why="\n".join((*said, f"{near.bottleneck} binds that plan")),
        hints=(" ".join(flags) + " can be met", *([helps] if helps != NOTHING else [])),
    )


def _above(value: float) -> str:
    """The number rounded up in its third digit."""
    digit = 10.0 ** (np.floor(np.log10(value)) - 2)
    return f"{np.ceil(value / digit * (1 - 1e-12)) * digit:.6g}"
