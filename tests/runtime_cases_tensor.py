"""Worker functions of test_runtime_tensor: what each rank of a local world runs."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from planner.plan import Plan
from planner.runtime import random
from planner.runtime.context import Context, Report
from planner.runtime.fallback import Whole
from planner.runtime.loss import parallel_loss
from planner.runtime.meshes import make_meshes
from planner.runtime.parallelize import parallelize
from planner.runtime.parts import boxes_of, local_of


def example(name: str) -> Any:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the compiler looks functions up there
    spec.loader.exec_module(module)
    return module


class Collectives(TorchDispatchMode):
    """Counts collectives by name, those of parameters over data ranks (c10d) apart."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if space in ("_c10d_functional", "c10d") and name != "wait_tensor":
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def own_part(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a sharded tensor, and the same part of the whole one."""
    boxes = boxes_of(x)
    if not boxes:
        return torch.zeros(()), torch.zeros(())
    mine = [box.of_local(local_of(x)).flatten() for box in boxes]
    return torch.cat(mine), torch.cat([box.of_whole(reference).flatten() for box in boxes])


def run_beside(model: nn.Module, plan: Plan, batch: Any, targets: Any, loss_fn: Any) -> dict:
    """One step of the model under the plan, and of the model as it is on the same samples."""
    single = copy.deepcopy(model)
    expected = 0.0
    d = plan.decisions
    for rank in range(d.dp):
        for micro in range(d.microbatches):
            at = (rank * d.microbatches + micro) * d.micro_batch
            rows = slice(at, at + d.micro_batch)
            one = {k: v[rows] for k, v in batch.items()}
            out = single(**one)
            loss = loss_fn(out, targets[rows]) if loss_fn else out.loss
            loss = loss / (d.dp * d.microbatches)
            loss.backward()
            expected += float(loss.detach())
    parallel = parallelize(model, plan)
    own = loss_fn
    if loss_fn is None:
        inner = parallel.modules[0].forward
        parallel.modules[0].forward = lambda **kw: inner(**kw).loss
    with Collectives() as comm:
        loss = parallel.step(batch, targets, own)
    gradients = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    worst, where = 0.0, ""
    for name, p in parallel.named_parameters():
        if name not in gradients:
            continue
        assert p.grad is not None, name
        assert p.grad.placements == p.placements, (name, p.grad.placements, p.placements)
        mine, theirs = own_part(p.grad, gradients[name])
        far = float((mine - theirs).norm() / gradients[name].norm())
        # a bias of keys has no gradient but noise
        if gradients[name].norm() > 1e-6 and far > worst:
            worst, where = far, name
    return {
        "loss": abs(float(loss) - expected) / abs(expected),
        "gradient": worst,
        "where": where,
        "replicated": dict(parallel.report.replicated),
        "loose": list(parallel.report.loose_edges),
        "collectives": dict(comm.found),
        "found": float(loss),
    }


def tokens(plan: Plan, most: int = 200, seed: int = 1) -> Tensor:
    w, g = plan.workload, torch.Generator().manual_seed(seed)
    return torch.randint(0, most, (w.global_batch, w.seq_len), generator=g)


def run_example(rank: int, name: str, build: dict, plan: Plan) -> dict:
    module = example(name)
    torch.manual_seed(0)
    model = module.build(**build)
    if name != "dit":
        return run_beside(
            model, plan, {"input_ids": tokens(plan)}, tokens(plan, seed=2), module.loss
        )
    g, count = torch.Generator().manual_seed(1), plan.workload.global_batch
    batch = {
        "latents": torch.randn(count, 4, 32, 32, generator=g),
        "timesteps": torch.randint(0, 1000, (count,), generator=g),
        "labels": torch.randint(0, 1000, (count,), generator=g),
    }
    noise = torch.randn(count, 4, 32, 32, generator=g)
    return run_beside(model, plan, batch, noise, module.loss)


def run_llama(rank: int, shape: tuple[int, ...], plan: Plan) -> dict:
    """A Llama of another shape than the sizes that the example knows."""
    module = example("llama")
    torch.manual_seed(0)
    model = module.Llama(*shape)
    return run_beside(model, plan, {"input_ids": tokens(plan)}, tokens(plan, seed=2), module.loss)


def run_huggingface(rank: int, config: dict, plan: Plan) -> dict:
    """A model that takes its own loss, with labels that do not count."""
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    ids = tokens(plan)
    labels = ids.clone()
    labels[:, 3:9] = -100
    return run_beside(model, plan, {"input_ids": ids, "labels": labels}, ids, None)


def context_of(plan: Plan) -> Context:
    return Context(plan=plan, meshes=make_meshes(plan.decisions, "cpu"), report=Report())


def losses(rank: int, plan: Plan) -> list[tuple[float, float, float]]:
    """F.cross_entropy of logits in every layout and option: (loss, gradient, is it plain)."""
    context = context_of(plan)
    mesh, g = context.meshes.tp, torch.Generator().manual_seed(1)
    logits = torch.randn(24, 32, generator=g)
    target = torch.randint(0, 32, (24,), generator=g)
    target[3:11] = -100
    weight = torch.rand(32, generator=g)
    found = []
    for options in (
        {}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"weight": weight}, {"ignore_index": 5},
    ):  # fmt: skip
        asked = {"ignore_index": -100, **options}
        labels = target.where(target >= 0, 7) if asked["ignore_index"] == 5 else target
        one = logits.clone().requires_grad_()
        expected = F.cross_entropy(one, labels, **asked)
        expected.backward()
        assert one.grad is not None
        for at in (Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=3)):
            laid = distribute_tensor(logits, mesh, (at,)).requires_grad_()
            with parallel_loss(context):
                loss = F.cross_entropy(laid, labels, **asked)
            plain = not isinstance(loss, DTensor)
            loss.backward()
            mine, theirs = own_part(laid.grad, one.grad)
            far = float((mine - theirs).norm() / one.grad.norm())
            found.append((abs(float(loss) / float(expected) - 1), far, plain))
    return found


def of_probabilities(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(logits, -1), target)


def shared_mean(rank: int, plan: Plan, taken: str) -> tuple[float, float]:
    """The mean loss over data ranks whose numbers of counted targets differ, and its gradient."""
    of = {"cross_entropy": F.cross_entropy, "nll_loss": of_probabilities}[taken]
    context = context_of(plan)
    g = torch.Generator().manual_seed(1)
    logits, target = torch.randn(8, 16, generator=g), torch.randint(0, 16, (8,), generator=g)
    target[:3] = -100
    whole = logits.clone().requires_grad_()
    expected = of(whole, target)
    expected.backward()
    rows = slice(4 * rank, 4 * rank + 4)
    mine = logits[rows].clone().requires_grad_()
    with parallel_loss(context):
        loss = of(mine, target[rows])
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return (
        abs(float(total / 2 - expected.detach())),
        float((mine.grad / 2 - whole.grad[rows]).norm()),
    )


def masks(rank: int, plan: Plan) -> dict:
    """What dropout drops of values in each layout, drawn again after the generator went back."""
    torch.manual_seed(rank)  # ranks out of step, as a job that seeds by rank has them
    context = context_of(plan)
    random.in_step(context.meshes)
    mesh = context.meshes.tp
    found: dict = {}
    for name, at in (("whole", Replicate()), ("split", Shard(0))):
        x = DTensor.from_local(torch.ones(64, 64), mesh, (at,), run_check=False)
        state = torch.get_rng_state()
        with Whole(context, "unit"):
            one, two = F.dropout(x, 0.25), F.dropout(x, 0.25)
            torch.set_rng_state(state)
            again = F.dropout(x, 0.25)
        assert one.placements == (at,)
        found[name] = one.to_local().tolist()
        found[f"{name} repeats"] = torch.equal(one.to_local(), again.to_local())
        found[f"{name} differs"] = not torch.equal(one.to_local(), two.to_local())
    q = DTensor.from_local(torch.ones(1, 2, 8, 4), mesh, (Shard(1),), run_check=False)
    with Whole(context, "unit"):
        found["attention"] = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).to_local()
    return found


def odd_operations(rank: int, plan: Plan) -> dict:
    """Operations that DTensor does not do, or does wrong, each compared with one process."""
    context = context_of(plan)
    mesh, g = context.meshes.tp, torch.Generator().manual_seed(1)
    image, kernel = torch.randn(2, 4, 6, 6, generator=g), torch.randn(8, 4, 3, 3, generator=g)
    x = torch.randn(4, 6, 8, generator=g)

    def laid(value: Tensor, at: Any) -> Tensor:
        return distribute_tensor(value, mesh, (at,))

    def partial(value: Tensor) -> DTensor:
        return DTensor.from_local(value / mesh.size(), mesh, (Partial(),), run_check=False)

    def fill(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, torch.arange(6) % 2 == 0] = 3.0
        return value

    cases = {
        "conv": (lambda k: F.conv2d(image, k), kernel, Shard(0)),
        "mask": (lambda v: v[torch.arange(32).view(4, 8) % 3 == 0], x[:, 0], Shard(0)),
        "unfold": (lambda v: v.unfold(1, 2, 2), x, Shard(1)),
        "view": (lambda v: v.view(4, 2, 3, 8), x, Shard(1)),
        "fill": (fill, x, Shard(0)),
        "constant": (lambda v: v * torch.arange(8) + 1, x, Shard(2)),
        "norm": (lambda v: F.group_norm(v, 3), x, Shard(1)),
    }
    found = {}
    for name, (function, value, at) in cases.items():
        single = value.clone().requires_grad_()
        expected = function(single)
        expected.square().sum().backward()
        many = laid(value, at).requires_grad_()
        with Whole(context, "unit"):
            got = function(many)
            got.square().sum().backward()
        found[name] = bool(
            torch.allclose(got.full_tensor(), expected, atol=1e-5)
            and torch.allclose(many.grad.full_tensor(), single.grad, atol=1e-4)
        )
    with Whole(context, "unit"):
        number = partial(torch.tensor(4.0))
        found["numbers"] = (number.item(), float(number), bool(number > 3.9), int(number))
    found["replicated"] = dict(context.report.replicated)
    return found


def dropped(rank: int, plan: Plan) -> tuple[float, list[Tensor]]:
    """A step of GPT with dropout: the loss, and this rank's parts of the gradients."""
    module = example("gpt")
    torch.manual_seed(0)
    model = module.build(size="tiny", dropout=0.2)
    parallel = parallelize(model, plan)
    torch.manual_seed(5)
    loss = parallel.step({"input_ids": tokens(plan)}, tokens(plan, seed=2), module.loss)
    return float(loss), [local_of(p.grad).clone() for p in parallel.parameters()]


def compiled(rank: int, name: str, plan: Plan) -> dict:
    module = example(name)
    torch.manual_seed(0)
    model, single = module.build(size="tiny"), module.build(size="tiny")
    single.load_state_dict(model.state_dict())
    expected = module.loss(single(tokens(plan)), tokens(plan, seed=2))
    expected.backward()
    parallel = parallelize(model, plan, compile_backend="aot_eager")
    loss = parallel.step({"input_ids": tokens(plan)}, tokens(plan, seed=2), module.loss)
    worst, wanted = 0.0, {n: p.grad for n, p in single.named_parameters()}
    for key, p in parallel.named_parameters():
        mine, theirs = own_part(p.grad, wanted[key])
        worst = max(worst, float((mine - theirs).norm() / wanted[key].norm()))
    return {
        "loss": abs(float(loss) / float(expected.detach()) - 1), "gradient": worst,
        "uncompiled": dict(parallel.report.uncompiled),
    }  # fmt: skip
