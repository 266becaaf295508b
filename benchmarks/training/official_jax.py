"""The official program's own training step, in JAX: what bench_step.py times with `--official-jax DIR`.

    python -m benchmarks.training.official_jax DIR CONFIG BATCH

DIR is a checkout of github.com/Lyy-iiis/imeanflow, CONFIG the fields of an `imf.model.imf.IMFConfig` as JSON.
Compiles the loss and its gradients (`jax.jit`, float32), writes a line, and from then on runs one step for
every line that it reads and answers with the loss. Needs jax and flax, not PyTorch.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp


def main() -> None:
    folder, config, batch = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, folder)
    from models import imfDiT

    from imf import iMeanFlow

    imfDiT.benchmarked = functools.partial(imfDiT.imfDiT, **config)
    model = iMeanFlow(model_str="benchmarked", num_classes=config["num_classes"])
    side, key = config["input_size"], jax.random.key(0)
    x = jax.random.normal(key, (batch, side, side, config["in_channels"]))
    y = jax.random.randint(key, (batch,), 0, config["num_classes"])
    weights = model.init(key, x, jnp.ones(batch), y)["params"]
    # A fresh network's heads are zero.
    weights = jax.tree.map(lambda w: w + 0.02 * jax.random.normal(key, w.shape), weights)

    def loss(weights: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        return model.apply({"params": weights}, x, y, rngs={"gen": key}, method=model.forward)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    jax.block_until_ready(step(weights, key))
    print("ready", flush=True)
    for _ in sys.stdin:
        (value, _), gradients = step(weights, key)
        jax.block_until_ready(gradients)
        print(float(value), flush=True)


if __name__ == "__main__":
    main()
