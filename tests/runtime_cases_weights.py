"""What ranks do in the tests of weights: initialise, load, export; and what those of checkpoints
share with them: models, plans, and the parts that a rank holds."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import planner
from ir.errors import PlanError
from planner.plan import Plan
from planner.runtime.init import replay_of
from planner.runtime.parallelize import parallelize
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.weights import named_weights, weights_of

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {
    "llama": {"size": "tiny", "n_layers": 4}, "gpt": {"size": "tiny"}, "moe": {"size": "tiny"},
}  # fmt: skip
VOCABULARY = 256
# what Megatron would split, fused qkv included; a tiny model would not ask for it
SPLIT = {
    "llama": ("attention.wo.weight=S(1)", "feed_forward.w2.weight=S(1)"),
    "gpt": ("attn.c_attn.weight=S(0)", "attn.c_proj.weight=S(1)", "mlp.c_proj.weight=S(1)"),
}


def example(name: str) -> Any:
    """The example's file."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(name: str) -> tuple[nn.Module, Any]:
    """(model, its loss function)"""
    file = example(name)
    return file.build(**SIZES[name]), file.loss


def hollow(name: str) -> tuple[nn.Module, Any]:
    with planner.meta():
        return built(name)


def variants() -> dict[str, Any]:
    """Models beside the tiny Llama: of another shape, depth, activation."""
    llama = example("llama")

    def gelu() -> nn.Module:
        class Gelu(llama.FeedForward):
            def forward(self, x):
                return self.w2(nn.functional.gelu(self.w1(x)) * self.w3(x))

        llama.FeedForward = Gelu
        return llama.build(**SIZES["llama"])

    return {
        "wide": lambda: llama.Llama(64, 4, 4, 2, 192, VOCABULARY, 8192),
        "deep": lambda: llama.build(size="tiny", n_layers=5),
        "gelu": gelu,
    }


def hf_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, num_local_experts=4, use_cache=False,
        max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    return MixtralForCausalLM(config)


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, use_cache=False, tie_word_embeddings=True,
        max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {
    "llama": lambda: built("llama")[0], "gpt": lambda: built("gpt")[0],
    "moe": lambda: built("moe")[0], "mixtral": hf_mixtral, "hf_llama": hf_llama,
}  # fmt: skip


# ---- plans


def inputs(batch: int, seq_len: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


@cache
def traced(name: str, tp: int, ep: int) -> Plan:
    model = (MODELS | variants())[name]()
    split = SPLIT.get(name, ()) if tp > 1 else ()
    return planner.trace(
        model, inputs, hardware=f"h100x{max(tp, ep)}", seq_len=16, global_batch=12,
        precision="fp32", engine="native",
        fix=("compile=off", "recompute=none", "micro_batch=1", f"tp={tp}", f"ep={ep}", "pp=1",
             *(f"place:layers.*.{x}" for x in split)),
    )  # fmt: skip


def planned(name: str, *, dp: int = 1, tp: int = 1, pp: int = 1, ep: int = 1) -> Plan:
    """A plan of 12 samples a step, all state sharded."""
    plan = traced(name, tp, ep)
    layers = len(plan.graph.layers)
    d = replace(
        plan.decisions, dp=dp, pp=pp, ep=ep, etp=1, zero=3 if dp > 1 else 0, shard=dp, reshard=True,
        micro_batch=1, microbatches=12 // dp, stages=(layers // pp,) * pp, recompute=((0, 0),) * pp,
        schedule="1f1b", offload=(),
    )  # fmt: skip
    return replace(plan, decisions=d)


# ---- what a rank holds and does


def one_by_one(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """What `parallel.init(seed)` is to draw, made without a plan."""
    weights = weights_of(model)
    replay = replay_of(weights, seed)
    return {n: replay.make(m) for n, m in weights.origins.items()}


def pieces(parallel: Any) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
    """(name, offsets, values) of every part that this rank holds."""
    found = named_weights(parallel.modules, parallel._context.weights)
    return [
        (name, box.offsets, box.of_local(local_of(x.detach())).clone())
        for name, x in found
        if isinstance(x, nn.Parameter)
        for box in boxes_of(x)
    ]


def assert_parts_of(found: list[Any], whole: dict[str, torch.Tensor]) -> None:
    """Every rank's parts are the whole's, and together they cover it."""
    covered = {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in whole.items()}
    for rank in found:
        for name, offsets, x in rank:
            at = tuple(slice(o, o + n) for o, n in zip(offsets, x.shape))
            assert torch.equal(x, whole[name][at]), (name, offsets)
            covered[name][at] = True
    assert all(x.all() for x in covered.values()), [n for n, x in covered.items() if not x.all()]


def batch_of(step: int, samples: int, length: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (samples, length + 1), generator=g)
    return {"input_ids": ids[:, :-1]}, ids[:, 1:]


def losses(parallel: Any, optimizer: Any, loss: Any, steps: range) -> list[float]:
    workload, found = parallel.plan.workload, []
    for step in steps:
        batch, targets = batch_of(step, workload.global_batch, workload.seq_len)
        found.append(float(parallel.step(batch, targets, loss)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def told(work: Any) -> list[str] | None:
    """What a PlanError says; None where there is none."""
    try:
        work()
    except PlanError as fault:
        return [type(fault).__name__, *fault.lines()]
    return None


def drawn(rank: int, cases: list[tuple[str, Any]], seed: int) -> list[Any]:
    found = []
    for name, plan in cases:
        parallel = parallelize(hollow(name)[0], plan)
        parallel.init(seed)
        found.append(pieces(parallel))
    return found


def loaded(rank: int, name: str, plan: Any, path: str, reference: Any) -> tuple[int, int, list]:
    """(bytes read, bytes held, parts that differ from the reference)"""
    from planner.runtime import sources

    read = 0

    class Counted:
        """A slice that counts."""

        def __init__(self, inner):
            self.inner, self.get_shape = inner, inner.get_shape

        def __getitem__(self, index):
            nonlocal read
            found = self.inner[index]
            read += found.numel() * found.element_size()
            return found

    class Opened:
        """A file whose slices count."""

        def __init__(self, *args, **kwargs):
            self.inner = real(*args, **kwargs)

        def __enter__(self):
            self.file = self.inner.__enter__()
            return self

        def __exit__(self, *args):
            return self.inner.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def get_slice(self, key):
            return Counted(self.file.get_slice(key))

        def get_tensor(self, key):
            raise AssertionError(key)

    real, sources.safe_open = sources.safe_open, Opened
    try:
        with planner.meta():
            model = MODELS[name]()
        parallel = parallelize(model, plan)
        parallel.load(path)
    finally:
        sources.safe_open = real
    wrong = [
        (n, off) for n, off, x in pieces(parallel)
        if not x.equal(reference[n][tuple(slice(o, o + s) for o, s in zip(off, x.shape))].float())
    ]  # fmt: skip
    held = sum(x.numel() * x.element_size() for _, _, x in pieces(parallel))
    return read, held, wrong


def misloaded(rank: int, plan: Any, paths: dict[str, str]) -> dict[str, Any]:
    """What is said of files that do not fit, and that nothing was changed by them."""
    parallel = parallelize(hollow("llama")[0], plan)
    found = {name: told(lambda p=path: parallel.load(p)) for name, path in paths.items()}
    assert all(p.is_meta for p in parallel.parameters())
    found["extra allowed"] = told(lambda: parallel.load(paths["extra"], strict=False))
    return found


def kept(rank: int, name: str, plan: Any) -> list[Any]:
    """Parts of a model that was built with real weights which parallelize changed."""
    torch.manual_seed(3)
    model, loss = built(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parallel = parallelize(model, plan)
    parallel.init(1)  # fills nothing that has values
    wrong = [
        (n, off) for n, off, x in pieces(parallel)
        if not x.equal(before[n][tuple(slice(o, o + s) for o, s in zip(off, x.shape))])
    ]  # fmt: skip
    early = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-3)
    losses(parallel, early, loss, range(1))
    return wrong


def exported(rank: int, name: str, plan: Any, folder: str) -> None:
    """Draw weights and write them as safetensors, twice: the second replaces the first."""
    with planner.meta():
        model = MODELS[name]()
    parallel = parallelize(model, plan)
    parallel.init(1)
    parallel.export_safetensors(folder)
    parallel.init(0)
    parallel.export_safetensors(folder)
