"""What ranks do in the tests of weights: initialise, load, save, restore."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

import planner
from ir.errors import PlanError
from planner.runtime import checkpoint
from planner.runtime.init import replay_of
from planner.runtime.parallelize import parallelize
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.weights import named_weights, weights_of

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {
    "llama": {"size": "tiny", "n_layers": 4}, "gpt": {"size": "tiny"}, "moe": {"size": "tiny"},
}  # fmt: skip
VOCABULARY = 256


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


def batch_of(step: int, samples: int, length: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (samples, length + 1), generator=g)
    return {"input_ids": ids[:, :-1]}, ids[:, 1:]


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


def drawn(rank: int, cases: list[tuple[str, Any]], seed: int) -> list[Any]:
    found = []
    for name, plan in cases:
        parallel = parallelize(hollow(name)[0], plan)
        parallel.init(seed)
        found.append(pieces(parallel))
    return found


def losses(parallel: Any, optimizer: Any, loss: Any, steps: range) -> list[float]:
    workload, found = parallel.plan.workload, []
    for step in steps:
        batch, targets = batch_of(step, workload.global_batch, workload.seq_len)
        found.append(float(parallel.step(batch, targets, loss)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def trained(
    rank: int, name: str, plan: Any, steps: range, start: str | None, end: str | None,
    asynchronous: bool = False,
) -> tuple[list[float], Any]:  # fmt: skip
    """Train some steps from a checkpoint or seed 0 to a checkpoint; (losses, pieces)."""
    model, loss = hollow(name)
    parallel = parallelize(model, plan)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-3)
    if start is None:
        parallel.init(0)
    else:
        state = parallel.restore(start, optimizer)
        assert state == {"step": steps.start, "note": [1, "x"]}, state
    found = losses(parallel, optimizer, loss, steps)
    if end is not None:
        state = {"step": steps.stop, "note": [1, "x"]}
        saving = parallel.save(end, optimizer, state=state, asynchronous=asynchronous)
        at_save = pieces(parallel)
        if asynchronous:
            losses(parallel, optimizer, loss, range(100, 101))  # goes on meanwhile
        saving.wait()
        return found, at_save
    return found, pieces(parallel)


def resaved(rank: int, name: str, plan: Any, start: str | None, end: str) -> Any:
    """Draw or restore, and save: the pieces. Moments are random, and come back as they were."""
    parallel = parallelize(hollow(name)[0], plan)
    optimizer = torch.optim.Adam(parallel.parameters())
    if start is None:
        parallel.init(0)
    else:
        parallel.restore(start, optimizer)
        for p in parallel.parameters():
            assert local_of(optimizer.state[p]["exp_avg"]).equal(2 * local_of(p.detach()))
            assert optimizer.state[p]["step"] == 7
    for p in parallel.parameters():
        optimizer.state[p]["exp_avg"] = 2 * p.detach()
        optimizer.state[p]["step"] = torch.tensor(7.0)
    parallel.save(end, optimizer)
    return pieces(parallel)


def told(work: Any) -> list[str] | None:
    """What a PlanError says; None where there is none."""
    try:
        work()
    except PlanError as fault:
        return [type(fault).__name__, *fault.lines()]
    return None


class FullDisk(checkpoint.FileSystemWriter):
    """A disk that is full when this rank has written."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        super().write_data(plan, planner)
        raise OSError(errno.ENOSPC, "No space left on device")


def failing(rank: int, name: str, plan: Any, folder: str) -> list[Any]:
    """Save; then fail to save in several ways; then restore what the first one wrote."""
    model, loss = hollow(name)
    parallel = parallelize(model, plan)
    parallel.init(0)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-3)
    losses(parallel, optimizer, loss, range(1))
    parallel.save(folder, optimizer, state={"step": 1})
    saved = pieces(parallel)
    losses(parallel, optimizer, loss, range(1, 2))
    real, found = checkpoint.writer, []
    try:
        if rank == 1:
            checkpoint.writer = FullDisk
        found.append(told(lambda: parallel.save(folder, optimizer, state={"step": 2})))
        saving = parallel.save(folder, optimizer, state={"step": 2}, asynchronous=True)
        found.append(told(saving.wait))
    finally:
        checkpoint.writer = real
    state = {"step": 2, "bad": object()} if rank == 1 else {"step": 2}
    found.append(told(lambda: parallel.save(folder, optimizer, state=state)))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(3))])
    found.append(told(lambda: parallel.save(folder, other)))
    found.append(parallel.restore(folder, optimizer))
    same = [(n, o) for (n, o, x), (_, _, y) in zip(saved, pieces(parallel)) if not x.equal(y)]
    found += [same, torch.initial_seed()]
    return found


def refused(rank: int, plans: dict[str, Any], folder: str, empty: str) -> dict[str, Any]:
    """What is said of checkpoints that cannot be restored, and of weights that are not there."""
    found = {}
    model, loss = hollow("llama")
    parallel = parallelize(model, plans["llama"])
    batch, targets = batch_of(0, plans["llama"].workload.global_batch, 16)
    found["no values"] = told(lambda: parallel.step(batch, targets, loss))
    found["nothing to save"] = told(lambda: parallel.save(folder))
    parallel.init(0)
    parallel.save(folder, torch.optim.AdamW(parallel.parameters()))
    found["no checkpoint"] = told(lambda: parallel.restore(folder + "-none"))
    found["a folder"] = told(lambda: parallel.restore(empty))
    found["replace"] = told(lambda: parallel.save(empty))
    found["sgd"] = told(
        lambda: parallel.restore(folder, torch.optim.SGD(parallel.parameters(), lr=1.0))
    )
    found["two"] = told(
        lambda: parallel.restore(folder, [torch.optim.AdamW(parallel.parameters())] * 2)
    )
    for name in ("wide", "deep", "gelu"):
        with planner.meta():
            other = variants()[name]()
        theirs = parallelize(other, plans[name])
        found[name] = told(lambda theirs=theirs: theirs.restore(folder))
        if name == "gelu":
            found["all the same"] = told(lambda theirs=theirs: theirs.restore(folder, strict=False))
    return found


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


def optimizer_first(rank: int, plan: Any, path: str) -> list[float]:
    """Losses with an optimizer that was made before there were weights."""
    model, loss = hollow("llama")
    parallel = parallelize(model, plan)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-3)
    parallel.init(0)
    return losses(parallel, optimizer, loss, range(3))


def exported(rank: int, name: str, plan: Any, folder: str) -> None:
    """Draw weights and write them as safetensors, twice: the second replaces the first."""
    with planner.meta():
        model = MODELS[name]()
    parallel = parallelize(model, plan)
    parallel.init(1)
    parallel.export_safetensors(folder)
    parallel.init(0)
    parallel.export_safetensors(folder)


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
