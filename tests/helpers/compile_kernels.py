"""Compiles, for a GPU that need not be there, what operations launch; a process of its own, not a test.

    python -m tests.helpers.compile_kernels cuda:90 bfloat16 "rms_norm B/2" …  prints one JSON object a launch

An operation is called on meta tensors forward, with tangents and without, and backward, so that what is
compiled is what a training run of these shapes would launch.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from imf_kernels.backends import operators, triton_launch
from imf_kernels.ops import attention_pair
from imf_kernels.testing import cases, errors

WARP_SIZE = {"cuda": 32, "hip": 64}


class NoDevice:
    """Triton's driver of a GPU that is not there, as far as compiling asks for one."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return str(self._target)  # Triton keeps the kernels of each device apart by this

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def ahead_of_time(target):
    """Compiles what is launched inside, on meta tensors, and launches nothing; gives the compiled kernels."""
    backend, _, arch = target.partition(":")
    gpu = GPUTarget(backend, int(arch) if arch.isdigit() else arch, WARP_SIZE[backend])
    name = f"sm_{arch}" if backend == "cuda" else arch
    compiled = []

    def compile_only(launcher, grid, tensors, *numbers):
        if 0 in grid:
            return
        kernel, given = launcher.kernel, len(tensors) + len(launcher.fixed)
        for parameter, number in zip(kernel.arg_names[given:], numbers, strict=False):
            # A launcher keeps one compiled kernel for all values of a number.
            assert not isinstance(number, int) or parameter in kernel.do_not_specialize, (kernel, parameter)
        arguments = *tensors, *launcher.fixed, *numbers
        compiled.append(kernel.warmup(*arguments, grid=grid, **launcher.constants))

    driver.set_active(NoDevice(gpu))
    try:
        with (
            mock.patch.object(triton_launch.Launcher, "__call__", compile_only),
            mock.patch.object(triton_launch, "unfit", lambda *asked: None),
            mock.patch.object(operators, "without_memory", lambda x: None),
            mock.patch.object(triton_launch, "architecture", lambda x: name),
        ):
            yield compiled
    finally:
        driver.set_active(None)


def launches(case, dtype, target):
    """The kernels that a case launches, compiled."""
    with torch.device("meta"), ahead_of_time(target) as compiled:
        primals = {}
        for name, x in case.inputs.items():
            own = torch.bool if x.true is not None else x.dtype or dtype
            primals[name] = x.laid_out(torch.empty(x.shape, dtype=own))
        out_dtype = case.output_dtype or next(iter(primals.values())).dtype
        cotangents = tuple(torch.empty(shape, dtype=out_dtype) for shape in case.outputs)
        tangents = {name: primals[name] for name in case.tangents}
        errors.evaluate(case, primals, tangents, cotangents, "triton")
        errors.evaluate(case, primals, {}, None, "triton")
        if case.operation != "scaled_dot_product_attention":
            errors.evaluate(case, primals, tangents, cotangents, "triton", tangent_cotangents=cotangents)
        # In float32 wider heads spill thousands of bytes in the backward of the pair.
        if case.operation == "scaled_dot_product_attention" and (
            dtype != torch.float32 or max(x.shape[-1] for x in (primals["query"], primals["value"])) <= 64
        ):
            launch_pair_backward(case, primals, tangents, cotangents[0])
    return compiled


def launch_pair_backward(case, primals, tangents, dout):
    """Launches the backward of attention's output and its tangent."""
    q, k, v = (primals[name] for name in ("query", "key", "value"))
    dots = [tangents.get(name) for name in ("query", "key", "value")]
    mask = primals.get("attn_mask")
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    q_dot, k_dot, v_dot = dots
    attention_pair.pair_backward(
        triton_launch.Kernels("attention"),
        *(q, q_dot, k, k_dot, v, v_dot, mask, torch.empty(q.shape[:3]), dout, dout),
        *(case.options.get("is_causal", False), 1.0, (True,) * 6),
    )


def resources(kernel, target):
    """What a compiled kernel asks of the GPU: registers and, for those spilled, bytes of stack a thread."""
    if target.startswith("hip"):
        text = kernel.asm["amdgcn"]

        def number(key):
            return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

        return {
            "registers": number("vgpr_count"),
            "stack": number("private_segment_fixed_size"),
            "matrix instructions": len(re.findall(r"\bv_mfma_", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "matrix instructions": len(re.findall(r"\b(?:mma|wgmma|tcgen05)\.\S+", kernel.asm["ptx"])),
    }


def main():
    target, dtype, *names = sys.argv[1:]
    by_name = {str(case): case for case in [*cases.SMALL, *cases.LARGE]}
    for name in names:
        for kernel in launches(by_name[name], getattr(torch, dtype), target):
            about = {"case": name, "kernel": kernel.metadata.name, "warps": kernel.metadata.num_warps}
            about |= {"shared": kernel.metadata.shared, **resources(kernel, target)}
            print(json.dumps(about))


if __name__ == "__main__":
    main()
