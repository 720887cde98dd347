"""Compare two folders of images.

    python -m ulx.metrics DIR_A DIR_B
    python -m ulx.metrics real/ generated/ --resolution 256 --out card.json

DIR_A is the reference: real images, or the originals of reconstructions. Prints fd_efflite0 and kd_efflite0 (Fréchet
and kernel distance of EfficientNet-lite0's features; not FID and KID, whose features are InceptionV3's), precision and
recall, and, where both folders hold the same file names (whatever their suffixes), PSNR and SSIM of the pairs.
--inception-weights adds FID and KID, whose weights no package carries, and --lpips LPIPS of the pairs.
--out writes them as a card: each number with its definition and N, the network's hash, a hash of either folder's
pixels, how images were prepared, the version of ulx. Contact sheets written by ulx are left out.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulx.command_line import parse_arguments, run_command
from ulx.metrics import inception
from ulx.metrics.compare import compare
from ulx.metrics.inception import Resize
from ulx.report_text import plus_minus

__all__ = ["Options", "main", "table"]


@dataclasses.dataclass(frozen=True)
class Options:
    dir_a: Path
    """Folder of the reference: real images, or the originals. Subfolders included."""
    dir_b: Path
    """Folder of the images that are measured against it."""
    out: Path | None = None
    """The JSON file to write the card to; by default only the table is printed."""
    resolution: int | None = None
    """What the images of both folders are centre-cropped and resized to, as for training; by default they must be
    squares of one size."""
    inception_weights: Path | None = None
    """The file of FID's InceptionV3, pytorch-fid's state dict or jax-fid's pickle: FID and KID as well."""
    inception_resize: Resize = "tf1-bilinear"
    """How it is shown the images: "clean-bicubic" is Clean-FID's way, and its distances are called so."""
    lpips: bool = False
    """LPIPS of the pairs too; needs pip install "ulx[lpips]"."""
    batch_size: int = 64
    """Images per call of the network; changes no result beyond rounding."""
    overwrite: bool = False
    """Write over a card that exists."""

    def __post_init__(self):
        for name in ("resolution", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def run(options: Options) -> dict[str, Any]:
    """Print the table and write the card; returns it."""
    out = options.out
    if out is not None and out.exists() and (out.is_dir() or not options.overwrite):
        raise FileExistsError(
            f"{out} exists already: choose another --out" + ("" if out.is_dir() else ", or --overwrite")
        )
    weights = options.inception_weights
    card = compare(
        options.dir_a,
        options.dir_b,
        resolution=options.resolution,
        batch_size=options.batch_size,
        networks=[] if weights is None else [inception.load(weights, options.inception_resize)],
        with_lpips=options.lpips,
    )
    print(table(card))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_name(f"{out.name}.aside")
        aside.write_text(json.dumps(_json(card), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        aside.replace(out)
        print(f"-> {out}")
    return card


def table(card: dict[str, Any]) -> str:
    """The card's numbers as lines of text."""
    a, b = card["a"], card["b"]
    lines = [f"A {a['path']}: {a['n']:,} images; B {b['path']}: {b['n']:,}; {card['resolution']} pixels each way"]
    for folder in (a, b):
        if folder["contact_sheets_left_out"]:
            lines.append(f"left out of {folder['path']}: {', '.join(folder['contact_sheets_left_out'])}")
        if folder["enlarged"]:
            lines.append(f"{folder['enlarged']:,} images of {folder['path']} are smaller and were enlarged")
    width = max(13, *(len(name) + 2 for name in card["metrics"]))
    for name, metric in card["metrics"].items():
        remark = "rank-deficient, so biased: compare at equal N only" if metric.get("rank_deficient") else ""
        unit = " dB" if name == "psnr" else ""
        lines.append(f"{name:<{width}}{plus_minus(metric) + unit:<22}{remark}".rstrip())
    for reason in dict.fromkeys(card["left_out"].values()):
        names = [name for name, why in card["left_out"].items() if why == reason]
        lines.append(f"without {' and '.join(names)}: {reason}")
    return "\n".join(lines)


def _json(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: run(parse_arguments(Options, __doc__ or "", args)))


if __name__ == "__main__":
    main()
