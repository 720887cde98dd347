"""Compare two folders of images, or two folders of videos.

    python -m ulx.metrics DIR_A DIR_B
    python -m ulx.metrics real/ generated/ --resolution 256 --out card.json
    python -m ulx.metrics real_videos/ generated_videos/ --frames 16 --stride 1 --resolution 128
    python -m ulx.metrics predicted/originals predicted/clips --given 5

DIR_A is the reference: real ones, or the originals of reconstructions. Of images it prints fd_efflite0 and kd_efflite0
(Fréchet and kernel distance of EfficientNet-lite0's features; not FID and KID, whose features are InceptionV3's),
precision and recall, and, where both folders hold the same file names (whatever their suffixes), PSNR and SSIM of the
pairs. --inception-weights adds FID and KID, whose weights no package carries, and --lpips LPIPS of the pairs.

Of videos it prints fvd and kd_i3d (Fréchet and kernel distance of I3D's logits), precision and recall by them, and PSNR
and SSIM of the pairs frame by frame: pip install "ulx[fvd,video]". A video gives one clip, its first --frames frames or
every --stride-th of them; of fvd all of them count, those that a model was given too (for Kinetics-600: 16 frames, of
which 5 are given), and of pairs those after the first --given. GIFs, WebPs and PNGs are videos if they are animated.

--out writes them as a card: each number with its definition and N, the network's hash, a hash of either folder's
pixels, how examples were prepared, the version of ulx. Contact sheets of ulx.sample and
ulx.reconstruct are left out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulx.aside import write_aside
from ulx.command_line import parse_arguments, run_command
from ulx.data.video import Clip
from ulx.metrics import inception
from ulx.metrics.compare import compare
from ulx.metrics.entries import as_json, plus_minus, rank_remark
from ulx.metrics.inception import Resize

__all__ = ["Options", "main", "table"]


@dataclasses.dataclass(frozen=True)
class Options:
    dir_a: Path
    """Folder of the reference: real images or videos, or the originals. Subfolders included."""
    dir_b: Path
    """Folder of the images or videos that are measured against it."""
    out: Path | None = None
    """The JSON file to write the card to; by default only the table is printed."""
    resolution: int | None = None
    """What the images or frames of both folders are centre-cropped and resized to, as for training; by default they
    must be squares of one size."""
    frames: int | None = None
    """Frames taken of each video, 16 by default."""
    stride: int | None = None
    """Every how manieth frame is taken, each by default."""
    given: int = 0
    """Of those taken, how many a model was given: PSNR, SSIM and LPIPS of pairs leave them out."""
    inception_weights: Path | None = None
    """The file of FID's InceptionV3, pytorch-fid's state dict or jax-fid's pickle: FID and KID of images as
    well."""
    inception_resize: Resize | None = None
    """How it is shown the images: "tf1-bilinear", the default, or "clean-bicubic", Clean-FID's way, whose distances are
    called so."""
    lpips: bool = False
    """LPIPS of the pairs too; needs pip install "ulx[lpips]"."""
    batch_size: int = 64
    """Images or frames per call of the network, of videos one at least; changes no result beyond rounding."""
    overwrite: bool = False
    """Write over a card that exists."""

    def __post_init__(self):
        for name in ("resolution", "frames", "stride", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        inception.check_resize(self.inception_resize, self.inception_weights)


def run(options: Options) -> dict[str, Any]:
    """Print the table and write the card; returns it."""
    out = options.out
    if out is not None and out.exists() and (out.is_dir() or not options.overwrite):
        raise FileExistsError(
            f"{out} exists already: choose another --out" + ("" if out.is_dir() else ", or --overwrite")
        )
    weights = options.inception_weights
    clip = {name: value for name in ("frames", "stride") if (value := getattr(options, name)) is not None}
    card = compare(
        options.dir_a,
        options.dir_b,
        resolution=options.resolution,
        clip=Clip(**clip) if clip else None,
        batch_size=options.batch_size,
        networks=[] if weights is None else [inception.load(weights, options.inception_resize or inception.RESIZE)],
        with_lpips=options.lpips,
        given=options.given,
    )
    print(table(card))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(out) as aside:
            aside.write_text(as_json(card), "utf-8")
        print(f"-> {out}")
    return card


def table(card: dict[str, Any]) -> str:
    """The card's numbers as lines of text."""
    a, b = card["a"], card["b"]
    kind, clip = card["kind"], card.get("clip")
    lines = [f"A {a['path']}: {a['n']:,} {kind}; B {b['path']}: {b['n']:,}; {card['resolution']} pixels each way"]
    if clip:
        lines.append(f"of each the first {clip['frames']} frames, with a stride of {clip['stride']}")
    if "given" in card:
        lines.append(f"of pairs the frames after the first {card['given']}")
    for folder in (a, b):
        if folder["contact_sheets_left_out"]:
            lines.append(f"left out of {folder['path']}: {', '.join(folder['contact_sheets_left_out'])}")
        if folder["enlarged"]:
            lines.append(f"{folder['enlarged']:,} {kind} of {folder['path']} are smaller and were enlarged")
    width = max(13, *(len(name) + 2 for name in card["metrics"]))
    for name, metric in card["metrics"].items():
        remark = rank_remark(metric)
        unit = " dB" if name == "psnr" else ""
        lines.append(f"{name:<{width}}{plus_minus(metric) + unit:<22}{remark}".rstrip())
    for reason in dict.fromkeys(card["left_out"].values()):
        names = [name for name, why in card["left_out"].items() if why == reason]
        lines.append(f"without {' and '.join(names)}: {reason}")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: run(parse_arguments(Options, __doc__ or "", args)))


if __name__ == "__main__":
    main()
