"""Tiles of the attention kernels, which benchmarks/ops/tune_attention.py times.

By architecture, kernel and shape class: BLOCK_M, BLOCK_N, EDGE_N (0 where the kernel has none), num_warps,
num_stages; of "primal", BLOCK_M, num_warps, num_stages alone. Those of head dims up to 64 on sm_90,
without a mask, were the fastest of 3 to 60 on an H100, in bf16. The others are not timed but derived from
registers and shared memory: the sums take twice BLOCK_M times the head dim, logits and their tangent twice
BLOCK_M times BLOCK_N, in fp32, spread over 32 num_warps threads of at most 255 registers, and addresses of
what is loaded 2 per 16 bytes. Matrix instructions of sm_90 and sm_100 want 64 rows; those of float32 keep the
terms of their operands in registers. The interpreter's tiles are small, to meet many edges.
"""

_FP32 = {"fp32": (16, 16, 16, 8, 1), "64 fp32": (16, 64, 16, 4, 1)}
_FP32_KV = {"fp32": (16, 16, 0, 8, 1), "64 fp32": (64, 16, 0, 4, 1)}

# The backward of O and its tangent has three or four sums and as many tiles of logits. Not timed either, but
# the largest found that spill at most 16 bytes; a head dim of 256 spills a few hundred, as does fp32 up to a
# head dim of 64, and wider heads in fp32 thousands.
_PAIR: dict[str, dict[str, tuple[int, ...]]] = {
    "pair q": {
        "64": (64, 16, 0, 4, 1),
        "64 masked": (32, 16, 0, 8, 1),
        "80": (32, 16, 0, 8, 1),
        "128": (32, 16, 0, 8, 1),
        "256": (16, 16, 0, 8, 1),
        "fp32": (16, 16, 0, 8, 1),
    },
    "pair kv": {
        "64": (16, 32, 0, 4, 1),
        "80": (16, 16, 0, 4, 1),
        "128": (16, 16, 0, 4, 1),
        "256": (16, 16, 0, 8, 1),
        "fp32": (16, 16, 0, 8, 1),
    },
}

TABLE: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "sm_80": {
        "forward": {
            "128 masked": (32, 16, 16, 8, 1),
            "64": (64, 32, 16, 4, 2),
            "64 masked": (64, 16, 16, 4, 1),
            "80 masked": (64, 16, 16, 4, 1),
            "80": (64, 16, 16, 4, 2),
            "128": (32, 32, 32, 8, 2),
            "256": (16, 32, 32, 8, 1),
            **_FP32,
        },
        "primal": {},
        "backward q": {
            "64": (64, 32, 32, 4, 2),
            "64 masked": (64, 16, 16, 4, 1),
            "80 masked": (64, 16, 16, 4, 1),
            "80": (64, 32, 16, 4, 2),
            "128": (64, 32, 32, 8, 2),
            "256": (32, 32, 32, 8, 1),
            **_FP32,
        },
        "backward kv": {
            "64": (32, 64, 0, 4, 2),
            "80": (32, 64, 0, 4, 2),
            "80 masked": (16, 64, 0, 4, 2),
            "128": (32, 64, 0, 8, 2),
            "256": (32, 32, 0, 8, 1),
            **_FP32_KV,
        },
        **_PAIR,
    },
    "sm_90": {
        "forward": {
            "128 masked": (32, 16, 16, 8, 1),
            "64": (64, 64, 32, 4, 3),
            "64 masked": (64, 16, 16, 4, 1),
            "80 masked": (64, 16, 16, 4, 1),
            "80": (64, 32, 16, 4, 2),
            "128": (64, 16, 16, 4, 1),
            "256": (16, 32, 32, 8, 1),
            **_FP32,
        },
        "primal": {"64": (64, 4, 2)},
        "backward q": {
            "64": (64, 64, 32, 4, 3),
            "64 masked": (64, 32, 16, 4, 2),
            "80": (64, 32, 16, 4, 2),
            "80 masked": (64, 16, 16, 4, 2),
            "128": (64, 32, 32, 8, 2),
            "256": (32, 32, 32, 8, 1),
            **_FP32,
        },
        "backward kv": {
            "64": (32, 64, 0, 4, 3),
            "64 long": (32, 128, 0, 4, 3),
            "80": (32, 64, 0, 4, 2),
            "128": (32, 64, 0, 8, 2),
            "256": (64, 32, 0, 8, 1),
            **_FP32_KV,
        },
        **_PAIR,
    },
    "sm_100": {
        "forward": {
            "64 masked": (64, 16, 16, 4, 1),
            "80 masked": (64, 16, 16, 4, 1),
            "128 masked": (32, 16, 16, 8, 1),
            "64": (64, 32, 32, 4, 2),
            "80": (64, 32, 32, 4, 2),
            "128": (64, 16, 16, 4, 1),
            "256": (16, 32, 32, 8, 1),
            **_FP32,
        },
        "primal": {},
        "backward q": {
            "64 masked": (64, 16, 16, 4, 1),
            "80 masked": (64, 16, 16, 4, 1),
            "64": (64, 64, 32, 4, 2),
            "80": (64, 32, 32, 4, 2),
            "128": (64, 32, 32, 4, 2),
            "256": (32, 32, 32, 8, 1),
            **_FP32,
        },
        "backward kv": {
            "64": (64, 64, 0, 4, 2),
            "80": (32, 64, 0, 4, 2),
            "128": (32, 64, 0, 8, 2),
            "256": (64, 32, 0, 8, 1),
            **_FP32_KV,
        },
        **_PAIR,
    },
    "gfx942": {
        "forward": {
            "64": (64, 64, 32, 4, 1),
            "80": (64, 32, 32, 4, 1),
            "128": (64, 16, 16, 4, 1),
            "256": (16, 32, 32, 8, 1),
            "fp32": (16, 16, 16, 8, 1),
        },
        "primal": {},
        "backward q": {
            "64": (64, 64, 32, 4, 1),
            "80": (64, 32, 32, 4, 1),
            "128": (64, 32, 32, 4, 1),
            "256": (32, 32, 32, 8, 1),
            "fp32": (16, 16, 16, 8, 1),
        },
        "backward kv": {
            "64": (64, 64, 0, 4, 1),
            "80": (32, 64, 0, 4, 1),
            "128": (32, 64, 0, 4, 1),
            "256": (16, 32, 0, 8, 1),
            "fp32": (16, 16, 0, 4, 1),
        },
        **_PAIR,
    },
    "interpreter": {
        "primal": {"64": (32, 4, 1)},
        **{
            kernel: dict.fromkeys(("64", "80", "128", "256", "fp32"), (64, 32, edge, 4, 1))
            for kernel, edge in (("forward", 32), ("backward q", 32), ("backward kv", 0))
        },
        **{kernel: dict.fromkeys(rows, (64, 32, 0, 4, 1)) for kernel, rows in _PAIR.items()},
    },
}
