"""Compiles, for a GPU that need not be there, what operations launch; a process of its own, not a test.

    python tests/compile_kernels.py cuda:90 bfloat16 "rms_norm B/2" …      prints one JSON object a launch

An operation is called on meta tensors forward, with tangents and without, and backward, so that what is
compiled is what a training run of these shapes would launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton

from imf_kernels import triton_backend
from imf_kernels.testing import cases, errors

WARP_SIZE = {"cuda": 32, "hip": 64}


def launches(case, dtype, target):
    """The kernels that a case launches, compiled."""
    backend, _, arch = target.partition(":")
    gpu = (backend, int(arch) if arch.isdigit() else arch, WARP_SIZE[backend])
    with torch.device("meta"), triton_backend.ahead_of_time(*gpu) as compiled:
        primals = {}
        for name, x in case.inputs.items():
            primals[name] = torch.empty(x.shape, dtype=torch.bool if x.true is not None else x.dtype or dtype)
            if x.positions_first:
                primals[name] = primals[name].transpose(1, 2).contiguous().transpose(1, 2)
        out_dtype = case.output_dtype or next(iter(primals.values())).dtype
        cotangents = tuple(torch.empty(shape, dtype=out_dtype) for shape in case.outputs)
        tangents = {name: primals[name] for name in case.tangents}
        errors.evaluate(case, primals, tangents, cotangents, "triton")
        errors.evaluate(case, primals, {}, None, "triton")
        return list(compiled)


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
