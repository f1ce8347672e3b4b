"""What ranks read of one another's findings is what torch finds on each of them itself."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


def step(mesh):
    """Forward, backward and update: even and uneven shards, views, a mask of a rank's own."""
    at = {"rows": [Shard(0), Replicate()], "columns": [Replicate(), Shard(1)],
          "both": [Shard(0), Shard(1)], "twice": [Shard(0), Shard(0)]}  # fmt: skip
    x = distribute_tensor(torch.randn(6, 5, 8), mesh, at["both"]).requires_grad_()
    table = distribute_tensor(torch.randn(7, 8), mesh, at["twice"]).requires_grad_()
    weight = distribute_tensor(torch.randn(8, 8), mesh, at["columns"]).requires_grad_()
    tokens = distribute_tensor(torch.randint(7, (6, 5)), mesh, at["rows"])
    hidden = (F.embedding(tokens, table) + x.view(30, 8).view(6, 5, 8)) @ weight
    hidden = F.layer_norm(hidden, (8,)) * x.new_ones(6, 5, 8)
    torch.cat([hidden, x], 2).transpose(0, 1).square().sum().backward()
    torch.nn.utils.clip_grad_norm_([table, weight], 1.0)
    torch.optim.AdamW([table, weight], foreach=False).step()
    torch.optim.SGD([x], foreach=True, momentum=0.9).step()


def read_and_found(rank):
    """How often something was asked for, and those that are not torch's own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shared = ShardingPropagator.propagate_op_sharding_non_cached
    asked, different = [], []

    def both(propagator, schema):
        answer = shared(propagator, schema)
        own = shared.__wrapped__(propagator, schema)
        asked.append(str(schema.op))
        if (repr(answer), answer) != (repr(own), own):
            different.append(f"{schema}: {answer}, not {own}")
        return answer

    ShardingPropagator.propagate_op_sharding_non_cached = both
    try:
        for _ in range(2):  # as some rank finds it, and as all read it
            dist.barrier()
            _clear_sharding_prop_cache()
            step(mesh)
    finally:
        ShardingPropagator.propagate_op_sharding_non_cached = shared
    return len(asked), different


def test_what_is_read_is_what_torch_finds(world):
    for asked, different in world.run(4, read_and_found):
        assert asked > 60 and not different, "\n".join(different)
