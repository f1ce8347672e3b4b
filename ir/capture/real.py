"""A model with weights, to be run: what the user names as MODEL, or a configuration's text.

`load` makes the same things on the meta device, to be traced.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ir.capture import load
from ir.capture.load import Inputs
from ir.errors import PlanError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to build a model, for any process: a file with arguments, or a configuration.

    spec: as MODEL. args: of the factory, as texts. config: JSON text; empty for a file.
    """

    spec: str
    args: tuple[tuple[str, str], ...] = ()
    config: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """A module in fp32 with the weights that its own code drew, and the file's functions."""

    model: nn.Module
    inputs: Callable[[int, int], Inputs]  # (batch, seq_len) -> what the model takes, on the CPU
    targets: Callable[[int, int], Any] | None
    loss: Callable[[Any, Any], Any] | None


def build(recipe: Recipe, *, hollow: bool = False) -> Real:
    """Run the recipe. hollow: parameters will be on meta, and are not to be filled.

    Raises PlanError for a factory that raises.
    """
    real = _from_config(recipe, hollow) if recipe.config else _from_file(recipe)
    _in_fp32(real.model)
    return real


def declared(spec: str) -> tuple[dict[str, str], ...]:
    """The file's `TWIN`: factory arguments of a small model of the same structure, as texts, or
    several of them, the smallest first; none where MODEL is a configuration or declares none.

    Raises PlanError where `TWIN` is no dictionary.
    """
    path, _ = load._split(spec)
    if path.suffix != ".py":
        return ()
    with load._users_code(path, f"{path} cannot be imported"):
        found = getattr(load._execute(path), "TWIN", ())
    rows = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    for row in rows:
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise PlanError(
                "TWIN is no dictionary of the factory's arguments", where=str(path),
                hints=('TWIN = {"n_layers": 4, "dim": 64}',),
            )  # fmt: skip
    return tuple({str(key): str(value) for key, value in row.items()} for row in rows)


def is_file(spec: str) -> bool:
    """Whether MODEL is a Python file, not a configuration."""
    return load._split(spec)[0].suffix == ".py"


def recipe_of(spec: str, args: Mapping[str, str]) -> Recipe:
    """The recipe of a MODEL as it is."""
    if is_file(spec):
        return Recipe(spec=spec, args=tuple(args.items()))
    from ir.capture import hf

    config, _, where = config_of(spec)
    return Recipe(spec=spec, config=json.dumps(hf._changed(config, args, where)))


def config_of(spec: str) -> tuple[dict[str, Any], str, str]:
    """(configuration, model's name, path) of a MODEL that is a config.json or its folder."""
    path, _ = load._split(spec)
    return load.read_config(path), load.config_name(path), str(path)


def _from_file(recipe: Recipe) -> Real:
    path, factory = load._split(recipe.spec)
    factory = factory or "build"
    with load._users_code(path, f"{path} cannot be imported"):
        module = load._execute(path)
    make = load._factory(module, factory, path)
    values = load._arguments(make, dict(recipe.args), f"{path}:{factory}")
    with load._users_code(path, f"{factory}() raised"):
        model = make(**values)
    if not isinstance(model, nn.Module):
        raise PlanError(f"{factory}() returned {type(model).__name__}", where=str(path))
    given = _called(path, getattr(module, "inputs", None), "inputs")
    return Real(
        model=model, inputs=given or _zeros(load._inputs(module, model, path)),
        targets=_called(path, getattr(module, "targets", None), "targets"),
        loss=getattr(module, "loss", None),
    )  # fmt: skip


def _called(path: Path, function: Any, name: str) -> Any:
    """The user's function; what it raises names its line."""
    if function is None:
        return None

    def call(batch: int, seq_len: int) -> Any:
        with load._users_code(path, f"{name}(batch={batch}, seq_len={seq_len}) raised"):
            value = function(batch, seq_len)
        if name == "inputs" and not isinstance(value, dict):
            value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return value

    return call


def _zeros(made: Callable[[int, int], Inputs]) -> Callable[[int, int], Inputs]:
    """The same function, its tensors on the CPU."""

    def call(batch: int, seq_len: int) -> Inputs:
        return pytree.tree_map_only(
            torch.Tensor, lambda x: torch.zeros_like(x, device="cpu"), made(batch, seq_len)
        )

    return call


def _from_config(recipe: Recipe, hollow: bool) -> Real:
    from ir.capture import hf

    raw, where = json.loads(recipe.config), recipe.spec
    with hf._quiet():
        cls = hf._model_class(raw, where)
        config = hf._configuration(cls, raw, where)
        hf._without_cache(config)
        filled = hf._without_init() if hollow else contextlib.nullcontext()
        with filled, hf._explained(f"transformers cannot build {cls.__name__} from it", where):
            model = cls._from_config(config, dtype=torch.float32)
            model.tie_weights()
    model.train()
    return Real(model=model, inputs=_zeros(hf._inputs(model)), targets=None, loss=None)


def _in_fp32(model: nn.Module) -> None:
    """Floating point parameters and buffers in fp32; ties stay tied."""
    held: dict[int, tuple[Any, Any]] = {}  # id -> the old one, kept alive, and the new
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, x in table.items():
                if x is None or not x.is_floating_point() or x.dtype == torch.float32:
                    continue
                if id(x) not in held:
                    wide = x.detach().float()
                    kept = isinstance(x, nn.Parameter)
                    held[id(x)] = (x, nn.Parameter(wide, x.requires_grad) if kept else wide)
                table[name] = held[id(x)][1]


def require_arguments(spec: str, args: Mapping[str, str], flag: str) -> None:
    """Raise UsageError, in that flag's words, where the factory has no such argument."""
    path, factory = load._split(spec)
    with load._users_code(path, f"{path} cannot be imported"):
        module = load._execute(path)
    make = load._factory(module, factory or "build", path)
    with in_words_of(flag):
        load._arguments(make, args, f"{path}:{factory or 'build'}")


@contextlib.contextmanager
def in_words_of(flag: str) -> Iterator[None]:
    """Name that flag in messages about arguments, where they say `--arg`."""
    try:
        yield
    except UsageError as fault:
        raise UsageError(
            fault.what.replace("--arg", flag), where=fault.where, why=fault.why,
            hints=tuple(h.replace("--arg", flag) for h in fault.hints),
        ) from None  # fmt: skip
