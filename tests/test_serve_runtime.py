"""Weights below the device and in fewer bits: the served model says what the whole model says."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import planner
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_shapes import Attend
from ir.errors import PlanError, UsageError
from planner.runtime.serve import packed
from planner.runtime.serve.bytes import Block, File, OnDisk, offsets_of
from planner.runtime.serve.core import Limits, serve_here
from planner.runtime.serve.kv import Kv, cache_of, kv_bytes
from planner.runtime.serve.lent import Spec
from planner.runtime.serve.loader import Laid
from planner.runtime.serve.packed import FORMATS, Packed, pack
from planner.runtime.serve.ring import Ring
from planner.runtime.weights import weights_of

TOKENS = 8
BITS = {"int8": 8, "fp8": 8, "int4": 4, "fp4": 4}


def llama(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, tie_word_embeddings=tied,
    )).eval()  # fmt: skip


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, num_local_experts=6, num_experts_per_tok=2,
        sliding_window=None,
    )).eval()  # fmt: skip


MODELS = {"llama": llama, "tied": lambda: llama(True), "mixtral": mixtral}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each model: itself, its folder, prompts and what it answers."""
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, folder = make(), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        ids = torch.randint(0, 96, (2, 7))
        found[name] = model, folder, ids, answer(model, ids)
    return found


def answer(model, ids, **options):
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, **options)


def units(model):
    layers = [(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)]
    return [("model.embed_tokens", model.model.embed_tokens), *layers,
            ("model.norm", model.model.norm), ("lm_head", model.lm_head)]  # fmt: skip


def laid(tier="gpu", how="resident", word="", experts=None):
    """All matrices of the layers, and the embedding where it streams."""

    def rule(name):
        if ".experts." in name:
            return Laid(word=word, tier=tier, how=how, experts=experts)
        if "proj" in name:
            return Laid(word=word, tier=tier, how=how)
        return Laid(tier=tier, how=how) if "embed" in name and how == "stream" else Laid()

    return rule


def served(model, rule, *, files=None, folder=None, kv=None, batch=4):
    return serve_here(
        model, units(model), rule, weights=weights_of(model), files=files, folder=folder,
        device=torch.device("cpu"), kv=kv or Kv(), limits=Limits(batch=batch, prompt=16, tokens=40),
    )  # fmt: skip


def bare(model):
    with planner.meta():
        made = type(model)(model.config)
    made.generation_config = model.generation_config
    return made.eval()


PACKED = [
    *(("llama", "gpu", "resident", word) for word in FORMATS),
    *(("mixtral", "cpu", "stream", word) for word in FORMATS),
    ("llama", "cpu", "compute", "int8"), ("llama", "nvme", "stream", "int4"),
    ("mixtral", "cpu", "compute", "int8"), ("mixtral", "nvme", "stream", "fp4"),
]  # fmt: skip
TIERS = [("gpu", "resident"), ("cpu", "stream"), ("cpu", "compute"), ("nvme", "stream")]


@pytest.mark.parametrize("tier, how", TIERS, ids=[f"{t}-{h}" for t, h in TIERS])
@pytest.mark.parametrize("built", ["real", "meta"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_the_whole_models(saved, tmp_path, name, built, tier, how):
    whole, folder, ids, wanted = saved[name]
    model = bare(whole) if built == "meta" else copy.deepcopy(whole)
    found = served(model, laid(tier, how, experts=2), files=folder if built == "meta" else None,
                   folder=tmp_path).loaded  # fmt: skip
    assert torch.equal(answer(model, ids), wanted)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    size = sum(p.numel() * 4 for p in whole.parameters())
    if tier == "gpu":
        assert (found.device_bytes, found.host_bytes, found.disk_bytes) == (size, 0, 0)
    else:
        assert found.device_bytes < size
        assert (found.host_bytes > 0, found.disk_bytes > 0) == (tier == "cpu", tier == "nvme")
    if tier == "nvme":  # what the user's files hold as it is wanted is read there
        assert bool(list(tmp_path.iterdir())) == (built == "real")


@pytest.mark.parametrize("name, tier, how, word", PACKED)
def test_packed_weights_compute_what_their_values_do(saved, tmp_path, name, tier, how, word):
    whole, folder, ids, _ = saved[name]
    values = copy.deepcopy(whole)
    for path, p in values.named_parameters():
        if "proj" in path:
            p.data = pack(p.data, word).whole()
    model = bare(whole)
    found = served(model, laid(tier, how, word, 2), files=folder, folder=tmp_path).loaded
    torch.testing.assert_close(model(ids).logits, values(ids).logits, rtol=1e-5, atol=1e-6)
    packed = sum(p.numel() for n, p in whole.named_parameters() if "proj" in n)
    held = found.device_bytes + found.host_bytes + found.disk_bytes
    rest = sum(p.numel() * 4 for n, p in whole.named_parameters() if "proj" not in n)
    if tier == "gpu":
        assert packed * BITS[word] / 8 < held - rest < packed * (BITS[word] + 1.6) / 8


@pytest.mark.parametrize("word", FORMATS)
def test_a_packed_tensor_is_read_as_its_values(word):
    torch.manual_seed(1)
    stack = torch.randn(3, 64, 128)
    found = pack(stack, word)
    whole = found.whole()
    error = float((whole - stack).norm() / stack.norm())
    assert error < {"int8": 0.01, "fp8": 0.03, "int4": 0.11, "fp4": 0.11}[word]
    index = torch.tensor(2)
    assert isinstance(found[index], Packed) and torch.equal(found[index].whole(), whole[2])
    assert torch.equal(found + 1, whole + 1)
    one, x, bias = found[1], torch.randn(2, 5, 128), torch.randn(64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            wanted = functional.linear(x, whole[1], bias)
            torch.testing.assert_close(functional.linear(x, one, bias), wanted)
    rows, ends = torch.randn(7, 128), torch.tensor([3, 3, 6], dtype=torch.int32)
    with torch.no_grad():  # the second of three experts has no row, the last row no expert
        products = functional.grouped_mm(rows, found.transpose(-2, -1), offs=ends)
        upright = functional.grouped_mm(rows[:, :64], found, offs=ends)
    torch.testing.assert_close(products[:3], rows[:3] @ whole[0].T)
    torch.testing.assert_close(products[3:6], rows[3:6] @ whole[2].T)
    torch.testing.assert_close(upright[3:6], rows[3:6, :64] @ whole[2])
    ids = torch.tensor([[1, 2], [5, 63]])
    assert torch.equal(functional.embedding(ids, one), functional.embedding(ids, whole[1]))
    assert found.held_bytes < stack.numel() * (BITS[word] + 1.6) / 8


def test_columns_that_no_group_divides_are_refused():
    with pytest.raises(UsageError, match="groups of 32"):
        pack(torch.ones(4, 40), "int4")
    with pytest.raises(UsageError, match="unknown format"):
        pack(torch.ones(4, 64), "int3")


def test_hot_experts_stay_on_the_device(saved):
    """The more experts stay, the fewer come; with all of them none does."""
    whole, _, ids, wanted = saved["mixtral"]
    brought = []
    for slots in (0, 2, 4, 6):
        model = copy.deepcopy(whole)
        found = served(model, laid("cpu", "stream", experts=slots)).loaded
        assert torch.equal(answer(model, ids), wanted)
        brought.append(sum(e.report.brought for e in found.experts.values()))
    assert brought == sorted(brought, reverse=True) and brought[-1] == 0 < brought[0]


def test_an_expert_asked_for_more_often_takes_a_place(saved):
    whole, _, _, _ = saved["mixtral"]
    model = copy.deepcopy(whole)
    experts = next(iter(served(model, laid("cpu", "stream", experts=2)).loaded.experts.values()))
    experts.counts.clear()
    name = experts.names[0]
    for _ in range(3):
        experts.take(name, 5)
    before = experts.report.brought
    experts.take(name, 5)
    assert experts.report.brought == before and experts.report.resident > 0


def test_the_next_block_comes_while_one_is_used():
    """Of a cycle of blocks each is copied once a turn, in two slots, and never under a reader."""
    blocks = [Block((), torch.full((64,), k, dtype=torch.uint8)) for k in range(5)]
    for block in blocks:
        assert block.host is not None
    held = [Block((_Held(b.host),), b.host) for b in blocks]
    ring = Ring(held, torch.device("cpu"))
    for turn in range(3):
        for index in range(5):
            with ring.use(index) as slot:
                assert ring.memory(slot).eq(index).all(), turn
    ring.close()
    assert 15 <= ring.report.copies <= 16 and ring.held_bytes == 128
    again = Ring(held, torch.device("cpu"))  # out of order, one inside another
    with again.use(3) as a, again.use(1) as b, again.use(4) as c:
        for slot, index in ((a, 3), (b, 1), (c, 4)):
            assert again.memory(slot).eq(index).all()
    again.close()


class _Held:
    def __init__(self, held):
        self.held, self.size_bytes = held, held.numel()

    def read(self, into):
        into.copy_(self.held)


HURT = {
    "gone": lambda path: path.unlink(),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "replaced": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
}


@pytest.mark.parametrize("how", HURT)
def test_a_file_that_is_hurt_as_the_model_runs_is_an_error_and_no_token(saved, tmp_path, how):
    whole, _, ids, _ = saved["llama"]
    folder = tmp_path / "weights"
    whole.save_pretrained(folder)
    model = bare(whole)
    served(model, laid("nvme", "stream"), files=folder)
    steps = []

    def hurt(module, args):
        steps.append(1)
        if len(steps) == 3:
            HURT[how](folder / "model.safetensors")

    model.model.norm.register_forward_pre_hook(hurt)
    with pytest.raises(PlanError, match=r"file of weights .*model\.safetensors"):
        answer(model, ids)
    assert len(steps) <= 4


def test_a_file_that_lacks_bytes_is_refused_before_anything_runs(tmp_path):
    path = tmp_path / "model.safetensors"
    from safetensors.torch import save_file

    save_file({"w": torch.ones(64, 64)}, path)
    assert offsets_of(path)["w"][1:] == (64 * 64 * 4, "F32")
    os.truncate(path, 1000)
    with pytest.raises(PlanError, match="cannot read weights") as fault:
        offsets_of(path)
    assert "lies behind its end" in fault.value.why
    with pytest.raises(PlanError, match="ends early"):
        OnDisk(File(path), 900, 200).read(torch.empty(200, dtype=torch.uint8))


def test_keys_and_values_in_fewer_bits_and_a_window(saved):
    whole, _, ids, wanted = saved["llama"]
    plain = None
    for kv in (Kv(), Kv(word="fp8"), Kv(word="int8"), Kv(window=5), Kv(window=5, word="int8")):
        model = copy.deepcopy(whole)
        served(model, laid(), kv=kv)
        cache = cache_of(model, kv)
        logits = model(ids, past_key_values=cache).logits
        size = kv_bytes(cache)
        plain = plain or size
        # 4 layers, keys and values, 2 sequences, 2 heads of 16, tokens; a scale a token and head
        tokens, each = (4 if kv.window else 7), (16 + 4 if kv.word != "bf16" else 16 * 4)
        assert size == 4 * 2 * 2 * 2 * tokens * each
        error = float((logits - whole(ids).logits).detach().abs().max())
        assert error == 0 if kv.word == "bf16" else 0 < error < 0.02
        same = float((answer(model, ids) == wanted).float().mean())
        assert same == 1.0 if kv == Kv() else same > 0.3
        assert answer(model, ids[:1], num_beams=3).shape[1] <= 15
        torch.manual_seed(3)
        assert answer(model, ids, do_sample=True).shape == wanted.shape


def test_what_the_plan_has_no_memory_for_is_refused(saved):
    whole, _, ids, _ = saved["llama"]
    model = copy.deepcopy(whole)
    served(model, laid())
    with pytest.raises(PlanError, match="6 sequences at once, the plan has memory for 4"):
        answer(model, ids.repeat(3, 1))
    with pytest.raises(PlanError, match="21 tokens in a prompt, the plan has memory for 16"):
        answer(model, ids.repeat(1, 3))
    with pytest.raises(PlanError, match="57 tokens in a sequence, the plan has memory for 40"):
        answer(model, ids, max_new_tokens=50)
    with pytest.raises(PlanError, match="5 sequences"):
        model(torch.zeros(5, 3, dtype=torch.long))


def test_a_models_own_cache_keeps_its_format():
    model = nn.Linear(4, 4)
    with pytest.raises(UsageError, match="its own way"):
        serve_here(model, [], lambda name: Laid(), weights=weights_of(model), files=None,
                   folder=None, device=torch.device("cpu"), kv=Kv(word="int8"),
                   limits=Limits(batch=1, prompt=1, tokens=1))  # fmt: skip


def test_a_disk_tier_wants_a_folder(saved):
    model = copy.deepcopy(saved["llama"][0])
    with pytest.raises(UsageError, match="no file has it as planned") as fault:
        served(model, laid("nvme", "stream"))
    assert "folder=DIR" in fault.value.hints[0]


class Traffic(TorchDispatchMode):
    """Bytes that ops read and write: their inputs once, as they lie, and their results."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            passed = [x for x in tree_leaves((args, found)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.held_bytes if isinstance(x, Packed) else x.nbytes for x in passed)
        return found


@pytest.mark.parametrize("word", FORMATS)
def test_unpacking_moves_the_bytes_that_plans_for_gpus_count(word):
    whole = torch.randn(512, 4096, dtype=torch.bfloat16)
    packed = pack(whole, word)
    with Traffic() as ops:
        packed.whole()
    counted = load_serving_engine("native").handling.unpacks(word)
    assert ops.bytes / whole.numel() == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("word", ["bf16", "fp8"])
def test_a_cache_that_grows_moves_the_bytes_that_plans_for_gpus_count(saved, word):
    """It is written anew with each token; in fewer bits so, and then as values."""
    layer = cache_of(saved["llama"][0], Kv(word=word)).layers[0]
    past, new = (torch.randn(1, 8, n, 128, dtype=torch.bfloat16) for n in (2048, 1))
    layer.update(past, past)
    with Traffic() as ops:
        layer.update(new, new)
    attend = Attend(heads=32, kv_heads=8, dim_qk=128, dim_v=128)
    counted = load_serving_engine("native").handling.cache_moved_bytes(attend, word, 1)
    assert ops.bytes / 2048 == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("word", FORMATS)
def test_unpacking_rounds_once(word, dtype):
    """What a format stands for is computed in fp32, then rounded to the model's dtype."""
    parts = pack(torch.randn(3, 64, 256, dtype=dtype), word).parts
    wide = FORMATS[word].unpack(parts, torch.float32)
    assert torch.equal(FORMATS[word].unpack(parts, dtype), wide.to(dtype))


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that a call makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in made)])
        return found


@pytest.mark.parametrize("shape", [(96, 128), (3, 64, 128)])
@pytest.mark.parametrize("word", FORMATS)
def test_a_weight_is_packed_some_rows_at_a_time(monkeypatch, word, shape):
    """Bits are those of the whole packed at once; nothing is as large as the weight but it."""
    monkeypatch.setattr(packed, "ELEMENTS_AT_ONCE", 7 * 128)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = Spec.of(shape, w.dtype, word)
    with Largest() as largest:
        found = spec.parts_of(w)
    assert largest.bytes <= w.nbytes
    for part, wanted in zip(found, FORMATS[word].pack(w), strict=True):
        assert part.dtype == wanted.dtype and torch.equal(part.float(), wanted.float())
