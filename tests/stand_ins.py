"""What stands in for a packaged network in tests that are about something else."""

import equinox as eqx
import jax
import numpy as np


class Corner(eqx.Module):
    """Features of an image: three pixels of it. In the place, and under the names, of EfficientNet-lite0."""

    metric: str = eqx.field(default="fd_efflite0", static=True)
    kernel_metric: str = eqx.field(default="kd_efflite0", static=True)
    definition: str = eqx.field(default="the corner", static=True)
    sha256: str = eqx.field(default="c0", static=True)

    def __call__(self, images):
        return images[:, 0, 0, :]


class LastCorner(Corner):
    """The same of a clip's last frame, in the place of I3D."""

    metric: str = eqx.field(default="fvd", static=True)
    kernel_metric: str = eqx.field(default="kd_i3d", static=True)

    def __call__(self, clips):
        return clips[:, -1, 0, 0, :]


def drawn(state, seed: int, step: int):
    """A training state at that step, as if trained: its average is away from zero everywhere (untrained networks
    predict nothing, whatever they are told)."""
    state = eqx.tree_at(lambda s: s.ema, state, moved(state.ema, seed))
    return eqx.tree_at(lambda s: s.step, state, jax.numpy.asarray(step, jax.numpy.int32))


def moved(average, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.15 * rng.standard_normal(leaf.shape).astype(np.float32), average)
