"""The attention for Hopper compiles for sm_90a as it is meant to: the resource report, and the code."""

import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")

WIDTHS, TANGENTS = (64, 80, 96, 128), ("none", "of_query", "all")
EVERY = tuple(itertools.product(WIDTHS, TANGENTS))
# At the launch, 384 threads share 64 K registers; the warpgroups divide them anew when they begin.
REGISTERS = 168


def compile_kernels(folder, kernels):
    """A cubin with these kernels, and what the compiler says of them."""
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    lines = ['#include "cuda/attention_sm90.cuh"', "namespace imf::cuda::sm90 {"]
    for width, tangents in kernels:
        name = f"attention_kernel<{width}, Tangents::{tangents}>"
        lines.append(f"template __global__ void {name}(const __grid_constant__ Parameters);")
    source.write_text("\n".join([*lines, "}", ""]))
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-cubin"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-o", cubin, source]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return cubin, run.stderr


def check_report(report, count):
    """Nothing spills, and products are not made to wait for each other (ptxas says C75xx where they are)."""
    assert not re.findall(r".*\(C75\d\d\).*", report)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert memory == [("0", "0", "0")] * count
    assert re.findall(r"Used (\d+) registers", report) == [str(REGISTERS)] * count


def disassembler():
    """nvdisasm of the toolkit, or the one that Triton brings."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm" if triton and triton.origin else None
    return path if path is not None and path.exists() else None


def products(width, tangents):
    """How many wgmma are in a kernel: those of the first tile, of the loop, and of the last sums."""
    keys = {64: 96, 80: 96, 96: 80, 128: 48}[width]
    of_s, of_sums = {"none": (1, 1), "of_query": (2, 2), "all": (3, 3)}[tangents]
    return 2 * of_s * width // 16 + 2 * of_sums * keys // 16


def check_code(cubin, kernels):
    """Tensor cores are fed by wgmma and TMA, and nothing of a thread is in memory."""
    tool = disassembler()
    if tool is None:
        pytest.skip("the resource report is as wanted; no nvdisasm to look at the code")
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"\n(?=\.section\s+\.text\.)|\n(?=\s*\.section\s+\.text\.)", text):
        if match := re.search(r"attention_kernelILi(\d+)ELNS\w*?TangentsE(\d)E", part):
            width, tangents = match.groups()
            found[int(width), TANGENTS[int(tangents)]] = part
    assert set(found) == set(kernels)
    for (width, tangents), code in found.items():
        assert len(re.findall(r"\bHGMMA\.", code)) == products(width, tangents)
        assert "UTMALDG.4D" in code and "USETMAXREG" in code
        assert not re.search(r"\b(HMMA|LDL|STL|LDSM|STS)\b", code)


def test_main_kernel(tmp_path):
    kernels = [(64, "all")]
    cubin, report = compile_kernels(tmp_path, kernels)
    check_report(report, 1)
    check_code(cubin, kernels)


@pytest.mark.slow
def test_every_kernel(tmp_path):
    cubin, report = compile_kernels(tmp_path, EVERY)
    check_report(report, len(EVERY))
    check_code(cubin, EVERY)
