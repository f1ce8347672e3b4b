"""Policies of the cache that lose: what is kept, read and moved; means of blocks as they run."""

import itertools

import numpy as np
import pytest
import runtime_cases_serve as cases
import torch
from serving_cases import found, model
from tiny_models import graph_of
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import planner
from cost_models.hardware import load_hardware
from cost_models.serving_decisions import ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_host import host_of
from cost_models.serving_kv import forgetful, kept, kv_bytes, picked, seen
from cost_models.serving_ops import Costs, step_of
from cost_models.serving_reading import served_model
from cost_models.serving_shapes import Attend
from cost_models.serving_tiers import below
from ir.errors import InfeasibleError, UsageError
from planner.runtime.serve.kv import Kv, cache_of, even_mask
from planner.runtime.serve.kv import kv_bytes as held_bytes
from planner.serving.asked import ServeAsked, ServePins
from planner.serving.predict import predict
from planner.serving.show import summary
from planner.serving.text import to_text
from planner.serving.tracing import plan_serving

LLAMA = model(layers=32, hidden=4096, inter=14336)


@pytest.mark.parametrize("recent, block, top", [(5, 1, 0), (4, 3, 0), (8, 16, 0), (4, 3, 2),
                                                (1, 5, 100)])  # fmt: skip
def test_entries_are_those_that_are_left_token_by_token(recent, block, top):
    attend = Attend(heads=4, kv_heads=2, dim_qk=16, dim_v=16, recent=recent, block=block, top=top)
    whole, folded = [], 0  # tokens kept as they are, blocks that have a mean
    for tokens in range(1, 60):
        whole.append(tokens)
        if len(whole) - recent >= block:
            del whole[:block]
            folded += 1
        count = np.asarray(float(tokens))
        read = min(folded, top) * block if top else folded
        assert picked(attend, count) == (read if top else 0)
        assert seen(attend, count) == len(whole) + read
        assert kept(attend, count) == (tokens + folded / 2 if top else len(whole) + folded)


def inputs(batch, seq_len):
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


@pytest.fixture(scope="module")
def tiny():
    plan = planner.trace_serving(cases.llama(), inputs, hardware="h100x1", precision="fp32",
                                 prompt=16, output=16, batch=2)  # fmt: skip
    return served_model(plan.graph)


@pytest.mark.parametrize("window, block", [(4, 3), (6, 1), (30, 2)])
def test_means_are_of_their_blocks_and_take_the_bytes_that_are_costed(tiny, window, block):
    """A cache layer fed a prompt and then tokens holds what the keys in a row say; the model's
    answers are those of the whole cache where every block is one token."""
    net, ids = cases.whole("llama")
    cache = cache_of(net, Kv(window=window, block=block))
    whole = net.generate(ids, max_new_tokens=14, do_sample=False, pad_token_id=95)
    said = net.generate(ids, max_new_tokens=14, do_sample=False, pad_token_id=95,
                        past_key_values=cache, attention_mask=torch.ones_like(ids))  # fmt: skip
    assert torch.equal(said, whole) or (block > 1 and window < 20)
    tokens = cache.layers[0].get_seq_length()
    assert tokens == said.shape[1] - 1  # the last is not read again
    size = kv_bytes(forgetful(tiny, window, f"summary:{block}"), Serving(kv="bf16"),
                    np.asarray(float(tokens)))  # fmt: skip
    assert held_bytes(cache) == 2 * 2 * size  # two sequences, in fp32
    layer = cache_of(net, Kv(window=window, block=block)).layers[0]
    keys = torch.randn(1, 2, 25, 16)
    for at in (slice(0, 9), *(slice(k, k + 1) for k in range(9, 25))):
        layer.update(keys[..., at, :], 2 * keys[..., at, :])
    many = max(0, (25 - window) // block)
    means = keys[..., : many * block, :].unflatten(-2, (many, block)).mean(-2) if many else keys[
        ..., :0, :]  # fmt: skip
    wanted = torch.cat([means, keys[..., many * block :, :]], -2)
    torch.testing.assert_close(layer.keys, wanted)
    torch.testing.assert_close(layer.values, 2 * wanted)
    with pytest.raises(UsageError, match="give tokens back"):
        layer.crop(-1)


def test_a_policy_is_costed_between_forgetting_and_keeping():
    """Memory and time of a summary lie between a window's and the whole cache's; what is retrieved
    takes the memory of all and little of its time."""
    cluster, engine = load_hardware("a6000x1"), load_serving_engine("gpt-fast")
    load, seen_ = ServeLoad(prompt=30000, output=2000), {}
    for policy in (None, "", "summary:16", "retrieve:64x64"):
        s = Serving(batch=4) if policy is None else Serving(
            batch=4, kv_window=2048, kv_policy=policy)  # fmt: skip
        seen_[policy] = predict(LLAMA, cluster, engine, s, load)
    sizes = {k: p.memory.kv_bytes_per_sequence for k, p in seen_.items()}
    assert sizes[None] / 32000 == pytest.approx(32 * 8 * 256 * 2)
    assert sizes[""] < sizes["summary:16"] < sizes[None] < sizes["retrieve:64x64"]
    assert sizes["retrieve:64x64"] / sizes[None] == pytest.approx(1 + 1 / 128, rel=1e-2)
    times = {k: p.tpot_s for k, p in seen_.items()}
    assert times[""] < times["summary:16"] < times["retrieve:64x64"] < times[None]
    # prompts attend to all of themselves: what is forgotten later does not make them quicker
    assert seen_["summary:16"].ttft_s >= seen_[None].ttft_s == seen_[""].ttft_s


def test_a_prompt_attends_to_all_of_itself_whatever_is_kept():
    tiny = cases.llama().eval()
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = cache_of(tiny, Kv(word="bf16", window=4))
    with torch.no_grad():
        assert torch.equal(tiny(ids, past_key_values=cache).logits, tiny(ids).logits)
    assert all(layer.keys.shape[-2] < 4 for layer in cache.layers)


def test_what_is_retrieved_from_the_host_is_fetched_and_the_rest_stays_there():
    s = Serving(batch=2, kv_window=1024, kv_policy="retrieve:8x64", kv_tier="cpu")
    cluster, engine = load_hardware("a6000x1"), load_serving_engine("native")
    lossy, step = forgetful(LLAMA, 1024, "retrieve:8x64"), step_of(2.0, 31744.0)
    moved = below(Costs(cluster=cluster, engine=engine, serving=s), lossy, step)
    each = 8 * 256 * 2  # of a token and layer
    wire_s = 2 * 32 * 8 * 64 * each / 2.3e10
    assert float(moved.fetched_s) == pytest.approx(wire_s + 32 * host_of(cluster.device).fetch_s)
    assert float(moved.stream_s) == 0
    found_ = predict(LLAMA, cluster, engine, s, ServeLoad(prompt=30720, output=1024))
    blocks = (31744 - 1024) // 64  # all but the recent, a key each; of two layers 8 blocks more
    here = 32 * (1024 + blocks / 2) * each + 2 * 8 * 64 * each
    assert found_.memory.kv_bytes_per_sequence == pytest.approx(here)
    assert dict(found_.tiers)["cpu"] == pytest.approx(2 * 32 * (31744 + blocks / 2) * each)


def test_a_plan_says_its_policy_and_is_lossy(tmp_path):
    asked = ServeAsked(prompt=16, output=16, batch=1, kv_window=8, kv_policy="summary:4")
    plan, seen_, _ = plan_serving(graph_of("llama"), "h100x1", load_hardware("h100x1"), asked,
                                  ServePins())  # fmt: skip
    assert plan.lossy == ("cache of 8 tokens and an entry for every 4 before",)
    assert "8 tokens and an entry for every 4 before kept" in summary(plan, seen_)
    path = tmp_path / "plan.json"
    plan.save(str(path))
    assert to_text(planner.load(path)) == to_text(plan) and '"kv_policy"' in to_text(plan)
    for word in ("summary", "summary:0", "retrieve:4", "mean:3"):
        with pytest.raises(UsageError, match="unknown policy"):
            ServeAsked(kv_window=8, kv_policy=word)
    with pytest.raises(UsageError, match="needs --kv-window"):
        ServeAsked(kv_policy="summary:4")
    with pytest.raises((UsageError, InfeasibleError), match="cannot be divided") as fault:
        found(LLAMA, "h100x1", ("kv=int8",), kv_window=64, kv_policy="summary:4")
    assert "kept in 16 bits" in fault.value.why


@pytest.mark.parametrize("pin, word, window", [("tp=2", "fp8", 0), ("tp=2", "int8", 5),
                                               ("pp=2", "fp8", 0)])  # fmt: skip
def test_ranks_pack_what_one_does(world, tmp_path, pin, word, window):
    net, ids = cases.whole("llama")
    net.save_pretrained(tmp_path)
    plan = planner.trace_serving(
        net, inputs, hardware="h100x2", fix=(pin, f"kv={word}"), precision="fp32", prompt=16,
        output=16, batch=2, kv_window=window,
    )  # fmt: skip
    plan.save(str(tmp_path / "plan.json"))
    cache = cache_of(net, Kv(word=word, window=window))
    wanted = cases.answer(net, ids, past_key_values=cache)
    assert not torch.equal(wanted, cases.answer(net, ids))
    found_ = world.run(2, cases.served_kept, "llama", str(tmp_path / "plan.json"), str(tmp_path))
    assert all(torch.equal(answers, wanted) for answers, _ in found_)
    assert [size for _, size in found_] == [held_bytes(cache) / 2] * 2


@pytest.mark.parametrize("below", [False, True])
def test_a_step_reads_the_blocks_that_its_query_fits_best(below):
    """Against attention written out, by sequence and head: recent tokens and best blocks."""
    window, block, top, tokens = 4, 3, 2, 20
    net = cases.llama().eval()
    layer = cache_of(net, Kv(window=window, block=block, top=top, below=below)).layers[0]
    attention = net.model.layers[0].self_attn
    keys, queries = torch.randn(2, 2, tokens, 16), torch.randn(2, 4, tokens, 16)
    attend = ALL_ATTENTION_FUNCTIONS[net.config._attn_implementation]
    read = layer.update(keys[..., :9, :], -keys[..., :9, :])
    attend(attention, queries[..., :9, :], *read, None, scaling=1.0)
    for now in range(9, tokens):
        one = slice(now, now + 1)
        read = layer.update(keys[..., one, :], -keys[..., one, :])
        found, _ = attend(attention, queries[..., one, :], *read, None, scaling=1.0)
        folded = (now + 1 - window) // block
        for b, h in itertools.product(range(2), range(4)):
            row, shared = keys[b, h // 2, : now + 1], queries[b, h // 2 * 2 : h // 2 * 2 + 2, now]
            scores = [float((shared @ row[k * block : k * block + block].mean(0)).sum())
                      for k in range(folded)]  # fmt: skip
            best = sorted(range(folded), key=lambda k: -scores[k])[:top]
            seen_ = [t for t in range(now + 1) if t >= folded * block or t // block in best]
            weights = (row[seen_] @ queries[b, h, now]).softmax(0)
            torch.testing.assert_close(found[b, 0, h], -(weights @ row[seen_]))


def test_what_reads_all_blocks_is_the_whole_cache_and_takes_the_bytes_that_are_costed(tiny):
    net, ids = cases.whole("llama")
    wanted = cases.answer(net, ids)
    for top, same in ((9, True), (1, False)):
        cache = cache_of(net, Kv(window=4, block=3, top=top))
        assert torch.equal(cases.answer(net, ids, past_key_values=cache), wanted) == same
        size = kv_bytes(forgetful(tiny, 4, f"retrieve:{top}x3"), Serving(kv="bf16"),
                        np.asarray(float(wanted.shape[1] - 1)))  # fmt: skip
        assert held_bytes(cache) == 2 * 2 * size  # two sequences, in fp32
    beams = [net.generate(ids[:1], max_new_tokens=8, num_beams=3, pad_token_id=95,
                          past_key_values=kept_) for kept_ in
             (None, cache_of(net, Kv(window=4, block=3, top=9)))]  # fmt: skip
    assert torch.equal(*beams)
    latent, ids = cases.whole("deepseek")
    with pytest.raises(UsageError, match="cannot be divided") as fault:
        planner.trace_serving(latent, inputs, hardware="h100x1", kv_window=4,
                              kv_policy="retrieve:1x3", prompt=16, output=16)  # fmt: skip
    assert "no blocks of latents" in fault.value.why
    with pytest.raises(UsageError, match="other keys than its cache has"):
        cases.answer(latent, ids, past_key_values=cache_of(latent, Kv(window=4, block=3, top=1)))


@pytest.mark.parametrize("pin", ["tp=2", "pp=2"])
def test_ranks_retrieve_what_one_does(world, tmp_path, pin):
    net, ids = cases.whole("llama")
    net.save_pretrained(tmp_path)
    plan = planner.trace_serving(
        net, inputs, hardware="h100x2", fix=(pin,), precision="fp32", prompt=16, output=16,
        batch=2, kv_window=4, kv_policy="retrieve:1x3",
    )  # fmt: skip
    plan.save(str(tmp_path / "plan.json"))
    cache = cache_of(net, Kv(window=4, block=3, top=1))
    wanted = cases.answer(net, ids, past_key_values=cache)
    found_ = world.run(2, cases.served_kept, "llama", str(tmp_path / "plan.json"), str(tmp_path))
    assert all(torch.equal(answers, wanted) for answers, _ in found_)
    assert [size for _, size in found_] == [held_bytes(cache) / 2] * 2


@pytest.mark.parametrize("pins", [("tp=2",), ("pp=2",)], ids=["tp", "pp"])
def test_ranks_keep_the_means_that_one_does(world, tmp_path, pins):
    net, ids = cases.whole("llama")
    net.save_pretrained(tmp_path)
    plan = planner.trace_serving(
        net, inputs, hardware="h100x2", fix=pins, precision="fp32", prompt=16, output=16, batch=2,
        kv_window=4, kv_policy="summary:3",
    )  # fmt: skip
    plan.save(str(tmp_path / "plan.json"))
    wanted = cases.answer(net, ids, past_key_values=cache_of(net, Kv(window=4, block=3)),
                          attention_mask=torch.ones_like(ids))  # fmt: skip
    assert not torch.equal(wanted, cases.answer(net, ids))
    found_ = world.run(2, cases.served, "llama", str(tmp_path / "plan.json"), str(tmp_path))
    assert all(torch.equal(answers, wanted) for answers, *_ in found_)
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    with pytest.raises(UsageError, match="several lengths"):
        even_mask(ids, padded)
