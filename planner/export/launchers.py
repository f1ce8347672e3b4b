"""What starts the processes of a plan: torchrun, Slurm, Kubeflow's TrainJob.

They carry its ranks alone: the program that they start applies the plan, which lies beside it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from cost_models.fleet import parts_of
from ir.errors import PlanError
from planner.export.header import comment, header
from planner.export.pinned import checked
from planner.export.target import Exported, training
from planner.plan import Plan, load_cluster

PROGRAM = "train.py"
APPLIES = ("the program that is started applies the plan: planner.parallelize(model, plan), or the"
           " export for its engine",)  # fmt: skip


def nodes_of(plan: object, target: str, source: str) -> tuple[Plan, int, int]:
    """(the plan, nodes, GPUs of each). Raises PlanError where nodes are not alike."""
    p = training(plan, target)
    parts = parts_of(load_cluster(p, Path(source).parent))
    gpus = p.decisions.gpus
    node = min(parts[0].node_size, gpus)
    alike = len({part.kind for part in parts}) == 1  # groups of one kind, of whole nodes
    if gpus % node or not alike or any(part.count % node for part in parts if len(parts) > 1):
        raise PlanError(
            f"--to {target} starts as many processes on every node",
            why=f"{p.hardware} has nodes that are not alike",
            hints=("start each kind of node by hand: ranks are in the order of the plan's parts",),
        )
    return p, gpus // node, node


def command(nodes: int, gpus: int, endpoint: str, plan_name: str) -> list[str]:
    """torchrun's words; endpoint: where ranks meet, none on a single node."""
    words = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={gpus}"]
    if nodes > 1:
        words += ["--rdzv-backend=c10d", "--rdzv-id=plan", f"--rdzv-endpoint={endpoint}"]
    else:
        words.append("--standalone")
    return [*words, PROGRAM, plan_name]


def plan_name(source: str) -> str:
    """The plan's file name: letters, digits, dots and dashes of it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.replace(":", "/").rpartition("/")[2])
    return name if name.strip("-.") else "plan.json"


def torchrun(plan: object, source: str) -> Exported:
    """A script `torchrun.sh`, to be run on every node."""
    p, nodes, gpus = nodes_of(plan, "torchrun", source)
    words = command(nodes, gpus, '"${HEAD_NODE:?the host of rank 0}:29500"', plan_name(source))
    text = "#!/bin/sh\n" + comment(header(p, "torchrun", checked("launchers")))
    text += " \\\n    ".join(words) + ' "$@"\n'
    return Exported(files=(("torchrun.sh", text),), notes=APPLIES)


def slurm(plan: object, source: str) -> Exported:
    """A batch script `plan.sbatch`: one task a node, torchrun in each."""
    p, nodes, gpus = nodes_of(plan, "slurm", source)
    words = command(nodes, gpus, '"$HEAD_NODE:29500"', plan_name(source))
    options = {
        "nodes": nodes, "ntasks-per-node": 1, "gpus-per-node": gpus, "exclusive": None,
        "distribution": "block",
    }  # fmt: skip
    text = "#!/bin/bash\n" + comment(header(p, "slurm", checked("slurm")))
    for key, value in options.items():
        text += f"#SBATCH --{key}" + (f"={value}\n" if value is not None else "\n")
    if nodes > 1:
        text += 'HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
    text += "srun " + " \\\n    ".join(words) + ' "$@"\n'
    return Exported(files=(("plan.sbatch", text),), notes=APPLIES)


def trainjob(plan: object, source: str) -> Exported:
    """A manifest `trainjob.yaml` of Kubeflow Trainer; the operator sets up the rendezvous."""
    p, nodes, gpus = nodes_of(plan, "trainjob", source)
    args = [plan_name(source)]
    text = comment(header(p, "trainjob", checked("trainjob"))) + f"""\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {kubernetes_name(p.graph.name)}
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: IMAGE  # yours: torch, the model, {PROGRAM} and the plan
    command: ["torchrun", "{PROGRAM}"]
    args: {json.dumps(args)}
    numNodes: {nodes}
    numProcPerNode: {gpus}
    resourcesPerNode:
      limits:
        nvidia.com/gpu: {gpus}
"""
    return Exported(files=(("trainjob.yaml", text),), notes=(*APPLIES, "set the image"))


def kubernetes_name(name: str) -> str:
    """A name as Kubernetes takes it: lower case, digits and dashes, a letter first."""
    word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return f"plan-{word}" if word else "plan"
