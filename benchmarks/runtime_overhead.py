"""How much slower a step is under a plan than with FSDP2 and TP written by hand.

    python benchmarks/runtime_overhead.py [--steps 5] [--compiled]

Both train the same Llama (hidden 1024, 8 layers) on 4 local processes, tp 2 with sequence
parallelism x 2 fully sharded data ranks, in the same processes one after the other, several times
in turn; what counts is the ratio of the medians. By hand is what torch's documentation shows:
module styles with local activations, head counts edited. Gloo on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

HIDDEN, LAYERS, HEADS, VOCAB, BATCH, LENGTH = 1024, 8, 16, 4096, 2, 256


def build():  # type: ignore[no-untyped-def]
    """The model, as both run it."""
    import llama

    return llama.Llama(HIDDEN, LAYERS, HEADS, HEADS // 2, 2816, VOCAB, LENGTH)


def inputs(batch: int, seq_len: int):  # type: ignore[no-untyped-def]
    import llama

    return llama.inputs(batch, seq_len)


def by_hand(model, compiled: bool):  # type: ignore[no-untyped-def]
    """Shard a Llama as torch's tutorials do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp = mesh["tp"]
    for layer in model.layers:
        layer.attention.n_heads //= tp.size()
        layer.attention.n_kv_heads //= tp.size()
        parallelize_module(layer, tp, {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(
                input_layouts=(Shard(1), None, None),
                desired_input_layouts=(Replicate(), None, None),
            ),
            "attention.wq": ColwiseParallel(),
            "attention.wk": ColwiseParallel(),
            "attention.wv": ColwiseParallel(),
            "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
            "ffn_norm": SequenceParallel(),
            "feed_forward": PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            ),
            "feed_forward.w1": ColwiseParallel(),
            "feed_forward.w3": ColwiseParallel(),
            "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        })  # fmt: skip
    parallelize_module(model, tp, {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    })  # fmt: skip
    for layer in model.layers:
        if compiled:
            layer.compile(fullgraph=True)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def measure(rank: int, plan_path: str, rounds: int, steps: int, compiled: bool):  # type: ignore[no-untyped-def]
    """Seconds of each step by hand and under the plan, and both losses."""
    import llama
    import torch
    from torch.distributed.tensor.parallel import loss_parallel

    import planner

    plan = planner.load(plan_path)
    torch.manual_seed(0)
    hand = build()
    parallel = planner.parallelize(build(), plan)
    hand = by_hand(hand, compiled)
    ids = torch.randint(VOCAB, (2 * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mine = ids[(rank // 2) * BATCH :][:BATCH]

    def hand_step() -> float:
        with loss_parallel():
            loss = llama.loss(hand(mine), mine)
            loss.backward()
        hand.zero_grad()
        return float(loss.detach())

    def plan_step() -> float:
        loss = parallel.step({"input_ids": ids}, ids, llama.loss)
        for p in parallel.parameters():
            p.grad = None
        return float(loss)

    times: dict[str, list[float]] = {"hand": [], "plan": []}
    for step in (hand_step, plan_step):
        step()  # caches fill, code is compiled
    for _ in range(rounds):
        for name, step in (("hand", hand_step), ("plan", plan_step)):
            for _ in range(steps):
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    return times


def make_plan(folder: str, compiled: bool) -> str:
    """The plan that does what `by_hand` does."""
    import torch  # noqa: F401
    from torch import nn

    import planner

    model: nn.Module = build()
    words = ["tp=2", "dp=2", "pp=1", "cp=1", "zero=3", "reshard=on", f"micro_batch={BATCH}",
             "recompute=none", "sequence_parallel=on", f"compile={'on' if compiled else 'off'}",
             "place:layers.*.attention.wo.weight=S(1)",
             "place:layers.*.feed_forward.w2.weight=S(1)", "place:embed_tokens.weight=S(0)",
             "place:lm_head.weight=S(0)"]  # fmt: skip
    import llama

    plan = planner.trace(
        model, inputs, loss=llama.loss, hardware="h100x4", fix=words, global_batch=2 * BATCH,
        seq_len=LENGTH, precision="fp32", engine="native-compiled" if compiled else "native",
    )  # fmt: skip
    path = str(Path(folder) / "plan.json")
    plan.save(path)
    return path


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=3, help="steps a turn")
    arguments.add_argument("--rounds", type=int, default=4, help="turns each")
    arguments.add_argument("--compiled", action="store_true", help="compile the layers")
    asked = arguments.parse_args()
    from planner.runtime.world import local_world

    with tempfile.TemporaryDirectory() as folder, local_world() as world:
        path = make_plan(folder, asked.compiled)
        found = world.run(
            4, measure, path, asked.rounds, asked.steps, asked.compiled, timeout_s=900.0
        )
    hand = statistics.median(t for row in found for t in row["hand"])
    plan = statistics.median(t for row in found for t in row["plan"])
    kind = "compiled" if asked.compiled else "eager"
    print(f"{kind}: by hand {hand * 1e3:.0f} ms, under the plan {plan * 1e3:.0f} ms a step, "
          f"ratio {plan / hand:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
