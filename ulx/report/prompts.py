"""The sections of a report on whether samples follow their prompts."""

from typing import Any

from ulx.metrics.entries import plus_minus
from ulx.report import figures, page
from ulx.report.run import Reported

__all__ = ["prompted"]


def prompted(run: Reported, metrics: dict[str, Any]) -> list[str]:
    """Prompts beside samples, and what guidance does."""
    assert run.evaluation is not None
    pictures, alignment, held = run.evaluation.pictures, metrics["alignment"], metrics["held_out_prompts"]
    how = f"Guidance {held['guidance_scale']:g}, NFE {held['nfe']}."
    titles = {
        "training": "Captions of training images: the image above, samples below.",
        "held_out": "Captions of held-out images, which the model never saw: the image above, samples below.",
        "own": "Prompts that are no caption of any image, or not of one that looks so.",
    }
    grids = []
    for name, text in titles.items():
        if f"{name}_prompts" in pictures:
            samples = list(pictures[f"{name}_prompts_samples"].swapaxes(0, 1))
            real = [pictures[f"{name}_prompts_real"]] if f"{name}_prompts_real" in pictures else []
            captions = pictures[f"{name}_prompts"].tolist()
            grids += [f"<p>{text}</p>", run.shown(f"{name}_prompts", [*real, *samples], captions)]
    rows = alignment["by_guidance"]
    scales = [float(scale) for scale in rows]
    scores = [rows[scale]["retrieval"] for scale in rows]
    chance = rows["1"]["shuffled_prompts"]
    ceilings = {name.replace("_", " "): score for name, score in alignment["ceilings"].items() if "clip" not in name}
    distances = [rows[scale][run.distance]["value"] for scale in rows]
    plot = lambda dark: figures.guidance(  # noqa: E731
        scales, scores, distances, levels=ceilings | {"shuffled prompts": chance}, distance=run.distance, dark=dark
    )
    real = ""
    if "real images" in ceilings:
        real = f"These images themselves find others of their kind in {plus_minus(ceilings['real images'])}. "
    own, shuffled = plus_minus(rows["1"]["retrieval"]), plus_minus(chance)
    unseen, unseen_shuffled = plus_minus(held["retrieval"]), plus_minus(held["shuffled_prompts"])
    found = (
        f"<p>The nearest training image is of the prompt's kind for {own} of the samples without guidance; shuffled "
        f"prompts would give {shuffled}. {real}Reconstructions of the prompts' own images, which may find their "
        f"originals, find their kind in {plus_minus(ceilings['reconstructions'])} of the cases. Of the captions of "
        f"held-out images, guided by {held['guidance_scale']:g}, {unseen} (shuffled {unseen_shuffled}), with held-out "
        "images among those that can be found.</p>"
    )
    return [
        page.section("Prompts and samples", f"<p>{how}</p>", *grids),
        page.section(
            "Do samples follow their prompts?",
            found,
            run.plotted("guidance", plot, f"Retrieval score and {run.distance} against the guidance scale."),
        ),
    ]
