"""Official weights by name."""

import golden_imf
import plain_imf
import pytest
import torch

from imf.convert import from_flax, from_official
from imf.model import build

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


def test_foreign_and_missing_weights_are_named():
    state = official_state()
    with pytest.raises(KeyError, match=r"'pos_embed' is no weight of the official iMF network"):
        from_official({**state, "pos_embed": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"'attn.bias' is no weight of a block"):
        from_official({**state, "u_heads.0.attn.bias": torch.zeros(1)})
    del state["u_heads.0.attn.k_proj._flax_linear.weight"]
    with pytest.raises(KeyError, match=r"u_blocks\.0 lacks attn\.k_proj\.weight"):
        from_official(state)
