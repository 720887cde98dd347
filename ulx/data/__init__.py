"""Data: where examples come from (`openmoji`, `moving`, `folder`, `prepared`), how they are kept (`cache`) and fed to a
run (`pipeline`)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ulx.data.source import Dataset, check_resolution
from ulx.data.split import check_limit

if TYPE_CHECKING:
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
    """Folder of images, or of videos; its subfolders are the classes. With train/ and validation/ (or val/) inside,
    those are the splits; otherwise about 10 % of the files, chosen by a hash of their path, are held out."""

    resolution: int = 32
    """Height and width in pixels, 8 to 1024. OpenMoji is drawn at this size; folders are centre-cropped and resized."""

    clips: bool = False
    """Examples are clips of --data.frames frames: of the videos in a folder, or what moves by itself. Else images."""

    frames: int = 16
    """Length of a clip. In training it begins anywhere in its video, in evaluation with the first frame."""

    stride: int = 1
    """Every so many frames of a video are taken, whatever its rate."""

    labels: bool = True
    """Whether the classes are told to the model; else all is of one class."""

    flip: bool = False
    """Mirror half of the training images, at random. Leave it off for letters, flags and arrows (OpenMoji has them)."""

    workers: int = 0
    """Processes that read ahead; 0 reads in threads of the run itself, enough for small images."""

    on_unreadable: Literal["skip", "refuse"] = "skip"
    """What to do with files in the folder that are no readable image: warn and go on without them, or stop.
    Either way they are named and counted."""

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
        check_resolution(self.resolution)
        if self.workers < 0:
            raise ValueError(f"--data.workers {self.workers}: must be 0 or more")
        check_limit(self.limit)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: `h w 3`, or `t h w 3` of a clip."""
        image = (self.resolution, self.resolution, 3)
        return (self.frames, *image) if self.clips else image

    @property
    def clip(self) -> "Clip | None":
        """What is taken of a video; None for images."""
        from ulx.data.video import Clip

        return Clip(self.frames, self.stride) if self.clips else None


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that `config` names, prepared first if it is not in the cache yet.

    Raises `FileNotFoundError`, `NotADirectoryError` or `ValueError` for a folder that cannot serve, `OSError` for a
    cache that cannot be written, `ImportError` for a missing extra.
    """
    # Imported there: `ulx.data` itself stays light enough for a command line's --help.
    dataset = _open(config)
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


def _open(config: DataConfig) -> Dataset:
    if config.source == "openmoji":
        from ulx.data.openmoji import open_openmoji

        return open_openmoji(config.resolution, cache_dir=config.cache_dir, limit=config.limit)
    if config.source == "folder" and config.path is not None:
        from ulx.data.folder import open_folder

        return open_folder(
            config.path,
            config.resolution,
            clip=config.clip,
            on_unreadable=config.on_unreadable,
            cache_dir=config.cache_dir,
            limit=config.limit,
        )
    if config.source == "prepared" and config.path is not None:
        from ulx.data.prepared import open_prepared

        return open_prepared(config.path, config.resolution, clip=config.clip, limit=config.limit)
    if config.source in ("moving-emoji", "moving-digits"):
        from ulx.data.moving import open_moving

        return open_moving(
            config.source, config.resolution, frames=config.frames, cache_dir=config.cache_dir, limit=config.limit
        )
    if config.source == "vizdoom":
        from ulx.data.doom import open_doom

        return open_doom(config.resolution, frames=config.frames, limit=config.limit)
    raise ValueError(
        f"--data.source {config.source}: there are openmoji, folder, prepared, moving-emoji, moving-digits and vizdoom"
    )
