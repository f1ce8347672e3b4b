"""Local processes that run a function as the ranks of one world: for verification and tests.

A pool keeps its workers: importing torch costs seconds, a call into a warm worker milliseconds.
Workers talk gloo on the CPU, one thread each.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from ir.errors import PlanError

TIMEOUT_S = 120.0  # of one call, and of a collective in it
# process groups that a worker may have made: gloo leaves two sleeping threads of every one
MOST_GROUPS = 250
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
SETTLED = "planner.runtime.settled"


class RankFailure(PlanError):
    """A rank of a local world raised or died. `fault` is its exception where it could be sent."""

    def __init__(self, rank: int, text: str, fault: BaseException | None):
        last = text.strip().splitlines()[-1] if text.strip() else "died"
        super().__init__(f"rank {rank} failed: {last}", why=text)
        self.rank, self.fault, self.traceback = rank, fault, text


class World:
    """Worker processes; `run` gives each its rank in a process group of the asked size.

    The group stays for the next call of that size, and with it the meshes on it and what DTensor
    found out of them: most of a small model's step is finding out.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        """preload: modules that the workers' calls import, loaded once for all of them."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked worker of a threaded parent hangs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, *preload, SETTLED])
        self._workers: list[tuple[Any, Connection]] = []
        self._stores: tempfile.TemporaryDirectory[str] | None = None
        self._group: tuple[int, float, str] | None = None  # ranks, timeout, its store
        self._joined = 0  # groups of calls, by which their stores are named
        self._groups = 0  # that a worker has made, those of meshes too

    def run(
        self, ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """Call `function(rank, *args)` on every rank; what each returned, by rank.

        The function and what it takes and returns are pickled. Raises RankFailure of the first
        rank that failed; the workers are then replaced.
        """
        if self._groups >= MOST_GROUPS:
            self.close()
        self._stores = self._stores or tempfile.TemporaryDirectory()
        while len(self._workers) < ranks:
            ours, theirs = self._context.Pipe()
            last_words = self._last_words(len(self._workers))
            worker = self._context.Process(target=_serve, args=(theirs, last_words), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))
        if self._group is None or self._group[:2] != (ranks, timeout_s):
            self._joined += 1
            self._group = ranks, timeout_s, os.path.join(self._stores.name, str(self._joined))
        for rank in range(ranks):
            self._workers[rank][1].send((rank, *self._group, function, args))
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
                    good, value, text, made = pipe.recv()
                except (EOFError, OSError):
                    failures.append(RankFailure(rank, self._how_died(rank), None))
                    continue
                self._groups = max(self._groups, made)
                if good:
                    results[rank] = value
                else:
                    failures.append(RankFailure(rank, text, value))
        if failures:
            self.close()
            raise next((f for f in failures if "Connection" not in f.traceback), failures[0])
        return [results[r] for r in range(ranks)]

    def _last_words(self, worker: int) -> str:
        assert self._stores is not None
        return os.path.join(self._stores.name, f"last_words_{worker}")

    def _how_died(self, rank: int) -> str:
        """Where the process was, as far as it could say, and by what it ended."""
        worker = self._workers[rank][0]
        worker.join(GRACE_S)
        code = worker.exitcode
        by = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        path = Path(self._last_words(rank))
        said = path.read_text(errors="replace") if path.exists() else ""
        return f"{said}\nthe process died by {by}"

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
        self._workers, self._group, self._groups = [], None, 0
        if self._stores is not None:
            self._stores.cleanup()
            self._stores = None


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


def _serve(pipe: Connection, last_words: str) -> None:
    import torch

    said = open(last_words, "w")  # for as long as the process lives  # noqa: SIM115
    faulthandler.enable(said)
    torch.set_num_threads(1)
    _share_device()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it stops the workers
    group, left = "", 0
    while True:
        try:
            rank, ranks, timeout_s, store, function, args = pipe.recv()
        except (EOFError, OSError):
            _leave()
            return
        good, value, text = True, None, ""
        try:
            if store != group:
                left += _leave()
                _join(rank, ranks, timeout_s, store)
                group = store
            torch.manual_seed(0)
            value = function(rank, *args)
        except BaseException as fault:  # a worker reports whatever went wrong
            good, value, text = False, fault, traceback.format_exc()
        made = left + _groups()
        try:
            pipe.send((good, value, text, made))
        except Exception:
            pipe.send((False, None, text or traceback.format_exc(), made))
        sys.stdout.flush()


def _share_device() -> None:
    """Have all gloo groups of this process use one device.

    Each device has a thread that looks for work a hundred times a second, for as long as the
    process lives; a mesh has a dozen groups.
    """
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    make, device = ProcessGroupGloo.__init__, ProcessGroupGloo.create_default_device()

    def on_device(
        self: ProcessGroupGloo, store: Any, rank: int, size: int, timeout: datetime.timedelta
    ) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._timeout = [device], timeout
        make(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = on_device  # type: ignore[method-assign]


def _join(rank: int, ranks: int, timeout_s: float, store: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )  # fmt: skip


def _leave() -> int:
    """Give up the world's groups, if there are any; how many there were."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    left = _groups()
    if left:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        # DTensor's cached placements name meshes by shape: those of this world, which is gone
        _clear_sharding_prop_cache()
    return left


def _groups() -> int:
    from torch.distributed.distributed_c10d import _world

    return len(_world.pg_map)
