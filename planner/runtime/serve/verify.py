"""A twin served on local processes, beside the unsharded, unquantized twin in each of them.

Two references: the model as it is, and (where the plan loses numbers) the unsharded model with the
values that the packed weights stand for and the cache as planned. The plan's runtime must answer
what the second does; how far that is from the first is what the formats cost.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ir.capture.export import logits_of
from ir.capture.real import Real, Recipe, build
from ir.errors import PlanError
from planner.runtime.parts import Box, boxes_of, local_of
from planner.runtime.serve.apply import laid_by, serve
from planner.runtime.serve.kv import Kv, cache_of, even_mask
from planner.runtime.serve.loader import Laid
from planner.runtime.serve.packed import pack
from planner.runtime.serve.twin import BATCH, OUTPUT, PROMPT, ServingTwin
from planner.runtime.verify.sample import call, draw_batch, draw_constants, ties, without_dropout
from planner.runtime.world import World
from planner.serving.plan import ServingPlan

MOST_SEEDS = 50
ALLOWED = 1e-4  # relative L2 of logits in fp32: sums in another order, through all layers
# a key that rounding moves over the edge of a step of its format moves by a whole step
ALLOWED_PACKED_CACHE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a model says: greedy tokens (batch, OUTPUT), and the logits (batch, OUTPUT, vocabulary)
    of each next token behind the whole model's own text."""

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedCompared:
    """What the ranks answered. planned: against the unsharded model in the plan's formats; lossy:
    against the model as it is, None where the plan loses nothing.

    error: relative L2 of the logits. same_tokens: share of greedy answers that are alike.
    same_choices: share of next tokens behind the same text that are.
    """

    ranks: int
    tokens: int
    error: float
    allowed: float
    same_tokens: float
    alike: bool
    lossy: tuple[str, ...] = ()
    lossy_error: float = 0.0
    lossy_same_tokens: float = 1.0
    lossy_same_choices: float = 1.0
    seed: int = 0

    @property
    def holds(self) -> bool:
        """Greedy answers token for token. With a packed cache rounding may turn a choice: there
        the logits decide alone."""
        exact = self.same_tokens == 1.0 or self.allowed > ALLOWED
        return self.alike and exact and self.error <= self.allowed


def verify_served(world: World, twin: ServingTwin) -> ServedCompared:
    """Serve the twin on its ranks. Raises RankFailure, or what a rank raised."""
    found = world.run(twin.ranks, on_rank, twin.plan, twin.recipe)
    worst = max((one for one, _ in found), key=lambda c: (not c.holds, c.error))
    alike = all(torch.equal(tokens, found[0][1]) for _, tokens in found)
    return replace(worst, ranks=twin.ranks, alike=alike)


def on_rank(rank: int, plan: ServingPlan, recipe: Recipe) -> tuple[ServedCompared, Tensor]:
    """One rank's comparison, and its greedy answers."""
    warnings.simplefilter("ignore")  # torch's and transformers' advice
    logging.getLogger("transformers").setLevel(logging.ERROR)
    s = plan.serving
    kv = Kv.planned(s)
    laid = laid_by(plan)
    for seed in range(MOST_SEEDS):
        real, ids = _drawn(recipe, seed)
        with ties() as close, torch.no_grad():
            whole = answers(real, real.model, ids, Kv(), None)
        if not close.near:
            break
    else:
        raise PlanError("every draw of the twin's weights has near-ties: no answer is the one",
                        hints=("--twin k=v: a larger vocabulary, fewer experts",))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made = serve(copy.deepcopy(real.model), plan, folder=folder, device="cpu")
        boxes = _boxes(made, laid)
        ours = answers(real, made, ids, Kv(), whole.tokens)  # the plan's cache is made's own
        for ring in made.served.loaded.rings:  # type: ignore[union-attr]
            ring.close()
        theirs = whole
        if plan.lossy:
            values = copy.deepcopy(real.model)
            _round(values, laid, boxes)
            theirs = answers(real, values, ids, kv, whole.tokens)
    compared = ServedCompared(
        ranks=1, tokens=whole.tokens.numel(), error=apart(ours.logits, theirs.logits),
        allowed=ALLOWED if kv.word == "bf16" else ALLOWED_PACKED_CACHE,
        same_tokens=_share(ours.tokens, theirs.tokens), alike=True, lossy=plan.lossy,
        lossy_error=apart(ours.logits, whole.logits),
        lossy_same_tokens=_share(ours.tokens, whole.tokens),
        lossy_same_choices=_share(ours.logits.argmax(-1), whole.tokens), seed=seed,
    )  # fmt: skip
    return compared, ours.tokens


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2; what is not finite is apart without end."""
    found = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    return found if found == found else float("inf")


def _share(ours: Tensor, theirs: Tensor) -> float:
    return float((ours == theirs).double().mean())


def _drawn(recipe: Recipe, seed: int) -> tuple[Real, Tensor]:
    """The twin's model with weights of that seed, and prompts (BATCH, PROMPT)."""
    torch.manual_seed(seed)
    real = build(recipe)
    real.model.eval()
    without_dropout(real.model)
    draw_constants(real.model, seed)
    config = getattr(real.model, "generation_config", None)
    if config is not None:  # every answer as long as the other, whatever its tokens
        config.eos_token_id, config.pad_token_id, config.use_cache = None, 0, True
        real.model.config.use_cache = True  # type: ignore[union-attr]
    given = real.inputs(BATCH, PROMPT)
    batch, _ = draw_batch(real.model, given, torch.zeros(1, dtype=torch.long), _no_loss, seed)
    return real, _ids(batch)[0]


def _no_loss(outputs: Any, targets: Any) -> Any:
    raise AssertionError("no loss is taken of a model that is served")


def _ids(batch: Any) -> tuple[Tensor, int]:
    """The tokens of a batch, and which of its leaves they are."""
    for at, leaf in enumerate(pytree.tree_leaves(batch)):
        if isinstance(leaf, Tensor) and leaf.dim() == 2 and leaf.dtype in (torch.int64,
                                                                          torch.int32):  # fmt: skip
            return leaf, at
    raise PlanError("the model takes no tokens (batch, length): it answers no prompt",
                    hints=("inputs(batch, seq_len) in its file says what it takes",))  # fmt: skip


def answers(real: Real, model: nn.Module, ids: Tensor, kv: Kv, text: Tensor | None) -> Answers:
    """Greedy answers, and logits behind a text (None: behind its own answers). kv: of a model that
    has no cache planned for it."""
    say = _generated if hasattr(model, "generate") else _looped
    tokens, logits = say(real, model, ids, kv, None)
    if text is not None and not torch.equal(tokens, text):
        _, logits = say(real, model, ids, kv, text)
    return Answers(tokens=tokens, logits=logits)


def _generated(
    real: Real, model: Any, ids: Tensor, kv: Kv, text: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By the model's own `generate`, through its cache; text: the tokens that it is made to say."""
    kwargs: dict[str, Any] = {}
    if getattr(getattr(model, "generation_config", None), "use_mtp", None):  # no plan drafts
        kwargs["use_mtp"] = False
    if not kv.plain:
        kwargs["past_key_values"] = cache_of(model, kv)
    if kv.block:
        kwargs["attention_mask"] = even_mask(ids, None)
    if text is not None:
        said = text.tolist()
        kwargs["prefix_allowed_tokens_fn"] = lambda row, sent: [said[row][len(sent) - ids.shape[1]]]
    found = model.generate(
        ids, max_new_tokens=OUTPUT, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **kwargs,
    )  # fmt: skip
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1)


def _looped(
    real: Real, model: Callable[..., Any], ids: Tensor, kv: Kv, text: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By calls with all tokens so far, of a model that has no `generate`."""
    logits = []
    for at in range(OUTPUT):
        batch = real.inputs(BATCH, ids.shape[1])
        _, place = _ids(batch)
        leaves, shape = pytree.tree_flatten(batch)
        leaves[place] = ids.to(leaves[place].dtype)
        logits.append(logits_of(call(model, pytree.tree_unflatten(leaves, shape)))[:, -1])
        chosen = logits[-1].argmax(-1) if text is None else text[:, at]
        ids = torch.cat([ids, chosen[:, None].to(ids.dtype)], 1)
    return ids[:, PROMPT:], torch.stack(logits, 1)


# --- what packed weights stand for --------------------------------------------------------------

Held = tuple[tuple[int, ...], tuple[Box, ...]]  # shape of a rank's part, and its boxes of the whole


def _boxes(model: nn.Module, laid: Callable[[str], Laid]) -> dict[str, list[Held]]:
    """Of each packed weight the parts that ranks hold, each of which is packed apart."""
    mine = {name: (tuple(local_of(p).shape), boxes_of(p)) for name, p in model.named_parameters()
            if laid(name).word}  # fmt: skip
    every: list[Any] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
    found: dict[str, list[Held]] = {}
    for one in every:
        for name, held in one.items():
            found.setdefault(name, []).append(held)
    return found


def _round(
    model: nn.Module, laid: Callable[[str], Laid], boxes: Mapping[str, Sequence[Held]]
) -> None:
    """Put in each packed weight's place the values that its bits stand for."""
    for name, p in model.named_parameters():
        word = laid(name).word
        if not word:
            continue
        rounded = p.detach().clone()
        for shape, held in boxes[name]:
            local = torch.empty(shape, dtype=p.dtype)
            for box in held:
                box.of_local(local).copy_(box.of_whole(p.detach()))
            values = pack(local, word).whole()
            for box in held:
                box.of_whole(rounded).copy_(box.of_local(values))
        p.data = rounded
