"""Weights as the model's own code would draw them, the same on any mesh.

How a parameter is filled was recorded while the model was built. Each is made whole on the CPU,
one at a time, from the seed and its name, and cut: the same bits whatever the plan, though not
those that one process draws for the whole model in one go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ir.errors import PlanError
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.tape import Made, Replay
from planner.runtime.together import together
from planner.runtime.weights import Place, Weights, materialize, named_weights

WAYS = (
    "parallel.load(path) reads weights",
    "or fill it where the model is built: torch.nn.init, or the module's reset_parameters()",
)


def init(
    modules: Sequence[nn.Module], weights: Weights, seed: int, place: Place
) -> None:
    """Fill what was built without values. Raises PlanError on every rank for a weight of which
    nothing says how, before any is changed."""
    found = list(named_weights(modules, weights))
    together("the weights cannot be initialised", lambda: _check(found, weights))
    replay = replay_of(weights, seed)
    together("the weights cannot be initialised", lambda: _fill(found, weights, replay, place))


def replay_of(weights: Weights, seed: int) -> Replay:
    """Makes weights from the seed: each has random numbers of its own, by its name; so has what
    it is computed from, by the first weight that is."""
    names = {made.memory: name for name, made in weights.origins.items()}
    for name, made in weights.origins.items():
        others = sorted(made.tape.sources(made.memory) - names.keys())
        names.update((memory, f"{name}#{i}") for i, memory in enumerate(others))
    return Replay(seed_of=lambda memory: seed_of(seed, names[memory]), device=torch.device("cpu"))


def seed_of(seed: int, name: str) -> int:
    """A seed of one weight's own."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check(found: Sequence[tuple[str, Tensor]], weights: Weights) -> None:
    for name, tensor in found:
        made = weights.origins.get(name)
        if made is None and tensor.is_meta:
            raise _unknown(name, "it was not recorded: was the model copied after it was built?")
        if made is not None and not _is_filled(made):
            raise _unknown(name, "the model leaves it as torch.empty made it")


def _is_filled(made: Made) -> bool:
    return any(not call.unfilled for call in made.tape.needed(made.memory))


def _unknown(name: str, why: str) -> PlanError:
    return PlanError(f"nothing says how {name} is to be initialised", why=why, hints=WAYS)


def _fill(
    found: Sequence[tuple[str, Tensor]], weights: Weights, replay: Replay,
    place: Place,
) -> None:  # fmt: skip
    for name, tensor in found:
        made = weights.origins.get(name)
        if made is None:
            continue
        whole = replay.make(made)
        if whole.is_floating_point() and bool(whole.isnan().any()):
            raise _unknown(name, "the model fills a part of it")
        materialize(tensor, place(tensor))
        put(whole, tensor)


@torch.no_grad()
def put(whole: Tensor, tensor: Tensor) -> None:
    """Copy this rank's part of a whole tensor to where it is held."""
    local = local_of(tensor)
    for box in boxes_of(tensor):
        box.of_local(local).copy_(box.of_whole(whole))


def refuse_without_values(module: nn.Module) -> None:
    """Have a module that still has parameters on meta say what to do, instead of running."""

    def check(root: nn.Module, _: object) -> None:
        empty = [name for name, p in root.named_parameters() if p.is_meta]
        if empty:
            raise PlanError(
                f"{len(empty)} parameters have no values, the first {empty[0]}",
                hints=("parallel.load(path) reads weights, parallel.init(seed) draws them",),
            )
        handle.remove()

    handle = module.register_forward_pre_hook(check, prepend=True)
