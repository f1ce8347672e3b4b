"""Which shares of a step parts of the hardware may have, where each has replicas of its own."""

from __future__ import annotations

from cost_models.decisions import Decisions, Share
from cost_models.state import ranks_of


def data_ranks(d: Decisions, share: Share, expert: bool) -> int:
    """Ranks of a part among which parameters are sharded or replicated: `ranks_of`'s."""
    return share.dp * d.cp * (d.tp if expert else 1) // (d.ep * d.etp if expert else 1)


def share_fault(d: Decisions) -> str | None:
    """Why the parts' shares do not go with the rest of the decisions, or None."""
    shares, samples = d.shares, sum(share.dp * share.microbatches for share in d.shares)
    names = [share.part for share in shares]
    across = d.shard == d.dp * d.cp
    block, experts = d.ep * d.etp, ranks_of(d, True)
    for fault, why in (
        (len(shares) < 2 or len(set(names)) < len(names),
         "shares are of two parts or more, each named once"),
        (bool(d.parts), "with shares every part has whole replicas, and no stages of its own"),
        (d.pp > 1, "with shares a replica has no pipeline: pp=1"),
        (sum(share.dp for share in shares) != d.dp,
         f"the shares have {sum(share.dp for share in shares)} data ranks, dp is {d.dp}"),
        (max((share.microbatches for share in shares), default=0) != d.microbatches,
         f"microbatches is {d.microbatches}, which no share has as the most"),
        (not samples, "no share has micro-batches"),
        (any(share.dp * d.cp * d.tp % block for share in shares),
         f"ep*etp = {block} ranks would lie on several parts"),
        (across and d.zero >= 2 and d.dp * d.cp > 1,
         f"zero={d.zero} moves shards with each micro-batch, of which parts have other numbers:"
         " shards lie inside a part, as under zero=1 they need not"),
        (not across and any(share.dp * d.cp % d.shard for share in shares),
         f"shard = {d.shard} ranks are neither all nor inside one part"),
        (block * d.tp > 1 and experts.replicas > 1
         and any(data_ranks(d, share, True) % experts.shard for share in shares),
         f"the {experts.shard} ranks that share experts would lie on several parts"),
        (d.moved is not None or d.below is not None,
         "with shares what is offloaded is that of all layers or of none"),
    ):  # fmt: skip
        if fault:
            return why
    return next(
        (f"{share.part} computes other layers again than it has" for share in shares
         if share.recompute and (len(share.recompute) != len(d.stages) or any(
             full + some > n for (full, some), n in zip(share.recompute, d.stages)))),
        None,
    )  # fmt: skip
