"""Official weights by name."""

import golden_imf
import numpy as np
import plain_imf
import pytest
import torch

from imf.model import build
from imf.names import from_flax, from_official

CONFIG = golden_imf.config()


def official_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    c = CONFIG
    network = plain_imf.PlainIMF(
        c.input_size, c.patch_size, c.in_channels, c.hidden_size, c.depth, c.num_heads, c.aux_head_depth,
        c.mlp_ratio, c.num_classes,
    )  # fmt: skip
    return network.state_dict()


def test_every_official_weight_goes_somewhere_unchanged():
    state = official_state()
    converted = from_official(state)
    assert sum(x.numel() for x in converted.values()) == sum(x.numel() for x in state.values())
    assert torch.equal(
        converted["shared_blocks.1.qkv"][64:128], state["shared_blocks.1.attn.k_proj._flax_linear.weight"]
    )
    assert torch.equal(converted["u_blocks.0.gate_up"][170:], state["u_heads.0.mlp.w3._flax_linear.weight"])


def test_sampling_weights_lack_the_v_blocks():
    state = {name: x for name, x in official_state().items() if not name.startswith("v_heads.")}
    missing, unexpected = build(CONFIG).load_state_dict(from_official(state), strict=False)
    assert not unexpected
    assert missing and all(name.startswith("v_blocks.") for name in missing)


@pytest.mark.parametrize("prefix", ["", "net/", "params/net/"])
def test_flax_paths_with_and_without_their_roots(prefix):
    arrays = {prefix + name.removeprefix("net/"): x for name, x in golden_imf.weights().items()}
    build(CONFIG).load_state_dict(from_flax(arrays))


def test_flax_trees_as_flax_gives_them():
    tree = {}
    for path, array in golden_imf.weights().items():
        *parts, last = ("params/" + path).split("/")
        branch = tree
        for part in parts:
            branch = branch.setdefault(part, {})
        branch[last] = array
    expected = from_flax(golden_imf.weights())
    got = from_flax(tree)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_bfloat16_arrays_keep_their_bits():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {name: x.astype(ml_dtypes.bfloat16) for name, x in golden_imf.weights().items()}
    got, expected = from_flax(arrays), from_flax(golden_imf.weights())
    assert all(torch.equal(got[name], expected[name].bfloat16()) for name in expected)


@pytest.mark.parametrize(
    "name",
    [
        "pos_embed",
        "u_heads.0.attn.bias",
        "h_embedder.mlp.0.bogus",
        "x_embedder.proj.",
        "y_embedder.embedding_table.bias",
        "more.class_tokens",
    ],
)
def test_foreign_weights_are_named(name):
    with pytest.raises(KeyError, match=rf"from_official: '{name}' is no weight of the official iMF network"):
        from_official({**official_state(), name: torch.zeros(1)})


def test_foreign_arrays_are_named_by_their_path():
    path = "net/h_embedder/mlp/layers_0/bogus"
    with pytest.raises(KeyError, match=rf"from_flax: '{path}' is no weight of the official iMF network"):
        from_flax({**golden_imf.weights(), path: np.zeros(1)})
    with pytest.raises(TypeError, match=r"from_flax: 'net/class_tokens' must be an array .* got a str"):
        from_flax({"net": {"class_tokens": "many"}})


@pytest.mark.parametrize(
    "part", ["attn.k_proj._flax_linear.weight", "mlp.w3._flax_linear.weight", "norm1.weight", "attn_scale"]
)
def test_what_a_block_lacks_is_named(part):
    state = official_state()
    del state[f"u_heads.0.{part}"]
    with pytest.raises(KeyError, match=rf"u_heads\.0 lacks {part.replace('._flax_linear', '')}"):
        from_official(state)


def test_values_that_are_no_weights_are_refused():
    state = official_state()
    name = "u_heads.0.attn.k_proj._flax_linear.weight"
    with pytest.raises(
        ValueError, match=r"attn\.v_proj\.weight of u_heads\.0 must have one shape, got .*\[3, 64\]"
    ):
        from_official({**state, name: torch.zeros(3, 64)})
    with pytest.raises(TypeError, match=rf"from_official: '{name}' must be a tensor, got a ndarray"):
        from_official({**state, name: np.zeros((64, 64))})
    for function in (from_official, from_flax):
        with pytest.raises(ValueError, match=f"{function.__name__}: wanted the weights .* got none"):
            function({})
