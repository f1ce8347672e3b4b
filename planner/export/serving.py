"""What exports of serving plans share: their decisions, what is below the GPU, formats."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

from cost_models.chain import chain_of
from cost_models.fleet import parts_of
from cost_models.serving_decisions import Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_reading import parts_of as parts_of_model
from cost_models.serving_reading import served_model
from cost_models.serving_tiers import below_bytes
from ir.errors import PlanError
from ir.stacks import routed
from planner.mesh import facts_of
from planner.plan import Plan, load_cluster
from planner.serving.plan import ServingPlan

SERVING = tuple(f.name for f in fields(Serving))  # every decision of a serving plan
WHOLE = ("bf16", "fp16", "fp32")  # formats that lose nothing of the checkpoint's
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MATRICES = {"attention", "mlp", "shared_experts", "routed_experts"}
_GIB = 1 << 30
_HUNDREDTHS = 100  # of a GiB, in which what is offloaded is rounded up
Flags = list[tuple[str, ...]]


def serving(plan: object, target: str) -> ServingPlan:
    """The plan, where it is one of serving. Raises PlanError for one of training."""
    if isinstance(plan, Plan) or not isinstance(plan, ServingPlan):
        raise PlanError(f"--to {target} is about serving, and this is a plan of training",
                        hints=("plan trace --task serve",))  # fmt: skip
    return plan


def has_experts(p: ServingPlan) -> bool:
    """Whether the model routes tokens to experts."""
    return bool(facts_of(chain_of(routed(p.graph))).experts)


def online_fp8(p: ServingPlan) -> bool:
    """Whether the matrices of all layers, and nothing else, are in fp8 with a scale each: what
    servers make of a 16-bit checkpoint while they load it."""
    read = parts_of_model(p.graph).values()
    blocks = {part.block for parts in read for part in parts.values()}
    narrow = {block: word for block, word in p.serving.weights if word not in WHOLE}
    if p.serving.default not in WHOLE or not narrow:
        return False
    return set(narrow) == blocks & _MATRICES and set(narrow.values()) == {"fp8"}


def formats_note(p: ServingPlan) -> str:
    """Why formats are lost, and what they are."""
    said = ", ".join(f"{block} {word}" for block, word in (*p.serving.weights,
                                                            ("the rest", p.serving.default)))
    return f"formats are the checkpoint's: serve one that has {said}"


def keeps_formats(p: ServingPlan) -> bool:
    """Whether weights are as the checkpoint has them."""
    return all(word in WHOLE for word in (p.serving.default, *dict(p.serving.weights).values()))


def offloaded_gib(p: ServingPlan) -> float:
    """GiB of weights a GPU that lie on the host, rounded up."""
    model = served_model(p.graph, p.asked.engine)
    below = dict(below_bytes(model, p.serving).tiers).get("cpu", 0.0)
    return math.ceil(below / _GIB * _HUNDREDTHS) / _HUNDREDTHS


def tiers_note(p: ServingPlan) -> str:
    """What of the tiers is lost where a server streams a number of bytes from the host."""
    places = {f"{h.block} on {h.tier}" + (" by the CPU" if h.place == "compute" else "")
              for h in p.serving.tiers}  # fmt: skip
    return ("the server copies so many bytes of its first layers for each step, the plan has "
            + ", ".join(sorted(places)))  # fmt: skip


def share(p: ServingPlan, ranks: int = 1) -> int:
    """Sequences at once of one replica, or of one of its attention replicas."""
    return -(-p.serving.batch // (p.serving.replicas * ranks))


def tokens(p: ServingPlan) -> int:
    """The longest sequence of the load."""
    return p.asked.prompt + p.asked.output


def step_tokens(p: ServingPlan, target: str) -> int:
    """Tokens of prompts that a step takes, 0 where the plan says none of this server's: servers
    have other defaults on smaller devices than what was costed."""
    engine = load_serving_engine(p.asked.engine)
    own = engine.chunk_tokens if p.asked.engine.partition("-")[0] == target else 0
    return p.serving.prefill_chunk or own


def node_gpus(p: ServingPlan, source: str) -> int:
    """GPUs of a node of the plan's hardware. source: the plan's path."""
    return parts_of(load_cluster(p, Path(source).parent))[0].node_size


def alone(p: ServingPlan) -> str:
    """A note on whole copies that one server does not make."""
    return f"start it {p.serving.replicas} times, each on GPUs of its own"


def script(words: list[str], flags: Flags, head: str) -> str:
    """A shell script: the command and its flags, one a line."""
    lines = [" ".join(words), *(" ".join(flag) for flag in flags)]
    return f"#!/bin/sh\n{head}" + " \\\n    ".join(lines) + ' \\\n    "$@"\n'
