"""`plan size --task serve`: its front against brute force, its numbers and words."""

import json
from dataclasses import replace

import pytest
from test_serving_search import model
from tiny_models import EXAMPLES

from cost_models.hardware import describe, load_hardware
from cost_models.prices import Price
from ir.errors import InfeasibleError, UsageError
from planner.serving.asked import ServeAsked, ServePins
from planner.serving.search import predictions, search
from planner.serving.sizing import ServeSizer, least_tpot_s

PRICES = {
    "h100": Price(device="h100", usd_per_gpu_hour=2.5),
    "a100": Price(device="a100", usd_per_gpu_hour=1.2),
    "rtx-4090": Price(device="rtx-4090", usd_per_gpu_hour=0.4),
}
ASKED = ServeAsked(prompt=512, output=128, batch=4, max_ttft_s=2.0, max_tpot_s=0.03)
SERVED = model(layers=16, hidden=4096, inter=14336)


def some(*names):
    return tuple(describe(name) for name in names)


def sizer(asked=ASKED, served=SERVED, **more):
    return ServeSizer(model=served, asked=asked, **{"most_gpus": 8, **more})


def points(found):
    return {(row.cluster.spec, row.found.tpot_s) for row, on in zip(found.rows, found.on_front)
            if on}  # fmt: skip


@pytest.mark.parametrize("prices", [{}, PRICES])
@pytest.mark.parametrize("most", [0.03, 0.008])
def test_what_is_left_out_would_not_be_on_the_front(prices, most):
    devices, asked = some("h100", "a100", "rtx-4090"), replace(ASKED, max_tpot_s=most)
    quick, whole = (sizer(asked, prices=prices, every=every).run(devices)
                    for every in (False, True))  # fmt: skip
    assert points(quick) == points(whole) and quick.searched <= whole.searched
    if most == 0.03:
        assert quick.searched < whole.searched


def test_every_row_is_what_a_search_of_its_own_finds():
    """All counts of all devices planned one by one: the same rows, and the same left out."""
    found = sizer(every=True, prices=PRICES).run(some("a100", "rtx-4090"))
    rows, reasons = {r.cluster.spec: r for r in found.rows}, {x.hardware for x in found.left}
    assert rows
    for name in ("a100", "rtx-4090"):
        for count in (1, 2, 4, 8):
            spec = f"{name}x{count}"
            try:
                alone = search(SERVED, load_hardware(spec), ASKED, ServePins()).best
            except InfeasibleError:
                assert spec not in rows and spec in reasons
                continue
            if spec not in rows:  # its device has a count well within the limits already
                assert any(r.limits_used <= 0.5 and r.cluster.count < count
                           for r in found.rows if r.cluster.name == name)  # fmt: skip
                continue
            row = rows[spec]
            assert row.found == alone and row.limits_used <= 1
            assert row.usd_per_hour == PRICES[name].usd_per_gpu_hour * count
            hourly = alone.tokens_per_s * 3600
            assert row.usd_per_million_tokens == pytest.approx(row.usd_per_hour / hourly * 1e6)
            assert row.watts == count * row.cluster.device.power_w


@pytest.mark.parametrize("served", [SERVED, model(layers=8, hidden=4096, experts=8, inter=14336),
                                    model(layers=64)])  # fmt: skip
def test_no_plan_is_faster_than_the_bound_that_rules_it_out(served):
    for spec in ("h100x1", "a6000x2", "rtx-4090x4"):
        for allow in ((), ("int4",)):
            asked, cluster = replace(ASKED, batch=1, allow=allow), load_hardware(spec)
            least = least_tpot_s(served, cluster, asked, ServePins())
            fits = [p for p in predictions(served, cluster, asked, ServePins())[0] if p.fits]
            assert fits and least <= min(p.tpot_s for p in fits)


def test_all_requests_that_were_asked_for_run_at_once():
    """Without limits the queue is no escape: what has room for fewer is left out."""
    asked = ServeAsked(prompt=4096, output=1024, batch=64)
    found = sizer(asked, every=True, pins=ServePins(offload=())).run(some("rtx-4090", "h100"))
    assert all(row.found.running >= 64 for row in found.rows)
    assert {x.hardware: x.reason for x in found.left}["rtx-4090x1"] == "room"


def test_nothing_says_what_came_near_and_that_can_be_met():
    with pytest.raises(InfeasibleError, match="none of 1 devices serves 4") as fault:
        sizer(replace(ASKED, max_tpot_s=0.004, max_ttft_s=0.03)).run(some("a100"))
    assert "nearest: a100x" in fault.value.why
    words = fault.value.hints[0].split()
    ttft, tpot = (float(words[i].removesuffix("ms")) / 1e3 for i in (1, 3))
    assert sizer(replace(ASKED, max_tpot_s=tpot, max_ttft_s=ttft)).run(some("a100")).rows
    with pytest.raises(InfeasibleError) as fault:
        sizer(replace(ASKED, max_tpot_s=1e-6)).run(some("a100"))
    assert "reading the weights alone" in fault.value.why
    with pytest.raises(InfeasibleError) as fault:
        sizer(pins=ServePins(tp=3)).run(some("a100"))
    assert "divide any of the counts" in fault.value.why
    with pytest.raises(UsageError, match="how many requests"):
        sizer(replace(ASKED, batch=0)).run(some("a100"))


QUESTION = ("size", EXAMPLES / "llama.py", "--arg", "size=tiny", "--task", "serve", "--prompt", 128,
            "--output", 64, "--batch", 2, "--hardware", "h100,a100,t4")  # fmt: skip


def test_the_command_prints_a_front_that_trace_plans_alike(plan, tmp_path):
    (tmp_path / "prices.toml").write_text("[a100]\nusd_per_gpu_hour = 1.2\n")
    code, out, err = plan(*QUESTION, "--prices", "prices.toml", "--all", "--max-tpot", "20ms")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    for words in ("$/h", "USD an hour", "1 without bf16: t4", "a100x1"):
        assert words in " ".join(out.split())
    again = err.rsplit("to plan it: plan ", 1)[1].split()
    code, out, err = plan(*again, "--json")
    assert code == 0, err
    traced = json.loads(out)["estimate"]
    code, out, err = plan(*QUESTION, "--prices", "prices.toml", "--max-tpot", "20ms", "--json")
    raw = json.loads(out)
    assert raw["schema"] == "size/1" and raw["axes"] == ["cost", "gpus", "time"]
    assert raw["candidates"][0]["estimate"] == traced
    assert raw["candidates"][0]["usd_per_hour"] == 1.2
    code, out, err = plan(*QUESTION)
    assert code == 0 and "by the power of the boards" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--target", "tokens_per_s=1"), 64, "--target is of training"),
        (("--seq-len", 128), 64, "--seq-len is of training"),
        (("--objective", "cost"), 64, "needs prices"),
        (("--objective", "memory"), 64, "--objective memory"),
        (("--hardware", "t4"), 64, "computes in bf16"),
        (("--batch", 0), 64, "--batch 0"),
        (("--fix", "zero=3"), 64, "no pin of serving"),
        (("--max-tpot", "1us"), 64, "is no time"),
        (("--max-tpot", "0.001ms"), 3, "within the limits"),
        (("--task", "love"), 64, "--task love"),
        (("--task", "train", "--batch", 2), 64, "--prompt is of serving"),
    ],
)
def test_what_cannot_be_meant_or_met_says_why(plan, words, code, said):
    found, out, err = plan(*QUESTION, *words)
    assert (found, out) == (code, ""), err
    assert said in err


def test_a_size_to_serve_needs_its_load(plan):
    code, out, err = plan("size", EXAMPLES / "llama.py", "--task", "serve")
    assert (code, out) == (64, "") and "how many requests" in err
