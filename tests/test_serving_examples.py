"""The claims of examples/serving/README.md: every command runs, and says what the page says.

`--update-golden` writes anew what comes out; the verdicts are then to be read again.
"""

import re

import pytest
from tiny_models import EXAMPLES

PAGE = EXAMPLES / "serving" / "README.md"
BLOCK = re.compile(r"```\n\$ plan (.*?[^\\])\n(.*?)```", re.S)
KEPT = ("  division", "  blocks", "  lossy", "  cache", "first token", "  gpu ", "  cpu ",
        "  nvme ", "  binds", "hardware ", "a6000x", "error:")  # fmt: skip


def abridged(text):
    """The lines of an output that the page has, with those that go on from them."""
    kept, going = [], False
    for line in text.splitlines():
        if line.startswith(" " * 12):
            going = going and not kept[-1].startswith(("  gpu", "  cpu", "  nvme"))
        else:
            going = line.startswith(KEPT)
        if going and " served on " not in line:
            kept.append(f"{line}\n")
    return "".join(kept)


@pytest.fixture
def said(plan, tmp_path, update_golden):
    """What every command of the page says, in its order, after the page was compared with it."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    text, found = PAGE.read_text(), []
    for command, _ in BLOCK.findall(text):
        code, out, err = plan(*command.replace("\\\n", " ").split())
        assert code == 0 or err.startswith("error:"), err
        found.append(abridged(out if code == 0 else err))
    rest = iter(found)
    update_golden(PAGE, BLOCK.sub(lambda m: f"```\n$ plan {m[1]}\n{next(rest)}```", text))
    return found


def seconds(text):
    """(TTFT, TPOT) of a plan's line."""
    units = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    found = re.search(r"first token ([\d.]+) (\w+), then one every ([\d.]+) (\w+):", text)
    return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]


def gigabytes(text, tier):
    return float(re.search(rf"^  {tier} +([\d.]+) GB", text, re.M)[1])


def test_the_page_says_what_comes_out_and_its_verdicts_hold(said):
    assert max(map(len, PAGE.read_text().splitlines())) <= 100
    two_nodes, one_node, with_host, dense, ram, nvme, moe, llama, whole, *lossy = said
    (window, means, fetched), sizes = lossy[:3], lossy[3:]
    # 1T parameters in int4: on two nodes of four, or one and its host
    assert seconds(two_nodes)[1] < 0.02 and gigabytes(two_nodes, "gpu") < 76.5
    assert "does not fit a100x4" in one_node
    assert 4 < seconds(with_host)[1] / seconds(two_nodes)[1] < 5
    assert gigabytes(with_host, "cpu") > 50
    # 700B dense: it runs, seconds a token, a first after 25; no faster than a GPU's link and its
    # host's CPU read it
    assert 3 < seconds(dense)[1] < 10 and 24.5 < seconds(dense)[0] < 25.5
    # 1.3T: below a second a token from RAM and from NVMe, the first after a third of a minute, or
    # over a minute
    assert seconds(ram)[1] < seconds(nvme)[1] < 1 and 20 < seconds(ram)[0] < 60 < seconds(nvme)[0]
    # one expert a GPU is no quicker than a dense model over the same GPUs
    assert seconds(llama)[1] < seconds(moe)[1]
    # a window's cache is that of 3K; weights, which it leaves alone, are most of the memory
    per_token = [float(re.search(r"cache +([\d.]+) kB", text)[1])
                 for text in (whole, window, means, fetched)]  # fmt: skip
    for size in per_token[1:3]:
        assert size * 16384 == pytest.approx(per_token[0] * 3072, rel=0.01)
    here = float(re.search(r"([\d.]+) kB of it on the GPU", fetched)[1])
    assert here < per_token[2] and gigabytes(fetched, "cpu") > 2
    assert 0.96 < seconds(fetched)[1] / seconds(whole)[1] < 0.98
    assert seconds(means)[1] < seconds(whole)[1] and seconds(means)[0] >= seconds(whole)[0]
    for text in (window, means, fetched):
        assert gigabytes(text, "gpu") > 0.9 * gigabytes(whole, "gpu")
    # fewest GPUs that answer within a second a token: one technique, and two together
    least = [int(re.search(r"^a6000x(\d+)", text, re.M)[1]) for text in sizes]
    assert least == [32, 16, 8, 4]


@pytest.mark.parametrize("claim", ["1T-parameter", "700B dense"])
def test_what_our_own_runtime_would_take_is_said(plan, tmp_path, claim):
    """The page's last command of a claim in int4, for planner.serve: its prose has the figure."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    section = next(s for s in PAGE.read_text().split("\n## ") if claim in s.partition("\n")[0])
    *_, (command, _) = BLOCK.findall(section)
    assert "--engine llamacpp" in command
    code, out, err = plan(*command.replace("\\\n", " ").replace("llamacpp", "native").split())
    assert code == 0, err
    each = re.search(r"then one every ([\d.]+ \w+):", out)[1]
    assert f"`planner.serve` would take {each} a token" in " ".join(section.split())


@pytest.mark.parametrize("found", [0, 1])
def test_what_our_own_runtime_needs_is_said(plan, tmp_path, found):
    """The two sizes in int4, with weights on the GPU alone and with both."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    text = PAGE.read_text()
    command, _ = [c for c in BLOCK.findall(text) if c[0].startswith("size")][2 + found]
    code, out, err = plan(*command.replace("\\\n", " ").replace("llamacpp", "native").split())
    assert code == 0, err
    gpus, each = re.search(r"^a6000x(\d+) .*? s +([\d.]+ ms)", out, re.M).groups()
    way = ("with int4", "with both")[found]
    assert re.search(f"{gpus} {way}, at {each}", " ".join(text.split()))
