"""The page says what the ledger says, safely; the trace is the schedule that was simulated."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
from reports import PIPELINE, served, small, tree
from toy_plan import toy_graph, toy_plan

from cost_models.ledger import BREAKDOWN, MEMORY
from cost_models.schedule import global_stage
from cost_models.serving_ops import PARTS
from planner.differ import diff
from planner.report import memory, placement, serving, serving_asked, serving_page, timeline
from planner.report.markup import Html, el, escape, join
from planner.report.trace_events import trace_text
from planner.report.training import page as page_of
from planner.report.training import simulate
from planner.serving.show import estimate_json, memory_basis, summary
from planner.serving.tracing import recosted

HOSTILE = '</script><script>alert(1)</script>"\' onload=x <img src=x onerror=y>&amp;\x00\ud800'
MICRO_PS = 1_000_000
INTERLEAVED = replace(
    PIPELINE, schedule="1f1b", dp=2, pp=2, shard=2, microbatches=300, recompute=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def checked():
    return small()


@pytest.fixture(scope="module")
def page(checked):
    return page_of([checked], ask=False)


# --- the schedule ------------------------------------------------------------------------------


def test_the_simulated_step_is_the_estimate(checked):
    s, d = simulate(checked), checked.plan.decisions
    assert s.step_ps == checked.estimate.step_time_ps
    assert len(s.line.events) == 2 * d.pp * d.microbatches
    for e in s.line.events:
        stage = global_stage(d.schedule, d.pp, e.rank, e.chunk)
        parts = (s.forward_ps if e.op == "F" else s.backward_ps)[stage]
        assert e.end_ps - e.start_ps == sum(size for _, size in parts)


def test_operations_wait_for_what_they_need(checked):
    s = simulate(checked)
    ends = {(e.op, e.rank, e.microbatch): e.end_ps for e in s.line.events}
    free = [0, 0]
    for e in sorted(s.line.events, key=lambda e: e.start_ps):
        assert e.start_ps >= free[e.rank]
        free[e.rank] = e.end_ps
        if e.op == "F" and e.rank == 1:
            assert e.start_ps >= ends["F", 0, e.microbatch] + s.sends_ps[0]
        if e.op == "BW":
            before = ("BW", 1, e.microbatch) if e.rank == 0 else ("F", 1, e.microbatch)
            assert e.start_ps >= ends[before] + s.sends_ps[0] * (e.rank == 0)


def test_the_trace_has_the_event_schema(checked):
    s, d = simulate(checked), checked.plan.decisions
    found = json.loads(trace_text(s, d, "a plan"))
    events = found["traceEvents"]
    assert found["displayTimeUnit"] == "ms"
    slices = [e for e in events if e["ph"] == "X"]
    for e in slices:
        assert {"name", "cat", "ph", "pid", "tid", "ts", "dur"} <= e.keys() and e["dur"] > 0
    last = {}
    for e in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):  # what Perfetto asks of a thread
        thread = e["pid"], e["tid"]
        assert e["ts"] >= last.get(thread, 0) - 1e-6
        last[thread] = e["ts"] + e["dur"]
    assert max(last.values()) == pytest.approx(s.step_ps / MICRO_PS)
    ours = [e for e in slices if e["cat"] in ("forward", "backward")]
    assert len(ours) == len(s.line.events)
    busy = sum(e["dur"] for e in ours if e["pid"] == 1)
    assert busy == pytest.approx(s.line.busy_ps[1] / MICRO_PS)
    for e in ours:
        parts = sum(v for k, v in e["args"].items() if k.endswith("_us"))
        assert parts == pytest.approx(e["dur"])
    sends = {(e["ph"], e["id"]): e for e in events if e["ph"] in "sf"}
    assert len(sends) == 2 * 2 * d.microbatches  # each way, from and to
    for (phase, number), there in sends.items():
        here = sends["s", number]
        if phase == "f":
            assert here["pid"] != there["pid"]
            assert there["ts"] - here["ts"] >= s.sends_ps[0] / MICRO_PS


def test_sends_that_take_time_are_events_of_their_own(checked):
    s, d = simulate(checked), checked.plan.decisions
    assert '"ph": "b"' not in trace_text(s, d, "")  # this engine's sends are in its operations
    late = replace(s, sends_ps=(5 * MICRO_PS,))
    events = json.loads(trace_text(late, d, ""))["traceEvents"]
    sends = {(e["ph"], e["id"]): e["ts"] for e in events if e["ph"] in "be"}
    assert len(sends) == 2 * 2 * d.microbatches
    for (phase, number), ts in sends.items():
        assert phase == "e" or sends["e", number] - ts == pytest.approx(5)


def test_many_micro_batches_are_folded_and_counted(checked):
    found = small("h100x4", INTERLEAVED)
    s = simulate(found)
    first, last = timeline.windows(s, [0, 1])
    assert first.start_ps == 0 and last.end_ps == s.step_ps and first.end_ps < last.start_ps
    section = timeline.section(s, found.plan.decisions)
    root = tree(section.body)
    drawn = [svg.attributes["data-ops"].split(" ") for svg in root.all("svg", class_="ops")]
    assert len(drawn) == 4 and max(map(len, drawn)) <= timeline.MOST_OPS
    between = root.all("p", class_="between")[0].words()
    count = int(re.search(r"([\d,]+) operations", between)[1].replace(",", ""))
    inside = [e for e in s.line.events if first.end_ps <= e.start_ps < last.start_ps]
    assert count == len(inside) > 500
    assert len(section.body) < 200_000


def test_what_is_drawn_is_what_was_simulated(checked):
    s = simulate(checked)
    body = tree(timeline.section(s, checked.plan.decisions).body)
    for rank, svg in enumerate(body.all("svg", class_="ops")):
        unit, at, read = float(svg.attributes["data-unit"]), 0, []
        for text in svg.attributes["data-ops"].split(" "):
            op, batch, _, gap, length = text.split(",")
            start = at + int(gap)
            at = start + int(length)
            if int(batch) >= 0:
                read.append((op, int(batch), start * unit, at * unit))
        events = sorted((e for e in s.line.events if e.rank == rank), key=lambda e: e.start_ps)
        assert [(op, batch) for op, batch, _, _ in read] == [(e.op, e.microbatch) for e in events]
        grain = 3e-6 * s.step_ps / 1e12
        for (_, _, start, end), e in zip(read, events):
            assert start == pytest.approx(e.start_ps / 1e12, abs=grain)
            assert end == pytest.approx(e.end_ps / 1e12, abs=grain)


# --- sums --------------------------------------------------------------------------------------


def spans(element, kind):
    """(from, to) of every mark of a kind, in percent."""
    rects = [r for r in element.all("rect")
             if r.attributes["class"].startswith(kind) and "x" in r.attributes]  # not a legend's
    return [(float(r.attributes["x"][:-1]), float(r.attributes["x"][:-1])
             + float(r.attributes["width"][:-1])) for r in rects]  # fmt: skip


def test_the_waterfall_goes_from_nothing_to_the_peak(checked):
    e = checked.estimate
    body = tree(memory.section(e, "plan").body)
    shown = [w for w in body.all("div", class_="waterfall") if "hidden" not in w.attributes]
    assert len(shown) == 1 and len(body.all("div", class_="waterfall")) == len(e.ranks)
    steps = spans(shown[0], "k-m-")
    assert steps[0][0] == 0
    for (_, end), (start, _) in pairwise(steps):
        assert start == pytest.approx(end, abs=0.002)  # three digits are printed
    share = 100 * e.peak_memory_bytes / memory.scale_of(e)
    assert steps[-1][1] == pytest.approx(share, abs=0.01) == spans(shown[0], "k-total")[0][1]
    capacity = float(shown[0].all("line")[0].attributes["x1"][:-1])
    assert capacity == pytest.approx(100 * e.capacity_bytes / memory.scale_of(e), abs=0.01)


def test_the_parts_of_the_step_fill_it(page, checked):
    section = tree(page).all("section", id="time")[0]
    whole = spans(section.all("div", class_="whole")[0], "k-t-")
    assert whole[0][0] == 0 and whole[-1][1] == pytest.approx(100, abs=0.02)
    shares = [float(row.children[-1].words()[:-1]) for row in section.all("tbody")[0].all("tr")]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.1) and shares[-1] == 100


def test_every_parameter_of_every_unit_is_on_the_map_once():
    plan = toy_plan(toy_graph(40))
    cols = placement.columns(plan)
    assert cols[0].start == 0 and cols[-1].end == pytest.approx(1)
    rows = placement.parameter_rows(plan)
    cells = sum(len([w for w in words if w]) * len(names_of(name)) for name, words in rows)
    assert cells == len(plan.graph.parameters)
    words = {name: set(filter(None, words)) for name, words in rows}
    assert words["self_attn.{q,k,v}_proj.weight, mlp.up_proj.weight"] == {"S(0)"}
    body = tree(placement.section(plan).body)
    assert len(body.all("code")) == len(rows)  # 40 layers are one column's rows


def names_of(folded):
    from planner.names import expand_text

    return expand_text(folded)


# --- two plans, and plans of serving -----------------------------------------------------------


def test_two_plans_stand_side_by_side_on_one_scale(checked):
    other = replace(PIPELINE, microbatches=12, dp=2, shard=2, recompute=((0, 0), (0, 0)))
    both = checked, small("h100x4", other)
    root = tree(page_of(both, ask=False))
    for key in ("memory", "timeline", "time", "placement"):
        halves = root.all("section", id=key)[0].all("div", class_="pair")[0].children
        assert [h.all("h3")[0].words() for h in halves] == ["Old", "New"]
    wide = max(memory.scale_of(c.estimate) for c in both)
    halves = root.all("section", id="memory")[0].all("div", class_="pair")[0].children
    for half, c in zip(halves, both):
        peak = max(end for _, end in spans(half, "k-total"))
        assert peak == pytest.approx(100 * c.estimate.peak_memory_bytes / wide, abs=0.01)
    changed = root.all("section", id="changes")[0].words()
    assert diff(*both).verdict[1:] in changed and "recompute" in changed
    for one in root.all("section")[-2:]:  # what is asked of one plan alone says of which
        assert next(e.words() for e in one.all("h3")) == "New", one.attributes
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_a_plan_of_serving(plan, checked):
    found = served()
    p = found.found
    assert sum(size for _, size in serving.gpu_items(p)) == pytest.approx(dict(p.tiers)["gpu"])
    assert all(size >= 0 for _, size in serving.gpu_items(p))
    page = serving_page.page([found])
    root = tree(page)
    assert all(f.all("svg") and f.all("table") for f in root.all("figure"))
    whole = spans(root.all("section", id="time")[0].all("div", class_="whole")[0], "k-v-")
    assert whole[-1][1] == pytest.approx(100, abs=0.02)
    ends = spans(root.all("section", id="timeline")[0], "k-decode")
    assert ends[-1][1] == pytest.approx(100, abs=0.01)
    assert len(page) < 1_000_000 and page == serving_page.page([found])
    found.plan.save("plan.json")
    assert plan("report", "-o", "s.html", "--no-why")[0] == 0
    code, _, err = plan("report", "--trace", "t.json")
    assert code == 64 and "of plans of training" in err
    assert plan("report", "plan.json", "plan.json", "-o", "-", "--no-why")[0] == 0
    checked.plan.save("train.json")
    assert plan("report", "train.json", "plan.json")[0] == 64


def test_what_of_a_server_s_memory_is_not_measured_is_said_beside_it():
    """In text, page, JSON and notebook: how much was assumed, and that there is no error."""
    found = served()
    m = found.found.memory
    assert m.reserved_bytes == m.capacity_bytes - m.weights_bytes - m.room_bytes == 3.5e9
    words = "3.5 GB are workspace and context, a reserve: no run of the data prints a server's"
    assert words in " ".join(summary(found.plan, found.found).split())
    assert words in unescape(serving_page.page([found]))
    assert "error is not measured" in found.plan._repr_html_()
    told = estimate_json(found.found, found.plan.asked)
    assert told["memory_error"] is None and told["reserved_bytes"] == 3_500_000_000
    on_cpu = replace(found.found, memory=replace(m, context_bytes=0.0))
    assert "2.0 GB for the values of a pass are an estimate" in memory_basis(on_cpu)


def test_inputs_of_serving_are_predicted_anew():
    found = served()
    effects = {e.name: e for e in serving_asked.effects(found, ())}
    plan, cluster = found.plan, found.cluster
    rate = cluster.device.memory_bandwidth_bytes_per_s
    for factor, ttft, tpot in effects["memory bandwidth"].changes:
        device = replace(cluster.device, memory_bandwidth_bytes_per_s=factor * rate)
        made = recosted(plan, replace(cluster, device=device))
        assert made.ttft_s / found.found.ttft_s - 1 == ttft
        assert made.tpot_s / found.found.tpot_s - 1 == tpot
    assert effects["requests at once"].changes[0][0] == 0.5


# --- safety and form ---------------------------------------------------------------------------


def test_whatever_is_not_markup_is_escaped():
    assert escape("<&\"'>\x00") == "&lt;&amp;&quot;&#x27;&gt;\ufffd"
    assert el("p", HOSTILE, [Html("<b>x</b>"), None, 3], title=HOSTILE, hidden=True).count("<") == 4
    assert join(["<", el("br")], "&") == "&lt;&amp;<br/>"


def test_hostile_names_stay_words():
    page = page_of([small(name=HOSTILE, notes=(HOSTILE,))], ask=False)
    page.encode("utf-8")
    root = tree(page)
    assert len(root.all("script")) == 1 and not root.all("img")
    assert not [a for e in root.all() for a in e.attributes if a.startswith("on")]
    seen = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert root.all("h1")[0].words() == seen


def test_the_page_loads_nothing_and_runs_its_own_script_alone(page):
    root = tree(page)
    policy = root.all("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    assert policy.startswith("default-src 'none'") and policy.count("sha256-") == 2
    assert "unsafe" not in policy and not root.all(style="") and not root.all("link")
    assert all(a.attributes["href"].startswith("#") for a in root.all("a"))
    assert not [e for e in root.all() if "style" in e.attributes or "src" in e.attributes]
    assert "http" not in page.replace("http-equiv", "")


def test_a_table_is_behind_every_chart(page):
    root = tree(page)
    figures = root.all("figure")
    assert len(figures) >= 4
    for figure in figures:
        assert figure.all("svg") and figure.all("details")[0].all("table")
        assert figure.all("div", class_="chart")[0].attributes["aria-label"]
    inside = sum(len(f.all("svg")) for f in figures)
    assert inside == len(root.all("svg"))
    assert all(t.all("caption") and t.all("th", scope="col") for t in root.all("table"))
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    named = {e.attributes[k] for e in root.all() for k in ("aria-controls", "aria-labelledby")
             if k in e.attributes}  # fmt: skip
    assert named <= set(ids)


def test_the_page_is_small(page):
    assert len(page.encode()) < 1_000_000


def test_every_mark_has_a_colour(page):
    """Of every kind that the ledgers name, whether or not a plan here has it."""
    css = (Path(memory.__file__).parent / "report.css").read_text()
    coloured = set(re.findall(r"\.k-([\w-]+)", css))
    parts = {f"t-{name}" for name in BREAKDOWN} | {f"m-{name}" for name in MEMORY}
    parts |= {f"v-{name}" for name in (*PARTS, "cpu", "stream")} | {"m-cache"}
    parts |= {f"op-{kind}" for kind in timeline.KINDS}
    assert parts <= coloured
    marks = [e for e in tree(page).all() if e.tag in ("rect", "path")]
    drawn = {c for e in marks for c in e.attributes["class"].split() if c.startswith("k-")}
    assert {c.removeprefix("k-") for c in drawn} <= coloured


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(c * w for c, w in zip(linear, (0.2126, 0.7152, 0.0722)))


def test_words_stand_out_in_both_themes():
    css = (Path(memory.__file__).parent / "report.css").read_text()
    light, system, dark = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in
                           re.findall(r"\{\s*--paper[^}]*\}", css)[:3])  # fmt: skip
    assert system == dark and dark.keys() == light.keys()
    for theme in (light, dark):
        for word in ("ink", "soft", "accent", "good", "bad"):
            for ground in ("paper", "card"):
                a, b = sorted((luminance(theme[word]), luminance(theme[ground])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (word, ground)
        on = [("ink", "notice"), ("card", "blue"), ("paper", "ink"), ("ink", "idle")]
        for word, ground in on:  # words on marks, in notices and in the tip
            a, b = sorted((luminance(theme[word]), luminance(theme[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (word, ground)


# --- the command -------------------------------------------------------------------------------


def test_the_same_plan_gives_the_same_bytes_without_torch(checked, plan, tmp_path):
    checked.plan.save("plan.json")
    code, out, err = plan("report", "plan.json", "--trace", "step.json", "--no-why")
    assert (code, out) == (0, "") and "wrote report.html" in err and "wrote step.json" in err
    script = (
        "import sys; from planner import cli, console\n"
        "words = ['report', '-o', 'again.html', '--trace', 'again.json', '--no-why']\n"
        "assert console.run(cli.app(), words) == 0\n"
        "assert not {'torch', 'ortools'} & set(sys.modules), 'heavy'"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True)
    for one, other in (("report.html", "again.html"), ("step.json", "again.json")):
        assert (tmp_path / one).read_bytes() == (tmp_path / other).read_bytes()
    _, out, _ = plan("report", "plan.json", "-o", "-", "--no-why")
    assert out == (tmp_path / "report.html").read_text()


def test_a_place_that_cannot_be_written_is_said_first(plan):
    code, _, err = plan("report", "-o", "nowhere/report.html")
    assert code == 64 and "no folder nowhere" in err
    assert plan("report", "-o", ".")[0] == 64
    code, _, err = plan("report", "-o", "")
    assert code == 64 and '-o "" is no file\'s name' in err
    code, _, err = plan("report", "-o", "x.html/")
    assert code == 64 and "x.html/ names a folder, and there is none" in err
