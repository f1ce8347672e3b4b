"""The verdict: the step, whether it fits and by how much, what was proved, what was decided."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.ledger import Estimate
from cost_models.units import format_bytes, format_count, format_rate, format_seconds
from cost_models.validation.accuracy import memory_error
from planner.check import Checked
from planner.plan import Plan
from planner.proved import all_pinned, an_axis, gain_words, pins_words
from planner.report.charts import sentences, strong
from planner.report.markup import Children, Html, el
from planner.tightness import tight, tight_words
from planner.why_text import decided

PROOF = {
    "OPTIMAL": "no plan of the space is better",
    "ESTIMATE": "every decision was given: an estimate, not a search",
}


def subtitle(plan: Plan) -> str:
    """What the plan is for, in a line."""
    w, graph = plan.workload, plan.graph
    length = f"{w.global_batch:,} x {w.seq_len:,} tokens" if graph.seq_in_input else (
        f"{w.global_batch:,} samples"
    )  # fmt: skip
    return (
        f"{format_count(graph.parameter_count)} parameters, trained on {plan.hardware}: batch"
        f" {length}, {w.precision}, {w.optimizer}, {w.engine}"
    )


def verdict(checked: Checked) -> Html:
    """The numbers that the rest of the page is about."""
    plan, e = checked.plan, checked.estimate
    what = "tokens" if plan.graph.seq_in_input else "samples"
    rate = e.tokens / e.step_time_s / e.gpus
    tflops = f"{e.model_flop_per_s_per_gpu / 1e12:,.0f} model TFLOP/s a GPU"
    return el(
        "div",
        el("p", sentence(checked), class_="verdict"),
        tiles([
            ("A step", format_seconds(e.step_time_s), f"model error {e.error:.0%}"),
            ("Memory at peak", format_bytes(e.peak_memory_bytes),
             f"{margin(e)}; model error {memory_error():.0%}"),
            ("Throughput", format_rate(rate),
             f"{what}/s a GPU; {format_rate(rate * e.gpus)} in all"),
            ("MFU", f"{e.mfu:.1%}", tflops),
            ("Search", *searched(checked)),
        ]),
        el("p", el("span", "Decided", class_="label"), decided(plan.decisions), class_="decided"),
        stale(checked.moved),
    )  # fmt: skip


def sentence(checked: Checked) -> Html:
    """Does it fit, what fills the step, what was proved."""
    e, proved = checked.estimate, proof(checked)
    fits, look = ("It fits", "good") if e.fits else ("It does not fit", "bad")
    if tight(e):
        fits, look = f"It {tight_words()}; leave room with --max-memory", "warn"
    name, most = max(e.breakdown_ps, key=lambda part: part[1])
    share = most / e.step_time_ps
    return sentences(
        el("span", f"{fits}: {margin(e)}.", class_=look),
        [strong(f"{share:.0%}"), f" of the step is {name.replace('_', ' ')}."],
        f"{proved[:1].upper()}{proved[1:]}.",
    )


def margin(e: Estimate) -> str:
    """How much of the fullest GPU is left, or lacking."""
    rank = e.fullest
    capacity = e.capacity_of(rank)
    left = capacity - rank.peak_bytes
    where = f"of {format_bytes(capacity)}" + (f" on {rank.name}" if len(e.ranks) > 1
                                              else "")  # fmt: skip
    full = [use.said for use in e.tiers if not use.fits]
    if full:
        return f"tier {full[0]}"
    word = "free" if left >= 0 else "too little"
    return f"{format_bytes(abs(left))} ({abs(left) / capacity:.0%}) {word} {where}"


def searched(checked: Checked) -> tuple[str, str]:
    """How the search ended in a word, and what it proved."""
    plan = checked.plan
    if all_pinned(plan):
        return "pinned", "not searched: every decision was given"
    return plan.solver.status.lower(), proof(checked)


def proof(checked: Checked) -> str:
    """What the search proved, of the inputs that it had and of what its pins left open."""
    plan, s = checked.plan, checked.plan.solver
    if all_pinned(plan):
        return "pinned, not searched"
    if checked.moved and s.status != "ESTIMATE":
        return "what its search proved was of other inputs than today's"
    better = {"cost": "cheaper", "energy": "of less energy"}.get(s.objective, "better")
    if s.pins:
        of = f"no plan that has them is {better}{an_axis(s, ' by')}"
        of = of if s.status == "OPTIMAL" else f"{gain_words(s)}, by plans that have them"
        return f"{s.status.lower()} under its pins: {pins_words(plan)} ({of})"
    if s.status == "FEASIBLE":
        return gain_words(s)
    said = PROOF.get(s.status, s.status).replace("better", better)
    return said + an_axis(s, " by") * (s.status == "OPTIMAL")


def tiles(rows: Sequence[tuple[str, str, str]]) -> Html:
    """Numbers in large, each with its name and a word about it."""
    return el("dl", [
        el("div", el("dt", name), el("dd", el("span", number, class_="figure"),
                                     el("span", about, class_="about")))
        for name, number, about in rows
    ], class_="tiles")  # fmt: skip


def stale(moved: Sequence[str]) -> Children:
    """What moved since the plan was written; the page has today's numbers."""
    if not moved:
        return None
    return el("div", el("strong", "The plan is stale; this page costs it anew."),
              el("ul", [el("li", line) for line in moved]), class_="notice")  # fmt: skip
