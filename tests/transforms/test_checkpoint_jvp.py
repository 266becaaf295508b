"""`imf_kernels.checkpoint`: the same gradients, the tangents computed once, the primal recomputed alone."""

import contextlib
import functools
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrize

import imf_kernels as ik
from imf_kernels import Dual
from tests.helpers.backends import ON_GPU
from tests.transforms.test_jvp import X_DOT, Block, X


class Checkpointed(nn.Module):
    def __init__(self, blocks, checkpoint=ik.checkpoint):
        super().__init__()
        self.blocks, self.checkpoint = nn.ModuleList(blocks), checkpoint

    def forward(self, x):
        for block in self.blocks:
            x = self.checkpoint(block, x)
        return x


def plain(block, *args):
    return block(*args)


def loss(y, y_dot):
    return (y - y_dot.detach()).square().mean()


def grads(model, x, **options):
    loss(*ik.jvp(model, (x,), (X_DOT,), **options)).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [*found, x.grad]


@pytest.mark.parametrize("of_input", [False, True])
def test_gradients_are_those_without(of_input):
    torch.manual_seed(0)
    model = Checkpointed([Block(), Block()])
    x, again = X.clone().requires_grad_(of_input), X.clone().requires_grad_(of_input)
    got = grads(model, x)
    model.checkpoint = plain
    for a, b in zip(got, grads(model, again), strict=True):
        assert (a is None) == (b is None)
        if a is not None:  # PyTorch's own calls recompute what ours computed
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_backward_recomputes_the_primal_alone():
    runs = []

    def block(x):
        runs.append(torch.autograd.forward_ad.unpack_dual(x).tangent is not None)
        return F.linear(x, weight).tanh()

    weight = torch.randn(16, 16, requires_grad=True)
    y, y_dot = ik.jvp(lambda x: ik.checkpoint(block, x), (X,), (X_DOT,))
    loss(y, y_dot).backward()
    assert runs == [True, False]


def test_nothing_inside_is_saved():
    saved = []
    weight = torch.randn(16, 16, requires_grad=True)

    def block(x):
        for _ in range(5):
            x = F.linear(x, weight).tanh()
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ik.jvp(lambda x: ik.checkpoint(block, x), (X,), (X_DOT,))
    assert saved == [X.shape]


def test_random_numbers_are_repeated():
    weight = torch.randn(16, requires_grad=True)

    def block(x):
        return F.dropout(x * weight, 0.5, training=True)

    torch.manual_seed(3)
    y, _ = ik.jvp(lambda x: ik.checkpoint(block, x), (X,), (X_DOT,))
    y.sum().backward()
    got, weight.grad = weight.grad, None
    torch.manual_seed(3)
    before = torch.get_rng_state()
    y, _ = ik.jvp(block, (X,), (X_DOT,))
    y.sum().backward()
    assert torch.equal(got, weight.grad)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_random_numbers_are_repeated_in_a_graph():
    x, weight = torch.randn(2, 1024, device="cuda")
    weight.requires_grad_()

    def step():
        y, _ = ik.jvp(lambda x: ik.checkpoint(lambda x: F.dropout(x * weight, 0.5), x), (x,), (x,))
        y.sum().backward()
        gradient, weight.grad = weight.grad, None
        return torch.stack([y.detach(), gradient * weight.detach()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for _ in range(2):
        graph.replay()
        results.append(captured.clone())
    for y, gradient in results:
        torch.testing.assert_close(y, gradient)
    assert not torch.equal(results[0][0] == 0, results[1][0] == 0)


def test_autocast_is_repeated():
    block = Block()
    dtypes = []

    def looked_at(x):
        dtypes.append(F.linear(x, x[0]).dtype)
        return block(x)

    with torch.autocast("cpu", torch.bfloat16):
        y, y_dot = ik.jvp(lambda x: ik.checkpoint(looked_at, x), (X,), (X_DOT,))
    loss(y, y_dot).backward()
    assert dtypes == [torch.bfloat16] * 2
    got = [p.grad for p in block.parameters()]
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y, y_dot = ik.jvp(block, (X,), (X_DOT,))
    loss(y, y_dot).backward()
    for a, p in zip(got, block.parameters(), strict=True):
        assert (a - p.grad).norm() < 0.02 * p.grad.norm()


def test_structures_and_other_arguments():
    weight = torch.randn(16, 16, requires_grad=True)

    def block(pair, scale, *, names):
        x, y = pair["x"], pair["y"]
        return {"sum": F.linear(x + y, weight) * scale, "names": names}, y

    def func(checkpoint):
        return lambda x: checkpoint(block, {"x": x, "y": x * 2}, 3.0, names=("a",))[0]["sum"]

    def run(f, *a, **k):
        return f(*a, **k)

    results = []
    for checkpoint in (ik.checkpoint, run):
        y, y_dot = ik.jvp(func(checkpoint), (X,), (X_DOT,))
        (grad,) = torch.autograd.grad(loss(y, y_dot), weight) if checkpoint is run else (None,)
        if grad is None:
            loss(y, y_dot).backward()
            grad, weight.grad = weight.grad, None
        results.append((y.detach(), y_dot.detach(), grad))
    torch.testing.assert_close(*results)


def test_with_duals():
    weight = torch.randn(16, 16, requires_grad=True)

    def block(x):
        return ik.silu(ik.linear(x, weight))

    results = []
    for run in (lambda f, x: ik.checkpoint(f, x), lambda f, x: f(x)):
        x = X.clone().requires_grad_()
        y = run(block, Dual(x, X_DOT[2:]))
        assert y.tangent_rows.shape[0] == 2
        loss(y.primal, y.tangent).backward()
        results.append((y.primal.detach(), y.tangent_rows, x.grad, weight.grad))
        weight.grad = None
    torch.testing.assert_close(*results)


def test_without_tangents_it_is_pytorchs():
    block = Block()
    y = ik.checkpoint(block, X)
    grads = torch.autograd.grad(y.sum(), list(block.parameters()))
    for a, b in zip(grads, torch.autograd.grad(block(X).sum(), list(block.parameters())), strict=True):
        assert torch.equal(a, b)


class Halved(torch.autograd.Function):
    """No mode sees its calls."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)
        return x * y / 2

    @staticmethod
    def backward(ctx, d):
        x, y = ctx.saved_tensors
        return d * y / 2, d * x / 2

    @staticmethod
    def jvp(ctx, x_dot, y_dot):
        x, y = ctx.saved_tensors
        return (0 if x_dot is None else x_dot * y / 2) + (0 if y_dot is None else x * y_dot / 2)


class Closing(nn.Module):
    """Checkpoints a function that closes over c, which has a graph."""

    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.case = nn.Linear(16, 16), nn.Linear(16, 16), case

    def forward(self, x, run):
        c = self.a(x).sin()
        return self.case(run, c, self.b, x)


def twice(run, c, b, x):
    return run(lambda q: b(q) * c, run(lambda q: (b(q) * c).sin() + c.mean(), x)) + c


def mapped(run, c, b, x):
    return run(lambda q: torch.vmap(lambda r, d: b(r) * d)(q, c) + torch.vmap(lambda r: r * c[0])(q), x) + c


def under_no_grad(run, c, b, x):
    def own(q):
        with torch.no_grad():
            factor = (c * 2).sigmoid()
        return b(q) * factor * c

    return run(own, x)


def complex_numbers(run, c, b, x):
    return run(lambda q: torch.complex(b(q), c), x).abs()


def nested(run, c, b, x):
    def own(q):
        return run(lambda p: (b(p) * c).tanh(), q) + c

    return run(own, x) + c


def nested_reentrant(run, c, b, x):
    inner = (
        plain if run is plain else functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    )
    return run(lambda q: inner(b, q.sin() * c) + c, x)


def without_tangent(run, c, b, x):
    d = b(X).cos()
    return run(lambda q: b(q) * d * c, x) + c


def scripted(run, c, b, x):
    script = torch.jit.CompilationUnit("def f(x, y):\n    return torch.sin(x) * y\n")
    return run(lambda q: script.f(b(q), c), x) + c


def changing(run, c, b, x):
    def own(q):
        y = torch.zeros_like(q)
        y[:] = c * b(q)
        return y.mul_(c).add_(c)

    return run(own, x) + c


def with_grad_inside(run, c, b, x):
    def own(q):
        with torch.enable_grad():
            factor = c.detach().sin() + 1
        return b(q) * factor * c

    return run(own, x) * c


CLOSING = {
    "product": lambda run, c, b, x: run(lambda q: b(q) * c, x) + c,
    "alone": lambda run, c, b, x: run(lambda q: b(q) * c, x),
    "twice": twice,
    "nested": nested,
    "nested, reentrant": nested_reentrant,
    "changing": changing,
    "mapped": mapped,
    "under no_grad": under_no_grad,
    "complex": complex_numbers,
    "with grad inside": with_grad_inside,
    "in a list": lambda run, c, b, x: run(lambda q: torch.cat([b(q), c]).sin().chunk(2)[1], x) + c,
    "by keyword": lambda run, c, b, x: run(lambda q: F.linear(input=b(q), weight=c[0].T @ c[0]), x) + c,
    "a view": lambda run, c, b, x: run(lambda q: b(q) * c[..., :1].expand(c.shape), x) + c,
    "returned": lambda run, c, b, x: sum(run(lambda q: (b(q), c), x)) + c,
    "also an argument": lambda run, c, b, x: run(lambda q: (b(q) * c).sin(), c) + c,
    "without a tangent": without_tangent,
    "attribute of an argument": lambda run, c, b, x: run(lambda h, q: h.c * b(q), Holder(c), x) * c,
    "own operations": lambda run, c, b, x: run(lambda q: ik.silu(c) * ik.linear(q, b.weight), x) + c,
    "a Function": lambda run, c, b, x: run(lambda q: Halved.apply(b(q), c), x) + c,
    "a script": scripted,
    "called otherwise and seen": lambda run, c, b, x: run(lambda q: Halved.apply(b(q), c) * c, x) + c,
}


class Holder:
    def __init__(self, c):
        self.c = c


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("case", CLOSING)
def test_gradients_of_what_a_function_closes_over(case, of_input):
    results = []
    for run in (functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False), plain):
        model, x = Closing(CLOSING[case]), X.clone().requires_grad_(of_input)
        y, y_dot = ik.jvp(lambda x, m=model, r=run: m(x, r), (x,), (X_DOT,))
        loss(y, y_dot).backward()
        assert all(p.grad is not None for p in model.parameters() if p is not model.b.bias)
        grads = [p.grad for p in model.parameters()]
        results.append((y.detach(), y_dot.detach(), *(g for g in (*grads, x.grad) if g is not None)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["product", "a Function"])
def test_backward_in_another_thread(case):
    """Its nodes have numbers of their own, as in the threads of backward on a GPU."""
    model, threaded = Closing(CLOSING[case]), Closing(CLOSING[case])
    for m, run in ((model, plain), (threaded, ik.checkpoint)):
        for _ in range(2):
            y, _ = ik.jvp(lambda x, m=m, run=run: m(x, run), (X,), (X_DOT,))
            thread = threading.Thread(target=y.square().sum().backward)
            thread.start()
            thread.join()
    for got, want in zip(threaded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


def test_a_closed_over_graph_is_passed_once():
    """Whatever the number of checkpoints, as DDP's and FSDP's hooks need it."""
    passed = []
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)

    def func(x):
        c = a(x).sin()
        for _ in range(3):
            x = ik.checkpoint(lambda q: b(q) * c, x)
        return x

    a.weight.register_hook(lambda dy: passed.append(dy))
    ik.jvp(func, (X,), (X_DOT,))[0].sum().backward()
    assert len(passed) == 1


def test_a_variable_with_another_value_since():
    b = nn.Linear(16, 16)

    def func(x):
        x = ik.checkpoint(lambda q: b(q) + x, x)
        x = x.sin()
        return x

    y, _ = ik.jvp(func, (X.clone().requires_grad_(),), (X_DOT,))
    with pytest.raises(RuntimeError, match=r"another value since.*pass it as an argument"):
        y.sum().backward()


def test_what_a_function_closes_over_changes_since():
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)

    def func(x):
        c = a(x).sin()
        y = ik.checkpoint(lambda q: b(q) * c, x)
        c.add_(1)
        return y

    y, _ = ik.jvp(func, (X,), (X_DOT,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_over_a_closed_over_graph():
    model = Closing(CLOSING["product"])
    y, _ = ik.jvp(lambda x: model(x, ik.checkpoint), (X,), (X_DOT,))
    y.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    y.sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in once])


def test_with_duals_a_function_closes_over_a_graph():
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)
    results = []
    for run in (ik.checkpoint, plain):
        c = a(X).sin()
        y = run(lambda q, c=c: ik.linear(q, b.weight) * c, Dual(X, X_DOT))
        y = run(lambda q, c=c: ik.silu(q * c), y)
        (y.primal * c).square().sum().backward()
        results.append([a.weight.grad, b.weight.grad])
        a.zero_grad(), b.zero_grad()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("still", [True, False])
def test_parametrizations_may_be_cached(still):
    network = nn.Linear(16, 4)
    parametrize.register_parametrization(network, "weight", Exp())
    grads = []
    for run in (ik.checkpoint, plain):
        with parametrize.cached():
            y, _ = ik.jvp(lambda x, r=run: r(network, x @ network.weight.T @ network.weight), (X,), (X_DOT,))
            if still:
                y.sin().sum().backward()
        if not still:
            y.sin().sum().backward()
        grads.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


class Exp(nn.Module):
    def forward(self, weight):
        return weight.exp()


class Leaving(nn.Module):
    """Leaves tensors elsewhere than in what it returns."""

    def __init__(self, leave):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.leave, self.left = nn.Linear(16, 16), nn.BatchNorm1d(16), leave, []
        self.register_buffer("mean", torch.zeros(16))
        self.last = None

    def forward(self, x):
        h = self.norm(self.linear(x.flatten(0, -2))).view(x.shape)
        y = self.leave(self, x, h)
        return h.tanh() if y is None else y


def keep(module, y):
    module.left.append(y)


def keep_last(module, x, h):
    module.last = h.square().mean()


def keep_output(module, x, h):
    module.last = h.sin()
    return module.last


def keep_filled(module, x, h):
    y = torch.zeros(4)
    y[1] = h.mean()
    keep(module, y)


def keep_filled_view(module, x, h):
    y = torch.zeros(4)
    y[1:].copy_(h.mean())
    keep(module, y)


def keep_behind_no_grad(module, x, h):
    with torch.no_grad():
        h.mean()
    keep(module, h.mean())


LEFT = {
    "in a list": lambda m, x, h: keep(m, h.square().mean()),
    "an attribute": keep_last,
    "a dict": lambda m, x, h: m.__dict__.setdefault("more", {}).update(h=h.exp()),
    "an output": keep_output,
    "filled in place": keep_filled,
    "filled through a view": keep_filled_view,
    "a view": lambda m, x, h: keep(m, h[:2].flatten()),
    "a view of a weight": lambda m, x, h: keep(m, m.linear.weight.T),
    "of a weight": lambda m, x, h: keep(m, m.linear.weight.square().sum()),
    "several": lambda m, x, h: m.left.extend(h.chunk(2)),
    "of an own operation": lambda m, x, h: keep(m, ik.silu(h).mean()),
    "of a Function": lambda m, x, h: keep(m, Halved.apply(h, h).mean()),
    "behind no_grad": keep_behind_no_grad,
}


def left_by(model):
    return [y for y in (*model.left, model.last, *model.__dict__.get("more", {}).values()) if y is not None]


@pytest.mark.parametrize("case", LEFT)
def test_what_a_function_leaves_elsewhere_is_not_trained_on(case):
    model = Leaving(LEFT[case])
    y, _ = ik.jvp(lambda x: ik.checkpoint(model, x), (X,), (X_DOT,))
    left = left_by(model)
    assert left
    for a in left:
        assert torch.isfinite(a.detach()).all() and a.mean().item() == a.detach().mean().item()
        with pytest.raises(RuntimeError, match="return it from the checkpointed function"):
            (y.sum() + a.sum()).backward()
    y, _ = ik.jvp(lambda x: ik.checkpoint(model, x), (X,), (X_DOT,))
    y.sum().backward()
    assert model.linear.weight.grad is not None


def test_what_a_function_leaves_elsewhere_inside_jvp():
    model = Leaving(LEFT["in a list"])

    def func(x):
        y = ik.checkpoint(model, x)
        return y, model.left[0] * 2

    (_, aux), (_, aux_dot) = ik.jvp(func, (X,), (X_DOT,))
    model = Leaving(LEFT["in a list"])
    (_, want), (_, want_dot) = ik.jvp(lambda x: (model(x), model.left[0] * 2), (X,), (X_DOT,))
    torch.testing.assert_close((aux.detach(), aux_dot.detach()), (want.detach(), want_dot.detach()))
    with pytest.raises(RuntimeError, match="return it from the checkpointed function"):
        aux.backward()


def keep_average(module, x, h):
    with torch.no_grad():
        module.mean = module.mean * 0.9 + h.mean(0).mean(0) * 0.1
        keep(module, h.mean())


@torch.no_grad()
def decorated(module, h):
    keep(module, h.mean())
    with torch.enable_grad():
        pass
    keep(module, h.sin())


def keep_table(module, x, h):
    if module.last is None:
        module.last = torch.outer(torch.arange(4.0), torch.ones(16)).cos()
    return (h * module.last[0]).tanh()


def keep_under_mode(module, x, h):
    with torch.set_grad_enabled(False):
        keep(module, h.mean())


CONSTANT = {
    "detached": lambda m, x, h: keep(m, h.detach().mean()),
    "average": keep_average,
    "decorated": lambda m, x, h: decorated(m, h),
    "table": keep_table,
    "data": lambda m, x, h: keep(m, h.data.mean()),
    "set_grad_enabled": keep_under_mode,
    "like": lambda m, x, h: keep(m, torch.ones_like(h)),
    "places": lambda m, x, h: keep(m, h.argmax()),
    "in place": lambda m, x, h: keep(m, m.mean.lerp_(h.detach().mean(0).mean(0), 0.1)),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_constants_that_a_function_leaves_elsewhere(case):
    results = []
    for run in (ik.checkpoint, plain):
        model = Leaving(CONSTANT[case])
        for _ in range(2):
            y, _ = ik.jvp(lambda x, m=model, r=run: r(m, x), (X,), (X_DOT,))
            left = left_by(model)[:1]
            assert left and not any(a.requires_grad for a in (*left, *model.buffers()))
            (y.square().sum() + left[0].sum()).backward()
        results.append(model.linear.weight.grad)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_nothing_is_kept_alive():
    alive = []

    def block(x, c):
        y = x.sin()
        alive.append(weakref.ref(y))
        return y.cos() * c

    def passed():
        c = X.clone().requires_grad_() * 2
        y, _ = ik.jvp(lambda x: ik.checkpoint(lambda q: block(q, c), x), (X,), (X_DOT,))
        assert alive[-1]() is None
        y.sum().backward()
        alive.append(weakref.ref(c))

    passed()  # PyTorch keeps something of the first call
    gc.collect()
    gc.disable()
    try:
        passed()
        assert alive[-1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("operators", [[torch.ops.aten.mm.default, torch.ops.aten.addmm.default], "all"])
def test_selective_checkpointing_keeps_nothing(operators):
    policy = operators
    if operators == "all":
        policy = lambda *args, **kwargs: torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE  # noqa: E731
    contexts = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy)
    selective = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=contexts)
    model = Checkpointed([Block(), nn.Linear(16, 16)], selective)
    x, again = X.clone().requires_grad_(), X.clone().requires_grad_()
    got = grads(model, x)
    model.checkpoint = plain
    torch.testing.assert_close(got, grads(model, again), rtol=1e-4, atol=1e-6)


def test_other_contexts_are_entered():
    entered = []

    @contextlib.contextmanager
    def noted(name):
        entered.append(name)
        yield

    block = Block()
    y, _ = ik.jvp(
        lambda x: ik.checkpoint(block, x, context_fn=lambda: (noted("first"), noted("second"))),
        (X,),
        (X_DOT,),
    )
    assert entered == ["first"]
    y.sum().backward()
    assert entered == ["first", "second"]


def test_checkpoints_of_another_thread_are_pytorchs():
    block, found, errors = Block(), [], []

    def of_another_thread():
        try:
            x = X.clone().requires_grad_()
            for reentrant in (False, True):
                y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
                if reentrant:
                    y.sum().backward()
                    found.append(x.grad)
                else:
                    found.extend(torch.autograd.grad(y.sum(), x))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=of_another_thread)
    begun, over = threading.Event(), threading.Event()
    start = functools.partial(over.wait, 60)

    def waiting(x):
        begun.set()
        assert start()
        return x * 2

    jvp = threading.Thread(target=lambda: ik.jvp(waiting, (X,), (X_DOT,)))
    jvp.start()
    assert begun.wait(60)
    thread.start()
    thread.join(60)
    over.set()
    jvp.join(60)
    x = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(block(x).sum(), x)
    assert not errors
    torch.testing.assert_close(found, [want, want])


def test_a_level_of_ones_own():
    block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    with torch.autograd.forward_ad.dual_level():
        y = ik.checkpoint(block, torch.autograd.forward_ad.make_dual(X, X_DOT))
        y, y_dot = torch.autograd.forward_ad.unpack_dual(y)
    torch.testing.assert_close(y_dot, ik.jvp(block, (X,), (X_DOT,))[1], rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())
