"""Of a plan of serving: other ways to divide the GPUs, and what would change the decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cost_models.hardware import Cluster
from cost_models.serving_decisions import Serving
from cost_models.serving_reading import served_model
from cost_models.units import format_rate, format_seconds
from ir.errors import PlanError
from planner.report.charts import Mark, Section, bar, figure, row, sentences, table, title_of
from planner.report.markup import Html, el
from planner.report.serving import load_of
from planner.serving.asked import ServePins
from planner.serving.check import CheckedServing
from planner.serving.plan import ServingPlan
from planner.serving.predict import Prediction
from planner.serving.relief import relief
from planner.serving.search import best_first, search
from planner.serving.show import division
from planner.serving.tracing import recosted

FACTORS = (1 / 4, 1 / 2, 2.0, 4.0)  # times an input
SHOWN = (1 / 2, 2.0)
LEAST_SCALE = 0.02  # of the time that bars are of

Scaled = Callable[[ServingPlan, Cluster, float], tuple[ServingPlan, Cluster]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One input: (factor, TTFT, TPOT) relative to the plan's, less 1; and the nearest factors at
    which another division comes first, in words."""

    name: str
    changes: tuple[tuple[float, float, float], ...]
    flips: tuple[tuple[float, str], ...]


def others_of(checked: CheckedServing) -> tuple[Prediction, ...] | str:
    """The best plans of other divisions, the best first; or why there are none."""
    plan = checked.plan
    try:
        model = served_model(plan.graph, plan.asked.engine)
        found = search(model, checked.cluster, plan.asked, ServePins())
    except PlanError as fault:
        return f"{fault.what}."
    mine = division(checked.found)
    return tuple(p for p in (found.best, *found.others) if division(p) != mine)


def whynot(checked: CheckedServing, others: Sequence[Prediction] | str) -> Section:
    """Other divisions of the GPUs beside this one."""
    title, key = "Why not otherwise", "why-not"
    if isinstance(others, str) or not others:
        lede = others if isinstance(others, str) else "There is no other way to divide the GPUs."
        return Section(key=key, title=title, lede=str(lede or "No other division."), body=el("div"))
    p, load = checked.found, load_of(checked.plan)
    most = max(x.latency_s(load) for x in (p, *others))
    ahead = [o for o in others if _order(checked.plan, checked.cluster, [p, o])[0] is o]
    rows = [_other(checked, p, most, "this plan")]
    rows += [_other(checked, o, most, _words(o)) for o in others]
    behind = table(
        "Ways to divide the GPUs, each with its best formats and tiers",
        ["division", "first token", "then one every", "a request", "tokens/s", "binds"],
        [[_words(o) + (" (this plan)" if o is p else ""), format_seconds(o.ttft_s),
          format_seconds(o.tpot_s), format_seconds(o.latency_s(load)), format_rate(o.tokens_per_s),
          o.bottleneck] for o in (p, *others)],
        last_words=1,
    )  # fmt: skip
    lede = sentences(
        (f"The {len(others)} best other ways to divide the GPUs, ordered for" if len(others) > 1
         else "The one other way to divide the GPUs, asked for")
        + f" {checked.plan.asked.objective}.",
        f"{len(ahead)} of them better than this plan, which was pinned or made with other inputs."
        if ahead else "None comes before this plan.",
    )
    return Section(key=key, title=title, lede=lede, body=figure(
        "The time of a request under each way to divide the GPUs.",
        el("div", rows, class_="rows"), behind,
        note="Bars: a request from its arrival to its last token."))  # fmt: skip


def _other(checked: CheckedServing, o: Prediction, most: float, name: str) -> Html:
    load = load_of(checked.plan)
    whole = o.latency_s(load)
    marks = [
        Mark(start=0, end=o.ttft_s / most, kind="ttft",
             tip=f"{name}: first token {format_seconds(o.ttft_s)}"),
        Mark(start=o.ttft_s / most, end=whole / most, kind="decode",
             tip=f"{name}: then one every {format_seconds(o.tpot_s)}"),
    ]  # fmt: skip
    words = f"{format_rate(o.tokens_per_s)} tokens/s; {o.bottleneck} binds"
    words += f": {relief(o, checked.plan.asked, checked.plan.solver.pins)}"
    return el("div", row(name, bar(marks), format_seconds(whole)),
              el("p", words, class_="because"), class_="reasoned")  # fmt: skip


# --- sensitivity -------------------------------------------------------------------------------


def effects(checked: CheckedServing, others: Sequence[Prediction]) -> tuple[Effect, ...]:
    """Every input that the plan can feel, scaled; it and the other divisions predicted again."""
    p, found = checked.found, []
    for name, scaled in _inputs(checked):
        changes, flips = [], []
        for factor in FACTORS:
            try:
                plan, cluster = scaled(checked.plan, checked.cluster, factor)
            except ValueError:
                continue
            made = recosted(plan, cluster)
            if factor in SHOWN:
                changes.append((factor, made.ttft_s / p.ttft_s - 1, made.tpot_s / p.tpot_s - 1))
            rivals = [recosted(plan, cluster, _batched(o.serving, plan)) for o in others]
            first = _order(plan, cluster, [x for x in (made, *rivals) if x.fits])
            if first and first[0] is not made:
                flips.append((factor, _words(first[0])))
        found.append(Effect(name=name, changes=tuple(changes), flips=_nearest(flips)))
    return tuple(found)


def _nearest(flips: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """The flip nearest to what is, each way."""
    below = [f for f in flips if f[0] < 1][-1:]
    return (*below, *[f for f in flips if f[0] > 1][:1])


def _batched(s: Serving, plan: ServingPlan) -> Serving:
    return replace(s, batch=plan.serving.batch)


def _order(plan: ServingPlan, cluster: Cluster, rows: Sequence[Prediction]) -> list[Prediction]:
    return best_first(rows, plan.asked, cluster)


def _inputs(checked: CheckedServing) -> Iterator[tuple[str, Scaled]]:
    cluster, s = checked.cluster, checked.plan.serving
    yield "memory bandwidth", _memory
    yield "arithmetic rate", _peak
    if cluster.domain_ranks > 1:
        yield f"{cluster.intra.name} bandwidth", _intra
    if cluster.domain_ranks < cluster.count:
        yield "network bandwidth", _network
    if s.tiers or s.kv_tier != "gpu":
        yield "host link and tiers", _below
    yield "requests at once", _requests
    yield "tokens of a prompt", _prompt


def _memory(p: ServingPlan, c: Cluster, times: float) -> tuple[ServingPlan, Cluster]:
    rate = times * c.device.memory_bandwidth_bytes_per_s
    return p, replace(c, device=replace(c.device, memory_bandwidth_bytes_per_s=rate))


def _peak(p: ServingPlan, c: Cluster, times: float) -> tuple[ServingPlan, Cluster]:
    peaks = tuple((name, times * rate) for name, rate in c.device.peak_flop_per_s)
    return p, replace(c, device=replace(c.device, peak_flop_per_s=peaks))


def _intra(p: ServingPlan, c: Cluster, times: float) -> tuple[ServingPlan, Cluster]:
    return p, replace(c, intra=replace(c.intra, bytes_per_s=times * c.intra.bytes_per_s))


def _network(p: ServingPlan, c: Cluster, times: float) -> tuple[ServingPlan, Cluster]:
    levels = tuple(replace(one, bytes_per_s=times * one.bytes_per_s) for one in c.levels)
    inter = replace(c.inter, bytes_per_s=times * c.inter.bytes_per_s)
    return p, replace(c, inter=inter, levels=levels)


def _below(p: ServingPlan, c: Cluster, times: float) -> tuple[ServingPlan, Cluster]:
    tiers = tuple(
        replace(t, read_bytes_per_s=times * t.read_bytes_per_s,
                write_bytes_per_s=times * t.write_bytes_per_s) for t in c.tiers
    )  # fmt: skip
    link = times * c.device.host_link_bytes_per_s
    return p, replace(c, tiers=tiers, device=replace(c.device, host_link_bytes_per_s=link))


def _requests(p: ServingPlan, c: Cluster, times: float) -> tuple[ServingPlan, Cluster]:
    """Raises ValueError for less than one request a copy."""
    batch = times * p.serving.batch
    if batch % 1 or batch < p.serving.replicas * p.serving.attention_dp:
        raise ValueError
    return replace(p, serving=replace(p.serving, batch=int(batch))), c


def _prompt(p: ServingPlan, c: Cluster, times: float) -> tuple[ServingPlan, Cluster]:
    prompt = max(1, round(times * p.asked.prompt))
    return replace(p, asked=replace(p.asked, prompt=prompt)), c


def sensitivity(checked: CheckedServing, found: Sequence[Effect], count: int) -> Section:
    """What each input does to the first token and to those after it. count: rivals."""
    flipping = [e.name for e in found if e.flips]
    lede = sentences(
        f"The plan and {count} other division{'s' * (count > 1)} of the GPUs are predicted again"
        " with one input scaled, the formats and tiers of each kept." if count
        else "The plan is predicted again with one input scaled.",
        f"Another division comes first with {', '.join(flipping)}." if flipping
        else f"Nothing asked changes the division between {FACTORS[0]:g} and {FACTORS[-1]:g} times."
        if count else None,
    )
    most = max([LEAST_SCALE, *(abs(x) for e in found for _, *both in e.changes for x in both)])
    rows = [_effect(e, most) for e in found]
    behind = table(
        "What each input does",
        ["input", "value", "first token", "time between tokens", "division"],
        [[e.name, f"x{factor:g}", f"{ttft:+.1%}", f"{tpot:+.1%}", _flip(e, factor)]
         for e in found for factor, ttft, tpot in e.changes],
        last_words=1,
    )  # fmt: skip
    return Section(
        key="sensitivity", title="What would change the decision", lede=lede,
        body=figure(
            "The time between tokens with each input scaled.",
            el("div", rows, class_="rows"), behind,
            note="Bars and figures: the time between tokens with half and with twice the input.",
        ),
    )  # fmt: skip


def _effect(e: Effect, most: float) -> Html:
    marks = []
    for factor, _, tpot in sorted(e.changes, key=lambda c: -abs(c[2])):
        share = 0.5 * tpot / most
        marks.append(Mark(start=min(0.5, 0.5 + share), end=max(0.5, 0.5 + share),
                          kind="worse" if share > 0 else "better",
                          tip=f"{e.name} x{factor:g}: {tpot:+.1%} between tokens"))  # fmt: skip
    amount = " / ".join(f"{tpot:+.1%}" for _, _, tpot in e.changes)
    first = [f"x{f:g} {ttft:+.1%}" for f, ttft, _ in e.changes]
    said = f"first token {', '.join(first)}" if first else "no whole number of requests"
    flips = [f"; at x{f:g} {words} comes first" for f, words in e.flips]
    return el("div", row(e.name, bar(marks, lines=[(0.5, "as it is")]), amount),
              el("p", said, *flips, class_="because"), class_="reasoned")  # fmt: skip


def _flip(e: Effect, factor: float) -> str:
    return next((words for f, words in e.flips if f == factor), "the same")


def _words(p: Prediction) -> str:
    return ", ".join(f"{title_of(k)} {v}" for k, v in division(p).items())
