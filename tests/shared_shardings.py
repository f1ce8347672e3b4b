"""What DTensor finds out of an operation's placements, found once for all local ranks of a session.

Half of a small model's first step is torch asking, on every rank and again in every new worker,
how the result of an operation on such shards lies: a function of the operation, the shapes, the
placements and the sizes of the mesh. Imported into the process that workers are forked from, this
writes each answer into the session's cache; another rank that asks the same reads it, and one that
asks while the first still looks waits for it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OutputSharding
from torch.distributed.tensor._sharding_prop import ShardingPropagator, _are_we_tracing
from torch.distributed.tensor.placement_types import _StridedShard

# a placement of another kind may hold a rank's own (the mask of an embedding's rows)
PLACEMENTS = (Replicate, Shard, Partial, _StridedShard)
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.layout, torch.device,
         torch.memory_format)  # fmt: skip


class _OwnAnswer(Exception):
    """The question, or its answer, is not the same for every rank."""


def install(folder: Path) -> None:
    """Have this process, and what is forked from it, share answers in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    find = ShardingPropagator.propagate_op_sharding_non_cached
    inside = False  # an operation without a rule asks of those that it is made of

    @functools.wraps(find)
    def shared(self: ShardingPropagator, schema: OpSchema) -> OutputSharding:
        nonlocal inside
        if inside or _are_we_tracing():
            return find(self, schema)
        try:
            mesh = schema.get_mesh_from_args()
            asked = _question(self, schema, mesh)
        except (_OwnAnswer, ValueError, RuntimeError):
            return find(self, schema)
        file = folder / hashlib.sha256(repr(asked).encode()).hexdigest()
        inside = True
        try:
            return _read(file, mesh) or _found(file, mesh, lambda: find(self, schema))
        finally:
            inside = False

    ShardingPropagator.propagate_op_sharding_non_cached = shared


def _found(file: Path, mesh: DeviceMesh, find: Callable[[], OutputSharding]) -> OutputSharding:
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = _read(file, mesh)
        if answer is None:
            answer = find()
            written = io.BytesIO()
            try:
                _Writer(written, mesh).dump(answer)
            except _OwnAnswer:
                return answer
            part = file.with_suffix(".part")
            part.write_bytes(written.getvalue())
            part.rename(file)
    return answer


def _read(file: Path, mesh: DeviceMesh) -> OutputSharding | None:
    try:
        written = file.read_bytes()
    except FileNotFoundError:
        return None
    return _Reader(io.BytesIO(written), mesh).load()


def _question(propagator: ShardingPropagator, schema: OpSchema, mesh: DeviceMesh) -> Any:
    """All that the answer is a function of, as text tells apart."""

    def words(value: Any) -> Any:
        if isinstance(value, DTensorSpec):
            if value.mesh is not mesh and value.mesh != mesh:
                raise _OwnAnswer
            placements = tuple(map(words, value.placements))
            meta = value.tensor_meta
            return (placements, value.shard_order, value.use_strided_shard_as_shard_order,
                    meta and (tuple(meta.shape), tuple(meta.stride), meta.dtype))  # fmt: skip
        if type(value) in PLACEMENTS:
            return repr(value)
        if isinstance(value, OpOverload):
            return value.name()
        if isinstance(value, (tuple, list)):
            return type(value).__name__, tuple(map(words, value))
        if isinstance(value, dict):
            return tuple((key, words(item)) for key, item in value.items())
        if type(value) not in PLAIN:
            raise _OwnAnswer
        return type(value).__name__, value

    # sizes in the operation's own arguments become those of a rank's shard
    of_shard = (
        schema.op in propagator.op_to_shape_and_stride_idx
        or schema.op in propagator.op_to_scalar_shape_adjuster
    )
    return (
        words(schema.op), words(schema.args_schema), words(schema.kwargs_schema),
        tuple(mesh.shape), mesh.mesh_dim_names, mesh.device_type,
        mesh.get_coordinate() if of_shard else None,
    )  # fmt: skip


class _Writer(pickle.Pickler):
    """Answers without the rank's own mesh."""

    def __init__(self, file: io.BytesIO, mesh: DeviceMesh) -> None:
        super().__init__(file)
        self._mesh = mesh

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, DeviceMesh):
            if value != self._mesh:
                raise _OwnAnswer
            return "mesh"
        return value.name() if isinstance(value, OpOverload) else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, DTensorSpec):
            if any(type(p) not in PLACEMENTS for p in value.placements):
                raise _OwnAnswer
            fields = (value.mesh, value.placements, value.tensor_meta, value.shard_order)
            return DTensorSpec, (*fields, value.use_strided_shard_as_shard_order)
        if isinstance(value, OpSchema):
            return OpSchema, (value.op, value.args_schema, value.kwargs_schema, value.schema_info)
        return NotImplemented


class _Reader(pickle.Unpickler):
    """Answers on this rank's mesh."""

    def __init__(self, file: io.BytesIO, mesh: DeviceMesh) -> None:
        super().__init__(file)
        self._mesh = mesh

    def persistent_load(self, name: str) -> Any:
        if name == "mesh":
            return self._mesh
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        return getattr(getattr(getattr(torch.ops, space), packet), overload or "default")


install(Path(os.environ["XDG_CACHE_HOME"]) / "shardings")
