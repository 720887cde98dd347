"""Does the proxy (`ulx.proxy`) rank autoencoders as base models trained on them do?

    python benchmarks/bitrate_vs_fid.py          first: autoencoders, and base models of two sizes on each
    python benchmarks/gfid_proxy.py

Measures the proxy on every autoencoder of bitrate_vs_fid.py and sets its distance against that of the base models
there: Spearman's rank correlation, beside that of the numbers that an autoencoder has anyway (PSNR, the distance of its
reconstructions, its rate). Points in the results file with the same settings are not measured again. Leaves
benchmarks/results/gfid_proxy.jsonl, a table and a plot.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitrate_vs_fid
import numpy as np
import points

if TYPE_CHECKING:
    from ulx.config import Config
    from ulx.proxy import Recipe

MEASURES = {
    "proxy": lambda point: point["proxy"]["fd_efflite0"]["value"],
    "fd reconstructions": lambda point: point["sweep"]["large"]["fd_efflite0"]["reconstruction"]["value"],
    "PSNR": lambda point: -point["sweep"]["large"]["psnr"]["value"],
    "bits/pixel": lambda point: point["sweep"]["large"]["bits_per_pixel"]["value"],
}
"""What may tell how well an autoencoder can be generated from: lower is meant to be better."""


@dataclasses.dataclass(frozen=True)
class Settings(points.Settings):
    """The proxy against the base models of bitrate_vs_fid.py, run with the same preset."""

    pairs: tuple[tuple[float, float], ...] | None = None
    """The autoencoders' b and c_lf; by default those of bitrate_vs_fid.py."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the autoencoders."""


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation, without ties."""
    x, y = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def proxy_of(config: "Config", file: Path) -> dict[str, Any]:
    """The proxy of one autoencoder: as it is in `file` for this recipe, or measured and added to it."""
    from ulx import proxy, tokenizers
    from ulx.data import open_dataset

    recipe = dataclasses.asdict(proxy.RECIPE)
    known = points.find([point for point in points.read(file) if is_of(point, proxy.RECIPE)], config)
    if known is not None:
        return known
    tokenizer = tokenizers.load(str(config.path))
    found = proxy.measure(tokenizer, open_dataset(config.data), proxy.RECIPE, cache_dir=config.data.cache_dir)
    return points.add({"proxy": found.metrics, "recipe": recipe}, config, file)


def is_of(point: dict[str, Any], recipe: "Recipe") -> bool:
    """Whether the point's recipe is this one; fields that came later count at their defaults."""
    from ulx.config import from_json
    from ulx.proxy import Recipe

    try:
        return from_json(json.dumps(point["recipe"]), Recipe) == recipe
    except (AttributeError, KeyError, TypeError, ValueError):  # of other fields than there are now, or a text
        return False


def generated(point: dict[str, Any], base: str) -> float:
    return point["sweep"][base]["fd_efflite0"]["base"]["value"]


def table(shown: list[dict[str, Any]]) -> str:
    """The points, and below them the correlations."""
    rows = [
        [
            f"{point['config']['sigmoid_bias']:g}",
            f"{point['config']['loss_factor']:g}",
            f"{MEASURES['bits/pixel'](point):.3f}",
            f"{MEASURES['proxy'](point):.1f}",
            f"{generated(point, 'small'):.1f}",
            f"{generated(point, 'large'):.1f}",
            point["date"],
        ]
        for point in shown
    ]
    columns = ("b", "c_lf", "bits/pixel", "fd proxy", "fd small base", "fd large base", "date")
    correlations = []
    for name, value in MEASURES.items():
        own = [value(point) for point in shown]
        found = [spearman(own, [generated(point, base) for point in shown]) for base in ("small", "large")]
        correlations.append([f"{name}{' (higher is better)' * (name == 'PSNR')}", *(f"{each:+.2f}" for each in found)])
    of = ("rank correlation of", "with fd small base", "with fd large base")
    return f"{points.markdown(columns, rows)}\n\n{points.markdown(of, correlations)}"


def plot(shown: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    for base in ("small", "large"):
        axis.scatter(
            [MEASURES["proxy"](point) for point in shown],
            [generated(point, base) for point in shown],
            label=f"{base} base",
        )
    axis.set(xlabel="fd_efflite0 of the proxy", ylabel="fd_efflite0 of the base model")
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measured(settings: Settings, file: Path) -> Iterator[list[dict[str, Any]]]:
    """All of them at once: fewer have no ranking to speak of."""
    of_bases = settings.file("bitrate_vs_fid")
    known = points.read(of_bases)
    of_sweep = bitrate_vs_fid.Settings(settings.preset, settings.path, runs=settings.runs, pairs=settings.pairs)
    shown = []
    for seed in settings.seeds:
        for pair in of_sweep.all_pairs:
            configs = bitrate_vs_fid.configs_of(pair, seed, of_sweep)
            sweep = {size: points.find(known, config) for size, config in configs.items()}
            if None in sweep.values():
                raise ValueError(
                    f"b {pair[0]:g}, c_lf {pair[1]:g}, seed {seed} is not in {of_bases.name} yet: "
                    f"python benchmarks/bitrate_vs_fid.py {settings.options} first"
                )
            shown.append(proxy_of(configs["large"], file) | {"sweep": sweep})
    if len(shown) < 3:
        raise ValueError("fewer than three autoencoders have no ranking to speak of")
    yield sorted(shown, key=MEASURES["bits/pixel"])


def write(shown: list[dict[str, Any]], settings: Settings, file: Path) -> None:
    samples = shown[0]["proxy"]["fd_efflite0"]
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/gfid_proxy.py {settings.options}`: fd is fd_efflite0 of {samples['n']} "
        f"samples to the training images{points.too_few(samples)}, of the proxy's base model and of those of "
        "bitrate_vs_fid. Machine: "
        f"{points.machines(shown)}.\n\n{table(shown)}\n"
    )
    plot(shown, file.with_suffix(".png"))


def main() -> None:
    points.command(Settings, __doc__, "gfid_proxy", measured, write)


if __name__ == "__main__":
    main()
