"""What the user names as MODEL -> a module on the meta device, its inputs and its loss.

torch and transformers are imported inside functions: `source_key` decides whether a cached graph
will do, and must answer without either.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ir.capture import limits
from ir.capture.packages import (
    import_of_package,
    imports_relatively,
    meant,
    packages_of,
    roots_of,
)
from ir.errors import PlanError, UsageError

if TYPE_CHECKING:
    from torch import nn

Inputs = dict[str, Any] | tuple[Any, ...]
PROBE_SIZES = ((2, 128), (3, 256))  # batch, seq_len: what varies between them is found by tracing
EXAMPLE = """\
import torch
def build():
    return MyModel()                      # an nn.Module
def inputs(batch, seq_len):
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model ready to be traced: everything lives on the meta device, in training mode."""

    model: nn.Module
    name: str  # for people: the file's or the configuration's name
    key: str  # hash of what the graph depends on: text, arguments, versions
    kind: str  # "file" | "hf"
    task: str  # "causal-lm" | "vision" | "other"
    inputs: Callable[[int, int], Inputs]  # (batch, seq_len) -> keyword or positional arguments
    targets: Callable[[int, int], Any] | None  # (batch, seq_len) -> what `loss` compares with
    loss: Callable[[Any, Any], Any] | None  # (outputs, targets) -> scalar; None: cross-entropy
    max_seq_len: int | None  # the longest sequence the model is made for
    seq_in_input: bool  # whether the inputs' shapes depend on seq_len
    notes: tuple[str, ...]  # what the graph leaves out, in words
    tracing: Callable[[], contextlib.AbstractContextManager[None]]  # enter around every trace


def load(model_spec: str, args: Mapping[str, str]) -> Source:
    """Build what MODEL names: `file.py[:factory]`, a `config.json`, or the folder of one.

    Raises PlanError (bad file, factory that raises) or UsageError (unknown argument).
    """
    path, factory = _split(model_spec)
    key = source_key(model_spec, args)
    if path.suffix == ".py":
        return _load_file(path, factory, args, key)
    config = read_config(path)
    try:
        from ir.capture import hf
    except ImportError as error:
        raise PlanError(
            f"{path} is a Hugging Face configuration, and transformers cannot be imported",
            why=str(error),
            hints=("pip install 'meshwright[hf]'",),
        ) from None
    return hf.source(config, name=config_name(path), args=args, key=key, where=str(path))


def config_name(path: Path) -> str:
    """What a Hugging Face configuration's model is called: its folder, or the file's own name."""
    return path.resolve().parent.name if path.name == "config.json" else path.stem


def source_key(model_spec: str, args: Mapping[str, str]) -> str:
    """Hash what the traced graph depends on, without running any of it. Imports no torch."""
    path, factory = _split(model_spec)
    if path.suffix == ".py":
        texts = {p.name: p.read_text(errors="replace") for p in _local_imports(path)}
    else:
        texts = {path.name: json.dumps(read_config(path), sort_keys=True)}
    versions = {name: _version(name) for name in ("torch", "transformers")}
    document = {
        "texts": texts,
        "factory": factory,
        "args": dict(sorted(args.items())),
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a JSON file. Raises PlanError with the place of a syntax error, and for
    what no model's says (`limits`)."""
    try:
        if path.stat().st_size > limits.MOST_CHARACTERS:
            raise PlanError(f"{path} is larger than {limits.MOST_CHARACTERS >> 20} MiB")
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # of thousands of digits, or of brackets
        raise PlanError(f"{path} is not JSON", why=str(error).partition(";")[0]) from None
    if not isinstance(config, dict) or not ({"model_type", "architectures"} & config.keys()):
        raise PlanError(
            f"{path} is not a Hugging Face configuration",
            why="expected an object with `model_type` or `architectures`",
        )
    limits.require_sane(config, str(path))
    return config


def _split(model_spec: str) -> tuple[Path, str]:
    """MODEL -> its file, which exists, and the factory's name."""
    text, colon, factory = model_spec.rpartition(":")
    if not colon or not text.endswith(".py"):
        text, factory = model_spec, ""
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PlanError(
                f"no config.json in {path}",
                hints=("MODEL is model.py, model.py:factory, or a config.json or its folder",),
            )
        path = path / "config.json"
    if not path.is_file():
        raise PlanError(
            f"no such model file: {path}",
            hints=(*meant(model_spec),
                   "MODEL is model.py, model.py:factory, or a config.json or its folder"),
        )  # fmt: skip
    if path.suffix not in (".py", ".json"):
        raise PlanError(f"{path} is neither a Python file nor a config.json")
    return path, factory


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _local_imports(path: Path) -> list[Path]:
    """The file and the files beside it that it imports, directly or not, in a stable order."""
    folder, found, packages = path.resolve().parent, {}, packages_of(path)
    todo = [path.resolve(), *(package / "__init__.py" for package in packages)]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found[file] = True
        for name in _imported_names(file):
            for base in dict.fromkeys((folder, file.parent, *packages, *roots_of(path))):
                stem = base.joinpath(*name.split("."))
                todo += [p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()]
    return sorted(found)


def _imported_names(file: Path) -> list[str]:
    """Dotted names that a file's imports may mean, parents included; none if it does not parse."""
    try:
        tree = ast.parse(file.read_text(errors="replace"))
    except SyntaxError:
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            names += base + [".".join([*base, alias.name]) for alias in node.names]
    parts = [name.split(".") for name in names if name and "*" not in name]
    return [".".join(p[: i + 1]) for p in parts for i in range(len(p))]


def _load_file(path: Path, factory: str, args: Mapping[str, str], key: str) -> Source:
    """Run the user's file and its factory with parameters on meta."""
    import torch

    from ir.capture import meta

    with _users_code(path, f"{path} cannot be imported"):
        module = _execute(path)
    build = _factory(module, factory or "build", path)
    values = _arguments(build, args, f"{path}:{factory or 'build'}")
    with _users_code(path, f"{factory or 'build'}() raised"), meta.parameters_on_meta():
        model = build(**values)
    if not isinstance(model, torch.nn.Module):
        raise PlanError(
            f"{factory or 'build'}() returned {type(model).__name__}, not an nn.Module",
            where=str(path),
        )
    limits.require_parameters(model, str(path))
    meta.move_to_meta(model)
    model.train()
    tracing, notes = _adapted(model)
    inputs = _inputs(module, model, path)
    first, second = (inputs(*size) for size in PROBE_SIZES)
    shapes = [[tuple(t.shape)[1:] for t in meta.tensors(value)] for value in (first, second)]
    return Source(
        model=model,
        name=path.resolve().parent.name if path.stem == "__init__" else path.stem,
        key=key,
        kind="file",
        task=_task(meta.tensors(first)),
        inputs=inputs,
        targets=_on_meta(module, "targets", path),
        loss=getattr(module, "loss", None),
        max_seq_len=_max_seq_len(model),
        seq_in_input=shapes[0] != shapes[1],
        notes=notes,
        tracing=tracing,
    )


def _adapted(model: nn.Module) -> tuple[Callable[[], Any], tuple[str, ...]]:
    """How to trace it: a Hugging Face model that a user's file builds is adapted as from JSON."""
    from ir.capture import meta

    if "transformers.modeling_utils" not in sys.modules:
        return meta.tracing, ()
    from ir.capture import hf

    return hf.adapt(model)


@contextlib.contextmanager
def _users_code(path: Path, what: str) -> Iterator[None]:
    """Run the user's code: its prints go to stderr, its exception names its line, not ours."""
    from ir.capture import meta

    folders = [*map(str, roots_of(path)), str(path.resolve().parent)]
    sys.path[:0] = folders
    try:
        with contextlib.redirect_stdout(sys.stderr), meta.default_dtype_kept():
            yield
    except PlanError:
        raise
    except (Exception, SystemExit) as error:
        cause = "".join(traceback.format_exception_only(error)).strip()
        raise PlanError(what, where=_line_of(error, path), why=cause) from error
    finally:
        for folder in folders:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)


def _line_of(error: BaseException, path: Path) -> str:
    """`file:line` of the innermost frame in the user's folder, else the file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    folder = path.resolve().parent
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [f for f in frames if Path(f.filename).resolve().is_relative_to(folder)]
    exact = [f for f in own if Path(f.filename).resolve() == path.resolve()]
    for frame in reversed(exact or own):
        shown = path if exact else Path(frame.filename).resolve().relative_to(folder)
        return f"{shown}:{frame.lineno} in {frame.name}"
    return str(path)


def _execute(path: Path) -> ModuleType:
    """Import the file under a name of its own, so that `path` may be called anything; one with
    relative imports under its package's name."""
    if packages_of(path) and imports_relatively(path):
        return import_of_package(path)
    name = "meshwright_model_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    module = ModuleType(name)
    module.__file__ = str(path.resolve())
    sys.modules[name] = module  # dataclasses and pickling look it up there
    exec(compile(path.read_text(), str(path.resolve()), "exec"), module.__dict__)
    return module


def _factory(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    """The function that builds the model, else an error that lists what there is."""
    found = getattr(module, name, None)
    if callable(found):
        return found
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    ]
    raise PlanError(
        f"{path} has no `{name}`",
        why=f"callables in it: {', '.join(own) or 'none'}\n" + EXAMPLE,
        hints=tuple(f"plan trace {path}:{key}" for key in own[:3] if not key.startswith("_")),
    )


def _arguments(build: Callable[..., Any], args: Mapping[str, str], where: str) -> dict[str, Any]:
    """`--arg k=v` texts as the factory's annotations or defaults want them."""
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError):
        return dict(args)
    try:
        annotated: Any = vars(build).get("__init__") if isinstance(build, type) else build
        hints = typing.get_type_hints(annotated)
    except (NameError, TypeError):
        hints = {}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    legal = [name for name, p in parameters.items() if p.kind not in variadic]
    values = {}
    for name, text in args.items():
        if name not in legal and not anything:
            raise UsageError(
                f"--arg {name}: the factory has no such argument",
                where=where,
                why=f"it takes {', '.join(legal) or 'none'}",
            )
        default = parameters[name].default if name in parameters else None
        hint = hints.get(name, type(default))
        values[name] = _parse(name, text, typing.get_args(hint) or (hint,))
    required = [name for name in legal if parameters[name].default is inspect.Parameter.empty]
    missing = [name for name in required if name not in values]
    if missing:
        raise UsageError(
            f"the factory needs {', '.join(missing)}",
            where=where,
            hints=tuple(f"--arg {name}=..." for name in missing),
        )
    return values


def _parse(name: str, text: str, kinds: tuple[Any, ...]) -> Any:
    """A text as the first of int, float, bool, str that is wanted and that it can be."""
    words = {"true": True, "false": False, "on": True, "off": False, "1": True, "0": False}
    wanted = [kind for kind in (bool, int, float, str) if kind in kinds]
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in wanted or (int, float, str):
        if kind is bool and text.lower() in words:
            return words[text.lower()]
        if kind is not bool:
            with contextlib.suppress(ValueError):
                return kind(text)
    raise UsageError(
        f"--arg {name}={text}: expected {' or '.join(kind.__name__ for kind in wanted)}"
    )


def _inputs(module: ModuleType, model: nn.Module, path: Path) -> Callable[[int, int], Inputs]:
    """The file's `inputs`, else one int64 [batch, seq] tensor."""
    given = _on_meta(module, "inputs", path)
    if given is not None:
        return given
    import torch

    names = list(inspect.signature(model.forward).parameters)

    def token_ids(batch: int, seq_len: int) -> Inputs:
        ids = torch.zeros(batch, seq_len, dtype=torch.int64, device="meta")
        return {"input_ids": ids} if "input_ids" in names else (ids,)

    return token_ids


def _on_meta(module: ModuleType, name: str, path: Path) -> Callable[[int, int], Any] | None:
    """A function (batch, seq_len) of the user's file, its tensors moved to meta."""
    function = getattr(module, name, None)
    if function is None:
        return None
    from ir.capture import meta

    def moved(batch: int, seq_len: int) -> Any:
        with _users_code(path, f"{name}(batch={batch}, seq_len={seq_len}) raised"):
            value = meta.on_meta(function(batch, seq_len))
        if name == "inputs" and not isinstance(value, dict):
            value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return value

    return moved


def _task(tensors: list[Any]) -> str:
    """What the first input looks like: token ids [batch, seq], images [batch, c, h, w], or not."""
    if not tensors:
        return "other"
    first = tensors[0]
    if first.dim() == 2 and not first.is_floating_point():
        return "causal-lm"
    return "vision" if first.dim() == 4 and first.is_floating_point() else "other"


def _max_seq_len(model: nn.Module) -> int | None:
    """The longest sequence, by the names that models and configurations use for it."""
    names = ("max_seq_len", "max_position_embeddings", "n_positions", "block_size", "seq_length")
    for owner in (model, getattr(model, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
