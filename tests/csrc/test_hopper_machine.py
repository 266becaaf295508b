"""The emulated machine finds what it is there to find: a kernel with one line broken fails on it."""

import shutil

import pytest

from tests.csrc.test_attention_sm90 import draw
from tests.helpers import hopper_machine as machine

pytestmark = [
    pytest.mark.slow,  # each is compiled
    pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing())),
]

# What is broken: the text, and what it becomes.
BROKEN = {
    "S_dot is read before the wait": ("ptx::wgmma_wait<0>(s_dot);", ""),
    "S is read before the wait": ("ptx::wgmma_wait<dual ? 1 : 0>(s);", ""),
    "the sums are not waited for": ("wait_for_sums(std::integral_constant<int, 0>());", ""),
    "values are released before their products are done": (
        "wait_for_sums(std::integral_constant<int, 1>());",
        "wait_for_sums(std::integral_constant<int, 2>());",
    ),
    "no fence before the products": ("ptx::wgmma_fence();\n      add_columns", "add_columns"),
    "no fence of the new barriers": ("ptx::mbarrier_init_fence();", ""),
    "tiles are not waited for": (
        "ptx::mbarrier_wait(base + full + S::barrier_of(tile + own), S::parity_of(tile + own));",
        "",
    ),
    "a tile of the other warpgroup's is not released": ("release(empty + S::barrier_of(tile + others));", ""),
    "queries are not waited for": ("ptx::mbarrier_wait(base + S::query_full + side * 8, parity);", ""),
    "stages are written before they are empty": (
        "ptx::mbarrier_wait(base + empty + S::barrier_of(tile), S::parity_of(tile) ^ 1);",
        "",
    ),
    "queries are written before they are done with": (
        "ptx::mbarrier_wait(base + S::query_empty + side * 8, parity ^ 1);",
        "",
    ),
    "the wrong parity": ("S::parity_of(tile) ^ 1", "S::parity_of(tile)"),
    "keys are never released": ("release(S::k_empty + barrier_of(j));", ""),
    "too few bytes are announced": ("expect(barrier, S::key_slot)", "expect(barrier, S::key_slot - 16)"),
    "a turn is never given": ("ptx::barrier_arrive(2 - side, turns);\n    find", "find"),
    "what is beyond the last key has weight": ("if (there < 2 * count)", "if (false)"),
    "no distance between boxes": ("ptx::descriptor(b, S::key_box,", "ptx::descriptor(b, 16,"),
    "the wrong distance between eight rows": ("int eight_rows = 8 *", "int eight_rows = 4 *"),
    "no decay of the sums": ("out[c] *= decay[c / 2 % 2];", ""),
    "the shift moves unnoticed": ("fmaf(moved[c / 2 % 2], out[c], out_dot[c])", "out_dot[c]"),
}  # fmt: skip


def broken_kernel(folder, *edits):
    """The kernels for one width, with texts replaced in attention_sm90.cuh."""
    shutil.copytree(machine.ROOT / "csrc", folder / "csrc")
    one = folder / "csrc" / "cuda" / "attention_sm90.cu"
    text = one.read_text()
    for before, after in (
        ("if (width <= 64) return forward<64>(a);", "(void)width;"),
        ("if (width <= 80) return forward<80>(a);", ""),
        ("if (width <= 96) return forward<96>(a);", ""),
    ):
        assert before in text
        text = text.replace(before, after)
    one.write_text(text)
    kernel = folder / "csrc" / "cuda" / "attention_sm90.cuh"
    text = kernel.read_text()
    for before, after in edits:
        assert before in text, before
        text = text.replace(before, after)
    kernel.write_text(text)
    return machine.build(folder, folder / "csrc", warnings=())


def run(library):
    """Two items a processor, one of them of two heads, several tiles, a part of one; in several orders."""
    arguments = draw(heads=4, queries=70 + 64, keys=2 * 48 + 7, width=128, offset=1.0)
    for seed in range(4):
        machine.check(library, arguments, processors=2, seed=seed)


def test_unbroken(tmp_path):
    run(broken_kernel(tmp_path))


@pytest.mark.parametrize("edit", BROKEN.values(), ids=BROKEN)
def test_broken(tmp_path, edit):
    library = broken_kernel(tmp_path, edit)
    with pytest.raises((AssertionError, RuntimeError)):
        run(library)
