"""Fold before tracing: one instance of each structural class is traced, the others are one call.

While `folded(model)` is active, the forward of every unit is patched on the instance: the first
instance of a class runs between `enter` and `exit` markers, later ones become one opaque `call`
node. `del module.forward` restores the model; nothing of the user's is edited.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@torch.library.custom_op("meshwright_fold::enter", mutates_args=())
def enter(xs: list[torch.Tensor], path: str, key: str) -> list[torch.Tensor]:
    return [x.clone() for x in xs]


@torch.library.custom_op("meshwright_fold::leave", mutates_args=())
def leave(xs: list[torch.Tensor], path: str, key: str) -> list[torch.Tensor]:
    return [x.clone() for x in xs]


@torch.library.custom_op("meshwright_fold::call", mutates_args=())
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


class IndexProbe(int):
    """A layer's own index, standing in while its representative is traced.

    Comparing it, or computing with it, means that the forward may branch on its position, so
    layers that differ in it alone are not alike; reading it as an index of a list counts too.
    """

    touched: set[str]
    where: str

    def _note(self) -> None:
        self.touched.add(self.where)


def _probing(name: str) -> Callable[..., Any]:
    def method(self: IndexProbe, *args: Any) -> Any:
        self._note()
        return getattr(int, name)(self, *args)

    return method


for _name in (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__radd__", "__sub__",
    "__rsub__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__floordiv__", "__truediv__",
    "__index__", "__bool__", "__float__", "__int__", "__neg__", "__and__", "__pow__",
):  # fmt: skip
    setattr(IndexProbe, _name, _probing(_name))
IndexProbe.__hash__ = int.__hash__  # type: ignore[method-assign]


@dataclass(kw_only=True)
class Folding:
    """What the patched forwards found: unit paths in tree order, the layers among them, and the
    classes that branch on their index."""

    units: dict[str, nn.Module]
    layers: tuple[str, ...]
    touched: set[str] = field(default_factory=set)
    outputs: dict[str, tuple[list[torch.Tensor], Any]] = field(default_factory=dict)


def find_units(model: nn.Module) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Unit modules by path, in tree order, and the paths of the layers among them.

    A layer is a composite child of a container (ModuleList, Sequential, ModuleDict); a module
    that has layers somewhere below is walked into; any other child with parameters is a unit.
    """
    units: dict[str, nn.Module] = {}
    layers: list[str] = []

    def walk(module: nn.Module, prefix: str, in_container: bool) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            container = isinstance(child, _CONTAINERS)
            composite = next(child.children(), None) is not None
            if container and has_layers(child):
                walk(child, path + ".", True)
            elif in_container and composite and not container:
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
    """Int attributes that equal each sibling's position: those that name a layer, not shape it."""
    common: set[tuple[str, str]] | None = None
    for position, module in enumerate(siblings):
        here = {(p, n) for p, n, v in _int_attrs(module) if v == position}
        common = here if common is None else common & here
    return common or set() if len(siblings) > 1 else set()


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


def _class_keys(
    units: dict[str, nn.Module], layers: tuple[str, ...], split: set[str]
) -> tuple[dict[str, str], dict[str, set[tuple[str, str]]]]:
    """A structural key for each unit, and the index attributes left out of it."""
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
    return keys, skips


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


@contextmanager
def folded(model: nn.Module, *, fold: bool, split: set[str]) -> Iterator[Folding]:
    """Patch unit forwards for one trace; `split` holds class keys not to be merged by index."""
    units, layers = find_units(model)
    keys, skips = _class_keys(units, layers, split)
    state = Folding(units=units, layers=layers)
    undo: list[Callable[[], None]] = []
    probed: set[str] = set()

    def patch(path: str, module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            flat, spec = pytree.tree_flatten((args, kwargs))
            tensors = list({id(x): x for x in flat if isinstance(x, torch.Tensor)}.values())
            key = _call_key(keys[path], spec, flat)
            if fold and key in state.outputs:
                like, out_spec = state.outputs[key]
                at = iter(torch.ops.meshwright_fold.call(tensors, like, path, key))
                leaves = [next(at) if x is None else x for x in out_spec[0]]
                return pytree.tree_unflatten(leaves, out_spec[1])
            fresh = dict(zip(map(id, tensors), torch.ops.meshwright_fold.enter(tensors, path, key)))
            inner = [fresh.get(id(x), x) for x in flat]
            inner_args, inner_kwargs = pytree.tree_unflatten(inner, spec)
            out = original(*inner_args, **inner_kwargs)
            leaves, out_tree = pytree.tree_flatten(out)
            places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
            results = torch.ops.meshwright_fold.leave([leaves[i] for i in places], path, key)
            for i, x in zip(places, results):
                leaves[i] = x
            template = [None if i in places else x for i, x in enumerate(leaves)]
            state.outputs[key] = (list(results), (template, out_tree))
            return pytree.tree_unflatten(leaves, out_tree)

        had = "forward" in vars(module)
        previous = vars(module).get("forward")
        module.forward = forward  # type: ignore[method-assign]
        undo.append(
            lambda: (
                vars(module).__setitem__("forward", previous)
                if had
                else vars(module).__delitem__("forward")
            )
        )
        if fold and keys[path] not in probed:
            probed.add(keys[path])
            _probe(module, keys[path], skips.get(path, set()), state.touched, undo)

    try:
        for path, module in units.items():
            patch(path, module)
        yield state
    finally:
        for step in reversed(undo):
            step()


def _probe(
    module: nn.Module,
    key: str,
    attributes: set[tuple[str, str]],
    touched: set[str],
    undo: list[Callable[[], None]],
) -> None:
    """Stand IndexProbes in for a representative's index attributes."""
    modules = dict(module.named_modules())
    for path, name in sorted(attributes):
        owner, value = modules[path], vars(modules[path])[name]
        probe = IndexProbe(value)
        probe.touched, probe.where = touched, key
        vars(owner)[name] = probe
        undo.append(lambda owner=owner, name=name, value=value: vars(owner).update({name: value}))  # type: ignore[misc]
