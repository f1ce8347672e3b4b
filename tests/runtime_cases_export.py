"""What ranks run for tests/test_export.py."""

import importlib.util

import gpt  # examples/, put on the path by the test
import torch


def load(path):
    spec = importlib.util.spec_from_file_location("emitted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data(samples, length):
    ids = torch.randint(256, (samples, length + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def pair():
    torch.manual_seed(0)
    model, reference = gpt.build(size="tiny"), gpt.build(size="tiny")
    reference.load_state_dict(model.state_dict())
    return model, reference


def worst(parameters, reference):
    """The largest relative error of a gradient."""
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    return max(
        float((p.grad.full_tensor() - theirs[n].grad).norm() / theirs[n].grad.norm())
        for n, p in parameters
    )


def torch_alone(rank, path, samples, length, micro_batch):
    """The emitted file's own step, on two data ranks."""
    model, reference = pair()
    ids, targets = data(samples, length)
    theirs = gpt.loss(reference(ids), targets)
    theirs.backward()
    emitted, share = load(path), samples // 2
    mine = slice(rank * share, (rank + 1) * share)
    batches = [
        ({"input_ids": x}, y)
        for x, y in zip(ids[mine].split(micro_batch), targets[mine].split(micro_batch))
    ]
    model = emitted.parallelize(model, "cpu")
    ours = emitted.train_step(model, batches, gpt.loss)
    return float(ours), float(theirs.detach()), worst(model.named_parameters(), reference)


def with_runtime(rank, path, plan, samples, length):
    """The emitted file's `parallelize`, and a step of what it returns."""
    model, reference = pair()
    ids, targets = data(samples, length)
    theirs = gpt.loss(reference(ids), targets)
    theirs.backward()
    parallel = load(path).parallelize(model, plan)
    ours = parallel.step({"input_ids": ids}, targets, gpt.loss)
    return float(ours), float(theirs.detach()), worst(parallel.named_parameters(), reference)
