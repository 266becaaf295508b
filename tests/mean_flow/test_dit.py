"""The network of original Mean Flows and those between it and iMF: sizes, values, derivatives."""

import dataclasses
import functools
import re

import pytest
import torch

import imf_kernels as ik
from imf.mean_flow.methods import METHODS, network_of
from imf.mean_flow.network import DiT
from imf.model.config import ORIGINAL, PRESETS, IMFConfig
from imf.model.imf import IMF
from imf.networks import build
from imf_kernels import Dual
from tests.helpers import plain_mf
from tests.helpers.tiny_run import perturbed

TINY = IMFConfig(4, 2, 3, 32, 3, 2, 1, 8 / 3, 5)
FORMS = [name for name, m in METHODS.items() if m.block == "plain" and not m.flow_map]


def network(method: str, backend: str | None = "reference") -> DiT:
    """A network whose zero-initialised weights are not zero."""
    model = perturbed(method, TINY)
    model.forward = ik.use_backend(backend)(model.forward)
    return model


def inputs(batch: int = 4) -> tuple[torch.Tensor, ...]:
    """z, t, h, ω, t_min, t_max, y."""
    torch.manual_seed(1)
    t, h = torch.rand(batch), torch.rand(batch) / 2
    guidance = 1 + 7 * torch.rand(batch), torch.rand(batch) / 2, 0.5 + torch.rand(batch) / 2
    return torch.randn(batch, 3, 4, 4), t, h, *guidance, torch.randint(0, 6, (batch,))


def plain(model: DiT, z, t, h, omega, t_min, t_max, y, heads):
    return plain_mf.forward(model, z, t, h, y, omega, t_min, t_max, heads)


@pytest.mark.parametrize(
    ("preset", "millions"), [("MF-B/2", 131), ("MF-M/2", 308), ("MF-L/2", 459), ("MF-XL/2", 676)]
)
def test_parameter_counts_of_the_presets(preset, millions):
    with torch.device("meta"):
        model = build(preset)
    d, values, classes, scalar = model.config.hidden_size, 16, 1001, 256
    block = 12 * d**2 + 9 * d + 6 * (d**2 + d)  # qkv, out, MLP with biases; six modulation vectors
    outside = (values + 1) * d + 2 * (scalar * d + d**2 + 2 * d) + classes * d
    final = 2 * (d**2 + d) + (d + 1) * values
    count = sum(p.numel() for p in model.parameters())
    assert count == model.config.depth * block + outside + final
    assert round(count / 1e6) == millions


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("method", FORMS)
def test_values_and_tangents_equal_plain_pytorchs(method, backend):
    model, (z, t, h, *rest) = network(method, backend), inputs()
    heads = "uv" if model.config.has_v_head else "u"
    expected = plain(model, z, t, h, *rest, heads)
    got = model(z, t, h, *rest, heads=heads)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    dots = [torch.randn_like(a) for a in (z, t, h)]
    for rows in (1, 4):
        some = [torch.cat([torch.zeros_like(a[: 4 - rows]), a[4 - rows :]]) for a in dots]
        _, u_dot = torch.func.jvp(lambda *x: plain(model, *x, *rest, "u"), (z, t, h), tuple(some))
        duals = [Dual(a, a_dot[4 - rows :]) for a, a_dot in zip((z, t, h), dots, strict=True)]
        u = model(*duals, *rest)
        torch.testing.assert_close(u.tangent.detach(), u_dot, rtol=1e-4, atol=1e-5)
        assert len(u.tangent_rows) == rows
        # Bitwise: a tangent changes nothing.
        assert torch.equal(u.primal, model(z, t, h, *rest))


@pytest.mark.parametrize("method", ["mf", "imf-interval", "imf-tokens"])
def test_bf16_operands_keep_an_fp32_stream(method):
    model, given = network(method, "cpu"), inputs()
    exact = model(*given)
    model.compute_dtype = torch.bfloat16
    rounded = model(*given)
    assert rounded.dtype == torch.float32
    assert 1e-5 < float(((exact - rounded).norm() / exact.norm()).detach()) < 2e-2


def test_initial_weights():
    """Linears Xavier uniform, time MLPs and label table N(0, 0.02²), adaLN and final layer zero."""
    torch.manual_seed(0)
    model = build(IMFConfig(hidden_size=384, depth=2, num_heads=6, **ORIGINAL))
    block = model.shared_blocks[0]
    for layer, bound in ((block.qkv, (6 / (4 * 384)) ** 0.5), (block.up, (6 / (5 * 384)) ** 0.5)):
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    embedder = model.embedders["t"]
    for weight in (embedder.first.weight, embedder.last.weight, model.y_embedder.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    zeros = (block.modulation.linear, model.u_final.modulation.linear, model.u_final.linear)
    assert not any(layer.weight.any() for layer in zeros)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_the_forms_between_are_what_the_methods_name():
    counts = {name: build(network_of(name, TINY)) for name in (*FORMS, "imf")}
    assert [type(model) for model in counts.values()] == [DiT] * 6 + [IMF]
    assert {n for n, m in counts.items() if m.config.has_v_head} == {*counts} - {"mf", "imf-boundary"}
    assert network_of("tvm", TINY) == network_of("lsd", TINY) == counts["mf"].config
    embedders = {n: [*m.embedders] for n, m in counts.items() if isinstance(m, DiT)}
    assert embedders["mf"] == embedders["imf-boundary"] == embedders["imf-vhead"] == ["t", "h"]
    assert embedders["imf-omega"] == ["t", "h", "omega"]
    assert embedders["imf-interval"] == ["t", "h", "omega", "t_min", "t_max"]
    assert embedders["imf-tokens"] == ["h", "omega", "t_min", "t_max"]
    assert counts["imf-tokens"].config.tokens == counts["imf"].config.tokens == 4 + 20
    assert counts["mf"].config == network_of("mf", counts["imf"].config) != TINY
    assert network_of("mf", PRESETS["iMF-B/2"]) == PRESETS["MF-B/2"]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("mf", {"heads": "uv"}, "heads must be 'u' (this network has no v-head), got 'uv'"),
        ("imf-vhead", {"heads": "w"}, "heads must be 'u', 'v' or 'uv', got 'w'"),
        ("imf-interval", {"t_max": None}, "t_max must be a tensor, got NoneType"),
        ("mf", {"t": torch.ones(3)}, "t must be [4], one a sample, got [3]"),
        ("mf", {"h": torch.ones(4).double()}, "h must be torch.float32 like the weights, got torch.float64"),
        ("mf", {"y": torch.full((4,), 6)}, "labels must be within 0 and 5 (the null label), got 6 to 6"),
        ("imf-omega", {"omega": torch.zeros(4)}, "omega must be positive, got 0.0"),
        ("imf-omega", {"omega": Dual(torch.ones(4))}, "omega carries no tangent; pass a tensor, got a Dual"),
    ],
)
def test_wrong_calls_are_refused(method, change, message):
    model = network(method)
    z, t, h, omega, t_min, t_max, y = inputs()
    given = {"z": z, "t": t, "h": h, "omega": omega, "t_min": t_min, "t_max": t_max, "y": y}
    with pytest.raises((ValueError, TypeError), match=re.escape(f"DiT: {message}")):
        model(**given | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning": "film"}, "conditioning must be tokens or adaln, got 'film'"),
        ({"block": "old"}, "block must be modern or plain, got 'old'"),
        ({"omega_input": 1}, "omega_input must be True or False, got 1"),
        ({"omega_input": False}, "omega_input and interval_input must be True, got False and True"),
        ({"conditioning": "adaln"}, "block must be 'plain' with conditioning 'adaln', got 'modern'"),
        ({"block": "plain", "hidden_size": 30}, "hidden_size must be a multiple of num_heads 2 and of 4"),
    ],
)
def test_wrong_forms_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **change)
    with pytest.raises(ValueError, match="DiT: block must be 'plain', got 'modern'"):
        DiT(TINY)


def test_a_network_made_without_memory_or_in_inference_mode_works():
    expected, given = network("mf", None), inputs()
    with torch.device("meta"):
        model = build(expected.config)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert torch.equal(model(*given), expected(*given))
    with torch.inference_mode():
        expected(*given)
        made = build(expected.config)
    assert not made._positions.is_inference()
    expected(*given).sum().backward()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["imf-interval", "imf-tokens"])
def test_blocks_that_are_recomputed_or_compiled_change_nothing(method, compiled):
    """As `imf.training.parallel.wrap_for_training` makes them, here without a compiler behind the graph."""
    results = []
    for prepared in (False, True):
        model, (z, t, h, *rest) = network(method), inputs()
        for block in (*model.shared_blocks, *model.u_blocks) if prepared else ():
            if compiled:
                block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
            block.forward = functools.partial(ik.checkpoint, block.forward)
        u = model(*(Dual(a, torch.ones_like(a[2:])) for a in (z, t, h)), *rest)
        u.primal.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(gradients | {"u": u.primal.detach(), "du_dt": u.tangent.detach()})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 40
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)
