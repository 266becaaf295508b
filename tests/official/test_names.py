"""Official weights by name."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.baselines import plain_imf
from imf.model.config import PRESETS
from imf.networks import build
from imf.official.names import from_flax, from_official, plain_name, shape_of, to_official
from imf.program import UserError
from tests.helpers import golden_imf

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
    with pytest.raises(UserError, match=rf"from_official: '{name}' is no weight of the official iMF network"):
        from_official({**official_state(), name: torch.zeros(1)})


def test_foreign_arrays_are_named_by_their_path():
    path = "net/h_embedder/mlp/layers_0/bogus"
    with pytest.raises(UserError, match=rf"from_flax: '{path}' is no weight of the official iMF network"):
        from_flax({**golden_imf.weights(), path: np.zeros(1)})
    with pytest.raises(UserError, match=r"from_flax: 'net/class_tokens' must be an array .* got a str"):
        from_flax({"net": {"class_tokens": "many"}})


@pytest.mark.parametrize(
    "part", ["attn.k_proj._flax_linear.weight", "mlp.w3._flax_linear.weight", "norm1.weight", "attn_scale"]
)
def test_what_a_block_lacks_is_named(part):
    state = official_state()
    del state[f"u_heads.0.{part}"]
    with pytest.raises(UserError, match=rf"u_heads\.0 lacks {part.replace('._flax_linear', '')}"):
        from_official(state)


def test_values_that_are_no_weights_are_refused():
    state = official_state()
    name = "u_heads.0.attn.k_proj._flax_linear.weight"
    with pytest.raises(
        ValueError, match=r"attn\.v_proj\.weight of u_heads\.0 must have one shape, got .*\[3, 64\]"
    ):
        from_official({**state, name: torch.zeros(3, 64)})
    with pytest.raises(UserError, match=rf"from_official: '{name}' must be a tensor, got a ndarray"):
        from_official({**state, name: np.zeros((64, 64))})
    for function in (from_official, from_flax):
        with pytest.raises(ValueError, match=f"{function.__name__}: wanted the weights .* got none"):
            function({})


@pytest.mark.parametrize("prefix", ["", "net."])
def test_the_way_back_gives_the_same_bits(prefix):
    state = official_state()
    ours = from_official({prefix + name: x for name, x in state.items()})
    back = to_official(ours, CONFIG)
    assert back.keys() == {f"net.{name}" for name in state}
    assert all(torch.equal(back[f"net.{name}"], x) for name, x in state.items())
    sampling = {name: x for name, x in ours.items() if not name.startswith("v_blocks.")}
    assert to_official(sampling, CONFIG).keys() == {n for n in back if not n.startswith("net.v_heads.")}
    with pytest.raises(UserError, match=r"to_official: 'pos_embed' is no weight"):
        to_official({"pos_embed": torch.zeros(1)}, CONFIG)


@pytest.mark.parametrize("preset", ["B", "XL"])
def test_presets_go_out_under_the_official_names_and_shapes(preset):
    lines = (golden_imf.GOLDEN / f"imf_{preset}_2_parameters.tsv").read_text().splitlines()[1:]
    expected = {f"net.{name}": shape for name, shape in (line.split("\t") for line in lines)}
    config = PRESETS[f"iMF-{preset}/2"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        back = to_official(build(config).state_dict(), config)
    assert {name: "x".join(map(str, x.shape)) for name, x in back.items()} == expected
    plain = {plain_name(name): x for name, x in back.items()}
    assert shape_of(plain) == config
    assert shape_of({n: x for n, x in plain.items() if not n.startswith("v_heads.")}) == config


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("MF")])
def test_shapes_of_mean_flow_networks(preset):
    config = PRESETS[preset]
    width, hidden = config.hidden_size, config.mlp_width
    weights = {f"blocks.{i}.mlp.fc1.weight": torch.empty(hidden, width) for i in range(config.depth)}
    weights["x_embedder.proj.weight"] = torch.empty(width, 4, 2, 2)
    weights["y_embedder.embedding_table.weight"] = torch.empty(1001, 1)
    assert shape_of(weights) == config
    assert shape_of(weights, num_heads=8).num_heads == 8
    weights["x_embedder.proj.weight"] = torch.empty(160, 4, 4, 4)
    with pytest.raises(ValueError, match=r"--num-heads\) of an MF network of width 160 is not known"):
        shape_of(weights)
    other = shape_of(weights, num_heads=4, input_size=16)
    assert (other.patch_size, other.num_heads, other.input_size) == (4, 4, 16)
    with pytest.raises(ValueError, match="no weights of an official iMF or MF network"):
        shape_of({"x_embedder.proj.weight": weights["x_embedder.proj.weight"]})
