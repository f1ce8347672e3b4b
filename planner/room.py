"""What a rank of a mesh holds at least: what is over a GPU's memory even so needs no solver."""

from __future__ import annotations

from cost_models.hardware import Cluster
from cost_models.step_rows import Row, Step
from cost_models.tiers import TierUse


def state_bytes(step: Step) -> int:
    """Bytes of parameters, gradients and optimizer that the fullest rank holds at least."""
    held = [_held(row) for row in step.rows]
    return -(-sum(held[kind] for kind in step.kinds) // step.decisions.pp)


def over_below(cluster: Cluster, step: Step) -> TierUse | None:
    """A tier below the device that the state overflows however the stages are cut, or None: the
    fullest GPUs that share one lay at least the mean of all there."""
    sums: dict[str, int] = {}
    for kind in step.kinds:
        for name, size in step.rows[kind].below:
            sums[name] = sums.get(name, 0) + size
    for name, size in sums.items():
        tier = cluster.tier(name)
        gpus = cluster.sharers(tier)
        d = step.decisions
        mean = size * d.gpus // (d.pp * -(-d.gpus // gpus))
        use = TierUse(name=name, used_bytes=mean, bytes=tier.bytes, gpus=gpus)
        if not use.fits:
            return use
    return None


def _held(row: Row) -> int:
    s = row.state
    return s.parameter_bytes + s.gradient_bytes + s.optimizer_bytes


def least_bytes(step: Step, *, recomputes: bool) -> int:
    """Bytes of the fullest rank at least, whatever its stages and schedule.

    recomputes: whether any layer may recompute; then each keeps the least of its levels. The
    fullest rank holds the mean of all ranks' state and of one micro-batch's activations, and
    beside them what every rank has. Without a pipeline the one rank also has the most of all
    working and gathered bytes.
    """
    layers = {step.kinds[i] for i in step.chain.layers}
    counts = [0] * len(step.rows)
    for kind in step.kinds:
        counts[kind] += 1
    wide, total = step.wide, 0
    working, gathered = [], []
    for kind, row in enumerate(step.rows):
        if not counts[kind]:  # of units whose optimizer would lie below and does not, or is there
            continue
        levels = range(3) if recomputes and kind in layers else (0,)
        total += counts[kind] * (_held(row) + min(wide(row.kept[n]) for n in levels))
        working.append(min(wide(row.working[n]) for n in levels))
        gathered.append(wide(row.state.gathered_bytes))
    fixed = sum(size for _, size in step.reserved) + wide(step.glue.kept[0])
    if step.decisions.pp == 1:
        return total + fixed + max(working) + 2 * max(gathered)
    return -(-total // step.decisions.pp) + fixed + min(working) + 2 * min(gathered)
