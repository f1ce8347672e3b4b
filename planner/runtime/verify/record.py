"""Every collective that a piece of code issues, by kind, group and bytes: a dispatch mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.runtime.gathered import traffic_of

NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
# what moves nothing, and the receiving half of a send, which is not counted again
SILENT, RECEIVE = ("wait_tensor", "_wrap_tensor_autograd"), ("recv_", "recv_any_source_")


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Sent:
    """One kind of collective. size_bytes as the plan's ledger has it: the whole tensor; of an
    all-to-all and of a send, what this rank holds."""

    kind: str
    group: str
    size_bytes: int


def nbytes(value: Any) -> int:
    """Bytes of a tensor, or of all the tensors in a list."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


# operation -> (kind, bytes by its arguments). What works in place takes its output first.
TABLE: dict[str, tuple[str, Callable[[Any], int]]] = {
    "_allgather_base_": ("all_gather", lambda a: nbytes(a[0])),
    "_reduce_scatter_base_": ("reduce_scatter", lambda a: nbytes(a[1])),
    "allreduce_": ("all_reduce", lambda a: nbytes(a[0])),
    "alltoall_base_": ("all_to_all", lambda a: max(nbytes(a[0]), nbytes(a[1]))),
    "alltoall_": ("all_to_all", lambda a: max(nbytes(a[0]), nbytes(a[1]))),
    "broadcast_": ("broadcast", lambda a: nbytes(a[0])),
    "send": ("p2p", lambda a: nbytes(a[0])),
    "all_reduce": ("all_reduce", lambda a: nbytes(a[0])),
    "all_reduce_": ("all_reduce", lambda a: nbytes(a[0])),
    "all_gather_into_tensor": ("all_gather", lambda a: nbytes(a[0]) * int(a[1])),
    "reduce_scatter_tensor": ("reduce_scatter", lambda a: nbytes(a[0])),
    "all_to_all_single": ("all_to_all", lambda a: nbytes(a[0])),
    "shard_dim_alltoall": ("all_to_all", lambda a: nbytes(a[0])),
    "broadcast": ("broadcast", lambda a: nbytes(a[0])),
}


class Recorder(TorchDispatchMode):
    """Counts collectives into `counts[phase]`; `phase` is set by whoever runs the code.

    before: called ahead of each, and of what is received, with the name of its group.
    """

    def __init__(self, before: Callable[[str], None]) -> None:
        super().__init__()
        self.phase = 0
        self.counts: dict[int, Counter[Sent]] = {}
        self._before = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it issues its collectives on local tensors, seen then
        if getattr(func, "namespace", "") == "meshwright_cp":  # attention shared by ranks
            group = _group_of(args)
            self._before(group)
            for kind, count, size in traffic_of(func, args):
                sent = Sent(kind=kind, group=group, size_bytes=size)
                self.counts.setdefault(self.phase, Counter())[sent] += count
        if getattr(func, "namespace", "") in NAMESPACES:
            name = func._schema.name.partition("::")[2]
            if name not in SILENT:
                group = _group_of(args)
                self._before(group)
                if name not in RECEIVE:
                    kind, size = TABLE.get(name, (name, nbytes))
                    sent = Sent(kind=kind, group=group, size_bytes=size(args))
                    self.counts.setdefault(self.phase, Counter())[sent] += 1
        return func(*args, **(kwargs or {}))


def _group_of(args: Any) -> str:
    """The name of the process group among an operation's arguments."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return str(torch.distributed.ProcessGroup.unbox(value).group_name)
    names = [value for value in args if isinstance(value, str)]  # a reduction's word comes first
    return names[-1] if names else ""
