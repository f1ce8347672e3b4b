"""Plans in the words of what runs them: one file a target, one row here; a target's file is
imported when it is asked for, so that a shell completes their names at once."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from ir.errors import UsageError
from planner.export.pinned import checked
from planner.export.target import CHECKED_TORCH, Exported, Target
from planner.plan import Plan

if TYPE_CHECKING:
    from planner.serving.plan import ServingPlan

TARGETS: dict[str, Target] = {
    "pytorch": Target(
        task="train", checked=f"torch {CHECKED_TORCH}", by="pytorch.export",
        made="a readable Python wrapper",
    ),
    "megatron": Target(
        task="train", engine="megatron", checked=checked("megatron"), by="megatron.export",
        made="arguments as a shell array",
    ),
    "torchtitan": Target(
        task="train", engine="torchtitan", checked=checked("torchtitan"), by="torchtitan.export",
        made="a Python function that returns Trainer.Config",
    ),
    "torchtitan-toml": Target(
        task="train", engine="torchtitan", checked=checked("torchtitan-toml"),
        by="torchtitan.export_toml", made="TOML, which releases to 0.2.2 read",
    ),
    "deepspeed": Target(
        task="train", engine="deepspeed", checked=checked("deepspeed"), by="deepspeed.export",
        made="JSON",
    ),
    "accelerate": Target(
        task="train", engine="native-compiled", checked=checked("accelerate"),
        by="accelerate.export", made="YAML of `accelerate launch`",
    ),
    "torchrun": Target(
        task="train", checked=checked("launchers"), by="launchers.torchrun",
        made="a script for every node",
    ),
    "slurm": Target(
        task="train", checked=checked("slurm"), by="launchers.slurm", made="a batch script",
    ),
    "trainjob": Target(
        task="train", checked=checked("trainjob"), by="launchers.trainjob",
        made="a manifest of Kubeflow Trainer",
    ),
    "vllm": Target(task="serve", checked=checked("vllm"), by="vllm.export", made="a command"),
    "sglang": Target(
        task="serve", checked=checked("sglang"), by="sglang.export", made="a command",
    ),
    "llamacpp": Target(
        task="serve", checked=checked("llamacpp"), by="llamacpp.export",
        made="a command of llama-server",
    ),
    "leaderworkerset": Target(
        task="both", checked=checked("leaderworkerset"), by="leaderworkerset.export",
        made="a manifest: SGLang, or torchrun",
    ),
}  # fmt: skip


def export(plan: Plan | ServingPlan, target: str, source: str) -> Exported:
    """The plan for one target. source: the plan's path, as the files name it.

    Raises UsageError for a target that there is not, PlanError where it cannot lay the plan out.
    """
    if target not in TARGETS:
        near = get_close_matches(target, TARGETS, n=1)
        raise UsageError(
            f"--to {target} is no target of this version", why=f"known: {', '.join(TARGETS)}",
            hints=tuple(f"--to {name}" for name in near),
        )  # fmt: skip
    if isinstance(plan, Plan) and TARGETS[target].engine:
        from cost_models.forward import forward_of

        plan = replace(plan, graph=forward_of(plan.graph, TARGETS[target].engine))
    module, _, function = TARGETS[target].by.partition(".")
    made: Exported = getattr(import_module(f"planner.export.{module}"), function)(plan, source)
    return made
