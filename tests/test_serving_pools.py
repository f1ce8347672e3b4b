"""Pools of prefill and decode: their closed loop simulated, the cache's way, the search by
enumeration, and what a plan with them says."""

import contextlib
import functools
import heapq
import itertools
import json
from dataclasses import replace

import pytest
import torch
from jsonschema import Draft202012Validator as Validator
from serving_cases import found, model
from tiny_models import graph_of

import planner
from cost_models.collectives import collective_s
from cost_models.hardware import load_hardware
from cost_models.serving_decisions import Held, Pool, ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_pools import Decodes, Moves, Reads, moves, pooled
from ir.errors import InfeasibleError, PlanError, UsageError
from planner.schemas import plan_schema
from planner.serving.asked import ServeAsked, parse_serve_pins
from planner.serving.predict import predict
from planner.serving.show import document, summary
from planner.serving.text import to_text
from planner.serving.tracing import plan_serving

SMALL = model(layers=8, hidden=2048, inter=8192)
MIXTURE = model(layers=4, hidden=2048, inter=1024, experts=4)
LOAD = ServeLoad(prompt=4096, output=128)


# --- the closed loop --------------------------------------------------------------------------


def simulated(batch, output, readers, read_s, moving_s, decoders, step_s, until_s=40.0):
    """(tokens a second, seconds from a request to its first decode step), request by request, of
    the second half of the time."""
    arrivals = [(0.0, i) for i in range(batch)]  # (when a request comes in, which)
    free = [0.0] * readers
    there = [[] for _ in range(decoders)]  # (when its cache is there, which), by replica
    running = [{} for _ in range(decoders)]  # tokens left of each
    clock = [(0.0, r) for r in range(decoders)]
    asked, waits, tokens, now = {}, [], 0, 0.0
    while now < until_s:
        now, at = heapq.heappop(clock)
        while arrivals and arrivals[0][0] <= now:
            came, who = heapq.heappop(arrivals)
            reader = min(range(readers), key=lambda k: free[k])
            free[reader] = max(free[reader], came) + read_s
            asked[who] = came
            to = min(range(decoders), key=lambda k: len(there[k]) + len(running[k]))
            there[to].append((free[reader] + moving_s, who))
        for when, who in [row for row in there[at] if row[0] <= now]:
            there[at].remove((when, who))
            running[at][who] = output
            waits += [now - asked[who]] if now > until_s / 2 else []
        end = now + (step_s(len(running[at])) if running[at] else 1e-3)
        tokens += len(running[at]) if now > until_s / 2 else 0
        for who in list(running[at]):
            running[at][who] -= 1
            if not running[at][who]:
                del running[at][who]
                heapq.heappush(arrivals, (end, who))
        heapq.heappush(clock, (end, at))
    return tokens / (until_s / 2), sum(waits) / len(waits)


@pytest.mark.parametrize(
    "readers, decoders, read_s",
    [(2, 2, 0.01), (1, 1, 0.02), (1, 2, 0.08), (3, 1, 0.05)],
    ids=["idle readers", "one of each", "readers bind", "three readers"],
)
def test_the_closed_loop_is_what_a_simulation_sees(readers, decoders, read_s):
    at = tuple(float(n) for n in range(1, 33))
    decode = Decodes(sequences=at, steps_s=tuple(0.008 + 0.0004 * n for n in at), parts=(),
                     room=1e9)  # fmt: skip
    engine = replace(load_serving_engine("vllm"), wait_prompts=0.0, request_host_s=0.0)
    s = Serving(batch=32, replicas=decoders, prefill=Pool(replicas=readers))
    seen = pooled(
        engine, s, ServeLoad(prompt=1, output=64), decode=decode,
        read=Reads(alone_s=read_s, prompts_per_s=1 / read_s, held_bytes=0),
        moved=Moves(exposed_s=0.003, sending_s=0.001, receiving_s=0.001, bytes=0),
    )  # fmt: skip
    rate, first_s = simulated(32, 64, readers, read_s, 0.003, decoders, decode.step_s)
    assert seen.tokens_per_s == pytest.approx(rate, rel=0.03)
    residence_s = seen.ttft_s + 64 * seen.tpot_s
    assert seen.tokens_per_s * residence_s == pytest.approx(32 * 64)  # Little's law
    assert seen.binds == ("prompts" if (readers, decoders) == (1, 2) else "")
    # half of a running step is waited for on average; in a loop without chance it is one phase
    assert seen.ttft_s == pytest.approx(first_s, rel=0.1, abs=seen.tpot_s / 2)


# --- the cache's way --------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", ["h100x8", "h100x16"])
def test_a_cache_takes_its_bytes_over_the_link_between_the_pools(hardware):
    cluster, each = load_hardware(hardware), 2 * 8 * 128 * 2 * 8 * 4096  # k, v; heads; dims; bytes
    s = Serving(tp=4, replicas=cluster.count // 8, prefill=Pool(tp=2, replicas=cluster.count // 4))
    found = moves(SMALL, cluster, load_serving_engine("vllm"), s, 4096.0, 1.0)
    assert found.bytes == each
    link = cluster.intra if hardware == "h100x8" else cluster.inter
    # two that read send halves, four that decode receive quarters
    start_s = float(collective_s(cluster, "p2p", 1.0, 2, cluster.count // 2))
    wire_s = each / 2 / (link.bytes_per_s * link.efficiency)
    assert found.exposed_s == pytest.approx(wire_s + start_s, rel=1e-3)
    assert found.receiving_s == pytest.approx(wire_s / 2 + start_s, rel=1e-3)


@pytest.mark.parametrize("engine, pieces", [("vllm", 1), ("sglang", 3), ("trtllm", 3 * 8)])
@pytest.mark.parametrize("read_s", [1e-4, 1e-2, 1.0])
def test_pieces_that_leave_as_they_are_read_hide_behind_what_is_read_still(engine, pieces, read_s):
    cluster, chunk = load_hardware("h100x16"), 8192
    s = Serving(replicas=8, prefill=Pool(replicas=8))
    found = moves(SMALL, cluster, load_serving_engine(engine), s, 3.0 * chunk, read_s)
    piece_s = float(collective_s(cluster, "p2p", 2 * 8 * 128 * 2 * 8 * 3 * chunk / pieces, 2, 8))
    sent_s = 0.0
    for k in range(pieces):  # a piece leaves when it is read and the one before it has left
        sent_s = max(sent_s, (k + 1) * read_s / pieces) + piece_s
    assert found.exposed_s == pytest.approx(sent_s - read_s)


# --- the search -------------------------------------------------------------------------------


def every_plan(served, cluster, engine, batch, load):
    """Every plan with pools, by loops of its own."""
    experts = [e.experts for layer in served.layers for e in layer.experts]
    count, degrees = cluster.count, [1, 2, 4]

    def pools(gpus):
        for tp, pp, adp, ep in itertools.product(degrees, repeat=4):
            each = tp * pp * adp
            if gpus % each or tp * adp % ep or pp > served.layer_count:
                continue
            if (experts and experts[0] % ep) or (not experts and max(adp, ep) > 1):
                continue
            yield Pool(tp=tp, pp=pp, ep=ep, etp=tp * adp // ep, attention_dp=adp,
                       replicas=gpus // each)  # fmt: skip

    for first in range(1, count):
        for p, d in itertools.product(pools(first), pools(count - first)):
            s = Serving(tp=d.tp, pp=d.pp, ep=d.ep, etp=d.etp, attention_dp=d.attention_dp,
                        replicas=d.replicas, batch=batch, prefill=p)  # fmt: skip
            yield predict(served, cluster, engine, s, load)


@functools.cache
def enumerated(kind, engine, hardware, batch):
    return tuple(every_plan(MIXTURE if kind == "mixture" else SMALL, load_hardware(hardware),
                            load_serving_engine(engine), batch, LOAD))  # fmt: skip


@pytest.mark.parametrize("limit", [None, "ttft", "tpot"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize(
    "kind, engine, hardware, batch",
    [("dense", "trtllm", "h100x4", 16), ("mixture", "sglang", "a100x3", 6)],
)
def test_the_search_finds_the_best_of_all_pools(kind, engine, hardware, batch, objective, limit):
    rows = [p for p in enumerated(kind, engine, hardware, batch) if p.fits]
    asked = {"objective": objective, "batch": batch, "prompt": 4096, "output": 128}
    if limit:  # the middle of what there is
        middle = sorted(getattr(p, f"{limit}_s") for p in rows)[len(rows) // 2]
        rows = [p for p in rows if getattr(p, f"{limit}_s") <= middle]
        asked[f"max_{limit}_s"] = middle
    served = MIXTURE if kind == "mixture" else SMALL
    best = found(served, hardware, ("pools=any",), engine=engine, **asked).best
    scores = [p.latency_s(LOAD) if objective == "latency" else -p.tokens_per_s for p in rows]
    mine = best.latency_s(LOAD) if objective == "latency" else -best.tokens_per_s
    assert best.serving.prefill is not None and mine == pytest.approx(min(scores), rel=1e-12)
    free, alone = found(served, hardware, engine=engine, **asked).best, float("inf")
    with contextlib.suppress(InfeasibleError):
        none = found(served, hardware, ("pools=none",), engine=engine, **asked).best
        assert none.serving.prefill is None
        alone = none.latency_s(LOAD) if objective == "latency" else -none.tokens_per_s
    assert (free.serving.prefill is not None) == (mine < alone)  # chosen where they win


def test_pins_of_pools_are_kept_and_wrong_ones_refused():
    best = found(SMALL, "h100x8", ("pools=2+6", "tp=2"), engine="vllm", batch=8).best.serving
    assert best.prefill.devices == 2 and best.devices == 8 and best.prefill.tp == best.tp == 2
    for text in ("pools=2", "pools=0+8", "pools=yes", "pools=2+6+1"):
        with pytest.raises(UsageError, match="no value of that pin"):
            parse_serve_pins((text,))
    with pytest.raises(UsageError, match="native has no pools") as fault:
        found(SMALL, "h100x8", ("pools=any",))
    assert "vllm" in fault.value.why
    with pytest.raises(UsageError, match="h100x8 has 8 GPUs"):
        found(SMALL, "h100x8", ("pools=6+6",), engine="vllm")
    with pytest.raises(UsageError, match="below the GPU"):
        found(SMALL, "h100x8", ("pools=any", "offload=mlp:cpu"), engine="vllm")
    with pytest.raises(UsageError, match="below the GPU"):
        Serving(prefill=Pool(), tiers=(Held(block="mlp", tier="cpu", place="stream"),))


def test_a_pool_that_lacks_room_is_no_plan():
    """A sequence's cache has room where prompts are read as where they are decoded."""
    wide = model(layers=60, hidden=8192, inter=28672)  # 87 GB in bf16, on 80 GB
    for pool, decode in (((1, 1), (2, 2)), ((2, 2), (1, 1))):
        s = Serving(tp=decode[0], replicas=decode[1], prefill=Pool(tp=pool[0], replicas=pool[1]))
        seen = predict(wide, load_hardware("h100x8"), load_serving_engine("vllm"), s, LOAD)
        assert not seen.fits and "a GPU holds" in seen.missing


# --- what a plan says -------------------------------------------------------------------------


def test_a_plan_with_pools_is_saved_read_and_told(tiny_llama_pools):
    plan, path = tiny_llama_pools
    assert to_text(planner.load(path)) == to_text(plan)
    raw = json.loads(to_text(plan))
    assert not [*Validator(plan_schema()).iter_errors(raw)]
    pool = raw["decisions"]["prefill"]
    assert pool["tp"] * pool["pp"] * pool["replicas"] == 2
    from planner.serving.check import examine_serving, require_fit

    checked = examine_serving(plan, path.parent)
    require_fit(checked)
    assert not checked.moved
    text = summary(plan, checked.found)
    assert "  prefill   tp" in text and "= 2 GPUs" in text and "moving the cache" in text
    told = document(plan, checked.found)["estimate"]["pools"]
    parts = told["waiting_s"] + told["reading_s"] + told["moving_s"]
    engine = load_serving_engine("vllm")
    assert parts + engine.request_host_s == pytest.approx(checked.found.ttft_s)
    with pytest.raises(PlanError, match="vllm, vllm-2025"):
        planner.serve(torch.nn.Identity(), plan, device="cpu")
    elsewhere = replace(plan, asked=replace(plan.asked, engine="gpt-fast"))
    with pytest.raises(PlanError, match="gpt-fast has no pools"):
        examine_serving(elsewhere, path.parent)
    raw = json.loads(to_text(plan, embed=True))
    raw["decisions"]["prefill"]["tp"] = 0
    odd = path.parent / "odd.json"
    odd.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="less than one"):
        planner.load(odd)


def test_a_plan_without_pools_does_not_speak_of_them(tiny_llama_pools):
    plan, _ = tiny_llama_pools
    text = to_text(replace(plan, serving=replace(plan.serving, prefill=None)))
    assert "prefill\"" not in text and "prefill_chunk" in text


@pytest.fixture(scope="module")
def tiny_llama_pools(tmp_path_factory):
    asked = ServeAsked(prompt=16, output=16, batch=4, engine="vllm")
    plan, _, _ = plan_serving(graph_of("llama"), "h100x4", load_hardware("h100x4"), asked,
                              parse_serve_pins(("pools=2+2",)))  # fmt: skip
    path = tmp_path_factory.mktemp("pools") / "plan.json"
    plan.save(str(path))
    return plan, path
