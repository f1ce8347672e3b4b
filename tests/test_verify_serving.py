"""`plan verify` of plans of serving: a twin answers as the unsharded model does, or it is said."""

import json
from dataclasses import replace

import pytest

from cost_models.serving_decisions import Held
from ir.errors import PlanError
from planner.plan import load_plan
from planner.runtime.serve import verify
from planner.runtime.serve.twin import make_serving_twin

pytestmark = pytest.mark.usefixtures("world")  # whose server forks the workers of `plan verify`
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": None, "max_position_embeddings": 64,
    "use_mtp": True,  # as MiniMax-M2.5's; transformers' model has no layers that draft
}  # fmt: skip
LOAD = ("--prompt", 16, "--output", 16, "--batch", 2)


@pytest.fixture
def made(plan, tmp_path):
    """A plan file of a division, and the configuration's path."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def make(gpus, *options):
        code, _, err = plan("trace", "config.json", "--task", "serve", "--hardware",
                            f"h100x{gpus}", *LOAD, "-o", "p.json", *options)  # fmt: skip
        assert code == 0, err
        return load_plan("p.json")

    return make


def test_lossy_ranks_answer_in_their_formats_and_the_loss_is_said(plan, made):
    made(2, "--fix", "attention_dp=2", "--fix", "etp=2", "--fix", "weights=int8", "--allow", "int8")
    code, out, err = plan("verify", "p.json", "--model", "config.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["holds"] and found["ranks"] == 2 and found["same_tokens"] == 1.0
    assert found["error"] < 1e-5 < found["lossy"]["error"] < 0.1
    assert 0.5 < found["lossy"]["same_choices"] <= 1.0
    code, _, err = plan("verify", "p.json", "--model", "config.json", "--processes", 1)
    assert code == 64 and "--processes" in err


def test_tiers_answer_token_for_token_and_a_wrong_weight_does_not(plan, made, monkeypatch):
    whole = made(1)
    tiers = (Held(block="routed_experts", tier="cpu", place="stream", resident=2),
             Held(block="attention", tier="nvme", place="stream", resident=2))  # fmt: skip
    whole = replace(whole, serving=replace(whole.serving, tiers=tiers))
    twin = make_serving_twin(whole, "config.json", {}, {}, 1)
    assert [h.resident for h in twin.plan.serving.tiers] == [2, 1] and twin.ranks == 1
    found, tokens = verify.on_rank(0, twin.plan, twin.recipe)
    assert found.holds and found.error < 1e-6 and not found.lossy and tokens.shape == (2, 16)

    for changes in ({"kv": "int8", "kv_window": 6}, {"kv_window": 6, "kv_policy": "summary:3"},
                    {"kv_window": 6, "kv_policy": "retrieve:1x3"}):  # fmt: skip
        lossy = replace(twin.plan, serving=replace(twin.plan.serving, **changes))
        found, _ = verify.on_rank(0, lossy, twin.recipe)
        assert found.holds and found.error < 1e-6 and found.lossy_error > 1e-4

    def hurt(model, *args, **kwargs):
        model.model.norm.weight.data[:32] *= 2
        return serve(model, *args, **kwargs)

    serve = verify.serve
    monkeypatch.setattr(verify, "serve", hurt)
    found, _ = verify.on_rank(0, twin.plan, twin.recipe)
    assert not found.holds and found.error > 0.01

    class World:
        def run(self, ranks, function, *args):
            return [function(rank, *args) for rank in range(ranks)]

        def __enter__(self):
            return self

        def __exit__(self, *fault):
            return None

    monkeypatch.setattr("planner.runtime.world.local_world", lambda preload: World())
    code, out, err = plan("verify", "p.json", "--model", "config.json")
    assert code == 4 and "differs" in out and "does not answer" in err


def test_what_our_runtime_does_not_serve_is_refused(made):
    other = made(2, "--engine", "vllm", "--fix", "tp=2", "--fix", "prefill_chunk=8")
    with pytest.raises(PlanError, match="runs on vllm, not on our runtime"):
        make_serving_twin(other, "config.json", {}, {}, 32)
