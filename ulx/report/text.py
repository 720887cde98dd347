"""The report's words and numbers: how values are written, the verdict on copies, the table of metrics, definitions."""

import dataclasses
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from ulx import weightings
from ulx.config import Config
from ulx.metrics.entries import number, rank_remark, rounded
from ulx.report import page

__all__ = [
    "FRECHET",
    "METRICS_HEADER",
    "copies",
    "definitions",
    "metrics_rows",
    "settings",
    "si",
    "solver_in_words",
]

Metric = Mapping[str, Any]

FRECHET = ("fd_efflite0", "fvd", "fid", "clean_fid")
"""Fréchet distances that a run may have, by the network's name of them; the first one that it has is its main one."""
NEXT_FRAMES = {
    "psnr": "PSNR of the base model's",
    "psnr_of_last_frame": "PSNR of the last given one repeated",
    "gap": "gap",
}
METRICS_HEADER = ("metric", "value", "standard error", "N", "NFE", "measured")


def si(value: float) -> str:
    """1234567 -> '1.23 M', ready for a unit."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def copies(found: Metric, held_out: int) -> str:
    """The verdict on copies in words, with its numbers.

    Held-out images are no copies, whatever the test says of them: their share is its rate of false alarms.
    """
    samples, alarm, n = found["share_of_samples"], found["share_of_held_out_images"], found["n"]
    noise = math.sqrt(_variance(samples, n) + _variance(alarm, held_out))
    if alarm > 0.5:
        verdict = (
            "The test is blind here: the autoencoder's own error is so large that held-out images pass as copies too."
        )
    elif samples == 0:
        verdict = "No sample is a copy."
    elif samples - alarm <= 2 * noise:
        verdict = (
            "Nothing says that samples are copies: they come no nearer to training images than held-out images do."
        )
    else:
        verdict = "SOME SAMPLES MAY BE COPIES: more of them than of held-out images are this near to a training image."
    return (
        f"{verdict} Of {n:,} base samples {samples:.1%} are as near to a training image as the reconstruction of a "
        f"training image typically is to its original ({number(found['threshold'])}); of {held_out:,} held-out images, "
        f"which are no copies of any, {alarm:.1%}. The median distance to the nearest of "
        f"{found['n_reference']:,} training images is {number(found['median_distance_of_samples'])} for samples and "
        f"{number(found['median_distance_of_held_out_images'])} for held-out images ({found['space']})."
    )


def _variance(share: float, n: int) -> float:
    """Of a share of n, with one more of either kind (Agresti and Coull): else a share of 0 would pass for exact."""
    p = (share * n + 1) / (n + 2)
    return p * (1 - p) / (n + 2)


def solver_in_words(sampler: Metric, part: str) -> str:
    """The solver of the "latent" or the "decoder": "heun, 16 steps", "euler, 16 steps, churn 1", "tsit5, …"; of a
    decoder that is not solved "one call"."""
    if f"{part}_steps" not in sampler:
        return sampler[part]
    if sampler[part] == "tsit5":
        return f"tsit5, tolerance {sampler[f'{part}_tolerance']:g}"
    churn = sampler.get(f"{part}_churn", 0)  # not in a run evaluated before there was any
    return f"{sampler[part]}, {sampler[f'{part}_steps']} steps" + (f", churn {churn:g}" if churn else "")


def _flow_rows(metrics: Metric) -> list[list[str]]:
    flow = metrics.get("flow")
    if flow is None:
        return []
    rate = flow["bits_per_pixel"]
    how = f"−h(q) − log p(z_0) by the prior's probability flow, {rate['probes']} Hutchinson probes"
    return [
        _row("bits/pixel under the prior's flow", rate, f"{how}, {rate['solver_steps']} steps"),
        _row("bound less flow, the same images", flow["bound_less_flow"], "of two models: no gap of the bound"),
    ]


def metrics_rows(metrics: Metric) -> list[list[str]]:
    """The rows under METRICS_HEADER."""
    bits, sampler = metrics["bits_per_pixel"], metrics["sampler"]
    base, unweighted = metrics["bits_per_pixel_base"], metrics["decoder_bits_per_pixel"]
    decoder = f"decoder: {solver_in_words(sampler, 'decoder')}"
    swap = metrics["swap"]
    rows = [
        _row("bits/pixel, held out", bits, _estimated("L_z", bits)),
        _row(
            "bits per latent dimension",
            metrics["bits_per_latent_dim"],
            f"latent {'×'.join(map(str, metrics['latent_shape']))}",
        ),
        ["of it: terminal KL, bits/pixel", f"{metrics['terminal_bits_per_pixel']:.2g}", "", "", "", "KL at λ_z(1)"],
        _row("bits/pixel under the base model", base, f"{_estimated('L_z', base)}; labels: {base['labels']}"),
        _row(
            "decoder bits/pixel",
            unweighted,
            f"{_estimated('L_x', unweighted)}; leaves out {unweighted['leaves_out'].replace('-', '−')}",
        ),
        *_flow_rows(metrics),
        _row("PSNR, dB", metrics["psnr"], decoder),
        *([_row("SSIM", metrics["ssim"], decoder)] if "ssim" in metrics else []),
        *([_row("LPIPS (VGG16)", metrics["lpips_vgg16"], decoder)] if "lpips_vgg16" in metrics else []),
        _row(
            "PSNR of the mean training image, dB", metrics["psnr_of_mean_training_image"], "what no latent would give"
        ),
        _row("swap: PSNR to the latent's image, dB", swap["psnr_to_the_latents_image"], ""),
        _row("swap: PSNR to the other image, dB", swap["psnr_to_the_other"], ""),
        _row("swap: gap, dB", swap["gap"], "alive: well above 0"),
    ]
    for metric in FRECHET:
        for name, distance in metrics.get(metric, {}).items():
            remark = f"against {distance['against']}, N = {distance['n_reference']:,}"
            remark = "; ".join(filter(None, (remark, rank_remark(distance))))
            rows.append(_row(f"{metric}, {name.replace('_', ' ')}", distance, remark))
    for name, against in metrics.get("against_held_out_images", {}).items():  # not in a run evaluated before
        for what, metric in against.items():
            remark = f"against held-out images, N = {metric['n_a']:,}"
            rows.append(_row(f"{what}, {name}", metric | {"n": metric["n_b"]}, remark))
    for name, metric in metrics.get("continuation", {}).items():
        rows.append(_row(f"next frames, {NEXT_FRAMES[name]}, dB", metric, "the frames after the given ones"))
    found = metrics.get("copies")  # of clips there are none
    rows += (
        []
        if found is None
        else [
            [f"share of {what} near a training image", f"{share:.1%}", "", f"{n:,}", "", found["space"]]
            for what, share, n in (
                ("samples", found["share_of_samples"], found["n"]),
                ("held-out images", found["share_of_held_out_images"], metrics["held_out"]["n"]),
            )
        ]
    )
    return rows


def _estimated(term: str, metric: Metric) -> str:
    return f"{term}, {metric['weighting']}, {metric['levels']} noise levels × {metric['draws']} draws per image"


def _row(name: str, metric: Metric, measured: str) -> list[str]:
    infinite = f" (and {metric['infinite']} infinite)" if "infinite" in metric else ""
    return [name, *rounded(metric), f"{metric['n']:,}{infinite}", str(metric.get("nfe", "")), measured]


def settings(config: Any, where: str = "") -> list[list[str]]:
    """Every field of a configuration with its value."""
    rows = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        rows += settings(value, f"{where}{field.name}.") if nested else [[where + field.name, repr(value)]]
    return rows


def definitions(config: Config) -> str:
    """What every number on the page is, as a section of it."""
    weighting = config.decoder_weighting
    cutoff = ""
    if weighting.factor > 1:
        value = weightings.cutoff(float(weighting.bias), float(weighting.factor))
        cutoff = f" What shows only above a log-SNR of {value:.2f} is not worth its bits."
    text = DEFINITIONS.format(
        logsnr_0=config.model.logsnr_0,
        capacity=0.5 * math.log2(1 + math.exp(config.model.logsnr_0)),
        factor=weighting.factor,
        bias=weighting.bias,
        cutoff=cutoff,
    )
    entries = (entry.split("\n", 1) for entry in text.strip().split("\n\n"))
    listed = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in entries)
    return page.section("What the numbers are", f"<dl>{listed}</dl>")


DEFINITIONS = """
bits/pixel, the rate
The prior's bound L_z on what the latent z_0 costs: its diffusion loss with weight w = 1 plus the terminal KL, in nats,
divided by height · width · ln 2, and by the frames of a clip. On held-out images, with EMA weights. An upper bound on
KL[q(z_0|x) ‖ p(z_0)]; no file was written. The standard error is over images and holds the estimator's noise too.

Bits per latent dimension
The same nats per dimension of the latent. With its noise, at λ_z(0) = {logsnr_0:g}, a unit-variance Gaussian latent
carries {capacity:.2f} bits per dimension.

bits/pixel under the base model
The same latents' L_z with the base model in the prior's place, and with w = 1 whatever it was trained with: as valid a
bound. It is asked without a label, so that no bits for the class are missing; with one if it was never trained without.

What the bits leave out
Everything the decoder would need to restore the exact pixels. The training curve of L_x is weighted by
c_lf · sigmoid(b − λ), c_lf = {factor:g}, b = {bias:.3g}: a loss, not a bound.{cutoff} It also leaves out x's terminal
KL and −log p(x | x_0).

Decoder bits/pixel
L_x with w = 1. It still leaves out x's terminal KL and −log p(x | x_0): with the rate it adds up to no codelength of x.

Rate by noise level
Where L_z comes from: the noise levels λ = log(α²/σ²) of the latent, in slices of equal t, least noise at the right. The
height is bits/pixel per unit of λ, so areas are bits/pixel and add up to the rate.

PSNR
10 log10(peak²/MSE) of each reconstruction, averaged over images. The decoder is a diffusion model sampled from z_0, the
latent with its noise: two decodings of an image differ.

SSIM
Structural similarity of each reconstruction in [0, 1] (an 11×11 Gaussian window of σ 1.5 within the image, K₁ = 0.01,
K₂ = 0.03), averaged over the channels and over images. 1 is equal.

fd_efflite0
The Fréchet distance between Gaussians fitted to the 1,280 features of an ImageNet EfficientNet-lite0. It is not FID,
which takes the features of InceptionV3: the two cannot be compared. Lower is better.

Rank-deficient
With N at or below the number of features (1,280, of fvd 400, of fid 2,048) on either side a covariance has not full
rank and the distance is far too large, the more so the smaller N. Such a value can be compared with others of the same
N and reference, and with nothing else.

fd_efflite0 of reconstructions and of held-out images
Reconstructions against the same held-out originals, and, as some papers do, against the training images. Held-out
images against the training images: what perfect samples would get at that N.

fvd
The Fréchet distance of the 400 logits of I3D, trained on Kinetics-400, of whole clips: given frames count. Samples are
continuations of the held-out clips' first frames, and are compared with these clips. kd_i3d is the kernel distance of
the same logits, a clip and its own continuation or reconstruction left out.

fid, clean_fid, kid, clean_kid
The same distances by the features of InceptionV3, from weights that the user named: shown images as FID does, or as
Clean-FID does.

LPIPS
A learned distance of each reconstruction from its original in the activations of VGG16, averaged over images. Lower is
better.

kd_efflite0
The kernel distance on the same features against the held-out images: KID's unbiased estimator (of all pairs but an
image and its own reconstruction, with a jackknife error), but not KID, which takes the features of InceptionV3. Around
0 for perfect samples, at any N.

Precision and recall
With a ball around each image's features that reaches its third neighbour in its set: the share of samples within the
held-out images' balls, and the share of held-out images within the samples'. They move with N.

Base model and raw prior
The prior is trained together with encoder and decoder on the plain bound, and measures bits. The base model is trained
afterwards on the frozen encoder's latents with a sigmoid weighting, and generates. Sampling either stops at λ_z(0); the
decoder gets the noisy z_0.

NFE
Network evaluations for one image. A Heun step has two, a guided step twice as many. The decoder's come on top.

Guidance
Classifier-free: x̂ is moved away from the prediction without a label. 1 is off, as it is for distances where no other
scale is named.

Copies
A sample counts as near a training image if they are no further apart than a training image and its own reconstruction
typically are (the median): nearer to a copy the decoder cannot come.

Alive, collapsed
Collapsed: at some time after the warm-up the latent's standard deviation over images was down to that of its own noise,
so that the decoder could learn nothing from it. The swap test asks the decoder itself.

FLOPs
Linear layers, attention products and convolutions; a multiply and an add are two. Training is three forward passes.
"""
