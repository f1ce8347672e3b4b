"""Fold before tracing: one instance of each structural class is traced, the others are one call.

While `folded` is active, the forward of every unit is patched on the instance: the first
instance of a class runs between `enter` and `exit` markers, later ones become one opaque `call`
node. `del module.forward` restores the model; nothing of the user's is edited.
"""

from __future__ import annotations

import hashlib
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ir.capture.index_probe import probe
from ir.capture.repeat import recorded

_TENSOR = object()  # where a unit's outputs have a tensor
_LISTS = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@torch.library.custom_op("meshwright_fold::enter", mutates_args=())
def enter(xs: list[torch.Tensor], path: str, key: str) -> list[torch.Tensor]:
    return [x.clone() for x in xs]


@torch.library.custom_op("meshwright_fold::leave", mutates_args=())
def leave(xs: list[torch.Tensor], path: str, key: str) -> list[torch.Tensor]:
    return [x.clone() for x in xs]


@torch.library.custom_op(  # of any layout: what it is given is not looked at for every call
    "meshwright_fold::call", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def call(
    xs: list[torch.Tensor], like: list[torch.Tensor], path: str, key: str
) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in like]


@enter.register_fake
@leave.register_fake
def _(xs: list[torch.Tensor], path: str, key: str) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in xs]


@call.register_fake
def _(xs: list[torch.Tensor], like: list[torch.Tensor], path: str, key: str) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in like]


@dataclass(kw_only=True)
class Folding:
    """What the patched forwards found: paths of the layers in tree order, the classes that branch
    on their index, each traced class's outputs (tensors, where they go, and the structure), and
    by path what a unit returns where that is neither a tensor nor a tuple of them. recorded: the
    operations are, so that a repeated call has to be one."""

    layers: tuple[str, ...]
    recorded: bool = False
    touched: set[str] = field(default_factory=set)
    returns: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, tuple[list[torch.Tensor], list[Any], Any]] = field(default_factory=dict)


def find_units(model: nn.Module) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Unit modules by path, in tree order, and the paths of the layers among them.

    A layer is a composite child of a container (ModuleList, Sequential, ModuleDict); a module
    that has layers somewhere below is walked into; any other child with parameters is a unit.
    """
    units: dict[str, nn.Module] = {}
    layers: list[str] = []
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str, in_container: bool) -> None:
        for name, child in module.named_children():
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = f"{prefix}{name}"
            container = isinstance(child, _CONTAINERS)
            composite = next(child.children(), None) is not None
            bare = isinstance(child, _LISTS)  # it has no forward: its children are called
            listed = in_container and isinstance(module, _LISTS)
            if container and (bare or has_layers(child)):
                walk(child, path + ".", True)
            elif in_container and (composite or listed) and not container:
                units[path] = child
                layers.append(path)
            elif not in_container and not container and _descends(child):
                walk(child, path + ".", False)
            elif next(child.parameters(), None) is not None:
                units[path] = child

    def has_layers(container: nn.Module) -> bool:
        return any(next(c.children(), None) is not None for c in container.children())

    def _descends(module: nn.Module) -> bool:
        return any(isinstance(m, _CONTAINERS) and has_layers(m) for m in module.modules())

    top_is_container = isinstance(model, _CONTAINERS)
    walk(model, "", top_is_container and has_layers(model))
    return units, tuple(layers)


def _code_key(fn: Any) -> str:
    """A function by what it does: code, constants, defaults and closed-over scalars."""
    code = getattr(fn, "__code__", None)
    if code is None:
        inner = getattr(fn, "func", None)
        if inner is not None:  # functools.partial
            return f"partial({_code_key(inner)},{fn.args!r},{sorted(fn.keywords.items())!r})"
        return f"{type(fn).__qualname__}:{id(fn)}"
    cells = [_attr_key(c.cell_contents) for c in (fn.__closure__ or ())]
    consts = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
    return f"{code.co_code.hex()}|{consts!r}|{fn.__defaults__!r}|{cells!r}|{code.co_names!r}"


def _attr_key(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str, complex, torch.dtype)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_attr_key, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{_attr_key(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (types.FunctionType, types.MethodType)) or hasattr(value, "func"):
        return _code_key(getattr(value, "__func__", value))
    return f"{type(value).__qualname__}@{id(value)}"


_SKIP = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "forward"}


def _int_attrs(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(submodule path, attribute, value) of every plain int attribute below a module."""
    for path, sub in module.named_modules():
        for name, value in vars(sub).items():
            if type(value) is int:
                yield path, name, value


def index_attributes(siblings: list[nn.Module]) -> set[tuple[str, str]]:
    """Int attributes that equal the position of every sibling that has them, two or more: those
    that name a layer, not shape it."""
    found: dict[tuple[str, str], list[bool]] = {}
    for position, module in enumerate(siblings):
        for path, name, value in _int_attrs(module):
            found.setdefault((path, name), []).append(value == position)
    return {key for key, equal in found.items() if len(equal) > 1 and all(equal)}


def signature(module: nn.Module, skip: set[tuple[str, str]], path: str = "") -> str:
    """A hash of a module's structure: classes, scalar attributes, parameter shapes, children."""
    parts = [f"{type(module).__module__}.{type(module).__qualname__}", str(module.training)]
    for name, value in sorted(vars(module).items(), key=lambda item: item[0]):
        if name in _SKIP or (name.startswith("_") and name.endswith("hooks")):
            continue
        parts.append(f"{name}={'<idx>' if (path, name) in skip else _attr_key(value)}")
    for name, p in (*module._parameters.items(), *module._buffers.items()):
        parts.append(f"{name}:{None if p is None else (tuple(p.shape), p.dtype, p.requires_grad)}")
    for name, child in module._modules.items():
        inner = f"{path}.{name}" if path else name
        parts.append(f"{name}:{signature(child, skip, inner) if child is not None else None}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """What `find_units` finds, a structural key for each unit, and the index attributes left out
    of it."""

    units: dict[str, nn.Module]
    layers: tuple[str, ...]
    keys: dict[str, str]
    skips: dict[str, set[tuple[str, str]]]


def classes_of(model: nn.Module, split: set[str]) -> Classes:
    """Which units of a model are alike. split: class keys not to be merged by index."""
    units, layers = find_units(model)
    skips: dict[str, set[tuple[str, str]]] = {}
    families: dict[str, list[str]] = {}
    for path in layers:
        families.setdefault(path.rpartition(".")[0], []).append(path)
    for paths in families.values():
        found = index_attributes([units[p] for p in paths])
        for path in paths:
            skips[path] = found
    keys = {}
    for path, module in units.items():
        kept = skips.get(path, set())
        key = signature(module, kept)
        keys[path] = key if key not in split else signature(module, set())
        if key in split:
            skips[path] = set()
    return Classes(units=units, layers=layers, keys=keys, skips=skips)


def _call_key(key: str, spec: Any, flat: list[Any]) -> str:
    """The class, and how it is called: structure, shapes, strides, scalars, repeated tensors."""
    order: dict[int, int] = {}
    words = []
    for x in flat:
        if isinstance(x, torch.Tensor):
            shape = (tuple(x.shape), x.dtype, x.stride(), order.setdefault(id(x), len(order)))
            words.append(str(shape))
        else:
            words.append(_attr_key(x))
    return hashlib.sha256("\n".join([key, str(spec), *words]).encode()).hexdigest()[:16]


def _patched(
    state: Folding, path: str, key: str, original: Callable[..., Any], fold: bool, hollow: bool
) -> Callable[..., Any]:
    """A unit's forward while it is traced: between markers, or one call of a class traced before.

    fold=False: every instance is traced, as a class of its own.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():  # who listens to calls is told of none of these
            flat, spec = pytree.tree_flatten((args, kwargs))
            tensors = list({id(x): x for x in flat if isinstance(x, torch.Tensor)}.values())
            name = _call_key(key, spec, flat) if fold else f"{len(state.outputs)}@{path}"
            if name in state.outputs:
                like, template, tree = state.outputs[name]
                _note_structure(state, path, template, tree)
                operator = torch.ops.meshwright_fold.call.default
                made = (
                    recorded(operator, tensors, like, path, name) if state.recorded
                    else [x.clone() for x in like]
                )  # fmt: skip
                at = iter(made)
                return pytree.tree_unflatten(
                    [next(at) if x is _TENSOR else x for x in template], tree
                )
        if hollow:
            raise RuntimeError(f"{path} is called as no instance of its class was before it")
        fresh = dict(zip(map(id, tensors), torch.ops.meshwright_fold.enter(tensors, path, name)))
        inside, inside_kwargs = pytree.tree_unflatten([fresh.get(id(x), x) for x in flat], spec)
        leaves, tree = pytree.tree_flatten(original(*inside, **inside_kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        results = torch.ops.meshwright_fold.leave([leaves[i] for i in places], path, name)
        template = [_TENSOR if i in places else x for i, x in enumerate(leaves)]
        state.outputs[name] = (list(results), template, tree)
        _note_structure(state, path, template, tree)
        at = iter(results)
        return pytree.tree_unflatten([next(at) if x is _TENSOR else x for x in template], tree)

    return forward


def _note_structure(state: Folding, path: str, template: list[Any], tree: Any) -> None:
    """Say "(*, None)" of a unit that returns that, "?Name" of one that returns such an object."""
    marked = ["*" if x is _TENSOR else x for x in template]
    value = pytree.tree_unflatten(marked, tree)
    tensors = all(isinstance(x, str) for x in marked)
    if tensors and (value == "*" or (type(value) is tuple and value == (*marked,) != ("*",))):
        return
    flat = type(value) in (tuple, list) and all(x is None or x == "*" for x in value)
    words = ", ".join(map(str, value)) if flat else ""
    ends = "[]" if isinstance(value, list) else "()"
    state.returns[path] = f"{ends[0]}{words}{ends[1]}" if flat else f"?{type(value).__name__}"


@contextmanager
def folded(classes: Classes, *, fold: bool, hollow: bool = False) -> Iterator[Folding]:
    """Patch unit forwards for one trace.

    hollow: instances behind the second of a class lose their parameters and children meanwhile,
    so that the exporter does not carry thousands of tensors that no traced operation reads.
    """
    state = Folding(layers=classes.layers)
    undo: list[Callable[[], None]] = []
    probed: set[str] = set()
    seen: Counter[str] = Counter()
    try:
        for path, module in classes.units.items():
            key, own = classes.keys[path], vars(module).get("forward")
            undo.append(partial(_restore, module, own))
            seen[key] += 1
            empty = fold and hollow and seen[key] > 2
            module.forward = _patched(state, path, key, module.forward, fold, empty)
            if empty:
                undo.append(partial(vars(module).update, _emptied(module)))
            if fold and key not in probed:
                probed.add(key)
                probe(module, key, classes.skips.get(path, set()), state.touched, undo)
        yield state
    finally:
        for step in reversed(undo):
            step()


def _emptied(module: nn.Module) -> dict[str, Any]:
    """Take a module's parameters, buffers and children away; what `vars` was, to put back."""
    held = {name: vars(module)[name] for name in ("_parameters", "_buffers", "_modules")}
    vars(module).update({name: {} for name in held})
    return held


def _restore(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """Give a module the forward it had: its own, or its class's."""
    if own is None:
        del module.forward
    else:
        module.forward = own
