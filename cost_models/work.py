"""Work points: what a unit is costed for, many at once; a point is a column of every array."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.compute import Kernels
from cost_models.engines import Engine
from cost_models.formats import Formats
from cost_models.hardware import Cluster
from ir.graph import ITEM_BYTES, Tensor

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Degrees that a unit's own cost depends on, beside what a work point says.

    ep, etp: where experts lie; None leaves grouped matmuls and expert traffic out, and an empty
    cp_kind the traffic of attention: they are costed on their own and added. formats: of matmuls
    by group, where not the plan's precision.
    """

    tp: int = 1
    sequence_parallel: bool = False
    cp_kind: str = ""
    ep: int | None = None
    etp: int = 1
    formats: Formats = ()


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work points: micro-batch, cp and local sequence (after cp), and the context around them."""

    micro_batch: Floats
    cp: Floats
    local_seq: Floats
    axes: Axes
    cluster: Cluster
    kernels: Kernels
    engine: Engine
    precision: str
    is_layer: bool
    expert_imbalance: float = 1.0
    # sizes of tensors at these points; `replace` forgets them
    known: dict[Tensor, tuple[Any, ...]] = field(default_factory=dict, init=False, repr=False)

    def on(self, axes: Axes) -> Work:
        """The same points under other degrees: what is known of sizes is of both."""
        made = replace(self, axes=axes)
        object.__setattr__(made, "known", self.known)
        return made

    @property
    def skew(self) -> float:
        """Load of the rank that waits for nobody, over the mean: 1 where experts do not lie over
        ranks."""
        return self.expert_imbalance if (self.axes.ep or 1) > 1 else 1.0

    @property
    def zeros(self) -> Floats:
        return np.zeros_like(self.micro_batch)

    def sizes(self, tensor: Tensor, at: int, seq_scale: Any = 1) -> tuple[Any, ...]:
        if isinstance(seq_scale, int) and seq_scale == 1:
            if tensor not in self.known:
                self.known[tensor] = tensor.sizes(self.micro_batch, self.local_seq)
            found = list(self.known[tensor])
        else:
            found = list(tensor.sizes(self.micro_batch, self.local_seq * seq_scale))
        if at >= 0:
            found[at] = found[at] / self.axes.tp
        return tuple(found)

    def nbytes(self, tensor: Tensor, at: int) -> Floats:
        return self.zeros + prod(self.sizes(tensor, at)) * ITEM_BYTES[tensor.dtype]
