"""The table of docs/networks.md: its cells, and that they are as recorded there. See network_table.py."""

import pytest

for library in ("diffusers", "transformers"):
    pytest.importorskip(library, reason=f"networks of other people: pip install {library}")

from tests.helpers.network_table import (  # noqa: E402
    CRASH,
    MODES,
    PYTORCH,
    REFUSED,
    RIGHT,
    WITH_INDUCTOR,
    WRONG,
    cell,
    recorded,
)
from tests.helpers.networks import NETWORKS  # noqa: E402

FAST = (
    "sit",
    "mf_dit",
    "unet",
    "u_vit_checkpoint",
    "edm2_training",
    "pmf",
    "dit",
    "flux",
    "unet_2d",
    "vq_model",
    "vit",
    "gpt2",
)


def _cells():
    for name in NETWORKS:
        for mode in MODES:
            if mode == "inductor" and name not in WITH_INDUCTOR:
                continue
            fast = name in FAST and mode in ("eager", "autocast")
            yield pytest.param(name, mode, id=f"{name}-{mode}", marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "mode"), list(_cells()))
def test_cell(name, mode):
    found = cell(name, mode)
    assert found.result in (RIGHT, REFUSED, PYTORCH), found.why
    assert found.result == recorded().get((name, mode), found.result), found.why


def test_share_that_is_right():
    results = list(recorded().values())
    if not results:
        pytest.skip("the table was made with other versions")
    assert WRONG not in results and CRASH not in results
    assert results.count(RIGHT) >= 0.85 * len(results)
