"""Published points of serving on small machines, predicted: `plan validate --points`.

One table, `cost_models/validation/serving_points.toml`, each point with its source; a point that a
constant was fitted to says which.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cost_models.validation
from cost_models.checked_toml import read_toml
from cost_models.hardware import describe, load_hardware
from cost_models.serving import Memory, memory_of, prompt_steps, step_parts
from cost_models.serving_decisions import Held, ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_handling import told
from cost_models.serving_ops import Costs, step_of
from cost_models.serving_reading import served_model
from cost_models.serving_shapes import ServedModel
from planner.capturing import capture
from planner.options import TraceOptions
from planner.validation.report import DIGITS, WIDTH

POINTS = Path(str(cost_models.validation.__file__)).with_name("serving_points.toml")
_WIDE = (("embeddings", "bf16"), ("head", "bf16"), ("router", "bf16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A published figure beside its prediction, tokens a second. parts: of a decode step, in
    seconds, or of all that reads the prompts. memory: of the fullest GPU. fitted: a constant that
    was fitted to it, "" where none was."""

    id: str
    source: str
    measure: str
    predicted: float
    measured: float
    parts: tuple[tuple[str, float], ...]
    memory: Memory
    fitted: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def model_of(shape: dict[str, Any]) -> ServedModel:
    """The model that a table of a configuration describes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(shape), encoding="utf-8")
        graph = capture(TraceOptions(model=str(path), hardware="h100x8"))
        return served_model(graph, "vllm")  # or any that routes


def predicted(raw: dict[str, Any], model: ServedModel, source: str) -> Point:
    """One point of the table."""
    fmt = raw["weights"]
    # gpt-fast quantizes every linear module, the head too; streamed models the layers alone.
    ends: tuple[tuple[str, str], ...] = _WIDE if raw.get("tiers") else _WIDE[:1]
    if "wide" in raw:
        ends = tuple((block, raw["wide_format"]) for block in raw["wide"])
    serving = Serving(
        tp=raw["tp"], batch=raw["batch"], default=fmt,
        weights=() if fmt in ("bf16", "fp16") else ends,
        kv=raw.get("kv", "bf16"), kv_tier=raw.get("kv_tier", "gpu"),
        prefill_chunk=raw.get("chunk", 0),
        tiers=tuple(
            Held(block=block, tier=tier, place=place, resident=resident[0] if resident else 0)
            for block, tier, place, *resident in raw.get("tiers", ())
        ),
    )  # fmt: skip
    name = raw["hardware"]
    cluster = load_hardware(f"{name}x{min(raw['tp'], describe(name).node_size)}")
    engine = load_serving_engine(raw["engine"])
    engine = replace(engine, handling=told(engine.handling, raw.get("run", {})))
    costs = Costs(cluster=cluster, engine=engine, serving=serving)
    prompt, output, batch = (np.asarray([float(raw[k])]) for k in ("prompt", "output", "batch"))
    none = 0 * batch
    parts = step_parts(costs, model, step_of(batch, prompt + output / 2))
    decode_s = sum(float(seconds[0]) for seconds in parts.values())
    read_s = float(prompt_steps(costs, model, none, prompt, prompt, batch)[0])
    rates = {
        "decode_tokens_per_s": raw["batch"] / decode_s,
        "prefill_tokens_per_s": raw["batch"] * raw["prompt"] / read_s,
        "tokens_per_s": raw["batch"] * raw["output"] / (read_s + raw["output"] * decode_s),
    }
    return Point(
        id=raw["id"], source=source, measure=raw["measure"], predicted=rates[raw["measure"]],
        measured=float(raw["value"]), fitted=raw.get("fitted", ""),
        parts=tuple((part, float(seconds[0])) for part, seconds in parts.items()),
        memory=memory_of(model, cluster, engine, serving,
                         ServeLoad(prompt=raw["prompt"], output=raw["output"])),
    )  # fmt: skip


def validate_points(path: Path = POINTS) -> tuple[Point, ...]:
    """Every point of a table."""
    table = read_toml(path, "table of published points")
    names = dict.fromkeys(raw["model"] for raw in table["points"])
    models = {name: model_of(table["models"][name]) for name in names}
    sources = {key: " ".join(str(text).split()) for key, text in table["sources"].items()}
    return tuple(
        predicted(raw, models[raw["model"]], sources[raw["source"]]) for raw in table["points"]
    )


def text(points: tuple[Point, ...]) -> str:
    """The points in 80 columns, by source."""
    near = [one for one in points if abs(one.error) <= 0.25]
    free = [one for one in points if not one.fitted]
    parts = [[
        f"{len(points)} published points of serving: {len(near)} within 25%",
        f"{len(free)} that no constant was fitted to: {sum(not one.fitted for one in near)}",
    ]]  # fmt: skip
    for source in dict.fromkeys(one.source for one in points):
        lines = textwrap.wrap(source, WIDTH)
        lines.append(f"  {'':34} {'predicted':>10} {'measured':>10} {'error':>7}")
        lines += [
            f"  {one.id[:34]:34} {one.predicted:10.2f} {one.measured:10.2f} {one.error:+7.0%}"
            f"  {one.measure.removesuffix('_tokens_per_s')}"[:WIDTH]
            for one in points if one.source == source
        ]  # fmt: skip
        parts.append(lines)
    return "\n\n".join("\n".join(lines) for lines in parts)


def document(points: tuple[Point, ...]) -> dict[str, Any]:
    """The points in tokens a second, under stable keys."""
    return {
        "schema": "validation-points/1", "rows": len(points),
        "points": [
            {
                "id": one.id, "source": one.source, "measure": one.measure,
                "predicted": one.predicted, "measured": one.measured,
                "error": round(one.error, DIGITS), "fitted": one.fitted,
                "breakdown_s": dict(one.parts),
                "weights_bytes": one.memory.weights_bytes,
                "room_bytes": one.memory.room_bytes,
            }
            for one in points
        ],
    }  # fmt: skip
