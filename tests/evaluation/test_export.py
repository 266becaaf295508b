"""The sampler as a program of `torch.export`: what eager mode draws, in this process and in others."""

import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch

import imf
import imf_kernels as ik
from imf.model.sampler import walk
from imf.program import UserError
from tests.helpers.tiny_run import perturbed

STEPS = 2
LOAD = """
import sys, torch
{before}
program, (arguments, wanted) = {load}, torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    got = program(*arguments)
assert {imported} == ("imf_kernels" in sys.modules) and "imf" not in sys.modules
print("equal" if torch.equal(got, wanted) else (got - wanted).abs().max())
"""
EXPORTED = "torch.export.load(sys.argv[1]).module()"


def inputs(rows, network):
    """Noise, labels and guidance, different in each row; guidance that is no input is none."""
    generator = torch.Generator().manual_seed(rows)
    omega, t_min, t_max = 1 + torch.arange(rows) / 4, torch.full((rows,), 0.25), torch.full((rows,), 0.75)
    if not network.config.omega_input:
        omega, t_min, t_max = torch.ones(rows), torch.zeros(rows), torch.ones(rows)
    return torch.randn(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 11, omega, t_min, t_max


def eager(network, noise, labels, *guidance, backend):
    """Row by row through `imf.generate`, which takes one guidance for all rows."""
    rows = zip(noise.split(1), labels.split(1), *(x.tolist() for x in guidance), strict=True)
    with ik.use_backend(backend):
        return torch.cat(
            [imf.generate(network, z, y, steps=STEPS, omega=w, t_min=a, t_max=b) for z, y, w, a, b in rows]
        )


def elsewhere(path, data, folder, *, load=EXPORTED, before="", imported=False):
    """What a new process prints that loads a program and compares its result."""
    code = LOAD.format(before=before, load=load, imported=imported)
    command = [sys.executable, "-c", code, str(path), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ)
    return done.stdout.strip() or done.stderr.strip()


@functools.cache
def exported(method, dtype=None):
    """Returns a network, and the program of its sampler in plain PyTorch."""
    network = perturbed(method).requires_grad_(False)
    network.compute_dtype = dtype
    return network, imf.export_sampler(network, steps=STEPS)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("imf", None), ("mf", None), pytest.param("imf", torch.bfloat16, marks=pytest.mark.slow)],
)
def test_any_batch_is_what_eager_mode_draws(method, dtype):
    """16 is the network's width: no shape may be taken for another."""
    network, program = exported(method, dtype)
    sampler = program.module()
    for rows in (1, 2, 5, 16):
        noise, labels, *guidance = inputs(rows, network)
        with torch.no_grad(), ik.use_backend("reference"):
            wanted = walk(network, noise, labels, *guidance, STEPS)
            got = sampler(noise, labels, *guidance)
        assert torch.equal(got, wanted) and wanted.std() > 0.1
        rounding = 0.05 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(
            got, eager(network, noise, labels, *guidance, backend="reference"), atol=rounding
        )
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert len(targets) > 10 and not [target for target in targets if "imf" in target]


def test_a_program_loads_where_nothing_of_ours_is(tmp_path):
    network, program = exported("imf")
    arguments = inputs(3, network)
    torch.export.save(program, tmp_path / "sampler.pt2")
    torch.save((arguments, program.module()(*arguments)), tmp_path / "data.pt")
    assert elsewhere(tmp_path / "sampler.pt2", tmp_path / "data.pt", tmp_path) == "equal"


@pytest.mark.slow
def test_with_kernels_a_program_needs_imf_kernels(tmp_path):
    network = perturbed("imf").requires_grad_(False)
    program = imf.export_sampler(network, steps=STEPS, backend="cpu")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"imf_kernels.rms_norm.default", "imf_kernels.scaled_dot_product_attention.default"} <= targets
    arguments = inputs(3, network)
    with torch.no_grad():
        got = program.module()(*arguments)
    assert torch.allclose(got, eager(network, *arguments, backend="cpu"), atol=1e-5)
    torch.export.save(program, tmp_path / "sampler.pt2")
    torch.save((arguments, got), tmp_path / "data.pt")
    files = tmp_path / "sampler.pt2", tmp_path / "data.pt", tmp_path
    assert elsewhere(*files, before="import imf_kernels", imported=True) == "equal"
    assert "imf_kernels" in elsewhere(*files) != "equal"


def test_bad_calls():
    network = perturbed("imf")
    with pytest.raises(UserError, match="export_sampler: steps must be an integer of at least 1, got 0"):
        imf.export_sampler(network, steps=0)
    with pytest.raises(UserError, match=r"network must be one of imf\.load or imf\.build, got a Linear"):
        imf.export_sampler(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="use_backend: name must be one of"):
        imf.export_sampler(network, backend="eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_aotinductor(tmp_path):
    """A compiled library, loaded by PyTorch alone, for batches that it was not compiled with."""
    network, program = exported("imf")
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "sampler.pt2"))
    for rows in (1, 3, 16):
        arguments = inputs(rows, network)
        got = torch._inductor.aoti_load_package(path)(*arguments)
        assert torch.allclose(got, program.module()(*arguments), atol=1e-5), rows
    torch.save((arguments, got), tmp_path / "data.pt")
    load = "torch._inductor.aoti_load_package(sys.argv[1])"
    assert elsewhere(path, tmp_path / "data.pt", tmp_path, load=load) == "equal"
