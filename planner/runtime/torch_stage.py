"""Torch's pipeline stage as the schedules run it: gradients in their own format, and stages whose
neighbours have another tp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage

from cost_models.borders import Piece
from planner.runtime.lines import Line, Peers

Sizes = Sequence[tuple[int, int | None]]  # of each value: the dimension split on tp, its whole size


class TorchStage(PipelineStage):
    """Torch's stage; weight gradients made apart are added up in the gradients' own format."""

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        if isinstance(self.submod, FSDPModule):
            # as FSDP does after a whole backward, which did not run here
            for state in fully_shard.state(self.submod)._state_ctx.all_states:  # type: ignore[attr-defined]
                for group in _groups(state):
                    for parameter in group.fsdp_params:
                        if hasattr(parameter, "_unsharded_param"):
                            parameter.accumulate_unsharded_grad_if_needed()
                            parameter.to_accumulated_grad_if_needed()


def _groups(state: Any) -> list[Any]:
    """A state's parameter groups: several since torch 2.12."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


class LineStage(TorchStage):
    """A stage of a pipeline whose parts have another tp each: it sends to and gets from ranks of
    the next and the last stage piece by piece, as `Line` says.

    What torch sends and receives is this rank's part, as always; here each such operation becomes
    those of its pieces, and what came is put together before the stage reads it.
    """

    def __init__(
        self, *given: Any, line: Line, arriving: Sizes, leaving: Sizes, **named: Any
    ) -> None:
        """arriving, leaving: where each value that crosses is split on tp, and its whole size."""
        super().__init__(*given, **named)
        self.line, self.arriving, self.leaving = line, tuple(arriving), tuple(leaving)
        self.group = line.group
        self.group_rank, self.group_size = line.stage, len(line.ranks)
        self._waiting: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def meet(self) -> None:
        """Talk once to every neighbour, the first stage first: links are made in one order."""
        word = torch.zeros(1, device=self.device)
        if not self.is_first:
            for rank, _ in self._peers(self.arriving, self.stage_index - 1, self.line.givers):
                dist.recv(word, src=rank, group=self.group)
        if not self.is_last:
            for rank, _ in self._peers(self.leaving, self.stage_index + 1, self.line.takers):
                dist.send(word, dst=rank, group=self.group)

    def _peers(
        self, values: Sizes, stage: int, of: Callable[[int, int | None], Peers]
    ) -> Peers:
        """Each rank of another stage that this one talks to, once."""
        found = dict(peer for _, size in values for peer in of(stage, size))
        return tuple(found.items())

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        found = super().get_fwd_recv_ops(fwd_chunk_id)
        return self._received("forward", fwd_chunk_id, found, self.arriving, -1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        found = super().get_bwd_recv_ops(bwd_chunk_id)
        return self._received("backward", bwd_chunk_id, found, self._learning, 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._sent(super().get_fwd_send_ops(fwd_chunk_id), self.leaving, 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        found = super().get_bwd_send_ops(bwd_chunk_id)
        return self._sent(found, self._learnt, -1)

    @property
    def _learning(self) -> Sizes:
        """Of what leaves, the values that gradients come back of."""
        metas = self._stage_meta.output_grads or ()
        return [at for at, meta in zip(self.leaving, metas) if meta is not None]

    @property
    def _learnt(self) -> Sizes:
        """Of what arrives, the values that gradients go back of."""
        infos = self.grad_send_info or ()
        return [
            at for i, (at, to) in enumerate(zip(self.arriving, infos))
            if to is not None and self._get_grad_send_meta(i) is not None
        ]  # fmt: skip

    def _received(
        self, way: str, chunk: int, ops: list[dist.P2POp], values: Sizes, step: int
    ) -> list[dist.P2POp]:
        made, waiting = [], []
        for op, (dim, size) in zip(ops, values, strict=True):
            for rank, into in self.line.givers(self.stage_index + step, size):
                whole = op.tensor.detach()
                part = _cut(whole, dim, into)
                got = part if part.is_contiguous() else torch.empty_like(
                    part, memory_format=torch.contiguous_format
                )  # fmt: skip
                if got is not part:
                    waiting.append((part, got))
                made.append(dist.P2POp(dist.irecv, got, rank, self.group))
        self._waiting[way, chunk] = waiting
        return made

    def _sent(self, ops: list[dist.P2POp], values: Sizes, step: int) -> list[dist.P2POp]:
        return [
            dist.P2POp(dist.isend, _cut(op.tensor, dim, of).contiguous(), rank, self.group)
            for op, (dim, size) in zip(ops, values, strict=True)
            for rank, of in self.line.takers(self.stage_index + step, size)
        ]

    def _put_together(self, way: str, chunk: int) -> None:
        for part, got in self._waiting.pop((way, chunk), ()):
            part.copy_(got)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        self._put_together("forward", fwd_chunk_id)
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        self._put_together("backward", bwd_chunk_id)
        return super()._retrieve_recv_grads(bwd_chunk_id)

    def _resolve_peer_global_rank(self, stage_idx: int) -> int:
        return self.line.ranks[stage_idx][0]  # replaced by each piece's own


def _cut(value: torch.Tensor, dim: int, piece: Piece | None) -> torch.Tensor:
    return value if piece is None else value.narrow(dim, *piece)
