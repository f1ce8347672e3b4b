"""Serving runs predicted: `plan validate --serving FILE --configs DIR`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cost_models.serving import admitted, serve
from cost_models.serving_decisions import ServeLoad
from cost_models.serving_engines import ServingEngine, load_serving_engine, serving_engines
from cost_models.serving_ops import Costs
from cost_models.serving_queue import Arrivals, bunching
from cost_models.serving_reading import served_model
from cost_models.serving_shapes import ServedModel
from cost_models.validation.metrics import Pair, Scores, kendall_tau, scores
from ir.errors import PlanError
from planner.capturing import capture
from planner.options import TraceOptions
from planner.validation.serving_recipes import LOADS
from planner.validation.serving_rows import ServedRow, ServingTable, read_serving

# The harness sends the concurrency ten times over. Of the public recipes' three loads, prompts and
# answers have random lengths between .8 and 1 of what a row says; of others, the very length. Equal
# lengths keep a wave together in an engine that reads all prompts before it decodes.
WAVES = 10
RANDOM_MEAN = 0.9
RANDOM_SPREAD = 0.2 / RANDOM_MEAN
CAPPED = (
    "by its own times a fraction of the requests ran at once, though memory has room for all: a"
    " cap that no column says"
)
_CAP = 0.4  # of the requests that could run
DRAFTED = (
    "a token takes less time than the kernels of a step: more than one is decided a step, which no"
    " column says"
)
STALLED = (
    "its first tokens take longer than all the prompts in flight one after another, which no queue"
    " can cost: kernels compiled or loaded while it was measured"
)
_STALL = 2.0, 0.2  # of what a first token can wait for: times, and seconds of a server's own
_SAME = 1.2  # a run this much slower than its twin, or than its kernels, drafts nothing
Engines = Mapping[str, ServingEngine]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPrediction:
    """A run beside its prediction, seconds. floor_s: of a decode step's kernels back to back.
    worst_s: the longest that a first token can wait for others. running: requests of a replica that
    decode at once."""

    row: ServedRow
    ttft_s: float
    tpot_s: float
    floor_s: float
    worst_s: float
    running: float
    breakdown_s: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingClass:
    """Errors of the runs of one class."""

    dimension: str
    name: str
    ttft: Scores
    tpot: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRanking:
    """Kendall's tau of seconds a token within a model and device: over all its runs, and over
    those of the same load alone; (tau, pairs), tau absent where no pair compares."""

    group: str
    any_load: tuple[float | None, int]
    same_load: tuple[float | None, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingReport:
    """rows: read. fit: predicted and scored. set_aside: predicted, not scored. unfit: (id, reason)
    of both those and the ones that could not be predicted."""

    rows: int
    fit: tuple[ServedPrediction, ...]
    set_aside: tuple[ServedPrediction, ...]
    unfit: tuple[tuple[str, str], ...]
    classes: tuple[ServingClass, ...]
    everything: ServingClass | None
    ranking: tuple[ServingRanking, ...]


def models_of(
    rows: Sequence[ServedRow], progress: Progress | None = None
) -> tuple[dict[Path, ServedModel], dict[Path, str]]:
    """The models of the rows, each traced once; and what is wrong with those that cannot be."""
    found: dict[Path, ServedModel] = {}
    faults: dict[Path, str] = {}
    for config in dict.fromkeys(row.config for row in rows):
        if progress:
            progress(f"tracing {config.stem}")
        try:
            options = TraceOptions(model=str(config), hardware="h100x8")
            found[config] = served_model(capture(options), "vllm")  # or any that routes
        except PlanError as fault:
            faults[config] = f"{config.name} is no model that is served: {fault.what}"
    return found, faults


def predict(
    rows: Sequence[ServedRow], models: Mapping[Path, ServedModel], engines: Engines
) -> tuple[list[ServedPrediction], list[tuple[str, str]]]:
    """Predictions, runs that differ in their load alone at once; (id, reason) of the others."""
    groups: dict[tuple[object, ...], list[ServedRow]] = defaultdict(list)
    for row in rows:
        plain = replace(row.serving, batch=1)
        groups[row.engine, row.config, row.cluster.device.name, plain].append(row)
    found: list[ServedPrediction] = []
    unfit: list[tuple[str, str]] = []
    for group in groups.values():
        first = group[0]
        engine, model = engines[first.engine], models[first.config]
        costs = Costs(cluster=first.cluster, engine=engine, serving=first.serving)
        room = np.array([
            admitted(model, first.cluster, engine, first.serving, load_of(row)) for row in group
        ])
        fits = room >= 1
        unfit += [
            (row.id, f"weights and one request do not fit {first.gpus} GPUs of this kind")
            for row, good in zip(group, fits, strict=True) if not good
        ]  # fmt: skip
        if fits.any():
            found += _served(costs, model, [r for r, good in zip(group, fits) if good], room[fits])
    order = {row.id: i for i, row in enumerate(rows)}
    return sorted(found, key=lambda one: order[one.row.id]), unfit


def _served(
    costs: Costs, model: ServedModel, rows: Sequence[ServedRow], room: np.ndarray
) -> list[ServedPrediction]:
    loads = [load_of(row) for row in rows]
    prompt = np.array([load.prompt for load in loads])
    output = np.array([load.output for load in loads])
    batch = np.array([float(row.serving.batch) for row in rows])
    arrivals = _arrivals(costs, rows, prompt)
    out = serve(costs, model, prompt, output, batch, room, arrivals)
    bare = replace(costs.engine, start_share=0.0, step_host_s=0.0, sequence_host_s=0.0)
    # At the clock of a steady load: a floor that a run without drafting stays well above.
    kernels = replace(costs, engine=bare, prompts_alone=True)
    floor = serve(kernels, model, prompt, output, batch, room, arrivals)
    left = arrivals.looked_every + arrivals.gathered_steps + 1
    steps = np.ceil(prompt / (costs.serving.prefill_chunk or costs.engine.chunk_tokens))
    prompt_s = out.prefill_s - steps * costs.routed_host_s(model)  # which prompts wait for together
    worst_s = out.running * prompt_s + left * out.decode_s
    return [
        ServedPrediction(
            row=row, ttft_s=float(out.ttft_s[i]), tpot_s=float(out.tpot_s[i]),
            floor_s=float(floor.decode_s[i]), worst_s=float(worst_s[i]),
            running=float(out.running[i]),
            breakdown_s=(
                *((part, float(seconds[i])) for part, seconds in out.parts.items()),
                ("prompts", float(out.tpot_s[i] - out.decode_s[i])),
            ),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip


def _arrivals(costs: Costs, rows: Sequence[ServedRow], prompt: np.ndarray) -> Arrivals:
    equal = np.array([not _random(row) for row in rows])
    recipes = [row.recipe for row in rows]
    tokens = np.array([recipe.gathered_tokens for recipe in recipes])
    ranks = np.array([float(recipe.gathered_ranks) for recipe in recipes])
    return Arrivals(
        waves=np.where(equal & (not costs.engine.mixes), 1.0, WAVES),
        bunched=np.where(equal, 1.0, bunching(RANDOM_SPREAD, WAVES)),
        looked_every=np.array([float(recipe.looked_every) for recipe in recipes]),
        gathered_prompts=np.maximum(ranks, tokens / prompt),
        gathered_steps=np.array([float(recipe.gathered_steps) for recipe in recipes]),
    )  # fmt: skip


def drafted(found: Sequence[ServedPrediction]) -> set[str]:
    """Ids of runs that decide more than one token a step: of a model that can, where a run of the
    series takes less a token than the kernels alone, or all of them hardly more and another series
    of that release and checkpoint does; but not runs with a faster twin."""
    series: dict[tuple[object, ...], list[ServedPrediction]] = defaultdict(list)
    for one in found:
        if one.row.drafts:
            series[one.row.series].append(one)
    least = {key: min(o.row.tpot_s / o.floor_s for o in runs) for key, runs in series.items()}
    releases = {_release(runs[0].row) for key, runs in series.items() if least[key] < 1}
    ids: set[str] = set()
    for key, runs in series.items():
        near = all(one.row.tpot_s < _SAME * one.floor_s for one in runs)
        if least[key] >= 1 and not (near and _release(runs[0].row) in releases):
            continue
        quickest: dict[tuple[float, float, int], float] = {}
        for one in runs:
            load = _load(one.row)
            quickest[load] = min(quickest.get(load, math.inf), one.row.tpot_s)
        ids |= {o.row.id for o in runs if o.row.tpot_s < _SAME * quickest[_load(o.row)]}
    return ids


def _release(row: ServedRow) -> tuple[object, ...]:
    return row.engine, row.version, row.config, row.cluster.device.name, row.precision


def capped(one: ServedPrediction) -> bool:
    """Whether far fewer requests ran than could, by Little's law on the measured times alone."""
    row = one.row
    decoding_s = load_of(row).output * row.tpot_s
    ran = row.serving.batch / row.serving.replicas * decoding_s / (row.ttft_s + decoding_s)
    return ran < _CAP * one.running


def stalled(one: ServedPrediction) -> bool:
    """Whether no queue explains its first token: it waited longer, on the mean, than every prompt
    in flight takes, one after another; but not where requests wait for memory."""
    row, (times, more_s) = one.row, _STALL
    if one.running < row.serving.batch / row.serving.replicas:
        return False
    return row.ttft_s > times * one.worst_s + more_s


def _random(row: ServedRow) -> bool:
    return (row.prompt, row.output) in LOADS


def load_of(row: ServedRow) -> ServeLoad:
    """The mean request of a run."""
    share = RANDOM_MEAN if _random(row) else 1.0
    return ServeLoad(prompt=row.prompt * share, output=row.output * share)


def _load(row: ServedRow) -> tuple[float, float, int]:
    return row.prompt, row.output, row.serving.batch


def classes_of(one: ServedPrediction, model: ServedModel) -> tuple[tuple[str, str], ...]:
    """(dimension, class) of a run."""
    row = one.row
    if any(layer.experts for layer in model.layers):
        kind = "moe"
    else:
        kind = "dense tp8" if row.gpus >= 8 else "dense tp1-4"
    device = row.cluster.device.name
    return (
        ("kind", kind), ("engine", row.engine), ("precision", row.precision), ("device", device),
        ("group", f"{row.model} {device}"), ("version", f"{row.engine} {row.version or 'unsaid'}"),
    )  # fmt: skip


def _scored(dimension: str, name: str, runs: Sequence[ServedPrediction]) -> ServingClass:
    return ServingClass(
        dimension=dimension, name=name,
        ttft=scores([(one.ttft_s, one.row.ttft_s) for one in runs]),
        tpot=scores([(one.tpot_s, one.row.tpot_s) for one in runs]),
    )  # fmt: skip


def report_of(
    table: ServingTable, models: Mapping[Path, ServedModel], engines: Engines,
    faults: Mapping[Path, str],
) -> ServingReport:  # fmt: skip
    """Everything that is said of a table."""
    lost = [(row.id, faults[row.config]) for row in table.rows if row.config in faults]
    rows = [row for row in table.rows if row.config in models]
    found, misfits = predict(rows, models, engines)
    why = dict.fromkeys((one.row.id for one in found if stalled(one)), STALLED)
    why |= dict.fromkeys((one.row.id for one in found if capped(one)), CAPPED)
    why |= dict.fromkeys(drafted(found), DRAFTED)
    fit = [one for one in found if one.row.id not in why]
    aside = [one for one in found if one.row.id in why]
    by_class: dict[tuple[str, str], list[ServedPrediction]] = defaultdict(list)
    for one in fit:
        for key in classes_of(one, models[one.row.config]):
            by_class[key].append(one)
    dimensions = ("kind", "engine", "precision", "device", "group", "version")
    classes = [_scored("", "all", fit)] if fit else []
    classes += [
        _scored(*key, by_class[key])
        for key in sorted(by_class, key=lambda k: (dimensions.index(k[0]), k[1]))
    ]
    unfit = (*table.unfit, *lost, *misfits, *((one.row.id, why[one.row.id]) for one in aside))
    return ServingReport(
        rows=len(table.rows) + len(table.unfit), fit=tuple(fit), set_aside=tuple(aside),
        unfit=unfit, classes=tuple(classes), ranking=_rankings(fit),
        everything=_scored("", "set aside too", found) if found else None,
    )  # fmt: skip


def _rankings(fit: Sequence[ServedPrediction]) -> tuple[ServingRanking, ...]:
    groups: dict[str, list[ServedPrediction]] = defaultdict(list)
    for one in fit:
        groups[f"{one.row.model} {one.row.cluster.device.name}"].append(one)

    def tau(sets: Sequence[Sequence[Pair]]) -> tuple[float | None, int]:
        value, pairs = kendall_tau(sets)
        return (None if math.isnan(value) else value), pairs

    def split(runs: Sequence[ServedPrediction]) -> list[list[Pair]]:
        loads: dict[tuple[float, float, int], list[Pair]] = defaultdict(list)
        for one in runs:
            loads[_load(one.row)].append((one.tpot_s, one.row.tpot_s))
        return list(loads.values())

    whole = {name: [[(o.tpot_s, o.row.tpot_s) for o in runs]] for name, runs in groups.items()}
    alike = {name: split(runs) for name, runs in groups.items()}
    rows = [
        ServingRanking(group=name, any_load=tau(whole[name]), same_load=tau(alike[name]))
        for name in sorted(groups)
    ]
    if rows:
        together = ServingRanking(
            group="all", any_load=tau([s for sets in whole.values() for s in sets]),
            same_load=tau([s for sets in alike.values() for s in sets]),
        )  # fmt: skip
        rows.insert(0, together)
    return tuple(rows)


def validate_serving(
    path: Path, configs: Path, progress: Progress | None = None
) -> ServingReport:
    """Predict every run of a table. Raises UsageError for a file or folder that is none."""
    table = read_serving(path, configs)
    engines = {name: load_serving_engine(name) for name in serving_engines()}
    models, faults = models_of(table.rows, progress)
    return report_of(table, models, engines, faults)
