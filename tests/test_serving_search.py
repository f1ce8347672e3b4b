"""The search of plans to serve: tiers against brute force, what wins where, what is refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from serving_cases import found, model
from tiny_models import EXAMPLES, graph_of

from cost_models import serving as costs
from cost_models import serving_tiers as below_the_gpu
from cost_models.hardware import load_hardware
from cost_models.serving import memory_of
from cost_models.serving_decisions import WEIGHT_BYTES, Held, ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_ops import Costs, step_of
from cost_models.serving_shapes import Experts
from cost_models.serving_tiers import below, below_bytes, block_bytes, layers_of, load_of
from ir.errors import InfeasibleError, PlanError, UsageError
from planner.serving import tiers
from planner.serving.asked import ServeAsked, ServePins, parse_serve_pins
from planner.serving.formats import block_seconds, in_formats, rows
from planner.serving.predict import predict
from planner.serving.relief import relief
from planner.serving.runnable import NATIVE, ExpertsOf, unservable
from planner.serving.search import BATCHES, CHUNKS, search
from planner.serving.show import estimate_json
from planner.serving.tracing import plan_serving

LOAD = ServeLoad(prompt=512, output=128)


# --- what lies below --------------------------------------------------------------------------


def costs_of(hardware, serving):
    return Costs(cluster=load_hardware(hardware), engine=load_serving_engine("native"),
                 serving=serving)  # fmt: skip


def test_a_stream_takes_its_bytes_over_the_link():
    held = Held(block="mlp", tier="cpu", place="stream", resident=8)
    some = below(costs_of("a6000x1", Serving(tiers=(held,))), model(), step_of(1.0, 600.0))
    size = 32 * 3 * 8192 * 28672 * 2 * (24 / 32)
    assert float(some.stream_s) == pytest.approx(size / 2.3e10, rel=1e-9)
    assert float(some.fetched_s) == float(some.on_host_s) == 0


def test_bytes_below_are_those_that_left_the_gpu():
    served, s = model(), Serving()
    for block in ("attention", "mlp", "head", "embeddings"):
        place = "compute" if block == "embeddings" else "stream"
        held = Held(block=block, tier="cpu", place=place)
        assert below_bytes(served, replace(s, tiers=(held,))).total == block_bytes(
            served, s, block
        )
    mixture = model(experts=16)
    kept = replace(s, tiers=(Held(block="routed_experts", tier="cpu", place="stream", resident=4),))
    whole = block_bytes(mixture, s, "routed_experts")
    assert below_bytes(mixture, kept).total == pytest.approx(whole * 12 / 16)


@pytest.mark.parametrize("skew", [0.0, 0.6, 1.2, 3.0])
def test_picked_experts_sum_to_those_of_a_token(skew):
    experts = Experts(experts=16, topk=4, hidden=64, inter=64.0)
    picked = load_of(experts, skew)
    assert picked.sum() == pytest.approx(4) and picked.max() <= 1
    assert (np.diff(picked) <= 1e-12).all()


def test_the_more_experts_stay_the_less_is_fetched():
    served, last = model(layers=4, experts=16), np.inf
    for resident in range(17):
        held = Held(block="routed_experts", tier="cpu", place="stream", resident=resident)
        now = float(below(costs_of("a6000x1", Serving(tiers=(held,))), served,
                          step_of(2.0, 600.0)).fetched_s.sum())  # fmt: skip
        assert now < last
        last = now
    assert last == 0


@pytest.mark.parametrize("name, written", [("int4", 2 * 2), ("int8", 0)])
def test_the_cpu_writes_out_what_it_has_no_kernel_for(monkeypatch, name, written):
    """planner.serve multiplies int8 as it lies; 16 bits of others are written and read. Over a link
    that is too slow to bring them to the GPU instead."""
    monkeypatch.setattr(below_the_gpu, "rate_bytes_per_s", lambda *_: 1e8)
    held = (Held(block="mlp", tier="cpu", place="compute"),)
    s = Serving(tiers=held, weights=(("mlp", name),))
    ours, kernels = (
        below(Costs(cluster=load_hardware("a6000x1"), engine=load_serving_engine(engine),
                    serving=s), model(), step_of(1.0, 600.0))
        for engine in ("native", "llamacpp")
    )  # fmt: skip
    width = WEIGHT_BYTES[name]
    found = float(ours.on_host_s) / float(kernels.on_host_s)
    assert found == pytest.approx((width + written) / width)


def test_a_plan_says_that_unpacking_is_counted_not_measured(plan):
    args = (str(EXAMPLES / "llama.py"), "--arg", "size=8b", "--task", "serve", "--batch", "1",
            "--hardware", "h100x1", "--fix", "weights=int8", "--engine")  # fmt: skip
    code, out, err = plan("trace", *args, "native")
    assert code == 0, err
    said = "native unpacks what is packed before it is read: on a GPU int8 3 bytes of traffic an"
    assert said in " ".join(out.split()) and "counted, not measured" in " ".join(out.split())
    assert "unpacks" not in plan("trace", *args, "vllm")[1]


def test_the_values_of_prompts_that_are_read_at_once_are_held():
    """Ours reads a batch's prompts together, as `generate` does; vLLM so many tokens a step."""
    served, cluster = model(layers=8), load_hardware("h100x1")
    load = ServeLoad(prompt=8192, output=128)

    def held(engine, batch, **more):
        s = Serving(batch=batch, **more)
        return memory_of(served, cluster, load_serving_engine(engine), s, load)

    def workspace(engine, batch, **more):
        return held(engine, batch, **more).workspace_bytes

    assert workspace("native", 1) == workspace("vllm", 64) == costs.WORKSPACE_BYTES
    assert workspace("llamacpp", 64) == costs.WORKSPACE_BYTES  # 512 tokens at a time
    each = 8192 * (2 * 8192 + 8192 + 2 * 28672) * 2 + served.vocab * 4 + 3 * 8192**2  # a mask
    for batch, replicas in ((16, 1), (64, 4)):
        assert workspace("native", batch, replicas=replicas) == 16 * each
    memory = held("native", 64)  # fewer run at once: those that there is room for, cache and all
    free = memory.capacity_bytes - memory.weights_bytes - memory.context_bytes
    most = free / (each + memory.kv_bytes_per_sequence)
    assert 16 < most < 64 and memory.workspace_bytes == pytest.approx(most * each)
    assert memory.room_bytes / memory.kv_bytes_per_sequence == pytest.approx(most)


# --- the program of tiers ---------------------------------------------------------------------


def objective(served, cluster, engine, s, load=LOAD):
    """What the program minimises: a wave's steps, as plans are costed, and what each block below
    must earn of those on the GPU."""
    phases = ((step_of(1.0, load.prompt + load.output / 2), load.output),
              (step_of(0.0, 0.0, 1.0, load.prompt), 1))  # fmt: skip

    def took(serving, parts):
        of = Costs(cluster=cluster, engine=engine, serving=serving)
        return sum(n * sum(float(v) for v in parts(of, served, step).values())
                   for step, n in phases)  # fmt: skip

    on_gpu = took(replace(s, tiers=(), kv_tier="gpu", weights=()), costs.busy_parts)
    return took(s, costs.step_parts) + tiers.BLOCK_GAIN * len(s.tiers) * on_gpu


def held_by(served, cluster, engine, s, load=LOAD):
    """Whether one sequence fits, on the GPU and on every tier."""
    memory = memory_of(served, cluster, engine, s, load)
    need = memory.weights_bytes + memory.reserved_bytes + memory.kv_bytes_per_sequence
    sizes = dict(below_bytes(served, s).tiers)
    return need <= memory.capacity_bytes and all(
        size <= cluster.tier(name).bytes for name, size in sizes.items()
    )


OPEN = {"attention": ("bf16", "int8"), "mlp": ("bf16", "int8", "int4"),
        "routed_experts": ("bf16", "int8", "int4")}  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "experts", "formats", "engine", "kv_tier"),
    [*itertools.product((24, 48, 80), (0, 8), (None,), ("native",), ("gpu",)),
     (80, 0, OPEN, "native", "gpu"), (48, 8, OPEN, "native", "cpu"),
     (48, 0, None, "flexgen", "cpu"), (48, 0, None, "zero-inference", "cpu")],
)  # fmt: skip
def test_the_program_of_tiers_finds_the_best_of_all(
    monkeypatch, layers, experts, formats, engine, kv_tier
):
    """Of every place and, where they are open, every format of each block."""
    monkeypatch.setattr(tiers, "STEPS", 2 if formats is None else 1)
    served = model(layers=layers, experts=experts, inter=28672 if not experts else 14336)
    cluster, engine = load_hardware("a6000x1"), load_serving_engine(engine)
    s = Serving(kv_tier=kv_tier)
    made = tiers.best_tiers(served, cluster, engine, s, LOAD, formats=formats)
    blocks = [b for b in served.block_elements() if b != "router"]
    ways = []
    for block in blocks:
        total = layers_of(served, block)
        rows = [None]
        for tier in ("cpu", "nvme"):
            for place in tiers._places(block, tier):
                rows += [Held(block=block, tier=tier, place=place, resident=total * k // 2)
                         for k in range(tiers.STEPS)]  # fmt: skip
        words = (formats or {}).get(block, ("bf16",))
        ways.append([(row, block, word) for row in dict.fromkeys(rows) for word in words])
    best = np.inf
    for combination in itertools.product(*ways):
        said = {block: word for _, block, word in combination}
        tried = replace(in_formats(s, said), tiers=tuple(h for h, _, _ in combination if h))
        if held_by(served, cluster, engine, tried):
            best = min(best, objective(served, cluster, engine, tried))
    assert made is not None
    assert objective(served, cluster, engine, made) == pytest.approx(best, rel=1e-4)


def test_of_a_tier_that_is_pinned_only_its_ways_are_costed(monkeypatch):
    """They are the same ways, and the plan is; without a tier none below is costed."""
    monkeypatch.setattr(tiers, "STEPS", 2)
    served, cluster, s = model(layers=24), load_hardware("a6000x1"), Serving()
    engine, steps = load_serving_engine("native"), tiers.steps_of(s, LOAD)
    alone = Costs(cluster=cluster, engine=engine, serving=s)
    every = tiers.choices(alone, served, "mlp", steps, ("bf16", "int8"))
    for only in ("", "cpu", "nvme"):
        some = tiers.choices(alone, served, "mlp", steps, ("bf16", "int8"), only)
        assert some == [c for c in every if c.held is None or c.held.tier == only]
    costed = []
    monkeypatch.setattr(
        tiers, "below", lambda one, *rest: costed.append(one.serving.tiers) or below(one, *rest)
    )
    for pinned in ((), (("mlp", "nvme"),)):
        made = tiers.best_tiers(served, cluster, engine, s, LOAD, pinned, {"mlp": ("int8",)})
        assert {held.tier for held in made.tiers} == {tier for _, tier in pinned}
        assert {held.tier for row in costed for held in row} == {tier for _, tier in pinned}


def test_the_stream_of_a_long_cache_is_beside_that_of_weights(monkeypatch):
    """Against all combinations of formats and places, with 30,000 tokens on the host."""
    monkeypatch.setattr(tiers, "STEPS", 1)
    served, cluster = model(layers=48), load_hardware("a6000x1")
    engine = load_serving_engine("native")
    cluster = replace(cluster, tiers=tuple(t for t in cluster.tiers if t.name == "cpu"))
    s, load = Serving(kv_tier="cpu"), ServeLoad(prompt=30000, output=128)
    words = dict.fromkeys([b for b in served.block_elements() if b != "embeddings"],
                          ("bf16", "int8", "int4"))  # fmt: skip
    made = tiers.best_tiers(served, cluster, engine, s, load, None, words)
    ways = [
        [(b, word, h) for word in words.get(b, ("bf16",)) for h in (
            None, *(Held(block=b, tier="cpu", place=p) for p in tiers._places(b, "cpu")))]
        for b in served.block_elements()
    ]  # fmt: skip
    best = np.inf
    for combination in itertools.product(*ways):
        said = {block: word for block, word, _ in combination}
        tried = replace(in_formats(s, said), tiers=tuple(h for _, _, h in combination if h))
        if held_by(served, cluster, engine, tried, load):
            best = min(best, objective(served, cluster, engine, tried, load))
    assert made is not None and held_by(served, cluster, engine, made, load)
    assert objective(served, cluster, engine, made, load) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("engine", "hardware", "batch", "experts"), [
    ("native", "a6000x1", 1, 0), ("vllm", "h100x1", 16, 0), ("native", "a6000x1", 4, 8),
])  # fmt: skip
def test_no_formats_that_are_allowed_beat_those_of_the_plan(engine, hardware, batch, experts):
    """Whatever else each block is kept in: where it fits, where some of it does not, with a batch
    whose prompts count as its steps do."""
    served = model(layers=40 if experts else 80, hidden=4096 if experts else 8192,
                   inter=14336 if experts else 28672, experts=experts)  # fmt: skip
    words = ("bf16", "int8", "int4")
    asked = {"engine": engine, "batch": batch, "allow": words[1:]}
    free = found(served, hardware, **asked).best
    for formats in itertools.product(words, repeat=3):
        blocks = ("attention", "routed_experts" if experts else "mlp", "head")
        kept = tuple(zip(blocks, formats))
        pinned = found(served, hardware, keep=kept, **asked).best
        most = pinned.latency_s(LOAD) * (1 + tiers.BLOCK_GAIN * len(served.block_elements()))
        assert free.latency_s(LOAD) <= most, kept


def test_bytes_are_given_up_where_they_cost_least_time():
    """From the quickest formats on each step costs no less a byte than the one before, and ends at
    the fewest bits: the hull of all choices, by brute force."""
    served, cluster = model(layers=8, experts=8, hidden=4096, inter=8192), load_hardware("h100x1")
    engine, s, words = load_serving_engine("native"), Serving(batch=4), ("bf16", "int8", "int4")
    ways = dict.fromkeys(("attention", "routed_experts", "head"), words)
    quickest, smaller = rows(served, cluster, engine, s, LOAD, ways)
    spent = block_seconds(served, cluster, engine, s, LOAD, ways)

    def at(row):
        seconds = sum(LOAD.output * spent[b, f][0] + 4 * spent[b, f][1] for b, f in row.items())
        return costs.weight_bytes(served, in_formats(s, row)), seconds

    chain = [at(row) for row in (quickest[0], *smaller)]
    every = [at(dict(zip(ways, some))) for some in itertools.product(words, repeat=3)]
    assert chain[0][1] == pytest.approx(min(seconds for _, seconds in every))
    assert chain[-1][0] == min(size for size, _ in every)
    for (size, seconds), (less, more) in itertools.pairwise(chain):
        slope = (more - seconds) / (size - less)
        for other, took in every:  # nothing lies below the line
            assert took >= seconds + slope * (size - other) - 1e-9


def test_offload_never_when_it_fits_as_a_result():
    """With all on the GPU a plan is never slower than any that has something below it."""
    served, cluster = model(layers=8), load_hardware("h100x1")
    engine = load_serving_engine("native")
    on_gpu = predict(served, cluster, engine, Serving(), LOAD)
    assert on_gpu.fits
    for block, place in itertools.product(("attention", "mlp", "head"), ("stream", "compute")):
        lower = Serving(tiers=(Held(block=block, tier="cpu", place=place),))
        assert predict(served, cluster, engine, lower, LOAD).tpot_s > on_gpu.tpot_s
    assert found(served, "h100x1").best.serving.tiers == ()


def test_experts_leave_the_gpu_first():
    """Of a mixture a token reads few experts: they are what costs least to have elsewhere."""
    best = found(model(layers=32, hidden=4096, inter=14336, experts=8), "rtx-4090x1").best
    held = {h.block: h for h in best.serving.tiers}
    assert best.fits and held["routed_experts"].resident < 8
    assert set(held) <= {"routed_experts", "embeddings"}


# --- what wins --------------------------------------------------------------------------------


def test_int4_helps_small_batches_and_not_large_ones():
    served, gains = model(layers=32, hidden=4096, inter=14336), []
    for batch in (1, 16, 256):
        wide, narrow = (found(served, "a100x1", (f"weights={w}",), batch=batch, engine="vllm").best
                        for w in ("bf16", "int4"))  # fmt: skip
        gains.append(wide.tpot_s / narrow.tpot_s)
    assert gains[0] > 1.8 > gains[1] > gains[2] and gains[2] < 1.15


def test_the_cache_goes_below_where_more_then_run():
    """Long answers to many: what the cache frees is worth its stream where few would run."""
    served = model(layers=32, hidden=4096, inter=14336)
    asked = {"batch": 64, "prompt": 1024, "output": 30720, "objective": "throughput"}
    kept = found(served, "a6000x1", ("offload=none",), **asked).best
    best = found(served, "a6000x1", **asked).best
    assert kept.running < 64 and kept.serving.kv_tier == "gpu"
    assert best.tokens_per_s >= kept.tokens_per_s
    below_ = predict(served, load_hardware("a6000x1"), load_serving_engine("native"),
                     Serving(batch=64, kv_tier="cpu"), ServeLoad(prompt=1024, output=30720))
    assert below_.running == 64
    size = 64 * (1024 + 15360) * 32 * 8 * 256 * 2  # read once a step
    assert dict(below_.parts)["stream"] == pytest.approx(
        size / 2.3e10 - (below_.decode_s - dict(below_.parts)["stream"]), rel=1e-6
    )
    assert dict(below_.tiers)["cpu"] == pytest.approx(64 * (1024 + 30720) * 32 * 8 * 256 * 2)


def test_where_the_cache_lies_is_pinned():
    served = model(layers=32, hidden=4096, inter=14336)
    asked = {"batch": 64, "prompt": 16384, "output": 64, "objective": "throughput"}
    assert found(served, "a6000x1", ("kv_tier=gpu",), **asked).best.serving.kv_tier == "gpu"
    for pins in (("kv_tier=cpu",), ("kv_tier=cpu", "offload=none"),
                 ("kv_tier=cpu", "offload=head:cpu")):
        best = found(served, "a6000x1", pins, batch=1).best.serving
        assert best.kv_tier == "cpu" and bool(best.tiers) == (len(pins) > 1 and "head" in pins[1])
    with pytest.raises(UsageError, match="no value of that pin"):
        parse_serve_pins(("kv_tier=nvme",))


def test_what_binds_is_named():
    """One sequence reads all weights for one token; a thousand multiply as much as they read. (Of
    an engine whose host takes as long for each as the kernels, it binds: native's does not.)"""
    served, engine = model(layers=32, hidden=4096, inter=14336), load_serving_engine("vllm")
    named = {}
    for name, batch in (("vllm", 1), ("native", 1024)):
        p = predict(served, load_hardware("h100x1"), load_serving_engine(name),
                    Serving(batch=batch), ServeLoad(prompt=16, output=16))  # fmt: skip
        named[name, batch] = p.bottleneck, max(p.parts, key=lambda part: part[1])[0]
    assert named == {
        ("vllm", 1): ("memory bandwidth", "gemm"), ("native", 1024): ("compute", "gemm"),
    }  # fmt: skip
    lower = Serving(tiers=(Held(block="mlp", tier="cpu", place="stream"),))
    assert predict(served, load_hardware("h100x1"), engine, lower, LOAD).bottleneck == "host link"
    lower = Serving(tiers=(Held(block="mlp", tier="nvme", place="stream"),))
    assert predict(served, load_hardware("h100x1"), engine, lower, LOAD).bottleneck == "disk"


def test_what_binds_is_the_largest_part_and_its_relief_is_open():
    """The host of a step is named where it alone takes most; bits that were allowed, a tp that
    lost, are no relief."""
    served = model(layers=32, hidden=4096, inter=14336)
    many = {"batch": 64, "objective": "throughput", "allow": ("fp8",), "allow_kv": ("fp8",)}
    best = found(served, "h100x8", (), **many).best
    assert max(best.parts, key=lambda part: part[1])[0] == "host"
    assert best.bottleneck == "host launches" and best.serving.tp < 8
    said = relief(best, ServeAsked(**many))
    assert "--engine vllm" in said and "tp" not in said and "bits" not in said
    bits = {"batch": 1, "allow": ("int8", "int4"), "engine": "vllm"}
    for allow, word in ((("int8", "int4"), ""), (("int8",), "--allow int4"), ((), "int8,int4")):
        one = found(served, "rtx-4090x1", (), **{**bits, "allow": allow}).best
        assert one.bottleneck == "memory bandwidth"
        said = relief(one, ServeAsked(**{**bits, "allow": allow}))
        assert word in said and bool(word) == ("bits" in said)
    # the native engine writes few bits out before each product, which moves more: others do not
    own = {"batch": 1}
    one = found(served, "rtx-4090x1", (), **own).best
    assert one.bottleneck == "memory bandwidth"
    assert "packed (--engine vllm)" in relief(one, ServeAsked(**own))


@pytest.mark.parametrize("engine, hardware, batch, objective", [
    ("llamacpp", "rtx-3090x1", 4, "latency"), ("vllm", "h100x4", 32, "throughput"),
    ("sglang", "h100x2", 16, "latency"),
])  # fmt: skip
def test_no_chunk_of_prompts_that_is_pinned_beats_the_plan(engine, hardware, batch, objective):
    served = model(layers=32, hidden=4096, inter=14336)
    asked = {"engine": engine, "batch": batch, "objective": objective, "prompt": 3000}
    load = ServeLoad(prompt=3000, output=128)

    def score(*pins):
        best = found(served, hardware, pins, **asked).best
        return best.latency_s(load) if objective == "latency" else -best.tokens_per_s

    own = load_serving_engine(engine).chunk_tokens
    assert score() <= min(score(f"prefill_chunk={c}") for c in (own, *CHUNKS))


@pytest.mark.parametrize("engine", ["gpt-fast", "flexgen", "zero-inference"])
def test_an_engine_without_a_flag_for_chunks_has_no_such_plan(engine):
    with pytest.raises(UsageError, match="--fix prefill_chunk=512: no flag of"):
        found(model(), "h100x4", ("prefill_chunk=512",), engine=engine)


def test_relief_knows_what_is_pinned():
    served = model(layers=32, hidden=4096, inter=14336)

    def said(hardware, *pins, **asked):
        best = found(served, hardware, pins, **asked).best
        return relief(best, ServeAsked(**{"batch": 1, **asked}), pins)

    assert "--fix weights=int8" in said("rtx-4090x1", "weights=bf16", engine="vllm")
    assert "--allow int8,int4" in said("rtx-4090x1", engine="vllm")
    wider = said("h100x4", "tp=2", batch=2, engine="vllm", allow=("int8", "int4"))
    assert wider == "a wider tp than is pinned (--fix tp=2)"
    below = said("h100x1", "offload=mlp:nvme")
    assert below.startswith("leaving where it lies to the search (without --fix offload=mlp:nvme)")


def test_a_block_that_the_model_lacks_is_not_kept():
    for block in ("routed_experts", "shared_experts"):
        with pytest.raises(UsageError, match=f"--keep {block}=int8: toy has no {block}") as fault:
            found(model(), "h100x4", keep=((block, "int8"),))
        assert fault.value.why == "its blocks: attention, mlp, embeddings, head"


def test_a_cache_on_the_host_is_bounded_by_it():
    """80 GB of a host, 4 GB a GPU of it weights: so many whole caches, not those of two layers."""
    served = model(layers=32, hidden=4096, inter=14336)
    cluster = load_hardware("rtx-4090x1")
    host = next(t for t in cluster.tiers if t.name == "cpu")
    asked = ServeAsked(prompt=8000, output=192, batch=4)
    small = replace(cluster, tiers=tuple(
        replace(t, bytes=20 << 30) if t is host else t for t in cluster.tiers
    ))  # fmt: skip
    best = search(served, small, asked, parse_serve_pins(("kv_tier=cpu", "offload=none"))).best
    each = 8192 * 32 * 2 * 8 * 128 * 2
    assert best.memory.kv_below_bytes_per_sequence == each
    assert estimate_json(best, asked)["max_concurrency"] == (20 << 30) // each < (
        best.memory.room_bytes // best.memory.kv_bytes_per_sequence
    )  # fmt: skip


def test_nothing_lossy_unless_allowed():
    served = model(layers=32, hidden=4096, inter=14336)
    plain = found(served, "a100x1").best.serving
    assert plain.weights == () and plain.kv == "bf16"
    allowed = {"allow": ("int4",), "keep": (("attention", "bf16"),)}
    narrow = found(served, "a100x1", engine="vllm", **allowed).best.serving
    assert dict(narrow.weights) == {"mlp": "int4", "head": "int4"}
    # the native engine writes 4 bits out before each product: more traffic than 16 bits are
    assert found(served, "a100x1", **allowed).best.serving.weights == ()
    few = found(served, "a100x1", max_bits=8, keep=(("head", "bf16"),)).best.serving
    assert set(dict(few.weights)) == {"attention", "mlp"}
    assert set(dict(few.weights).values()) <= {"int8", "fp8"}


@pytest.mark.parametrize("word", ["mxfp4", "int4_64", "int4_32"])
def test_formats_that_only_measured_engines_have_are_no_plans(word):
    for given in ({"allow": (word,)}, {"keep": (("mlp", word),)}):
        with pytest.raises(UsageError, match=f"unknown format '{word}' of weights"):
            ServeAsked(**given)
    with pytest.raises(UsageError, match="no value of that pin"):
        parse_serve_pins((f"weights={word}",))


def test_what_is_not_packed_stays_in_the_models_own_format():
    for given in ({"allow": ("fp16",)}, {"keep": (("mlp", "fp32"),)}):
        with pytest.raises(UsageError, match="stays in bf16"):
            ServeAsked(**given)
    with pytest.raises(UsageError, match="weights in fp16: what is not packed stays in bf16"):
        found(model(), "h100x4", ("weights=fp16",))
    assert ServeAsked(max_bits=16).formats == ("bf16",)
    assert ServeAsked(max_bits=16, precision="fp16").formats == ("fp16",)
    assert unservable(NATIVE, Serving(weights=(("mlp", "mxfp4"),)), ExpertsOf(routed=False))
    assert not unservable(NATIVE, Serving(weights=(("mlp", "int4"),)), ExpertsOf(routed=False))


@pytest.mark.parametrize("block", ["router", "embeddings"])
def test_what_no_format_is_planned_for_is_not_kept_in_one(block):
    assert ServeAsked(keep=((block, "bf16"),))
    with pytest.raises(UsageError, match=f"--keep {block}=int8: it stays in bf16"):
        ServeAsked(keep=((block, "int8"),))


def test_less_than_none_is_not_too_many():
    with pytest.raises(UsageError, match="--kv-window -3 is less than none"):
        ServeAsked(kv_window=-3)


def test_limits_that_cannot_be_met_say_by_how_much():
    with pytest.raises(InfeasibleError, match="no plan meets the limits") as fault:
        found(model(), "h100x4", max_tpot_s=1e-3)
    assert "--max-tpot 1ms: the nearest plan takes" in fault.value.why
    hint = fault.value.hints[0].split()
    again = found(model(), "h100x4", max_tpot_s=float(hint[1].removesuffix("ms")) / 1e3)
    assert again.best.tpot_s <= float(hint[1].removesuffix("ms")) / 1e3


@pytest.mark.parametrize("tpot_s", [None, 2.0])
def test_where_weights_lie_gives_one_phase_for_the_limit_of_the_other(tpot_s):
    """What the CPU multiplies for each token is slower for prompts than what streams."""
    served, load = model(layers=48), {"batch": 4, "prompt": 2048, "output": 16}
    free = found(served, "a6000x1", **load).best
    limited = found(served, "a6000x1", max_ttft_s=7.9, max_tpot_s=tpot_s, **load).best
    assert free.ttft_s > 8.5 and limited.ttft_s <= 7.9 and free.tpot_s < limited.tpot_s < 2
    with pytest.raises(InfeasibleError) as fault:
        found(served, "a6000x1", max_ttft_s=1.0, **load)
    assert float(fault.value.hints[0].split()[1].removesuffix("ms")) < 7900


@pytest.mark.parametrize("objective", ["throughput", "cost"])
def test_requests_that_are_left_open_are_as_many_as_the_limit_allows(objective):
    """No number of them that is said does better, by more than one request."""
    served, load = model(layers=16, hidden=4096, inter=14336), {"engine": "vllm", "batch": 0}
    limits = {"objective": objective, "max_tpot_s": 0.009}
    best = found(served, "h100x2", ("pools=none",), **load | limits).best
    assert best.serving.batch not in BATCHES

    def score(p):
        return p.tokens_per_s / (p.serving.devices if objective == "cost" else 1)

    for batch in range(best.serving.batch // 2, 2 * best.serving.batch, 8):
        try:
            said = found(served, "h100x2", ("pools=none",), **load | limits | {"batch": batch}).best
        except InfeasibleError:
            continue
        assert score(said) <= score(best) * 1.01


def test_too_little_of_every_tier_is_infeasible():
    with pytest.raises(InfeasibleError, match="does not fit") as fault:
        found(model(layers=3000), "t4x1")
    assert "GB of cpu" in fault.value.why and "int4" in fault.value.hints[0]
    with pytest.raises(InfeasibleError, match="a GPU holds"):
        found(model(), "a6000x1", ("offload=none",))


def test_pins_are_kept_and_wrong_ones_refused():
    best = found(model(), "a6000x1", ("offload=mlp:cpu,attention:nvme",)).best.serving
    assert {(h.block, h.tier) for h in best.tiers} == {("mlp", "cpu"), ("attention", "nvme")}
    best = found(model(), "h100x8", ("tp=2", "pp=2")).best.serving
    assert (best.tp, best.pp, best.replicas) == (2, 2, 2)
    for pins in (("tp=0",), ("zero=3",), ("kv=int2",), ("offload=wheels:cpu",), ("tp=2", "tp=4")):
        with pytest.raises(UsageError):
            parse_serve_pins(pins)
    with pytest.raises(UsageError, match="cannot be divided"):
        found(model(), "h100x8", ("tp=3",))


def test_loads_beyond_all_are_refused_with_the_limit(plan, tmp_path, monkeypatch):
    """On the command line, and in a file; a prompt of many steps within it takes no loop each."""
    made = tmp_path / "made.json"
    asked = ("trace", str(EXAMPLES / "llama.py"), "--arg", "size=tiny", "--task", "serve",
             "--hardware", "h100x1", "--engine", "vllm", "-o", str(made))  # fmt: skip
    for more, said in (
        (("--prompt", "999999999"), "--prompt 1e+09 is no number of tokens"),
        (("--output", "999999999"), "--output 1e+09 is no number of tokens"),
        (("--batch", "999999999"), "--batch 1e+09 is too many"),
        (("--prompt", "20001", "--fix", "prefill_chunk=1"), "20,001 steps of 1 tokens read it"),
    ):
        code, out, err = plan(*asked, *more)
        assert (code, out) == (64, "") and said in err
    assert plan(*asked, "--prompt", "1000", "--batch", "1", "--fix", "prefill_chunk=1")[0] == 0
    text = made.read_text()
    calls = []
    monkeypatch.setattr(costs, "step_s", lambda *a, own=costs.step_s: (calls.append(a), own(*a))[1])
    assert plan("show", str(made))[0] == 0 and 0 < len(calls) < 20
    for key, number, said in (("prompt", 10**9, "workload.prompt is 1000000000"),
                              ("prompt", 20_001, "20,001 steps of 1 tokens read it")):  # fmt: skip
        made.write_text(text.replace(f'"{key}": 1000', f'"{key}": {number}'))
        code, out, err = plan("show", str(made))
        assert (code, out) == (1, "") and said in err


def test_a_server_of_a_sequence_of_which_nothing_is_left_is_refused():
    graph = graph_of("llama")
    unit = graph.units[0]
    name, tensor = unit.inputs[0]
    short = replace(tensor, shape=(replace(tensor.shape[0], offset=-64), *tensor.shape[1:]))
    odd = replace(graph, units=(replace(unit, inputs=((name, short),)), *graph.units[1:]))
    with pytest.raises(PlanError, match="b-64 is -63"):
        plan_serving(odd, "h100x1", load_hardware("h100x1"),
                     ServeAsked(prompt=16, output=16, batch=1), ServePins())  # fmt: skip


def test_the_same_plan_twice():
    one, two = (found(model(layers=80), "a6000x2", batch=4, allow=("int8",)) for _ in range(2))
    assert one.best == two.best and one.tried == two.tried
    assert ServePins() == parse_serve_pins(())
