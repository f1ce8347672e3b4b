"""What bounds of meshes know of optimizers that lie below the device for some layers alone, and of
tiers that have no room for more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.bound_state import Held

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Room = tuple[Floats, Floats]  # below, by mesh: what a GPU may lay in the mean, and at most


def with_room(held: Held, below: Held, rooms: Mapping[str, Room], pp: Ints) -> Held:
    """Of optimizers below, no more than tiers have room for in the mean of all GPUs; any one layer
    may lie there still."""
    share = np.ones(len(pp))
    for tier, (mean, _) in rooms.items():
        laid = below.laid_bytes.get(tier, np.zeros(len(pp))) / pp
        share = np.minimum(share, mean / np.maximum(laid, 1.0))
    state = below.state_bytes.copy()
    state[:, 0] = held.state_bytes[:, 0] + share * (state[:, 0] - held.state_bytes[:, 0])
    return replace(
        below, state_bytes=state, tail_s=held.tail_s + share * (below.tail_s - held.tail_s),
        each_s=held.each_s + share * (below.each_s - held.each_s), share=share,
        laid_bytes={tier: share * size for tier, size in below.laid_bytes.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """Optimizers of some layers below, by mesh. alike: layers of the commonest kind, of `layers`.
    learn: whether all parameters of a mesh do; others free their own for nothing."""

    layers: int
    alike: int
    fragmentation: float
    learn: NDArray[np.bool_]

    def freed(self, held: Held, below: Held, room_bytes: Floats) -> tuple[Floats, Floats]:
        """(bytes, seconds of a step a byte) that optimizers below free, of all ranks together."""
        less = np.maximum(0.0, held.state_bytes[:, 0] - below.state_bytes[:, 0])
        more = np.maximum(0.0, below.tail_s - held.tail_s) * self.learn
        rate = more / np.maximum(less, 1.0)
        # first goes what needs no copies to be gathered: other layers, and the ends
        alike = self.alike * (held.state_bytes[:, 1] - below.state_bytes[:, 1])
        alike = np.clip(alike - less * (1 / np.maximum(below.share, 1e-9) - 1), 0.0, less)
        return less - alike * (1 - self._net(held, below, room_bytes)), rate

    def laid_bytes(self, held: Held, below: Held | None, room_bytes: Floats) -> Floats:
        """Bytes in the host's memory of all pp ranks, a GPU each, less what that frees, at least:
        where some optimizers lie below, or all do, or none."""
        none = np.zeros(len(self.learn))
        laid = held.laid_bytes.get("cpu", none)
        if below is None:
            return laid
        less, _ = self.freed(held, below, room_bytes)
        return laid + np.minimum(0.0, below.laid_bytes.get("cpu", none) * self.learn - less)

    def _net(self, held: Held, below: Held, room_bytes: Floats) -> Floats:
        """What a rank saves at most of each byte of layers whose optimizers go below: the copies
        of one that come up to be gathered take room that none does without, and it has no more
        such layers than fit."""
        wide = 1 + self.fragmentation
        more = 2 * wide * (below.gathered_bytes[:, 1] - held.gathered_bytes[:, 1])
        each, low = held.state_bytes[:, 1], below.state_bytes[:, 1]
        fits = room_bytes - 2 * wide * below.gathered_bytes[:, 1]
        most = np.clip(np.floor(fits / np.maximum(low, 1.0)), 1, self.layers)
        net: Floats = 1 - np.maximum(0.0, more) / np.maximum(most * (each - low), 1.0)
        return np.clip(net, 0.0, 1.0)
