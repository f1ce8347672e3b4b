"""Folding names into brace ranges, and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import PlanError
from planner.names import (
    MOST_NAMES,
    MOST_NUMBERS,
    expand,
    expand_text,
    fold,
    fold_text,
    matches,
    may_end,
)

LAYERS = [f"layers.{i}" for i in range(80)]


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([f"{p}.self_attn.{x}_proj.weight" for p in LAYERS for x in "qkv"],
         ["layers.{0..79}.self_attn.{q,k,v}_proj.weight"]),
        ([f"{p}.{x}_layernorm.weight" for p in LAYERS for x in ("input", "post_attention")],
         ["layers.{0..79}.{input,post_attention}_layernorm.weight"]),
        (["embed_tokens", *LAYERS[:40]], ["embed_tokens", "layers.{0..39}"]),
        ([*LAYERS[40:], "norm", "lm_head"], ["layers.{40..79}", "norm", "lm_head"]),
        ([f"h.{i}.ln_{k}.{x}" for i in range(3) for k in (1, 2) for x in ("weight", "bias")],
         ["h.{0..2}.ln_{1,2}.{weight,bias}"]),
        ([f"l.{i}.e.{e}.w{k}" for i in range(4) for e in range(8) for k in (1, 2, 3)],
         ["l.{0..3}.e.{0..7}.w{1..3}"]),
        ([f"l.{i}" for i in range(1, 24, 2)], ["l.{1..23..2}"]),
        ([f"l.{i}" for i in (0, 1, 2, 4, 5, 6, 9)], ["l.{0..2,4..6,9}"]),
        ([f"{p}.{x}:in" for p in LAYERS for x in ("self_attn", "mlp")],
         ["layers.{0..79}.{self_attn,mlp}:in"]),
        (["l.0.a", "l.1.a", "l.0.b"], ["l.{0,1}.a", "l.0.b"]),
        (["d.a,b.w"], ["d.a%2C;b.w"]),
        ([], []),
    ],
)  # fmt: skip
def test_fold(names, patterns):
    assert list(fold(names)) == patterns
    assert sorted(n for p in patterns for n in expand(p)) == sorted(names)


WORD = st.text("abq_{},%* :0", min_size=1, max_size=4) | st.sampled_from(
    ["q_proj", "k_proj", "v_proj", "w1", "w2", "w3", "ln_1", "ln_2", "0", "00", "7"]
)
NAME = st.lists(st.integers(0, 12).map(str) | WORD, min_size=1, max_size=4).map(".".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(NAME, max_size=30, unique=True))
def test_fold_covers_each_name_exactly_once(names):
    patterns = fold(names)
    assert sorted(n for p in patterns for n in expand(p)) == sorted(names)
    assert sorted(expand_text(fold_text(names))) == sorted(names)
    for name in names:
        assert [matches(p, name) for p in patterns].count(True) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(NAME, max_size=20, unique=True))
def test_fold_is_a_fixed_point(names):
    once = fold(names)
    assert fold([n for p in once for n in expand(p)]) == once


def test_matches():
    assert matches("layers.*.q.weight", "layers.7.q.weight")
    assert not matches("layers.*.q.weight", "layers.7.k.weight")
    assert not matches("layers.{0..3}", "layers.4")
    assert matches("{a,b}_{1..2}.w", "b_2.w")


@pytest.mark.parametrize("pattern", ["layers.{0..3", "layers.0}", "layers.{3..0}", "l.*.w"])
def test_bad_patterns_are_refused(pattern):
    with pytest.raises(PlanError):
        expand(pattern)


def test_a_range_without_end_is_refused():
    with pytest.raises(PlanError, match="more numbers"):
        expand("layers.{0..999999999}")


@pytest.mark.parametrize(
    "pattern",
    [
        "m" + ".{a,b,c,d,e,f,g,h}" * 30,
        "{0..9}" * 30,
        "l.{" + ",".join(["0..99999"] * 200) + "}",
        "l.{0..99999}.{0..8}, k.{0..99999}.{0..8}",
    ],
)
def test_names_are_counted_before_they_are_made(pattern):
    with pytest.raises(PlanError, match=f"more than ({MOST_NAMES:,}|{MOST_NUMBERS:,}) names"):
        expand_text(pattern)
    with pytest.raises(PlanError, match="more numbers"):
        expand("l.{0.." + "9" * 5000 + "}")


def test_many_segments_are_split_once():
    assert expand("a." * 50_000 + "{b.c,d}") == ("a." * 50_000 + "b.c", "a." * 50_000 + "d")


@pytest.mark.parametrize("pattern, name, may", [
    ("layers.{0..3}.mlp.w1", "mlp.w1", True), ("layers.*.mlp.{w1,w2}", "w2", True),
    ("layers.*.mlp.w1", "mlp.w2", False), ("mlp.w1", "layers.0.mlp.w1", True),
    ("w1", "mlp.w2", False),
])  # fmt: skip
def test_what_may_end_a_name_is_told_without_the_names(pattern, name, may):
    """Never no where some name that ends so is meant."""
    assert may_end(pattern, name) is may
    assert may or not any(matches(pattern, f"{path}{name}") for path in ("", "layers.0.", "a.b."))
