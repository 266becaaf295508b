"""The network: its size and names, its start, its forms of calling, and what wrong calls get."""

import csv
import math

import pytest
import torch

import imf_kernels as ik
from benchmarks.baselines import plain_imf
from imf.model.config import PRESETS, IMFConfig, patch_size_for
from imf.networks import build
from imf.official.names import from_official
from imf_kernels import Dual
from tests.helpers import golden_imf

FILES = {"iMF-B/2": "imf_B_2", "iMF-XL/2": "imf_XL_2"}
TINY = IMFConfig(4, 2, 3, 32, 3, 2, 1, 8 / 3, 5)


@pytest.mark.parametrize(
    ("preset", "sampling", "training"),
    [
        ("iMF-B/2", 88_948_256, 145_596_960),
        ("iMF-M/2", 173_921_312, 230_570_016),
        ("iMF-L/2", 409_071_648, 509_752_352),
        ("iMF-XL/2", 610_433_056, 711_113_760),
    ],
)
def test_parameter_counts_of_the_presets(preset, sampling, training):
    with torch.device("meta"):
        counts = {name: p.numel() for name, p in build(preset).named_parameters()}
    assert sum(counts.values()) == training
    # The official weights for sampling lack the v-head's blocks, but keep its final layer.
    assert sum(n for name, n in counts.items() if not name.startswith("v_blocks.")) == sampling


@pytest.mark.parametrize("preset", FILES)
def test_official_weights_fit(preset):
    """Names and shapes of the official checkpoint, converted, are exactly the network's."""
    with open(golden_imf.GOLDEN / f"{FILES[preset]}_parameters.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    official = {r["name"]: torch.empty(*map(int, r["shape"].split("x")), device="meta") for r in rows}
    converted = from_official(official)
    with torch.device("meta"):
        expected = build(preset).state_dict()
    assert {n: x.shape for n, x in converted.items()} == {n: x.shape for n, x in expected.items()}


@pytest.mark.parametrize(
    ("size", "patch"), [(8, 1), (16, 2), (28, 4), (32, 4), (48, 6), (64, 8), (37, 37), (1, 1)]
)
def test_patches_are_as_small_as_their_number_allows(size, patch):
    assert patch_size_for(size, 64) == patch and size % patch == 0 and (size // patch) ** 2 <= 64


def test_initial_weights():
    torch.manual_seed(0)
    model = build(IMFConfig(input_size=32, hidden_size=384, depth=3, num_heads=6, aux_head_depth=1))
    block = model.shared_blocks[0]

    def std(x):
        return float(x.detach().std())

    assert std(block.qkv) == pytest.approx(0.32 / math.sqrt(384), rel=0.02)
    assert std(block.down) == pytest.approx(0.32 / math.sqrt(1024), rel=0.02)
    assert std(model.h_embedder.first.weight) == pytest.approx(1 / 16, rel=0.02)
    assert std(model.h_embedder.last.weight) == pytest.approx(384**-0.5, rel=0.02)
    assert std(model.y_embedder.weight) == pytest.approx(384**-0.5, rel=0.02)
    assert std(model.class_tokens) == pytest.approx(384**-0.5, rel=0.1)
    bound = math.sqrt(6 / (16 + 384))
    assert float(model.x_embedder.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    zeros = [block.attn_scale, block.mlp_scale, model.u_final.linear.weight, model.v_final.linear.weight]
    assert all(not x.any() for x in zeros)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert bool((block.norm1 == 1).all()) and bool((block.q_norm == 1).all())


def inputs(batch: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    scalars = [
        torch.rand(batch),
        torch.rand(batch),
        1 + 7 * torch.rand(batch),
        torch.rand(batch) / 2,
        0.5 + torch.rand(batch) / 2,
    ]
    return [torch.randn(batch, 3, 4, 4), *scalars, torch.randint(0, 6, (batch,))]


def perturbed(backend: str | None = None):
    torch.manual_seed(0)
    oracle = plain_imf.PlainIMF(4, 2, 3, 32, 3, 2, 1, 8 / 3, 5)
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model = build(TINY)
    model.load_state_dict(from_official(oracle.state_dict()))
    model.forward = ik.use_backend(backend)(model.forward)
    return model, oracle


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("tangent_rows", [0, 1, 3])
def test_tangent_equals_torch_func_jvp(backend, tangent_rows):
    model, oracle = perturbed(backend)
    z, t, h, *rest = inputs()
    z_dot, h_dot = torch.randn_like(z), torch.randn_like(h)
    z_dot[: 3 - tangent_rows], h_dot[: 3 - tangent_rows] = 0, 0

    expected, expected_dot = torch.func.jvp(
        lambda z, h: oracle(z, t, h, *rest, heads="u"), (z, h), (z_dot, h_dot)
    )
    u, v = model(Dual(z, z_dot[3 - tangent_rows :]), t, Dual(h, h_dot[3 - tangent_rows :]), *rest, heads="uv")
    assert isinstance(u, Dual) and isinstance(v, torch.Tensor)
    torch.testing.assert_close(u.primal, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(u.tangent.detach(), expected_dot, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(z, t, h, *rest, heads="u"), u.primal)  # bitwise: a tangent changes nothing
    assert torch.equal(model(z, t, h, *rest, heads="v"), v)


def test_bf16_operands_keep_an_fp32_stream():
    model, _ = perturbed()
    exact = model(*inputs(), heads="uv")
    model.compute_dtype = torch.bfloat16
    rounded = model(*inputs(), heads="uv")
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        error = float(((a - b).norm() / a.norm()).detach())
        assert 1e-5 < error < 2e-2, error


def test_differentiating_the_tangent_raises():
    model, _ = perturbed()
    z, t, h, *rest = inputs()
    u = model(Dual(z, torch.ones_like(z)), t, Dual(h, torch.ones_like(h)), *rest, heads="u")
    with pytest.raises(RuntimeError, match=r"no gradient flows through tangents.*\.detach\(\)"):
        u.tangent.sum().backward()
    u.primal.sum().backward()


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 3, 4, 5), r"z must be \[B, 3, 4, 4\], got \[3, 3, 4, 5\]"),
        (0, torch.zeros(3, 3, 4, 4, dtype=torch.float64), "z must be torch.float32 like the weights"),
        (2, torch.zeros(2), r"h must be \[3\], one a sample, got \[2\]"),
        (3, torch.ones(3, 1), r"omega must be \[3\], one a sample, got \[3, 1\]"),
        (6, torch.tensor([0, 1, 6]), r"labels must be within 0 and 5 \(the null label\), got 0 to 6"),
        (6, torch.tensor([0, -1, 5]), "got -1 to 5"),
        (6, torch.zeros(3), r"y must be \[3\] in int64 or int32, got \[3\] in torch.float32"),
        (
            6,
            torch.zeros(3, dtype=torch.uint8),
            r"y must be \[3\] in int64 or int32, got \[3\] in torch.uint8",
        ),
        (6, torch.zeros(3, dtype=torch.int64, device="meta"), "y must be on cpu like the weights, got meta"),
        (6, [0, 1, 2], "y must be a tensor, got list"),
        (2, torch.zeros(3, device="meta"), "h must be on cpu like the weights, got meta"),
        (0, torch.zeros(3, 3, 4, 4).numpy(), "z must be a tensor, got ndarray"),
        (3, 1.0, "omega must be a tensor, got float"),
        (3, Dual(torch.ones(3)), "omega carries no tangent; pass a tensor, got a Dual"),
        (3, torch.tensor([1.0, 0, 2]), "omega must be positive, got 0.0"),
        (3, torch.tensor([1.0, math.nan, 2]), "omega must be positive, got nan"),
    ],
)
def test_wrong_inputs_are_refused(position, value, message):
    arguments = inputs()
    arguments[position] = value
    with pytest.raises((ValueError, TypeError), match=message):
        build(TINY)(*arguments)


@pytest.mark.parametrize("assign", [False, True])
def test_a_network_made_without_memory_gets_its_values_from_weights_alone(assign):
    expected, _ = perturbed()
    with torch.device("meta"):
        model = build(TINY)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict(), assign=assign)
    for got, wanted in zip(model(*inputs(), heads="uv"), expected(*inputs(), heads="uv"), strict=True):
        assert torch.equal(got, wanted)


def test_a_network_made_or_first_called_in_inference_mode_can_be_trained():
    made = perturbed()[0]
    with torch.inference_mode():
        made(*inputs())
        tables = build(TINY)._rope
    assert not any(table.is_inference() for table in tables)
    made(*inputs(), heads="u").sum().backward()


def test_a_network_moves_its_tables_between_devices():
    model, _ = perturbed("reference")
    before = model(*inputs(), heads="u")
    weights = model.state_dict()
    model.to("meta")
    assert model(*(x.to("meta") for x in inputs()), heads="u").device.type == "meta"
    model.to_empty(device="cpu").load_state_dict(weights)
    assert torch.equal(model(*inputs(), heads="u"), before)


def test_wrong_heads_and_configurations_are_refused():
    with pytest.raises(ValueError, match="heads must be 'u', 'v' or 'uv', got 'w'"):
        build(TINY)(*inputs(), heads="w")
    with pytest.raises(ValueError, match="no preset 'iMF-S/2'; there are iMF-B/2"):
        build("iMF-S/2")
    with pytest.raises(ValueError, match="input_size must be a multiple of patch_size 2, got 7"):
        IMFConfig(input_size=7)
    with pytest.raises(ValueError, match="hidden_size must be a multiple of twice num_heads 12"):
        IMFConfig(hidden_size=780, num_heads=12)
    with pytest.raises(ValueError, match="aux_head_depth must be an integer within 0 and depth 4, got 8"):
        IMFConfig(depth=4)
    with pytest.raises(ValueError, match="num_classes must be a positive integer, got 0"):
        IMFConfig(num_classes=0)
    with pytest.raises(ValueError, match="depth must be a positive integer, got True"):
        IMFConfig(depth=True, aux_head_depth=0)
    with pytest.raises(
        ValueError, match=r"aux_head_depth must be an integer within 0 and depth 12, got 1\.5"
    ):
        IMFConfig(aux_head_depth=1.5)
    for ratio in ("4", float("inf"), float("nan"), 0.0, -1.0, 1e-9):
        with pytest.raises(ValueError, match="mlp_ratio must be a number of at least 1 / hidden_size, got"):
            IMFConfig(mlp_ratio=ratio)


def test_one_network_in_ten_lines():
    """What the README shows."""
    model = build(TINY)
    z, t, h, *conditions = inputs()
    u = model(Dual(z, torch.randn_like(z)), t, Dual(h, torch.ones_like(h)), *conditions, heads="u")
    assert u.primal.shape == u.tangent.shape == z.shape
    assert isinstance(ik.silu(z), torch.Tensor)


def test_presets_are_the_published_ones():
    b, xl = PRESETS["iMF-B/2"], PRESETS["iMF-XL/2"]
    assert (b.tokens, b.mlp_width, xl.tokens, xl.mlp_width) == (276, 2048, 276, 2730)


def test_fp64_network_equals_the_plain_one():
    model, oracle = perturbed()
    z, *scalars, y = (x.double() if x.is_floating_point() else x for x in inputs())
    u, v = model.double()(z, *scalars, y, heads="uv")
    expected_u, expected_v = oracle.double()(z, *scalars, y, heads="uv")
    # The rotary tables are fp32.
    torch.testing.assert_close(u, expected_u, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(v, expected_v, rtol=1e-6, atol=1e-7)
