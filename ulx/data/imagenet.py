"""ImageNet as it is handed out: folders of classes, or the original tar files, read where they lie.

    root/train/n01440764/*.JPEG, root/val/n01440764/*.JPEG          folders (validation/ will do too)
    root/ILSVRC2012_img_train.tar, root/ILSVRC2012_img_val.tar,     the tar files; the validation images' classes are in
    root/ILSVRC2012_devkit_t12.tar.gz                               the development kit

Classes are WordNet ids, numbered in their order. An image has the same name in both, `train/n01440764/….JPEG`.
"""

import errno
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ulx.data.cache import Recipe, UnreadableError, each
from ulx.data.encoded import ImageCodec, encode_image, image_encoder
from ulx.data.folder import list_splits, stamp
from ulx.data.image import PREPARATION, read_image, reason_of
from ulx.data.split import Item, digest_of

__all__ = ["recipe"]

TRAIN, VALIDATION, DEVKIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)


class Images(NamedTuple):
    """What was found: the splits' images, and how to read one by its name."""

    train: list[Item]
    validation: list[Item]
    class_names: tuple[str, ...]
    read: Callable[[str], bytes]
    stamp: str
    """Hash of the names, classes and sizes."""


class Member(NamedTuple):
    """A file inside a tar file that is not compressed."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def recipe(root: Path, resolution: int, codec: ImageCodec, workers: int | None = None) -> Recipe:
    """How to prepare the ImageNet under `root`.

    Raises `FileNotFoundError`, `NotADirectoryError`, `ValueError` for a folder that is not laid out so.
    """
    found = _of_tar_files(root) if (root / TRAIN).exists() else _of_folders(root)

    def load(name: str) -> tuple[dict[str, np.ndarray], str | None]:
        try:
            content = found.read(name)
        except OSError as error:
            if not _is_of_the_file(root / name, error):
                raise
            raise UnreadableError(reason_of(root / name, error)) from error
        image, smaller = read_image(content, resolution)
        return {codec: encode_image(image, codec)}, f"smaller than {resolution} pixels" if smaller else None

    return Recipe(
        name="imagenet",
        resolution=resolution,
        class_names=found.class_names,
        settings={"preparation": PREPARATION, "codec": codec, "files": found.stamp},
        compressed_by=image_encoder(),
        items=lambda: (found.train, found.validation),
        make=each(load, workers),
        example_bytes=resolution**2,  # of about 8 bits a pixel when compressed
    )


def _is_of_the_file(path: Path, error: OSError) -> bool:
    """Whether it is this file that ails, and always will: a link to nothing or to itself, a file of somebody else's, a
    bad block. That a file has gone, or that no more may be opened, is not to be taken for an answer."""
    if error.errno == errno.ENOENT:
        return path.is_symlink()
    return error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO)


def _of_folders(root: Path) -> Images:
    train, validation, class_names = list_splits(root, "image")
    if not all(item.name.startswith("train/") for item in train):
        raise ValueError(
            f"{root} is no ImageNet: it has neither train/ and val/ with a folder for each class, nor {TRAIN}"
        )
    read: Callable[[str], bytes] = lambda name: (root / name).read_bytes()  # noqa: E731
    return Images(train, validation, class_names, read, stamp(root, [*train, *validation], times=False))


def _of_tar_files(root: Path) -> Images:
    for name in (VALIDATION, DEVKIT):
        if not (root / name).exists():
            raise FileNotFoundError(
                f"{root} has {TRAIN} and no {name}: all of {TRAIN}, {VALIDATION}, {DEVKIT} are wanted"
            )
    members: dict[str, Member] = {}
    with _open_tar(f"{root / TRAIN}") as outer:
        for of_class in _files(outer, f"{root / TRAIN}"):
            what = f"{of_class.name} in {root / TRAIN}"
            with outer.extractfile(of_class) as file, _open_tar(what, file) as inner:  # pyright: ignore[reportOptionalContextManager]
                for image in _files(inner, what):
                    offset = of_class.offset_data + image.offset_data
                    name = f"train/{Path(of_class.name).stem}/{Path(image.name).name}"
                    members[name] = Member(root / TRAIN, offset, image.size)
    if not members:
        raise ValueError(f"{root / TRAIN} holds no tar files of classes")
    classes = _validation_classes(root / DEVKIT)
    with _open_tar(f"{root / VALIDATION}") as tar:
        images = sorted(_files(tar, f"{root / VALIDATION}"), key=lambda image: image.name)
        if len(images) != len(classes):
            raise ValueError(
                f"{root / VALIDATION} holds {len(images)} images, and {DEVKIT} has the classes of {len(classes)}"
            )
        for image, of_class in zip(images, classes, strict=True):
            name = f"val/{of_class}/{Path(image.name).name}"
            members[name] = Member(root / VALIDATION, image.offset_data, image.size)
    class_names = tuple(sorted({name.split("/")[1] for name in members}))
    label = {name: index for index, name in enumerate(class_names)}
    train, validation = (
        [Item(name, label[name.split("/")[1]]) for name in sorted(members) if name.startswith(split)]
        for split in ("train/", "val/")
    )
    content = digest_of([*item, members[item.name].size] for item in (*train, *validation))
    return Images(train, validation, class_names, lambda name: members[name].read(), content)


def _open_tar(what: str, file: Any = None) -> tarfile.TarFile:
    """`what` is the path, or of a `file` within another its name."""
    try:
        return tarfile.open(what if file is None else None, "r:", file)  # "r:": not compressed, to be read anywhere
    except tarfile.TarError as error:
        raise ValueError(f"{what} is no tar file, or a damaged one ({error}): copy it again") from error


def _files(tar: tarfile.TarFile, what: str) -> Iterator[tarfile.TarInfo]:
    """Raises `ValueError` where the tar file breaks off."""
    try:
        yield from (member for member in tar if member.isfile())
    except tarfile.TarError as error:
        raise ValueError(f"{what} is damaged ({error}): copy it again") from error


def _validation_classes(devkit: Path) -> Sequence[str]:
    """The WordNet id of each validation image, in the order of their names."""
    from scipy.io import loadmat

    try:
        with tarfile.open(devkit) as tar:
            content = {Path(member.name).name: member for member in tar if member.isfile()}
            truth = tar.extractfile(content["ILSVRC2012_validation_ground_truth.txt"])
            meta = tar.extractfile(content["meta.mat"])
            assert truth is not None
            assert meta is not None
            synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            of_number = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
            return [of_number[int(line)] for line in truth.read().split()]
    except (KeyError, OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"{devkit} cannot be read as ImageNet's development kit ({error})") from error
