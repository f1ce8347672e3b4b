"""Weights on local ranks: recorded, drawn, read and written."""

import os

import pytest
import runtime_cases_weights as cases
import torch
from runtime_cases_weights import assert_parts_of, planned
from safetensors.torch import save_file
from torch import nn

import planner
from ir.errors import PlanError
from planner.runtime.init import seed_of
from planner.runtime.meta import meta
from planner.runtime.tape import Replay, made
from planner.runtime.weights import weights_of

# ---- recording


class Filled(nn.Module):
    """Weights that are filled in every way that is met."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 32)
        self.embed = nn.Embedding(10, 16, padding_idx=2)
        self.norm = nn.LayerNorm(16)
        self.scaled = nn.Parameter(torch.randn(8, 8) * 0.02)
        self.full = nn.Parameter(torch.full((3,), 2.5))
        rotated = torch.empty(6, 6)
        nn.init.orthogonal_(rotated)
        self.rotated = nn.Parameter(rotated)
        self.rows = nn.Linear(16, 16)
        self.rows.weight.data.normal_(0, 0.5)
        with torch.no_grad():
            self.rows.weight[3] = 7.0
        self.tied = nn.Linear(16, 10, bias=False)
        self.tied.weight = self.embed.weight
        self.copied = nn.Parameter(self.scaled.detach().clone() * 3)
        self.replaced = nn.Linear(4, 4)
        self.replaced.weight.data = torch.eye(4) * 2
        self.large = nn.Parameter(torch.zeros(3000, 2000))
        self.short = nn.Parameter(nn.init.trunc_normal_(torch.empty(64, 64), std=0.02))
        self.late = nn.Parameter(torch.Tensor(4, 4))
        nn.init.xavier_uniform_(self.late)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2)
        self.register_buffer("table", torch.arange(5.0).cos(), persistent=False)
        self.register_buffer("mask", torch.tril(torch.ones(2100, 2100)), persistent=False)
        self.register_buffer("at", torch.zeros(3, device=self.linear.weight.device))
        self.register_buffer("average", self.scaled.detach().clone())


def hollow(factory):
    with meta():
        return factory()


def test_what_fills_a_parameter_is_recorded():
    model = hollow(Filled)
    assert all(p.is_meta for p in model.parameters())
    assert model.tied.weight is model.embed.weight
    found = cases.one_by_one(model, 0)
    torch.manual_seed(seed_of(0, "linear.weight"))
    weight = nn.init.kaiming_uniform_(torch.empty(32, 16), a=5**0.5)
    assert torch.equal(found["linear.weight"], weight)  # the same code on the same numbers
    torch.manual_seed(seed_of(0, "scaled#0"))
    assert torch.equal(found["scaled"], torch.randn(8, 8) * 0.02)
    assert torch.equal(found["copied"], found["scaled"] * 3)
    assert torch.equal(found["average"], found["scaled"])
    assert torch.equal(found["full"], torch.full((3,), 2.5))
    assert torch.equal(found["replaced.weight"], torch.eye(4) * 2)
    assert torch.equal(found["norm.weight"], torch.ones(16))
    assert not found["embed.weight"][2].any() and found["embed.weight"][1].any()
    assert (found["rows.weight"][3] == 7).all() and (found["rows.weight"][2] != 7).all()
    torch.testing.assert_close(found["rotated"] @ found["rotated"].T, torch.eye(6))
    assert found["short"].abs().max() <= 2 and 0.015 < found["short"].std() < 0.025
    assert not any(x.isnan().any() for x in found.values())
    assert torch.equal(model.table, torch.arange(5.0).cos()) and model.mask[1, :3].tolist() == [
        1, 1, 0,
    ]  # fmt: skip
    other = cases.one_by_one(model, 1)
    assert not torch.equal(found["linear.weight"], other["linear.weight"])


@pytest.mark.parametrize("name", ["mixtral", "hf_llama"])
def test_transformers_initialisation_is_recorded(name):
    model = hollow(cases.MODELS[name])
    torch.manual_seed(0)
    real = dict(cases.MODELS[name]().named_parameters())
    for key, x in cases.one_by_one(model, 0).items():
        assert x.shape == real[key].shape and x.dtype == real[key].dtype
        assert abs(x.mean() - real[key].mean()) < 0.01, key
        assert abs(x.std() - real[key].std()) < 0.01, key


def test_what_is_read_while_building_is_refused():
    def factory():
        layer = nn.Linear(4, 4)
        return layer if layer.weight.sum().item() > 0 else nn.Linear(4, 2)

    with pytest.raises(PlanError, match="item reads the values of a parameter"):
        hollow(factory)


def test_parameters_that_nothing_fills_are_known():
    model = hollow(lambda: nn.ParameterDict({"w": nn.Parameter(torch.empty(3))}))
    from planner.runtime.init import _is_filled

    assert not _is_filled(made(model["w"]))
    replay = Replay(seed_of=lambda _: 0, device=torch.device("cpu"))
    assert replay.make(made(model["w"])).isnan().all()


def test_a_hollow_model_is_pickled_and_copied():
    import copy
    import pickle

    model = hollow(Filled)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert weights_of(model).aliases == {"tied.weight": "embed.weight"}


def test_meta_is_in_the_interface():
    with planner.meta():
        model = nn.Linear(3, 3)
    assert model.weight.is_meta


# ---- the same weights under any plan


def test_weights_are_the_same_on_any_mesh(world):
    plans = [
        ("llama", planned("llama", dp=4)),
        ("llama", planned("llama", tp=2, dp=2)),
        ("llama", planned("llama", tp=2, pp=2)),
        ("gpt", planned("gpt", tp=2, dp=2)),
        ("gpt", planned("gpt", pp=2, dp=2)),
        ("moe", planned("moe", dp=4, ep=2)),
    ]
    found = world.run(4, cases.drawn, plans, 5)
    for i, (name, _) in enumerate(plans):
        assert_parts_of([rank[i] for rank in found], cases.one_by_one(cases.hollow(name)[0], 5))
    fused = [n for n, _, _ in found[0][3] if n == "layers.0.attn.c_attn.weight"]
    assert len(fused) == 2  # a data rank's half of its rows of q, k and v: q and some of k
    three = [("llama", planned("llama", dp=3))]
    found = world.run(3, cases.drawn, three, 5)  # 256 rows on three ranks
    assert_parts_of([r[0] for r in found], cases.one_by_one(cases.hollow("llama")[0], 5))


def test_real_weights_are_kept(world):
    for name, how in (("llama", {"tp": 2, "dp": 2}), ("gpt", {"tp": 2, "pp": 2})):
        assert world.run(4, cases.kept, name, planned(name, **how)) == [[]] * 4


# ---- safetensors


def stored(model, path, rename=lambda n: n, files=1):
    """Write a model's weights as files, a shared one once."""
    seen, found = set(), {}
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in seen:
            seen.add(id(x))
            found[rename(name)] = x.detach().clone()
    names = sorted(found)
    if files == 1:
        save_file(found, path)
    for i in range(files if files > 1 else 0):
        save_file({n: found[n] for n in names[i::files]}, path / f"part-{i}.safetensors")
    return sum(x.numel() * x.element_size() for x in found.values())


def test_each_rank_reads_its_own_parts(world, tmp_path):
    model = cases.built("llama")[0]
    folder = tmp_path / "several"
    folder.mkdir()
    size = stored(model, folder, files=3)
    reference = {n: p.detach() for n, p in model.named_parameters()}
    sharded = planned("llama", tp=2, dp=2)
    for read, held, wrong in world.run(4, cases.loaded, "llama", sharded, str(folder), reference):
        assert wrong == [] and read == held < 0.5 * size
    file = tmp_path / "one.safetensors"  # of a wrapper, whose names have a part more
    stored(model, file, rename="module.{}".format)
    staged = planned("llama", tp=2, pp=2)
    for read, held, wrong in world.run(4, cases.loaded, "llama", staged, str(file), reference):
        assert wrong == [] and read == held < 0.6 * size


def test_transformers_checkpoints_are_read(world, tmp_path):
    mixtral = cases.hf_mixtral()
    mixtral.save_pretrained(tmp_path / "mixtral", max_shard_size="30KB")  # experts one by one
    assert (tmp_path / "mixtral" / "model.safetensors.index.json").exists()
    size = sum(p.numel() * 4 for p in mixtral.parameters())
    reference = {n: p.detach() for n, p in mixtral.named_parameters()}
    plan = planned("mixtral", dp=2, ep=2)
    for read, held, wrong in world.run(
        2, cases.loaded, "mixtral", plan, str(tmp_path / "mixtral"), reference
    ):
        assert wrong == [] and read == held < 0.52 * size
    llama = cases.hf_llama()
    llama.model.save_pretrained(tmp_path / "base")  # without "model." and without the tied head
    reference = {n: p.detach() for n, p in llama.named_parameters()}
    plan = planned("hf_llama", tp=2)
    file = str(tmp_path / "base" / "model.safetensors")
    for _, _, wrong in world.run(2, cases.loaded, "hf_llama", plan, file, reference):
        assert wrong == []


def test_weights_are_written_for_others(world, tmp_path):
    from transformers import MixtralForCausalLM

    plan, folder = planned("mixtral", dp=2, ep=2), tmp_path / "out"
    world.run(2, cases.exported, "mixtral", plan, str(folder))
    assert os.listdir(tmp_path) == ["out"]
    cases.hf_mixtral().config.save_pretrained(folder)
    model = MixtralForCausalLM.from_pretrained(folder)
    whole = cases.one_by_one(hollow(cases.hf_mixtral), 0)
    for name, x in model.named_parameters():
        assert torch.equal(x, whole[name]), name


def test_a_tie_is_read_under_either_name(world, tmp_path):
    model = cases.built("gpt")[0]
    reference = {n: p.detach() for n, p in model.named_parameters()}
    plan = planned("gpt", tp=2)
    alias, owner = plan.graph.tied[0]
    stored(model, tmp_path / "a.safetensors", rename=lambda n: alias if n == owner else n)
    for _, _, wrong in world.run(
        2, cases.loaded, "gpt", plan, str(tmp_path / "a.safetensors"), reference
    ):
        assert wrong == []


def test_files_that_do_not_fit_are_refused_on_every_rank(world, tmp_path):
    model = cases.built("llama")[0]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    changed = {
        "missing": {n: x for n, x in weights.items() if "w1" not in n},
        "extra": {**weights, "layers.0.bias": torch.zeros(3)},
        "shape": {**weights, "norm.weight": torch.zeros(65)},
    }
    paths = {}
    for name, tensors in changed.items():
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_file(tensors, paths[name])
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    paths |= {"none": str(tmp_path / "none"), "bad": str(tmp_path / "bad.safetensors")}
    plan = planned("llama", dp=2)
    for found in world.run(2, cases.misloaded, plan, paths):
        said = {name: lines and lines[1] for name, lines in found.items()}
        assert said["missing"].startswith(f"error: {paths['missing']} lacks 4 of the model's 39")
        assert "layers.0.feed_forward.w1.weight" in said["missing"]
        assert "holds 1 weights that the model does not have: layers.0.bias" in said["extra"]
        assert "norm.weight is [65] in the file, [64] in the model" in said["shape"]
        assert said["none"] == f"error: there are no weights at {paths['none']}"
        assert said["bad"] == f"error: cannot read weights from {paths['bad']}"
        assert found["extra allowed"] is None
