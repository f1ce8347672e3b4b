"""Plans of serving, whole: made, saved, read, and run on local ranks as the whole model runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import runtime_cases_serve as cases
import torch
from jsonschema import Draft202012Validator as Validator

import planner
from cost_models.serving_decisions import Held
from ir.errors import GateError, PlanError, UsageError
from planner.schemas import plan_schema
from planner.serving.plan import ServingPlan
from planner.serving.runnable import experts_of
from planner.serving.text import to_text

DIVISIONS = {
    "llama": (("tp=2",), ("tp=4",), ("pp=2",), ("tp=2", "pp=2")),
    "mixtral": (("tp=2", "ep=2"), ("pp=3",)),
    "llama4": (("tp=2", "ep=2"),),
}


def inputs(batch, seq_len):
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plan file of a division of a model, and the model's weights."""
    folders = {}
    for kind in DIVISIONS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        cases.whole(kind)[0].save_pretrained(folders[kind])

    def make(kind, pins=(), ranks=1, batch=2, **changes):
        model, _ = cases.whole(kind)
        plan = planner.trace_serving(
            model, inputs, hardware=f"h100x{ranks}", fix=pins, precision="fp32", prompt=16,
            output=16, batch=batch,
        )  # fmt: skip
        plan = replace(plan, serving=replace(plan.serving, **changes), rows_on_host=3)
        path = folders[kind] / f"{'-'.join(pins) or 'one'}.json"
        plan.save(str(path))
        assert to_text(planner.load(path)) == to_text(plan)
        return str(path), str(folders[kind])

    return make


@pytest.mark.parametrize(
    "kind, pins", [(k, p) for k, rows in DIVISIONS.items() for p in rows],
    ids=[f"{k}-{'-'.join(p)}" for k, rows in DIVISIONS.items() for p in rows],
)  # fmt: skip
@pytest.mark.parametrize("word", ["fp32", "int8"])
def test_ranks_answer_what_the_whole_model_does(world, made, kind, pins, word):
    sizes = dict(pin.split("=") for pin in pins)
    ranks = int(sizes.get("tp", 1)) * int(sizes.get("pp", 1))
    blocks = ("attention", "routed_experts" if kind == "mixtral" else "mlp")
    weights = tuple((b, word) for b in blocks) if word != "fp32" else ()
    path, folder = made(kind, pins, ranks, weights=weights, replicas=1)
    model, ids = cases.whole(kind)
    wanted, logits = cases.answer(model, ids), model(ids).logits
    found = world.run(ranks, cases.served, kind, path, folder)
    size = sum(p.numel() * 4 for p in model.parameters())
    for answers, said, held, _ in found:
        assert held < size / (1.2 if ranks == 2 else 1.8)
        if word == "fp32":
            assert torch.equal(answers, wanted)
            torch.testing.assert_close(said, logits.detach(), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(answers, found[0][0])
            assert float((said - logits.detach()).abs().max()) < 0.05


CACHES = {  # pins of two ranks; gemma's layers see windows
    "llama": ("tp=2",), "gemma": ("pp=2",), "mixtral": ("attention_dp=2", "ep=2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CACHES)
def test_ranks_answer_alike_whatever_cache_a_call_has(world, tmp_path, kind):
    """A loop by hand that brings none, one's own, one of a fixed size, none at all, one of an
    earlier call: a stage has its own layers of it, a rank of tp its own heads."""
    model, ids = cases.whole(kind)
    model.save_pretrained(tmp_path)
    plan = planner.trace_serving(model, inputs, hardware="h100x2", fix=CACHES[kind], batch=2,
                                 precision="fp32", prompt=16, output=16)  # fmt: skip
    plan.save(str(tmp_path / "plan.json"))
    wanted = cases.ways(model, ids)
    found = world.run(2, cases.served_ways, kind, str(tmp_path / "plan.json"), str(tmp_path))
    assert [{way: torch.equal(told[way], wanted[way]) for way in wanted} for told in found] == [
        dict.fromkeys(wanted, True)
    ] * 2


def test_a_cache_that_is_not_kept_as_planned_is_refused():
    """A window, or fewer bits, holds for loops by hand too; another cache is no silent exchange."""
    from transformers import DynamicCache

    model, ids = cases.whole("llama")
    plan = planner.trace_serving(model, inputs, hardware="h100x1", kv_window=4, precision="fp32",
                                 fix=("kv=int8",), prompt=16, output=16, batch=2)  # fmt: skip
    made = planner.serve(model, plan, device="cpu")
    kept = made(ids).past_key_values
    assert {type(layer).__name__ for layer in kept.layers} == {"Int8DynamicSlidingWindowLayer"}
    assert made(ids[:, :1], past_key_values=kept).past_key_values is kept
    assert made(ids, use_cache=False).past_key_values is None
    said = "the plan keeps its cache in int8, as 4 tokens"
    with pytest.raises(PlanError, match=f"past_key_values=DynamicCache, and {said}"):
        made(ids, past_key_values=DynamicCache())
    with pytest.raises(PlanError, match=f"past_key_values=DynamicCache, and {said}"):
        cases.answer(made, ids, past_key_values=DynamicCache())
    with pytest.raises(PlanError, match=f"cache_implementation='static', and {said}"):
        cases.answer(made, ids, cache_implementation="static")
    made.generation_config.cache_implementation = "static"  # a model's own, as Gemma's has it
    assert cases.answer(made, ids).shape == (2, 15)


TIERED = {
    "llama": (
        (Held(block="mlp", tier="cpu", place="stream", resident=1),),
        (Held(block="mlp", tier="nvme", place="stream"),
         Held(block="attention", tier="cpu", place="compute", resident=1)),
        (Held(block="embeddings", tier="cpu", place="compute"),
         Held(block="head", tier="cpu", place="stream")),
    ),
    "mixtral": (
        (Held(block="routed_experts", tier="cpu", place="stream", resident=1),),
        (Held(block="routed_experts", tier="cpu", place="compute", resident=2),),
        (Held(block="routed_experts", tier="nvme", place="stream"),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind, at", [(k, i) for k, rows in TIERED.items() for i in range(3)])
def test_tiers_answer_what_the_whole_model_does(made, tmp_path, kind, at):
    path, folder = made(kind, tiers=TIERED[kind][at])
    model, ids = cases.whole(kind)
    answers, logits, held, names = cases.served(0, kind, path, folder, tmp_path)
    assert torch.equal(answers, cases.answer(model, ids))
    torch.testing.assert_close(logits, model(ids).logits.detach(), rtol=1e-5, atol=1e-6)
    assert names == [n for n, _ in model.named_parameters()]
    assert held < sum(p.numel() * 4 for p in model.parameters())


OVER_RANKS = {  # model, pins, ranks: how its experts lie; a batch of one prompt
    "sliced, on disk": ("mixtral", ("tp=4", "ep=2"), 4, ("nvme", "stream", 1)),
    "sliced, on the host": ("mixtral", ("tp=2", "ep=1"), 2, ("cpu", "compute", 1)),
    "whole, streamed": ("gpt_oss", ("tp=2", "ep=2"), 2, ("cpu", "stream", 0)),
}


@pytest.mark.parametrize("how", OVER_RANKS)
def test_experts_over_ranks_lie_on_any_tier(world, tmp_path, how):
    kind, pins, ranks, (tier, place, resident) = OVER_RANKS[how]
    model, ids = cases.whole(kind)
    model.save_pretrained(tmp_path / "weights")
    held = Held(block="routed_experts", tier=tier, place=place, resident=resident)
    plan = planner.trace_serving(model, inputs, hardware=f"h100x{ranks}", fix=pins,
                                 precision="fp32", prompt=16, output=16, batch=2)  # fmt: skip
    plan = replace(plan, serving=replace(plan.serving, tiers=(held,)), rows_on_host=3)
    plan.save(str(tmp_path / "plan.json"))
    given = (kind, str(tmp_path / "plan.json"), str(tmp_path / "weights"), tmp_path)
    found = world.run(ranks, cases.served_one, *given)
    experts = [p.numel() for n, p in model.named_parameters() if ".experts." in n]
    for answers, below, count in found:
        assert torch.equal(answers, cases.answer(model, ids[:1]))
        assert count == 4 // plan.serving.ep  # each rank its experts, of each its slice
        least = sum(experts) * 4 // ranks
        assert least <= below <= least * 1.01  # biases are rounded up to whole cache lines
    if (kind, tier) == ("mixtral", "nvme"):
        assert (tmp_path / "rank3").is_dir()


APART = {  # pins, ranks, tiers, sequences in the cache of each rank that has three
    "slices": (("attention_dp=2", "ep=1"), 2, (), [2, 1]),
    "both, below": (("tp=2", "attention_dp=2", "ep=2"), 4, TIERED["mixtral"][0], [2, 2, 1, 1]),
}


@pytest.mark.parametrize("how", APART)
def test_replicas_of_attention_answer_as_one(world, made, tmp_path, how):
    """A batch that does not divide, one smaller than the ranks, a prompt that ends before others;
    a rank keeps its own prompts' cache alone."""
    pins, ranks, tiers, held = APART[how]
    path, folder = made("mixtral", pins, ranks, tiers=tiers, replicas=1, batch=4)
    model, ids = cases.whole("mixtral")
    ids = torch.cat([ids, ids[:1].flip(1)])
    ends = int(cases.answer(model, ids)[1, 9])
    wanted = cases.answer(model, ids, eos_token_id=ends)
    assert (wanted[1, 10:] == 0).all() and not (wanted[::2, 10:] == 0).any()
    torch.manual_seed(1)
    drawn = model.generate(ids, max_new_tokens=8, do_sample=True, pad_token_id=0)
    found = world.run(ranks, cases.served_apart, "mixtral", path, folder, tmp_path, ends)
    for alone, answers, sampled, _ in found:
        assert torch.equal(alone, cases.answer(model, ids[:1]))
        assert torch.equal(answers, wanted) and torch.equal(sampled, drawn)
    assert [sequences for *_, sequences in found] == held


def test_what_our_runtime_cannot_serve_is_not_planned():
    model, _ = cases.whole("llama")
    with pytest.raises(UsageError) as fault:
        planner.trace_serving(model, inputs, hardware="h100x2", fix=("attention_dp=2",), prompt=16)
    assert "the model has none" in fault.value.why
    model, _ = cases.whole("mixtral")
    with pytest.raises(UsageError, match="cannot be divided") as fault:
        planner.trace_serving(model, inputs, hardware="h100x2", fix=("prefill_chunk=8",),
                              prompt=16, output=16)  # fmt: skip
    assert "whole" in fault.value.why
    plan = planner.trace_serving(model, inputs, hardware="h100x2", fix=("tp=2", "kv=fp8"),
                                 engine="vllm", prompt=16, output=16)  # fmt: skip
    assert (plan.serving.tp, plan.serving.kv) == (2, "fp8")
    graph = planner.trace_serving(cases.gpt_oss(), inputs, hardware="h100x1", prompt=16,
                                  output=16).graph  # fmt: skip
    assert "biases" in experts_of(graph).uncut and not experts_of(graph).undivided


def test_another_model_and_another_job_are_refused(made):
    path, _ = made("llama")
    plan = planner.load(path)
    assert isinstance(plan, ServingPlan)
    with pytest.raises(GateError, match="in the plan"):
        planner.serve(cases.llama(intermediate_size=96), plan, device="cpu")
    path, _ = made("llama", ("tp=2",), 2, replicas=1)
    with pytest.raises(PlanError, match="runs on 2 GPUs, this job has 1"):
        planner.serve(cases.llama(), planner.load(path), device="cpu")
    with pytest.raises(PlanError, match="plan of serving"):
        from planner.plan import load

        load(path)


def test_two_plans_are_compared(made, plan):
    """What differs is said by block, figures are each plan's own, and a gate reads them."""
    first, _ = made("llama", ("tp=2",), 2, replicas=1)
    second, _ = made("llama", ("pp=2",), 2, replicas=1, weights=(("mlp", "int8"),))
    for path in (first, second):
        assert not [*Validator(plan_schema()).iter_errors(json.loads(Path(path).read_text()))]
    assert not json.loads(plan("diff", first, first, "--json")[1])["differs"]
    code, text, _ = plan("diff", first, second, "--json", "--detailed-exitcode")
    found = json.loads(text)
    assert code == 2
    changed = {c["what"]: (c["old"], c["new"]) for c in found["decisions"]}
    assert changed["tp"] == ("2", "1") and changed["pp"] == ("1", "2")
    assert not {"ep", "etp"} & {*changed}  # it has no experts
    assert [(c["what"], c["old"], c["new"]) for c in found["blocks"]] == [("mlp", "fp32", "int8")]
    for at, path in (("old", first), ("new", second)):
        shown = json.loads(plan("show", path, "--json")[1])["estimate"]
        for number in found["numbers"]:
            assert number[at] == pytest.approx(shown[number["name"]], abs=1)
    assert plan("diff", second, first, "--fail-on", "step-time=+3%")[0] == 64
    worse = next(n for n in found["numbers"] if n["name"] == "ttft_s")["change"] > 0
    assert plan("diff", first, second, "--fail-on", "ttft=+0%")[0] == (4 if worse else 0)


def test_a_block_that_the_model_lacks_is_refused(made, plan):
    """A tier, or a format, of experts in a dense model: of an edited plan."""
    held = (Held(block="routed_experts", tier="cpu", place="stream"),)
    for changes in ({"tiers": held}, {"weights": (("shared_experts", "int8"),)}):
        path, _ = made("llama", **changes)
        code, _, err = plan("show", path)
        assert code == 1 and "LlamaForCausalLM has none" in err and "its blocks: attention" in err
        with pytest.raises(PlanError, match="has none"):
            planner.serve(cases.llama(), planner.load(path), device="cpu")
