"""Collectives over the ranks that torchrun started: every power of two of them, and all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from cost_models.calibrate import Probe
from planner.runtime.probe_timer import Timer

# Bytes of the full tensor: latency, the bend, bandwidth.
GPU_BYTES = (1 << 14, 1 << 18, 1 << 21, 1 << 24, 1 << 27, 1 << 29)
CPU_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 25)
WARM, REPEATS, QUICK_REPEATS = 2, 15, 7
IN_A_ROW, SMALL_BYTES = 5, 1 << 24  # small ones are timed in a row, as a step issues them


def collectives(timer: Timer, quick: bool, left_out: list[str]) -> Iterator[Probe]:
    """all_reduce, all_gather, reduce_scatter and all_to_all; all ranks call it alike."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and not dist.is_initialized():
        left_out.append("collectives: not started by torchrun")
        return
    if not dist.is_initialized():
        dist.init_process_group("nccl" if timer.device.type == "cuda" else "gloo")
    world = dist.get_world_size()
    if world == 1:
        left_out.append("collectives: torchrun started one rank alone")
    else:
        yield from _groups(timer, world, quick, left_out)
    dist.destroy_process_group()


def _groups(timer: Timer, world: int, quick: bool, left_out: list[str]) -> Iterator[Probe]:
    """Over groups of every size inside a node; a rank yields those that it is in."""
    sizes = sorted({world, *(n for n in (2, 4, 8, 16, 32, 64) if n <= world)})
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if any(n > local for n in sizes):
        left_out.append("collectives between nodes: the file has those inside one")
        sizes = [n for n in sizes if n <= local]
    for ranks in sizes:
        group = dist.new_group(list(range(ranks)))
        inside = dist.get_rank() < ranks
        for size in CPU_BYTES if timer.device.type == "cpu" else GPU_BYTES:
            for kind, call in _calls(size, ranks, group, timer.device).items():
                if inside:
                    count = QUICK_REPEATS if quick else REPEATS
                    row = IN_A_ROW if size < SMALL_BYTES else 1
                    seconds = _repeats(call, timer.device, group, count, row)
                    yield Probe(op=kind, shape=(ranks,), moved_bytes=float(size), seconds=seconds)
        dist.barrier()


def _calls(
    size: int, ranks: int, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Callable[[], object]]:
    whole = torch.zeros(size // 4 // ranks * ranks, device=device)
    part = torch.zeros(whole.numel() // ranks, device=device)
    other = torch.empty_like(whole)
    # newer releases have other names for the same calls, and warn of the old ones
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: gather(whole, part, group=group),
        "reduce_scatter": lambda: scatter(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
    }


def _repeats(
    call: Callable[[], object],
    device: torch.device,
    group: dist.ProcessGroup,
    count: int,
    in_a_row: int,
) -> tuple[float, ...]:
    """The slowest rank's seconds of one call, a value a repeat."""
    seconds = []
    for turn in range(WARM + count):
        dist.barrier(group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= WARM:
            seconds.append((time.perf_counter() - start) / in_a_row)
    slowest = torch.tensor(seconds, device=device, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return tuple(slowest.tolist())
