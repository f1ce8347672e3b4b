"""A table of end-to-end serving runs, read with a reason for every row that cannot be used.

The form is that of the NVIDIA AIConfigurator database's end-to-end sample: one row a run, with the
engine, the model's name, the system, formats, prompt and output tokens, the concurrency of the
whole deployment, degrees of parallelism, and measured milliseconds.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cost_models.hardware import Cluster, describe
from cost_models.op_rows import device_of
from cost_models.serving_decisions import Serving
from cost_models.serving_engines import serving_engines
from ir.errors import UsageError
from planner.validation.serving_recipes import LOADS, Recipe, recipe_of

_NEEDED = ("backend", "model_path", "system", "isl", "osl", "concurrency", "tp_size",
           "silicon_ttft_ms", "silicon_tpot_ms")  # fmt: skip
# Checkpoints that are another model's architecture with other weights.
_SAME_SHAPE = (("deepseek-r1", "deepseek-v3"), ("deepseek-v3.1", "deepseek-v3"))
_SUFFIXES = ("-nvfp4", "-fp8", "-fp4", "-instruct", "-hf", "-bf16")
_FURTHER = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # tokens that a checkpoint drafts
_PLAIN = (("attention", "bf16"), ("embeddings", "bf16"), ("head", "bf16"), ("router", "bf16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRow:
    """One run. engine: whose constants it is costed with. config: the file that says the model's
    shape. drafts: the checkpoint can predict further tokens. recipe: how its engine was started.
    notes: what the row says otherwise than it is costed."""

    id: str
    line: int
    engine: str
    version: str
    model: str
    config: Path
    drafts: bool
    cluster: Cluster
    precision: str
    serving: Serving
    prompt: float
    output: float
    ttft_s: float
    tpot_s: float
    recipe: Recipe
    notes: tuple[str, ...]

    @property
    def gpus(self) -> int:
        return self.serving.ranks

    @property
    def series(self) -> tuple[object, ...]:
        """Runs that differ in their load alone."""
        plain = replace(self.serving, batch=1, replicas=1, prefill_chunk=0)
        return (self.engine, self.version, self.model, self.cluster.device.name, plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTable:
    """Rows that can be costed, and (id, reason) of those that cannot."""

    rows: tuple[ServedRow, ...]
    unfit: tuple[tuple[str, str], ...]


class _Unfit(Exception):
    """A row that cannot be used; its message is the reason."""


def read_serving(path: Path, configs: Path) -> ServingTable:
    """Read a table. Raises UsageError for a file that is none, and for a folder of no configs."""
    known = _configs(configs)
    rows: list[ServedRow] = []
    unfit: list[tuple[str, str]] = []
    for line, raw in _lines(path):
        name = raw.get("id") or f"line {line}"
        try:
            rows.append(_row(name, line, raw, known))
        except _Unfit as reason:
            unfit.append((name, str(reason)))
    if not rows and not unfit:
        raise UsageError(f"{path} has no runs", why="expected a row for each below its header")
    return ServingTable(rows=tuple(rows), unfit=tuple(unfit))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line of the file, fields) of each row."""
    try:
        text = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}", why=error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text", why="expected UTF-8, comma-separated") from None
    numbered = [(i, t) for i, t in enumerate(text, 1) if t.strip() and not t.startswith("#")]
    header = [x.strip() for x in next(csv.reader([numbered[0][1]]))] if numbered else []
    lost = [key for key in _NEEDED if key not in header]
    if lost:
        raise UsageError(
            f"{path} is no table of serving runs", why=f"its header has no {', '.join(lost)}",
            hints=(f"expected {', '.join(_NEEDED)}",),
        )  # fmt: skip
    for line, content in numbered[1:]:
        fields = next(csv.reader([content]))
        given = dict(zip(header, (x.strip() for x in fields)))
        yield line, given if len(fields) == len(header) else {"id": given.get("id", "")}


def _configs(folder: Path) -> dict[str, Path]:
    """Configurations by the plain name of their model: the file's, without owner and suffixes."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", why="--configs names a folder of config.json's")
    found = {plain_name(path.stem.split("--")[-1]): path for path in sorted(folder.glob("*.json"))}
    found |= {plain_name(p.parent.name): p for p in sorted(folder.glob("*/config.json"))}
    if not found:
        raise UsageError(f"{folder} has no model configurations", why="expected *.json")
    return found


def plain_name(name: str) -> str:
    """Llama-3.1-70B of meta-llama/Meta-Llama-3.1-70B-Instruct, in lower case."""
    short = name.split("/")[-1].lower().removeprefix("meta-")
    for suffix in _SUFFIXES * 2:
        short = short.removesuffix(suffix)
    return short


def _row(name: str, line: int, raw: Mapping[str, str], configs: Mapping[str, Path]) -> ServedRow:
    if "backend" not in raw:
        raise _Unfit("its fields are more or fewer than the header's")
    engine = _engine(raw["backend"], raw.get("backend_version", ""))
    device = device_of(raw["system"].replace("_", "-"))
    if device is None:
        raise _Unfit(f"system {raw['system'] or 'unnamed'} is not in the catalogue")
    short = plain_name(raw["model_path"])
    config = configs.get(short) or configs.get(dict(_SAME_SHAPE).get(short, ""))
    if config is None:
        raise _Unfit(f"no configuration of {raw['model_path'] or 'an unnamed model'}")
    shape = _read(config)
    if not raw["concurrency"]:
        raise _Unfit("no concurrency: what load it bore is not said")
    prompt, output, concurrency, ttft, tpot = (
        _positive(raw, key) for key in
        ("isl", "osl", "concurrency", "silicon_ttft_ms", "silicon_tpot_ms")
    )  # fmt: skip
    serving, notes = _layout(raw, concurrency)
    cluster = describe(device.name)
    if serving.ranks > cluster.node_size:
        raise _Unfit(f"{serving.ranks} GPUs an instance, more than the node's {cluster.node_size}")
    precision = raw.get("precision") or "bf16"
    default, weights = _formats(raw, precision, shape)
    if precision == "fp4" and short.startswith("deepseek") and (prompt, output) in LOADS:
        weights = (*weights, ("attention_out", "fp4"))  # nvidia/DeepSeek-R1-0528-FP4-V2, its card
    recipe = recipe_of(raw["backend"], raw.get("backend_version", ""), short, device.name,
                       precision, (prompt, output), serving)  # fmt: skip
    serving = replace(serving, default=default, weights=weights, prefill_chunk=recipe.chunk_tokens,
                      kv=_cache_format(raw["backend"], device.name, precision))  # fmt: skip
    return ServedRow(
        id=name, line=line, engine=engine, version=raw.get("backend_version", ""),
        model=short, config=config, drafts=_drafts(shape), precision=precision,
        cluster=replace(cluster, count=serving.ranks), serving=serving, prompt=prompt,
        output=output, ttft_s=ttft / 1e3, tpot_s=tpot / 1e3, notes=notes,
        recipe=recipe,
    )  # fmt: skip


def _engine(backend: str, version: str) -> str:
    """The engine's constants: of its release of 2025 where a row says no version."""
    if backend not in serving_engines():
        raise _Unfit(f"engine {backend or 'unnamed'} has no constants")
    early = f"{backend}-2025"
    return early if not version and early in serving_engines() else backend


def _read(config: Path) -> dict[str, Any]:
    try:
        shape = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise _Unfit(f"{config.name} cannot be read: {fault}") from None
    if not isinstance(shape, dict):
        raise _Unfit(f"{config.name} is no configuration")
    return shape


def _positive(raw: Mapping[str, str], key: str, default: float | None = None) -> float:
    text = raw.get(key, "")
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise _Unfit(f"{key} is {text!r}, no number" if text else f"no {key}") from None
    if not math.isfinite(value) or value < 0 or (value == 0 and default is None):
        raise _Unfit(f"{key} is {text}")
    return value or float(default or 0)


def _layout(raw: Mapping[str, str], concurrency: float) -> tuple[Serving, tuple[str, ...]]:
    """Degrees as they ran. The sample multiplies some of them by the expert degree: a run on 8
    GPUs with ep 8 stands as tp 64 with moe_tp 8 (and again, plainly, with the same times, as tp 8
    with moe_tp 1), attention replicas likewise."""
    tp, dp, moe_tp, ep = (
        int(_positive(raw, key, 1)) for key in
        ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    )  # fmt: skip
    pp = int(_positive(raw, "pp_size", 1))
    said, notes = (tp, dp, moe_tp, ep), []
    batch = _positive(raw, "batch_size", concurrency / dp)
    instances = concurrency / (batch * dp)
    if moe_tp == ep > 1 and tp * dp == ep * ep:
        tp, dp = (ep, 1) if dp == 1 else (1, ep)
    elif tp == dp > 1:
        tp, ep = 1, min(ep, dp)
    if dp == 1 and ep == tp > 1 and instances == tp and not raw.get("attention_dp_size"):
        tp, dp, instances = 1, tp, 1.0  # batch is then of one attention replica
    replicas = round(instances) if abs(instances - round(instances)) < 1e-6 else 1
    if (tp, dp) != said[:2]:
        notes.append(f"tp {said[0]} x attention dp {said[1]} of experts {moe_tp} x {ep} is taken"
                     f" as tp {tp} x {dp}")  # fmt: skip
    try:
        return Serving(
            tp=tp, pp=pp, ep=min(ep, tp * dp), attention_dp=dp, replicas=max(replicas, 1),
            batch=int(concurrency),
        ), tuple(notes)  # fmt: skip
    except UsageError as fault:
        raise _Unfit(fault.what) from None


def _formats(
    raw: Mapping[str, str], precision: str, shape: Mapping[str, Any]
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(format, formats of block classes) of a checkpoint: what it says of itself, else what
    quantized checkpoints of its kind keep in 16 bits: embedding, head and routers; where experts
    are in 4 bits, attention too (NVIDIA's ModelOpt)."""
    quantized = shape.get("quantization_config") or {}
    ends = _PLAIN[1:]
    if quantized.get("quant_method") == "mxfp4":
        return "fp4", _PLAIN
    blocks = quantized.get("weight_block_size") or raw.get("moe_quant_mode") == "fp8_block"
    if precision == "fp8":
        return ("fp8_block" if blocks else "fp8"), ends
    if precision == "fp4":
        text = shape.get("text_config") or shape
        routed = any(re.search("num.*experts$|n_routed_experts", key) for key in text)
        return "fp4", _PLAIN if routed else ends
    if precision in ("bf16", "fp16"):
        return precision, ()
    raise _Unfit(f"precision {precision!r} is not known")


def _cache_format(engine: str, device: str, precision: str) -> str:
    """What the recipes of these runs set: 8 bits beside weights of 8 bits and less, but for vLLM
    and SGLang on H100. The load at which requests begin to queue for memory agrees."""
    narrow = precision in ("fp8", "fp4") and (engine == "trtllm" or device != "h100")
    return "fp8" if narrow else "bf16"


def _drafts(shape: Mapping[str, Any]) -> bool:
    text = {**shape, **(shape.get("text_config") or {})}
    return any(isinstance(text.get(key), int) and text[key] > 0 for key in _FURTHER)
