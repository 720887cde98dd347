"""Data: where examples come from (`openmoji`, `moving`, `doom`, `folder`, `prepared`) and what they show in words
(`captions`), how they are kept (`cache`) and fed to a run (`pipeline`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ulx.data.caption_table import SUFFIXES as TABLES
from ulx.data.caption_table import read_table
from ulx.data.source import Dataset, check_resolution
from ulx.data.split import check_limit

if TYPE_CHECKING:
    from ulx.data.captions import Found
    from ulx.data.video import Clip

__all__ = ["DataConfig", "num_classes", "open_dataset"]


@dataclass(frozen=True)
class DataConfig:
    """Which images or clips a run trains on and how they are fed to it."""

    source: Literal["openmoji", "folder", "prepared", "moving-emoji", "moving-digits", "vizdoom"] = "openmoji"
    """openmoji: 4,495 drawings from an installed package, nothing to download. folder: your own images or videos, in
    --data.path. prepared: what `python -m ulx.data.prepare` made there. moving-emoji: clips of two of the drawings that
    bounce about. moving-digits: the same with MNIST's digits, as in the literature. vizdoom: walks through Doom."""

    path: str | None = None
    """Folder of images, or of videos; its subfolders are the classes. With train/ and validation/ (or valid/, val/)
    inside, those are the splits; otherwise about 10 % of the files, chosen by a hash of their path, are held out."""

    resolution: int = 32
    """Height and width in pixels, 8 to 1024. OpenMoji is drawn at this size; folders are centre-cropped and resized."""

    clips: bool = False
    """Examples are clips of --data.frames frames: of the videos in a folder, or what moves by itself. Else images."""

    frames: int = 16
    """Length of a clip. In training it begins anywhere in its video, in evaluation with the first frame."""

    stride: int = 1
    """Every so many frames of a video are taken, whatever its rate."""

    speed: float = 1.0
    """Of what bounces about in moving-emoji and moving-digits: at 1 by 1/32 to 3/32 of the frame's side per frame."""

    labels: bool = True
    """Whether the classes are told to the model; else all is of one class."""

    captions: str | None = None
    """What the images show, in words; those without a caption are left out. For openmoji a language, such as en or de.
    For a folder "txt", a text file beside each image (dog.txt beside dog.jpg), or a table: the path of a .csv, .tsv or
    .parquet file with the columns path, within --data.path, and caption. For prepared data a table."""

    flip: bool = False
    """Mirror half of the training images, at random. Leave it off for letters, flags and arrows (OpenMoji has them)."""

    workers: int = 0
    """Processes that read ahead; 0 reads in threads of the run itself, enough for small images."""

    on_unreadable: Literal["skip", "refuse"] = "skip"
    """What to do with files in the folder that are no readable image, and with captions that cannot be used: warn and
    go on without them, or stop. Either way they are named and counted."""

    cache_dir: str | None = None
    """Where prepared images are kept; by default $ULX_CACHE_DIR or else the user's cache directory."""

    limit: int | None = None
    """Use only so many examples, the same ones each time: for quick trials."""

    def __post_init__(self) -> None:
        from_files = self.source in ("folder", "prepared")
        if from_files and self.path is None:
            what = "with your images or videos" if self.source == "folder" else "that python -m ulx.data.prepare made"
            raise ValueError(f"--data.source {self.source} needs --data.path, the folder {what}")
        if not from_files and self.path is not None:
            raise ValueError(
                f"--data.path {self.path} is not used by --data.source {self.source}: add --data.source folder, or "
                "prepared"
            )
        moves = self.source in ("moving-emoji", "moving-digits", "vizdoom")
        if not from_files and self.clips != moves:
            has = "clips: it needs --data.clips" if moves else "images: it has no --data.clips"
            raise ValueError(f"--data.source {self.source} has {has}, and a model for them")
        for name in ("frames", "stride"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--data.{name} {value}: must be at least 1")
        if self.stride > 1 and not (from_files and self.clips):
            raise ValueError(f"--data.stride {self.stride} is for videos in files")
        if self.speed != 1 and self.source not in ("moving-emoji", "moving-digits"):
            raise ValueError(f"--data.speed {self.speed} is for moving-emoji and moving-digits")
        check_resolution(self.resolution)
        if self.workers < 0:
            raise ValueError(f"--data.workers {self.workers}: must be 0 or more")
        check_limit(self.limit)
        if self.captions is not None:
            self._check_captions(self.captions)

    def _check_captions(self, captions: str) -> None:
        given = f"--data.captions {captions}"
        if self.clips:
            raise ValueError(f"{given}: captions are for images, and --data.clips asks for clips")
        is_table, of_files = captions.lower().endswith(TABLES), captions == "txt"
        if self.source == "openmoji" and (is_table or of_files or not captions):
            raise ValueError(f"{given}: --data.source openmoji takes a language, such as en or de")
        if self.source == "folder" and not (is_table or of_files):
            raise ValueError(f"{given}: --data.source folder takes txt, or the path of a table ({' '.join(TABLES)})")
        if self.source == "prepared" and not is_table:
            raise ValueError(f"{given}: --data.source prepared takes the path of a table ({' '.join(TABLES)})")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: `h w 3`, or `t h w 3` of a clip."""
        image = (self.resolution, self.resolution, 3)
        return (self.frames, *image) if self.clips else image

    @property
    def unit(self) -> str:
        """What examples are called."""
        return "clips" if self.clips else "images"

    @property
    def clip(self) -> "Clip | None":
        """What is taken of a video; None for images."""
        from ulx.data.video import Clip

        return Clip(self.frames, self.stride) if self.clips else None


def open_dataset(config: DataConfig, *, frames: int | None = None) -> Dataset:
    """The data set that `config` names, prepared first if it is not in the cache yet.

    With `frames`, clips of so many in the place of the configured ones. It is the same data: a video that is too short
    for them raises `ShortError` when it is read.

    Raises `FileNotFoundError`, `NotADirectoryError` or `ValueError` for a folder that cannot serve, `OSError` for a
    cache that cannot be written, `ImportError` for a missing extra. What is wrong with a table of captions as a whole,
    or with their language, is said before any image is read.
    """
    # Imported there: `ulx.data` itself stays light enough for a command line's --help.
    find = _finder(config)
    dataset = _open(config, frames or config.frames)
    if find is not None:
        from ulx.data.captions import attached

        dataset = attached(dataset, find, config.on_unreadable)
    if config.labels:
        return dataset
    from ulx.data.source import one_class

    return one_class(dataset)


def num_classes(config: DataConfig) -> int:
    """Of the data set; OpenMoji's are known without drawing it."""
    if not config.labels:
        return 1
    if config.source == "openmoji":
        from ulx.data.openmoji import CLASS_NAMES

        return len(CLASS_NAMES)
    return len(open_dataset(config).class_names)


def _finder(config: DataConfig) -> "Callable[[Sequence[str]], Found] | None":
    """From the names of the images to their captions."""
    if config.captions is None:
        return None
    from ulx.data import captions

    if config.source == "openmoji":
        captions.check_language(config.captions)
        return partial(captions.of_openmoji, language=config.captions)
    assert config.path is not None
    root = Path(config.path).expanduser().resolve()
    if config.captions == "txt":
        return partial(captions.of_text_files, root=root)
    return partial(
        captions.of_table,
        rows=read_table(Path(config.captions).expanduser()),
        table=config.captions,
        root=root if config.source == "folder" else None,
        limited=config.limit is not None,
    )


def _open(config: DataConfig, frames: int) -> Dataset:
    if config.source == "openmoji":
        from ulx.data.openmoji import open_openmoji

        return open_openmoji(config.resolution, cache_dir=config.cache_dir, limit=config.limit)
    if config.source == "folder" and config.path is not None:
        from ulx.data.folder import open_folder

        return open_folder(
            config.path,
            config.resolution,
            clip=config.clip,
            frames=frames,
            on_unreadable=config.on_unreadable,
            cache_dir=config.cache_dir,
            limit=config.limit,
        )
    if config.source == "prepared" and config.path is not None:
        from ulx.data.prepared import open_prepared

        return open_prepared(config.path, config.resolution, clip=config.clip, frames=frames, limit=config.limit)
    if config.source in ("moving-emoji", "moving-digits"):
        from ulx.data.moving import open_moving

        return open_moving(
            config.source,
            config.resolution,
            frames=frames,
            speed=config.speed,
            cache_dir=config.cache_dir,
            limit=config.limit,
        )
    if config.source == "vizdoom":
        from ulx.data.doom import open_doom

        return open_doom(config.resolution, frames=frames, limit=config.limit)
    raise ValueError(
        f"--data.source {config.source}: there are openmoji, folder, prepared, moving-emoji, moving-digits and vizdoom"
    )
