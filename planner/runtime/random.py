"""Random numbers on DTensors: the same on every rank of a replicated value, others in each shard.

Each call draws one seed from the default generator of the CPU, which is in step over the tp ranks
(`in_step`) and which a checkpoint restores before it recomputes. The rank is folded in where the
value is split, and always the rank of the samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from planner.runtime.meshes import Meshes

# functions whose every random number belongs to one element of their first argument
ELEMENTWISE = frozenset({
    "dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "native_dropout", "bernoulli",
    "bernoulli_", "uniform_", "normal_", "exponential_", "random_", "log_normal_", "geometric_",
    "cauchy_", "rand_like", "randn_like", "randint_like", "rrelu", "rrelu_",
})  # fmt: skip
# functions that draw for a whole row or channel
OTHERS = frozenset({
    "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_dropout_",
    "feature_alpha_dropout", "feature_alpha_dropout_", "gumbel_softmax", "multinomial", "normal",
})  # fmt: skip
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)  # odd constants of splitmix64


def in_step(meshes: Meshes) -> None:
    """Give the tp ranks of a replica one state of the CPU's default generator: the first one's."""
    state = torch.get_rng_state().to(meshes.device_type)
    group = meshes.tp.get_group()
    dist.broadcast(state, group=group, group_src=0)
    if state.any():  # a group that only pretends to communicate leaves it, one on meta has none
        torch.set_rng_state(state.cpu())


def drawn_seed(samples: int, shard: int) -> int:
    """A seed for one call. samples: the data rank; shard: 0 for a replicated value, else the
    shard's number from 1 on."""
    with unset_fake_temporarily():  # the check at full size runs on fake tensors
        seed = int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu"))
    return (seed ^ (_MIX[0] * samples) ^ (_MIX[1] * shard)) & (2**63 - 1)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from this seed inside; the default generators go on as if nothing had been drawn."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.random.default_generator.manual_seed(seed)  # type: ignore[attr-defined]
        if cuda:
            torch.cuda.manual_seed(seed)
        yield
