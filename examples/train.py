"""Train a small Llama under a plan, save, and go on under another plan.

    plan trace examples/llama.py --arg size=tiny --arg n_layers=4 --hardware h100x4 \\
        --seq-len 64 --global-batch 12 --precision fp32 --fix tp=2 --fix zero=3 --fix compile=off \\
        --fix 'place:layers.*.attention.wo.weight=S(1)' \\
        --fix 'place:layers.*.feed_forward.w2.weight=S(1)' -o four.json
    torchrun --nproc-per-node 4 examples/train.py four.json --steps 20 --save checkpoint

    plan trace examples/llama.py --arg size=tiny --arg n_layers=4 --hardware h100x3 \\
        --seq-len 64 --global-batch 12 --precision fp32 --fix tp=1 --fix zero=3 --fix compile=off \\
        -o three.json
    torchrun --nproc-per-node 3 examples/train.py three.json --steps 40 --resume checkpoint

The plan is for GPUs that are elsewhere; without one here, the processes talk gloo on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys

import llama
import torch
import torch.distributed as dist

import planner
from ir.errors import PlanError


def batch_of(step: int, samples: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences in which each token follows from the one before; the same on every rank."""
    start = torch.randint(256, (samples, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + 7 * torch.arange(length + 1)) % 256
    return ids[:, :-1], ids[:, 1:]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("plan")
    arguments.add_argument("--steps", type=int, default=20, help="train up to this step")
    arguments.add_argument("--save", metavar="FOLDER", help="write a checkpoint at the end")
    arguments.add_argument("--resume", metavar="FOLDER", help="go on from a checkpoint")
    asked = arguments.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())

    plan = planner.load(asked.plan)
    with planner.meta():
        model = llama.build(size="tiny", n_layers=4)
    parallel = planner.parallelize(model, plan)
    parallel.init(seed=0)
    optimizer = parallel.optimizer(torch.optim.AdamW, lr=3e-3)
    step = 0
    if asked.resume:
        step = parallel.restore(asked.resume, optimizer)["step"]

    workload = plan.workload
    while step < asked.steps:
        ids, targets = batch_of(step, workload.global_batch, workload.seq_len)
        if gpu:
            ids, targets = ids.cuda(), targets.cuda()
        loss = parallel.step({"input_ids": ids}, targets, llama.loss)
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if dist.get_rank() == 0 and step % 5 == 0:
            print(f"step {step:4d}  loss {float(loss):.4f}", flush=True)
    if asked.save:
        parallel.save(asked.save, optimizer, state={"step": step})
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except PlanError as fault:  # most are found on every rank; one rank says it all
        rank = os.environ.get("RANK", "0")
        lines = fault.lines() if rank == "0" else [f"rank {rank}: {fault}"]
        print("\n".join(lines), file=sys.stderr, flush=True)
        sys.exit(fault.exit_code)
