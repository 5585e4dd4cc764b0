"""One process of a training: gradients, two steps of `fit` with a checkpoint, an evaluation.

Usage: distributed_worker.py OUT_DIR; where JAX_NUM_PROCESSES is set, as one of so many.
"""

import functools
import os
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from tiny_runs import TinyNet

import compand_jax as cj
from compand_jax.data.images import ImageData
from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.distributed import data_mesh, initialize, is_main, replicate, split
from compand_jax.training.fit import FitConfig, fit
from compand_jax.training.steps import create_state, evaluate


def images(seed, n):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    return pixels, rng.integers(0, 10, n).astype(np.int32)


DATA = ImageData("noise", *images(0, 32), *images(1, 33), 10, (0.5,), (0.3,))


def loss_and_gradients(model, variables):
    mesh = data_mesh()
    batch = np.random.default_rng(2).normal(size=(16, 8, 8, 1)).astype(np.float32)

    @jax.jit
    def gradients(variables, batch):
        batch = jax.lax.with_sharding_constraint(batch, split(mesh))

        def loss(variables):
            logits = model.apply(variables, batch, train=False)
            labels = jax.numpy.arange(16) % 10
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.value_and_grad(loss)(variables)

    loss, grads = jax.device_get(gradients(replicate(variables, mesh), batch))
    named = jax.tree_util.tree_leaves_with_path(grads)
    return {"loss": loss} | {jax.tree_util.keystr(path): leaf for path, leaf in named}


def main(out):
    if "JAX_NUM_PROCESSES" in os.environ:
        initialize()
    assert jax.device_count() == 2
    model = TinyNet(10)
    sample = DATA.train_images[:4].astype(np.float32) / 255
    variables = jax.jit(model.init)(jax.random.key(0), sample)
    qmodel, calibrated = cj.quantize_model(model, cj.QuantConfig()).calibrate(
        variables, [sample], calibration="absmax"
    )
    found = {"full": loss_and_gradients(model, variables)}
    found["quantized"] = loss_and_gradients(qmodel, calibrated)
    tx = cj.partition_optimizer(optax.sgd(0.1), mu=optax.adam(1e-3), scale=optax.adam(1e-3))
    state = create_state(calibrated, tx, jax.random.key(1))
    config = FitConfig(epochs=1, batch_size=16, steps_per_call=2)
    with Checkpoints(out / "checkpoints") as checkpoints:
        run = functools.partial(fit, data=DATA, model=qmodel, tx=tx, checkpoints=checkpoints)
        state = run(state, config=config, log=out / "log.jsonl")
        step, restored, _ = checkpoints.restore(state_like(state))
        assert step == 2
        state = run(restored, config=FitConfig(epochs=2, batch_size=16, steps_per_call=2))
    correct = evaluate(
        qmodel,
        state.variables,
        DATA.test_images,
        DATA.test_labels,
        mean=DATA.mean,
        std=DATA.std,
        batch_size=8,
    )
    if is_main():
        for name, values in found.items():
            np.savez(out / f"{name}.npz", **values)
        leaves = jax.tree.leaves(jax.device_get(state.params))
        np.savez(out / "end.npz", *leaves, correct=correct)


def state_like(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
