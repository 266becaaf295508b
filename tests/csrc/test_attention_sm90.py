"""The attention for Hopper on the emulated machine of tests/cuda_host/hopper/machine.h, not on hardware."""

import ctypes
import itertools
import random

import pytest
import torch

from tests.helpers import hopper_machine as machine

pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing()))

TANGENTS = {
    "none": (),
    "query": ("q_dot",),
    "all": ("q_dot", "k_dot", "v_dot"),
    "key": ("k_dot",),
    "value": ("v_dot",),
    "query and value": ("q_dot", "v_dot"),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return machine.build(tmp_path_factory.mktemp("hopper"))


def draw(batch=1, heads=1, queries=40, keys=None, width=64, value_width=None, kv_heads=None, tangents="all",
         tangent_rows=None, offset=0.0, size=1.0, positions_first=True,
         seed=0):  # fmt: skip
    """Arguments of machine.attention. `offset` and `size` are of keys, the offset of values too."""
    generator = torch.Generator().manual_seed(seed)
    keys, value_width, kv_heads = keys or queries, value_width or width, kv_heads or heads

    def normal(rows, heads, length, width, offset=0.0, size=1.0):
        shape = (rows, length, heads, width) if positions_first else (rows, heads, length, width)
        x = (torch.randn(shape, generator=generator) * size + offset).bfloat16()
        return x.transpose(1, 2) if positions_first else x

    rows = batch if tangent_rows is None else tangent_rows
    arguments = {
        "q": normal(batch, heads, queries, width),
        "k": normal(batch, kv_heads, keys, width, offset, size),
        "v": normal(batch, kv_heads, keys, value_width, offset),
    }
    made = {
        "q_dot": normal(rows, heads, queries, width),
        "k_dot": normal(rows, kv_heads, keys, width),
        "v_dot": normal(rows, kv_heads, keys, value_width),
    }
    return arguments | {name: made[name] for name in TANGENTS[tangents]}


CASES = {
    "276, width 64": {"heads": 2, "queries": 276},
    "276, width 72": {"queries": 276, "width": 72},
    "276, width 128, one query": {"queries": 1, "keys": 276, "width": 128},
    **{f"width {d}": {"queries": 70, "keys": 101, "width": d} for d in (8, 40, 72, 80, 88, 96, 104, 128)},
    **{
        f"width {d}, tangents of query": {"keys": 100, "width": d, "tangents": "query"} for d in (72, 96, 128)
    },
    **{f"tangents of {name}": {"heads": 2, "queries": 65, "tangents": name} for name in TANGENTS},
    "tangents of the last sample": {"batch": 3, "queries": 30, "keys": 97, "tangent_rows": 1},
    "one key": {"queries": 3, "keys": 1},
    "whole tiles": {"queries": 128, "keys": 192},
    "odd units and heads": {"heads": 3, "queries": 150, "keys": 20},
    "offset 2": {"queries": 65, "keys": 200, "offset": 2.0},
    "offset 4": {"queries": 65, "keys": 200, "offset": 4.0},
    "offset 4, width 72": {"queries": 65, "keys": 200, "width": 72, "offset": 4.0},
    "offset 4, tangents of query": {"queries": 65, "keys": 200, "offset": 4.0, "tangents": "query"},
    "large logits": {"keys": 200, "size": 300.0},
    "other value width": {"keys": 30, "width": 24, "value_width": 80},
    "fewer heads of keys": {"batch": 2, "heads": 6, "kv_heads": 2, "queries": 9, "keys": 7},
    "heads first": {"batch": 2, "heads": 2, "queries": 19, "positions_first": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_rule(library, case):
    machine.check(library, draw(**case), processors=3)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scale(library, scale):
    machine.check(library, draw(keys=101), scale=scale)


def test_timing_changes_nothing(library):
    """Whatever the order in which warps run and copies and products finish, and the number of processors."""
    arguments = draw(heads=3, queries=70, keys=200, batch=2, width=128)
    first, *others = (
        machine.attention(library, **arguments, processors=p, seed=s)
        for p, s in ((1, 0), (2, 1), (5, 2), (9, 3))
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_primal_is_the_same_without_tangents(library):
    arguments = draw(heads=2, queries=100, keys=200)
    primals = {name: arguments[name] for name in "qkv"}
    alone, nothing, lse = machine.attention(library, **primals)
    assert nothing is None
    for names in (("q_dot",), ("q_dot", "k_dot", "v_dot")):
        out, _, out_lse = machine.attention(library, **primals, **{n: arguments[n] for n in names})
        assert torch.equal(out, alone) and torch.equal(out_lse, lse)


def test_zero_tangent_gives_zero(library):
    arguments = draw(queries=70, keys=101, offset=4.0)
    for name in TANGENTS["all"]:
        arguments[name].zero_()
    _, out_dot, _ = machine.attention(library, **arguments)
    assert not out_dot.any()


def test_key_without_weight_has_no_part(library):
    arguments = draw(queries=20, keys=200)
    arguments["q"][..., 0] = arguments["q"][..., 0].abs() + 4
    arguments["k"][:, :, 150, 0] = -3e4
    arguments["k_dot"][:, :, 150] = 1e30
    arguments["v"][:, :, 150] = 1e30
    machine.check(library, arguments)


def test_rows_that_are_not_finite(library):
    arguments = draw(heads=2, queries=70, keys=101)
    arguments["q"][0, 0, 3] = torch.nan
    arguments["q"][0, 0, 68, 0] = torch.inf
    arguments["k"][0, 1, 100] = torch.nan
    out, out_dot, lse = machine.attention(library, **arguments)
    for x in (out.isfinite().all(-1), out_dot.isfinite().all(-1), lse.isfinite()):
        assert (~x[0, 0]).nonzero().flatten().tolist() == [3, 68] and not x[0, 1].any()


@pytest.mark.parametrize("units", range(1, 7))
def test_each_unit_is_computed_once(library, units):
    numbers = (ctypes.c_int * 4)()
    for heads in range(1, 8):
        found = []
        for i in range(library.item(-1, heads, units, numbers)):
            together = library.item(i, heads, units, numbers)
            sides = [(numbers[0], numbers[1]), (numbers[2], numbers[3])]
            assert bool(together) == (sides[0][0] == sides[1][0])
            found += sides
        beyond = [side for side in found if side[1] >= units]
        assert len(beyond) == heads * units % 2
        assert sorted(set(found) - set(beyond)) == list(itertools.product(range(heads), range(units)))
        assert len(found) == heads * units + len(beyond)


@pytest.mark.slow
def test_random_shapes(library):
    rng = random.Random(0)
    for seed in range(300):
        heads = rng.randint(1, 4)
        machine.check(
            library,
            draw(
                batch=(batch := rng.randint(1, 2)), heads=heads, queries=rng.randint(1, 300),
                kv_heads=rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
                keys=rng.randint(1, 300), width=8 * rng.randint(1, 16), value_width=8 * rng.randint(1, 16),
                tangents=rng.choice(list(TANGENTS)), tangent_rows=rng.randint(1, batch), seed=seed,
                offset=rng.choice([0.0, 4.0]), positions_first=rng.random() < 0.5,
            ),
            processors=rng.randint(1, 4),
            seed=seed,
        )  # fmt: skip
