"""What ran it: a run's engine class, its software's switches, its number format."""

from __future__ import annotations

import re

from cost_models.engines import Engine, load_engine
from cost_models.hardware import Cluster
from planner.validation.recipes import recipe_switches
from planner.validation.rows import Run

_ENGINES = (  # words of the framework -> the engine class
    (r"megatron-deepspeed", "megatron-deepspeed"),
    (r"megatron-lm", "megatron-2022"),
    (r"megatron|nemo / |nemo/|mlperf|nemo framework", "megatron"),
    (r"composer|llm-foundry|mosaic", "fsdp-eager"),
    (r"torchtitan", "torchtitan"),
    (r"automodel", "automodel"),
    (r"deepspeed", "deepspeed"),
    (r"jax|pax|maxtext", "automodel"),
    (r"thunder", "torch-bf16"),
    (r"", "fsdp-compiled"),
)


def engine_of(run: Run, defaults: list[str]) -> Engine:
    """The engine class of a run; what is assumed is added to `defaults`."""
    words = run.framework.lower()
    name = next(e for pattern, e in _ENGINES if re.search(pattern, words))
    if name == "fsdp-compiled" and "fsdp" not in words:
        defaults.append("framework not known here: as compiled FSDP")
    if name == "automodel" and "automodel" not in words:
        defaults.append("JAX: as NeMo AutoModel, sharded data under Transformer Engine's kernels")
    if name == "torchtitan" and run.config.get("torch_compile") is not True:
        name = "torchtitan-eager"
        if run.config.get("torch_compile") is None:
            defaults.append("torch_compile = false")
    if name == "megatron-2022" and not run.hardware["gpu"].startswith(("a100", "v100")):
        name = "megatron"
    if name == "megatron-2022" and run.config.get("zero_or_fsdp") == "zero3":
        name = "deepspeed-2021"
        defaults.append("ZeRO-3 beside Megatron-LM of 2021, which had none: DeepSpeed's")
    engine = load_engine(name)
    model = str(run.model.get("name"))
    if name == "megatron" and re.search("DeepSeek|Kimi|Moonlight", model):
        engine = engine.switched("precision_aware")
        defaults.append("moments in bf16, as NVIDIA's recipes of the model have them")
    return engine


# What notes say of a run's software -> the engine's switch of that name.
_SWITCHES = (
    (r"cuda graph|, graphs|with graphs", "graphs"),
    (r"token-?drop", "padded"),
    (r"overlap on|1f1b all-to-all overlap|tuned \(hybridep", "ep_overlap"),
    (r"all-to-all dispatcher", "plain_dispatch"),
    (r"\basync ?tp", "async_tp"),
    (r"mxfp8|fp8-mx|sub-channel|block scaling", "block_scaled"),
)


def switches_of(
    run: Run, engine: Engine, cluster: Cluster, defaults: list[str]
) -> tuple[str, ...]:
    """Options of the software that notes name, and CUDA graphs where recipes have them."""
    notes = run.notes.lower()
    found = tuple(name for pattern, name in _SWITCHES if re.search(pattern, notes))
    older = 0 < _release(notes) < 26.06 or run.model.get("hybrid")
    static = engine.name == "megatron" and cluster.device.family == "blackwell" and run.is_moe
    if static and not older and not natural(run) and "graphs" not in found:
        found = ("graphs", *recipe_switches(run, _release(notes)), *found)
        defaults.append("CUDA graphs: NVIDIA's recipes of 2026 on Blackwell, not for hybrids")
    elif static and not natural(run) and "padded" not in found:
        more = recipe_switches(run, _release(notes))
        found = (*(x for x in more if x not in found), *found)
        if more:
            defaults.append("CUDA graphs of part of a layer: NVIDIA's recipes of that release")
    if engine.name == "megatron" and "padded" in found and "plain_dispatch" not in found:
        found = (*found, "plain_dispatch")
        defaults.append("token drop: all-to-all dispatcher, as NVIDIA's recipes of 25.09 have it")
    return found


def precision_of(run: Run, defaults: list[str]) -> str:
    """The format that a run computes in."""
    if not run.config.get("precision"):
        defaults.append("precision = bf16")
    precision = str(run.config.get("precision") or "bf16")
    if precision == "fp8" and "rowwise" in run.notes.lower():
        defaults.append("rowwise fp8 gains nothing over bf16")
        return "bf16"
    return precision


def _release(notes: str) -> float:
    """The container's release, year and month as 26.06; 0 where none is named."""
    found = re.search(r"(\d\d\.\d\d)(\.\d+)? container", notes)
    return float(found[1]) if found else 0.0


def natural(run: Run) -> bool:
    """Whether experts are routed to as a trained router does, not balanced by force."""
    return bool(run.is_moe and re.search("natural routing|real data", run.notes.lower()))
