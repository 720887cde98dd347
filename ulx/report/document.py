"""The page itself, `report.html`, self-contained, and its pictures and plots under `figures/`.

Reads nothing but the run's folder: config.json, dataset.json, stage1.jsonl, stage2.jsonl, evaluation/. What is not
there yet is said on the page.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ulx.aside import write_aside
from ulx.config import Config, differences
from ulx.data.pixels import to_float
from ulx.metrics.entries import number, plus_minus
from ulx.metrics.images import psnr
from ulx.progress import duration
from ulx.report import figures, page, text
from ulx.report.prompts import prompted
from ulx.report.run import Reported, again
from ulx.report.text import si, solver_in_words
from ulx.stages import latent_noise

__all__ = ["write"]

TITLES = {"stage1": "Stage 1", "decoder": "The decoder", "stage2": "Stage 2"}

Metrics = dict[str, Any]


def write(path: Path) -> Path:
    """Write the report of the run in `path`; returns the path of `report.html`.

    Raises FileNotFoundError or NotADirectoryError for a folder that is no run, ValueError for a file of it that
    cannot be read or lacks something, OSError if the report cannot be written.
    """
    run = Reported.read(path)
    (path / "figures").mkdir(exist_ok=True)
    try:
        body = [_head(run), *_evaluated(run), _curves(run), _cost(run), _settings(run)]
    except KeyError as error:
        raise ValueError(again(path, f"lacks {error}")) from error
    body += [text.definitions(dataclasses.replace(run.config, loss_factor=run.loss_factor)), _foot(run)]
    report = path / "report.html"
    with write_aside(report) as aside:
        aside.write_text(page.document(f"{path.name} · ulx", body), encoding="utf-8")
    return report


def _head(run: Reported) -> str:
    data, config = run.dataset, run.config
    variant = "" if config.variant == "unified" else f", variant “{escape(config.variant)}”,"
    target = config.rate.target_bits_per_pixel
    controlled = "" if target is None else f" (adapted for {target:g} bits/pixel)"
    lines = [
        f"<h1>{escape(run.path.name)}</h1>",
        f'<p class="soft">Unified Latents{variant} on {escape(data["name"])}, '
        f"{data['resolution']}×{data['resolution']} pixels: "
        f"{data['train']:,} training and {data['validation']:,} held-out {config.data.unit}, "
        f"{len(data['class_names'])} classes. "
        f"Loss factor {run.loss_factor:.4g}{controlled}, sigmoid bias {config.decoder_weighting.bias:.3g}.</p>",
    ]
    for stage, train in config.train_configs.items():
        log = run.logs.get(stage)
        if not log:
            lines.append(page.note(f"{TITLES[stage]} has no {stage}.jsonl: it has not been trained yet."))
        elif log[-1]["step"] < train.steps:
            lines.append(page.note(f"{TITLES[stage]} is at step {log[-1]['step']:,} of {train.steps:,}."))
    if run.evaluation is None:
        lines.append(
            page.note("No evaluation yet, so no bits, distances and pictures: they come at the end of training.")
        )
    return "\n".join([*lines, '<div class="cards">', *_cards(run), "</div>"])


def _too_few(distance: Metrics, run: Reported) -> str:
    """What stands beside a distance of too few examples. Of clips there are often a few dozen."""
    if not distance["rank_deficient"]:
        return ""
    return f". N is too small: biased{', and noise' if run.config.data.clips else ''}"


def _cards(run: Reported) -> list[str]:
    cards = []
    if run.evaluation is not None:
        metrics = run.evaluation.metrics
        bits, dims, decibel = metrics["bits_per_pixel"], metrics["bits_per_latent_dim"], metrics["psnr"]
        mean, name = metrics["psnr_of_mean_training_image"], run.distance
        base, prior = metrics[name]["base"], metrics[name]["prior"]
        cards = [
            page.card(
                "Held-out rate, bits/pixel",
                plus_minus(bits),
                f"{plus_minus(dims)} bits per latent dimension; {bits['n']:,} {run.config.data.unit}, EMA weights",
            ),
            page.card(
                "Held-out PSNR, dB", plus_minus(decibel), f"the mean training example has {number(mean['value'])} dB"
            ),
            page.card(
                f"{name}, base model",
                number(base["value"]),
                f"raw prior {number(prior['value'])}; N = {base['n']:,}, NFE {base['nfe']}, "
                + _guidance(metrics["sampler"])
                + _too_few(base, run)
                + ("" if metrics["weights"] == "EMA" else f". Weights: {metrics['weights']}"),
                "good" if base["value"] < prior["value"] else "bad",
            ),
        ]
    if run.collapsed is not None:
        last = run.logs["stage1"][-1]
        noise = latent_noise(run.config, last)
        small = f"its standard deviation over images ends at {last['latent_std']:.2f}; its noise has {noise:.2f}"
        if run.evaluation is not None:
            small += f"; swapping latents moves PSNR by {plus_minus(run.evaluation.metrics['swap']['gap'])} dB"
        cards.append(
            page.card("Latent", "collapsed" if run.collapsed else "alive", small, "bad" if run.collapsed else "good")
        )
    return cards


def _guidance(sampler: dict[str, Any]) -> str:
    """Of the samples that are measured."""
    scale = sampler["guidance_scale"]
    return "no guidance" if scale == 1 else f"guidance {scale:g}{_interval(sampler)}"


def _interval(guided: dict[str, Any]) -> str:
    interval = guided.get("guidance_interval")
    return f", guided for λ from {interval[0]:g} to {interval[1]:g}" if interval else ""


def _evaluated(run: Reported) -> list[str]:
    """The sections that stand on the evaluation."""
    if run.evaluation is None:
        return []
    metrics, pictures = run.evaluation.metrics, run.evaluation.pictures
    sampler = metrics["sampler"]
    steps = solver_in_words(sampler, "latent")
    decibels = [
        f"{value:.1f} dB"
        for value in np.asarray(psnr(*map(to_float, (pictures["originals"], pictures["reconstructions"]))))
    ]
    distance = run.distance
    nfe = f"NFE {metrics[distance]['base']['nfe']}"
    of_base = [pictures["base_samples"]]
    kind = "Captions" if "base_captions" in pictures else "Classes"
    if run.given:
        of_base = [pictures["originals"][: len(of_base[0])], *of_base]
    # The first image got the latent of the last one, which need not be among the pictures.
    swap = [pictures["originals"][1:], pictures["originals"][:-1], pictures["swapped"][1:]]
    return [
        page.section(
            "Reconstructions",
            f"<p>Held-out {run.config.data.unit} above, what the diffusion decoder makes of their latents below.</p>",
            run.shown("reconstructions", [pictures["originals"], pictures["reconstructions"]], decibels),
        ),
        page.section(
            "Continuations by the base model" if run.given else "Samples of the base model",
            *([_next_frames(run, metrics["continuation"])] if run.given else []),
            f"<p>{_guidance(sampler).capitalize()}, {nfe} ({steps}) and the decoder's {sampler['decoder_nfe']}. "
            f"{kind}: {sampler['labels']}. "
            f"These are what {distance} measures.</p>",
            run.shown("base_samples", of_base, () if run.given else run.captions("base")),
        ),
        _guided(run, metrics["guided_samples"]) if "guided_samples" in metrics else "",
        *(prompted(run, metrics) if "alignment" in metrics else []),
        page.section(
            "Samples of the raw prior",
            f"<p>The stage-1 prior measures bits; it is not meant to generate. NFE "
            f"{metrics[distance]['prior']['nfe']}.</p>",
            run.shown("prior_samples", [pictures["prior_samples"]]),
        ),
        _copies(run, metrics["copies"]) if "copies" in metrics else "",
        _swap(run, metrics["swap"], swap) if len(swap[0]) else "",
        _rate(run, metrics),
        page.section("All metrics", page.table(text.METRICS_HEADER, text.metrics_rows(metrics))),
    ]


def _copies(run: Reported, found: Metrics) -> str:
    assert run.evaluation is not None
    metrics, pictures = run.evaluation.metrics, run.evaluation.pictures
    return page.section(
        "Are samples copies?",
        f"<p>{escape(text.copies(found, metrics['held_out']['n']))}</p>",
        "<p>Base samples above, the training image nearest to each below.</p>",
        run.shown("nearest", [pictures["base_samples"], pictures["nearest"]]),
    )


def _next_frames(run: Reported, found: Metrics) -> str:
    own, repeated, gap = (plus_minus(found[name]) for name in ("psnr", "psnr_of_last_frame", "gap"))
    return (
        f"<p>Held-out clips above, below what follows from their first {run.given} frames, which have a border. The "
        f"frames after these come to {own} dB of the real ones; the last given frame, repeated, to {repeated} dB: a "
        f"gap of {gap} dB over {found['gap']['n']:,} clips.</p>"
    )


def _guided(run: Reported, guided: Metrics) -> str:
    assert run.evaluation is not None
    pictures, labels = run.evaluation.pictures, run.captions("guided")
    by_class = np.argsort(pictures["guided_labels"], kind="stable")
    return page.section(
        f"Samples with guidance {guided['guidance_scale']:g}",
        f"<p>The classes in turn, NFE {guided['nfe']}{_interval(guided)}.</p>",
        run.shown("guided_samples", [pictures["guided_samples"][by_class]], [labels[i] for i in by_class]),
    )


def _swap(run: Reported, swap: Metrics, stacked: Sequence[np.ndarray]) -> str:
    return page.section(
        "Whose image is it? The swap test",
        "<p>Top: one of them. Middle: the one before it. Bottom: decoded from the middle one's latent with the top "
        "one's noise. A latent that is used gives back the middle one: PSNR "
        f"{plus_minus(swap['psnr_to_the_latents_image'])} dB to the latent's own, "
        f"{plus_minus(swap['psnr_to_the_other'])} dB to the other, a gap of {plus_minus(swap['gap'])} dB over "
        f"{swap['gap']['n']:,} {run.config.data.unit}.</p>",
        run.shown("swap", [images[:16] for images in stacked]),
    )


def _rate(run: Reported, metrics: Metrics) -> str:
    levels, total = metrics["rate_by_level"], metrics["bits_per_pixel"]
    terminal = metrics["terminal_bits_per_pixel"]
    bits, edges = levels["bits_per_pixel"], levels["logsnr_edges"]
    draw = lambda dark: figures.rate_by_level(edges, bits, levels["standard_error"], dark=dark)  # noqa: E731
    text = (
        f"The area is {number(sum(bits))} bits/pixel; with the terminal KL, {terminal:.2g}, it is the rate, "
        f"{plus_minus(total)}. Bars: one standard error of each slice."
    )
    return page.section("Rate by noise level", f'<div class="plots">{run.plotted("rate_by_level", draw, text)}</div>')


def _curves(run: Reported) -> str:
    """Loss, bits and the latent's spread over images seen."""
    held_out = {}
    if run.evaluation is not None:
        held_out = {"rate, held out": float(run.evaluation.metrics["bits_per_pixel"]["value"])}
    log = run.logs.get("stage1")
    noise = {"its noise": latent_noise(run.config, log[-1] if log else {})}
    names = {"loss": "loss", "decoder": "decoder, weighted L_x", "rate": "rate, L_z"}
    plots = [
        _curve(run, "stage1", "stage1_bits", names, "bits/pixel", held_out, "Stage 1: L_z + L_x."),
        _curve(
            run, "stage1", "stage1_latent", {"latent_std": "standard deviation"}, "z_clean", noise,
            "Stage 1: the latent's standard deviation over the images of a batch. Near its noise it has collapsed.",
        ),
        _curve(
            run, "stage1", "stage1_loss_factor", {"loss_factor": "c_lf", "felt_loss_factor": "c_lf as felt"},
            "loss factor", {}, "Rate control.",
        ),
        _curve(run, "decoder", "decoder_loss", {"loss": "loss"}, "bits/pixel", {}, "The decoder alone: L_x."),
        _curve(run, "stage2", "stage2_loss", {"loss": "loss"}, "weighted bits/pixel", {}, "Stage 2: sigmoid-weighted."),
    ]  # fmt: skip
    html = [plot for plot in plots if plot]
    return page.section("Training", '<div class="plots">', *html, "</div>") if html else ""


def _curve(
    run: Reported, stage: str, name: str, keys: dict[str, str], ylabel: str, levels: dict[str, float], text: str
) -> str:
    log = run.logs.get(stage, [])
    lines = {label: np.array([line[key] for line in log]) for key, label in keys.items() if all(key in x for x in log)}
    if not log or not lines:
        return ""
    train = run.config.train_configs[stage]
    seen = np.array([line["step"] for line in log]) * train.batch_size
    warmup = None
    if stage == "stage1":
        first, last = run.config.prior_warmup
        warmup = (first * train.batch_size, last * train.batch_size)
        text += " Shaded: the prior's gradient into the encoder rises from 0 to 1."
    draw = lambda dark: figures.curves(seen, lines, ylabel=ylabel, dark=dark, levels=levels, span=warmup)  # noqa: E731
    if (window := figures.window(len(seen))) > 1:
        text += f" Thin: as logged; thick: mean over {window} lines of the log."
    return run.plotted(name, draw, text)


def _cost(run: Reported) -> str:
    rows, unit = [], run.config.data.unit
    for stage, train in run.config.train_configs.items():
        if log := run.logs.get(stage):
            seen, seconds = log[-1]["step"] * train.batch_size, log[-1]["time"]
            rate = f"{seen / seconds:.3g} {unit}/s, compiling included" if seconds else ""
            rows.append([TITLES[stage], f"{seen:,} {unit} in {duration(seconds)}", rate])
    cost = run.evaluation.metrics.get("cost") if run.evaluation else None
    if run.evaluation is None or cost is None:
        rows.append(["FLOPs", "counted at the end of training", ""])
        return page.section("Cost", page.table([], rows))
    metrics, forward, parameters = run.evaluation.metrics, cost["forward_flops_per_image"], cost["parameters"]
    latent_nfe, decoder_nfe = metrics[run.distance]["base"]["nfe"], metrics["sampler"]["decoder_nfe"]
    sample = latent_nfe * forward["base"] + decoder_nfe * forward["decoder"]
    rows += [
        [TITLES[stage], f"{si(cost[f'training_flops_{stage}'])}FLOP of training", "3 × forward of what is trained"]
        for stage in run.config.stages
    ]
    rows += [
        ["One sample", f"{si(sample)}FLOP", f"base NFE {latent_nfe}, decoder NFE {decoder_nfe}"],
        [
            "Whole job",
            duration(sum(cost[f"seconds_{part}"] for part in (*run.config.stages, "evaluation"))),
            f"training and the evaluation; {cost['device']}",
        ],
    ]
    networks = [[part, si(count), f"{si(forward[part])}FLOP"] for part, count in parameters.items()]
    # In a single stage the prior generates: it is both.
    once = {part: count for part, count in parameters.items() if part != "base" or not run.config.single_stage}
    networks.append(["all", si(sum(once.values())), ""])
    return page.section(
        "Cost", page.table([], rows), page.table(["network", "parameters", "one forward pass, one image"], networks)
    )


def _settings(run: Reported) -> str:
    everything = text.settings(run.config)
    changed = [line.split(": ", 1) for line in differences(Config(), run.config)]
    path = escape(shlex.quote(str(run.path)))
    commands = (
        [f"{name} {path} --frames {2 * run.config.data.frames}" for name in ("sample", "predict")]
        if run.given
        else [f"sample {path}"]
        if run.config.data.clips
        else [f"sample {path} --guidance-scale 2", f"reconstruct {path} FOLDER", f"encode {path} FOLDER"]
    )
    return page.section(
        "Settings",
        "<p>Away from the defaults of <code>ulx.config.Config</code>, as default → this run:</p>",
        page.table([], [[name, value.replace(" -> ", " → ")] for name, value in changed]),
        f"<details><summary>All {len(everything)} settings</summary>{page.table([], everything)}</details>",
        "<pre>" + "\n".join(f"python -m ulx.{command}" for command in commands) + "</pre>",
    )


def _foot(run: Reported) -> str:
    credit = run.dataset["attribution"]
    if credit:
        (run.path / "figures" / "ATTRIBUTION.txt").write_text(credit + "\n", encoding="utf-8")
    text = f"{credit} " if credit else ""
    return f'<p class="soft">{escape(text)}Made with ulx, after Unified Latents (arXiv 2602.17270).</p>'
