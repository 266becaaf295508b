"""Networks of the table in docs/networks.md, tiny and with random weights."""

import torch

from tests.helpers.networks.case import Case
from tests.helpers.networks.diffusers_ import DIFFUSERS
from tests.helpers.networks.mean_flow import MEAN_FLOW
from tests.helpers.networks.transformers_ import TRANSFORMERS

SOURCES = {"written here": MEAN_FLOW, "diffusers": DIFFUSERS, "transformers": TRANSFORMERS}
NETWORKS = {f.__name__: f for functions in SOURCES.values() for f in functions}


def made(name: str) -> Case:
    """In evaluation mode; zeros at the start, which would hide what follows them, are none."""
    torch.manual_seed(0)
    case = NETWORKS[name]()
    with torch.no_grad():
        for p in case.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    case.module.train(case.training)
    return case
