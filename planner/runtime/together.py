"""Work of which every rank must know how it ended on every other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ir.errors import PlanError

T = TypeVar("T")


def together(
    what: str, work: Callable[[], T], group: dist.ProcessGroup | None = None
) -> T:
    """Run the work on every rank, and go on where all have done it.

    Raises the same PlanError on every rank where any failed: that rank's own, or `what` (a
    sentence without its end) with the fault behind it.
    """
    fault: PlanError | None = None
    try:
        value = work()
    except PlanError as found:
        fault = found
    except Exception as found:  # whatever it is, the other ranks wait for it
        fault = explained(what, found)
        fault.__cause__ = found
    faults: list[PlanError | None] = [None] * dist.get_world_size(group)
    told = fault and type(fault)(fault.what, where=fault.where, why=fault.why, hints=fault.hints)
    dist.all_gather_object(faults, told, group=group)
    failed = [(rank, f) for rank, f in enumerate(faults) if f is not None]
    if not failed:
        return value
    rank, first = failed[0]
    if len(failed) < len(faults):
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        first.where = f"rank {rank}{others}" + (f": {first.where}" if first.where else "")
    raise first from fault


def explained(what: str, fault: BaseException) -> PlanError:
    """A PlanError of what went wrong, with the system's own words."""
    reason = getattr(fault, "strerror", None) or str(fault).strip() or type(fault).__name__
    return PlanError(f"{what}: {reason.splitlines()[0]}", why=type(fault).__name__)
