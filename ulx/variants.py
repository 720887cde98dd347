"""The variants of the paper, and the baselines that it compares with, each as a change of the configuration.

    python experiments/openmoji.py --variant learned-variance --name d

`--variant` changes the preset's defaults, and every field can still be set on top. What a variant is made of is an
option of its own, so that they combine: a learned variance under a normal prior is
`--variant normal-prior --model.encoder.variance learned`.
"""

import dataclasses
from collections.abc import Callable

from ulx import schedules, weightings
from ulx.config import Config

__all__ = ["VARIANTS", "Variant"]


@dataclasses.dataclass(frozen=True)
class Variant:
    paper: str
    """Where it is in the paper."""
    what: str
    change: Callable[[Config], Config]


def _model(config: Config, **changes) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _encoder(config: Config, **changes) -> Config:
    return _model(config, encoder=dataclasses.replace(config.model.encoder, **changes))


def _stop_gradient(config: Config) -> Config:
    config = dataclasses.replace(config, prior_gradient=0.0, kl_weight=1e-2)
    return _encoder(config, latent_channels=8)


def _single_stage(config: Config) -> Config:
    """The base model's network in the prior's place; one training as long as both were."""
    together = config.train.steps + config.train_base.steps
    train = dataclasses.replace(config.train, steps=together)
    return _model(dataclasses.replace(config, single_stage=True, train=train), prior=config.model.base)


def _shifted_single_stage(config: Config) -> Config:
    """Shifted to noisier data by 2: the cut-off falls with it, and so does the rate, to what an ELBO models well."""
    return dataclasses.replace(_single_stage(config), sigmoid_bias=float(config.decoder_weighting.bias) - 2)


def _logistic_single_stage(config: Config) -> Config:
    return _model(_single_stage(config), logsnr_0_bias=config.base_bias)


def _pixels(config: Config) -> Config:
    """The decoder's network, without a latent to look at, on images between λ_x(0) and λ_x(1), weighted as there."""
    ends = schedules.image_schedule(config.data.resolution)
    bias = weightings.sigmoid_bias(config.data.resolution)
    config = dataclasses.replace(config, base_bias=bias, cache_latents=False)
    return _model(
        config, latent="pixels", base=config.model.decoder, logsnr_0=ends.logsnr_max, logsnr_1=ends.logsnr_min
    )


def _kl_autoencoder(config: Config) -> Config:
    """Latent Diffusion's first stage without its adversary: the noise is the encoder's own, the KL's weight small."""
    config = _encoder(dataclasses.replace(config, prior_gradient=1e-2), variance="learned")
    return _model(config, latent_prior="normal", reconstruction="mse", logsnr_0=10.0)


VARIANTS = {
    "unified": Variant("§3", "the method itself", lambda config: config),
    "stop-gradient": Variant(
        "Tab. 6, A", "no gradient from the prior into the encoder; a small KL to N(0, I) instead", _stop_gradient
    ),
    "low-noise": Variant("Tab. 6, B", "λ_z(0) = 10", lambda config: _model(config, logsnr_0=10.0)),
    "learned-variance": Variant(
        "Tab. 6, D; Eq. 5", "an encoder of mean and variance", lambda config: _encoder(config, variance="learned")
    ),
    "normal-prior": Variant(
        "Tab. 5", "the rate is KL to N(0, I)", lambda config: _model(config, latent_prior="normal")
    ),
    "mse": Variant(
        "Tab. 5",
        "encoder and prior with a squared error, then a diffusion decoder",
        lambda config: _model(
            dataclasses.replace(config, train_decoder=config.train), reconstruction="mse-then-diffusion"
        ),
    ),
    "single-stage": Variant(
        "App. B, 1", "the prior is the base model; the decoder's weighting shifted to noise", _shifted_single_stage
    ),
    "single-stage-logistic": Variant(
        "App. B, 2", "the same with λ_z(0) drawn from a logistic and told to the decoder", _logistic_single_stage
    ),
    "pixels": Variant("Tab. 1", "diffusion of pixels, without a latent", _pixels),
    "kl-autoencoder": Variant(
        "Tab. 1", "a KL autoencoder, then a base model: as Latent Diffusion, without its adversary", _kl_autoencoder
    ),
}
