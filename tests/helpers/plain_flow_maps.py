"""The objectives of flow maps in plain PyTorch, for the tests: the flow map itself is differentiated.

Written from the official programs' formulas, on the network of `plain_mf`.
"""

import torch

from tests.helpers import plain_mf

FAULTS = "the tangent is detached", "the teacher is trained", "the arrival is trained"


def step(method, model, teacher, x, y, draws, guidance, fault=None):
    """Loss, ∂u/∂r, targets of all rows; the gradients are autograd's. fault: one of `FAULTS`."""
    null = torch.full_like(y, model.config.num_classes)
    labels = torch.where(draws.drop, null, y)
    n, zero = draws.n_fm, torch.zeros_like(draws.t)
    teacher = model if method == "lsd" else teacher

    def column(s):
        return s[:, None, None, None]

    def u(network, z, t, r, labels):
        return plain_mf.forward(network, z, t, t - r, labels)

    def flow_map(z, t, r, labels):
        return z - column(t - r) * u(model, z, t, r, labels)

    z, v_t = (1 - column(draws.t)) * x + column(draws.t) * draws.noise, draws.noise - x
    with torch.no_grad():
        v_c, v_u = (u(teacher, z, draws.t, draws.t, labels) for labels in (y, null))
    v_g = guidance.omega * v_t + guidance.kappa * v_c + (1 - guidance.omega - guidance.kappa) * v_u
    v_g = torch.where(column(draws.drop), v_t, v_g)
    v_error = (u(model, z, draws.t, draws.t, labels) - v_g)[:n]

    rest = z[n:], draws.t[n:], draws.r[n:], labels[n:]
    arrived, speed = torch.func.jvp(
        lambda r: flow_map(*rest[:2], r, rest[3]), (rest[2],), (torch.ones_like(rest[2]),)
    )
    _, du_dr = torch.func.jvp(
        lambda r: u(model, *rest[:2], r, rest[3]), (rest[2],), (torch.ones_like(rest[2]),)
    )
    if fault == "the tangent is detached":
        speed = u(model, *rest) - column(rest[1] - rest[2]) * du_dr.detach()
    if fault != "the arrival is trained":
        arrived = arrived.detach()
    target = u(teacher, arrived, rest[2], rest[2], rest[3])
    if fault not in ("the teacher is trained", "the arrival is trained"):
        target = target.detach()
    u_error = speed - target

    if method == "lsd":
        loss = (v_error.square().sum() + u_error.square().sum()) / len(x)
    else:
        scale = torch.where(draws.drop, 1.0, guidance.omega / (1 - guidance.kappa))
        v_terms, u_terms = (e.square().mean((1, 2, 3)) for e in (v_error, u_error))
        loss = (v_terms / scale[:n] ** 2).mean() + (u_terms / scale[n:] ** 2).mean()
    du_dr = torch.cat([column(zero[:n]).expand_as(z[:n]), du_dr.detach()])
    return loss, du_dr, torch.cat([v_g[:n], target.detach()])
