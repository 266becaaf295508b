"""Mean Flows, and the steps from them to iMF, in plain PyTorch on a DiT's weights, for the tests.

Written from the papers and the official program's formulas, with the operations of PyTorch alone, so that
`torch.func.jvp` gives its derivatives.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

COUNTS = {"y": 8, "omega": 4, "t_min": 2, "t_max": 2, "h": 4}  # condition tokens


def positions(width: int, side: int) -> Tensor:
    """[side², width]: of each patch its column's, then its row's sines and cosines."""
    table = []
    for row in range(side):
        for column in range(side):
            angles = [[p / 10000 ** (4 * i / width) for i in range(width // 4)] for p in (column, row)]
            table.append([f(a) for half in angles for f in (math.sin, math.cos) for a in half])
    return torch.tensor(table, dtype=torch.float32)  # as the network has them, also in fp64


def layer_norm(x):
    """Written out: gradients through the tangent of PyTorch's own are wrong."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def forward(model, z, t, h, y, omega=None, t_min=None, t_max=None, heads="u"):
    """What `DiT.forward` computes."""
    c, w = model.config, dict(model.named_parameters())
    width, p, side = c.hidden_size, c.patch_size, c.input_size // c.patch_size

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def embed(name, s):
        angle = s[:, None] * torch.exp(torch.arange(128) * (-math.log(10000) / 128))
        x = linear(torch.cat([angle.cos(), angle.sin()], -1), f"embedders.{name}.first")
        return linear(F.silu(x), f"embedders.{name}.last")

    scalars = {"t": t, "h": h}
    if c.omega_input:  # the network sees 1 − 1/ω
        scalars["omega"] = 1 - 1 / omega
    if c.interval_input:
        scalars |= {"t_min": t_min, "t_max": t_max}
    embedded = {n: embed(n, s) for n, s in scalars.items() if n != "t" or c.conditioning == "adaln"}
    embedded["y"] = w["y_embedder.weight"][y]

    kernel = w["x_embedder.weight"].view(width, c.in_channels, p, p)
    x = F.conv2d(z, kernel, w["x_embedder.bias"], stride=p).flatten(2).mT + positions(width, side)
    condition = None
    if c.conditioning == "adaln":
        condition = F.silu(sum(embedded.values()))
    else:
        x = torch.cat([*((w[f"tokens.{n}"] + embedded[n][:, None]) for n in COUNTS), x], 1)

    def normed(x, name, which):
        """Norm number `which` of a block or final layer, and its gate."""
        if condition is None:
            norm = f"{name}.norm{which}" if f"{name}.norm{which}.weight" in w else f"{name}.norm"
            gate = w.get(f"{name}.{('attn_scale', 'mlp_scale')[which - 1]}")
            return layer_norm(x) * w[f"{norm}.weight"] + w[f"{norm}.bias"], gate
        vectors = linear(condition, f"{name}.modulation.linear")[:, None].split(width, -1)
        shift, scale, *gate = vectors[3 * (which - 1) : 3 * which]
        return layer_norm(x) * (1 + scale) + shift, gate[0] if gate else None

    def block(x, name):
        a, gate = normed(x, name, 1)
        q, k, v = linear(a, f"{name}.qkv").unflatten(-1, (3, c.num_heads, -1)).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.mT / math.sqrt(width // c.num_heads), -1) @ v
        x = x + gate * linear(a.transpose(1, 2).flatten(2), f"{name}.out")
        m, gate = normed(x, name, 2)
        return x + gate * linear(F.gelu(linear(m, f"{name}.up"), approximate="tanh"), f"{name}.down")

    for i in range(c.depth - c.aux_head_depth):
        x = block(x, f"shared_blocks.{i}")
    outputs = []
    for head in heads:
        a = x
        for i in range(c.aux_head_depth):
            a = block(a, f"{head}_blocks.{i}")
        a = linear(normed(a, f"{head}_final", 1)[0], f"{head}_final.linear")[:, -side * side :]
        a = a.view(-1, side, side, p, p, c.in_channels)
        outputs.append(torch.einsum("nhwpqc->nchpwq", a).reshape(z.shape))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def step(model, x, y, draws, guidance, tangent):
    """One training step as the official program takes it: loss, u, v_g, du_dt on all rows.

    guidance: the fixed one, or None for the drawn; tangent: "v_g" of the original, else "v_c". The v-head is
    used where the network has one.
    """
    null, head = torch.full_like(y, model.config.num_classes), "v" if model.config.has_v_head else "u"
    t, r = draws.t, draws.r
    column = t[:, None, None, None]
    z, v_t = (1 - column) * x + column * draws.noise, draws.noise - x
    zero, one = torch.zeros_like(t), torch.ones_like(t)

    if guidance is None:
        inside = (draws.t_min <= t) & (t <= draws.t_max)
        scale = torch.where(inside, draws.omega, 1.0)
        omega, kappa = one, 1 - 1 / scale
    else:
        inside, scale = (guidance.t_min <= t) & (t <= guidance.t_max), one
        omega = torch.where(inside, guidance.omega, 1.0)
        kappa = torch.where(inside, guidance.kappa, 0.0)
    with torch.no_grad():
        v_c = forward(model, z, t, zero, y, scale, zero, one, head)
        v_u = forward(model, z, t, zero, null, one, zero, one, head)
        omega, kappa = omega[:, None, None, None], kappa[:, None, None, None]
        v_g = omega * v_t + kappa * v_c + (1 - omega - kappa) * v_u
        v_g = torch.where(draws.drop[:, None, None, None], v_t, v_g)
    labels = torch.where(draws.drop, null, y)

    def network(z, t, r):
        outputs = forward(
            model, z, t, t - r, labels, draws.omega, draws.t_min, draws.t_max, "uv" if head == "v" else "u"
        )
        return outputs if head == "v" else (outputs, outputs)

    direction = (v_g if tangent == "v_g" else v_c, one, zero)
    u, du_dt, v = torch.func.jvp(network, (z, t, r), direction, has_aux=True)
    goal = (v_g - (t - r)[:, None, None, None] * du_dt).detach()
    errors = [(u - goal).square().sum((1, 2, 3))]
    if head == "v":
        errors.append((v - v_g).square().sum((1, 2, 3)))
    loss = sum((e / (e + 0.01).detach()).mean() for e in errors)
    return loss, u.detach(), v_g, du_dt.detach()
