"""A whole training step on kernels for GPUs: on a GPU, or by Triton's interpreter."""

import pytest
import torch

import imf_kernels as ik
from imf.mean_flow.methods import METHODS, guidance_of
from imf.mean_flow.objective import objective
from imf.objective.draws import Draws, Guidance
from tests.helpers.backends import ON_GPU, running_on
from tests.helpers.tiny_run import perturbed


def step_of(model, method, backend, batch=4):
    """Velocities, their derivative and gradients of one step, in fp64."""
    model.zero_grad()
    weight = next(model.parameters())
    cpu = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1), device="cpu")
    with torch.device("cpu"):
        drawn = vars(Draws.sample(cpu, seed=0, step=0))
    drawn = {n: x.to(weight.dtype) if n not in ("drop", "n_fm") else x for n, x in drawn.items()}
    draws = Draws(**drawn | {"noise": drawn["noise"].to(weight.device)})
    y = torch.arange(batch, device=weight.device)
    with ik.use_backend(backend):
        loss_of = objective(method, guidance_of(model.config, Guidance()), teacher=model)
        out = loss_of(model, cpu.to(weight), y, draws)
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: x.double() for name, x in ({"u": out.u, "du_dt": out.du_dt, "v_g": out.v_g} | gradients).items()
    }


def check(results, plain, exact, unit):
    """As far from fp64 as plain PyTorch is, up to three times, and some of the last digits."""
    for name, value in exact.items():
        allowed = 3 * (plain[name] - value).norm() + 8 * unit * value.norm()
        assert (results[name] - value).norm() <= allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method", [m if m in ("mf", "imf") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_on_triton(method):
    with running_on("triton"):
        model = perturbed(method)
        results, plain = (step_of(model, method, backend) for backend in ("triton", "reference"))
        exact = step_of(model.double(), method, "reference")
    check(results, plain, exact, torch.finfo(torch.float32).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["triton", "cuda"])  # "cuda": attention's alone
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: bfloat16 is wrong in Triton's interpreter")
def test_in_bfloat16(method, name):
    with running_on(name):
        model = perturbed(method)
        exact = step_of(model.double(), method, "reference")
        model.float().compute_dtype = torch.bfloat16
        results, plain = (step_of(model, method, b) for b in (name, "reference"))
    check(results, plain, exact, torch.finfo(torch.bfloat16).eps)
