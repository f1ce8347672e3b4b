"""Serve a model on this rank: its weights placed, its cache as planned, its limits kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ir.errors import PlanError
from planner.runtime.load import matched
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.serve.called import refuse_implementation, with_cache
from planner.runtime.serve.experts import Absent
from planner.runtime.serve.kv import Kv, cache_of, even_mask, of_transformers
from planner.runtime.serve.lent import Place
from planner.runtime.serve.loader import Laid, Loader, Weight
from planner.runtime.serve.pipe import outputs_whole
from planner.runtime.serve.place import Loaded, member_of, place_all
from planner.runtime.sources import Files, Source
from planner.runtime.weights import Weights, materialize, named_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the plan's memory is for: sequences at once, tokens of a prompt and of one sequence.
    beams: whether several answers to a prompt may be kept, which change places as they grow."""

    batch: int
    prompt: int
    tokens: int
    beams: bool = True

    def check(self, batch: int, prompt: int, tokens: int) -> None:
        """Raises PlanError where a call wants more than was planned."""
        for what, asked, most, flag in (
            ("sequences at once", batch, self.batch, "--batch"),
            ("tokens in a prompt", prompt, self.prompt, "--prompt"),
            ("tokens in a sequence", tokens, self.tokens, "--output"),
        ):
            if asked > most:
                raise PlanError(
                    f"{asked} {what}, the plan has memory for {most}",
                    hints=(f"plan trace .. {flag} makes a plan for more", "ask for less at once"),
                )


@dataclass(slots=True)
class Served:
    """How a model is served on this rank: what lies where, and what has moved."""

    limits: Limits
    kv: Kv
    loaded: Loaded = field(default_factory=Loaded)


def weights_in(
    units: Sequence[tuple[str, nn.Module]], model: nn.Module, weights: Weights,
    laid: Callable[[str], Laid],
) -> list[tuple[str, nn.Module, list[Weight]]]:  # fmt: skip
    """The parameters of each unit, and at last those of no unit; tied ones under their owner."""
    found: list[tuple[str, nn.Module, list[Weight]]] = []
    seen: set[tuple[nn.Module, str]] = set()
    for path, unit in [*units, ("", model)]:
        by_name: dict[str, list[Place]] = {}
        tensors: dict[str, nn.Parameter] = {}
        for at, module in unit.named_modules():
            for name, p in module._parameters.items():
                where = (module, name)
                if p is None or isinstance(p, Absent) or where in seen:
                    continue
                seen.add(where)
                owner = weights.owner(".".join(x for x in (path, at, name) if x))
                by_name.setdefault(owner, []).append(Place(module, name))
                tensors[owner] = p
        found.append((path, unit, [
            Weight(name, tuple(places), tensors[name], laid(name), _expert(model, name))
            for name, places in by_name.items()
        ]))  # fmt: skip
    return found


def _expert(model: nn.Module, name: str) -> nn.Module | None:
    member = member_of(name)
    return None if member is None else model.get_submodule(member)


def serve_here(
    model: nn.Module, units: Sequence[tuple[str, nn.Module]], laid: Callable[[str], Laid],
    *, weights: Weights, files: str | Path | None, folder: str | Path | None,
    device: torch.device, kv: Kv, limits: Limits, slots: int = 2, staged: bool = False,
) -> Served:  # fmt: skip
    """Place the weights of this rank's units and patch the model; its modules change in place.

    files: safetensors for weights that the model was built without. folder: for a disk tier.
    """
    served = Served(limits, kv)
    routed = weights_in(units, model, weights, laid)
    below = [w for _, _, some in routed for w in some
             if w.laid.tier != "gpu" and w.laid.experts is not None]  # fmt: skip
    with ExitStack() as stack:
        sources: Mapping[str, Source] = {}
        if files is not None:
            stored = stack.enter_context(Files(Path(files))).stored()
            held = list(named_weights([model], weights))
            sources = matched(stored, weights, held, str(files), True)
            _read_buffers(model, weights, sources)
        if below:
            _take_experts_one_by_one(model)
        loader = Loader(sources, None if folder is None else Path(folder))
        served.loaded = place_all(routed, loader, device, slots=slots)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _filled(name, buffer).to(device)
    model.eval()
    model.requires_grad_(False)
    _limit(model, served, staged)
    return served


@torch.no_grad()
def _read_buffers(model: nn.Module, weights: Weights, sources: Mapping[str, Source]) -> None:
    """Buffers that a checkpoint holds beside parameters: a router's bias, running means."""
    for name, buffer in named_weights([model], weights):
        if isinstance(buffer, nn.Parameter) or name not in sources:
            continue
        materialize(buffer, "cpu")
        for box in boxes_of(buffer):
            part = sources[name].read(list(zip(box.offsets, box.sizes)))
            box.of_local(local_of(buffer)).copy_(part)


def _filled(name: str, buffer: Tensor) -> Tensor:
    if not buffer.is_meta:
        return buffer
    raise PlanError(f"the buffer {name} has no values",
                    hints=("build the model under planner.meta(): it keeps buffers real",))


def _take_experts_one_by_one(model: nn.Module) -> None:
    """Transformers' experts may run as grouped matmuls over all, or as a loop over those hit."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")


def _limit(model: nn.Module, served: Served, staged: bool) -> None:
    """Refuse what the plan has no memory for, and give `generate` the planned cache."""
    forward = model.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        ids = _first(args, kwargs)
        if ids is not None and ids.dim() >= 2:
            served.limits.check(ids.shape[0], 0, _behind(kwargs) + ids.shape[1])
        args, kwargs = with_cache(model, forward, served.kv, staged, args, kwargs)
        with torch.no_grad():
            return outputs_whole(forward(*args, **kwargs))

    model.forward = run
    generate = getattr(model, "generate", None)
    if generate is None:
        if not served.kv.plain:
            cache_of(model, served.kv)
        return

    @functools.wraps(generate)
    def generated(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        ids = inputs if inputs is not None else _given(kwargs)
        if ids is not None:
            new = _new_tokens(model, ids, kwargs)
            if not served.limits.beams and int(_asked(model, kwargs, "num_beams") or 1) > 1:
                raise PlanError("beams, and the plan divides sequences over replicas of attention",
                                why="a beam would change ranks with its cache",
                                hints=("num_beams=1", "--fix attention_dp=1"))  # fmt: skip
            served.limits.check(ids.shape[0] * _beams(model, kwargs), ids.shape[1],
                                ids.shape[1] + new)  # fmt: skip
        if of_transformers(model):  # compiled steps would keep weights that move
            kwargs.setdefault("disable_compile", True)
        if not served.kv.plain and _asked(model, kwargs, "use_cache") is not False:
            refuse_implementation(served.kv, kwargs.get("cache_implementation"))
            kwargs["cache_implementation"] = None  # nor what the model's own configuration names
            if kwargs.get("past_key_values") is None:
                kwargs["past_key_values"] = cache_of(model, served.kv)
        if served.kv.block and ids is not None:
            kwargs["attention_mask"] = even_mask(ids, kwargs.get("attention_mask"))
        if inputs is not None:
            args = (inputs, *args)
        return generate(*args, **kwargs)

    model.generate = generated  # type: ignore[assignment]


def _first(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(x, Tensor):
            return x
    return None


def _given(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The prompts of a call of `generate` by name, whatever a user's own calls them."""
    named = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    rows = (x for x in kwargs.values() if isinstance(x, Tensor) and x.dim() >= 2)
    return named if named is not None else next(rows, None)


def _behind(kwargs: Mapping[str, Any]) -> int:
    """Tokens that are in the cache of a call already."""
    length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
    return int(length()) if length is not None else 0


def _asked(model: nn.Module, kwargs: Mapping[str, Any], name: str) -> Any:
    """A setting of `generate`: of the call, of its configuration, or of the model's."""
    for place in (kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if kwargs.get(name) is None and getattr(place, name, None) is not None:
            return getattr(place, name)
    return kwargs.get(name)


def _new_tokens(model: nn.Module, ids: Tensor, kwargs: Mapping[str, Any]) -> int:
    most = _asked(model, kwargs, "max_new_tokens")
    if most is not None:
        return int(most)
    length = _asked(model, kwargs, "max_length")
    return max(0, int(length or 20) - ids.shape[1])


def _beams(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    beams = int(_asked(model, kwargs, "num_beams") or 1)
    return beams * int(_asked(model, kwargs, "num_return_sequences") or 1) if beams == 1 else beams
