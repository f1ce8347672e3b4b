"""What each change between two plans of serving does: rows in one order that sum to the whole."""

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import graph_of, with_memory

from cost_models.hardware import load_hardware
from cost_models.serving_decisions import Held, Pool, Serving
from ir.text import format_graph, graph_hash
from planner.differ import gate
from planner.differ_text import diff_json, diff_markdown, diff_text
from planner.plan import constants_hash
from planner.report import changes
from planner.serving.asked import ServeAsked
from planner.serving.attribution import GROUPS
from planner.serving.check import CheckedServing, examine_serving
from planner.serving.differ import diff_serving
from planner.serving.effects import TITLE
from planner.serving.plan import ServingPlan
from planner.serving.tracing import recosted

FIGURES = ("ttft_ps", "tpot_ps", "microtokens_per_s", "peak_memory_bytes")
MLP_BELOW = (Held(block="mlp", tier="cpu", place="stream"),)
GIVEN = {"model": "llama", "hardware": "h100x8", "engine": "vllm", "prompt": 2048, "output": 256}
LONE = {  # a key of the rows: what differs
    "model": {"model": "moe"}, "hardware": {"hardware": "a100x8"}, "engine": {"engine": "sglang"},
    "prompt": {"prompt": 4096}, "output": {"output": 64}, "tp": {"tp": 4}, "batch": {"batch": 64},
    "prefill_chunk": {"prefill_chunk": 512}, "format of all": {"default": "fp16"},
    "format of mlp": {"weights": (("mlp", "int8"),)}, "kv": {"kv": "fp8"},
    "kv_window": {"kv_window": 512}, "tier of mlp": {"tiers": MLP_BELOW},
    "kv_tier": {"kv_tier": "cpu"},
}  # fmt: skip


def checked(**said):
    """A plan of the tiny models with what is said, predicted."""
    given = GIVEN | {key: said.pop(key) for key in GIVEN if key in said}
    graph, cluster = graph_of(given["model"]), load_hardware(given["hardware"])
    plan = ServingPlan(
        graph=graph, graph_hash=graph_hash(format_graph(graph)), hardware=given["hardware"],
        hardware_hash=cluster.digest, constants_hash=constants_hash(cluster),
        asked=ServeAsked(**{key: given[key] for key in ("prompt", "output", "engine")}),
        serving=Serving(**{"tp": 2, "batch": 16, **said}),
    )  # fmt: skip
    return examine_serving(plan, Path())


def on(c, cluster, serving=None):
    """The same plan on other hardware, with other decisions."""
    plan = replace(c.plan, serving=serving or c.plan.serving)
    return CheckedServing(plan=plan, cluster=cluster, found=recosted(plan, cluster), moved=())


def figures(p):
    return (round(p.ttft_s * 1e12), round(p.tpot_s * 1e12), round(p.tokens_per_s * 1e6),
            round(dict(p.tiers)["gpu"]))  # fmt: skip


def rows_of(old, new):
    return diff_serving(old, new).serving_effects


def sums(rows):
    return tuple(sum(getattr(row, name) for row in rows) for name in FIGURES)


def less(new, old):
    return tuple(b - a for a, b in zip(figures(old.found), figures(new.found)))


@pytest.mark.parametrize("key", LONE)
def test_a_lone_change_does_all(key):
    old, new = checked(), checked(**LONE[key])
    for a, b in ((old, new), (new, old)):
        (row,) = rows_of(a, b)
        assert row.keys == (key,) and sums([row]) == less(b, a)
    assert not rows_of(new, new)


def test_the_batch_that_is_asked_for_is_named():
    """Other requests at once are other work; where the search chose them they are a decision."""
    few, many = (checked(batch=batch) for batch in (16, 64))
    for one, words in ((0, False), (1, True)):
        pair = [replace(c, plan=replace(c.plan, asked=replace(
            c.plan.asked, batch=one * c.plan.serving.batch))) for c in (few, many)]  # fmt: skip
        found = diff_serving(*pair)
        assert ("requests at once 16 -> 64" in found.verdict) == words


def test_a_lone_input_has_a_row():
    found = diff_serving(checked(), checked(engine="sglang"))
    assert [row.keys for row in found.serving_effects] == [("engine",)]
    assert TITLE[1:] in diff_text(found) and TITLE in diff_markdown(found)


def test_rows_in_one_order_sum_to_the_whole():
    """Of changes drawn together; every one of these can be served by itself."""
    draw, order = random.Random(7), [key for group in GROUPS for key in group]
    kinds = [key for key in LONE if key != "model"]  # whose blocks are others
    for _ in range(8):
        picked = draw.sample(kinds, 5)
        said = {key: value for name in picked for key, value in LONE[name].items()}
        old, new = checked(), checked(**said)
        rows = rows_of(old, new)
        wanted = sorted(picked, key=lambda k: order.index("default" if k == "format of all" else k))
        assert [row.keys for row in rows] == [(key,) for key in wanted]
        assert sums(rows) == less(new, old)


def test_each_row_is_what_the_change_adds_to_those_before_it():
    old = checked(weights=(("mlp", "int8"), ("head", "int8")))
    new = checked(batch=64, kv="fp8", weights=(("head", "fp8"), ("attention", "int8")))
    states = [
        {"batch": 64}, {"weights": (("mlp", "int8"), ("head", "int8"), ("attention", "int8"))},
        {"weights": (("head", "int8"), ("attention", "int8"))},
        {"weights": (("head", "fp8"), ("attention", "int8"))}, {"kv": "fp8"},
    ]  # fmt: skip
    serving, seen = old.plan.serving, [figures(old.found)]
    for state in states:
        serving = replace(serving, **state)
        seen.append(figures(recosted(old.plan, old.cluster, serving)))
    found = [tuple(getattr(row, name) for name in FIGURES) for row in rows_of(old, new)]
    assert found == [tuple(b - a for a, b in zip(*pair)) for pair in itertools.pairwise(seen)]
    assert [row.what for row in rows_of(old, new)] == [
        "batch", "format of attention", "format of mlp", "format of head", "kv"
    ]  # fmt: skip


def test_what_cannot_be_served_yet_waits():
    """Eight GPUs go after the replicas on them, an engine with pools after the pools, a model with
    an MLP after the format of that."""
    old, new = checked(tp=4, replicas=2), checked(hardware="h100x4", tp=4, prompt=64)
    assert [row.keys for row in rows_of(old, new)] == [("prompt",), ("replicas",), ("hardware",)]
    pools = checked(prefill=Pool(tp=2, replicas=2))
    assert [row.keys for row in rows_of(pools, checked(engine="native"))] == [
        ("prefill",), ("engine",)
    ]  # fmt: skip
    narrow = checked(weights=(("mlp", "int8"),))
    rows = rows_of(narrow, moe := checked(model="moe", weights=(("routed_experts", "int8"),)))
    assert [row.keys for row in rows] == [
        ("format of mlp",), ("model",), ("format of routed_experts",)
    ]  # fmt: skip
    assert sums(rows) == less(moe, narrow)


def test_what_can_be_served_only_at_once_is_one_row():
    """A tier that only the old hardware has, and one that only the new has."""
    old, load = checked(tiers=MLP_BELOW), checked(tiers=MLP_BELOW, batch=64)
    tiers = tuple(replace(tier, name="far") for tier in old.cluster.tiers[:1])
    held = replace(load.plan.serving, tiers=(replace(MLP_BELOW[0], tier="far"),))
    new = on(load, replace(old.cluster, tiers=tiers), held)
    rows = rows_of(old, new)
    assert [row.what for row in rows] == ["batch", "hardware together with tier of mlp"]
    assert sums(rows) == less(new, old)


def test_what_does_not_fit_on_the_way_is_costed_and_said():
    """Beside an engine's 3.5 GB a small GPU has room for short requests, or for short windows."""
    small = with_memory(load_hardware("h100x8"), 3_900_000_000)
    old, new = on(checked(), small), on(checked(prompt=200_000, kv_window=128), small)
    assert old.found.fits and new.found.fits
    rows = rows_of(old, new)
    assert [(row.keys, row.fits) for row in rows] == [(("prompt",), False), (("kv_window",), True)]
    assert rows[0].note == "does not fit so far" and sums(rows) == less(new, old)


def test_forms():
    old, new = checked(), checked(batch=64, prompt=4096, kv="fp8", weights=(("mlp", "int8"),),
                                  kv_tier="cpu", prefill_chunk=512)  # fmt: skip
    found = diff_serving(old, new)
    text = diff_text(found).splitlines()
    at = text.index("what each change does, made one after another in this order")
    table = text[at : text.index("", at)]
    assert max(map(len, table)) <= 80 and "  prompt" in table[2]
    assert table[1].split("  ")[-1] == "peak memory"
    error = found.numbers[0].error  # of the serving engine
    before = figures(old.found)
    first = found.serving_effects[0]
    moved = [abs(getattr(first, name)) / was for name, was in zip(FIGURES, before)]
    assert first.within_error == (max(moved) <= error)
    assert any("within model error" in row.note for row in found.serving_effects)
    said = diff_json(found)
    keys = ["changes", "ttft_s", "tpot_s", "tokens_per_s", "peak_memory_bytes", "fits",
            "within_error"]  # fmt: skip
    assert [list(row) for row in said["serving_effects"]] == [keys] * 6
    for number in said["numbers"]:
        whole = sum(row[number["name"]] for row in said["serving_effects"])
        assert whole == pytest.approx(number["new"] - number["old"], abs=1)
    assert "serving_effects" not in json.dumps(diff_json(diff_serving(old, old)))
    page = diff_markdown(found)
    assert "| what | first token | then a token | tokens/s | peak memory |" in page
    assert page.count("\n| `kv_tier`") == 2  # decided, and what it does
    gate(found, "ttft=+100000%")
    for form in (str(changes.section(found).body), found._repr_html_()):
        for row in found.serving_effects:
            assert "".join(f"<td>{cell}</td>" for cell in row.cells) in re.sub("<(td|th)[^>]*>",
                                                                               r"<\1>", form)
