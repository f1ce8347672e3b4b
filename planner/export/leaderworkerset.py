"""LeaderWorkerSet: a manifest that serves a plan with SGLang, or trains one with torchrun, each
replica on nodes of its own."""

from __future__ import annotations

import json

from ir.errors import PlanError
from planner.export import sglang
from planner.export.header import comment, header
from planner.export.launchers import APPLIES, command, kubernetes_name, nodes_of, plan_name
from planner.export.pinned import checked
from planner.export.serving import node_gpus
from planner.export.target import Exported, Lost
from planner.plan import Plan
from planner.serving.plan import ServingPlan

LEADER, SIZE, INDEX = "$(LWS_LEADER_ADDRESS)", "$(LWS_GROUP_SIZE)", "$(LWS_WORKER_INDEX)"
_PORT = 29500


def export(plan: object, source: str) -> Exported:
    """A file `leaderworkerset.yaml`."""
    if isinstance(plan, ServingPlan):
        return _serving(plan, source)
    p, nodes, gpus = nodes_of(plan, "leaderworkerset", source)
    words = command(nodes, gpus, f"{LEADER}:{_PORT}", plan_name(source))
    if nodes > 1:
        words.insert(1, f"--node-rank={INDEX}")
    return _made(p, words, 1, nodes, gpus, (), "torchrun: torch, the model, train.py and the plan")


def _serving(p: ServingPlan, source: str) -> Exported:
    lost = sglang.losses(p, "leaderworkerset")
    each = p.serving.ranks * p.serving.pp
    gpus = min(node_gpus(p, source), each)
    if each % gpus:
        raise PlanError("--to leaderworkerset has replicas of nodes that are alike",
                        why=f"{each} GPUs a replica on {p.hardware}")  # fmt: skip
    flags = sglang.flags(p, 1)
    nodes = each // gpus
    if nodes > 1:
        flags += [("--dist-init-addr", f"{LEADER}:{_PORT}"), ("--nnodes", SIZE),
                  ("--node-rank", INDEX)]  # fmt: skip
    words = [*sglang.LAUNCH.split(), "--model-path=/model", *("=".join(flag) for flag in flags)]
    return _made(p, words, p.serving.replicas, nodes, gpus, lost, "sglang, the model at /model")


def _made(
    p: Plan | ServingPlan, words: list[str], replicas: int, nodes: int, gpus: int,
    lost: tuple[Lost, ...], image: str,
) -> Exported:  # fmt: skip
    head = header(p, "leaderworkerset", checked("leaderworkerset"))
    said = (*head, *(f"lost: {row}" for row in lost))
    listed = "".join(f"          - {json.dumps(word)}\n" for word in words)
    text = comment(said) + f"""\
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {kubernetes_name(p.graph.name)}
spec:
  replicas: {replicas}
  leaderWorkerTemplate:
    size: {nodes}
    workerTemplate:
      spec:
        containers:
        - name: main
          image: IMAGE  # yours: {image}
          command:
{listed}          resources:
            limits:
              nvidia.com/gpu: {gpus}
"""
    notes = ("set the image", *(APPLIES if isinstance(p, Plan) else ()))
    return Exported(files=(("leaderworkerset.yaml", text),), lost=lost, notes=notes)
