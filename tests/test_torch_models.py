"""The PyTorch writing that `benchmarks/speed.py` compares with: the same numbers on the same weights."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speed

from ulx import diffusion, runs, samplers, stages
from ulx.config import Config
from ulx.data import DataConfig
from ulx.frames import given_frames
from ulx.nn.conditions import Conditions, ConditionSpec
from ulx.nn.uvit import UViTConfig
from ulx.presets import MODELS
from ulx.training import Draws

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
torch_models = pytest.importorskip("torch_models")
torch_training = pytest.importorskip("torch_training")

TOLERANCE = 2e-4
"""Relative, of float32 sums in another order through up to a dozen layers; a wrong formula is off by per cents."""


def config_of(name: str) -> Config:
    """`convolutions`: a decoder with a convolution stage too."""
    model = MODELS["smoke" if name == "convolutions" else name]
    # Dropout draws differently there.
    model = dataclasses.replace(
        model, base=dataclasses.replace(model.base, block=dataclasses.replace(model.base.block, dropout=0.0))
    )
    if name == "convolutions":
        model = dataclasses.replace(
            model, decoder=UViTConfig(patch=2, conv_channels=(32,), conv_blocks=1, channels=(64,), blocks=(2,))
        )
    data = DataConfig(resolution=64 if name == "small" else 32)
    if "video" in name:
        data = DataConfig(source="moving-emoji", clips=True)
    return Config(name="speed", data=data, model=model, loss_factor=4.0, sigmoid_bias=1.4)


def drawn(tree, seed: int):
    """No weight is 0, as the last of each block is in the beginning: an error behind it would not show."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32) if eqx.is_array(leaf) else leaf,
        tree,
    )


def numbers(*shape: int) -> np.ndarray:
    """The same normal ones for the same shape."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def torch_noise(shape):
    return torch.from_numpy(numbers(*shape))


@pytest.fixture(params=["smoke", "small", "convolutions", "video-smoke"])
def pair(request, monkeypatch):
    """Configuration, stage 1 and base of ulx, and both in PyTorch; all noise is drawn by `numbers`."""
    monkeypatch.setattr(diffusion, "normal", lambda keys, like: jnp.asarray(numbers(*like.shape)))
    config, classes = config_of(request.param), 0 if "video" in request.param else 3
    model = drawn(runs.stage1_state(config, ConditionSpec(num_classes=classes)).model, 0)
    base = drawn(runs.stage2_state(config, model, ConditionSpec(num_classes=classes)).model, 1)
    theirs = torch_models.Autoencoder(config)
    their_base = torch_models.base_of(config, theirs.latent_shape, classes)
    torch_models.copy_autoencoder(theirs, model)
    torch_models.copy_weights(their_base, base.network)
    for module in (theirs, their_base):
        torch_models.for_device(module, "cpu").eval()
    return config, model, base, theirs, their_base


def close(ours, theirs) -> None:
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE * np.abs(ours).max())


def test_networks_agree(pair):
    config, model, base, theirs, their_base = pair
    x, z, logsnr = numbers(2, *config.data.shape), numbers(2, *model.latent_shape), np.array([-3.0, 2.5], np.float32)
    prior, decoder = model.prior.network, model.decoder.denoiser.network
    label = np.array([1, 0]) if base.conditions.num_classes else None
    frames = None if base.conditions.frames_shape is None else np.array(given_frames(jnp.asarray(x), 3))
    as_tensor = lambda a: None if a is None else torch.from_numpy(a)  # noqa: E731
    as_array = lambda a: None if a is None else jnp.asarray(a)  # noqa: E731
    close(eqx.filter_jit(model.encoder)(x), theirs.encoder(torch.from_numpy(x)))
    for ours, other, inputs in (
        (prior, theirs.prior, {"z_t": z}),
        (decoder, theirs.decoder, {"z_t": x, "context": z, "frames": frames}),
        (base.network, their_base, {"z_t": z, "label": label, "frames": frames}),
    ):
        conditions = Conditions(as_array(inputs.get("label")), frames=as_array(inputs.get("frames")))
        own = eqx.filter_jit(ours)(inputs["z_t"], logsnr, conditions, context=inputs.get("context"))
        close(own, other(logsnr=torch.from_numpy(logsnr), **{name: as_tensor(value) for name, value in inputs.items()}))


def test_losses_and_gradients_agree(pair):
    config, model, base, theirs, their_base = pair
    count = 4
    image = (40 * numbers(count, *config.data.shape) + 127).clip(0, 255).astype(np.uint8)
    draws = Draws(jax.random.split(jax.random.key(0), count), jax.random.key(1))
    labels = np.zeros(count, np.int32)
    batch = {"image": image, "label": labels}
    no_dropout = dataclasses.replace(config, label_dropout=0.0, frames_dropout=1.0, base_frames_dropout=1.0)
    gradient = lambda loss: eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))  # noqa: E731
    step = config.prior_warmup[1]

    (loss, _), grads = gradient(stages.autoencoder_loss(no_dropout))(model, None, batch, draws, jnp.asarray(step))
    times = [torch.from_numpy(np.array(draws.times(term))) for term in (0, 1)]
    their_loss = torch_training.stage1_loss(config, theirs, torch_noise)
    found = their_loss(torch.from_numpy(image), *times, config.prior_gradient)
    found.backward()
    assert found.item() == pytest.approx(float(loss), rel=TOLERANCE)
    assert norm(theirs) == pytest.approx(float(optax_norm(grads)), rel=10 * TOLERANCE)

    (loss, _), grads = gradient(stages.base_loss(no_dropout, config.data.resolution**2))(
        base, model, batch, draws, jnp.asarray(step)
    )
    z_clean = theirs.encoder(torch_training.to_float(torch.from_numpy(image))).detach()
    found = torch_training.base_loss(config, their_base, torch_noise)(z_clean, torch.from_numpy(labels), times[0])
    found.backward()
    pixels = np.prod(config.data.shape[:-1]) / config.data.resolution**2
    assert found.item() * pixels == pytest.approx(float(loss), rel=TOLERANCE)
    assert norm(their_base) * pixels == pytest.approx(float(optax_norm(grads)), rel=10 * TOLERANCE)


def norm(module) -> float:
    return float(sum(p.grad.double().square().sum() for p in module.parameters() if p.grad is not None)) ** 0.5


def optax_norm(grads):
    import optax

    return optax.tree.norm(eqx.filter(grads, eqx.is_array))


def test_samples_agree(pair):
    _, model, base, _, their_base = pair
    schedule = model.latent_schedule
    grid = samplers.logsnr_grid(5, logsnr_min=schedule.logsnr_min, logsnr_max=schedule.logsnr_max)
    noise = numbers(2, *model.latent_shape)
    ours = samplers.sample(base.given(), jnp.asarray(noise), grid, "euler", key=jax.random.key(0)).z
    with torch.no_grad():
        close(ours, torch_training.euler(their_base, torch.from_numpy(noise), grid.tolist()))


def test_the_benchmark_runs_all_work_by_all_libraries():
    work = ("stage1", "stage2", "encode", "decode", "sample")
    settings = speed.Settings(preset="smoke", against="torch", batch_size=2, repeats=1, rounds_before=0, work=work)
    found = speed.measure(settings)["work"]
    for name in work:
        assert {"ulx", "torch", "torch.compile"} <= found[name].keys()
        assert found[name]["torch"]["time_over_ulx"]["median"] == pytest.approx(
            found[name]["torch"]["seconds"] / found[name]["ulx"]["seconds"]
        )
