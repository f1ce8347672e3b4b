"""What ranks do in the tests of checkpoints: train, save, restore."""

from __future__ import annotations

import errno
from typing import Any

import torch
from runtime_cases_weights import batch_of, hollow, losses, pieces, told, variants
from torch import nn

import planner
from planner.runtime import checkpoint
from planner.runtime.parallelize import parallelize
from planner.runtime.parts import local_of


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


def optimizer_first(rank: int, plan: Any, path: str) -> list[float]:
    """Losses with an optimizer that was made before there were weights."""
    model, loss = hollow("llama")
    parallel = parallelize(model, plan)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-3)
    parallel.init(0)
    return losses(parallel, optimizer, loss, range(3))


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
