"""Local processes that run a function as the ranks of one world: for verification and tests.

A pool keeps its workers: importing torch costs seconds, a call into a warm worker milliseconds.
Workers talk gloo on the CPU, one thread each.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from ir.errors import PlanError

TIMEOUT_S = 120.0  # of one call, and of a collective in it
# calls that a worker serves: gloo leaves the threads of every group that a mesh made, and a
# thousand of them take all of two cores
CALLS = 4
GRACE_S = 3.0  # for idle workers to end, so that what they hold of the system is given back
PRELOAD = (
    "torch", "torch.distributed", "torch.distributed.tensor", "torch.distributed.fsdp",
    "torch.distributed.pipelining", "torch.distributed.checkpoint", "planner.runtime.world",
    "planner.runtime.verify.run",
)  # fmt: skip
# what building a model of transformers imports: a second in every worker that is not forked with it
PRELOAD_HF = (
    "ir.capture.hf", "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
)  # fmt: skip
PRELOAD_COMPILED = ("torch._inductor.compile_fx",)  # the same of what compiles


class RankFailure(PlanError):
    """A rank of a local world raised or died. `fault` is its exception where it could be sent."""

    def __init__(self, rank: int, text: str, fault: BaseException | None):
        last = text.strip().splitlines()[-1] if text.strip() else "died"
        super().__init__(f"rank {rank} failed: {last}", why=text)
        self.rank, self.fault, self.traceback = rank, fault, text


class World:
    """Worker processes; `run` gives each its rank in a process group of the asked size."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        """preload: modules that the workers' calls import, loaded once for all of them."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked worker of a threaded parent hangs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, *preload])
        self._workers: list[tuple[Any, Connection]] = []
        self._calls = 0

    def run(
        self, ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """Call `function(rank, *args)` on every rank; what each returned, by rank.

        The function and what it takes and returns are pickled. Raises RankFailure of the first
        rank that failed; the workers are then replaced.
        """
        if self._calls == CALLS:
            self.close()
        self._calls += 1
        while len(self._workers) < ranks:
            ours, theirs = self._context.Pipe()
            worker = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            for rank in range(ranks):
                self._workers[rank][1].send((rank, ranks, store, timeout_s, function, args))
            return self._collect(ranks, timeout_s)

    def _collect(self, ranks: int, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[RankFailure] = []
        pending: dict[Any, int] = {self._workers[r][1]: r for r in range(ranks)}
        while pending:
            # after a failure the others are left a moment to say why, then stopped
            ready = wait(list(pending), timeout=3.0 if failures else timeout_s + 30)
            if not ready:
                if not failures:
                    failures.append(RankFailure(min(pending.values()), "no answer in time", None))
                break
            for pipe in cast(list[Connection], ready):
                rank = pending.pop(pipe)
                try:
                    good, value, text = pipe.recv()
                except (EOFError, OSError):
                    failures.append(RankFailure(rank, "the process died", None))
                    continue
                if good:
                    results[rank] = value
                else:
                    failures.append(RankFailure(rank, text, value))
        if failures:
            self.close()
            raise next((f for f in failures if "Connection" not in f.traceback), failures[0])
        return [results[r] for r in range(ranks)]

    def close(self, grace_s: float = 0.0) -> None:
        """Stop the workers, which may end by themselves within grace_s; the next `run` starts
        others."""
        for _, pipe in self._workers:
            pipe.close()
        end = time.monotonic() + grace_s
        for worker, _ in self._workers:
            worker.join(max(0.0, end - time.monotonic()))
            worker.kill()
        for worker, _ in self._workers:
            worker.join()
        self._workers, self._calls = [], 0


@contextlib.contextmanager
def local_world(preload: Sequence[str] = ()) -> Iterator[World]:
    """A world that is closed at the end; preload as `World` takes it."""
    world = World(preload)
    try:
        yield world
    except BaseException:
        world.close()
        raise
    world.close(grace_s=GRACE_S)


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it stops the workers
    while True:
        try:
            rank, ranks, store, timeout_s, function, args = pipe.recv()
        except (EOFError, OSError):
            return
        good, value, text = True, None, ""
        try:
            value = _call(rank, ranks, store, timeout_s, function, args)
        except BaseException as fault:  # a worker reports whatever went wrong
            good, value, text = False, fault, traceback.format_exc()
        try:
            pipe.send((good, value, text))
        except Exception:
            pipe.send((False, None, text or traceback.format_exc()))
        sys.stdout.flush()


def _call(
    rank: int, ranks: int, store: str, timeout_s: float, function: Callable[..., Any], args: Any
) -> Any:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )  # fmt: skip
    try:
        return function(rank, *args)
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        # DTensor's cached placements name meshes by shape: those of this world, which is gone
        _clear_sharding_prop_cache()
