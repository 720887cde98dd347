"""Losses, training step and sampler of Unified Latents in PyTorch, for the networks of torch_models: equal work, to
compare speed. AdamW is PyTorch's fused one. Example by example the same losses and gradients come out as ours
(tests/test_torch_models.py).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]
from torch_models import Autoencoder, UViT

from ulx import stages
from ulx.config import Config, TrainConfig
from ulx.schedules import Linear as LinearSchedule
from ulx.schedules import Schedule, image_schedule

__all__ = ["Trainer", "base_loss", "euler", "stage1_loss", "to_float"]

Noise = Callable[..., Tensor]
"""Standard normal numbers in a shape."""


def to_float(image: Tensor) -> Tensor:
    return image.float() / 127.5 - 1


def stage1_loss(config: Config, model: Autoencoder, noise: Noise) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """(image, prior's times, decoder's times, weight of the prior's gradient) -> bits per pixel (Alg. 1)."""
    latents = LinearSchedule(config.model.logsnr_0, config.model.logsnr_1)
    pixels = image_schedule(config.data.resolution)
    count, dims = math.prod(config.data.shape[:-1]), math.prod(model.latent_shape)
    weighting = config.decoder_weighting
    bias, factor = float(weighting.bias), float(weighting.factor)
    low, high = config.model.logsnr_1, config.model.logsnr_0

    def loss(image: Tensor, prior_t: Tensor, decoder_t: Tensor, prior_gradient: float) -> Tensor:
        x = to_float(image)
        z_clean = model.encoder(x).float()
        z_0 = noised(z_clean, torch.full_like(prior_t, high), noise(z_clean.shape))
        felt = z_clean.detach() + prior_gradient * (z_clean - z_clean.detach())
        prior = diffusion_loss(model.prior, felt, latents, lambda logsnr: 1.0, prior_t, noise)
        level = torch.tensor(low, device=x.device)
        alpha2, softplus = level.sigmoid(), F.softplus(level)
        terminal = 0.5 * (alpha2 * sum_squares(felt) + dims * (softplus - alpha2))
        decoder = diffusion_loss(
            lambda x_t, logsnr: model.decoder(x_t, logsnr, context=z_0),
            x,
            pixels,
            lambda logsnr: factor * (bias - logsnr).sigmoid(),
            decoder_t,
            noise,
        )
        return (prior + terminal + decoder).mean() / (count * math.log(2))

    return loss


def base_loss(config: Config, base: UViT, noise: Noise) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(z_clean, labels, times) -> weighted bits per pixel."""
    schedule, bias = stages.base_schedule(config), config.base_bias
    count = math.prod(config.data.shape[:-1])

    def loss(z_clean: Tensor, label: Tensor, t: Tensor) -> Tensor:
        told = {"label": label} if base.num_classes else {}
        denoise = lambda z_t, logsnr: base(z_t, logsnr, **told)  # noqa: E731
        weighting = lambda logsnr: (bias - logsnr).sigmoid()  # noqa: E731
        return diffusion_loss(denoise, z_clean, schedule, weighting, t, noise).mean() / (count * math.log(2))

    return loss


def diffusion_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    schedule: Schedule,
    weighting: Callable[[Tensor], Tensor | float],
    t: Tensor,
    noise: Noise,
) -> Tensor:
    logsnr, derivative = log_snr(schedule, t)
    x_t = noised(x, logsnr, noise(x.shape))
    x_hat = x_from_v(network(x_t, logsnr).float(), x_t, logsnr)
    return -derivative * logsnr.exp() / 2 * weighting(logsnr) * sum_squares(x - x_hat)


def log_snr(schedule: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(schedule, LinearSchedule):
        slope = schedule.logsnr_min - schedule.logsnr_max
        return schedule.logsnr_max + slope * t, torch.full_like(t, slope)
    low, high = schedule._angles
    angle = low + (high - low) * t
    return -2 * angle.tan().log() + schedule.shift, -4 * (high - low) / (2 * angle).sin()


def sum_squares(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def expand(per_example: Tensor, like: Tensor) -> Tensor:
    return per_example.view(-1, *(1,) * (like.ndim - 1))


def noised(x: Tensor, logsnr: Tensor, eps: Tensor) -> Tensor:
    level = expand(logsnr, x)
    return level.sigmoid().sqrt() * x + (-level).sigmoid().sqrt() * eps


def x_from_v(v: Tensor, z_t: Tensor, logsnr: Tensor) -> Tensor:
    level = expand(logsnr, z_t)
    return level.sigmoid().sqrt() * z_t - (-level).sigmoid().sqrt() * v


def euler(network: Callable[[Tensor, Tensor], Tensor], z: Tensor, grid: list[float]) -> Tensor:
    """DDIM from the first log-SNR of the grid to its last."""
    for here, there in itertools.pairwise(grid):
        logsnr = torch.full(z.shape[:1], here, device=z.device)
        x_hat = x_from_v(network(z, logsnr).float(), z, logsnr)
        alpha, sigma, alpha_there, sigma_there = (
            math.sqrt(1 / (1 + math.exp(-level))) for level in (here, -here, there, -there)
        )
        z = alpha_there * x_hat + sigma_there / sigma * (z - alpha * x_hat)
    return z


class Loss(Protocol):
    def __call__(self, *inputs: Any) -> Tensor: ...


class Trainer:
    """Steps of AdamW on a loss, clipped, with an average of the weights: what `ulx.training.make_step` does."""

    def __init__(self, model: nn.Module, loss: Loss, config: TrainConfig, *, autocast: torch.dtype | None = None):
        if config.optimizer != "adamw":
            raise ValueError(f"the writing in PyTorch trains by adamw alone, not by {config.optimizer}")
        self.model, self.loss, self.config, self.autocast = model, loss, config, autocast
        self.parameters = list(model.parameters())
        weights = [value for name, value in model.named_parameters() if name.endswith("weight")]
        others = [value for name, value in model.named_parameters() if not name.endswith("weight")]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, config.learning_rate, (0.9, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        self.average = [value.detach().clone() for value in self.parameters]

    def step(self, *inputs: Any) -> float:
        device = self.parameters[0].device.type
        with torch.autocast(device, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            loss = self.loss(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.config.ema_decay)
        return loss.item()
