"""Which settings a decision is read from, to say where a configuration has what a flag contradicts.

A decision that no setting of the engine changes is not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ir.errors import PlanError, UsageError
from planner.export.pinned import Pinned
from planner.importing.settings import Settings

_T, _P = "training.", "parallelism."
_TORCHTITAN = {
    "pp": (f"{_P}pipeline_parallel_degree",),
    "dp": (f"{_P}data_parallel_shard_degree", f"{_P}data_parallel_replicate_degree"),
    "cp": (f"{_P}context_parallel_degree",),
    "tp": (f"{_P}tensor_parallel_degree",),
    "ep": (f"{_P}expert_parallel_degree",),
    "etp": (f"{_P}expert_tensor_parallel_degree",),
    "zero": (f"{_P}data_parallel_shard_degree", f"{_P}data_parallel_replicate_degree"),
    "shard": (f"{_P}data_parallel_shard_degree", f"{_P}data_parallel_replicate_degree"),
    "reshard": (f"{_P}fsdp_reshard_after_forward",),
    "micro_batch": (f"{_T}local_batch_size", f"{_P}pipeline_parallel_microbatch_size"),
    "microbatches": (f"{_T}global_batch_size", f"{_T}local_batch_size"),
    "schedule": (f"{_P}pipeline_parallel_schedule",),
    "virtual_stages": (f"{_P}pipeline_parallel_schedule", f"{_P}module_fqns_per_model_part"),
    "stages": (f"{_P}module_fqns_per_model_part", f"{_P}pipeline_parallel_degree"),
    "recompute": ("activation_checkpoint", "activation_checkpoint.mode",
                  "activation_checkpoint.selective_ac_option"),
    "offload": (f"{_T}enable_cpu_offload",),
    "sequence_parallel": (f"{_P}enable_sequence_parallel", f"{_P}tensor_parallel_degree"),
    "compile": ("compile.enable",),
    "cp_kind": (f"{_P}context_parallel_rotate_method",),
    "grad_dtype": (f"{_T}mixed_precision_reduce",),
    "global_batch": (f"{_T}global_batch_size", f"{_T}local_batch_size"),
    "seq_len": (f"{_T}seq_len",),
    "optimizer": ("optimizer.name",),
}  # fmt: skip
_MEGATRON = {
    "pp": ("--pipeline-model-parallel-size",),
    "dp": ("--tensor-model-parallel-size", "--pipeline-model-parallel-size",
           "--context-parallel-size"),
    "cp": ("--context-parallel-size",),
    "tp": ("--tensor-model-parallel-size",),
    "ep": ("--expert-model-parallel-size",),
    "etp": ("--expert-tensor-parallel-size", "--tensor-model-parallel-size"),
    "zero": ("--use-distributed-optimizer", "--data-parallel-sharding-strategy"),
    "shard": ("--num-distributed-optimizer-instances", "--use-distributed-optimizer"),
    "reshard": ("--data-parallel-sharding-strategy",),
    "micro_batch": ("--micro-batch-size",),
    "microbatches": ("--global-batch-size",),
    "schedule": ("--num-virtual-stages-per-pipeline-rank",
                 "--num-layers-per-virtual-pipeline-stage"),
    "virtual_stages": ("--num-virtual-stages-per-pipeline-rank",
                       "--num-layers-per-virtual-pipeline-stage",
                       "--pipeline-model-parallel-layout"),
    "stages": ("--pipeline-model-parallel-layout", "--decoder-first-pipeline-num-layers",
               "--decoder-last-pipeline-num-layers", "--pipeline-model-parallel-size"),
    "recompute": ("--recompute-granularity", "--recompute-activations", "--recompute-num-layers"),
    "offload": ("--optimizer-cpu-offload", "--cpu-offloading-num-layers"),
    "sequence_parallel": ("--sequence-parallel",),
    "cp_kind": ("--cp-comm-type",),
    "grad_dtype": ("--grad-reduce-in-bf16", "--accumulate-allreduce-grads-in-fp32"),
    "global_batch": ("--global-batch-size",),
    "seq_len": ("--seq-length",),
    "optimizer": ("--optimizer",),
}  # fmt: skip
_Z = "zero_optimization."
_DEEPSPEED = {
    "dp": ("tensor_parallel.autotp_size", "sequence_parallel_size"),
    "cp": ("sequence_parallel_size",),
    "tp": ("tensor_parallel.autotp_size",),
    "ep": ("expert_parallel.autoep_size",),
    "etp": ("expert_parallel.expert_tensor_parallel_size",),
    "zero": (f"{_Z}stage",),
    "shard": (f"{_Z}stage",),
    "reshard": (f"{_Z}stage3_max_live_parameters", f"{_Z}stage"),
    "micro_batch": ("train_micro_batch_size_per_gpu", "train_batch_size",
                    "gradient_accumulation_steps"),
    "microbatches": ("gradient_accumulation_steps", "train_batch_size",
                     "train_micro_batch_size_per_gpu"),
    "offload": (f"{_Z}offload_optimizer.device", f"{_Z}offload_param.device"),
    "cp_kind": ("sequence_parallel_size",),
    "grad_dtype": ("data_types.grad_accum_dtype",),
    "global_batch": ("train_batch_size", "train_micro_batch_size_per_gpu",
                     "gradient_accumulation_steps"),
}  # fmt: skip
_F, _S = "fsdp_config.fsdp_", "parallelism_config.parallelism_config_"
_ACCELERATE = {
    "dp": (f"{_S}dp_shard_size", f"{_S}dp_replicate_size"),
    "cp": (f"{_S}cp_size",),
    "tp": (f"{_S}tp_size",),
    "zero": ("distributed_type", f"{_F}sharding_strategy", f"{_F}reshard_after_forward"),
    "shard": (f"{_S}dp_shard_size", f"{_S}dp_replicate_size"),
    "reshard": (f"{_F}reshard_after_forward", f"{_F}sharding_strategy"),
    "recompute": (f"{_F}activation_checkpointing",),
    "offload": (f"{_F}offload_params",),
    "compile": ("dynamo_config.dynamo_backend",),
    "cp_kind": (f"{_S}cp_comm_strategy",),
    "grad_dtype": ("mixed_precision",),
}
ORIGINS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "torchtitan": _TORCHTITAN, "megatron": _MEGATRON, "deepspeed": _DEEPSPEED,
    "accelerate": _ACCELERATE,
}  # fmt: skip


def contradicted(
    flag: str, theirs: str, key: str, engine: str, settings: Settings, known: Pinned
) -> UsageError:
    """The error of a flag that is not what the configuration comes to: the lines that say so, or
    whose default it is where none does. theirs: the value as messages have it."""
    path, names = settings.source, origins(key, engine, known)
    lines = _lines(names, settings)
    if lines:
        return UsageError(f"{flag}, but {path} says {theirs}", why=f"by {lines}",
                          hints=("leave one of them out",))  # fmt: skip
    if not names:
        return UsageError(f"{flag}, but under {known.engine} it is {theirs}",
                          why="no setting of it changes that", hints=("leave the flag out",))
    source = " ".join(known.source.split())
    return UsageError(
        f"{flag}, but {path} leaves it open, and {known.engine}'s default is {theirs}",
        why=f"the file does not set {' or '.join(names)}; defaults as read in {known.engine}"
            f" {known.version} ({source})",
        hints=(f"{names[0]} in {path} says otherwise", "leave the flag out"),
    )  # fmt: skip


def of_the_file(
    fault: PlanError, pins: Sequence[tuple[str, str]], engine: str, settings: Settings,
    known: Pinned,
) -> PlanError:
    """A fault of planning a configuration, which speaks of pins, in its own words: where each comes
    from, and proposals that are no flags. pins: (key, as a pin says it) of what is not of `--fix`.
    """  # fmt: skip

    def own(text: str) -> str:
        for key, said in pins:
            lines = _lines(origins(key, engine, known), settings)
            where = f"{said} {f'by {lines}' if lines else f'as {known.engine} has it'}"
            pin = rf"(?<![\w=]){re.escape(said)}(?![\w,:+/])"
            plain = where.replace("\\", r"\\")  # in a pattern's words one stands for itself so
            text = re.sub(rf"--fix {pin}|{pin} \(--fix\)", plain, text)
        return text

    hints = tuple(own(hint).replace("with --fix ", "with ") for hint in fault.hints)
    return type(fault)(own(fault.what), where=fault.where, why=own(fault.why), hints=hints)


def _lines(names: Sequence[str], settings: Settings) -> str:
    """Those of the names that the file sets, each with its line."""
    return ", ".join(
        f"{name}{f' (line {at})' if (at := settings.values[name].line) else ''}"
        for name in names if settings.has(name)
    )  # fmt: skip


def origins(key: str, engine: str, known: Pinned) -> tuple[str, ...]:
    """The settings that a decision is read from, of those that this version has."""
    names = ORIGINS[engine].get(key, ())
    real = {*known.plan, *known.other}
    return tuple(name for name in names if real & {name, name.rpartition(".")[2]})
