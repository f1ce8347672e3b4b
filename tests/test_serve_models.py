"""Plans of serving on models of other families, and what goes wrong while one is served.

Which models, formats, tiers and ranks meet is a pairwise-minimal set: each model streams and is in
int8, each tier and each way is met by a dense model and by a mixture, tp by two of them.
"""

import copy
import json
import os
import resource
import signal
from dataclasses import replace

import pytest
import runtime_cases_serve as cases
import torch
from safetensors.torch import save_file

import planner
from cost_models.serving_decisions import Held
from cost_models.serving_reading import served_model
from ir.errors import PlanError, UsageError
from planner.routed import (
    no_expert_chain,
    no_expert_sum,
    routed_modules,
    summing_modules,
    sums_of,
)
from planner.runtime.serve.apply import laid_by
from planner.runtime.serve.packed import pack
from planner.serving.runnable import experts_of

CASES = {  # model: (blocks in int8, tiers, tp)
    "gpt2": (("mlp",), (("attention", "cpu", "stream", 1), ("mlp", "nvme", "stream", 0)), 1),
    "gpt_oss": (("attention",), (("routed_experts", "nvme", "stream", 1),
                                 ("attention", "cpu", "compute", 1)), 1),
    "qwen3_moe": (("routed_experts",), (("attention", "cpu", "stream", 1),), 2),
    "deepseek": (("attention", "routed_experts"), (("mlp", "cpu", "compute", 0),
                                                   ("routed_experts", "cpu", "stream", 2)), 1),
    "llama": (("attention", "mlp"), (("mlp", "nvme", "stream", 2),
                                     ("attention", "cpu", "stream", 1)), 2),
}  # fmt: skip


def inputs(batch, seq_len):
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


def planned(kind, tp=1, **changes):
    pins = (f"tp={tp}", f"ep={tp}") if tp > 1 and kind != "llama" else (f"tp={tp}",)
    plan = planner.trace_serving(cases.MODELS[kind](), inputs, hardware=f"h100x{tp}", fix=pins,
                                 precision="fp32", prompt=16, output=16, batch=2)  # fmt: skip
    return replace(plan, serving=replace(plan.serving, **changes), rows_on_host=3)


@pytest.mark.parametrize("kind", CASES)
def test_streamed_and_packed_weights_answer_as_their_values_do(world, tmp_path, kind):
    blocks, tiers, tp = CASES[kind]
    held = tuple(Held(block=b, tier=t, place=p, resident=r) for b, t, p, r in tiers)
    plan = planned(kind, tp, weights=tuple((b, "int8") for b in blocks), tiers=held)
    model, ids = cases.whole(kind)
    model.save_pretrained(tmp_path / "weights")
    plan.save(str(tmp_path / "plan.json"))
    given = (kind, str(tmp_path / "plan.json"), str(tmp_path / "weights"), tmp_path)
    found = world.run(tp, cases.served, *given) if tp > 1 else [cases.served(0, *given)]
    laid, values = laid_by(plan), copy.deepcopy(model)
    packed = 0
    for name, p in values.named_parameters():
        if laid(name).word:
            packed += p.numel()
            p.data = pack(p.data, laid(name).word).whole()
    assert packed
    for answers, logits, _, names in found:
        assert names == [n for n, _ in model.named_parameters()]
        assert torch.equal(answers, found[0][0])
        if tp == 1:  # ranks pack their parts, each row of which has a scale of its own
            assert torch.equal(answers, cases.answer(values, ids))
            torch.testing.assert_close(logits, values(ids).logits.detach(), rtol=1e-4, atol=1e-5)
        assert float((logits - model(ids).logits.detach()).abs().max()) < 0.05


@pytest.mark.parametrize("below", [False, True])
def test_experts_in_a_list_lie_over_ranks(world, tmp_path, below):
    """Each rank has two of four in a layer; with them below the device, one of those in it."""
    model, ids = cases.looped()
    plan = planner.trace_serving(model, inputs, hardware="h100x2", fix=("tp=2", "ep=2"),
                                 precision="fp32", prompt=16, output=16, batch=2)  # fmt: skip
    held = Held(block="routed_experts", tier="cpu", place="stream", resident=0)
    if below:
        plan = replace(plan, serving=replace(plan.serving, tiers=(held,)))
    plan.save(str(tmp_path / "plan.json"))
    expert, total = 32 * 32 * 4, sum(p.numel() * 4 for p in model.parameters())
    for said, device, host in world.run(2, cases.served_looped, str(tmp_path / "plan.json")):
        torch.testing.assert_close(said, model(ids).detach())
        assert host == (6 * expert if below else 0)
        assert device <= total - (9 if below else 6) * expert


@pytest.mark.parametrize("sparse", [True, False])
def test_experts_in_a_users_loop_are_routed_where_it_spares_them(sparse):
    torch.manual_seed(0)
    model, block = cases.Looped(sparse).eval(), "routed_experts" if sparse else "mlp"
    plan = planner.trace_serving(model, inputs, hardware="h100x1", precision="fp32", prompt=16,
                                 output=16, batch=2)  # fmt: skip
    assert served_model(plan.graph).block_elements()[block] == 3 * 4 * 32 * 32
    held = (Held(block=block, tier="cpu", place="stream", resident=1 if sparse else 0),)
    plan = replace(plan, serving=replace(plan.serving, tiers=held))
    ids = torch.randint(0, 96, (2, 7))
    wanted = model(ids)
    made = planner.serve(model, plan, device="cpu")
    torch.testing.assert_close(made(ids), wanted)
    assert bool(made.served.loaded.experts) == sparse


def test_ranks_share_experts_only_where_a_sum_of_them_is_all_that_a_module_gives():
    graph = planned("deepseek").graph
    (unit,) = (u for u in graph.units if summing_modules(u))
    assert summing_modules(unit) == ("mlp.experts",) and routed_modules(unit) == ("mlp",)
    assert sums_of(unit, "mlp.experts") and sums_of(unit, "mlp") is None  # shared experts beside
    assert no_expert_sum(graph) is None and no_expert_chain(graph) is None
    looped = planner.trace_serving(cases.Looped(True).eval(), inputs, hardware="h100x1", prompt=16,
                                   output=16, batch=2).graph  # fmt: skip
    assert "no second matmul" in no_expert_chain(looped)  # each of them is one matrix
    assert "modules of a list" in experts_of(looped).uncut and not experts_of(looped).undivided


@pytest.mark.parametrize("pins", [("tp=2", "ep=2"), ("attention_dp=2", "ep=1")])
def test_what_a_module_gives_beside_the_sum_is_not_summed(world, tmp_path, pins):
    """The example's: router and experts in one module, which gives its losses too."""
    model, ids = cases.own_moe()
    plan = planner.trace_serving(model, inputs, hardware="h100x2", fix=pins, precision="fp32",
                                 prompt=16, output=16, batch=3)  # fmt: skip
    plan.save(str(tmp_path / "plan.json"))
    logits, losses = (x.detach() for x in model(ids))
    for said, lost in world.run(2, cases.served_own, str(tmp_path / "plan.json")):
        torch.testing.assert_close(said, logits)
        torch.testing.assert_close(lost, losses)


def test_buffers_of_the_files_are_read_too(tmp_path):
    """A router's bias is one: it says which experts a token has."""
    model, ids = cases.whole("deepseek")
    plain = cases.answer(model, ids)
    biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for b in biases:
        b.copy_(torch.randn(b.shape) * 2)
    wanted = cases.answer(model, ids)
    assert biases and not torch.equal(wanted, plain)
    model.save_pretrained(tmp_path)
    made = planner.serve(cases.bare(model), planned("deepseek"), weights=tmp_path, device="cpu")
    assert torch.equal(cases.answer(made, ids), wanted)


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed():
    held = (Held(block="mlp", tier="nvme", place="stream"),
            Held(block="attention", tier="cpu", place="stream"))  # fmt: skip
    return planned("llama", tiers=held)


def shards(folder):
    """The model's weights in three files and an index."""
    model, ids = cases.whole("llama")
    model.save_pretrained(folder, max_shard_size="200KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    return model, ids, files


def rotten(path):
    """Another header than the bytes' own."""
    raw = bytearray(path.read_bytes())
    raw[8:40] = b"\xff" * 32
    path.write_bytes(raw)


FAULTS = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "rotten": (rotten, "invalid UTF-8 in header"),
    "short": (lambda path: os.truncate(path, path.stat().st_size // 2), "not fully covered"),
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_shard_that_is_missing_or_hurt_is_named_before_anything_runs(tmp_path, streamed, how):
    model, _, files = shards(tmp_path / "weights")
    hurt, said = FAULTS[how]
    hurt(files[1])
    with pytest.raises(PlanError, match=f"cannot read weights from .*{files[1].name}") as fault:
        planner.serve(cases.bare(model), streamed, weights=tmp_path / "weights", device="cpu")
    assert said in fault.value.why


def test_a_shard_without_a_tensor_of_the_model_is_an_error(tmp_path, streamed):
    model, _, files = shards(tmp_path / "weights")
    index = next((tmp_path / "weights").glob("*.index.json"))
    raw = json.loads(index.read_text())
    lost = [n for n, file in raw["weight_map"].items() if file == files[1].name]
    raw["weight_map"] = {n: f for n, f in raw["weight_map"].items() if n not in lost}
    index.write_text(json.dumps(raw))
    files[1].unlink()
    with pytest.raises(PlanError, match=f"lacks {len(lost)} of the model's 39 weights") as fault:
        planner.serve(cases.bare(model), streamed, weights=tmp_path / "weights", device="cpu")
    assert sum(name in str(fault.value) for name in lost) == 5


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.q_proj"])
def test_codes_without_scales_are_no_weights(tmp_path, streamed, name, dtype):
    model, _ = cases.whole("llama")
    held, name = dict(model.state_dict()), f"model.layers.1.{name}.weight"
    save_file(held | {name: (held[name] * 20).to(dtype)}, tmp_path / "model.safetensors")
    word = str(dtype).removeprefix("torch.")
    with pytest.raises(PlanError, match=f"{name} is in {word} in the file"):
        planner.serve(cases.bare(model), streamed, weights=tmp_path, folder=tmp_path / "own",
                      device="cpu")  # fmt: skip


def test_a_loop_by_hand_ends_where_the_plan_does(tmp_path, streamed):
    """Through the model's cache, a token at a time: the plan is for 32."""
    model, ids = cases.whole("llama")
    model.save_pretrained(tmp_path)
    made = planner.serve(cases.bare(model), streamed, weights=tmp_path, device="cpu")
    given, cache = ids, None
    with pytest.raises(PlanError, match="33 tokens in a sequence, the plan has memory for 32"):
        for _ in range(40):
            out = made(given, past_key_values=cache, use_cache=True)
            given, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    assert cache.get_seq_length() == 32


def test_a_users_own_generate_is_limited_by_whatever_name_it_has_for_prompts():
    model = cases.Looped(True).eval()
    model.generate = lambda prompts: prompts
    plan = planner.trace_serving(model, inputs, hardware="h100x1", precision="fp32", prompt=16,
                                 output=16, batch=2)  # fmt: skip
    made = planner.serve(model, plan, device="cpu")
    assert made.generate(prompts=torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16)
    with pytest.raises(PlanError, match="17 tokens in a prompt, the plan has memory for 16"):
        made.generate(prompts=torch.zeros(2, 17, dtype=torch.long))


def test_a_device_that_torch_has_not_is_refused(streamed):
    with pytest.raises(UsageError, match="device='gpu' is no device of torch"):
        planner.serve(cases.whole("llama")[0], streamed, device="gpu")


def test_a_disk_that_is_full_is_an_error_with_its_size(tmp_path, streamed):
    model, _ = cases.whole("llama")
    plan = replace(streamed, serving=replace(streamed.serving, weights=(("mlp", "int8"),)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(PlanError, match=r"cannot write \d+ bytes of weights") as fault:
            planner.serve(copy.deepcopy(model), plan, folder=tmp_path, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "folder=DIR" in fault.value.hints[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot write"):
        planner.serve(copy.deepcopy(model), plan, folder=tmp_path / "file", device="cpu")


def test_an_interrupt_ends_a_call_and_the_next_answers_alike(tmp_path, streamed):
    model, ids = cases.whole("llama")
    wanted = cases.answer(model, ids)
    model.save_pretrained(tmp_path)
    made = planner.serve(cases.bare(model), streamed, weights=tmp_path, device="cpu")
    calls = []

    def press(module, args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    hook = made.model.layers[2].mlp.register_forward_pre_hook(press)
    # a suite that was started in the background hands on that SIGINT is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            cases.answer(made, ids)
    finally:
        signal.signal(signal.SIGINT, before)
    hook.remove()
    assert len(calls) == 6
    assert torch.equal(cases.answer(made, ids), wanted)
    for more, flag in ((ids.repeat(2, 1), "--batch"), (ids.repeat(1, 3), "--prompt")):
        with pytest.raises(PlanError, match="the plan has memory for") as fault:
            cases.answer(made, more)
        assert flag in fault.value.hints[0]
    assert torch.equal(cases.answer(made, ids), wanted)
