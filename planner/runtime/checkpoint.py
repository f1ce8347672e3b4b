"""Checkpoints that any plan of the model can go on from, by torch.distributed.checkpoint.

Tensors lie under the model's own names, without pipeline stages; a tied weight under its owner's,
written by the first stage that has it. A folder is whole or not there: it is written beside and
renamed when every rank has succeeded. Random numbers go on from a seed drawn when it was saved:
not those that the job would have drawn, since another plan has other ranks.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ir.errors import GateError, PlanError
from ir.graph import Graph
from ir.text import format_graph, parse_graph
from planner.plan import Plan
from planner.runtime.checkpoint_files import (
    ABOUT,
    FORMAT,
    SAVING,
    abandon,
    begin,
    beside,
    commit,
    opened,
    read_about,
    write_about,
)
from planner.runtime.held import Held, SavePlanner, read
from planner.runtime.init import seed_of
from planner.runtime.meshes import Meshes
from planner.runtime.optimizer_state import (
    allocate,
    apply_settings,
    merged,
    settings_of,
    tensors_of,
)  # fmt: skip
from planner.runtime.together import explained, together
from planner.runtime.weights import Place, Weights, materialize, named_weights

MODEL, OPTIMIZER = "model", "optimizer"
FAILED, UNREAD = "the checkpoint cannot be saved", "the checkpoint cannot be read"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What of a running model a checkpoint is made of. duplicates: parameters that another stage
    of the pipeline holds as well, and writes."""

    plan: Plan
    meshes: Meshes
    modules: Sequence[nn.Module]
    weights: Weights
    place: Place
    duplicates: frozenset[Tensor] = frozenset()

    def tensors(self) -> list[tuple[str, Tensor]]:
        """This rank's parameters and persistent buffers under their owners' names; one name may
        be there twice, for two stages of the pipeline."""
        found = named_weights(self.modules, self.weights)
        return [(name, x) for name, x in found if name in self.weights.shapes]

    def names(self) -> dict[Tensor, str]:
        return {x: name for name, x in self.tensors() if isinstance(x, nn.Parameter)}

    def written(self) -> dict[str, Held]:
        """What this rank saves of the model. Raises PlanError where there is no value yet."""
        tensors = self.tensors()
        empty = [name for name, x in tensors if x.is_meta]
        if empty:
            raise PlanError(
                f"{empty[0]} has no values to save", hints=("parallel.load or init first",)
            )
        return {name: Held(x) for name, x in tensors if self.writes(x)}

    def writes(self, tensor: Tensor) -> bool:
        """Whether this rank saves a tensor of its: of buffers, which data ranks need not have
        alike (running statistics), the first one's count."""
        if isinstance(tensor, nn.Parameter):
            return tensor not in self.duplicates
        return isinstance(tensor, DTensor) or self.is_first

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those that hold the same stage."""
        return not any(self.meshes.rank(axis) for axis in ("dp", "cp", "tp"))


@dataclass(slots=True)
class Saving:
    """A checkpoint that is being written. `wait()` before the job ends."""

    _thread: threading.Thread | None = None
    _fault: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when it is written. Raises PlanError, on every rank, where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of one job: one is written at a time."""

    parts: Parts
    _last: Saving = field(default_factory=Saving)
    _group: dist.ProcessGroup | None = None

    def save(
        self, folder: str | Path, optimizers: Sequence[Optimizer], state: Mapping[str, Any],
        asynchronous: bool,
    ) -> Saving:  # fmt: skip
        """Write model, optimizers and state (JSON). asynchronous: return when tensors are copied.

        Raises PlanError on every rank where any rank failed; an earlier checkpoint is as it was.
        """
        self._last.wait()
        path = Path(folder).absolute()
        tensors, about = together(FAILED, lambda: _collect(self.parts, optimizers, state))
        if optimizers:
            about["optimizers"] = _gathered(about["optimizers"])
        if not asynchronous:
            _write(path, tensors, about, self.parts.plan, None)
            return Saving()
        if self._group is None:  # collectives of its own, which the training's do not cross
            self._group = dist.new_group(backend="gloo")
        copies = {k: {n: x.copied() for n, x in v.items()} for k, v in tensors.items()}
        saving = self._last = Saving()

        def run() -> None:
            try:
                _write(path, copies, about, self.parts.plan, self._group)
            except BaseException as fault:  # for whoever waits
                saving._fault = fault

        saving._thread = threading.Thread(target=run, name="meshwright-checkpoint")
        saving._thread.start()
        return saving

    def restore(
        self, folder: str | Path, optimizers: Sequence[Optimizer], strict: bool
    ) -> dict[str, Any]:
        """Read what `save` wrote under any plan of the model; the state that was saved with it.

        strict: the model's operations must be the same, not only its weights. Raises GateError on
        every rank for another model's checkpoint, PlanError for what cannot be read.
        """
        self._last.wait()
        path, metadata, about = together(
            UNREAD,
            lambda: _opened(Path(folder).absolute(), self.parts, optimizers, strict),
        )
        together(UNREAD, lambda: _read(path, metadata, about, self.parts, optimizers))
        _go_on_drawing(about["random"], self.parts.meshes)
        return dict(about["state"])


def _collect(
    parts: Parts, optimizers: Sequence[Optimizer], state: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Held]], dict[str, Any]]:
    """(tensors by kind, what is written beside them) of this rank."""
    try:
        told = json.loads(json.dumps(dict(state)))
    except (TypeError, ValueError) as fault:
        raise PlanError("the state to save is not JSON", why=str(fault),
                        hints=("numbers, texts, lists and dictionaries",)) from fault  # fmt: skip
    names, found = parts.names(), {MODEL: parts.written()}
    for i, optimizer in enumerate(optimizers):
        found[_kind(i)] = tensors_of(optimizer, names, parts.duplicates)
    settings = [settings_of(o, names) if parts.is_first else None for o in optimizers]
    about = {
        "format": FORMAT, "graph": parts.plan.graph_hash, "state": told, "optimizers": settings,
        "random": _random_seed(told),
    }  # fmt: skip
    return found, about


def _kind(place: int) -> str:
    return OPTIMIZER if place == 0 else f"{OPTIMIZER}{place}"


def _gathered(own: Sequence[Any]) -> list[dict[str, Any]]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return [merged([s for s in each if s is not None]) for each in zip(*every)]


def _write(
    folder: Path, tensors: Mapping[str, Mapping[str, Held]], about: Mapping[str, Any], plan: Plan,
    group: dist.ProcessGroup | None,
) -> None:  # fmt: skip
    """Write beside, then put in place. Raises PlanError on every rank."""
    first = dist.get_rank() == 0
    what = f"the checkpoint {folder} cannot be saved"
    fresh = beside(folder, SAVING)
    try:
        together(what, lambda: begin(folder, ABOUT) if first else None, group)
        store(what, fresh, tensors, group)
        together(
            what, lambda: write_about(fresh, about, format_graph(plan.graph)) if first else None,
            group,
        )  # fmt: skip
        together(what, lambda: commit(fresh, folder) if first else None, group)
    except PlanError as fault:
        if first:
            abandon(fresh)
        earlier = "the earlier one is as it was" if folder.exists() else ""
        fault.hints = (*fault.hints, earlier) if earlier else fault.hints
        raise


def store(
    what: str, folder: Path, tensors: Mapping[str, Mapping[str, Held]],
    group: dist.ProcessGroup | None,
) -> None:  # fmt: skip
    """Write the tensors of all ranks to a new folder. Raises PlanError on every rank."""
    try:
        save(
            {kind: dict(named) for kind, named in tensors.items()},
            storage_writer=writer(folder), planner=SavePlanner(), process_group=group,
        )  # fmt: skip
    except CheckpointException as fault:
        raise _first_of(what, fault) from fault


def writer(folder: Path) -> FileSystemWriter:
    """One file a rank, flushed to the disk."""
    return FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)


def _first_of(what: str, fault: CheckpointException) -> PlanError:
    rank, (cause, _) = min(fault.failures.items())
    if isinstance(cause, PlanError):
        return cause
    found = explained(what, cause)
    found.where = f"rank {rank}"
    return found


def _opened(
    folder: Path, parts: Parts, optimizers: Sequence[Optimizer], strict: bool
) -> tuple[Path, Metadata, dict[str, Any]]:
    """The folder that holds the checkpoint, what is in it and what it says of itself; checked."""
    folder = opened(folder)
    about, graph = read_about(folder)
    metadata = _metadata(folder)
    _check_weights(folder, metadata.state_dict_metadata, parts.weights)
    if strict and about["graph"] != parts.plan.graph_hash:
        differs = first_difference(parse_graph(graph), parts.plan.graph)
        if differs:
            raise GateError(
                f"{folder} is a checkpoint of another model: {differs}",
                why="their weights have the same names and shapes",
                hints=("parallel.restore(folder, strict=False) takes it all the same",),
            )
    kinds = [s["kind"] for s in about["optimizers"]]
    if len(optimizers) > len(kinds):
        raise PlanError(
            f"{folder} holds the state of {len(kinds)} optimizers, not of {len(optimizers)}",
            hints=("parallel.restore(folder) without an optimizer reads the weights",),
        )
    for optimizer, kind in zip(optimizers, kinds):
        if type(optimizer).__name__ != kind:
            raise PlanError(
                f"{folder} holds the state of {kind}, not of {type(optimizer).__name__}",
                hints=("parallel.restore(folder) without an optimizer reads the weights",),
            )
    for optimizer in optimizers:
        settings_of(optimizer, parts.names())  # every parameter of it is the model's
    return folder, metadata, about


def _metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except (OSError, EOFError) as fault:
        raise PlanError(f"{folder} is no whole checkpoint", why=str(fault)) from fault


def _check_weights(folder: Path, stored: Mapping[str, Any], weights: Weights) -> None:
    theirs = {
        name.removeprefix(f"{MODEL}."): tuple(x.size)
        for name, x in stored.items()
        if name.startswith(f"{MODEL}.")
    }
    for name, shape in weights.shapes.items():
        if name not in theirs and 0 not in shape:
            what = f"{name} is a weight of the model, not of the checkpoint"
        elif name in theirs and theirs[name] != shape:
            what = f"{name} is {list(theirs[name])} in the checkpoint, {list(shape)} in the model"
        else:
            continue
        raise _other(folder, what)
    for name in theirs:
        if name not in weights.shapes:
            raise _other(folder, f"{name} is a weight of the checkpoint, not of the model")


def _other(folder: Path, what: str) -> GateError:
    return GateError(f"{folder} is a checkpoint of another model: {what}",
                     hints=("parallel.restore(folder) of the one that saved it",))  # fmt: skip


def first_difference(old: Graph, new: Graph) -> str:
    """The first operation in which two models differ; empty where they differ only in precision,
    names or source lines."""
    for (_, path, a), (_, other, b) in zip(old.calls(), new.calls()):
        if path != other:
            return f"after it runs {path}, the model {other}"
        ops = [[(n.op, n.attrs) for n in unit.nodes if n.op != "cast"] for unit in (a, b)]
        if ops[0] != ops[1]:
            for (op, attrs), (changed, now) in zip(*ops):
                if op != changed:
                    return f"{path} runs {op} there, {changed} in the model"
                if attrs != now:
                    return f"{path} runs {op} with {dict(attrs)} there, {dict(now)} in the model"
            return f"{path} has {len(ops[0])} operations there, {len(ops[1])} in the model"
    counts = [sum(1 for _ in g.calls()) for g in (old, new)]
    return f"it has {counts[0]} units, the model {counts[1]}" if counts[0] != counts[1] else ""


def _read(
    folder: Path, metadata: Metadata, about: Mapping[str, Any], parts: Parts,
    optimizers: Sequence[Optimizer],
) -> None:  # fmt: skip
    tensors, names = parts.tensors(), parts.names()
    for _, tensor in tensors:
        materialize(tensor, parts.place(tensor))
    wanted = [(f"{MODEL}.{name}", Held(x)) for name, x in tensors]
    for i, optimizer in enumerate(optimizers):
        apply_settings(optimizer, names, about["optimizers"][i])
        prefix = f"{_kind(i)}."
        stored = metadata.state_dict_metadata
        own = {n.removeprefix(prefix): x for n, x in stored.items() if n.startswith(prefix)}
        held = allocate(optimizer, names, own, about["optimizers"][i]["whole"])
        wanted += [(prefix + n, x) for n, x in held]
    read(folder, metadata, wanted)


def _random_seed(state: Any) -> int:
    """A number that depends on what was drawn so far."""
    drawn = torch.get_rng_state().numpy().tobytes() + json.dumps(state).encode()
    return int.from_bytes(hashlib.sha256(drawn).digest()[:6], "big")


def _go_on_drawing(seed: int, meshes: Meshes) -> None:
    """Random numbers after a restore: others on every data rank and stage, the same over tp."""
    place = "/".join(str(meshes.rank(axis)) for axis in ("pp", "dp", "cp"))
    torch.manual_seed(seed_of(seed, place))

