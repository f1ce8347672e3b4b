"""What NVIDIA's published recipes set and their tables of results leave out."""

from __future__ import annotations

import re

from planner.validation.rows import Run

# NVIDIA-NeMo/Megatron-Bridge, scripts/performance/configs: WorkloadBaseConfig of model, GPU and
# release; cuda_graph_impl "transformer_engine" with cuda_graph_scope [attn,] moe_router,
# moe_preprocess is "scoped_graphs", moe_a2a_overlap "ep_overlap".
# (model, GPU, pipeline ranks at most, releases [from, to), switches)
_RECIPES = (
    (r"DeepSeek", r"b200", 8, 26.04, 26.06, ("scoped_graphs", "ep_overlap")),
    (r"Qwen3-235B|DeepSeek", r"gb\d", 99, 25.11, 26.06, ("scoped_graphs",)),
    (r"Qwen3-30B", r"g?b\d", 1, 25.11, 26.06, ("scoped_graphs",)),
    (r"Nemotron-3", r"g?b\d", 1, 25.11, 99.0, ("scoped_graphs",)),
)


def recipe_switches(run: Run, release: float) -> tuple[str, ...]:
    """Switches of the recipe that a run of NVIDIA's tables goes by, of a release as 26.06; 0, where
    none is named: the newest."""
    model, gpu = str(run.model.get("name")), str(run.hardware["gpu"])
    at, stages = release or 98.0, int(run.config.get("pp") or 1)
    for name, device, most, start, end, switches in _RECIPES:
        fits = re.search(name, model) and re.match(device, gpu)
        if fits and stages <= most and start <= at < end:
            return switches
    return ()
