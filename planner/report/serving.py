"""A plan of serving as a page: what requests see, what fills a GPU, where every block lies."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.assumptions import statistic
from cost_models.constants_table import load_constants
from cost_models.serving_decisions import ServeLoad
from cost_models.serving_engines import error_of, load_serving_engine
from cost_models.serving_reading import served_model
from cost_models.serving_tiers import block_bytes, sharers
from cost_models.units import format_bytes, format_count, format_rate, format_seconds
from planner.names import many
from planner.proved import all_pinned, pins_words
from planner.report import assumptions
from planner.report.charts import (
    Mark,
    Section,
    bar,
    figure,
    legend,
    row,
    sentences,
    stacked,
    strong,
    table,
    title_of,
)
from planner.report.markup import Html, el, join
from planner.report.verdict import stale, tiles
from planner.serving.check import CheckedServing
from planner.serving.plan import ServingPlan
from planner.serving.predict import Prediction
from planner.serving.relief import NOTHING, relief
from planner.serving.show import memory_basis, unpacked_words
from planner.serving.text import block_records

SLACK = 1.02
SMALL = 0.0005  # of a step: smaller parts are in the table alone


def subtitle(plan: ServingPlan) -> str:
    """What the plan is for, in a line."""
    a, s = plan.asked, plan.serving
    requests = f"{s.batch} request{'s' if s.batch != 1 else ''} at once"
    return (
        f"{format_count(plan.graph.parameter_count)} parameters, served on {plan.hardware}:"
        f" {requests}, {a.prompt:,} tokens in, {a.output:,} out, {a.engine}, for {a.objective}"
    )


def verdict(checked: CheckedServing) -> Html:
    """What requests see, whether it fits, what binds."""
    plan, p = checked.plan, checked.found
    helps = relief(p, plan.asked, plan.solver.pins)
    fits = "It fits" if p.fits else f"It does not fit: {p.missing}"
    missed = _missed(checked)
    request = format_seconds(p.latency_s(load_of(plan)))
    waiting = f"{p.running:.0f} of {p.batch} run at once" if p.running < p.batch else (
        f"{p.batch} run at once"
    )  # fmt: skip
    return el(
        "div",
        el("p", sentences(
            el("span", f"{fits}{missed}.", class_="good" if p.fits and not missed else "bad"),
            [strong(p.bottleneck[:1].upper() + p.bottleneck[1:]),
             f" binds: {helps}{' would help' * (helps != NOTHING)}."],
            f"What is lossy: {', '.join(plan.lossy)}." if plan.lossy else "Nothing in it is lossy.",
        ), class_="verdict"),
        tiles([
            ("First token", format_seconds(p.ttft_s), "TTFT, of a request that arrives"),
            ("Then one every", format_seconds(p.tpot_s),
             f"TPOT; model error {error_of(plan.asked.engine):.0%}"),
            ("A whole request", request, f"{plan.asked.output:,} tokens out"),
            ("Throughput", format_rate(p.tokens_per_s), f"tokens/s; {waiting}"),
            ("Memory of a GPU", format_bytes(dict(p.tiers)["gpu"]),
             f"of {format_bytes(p.memory.capacity_bytes)}; error not measured"),
            ("Search", *searched(checked)),
        ]),
        el("p", el("span", "Decided", class_="label"), decided(plan), class_="decided"),
        stale(checked.moved),
    )  # fmt: skip


def searched(checked: CheckedServing) -> tuple[str, str]:
    """How the search ended in a word, and of what."""
    plan, s = checked.plan, checked.plan.solver
    if all_pinned(plan):
        return "pinned", "not searched: every decision was given"
    if checked.moved:
        return s.status.lower(), "of other inputs than today's"
    pins = f"under its pins: {pins_words(plan)}; " if s.pins else ""
    return s.status.lower(), f"{pins}of {many(s.meshes, 'plan')} predicted"


def _missed(checked: CheckedServing) -> str:
    p, a = checked.found, checked.plan.asked
    limits = (("first token", p.ttft_s, a.max_ttft_s), ("time between tokens", p.tpot_s,
                                                        a.max_tpot_s))  # fmt: skip
    over = [f"the {name} misses its limit of {format_seconds(most)}"
            for name, value, most in limits if most is not None and value > most]  # fmt: skip
    return f", but {' and '.join(over)}" if over else ""


def decided(plan: ServingPlan) -> str:
    """A plan's decisions in a line."""
    s = plan.serving
    words = [f"{k} {v}" for k, v in _division(plan).items()]
    words += [f"weights in {s.default}", *(f"{block} in {word}" for block, word in s.weights)]
    words.append(f"cache in {s.kv}" + (f" on {s.kv_tier}" if s.kv_tier != "gpu" else ""))
    words += [f"{h.block} {_way(h.place, h.block)} {h.tier}" for h in s.tiers]
    return ", ".join(title_of(word) for word in words)


def _way(place: str, block: str) -> str:
    """What is done with a block that is not on the GPU."""
    if block == "embeddings":  # in either place
        return "looked up on"
    return "streamed from" if place == "stream" else "multiplied on"


def _division(plan: ServingPlan) -> dict[str, int]:
    s = plan.serving
    found = {"tp": s.tp, "pp": s.pp}
    found |= {"ep": s.ep, "etp": s.expert_tp} if s.ep > 1 else {}
    found |= {"attention_dp": s.attention_dp} if s.attention_dp > 1 else {}
    return found | {"replicas": s.replicas}


def load_of(plan: ServingPlan) -> ServeLoad:
    """The load that the plan was made for."""
    return ServeLoad(prompt=plan.asked.prompt, output=plan.asked.output)


# --- memory ------------------------------------------------------------------------------------


def memory(checked: CheckedServing, scale_bytes: float = 0) -> Section:
    """The fullest GPU item by item, and the tiers below. scale_bytes: of a plan beside it."""
    p, plan = checked.found, checked.plan
    items, used = gpu_items(p), dict(p.tiers)["gpu"]
    capacity = p.memory.capacity_bytes
    scale = max(scale_bytes, scale_of(p))
    rows, at = [], 0.0
    line = [(capacity / scale, f"what the engine may take: {format_bytes(capacity)}")]
    for name, size in items:
        tip = f"{title_of(name)}: {format_bytes(size)}"
        rows.append(row(title_of(name), bar([Mark(start=at / scale, end=(at + size) / scale,
                                                  kind=f"m-{name}", tip=tip)], lines=line),
                        format_bytes(size)))  # fmt: skip
        at += size
    rows.append(row("peak", bar([Mark(start=0, end=at / scale, kind="total",
                                      tip=f"peak: {format_bytes(at)}")], lines=line),
                    format_bytes(at), "row sum"))  # fmt: skip
    below = [(name, size * sharers(checked.cluster, plan.serving), checked.cluster.tier(name).bytes)
             for name, size in p.tiers if name != "gpu"]  # fmt: skip
    rows += [
        row(f"{name}, of {format_bytes(held)} a node",
            bar([Mark(start=0, end=size / max(size, held), kind="m-context",
                      tip=f"{name}: {format_bytes(size)}")]),
            format_bytes(size))
        for name, size, held in below
    ]  # fmt: skip
    basis = memory_basis(p)
    kv, load, below_gpu = p.memory.kv_bytes_per_token, load_of(plan), plan.serving.kv_tier != "gpu"
    each = kv * (load.prompt + load.output)
    lede = sentences(
        f"The fullest GPU holds {format_bytes(used)} of the {format_bytes(capacity)} that the"
        " engine takes.",
        f"{basis[:1].upper()}{basis[1:]}.",
        f"The cache of one token is {format_bytes(kv)} a GPU in {plan.serving.kv}"
        + (f", on {plan.serving.kv_tier}" if below_gpu else "")
        + f"; of one request at its longest {format_bytes(each)}"
        + (f", {format_bytes(p.memory.kv_bytes_per_sequence)} of it on the GPU"
           if below_gpu else "") + ".",
        *(f"{name} holds {format_bytes(size)} of {format_bytes(held)} a node."
          for name, size, held in below),
    )
    behind = table(
        "Bytes of the fullest GPU, and of the tiers below it", ["what", "bytes", "of"],
        [*([title_of(name), format_bytes(size), ""] for name, size in items),
         ["GPU", format_bytes(at), format_bytes(capacity)],
         *([f"{name}, a node", format_bytes(size), format_bytes(held)]
           for name, size, held in below)],
    )  # fmt: skip
    return Section(
        key="memory", title="Memory", lede=lede,
        body=figure(f"Memory of the fullest GPU, {format_bytes(used)}.",
                    [legend([(f"m-{name}", title_of(name)) for name, _ in items]),
                     el("div", rows, class_="rows")], behind),
    )  # fmt: skip


def gpu_items(p: Prediction) -> list[tuple[str, float]]:
    """What the fullest GPU holds, by name; sums to what the prediction says of it."""
    m, used = p.memory, dict(p.tiers)["gpu"]
    fixed = m.weights_bytes + m.workspace_bytes + m.context_bytes
    return [("parameters", m.weights_bytes), ("cache", used - fixed),
            ("workspace", m.workspace_bytes), ("context", m.context_bytes)]  # fmt: skip


def scale_of(p: Prediction) -> float:
    """Bytes that a bar is wide."""
    return SLACK * max(p.memory.capacity_bytes, dict(p.tiers)["gpu"])


# --- time --------------------------------------------------------------------------------------


def request(checked: CheckedServing, scale_s: float = 0) -> Section:
    """One request from its arrival to its last token. scale_s: of a plan beside it."""
    p, load = checked.found, load_of(checked.plan)
    whole = p.latency_s(load)
    scale = max(scale_s, whole)
    decode = whole - p.ttft_s
    parts = [("ttft", p.ttft_s, f"first token after {format_seconds(p.ttft_s)}"),
             ("decode", decode, f"{load.output - 1:,} tokens, one every"
              f" {format_seconds(p.tpot_s)}: {format_seconds(decode)}")]  # fmt: skip
    ticks = [scale * i / 4 for i in range(5)]
    axis = el("div", [el("span", format_seconds(t)) for t in ticks], class_="axis")
    lede = (
        f"A request waits {format_seconds(p.ttft_s)} for its first token, then"
        f" {format_seconds(p.tpot_s)} for each of {load.output - 1:,} more:"
        f" {format_seconds(whole)} in all, {p.ttft_s / whole:.1%} of it before the first."
    )
    behind = table("A request", ["part", "time", "share"],
                   [["to the first token", format_seconds(p.ttft_s), f"{p.ttft_s / whole:.2%}"],
                    ["the tokens after it", format_seconds(decode), f"{decode / whole:.2%}"],
                    ["whole", format_seconds(whole), "100%"]], total=True)  # fmt: skip
    return Section(
        key="timeline", title="A request", lede=lede,
        body=figure(
            f"A request of {format_seconds(whole)}.",
            [legend([("ttft", "waits and reads its prompt"), ("decode", "writes its tokens")]),
             bar(stacked(parts, scale), height=34), axis], behind,
        ),
    )  # fmt: skip


def breakdown(checked: CheckedServing, scale_s: float = 0) -> Section:
    """A decode step and the first token, each by part. scale_s: a decode step beside."""
    p = checked.found
    lede = sentences(
        f"With {p.running:.0f} running, a decode step takes {format_seconds(p.decode_s)}; the first"
        f" token takes {format_seconds(p.ttft_s)}.",
    )
    return Section(
        key="time", title="Where the time goes", lede=lede,
        body=join([
            el("h3", "A decode step"), _parts("A decode step", p.parts, p.decode_s, scale_s),
            el("h3", "The first token"), _parts("The first token", p.prefill_parts, p.ttft_s, 0),
        ]),
    )  # fmt: skip


def _parts(name: str, parts: Sequence[tuple[str, float]], total: float, scale_s: float) -> Html:
    scale = max(scale_s, total)
    ordered = sorted(((k, v) for k, v in parts if v > 0), key=lambda part: -part[1])
    rows = [
        row(title_of(k), bar([Mark(start=0, end=v / scale, kind=f"v-{k}",
                                   tip=f"{title_of(k)}: {format_seconds(v)}")]),
            f"{format_seconds(v)} {v / total:>6.1%}")
        for k, v in ordered if v >= SMALL * total
    ]  # fmt: skip
    behind = table(
        name, ["part", "time", "share"],
        [*([title_of(k), format_seconds(v), f"{v / total:.2%}"] for k, v in ordered),
         ["whole", format_seconds(total), "100%"]], total=True,
    )  # fmt: skip
    whole = stacked([(f"v-{k}", v, f"{title_of(k)}: {format_seconds(v)}") for k, v in ordered],
                    scale)
    return figure(f"{name} of {format_seconds(total)} by part.",
                  [el("div", bar(whole, height=34), class_="whole"),
                   el("div", rows, class_="rows")], behind)  # fmt: skip


# --- what lies where, and what it rests on -----------------------------------------------------


def placement(checked: CheckedServing) -> Section:
    """Every block class of the model: its bytes a GPU, its format and tier."""
    plan, s = checked.plan, checked.plan.serving
    model = served_model(plan.graph, plan.asked.engine)
    said = {record["block"]: record for record in block_records(s)}
    rows, lines = [], []
    blocks = [b for b in model.block_elements() if block_bytes(model, s, b) > 0]
    most = max(block_bytes(model, s, b) for b in blocks)
    for block in blocks:
        size, record = block_bytes(model, s, block), said.get(block, {})
        where = "GPU" if "tier" not in record else (
            f"{_way(record['place'], block)} {record['tier']}"
            f"; {record['resident']} on the GPU"
        )  # fmt: skip
        words = f"{s.format_of(block)}, {where}"
        kind = "place-s0" if "tier" not in record else "place-s1"
        mark = Mark(start=0, end=size / most, kind=kind, tip=f"{title_of(block)}: {words}")
        rows.append(row(title_of(block), bar([mark]), format_bytes(size)))
        lines.append([title_of(block), s.format_of(block), where, format_bytes(size)])
    below = [h.block for h in s.tiers]
    lede = sentences(
        f"Each layer is split over {s.tp} GPUs." if s.tp > 1 else "No layer is split.",
        f"Layers are divided over {s.pp} stages." if s.pp > 1 else None,
        f"There are {s.replicas} copies of the model." if s.replicas > 1 else None,
        f"Below the GPU: {', '.join(map(title_of, below))}." if below
        else "All of it lies on the GPU.",
    )
    return Section(
        key="placement", title="Where everything lies", lede=lede,
        body=figure(
            "Bytes of each block on the fullest rank, and where they lie.",
            [legend([("place-s0", "on the GPU"), ("place-s1", "on a tier below, in whole or part")]
                    if below else [("place-s0", "on the GPU")]),
             el("div", rows, class_="rows")],
            table("Blocks of the model", ["block", "format", "where", "bytes a rank"], lines,
                  words=3),
        ),
    )  # fmt: skip


def rests_on(checked: CheckedServing) -> Section:
    """The engine's constants, the kernels', the hardware's."""
    engine = load_serving_engine(checked.plan.asked.engine)
    table_ = load_constants(checked.cluster.device.constants)
    assumed = [f"{c.name}: {c.source}" for c in table_.items
               if "assumed" in c.source and not statistic(c.name)]
    if unpacked := unpacked_words(checked.plan):
        assumed.append(f"{engine.name}.handling: {unpacked}")
    return assumptions.made(
        checked.cluster, assumed, [(engine.title, [(engine.name, engine.source)])],
        f"Nine in ten of the published points of this engine's kind are within"
        f" {error_of(engine.name):.0%} of the predicted time between tokens.",
    )  # fmt: skip
