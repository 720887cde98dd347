"""Data: where examples come from (`openmoji`, `folder`, `moving`), how they are kept (`cache`) and fed to a run
(`pipeline`)."""

from dataclasses import dataclass
from typing import Literal

from ulx.data.source import Dataset, check_resolution
from ulx.data.split import check_limit

__all__ = ["DataConfig", "open_dataset"]


@dataclass(frozen=True)
class DataConfig:
    """Which images or clips a run trains on and how they are fed to it."""

    source: Literal["openmoji", "folder", "moving-emoji", "moving-digits"] = "openmoji"
    """openmoji: 4,495 drawings from an installed package, nothing to download. folder: your own images, in
    --data.path. moving-emoji: clips of two of the drawings that bounce about. moving-digits: the same with MNIST's
    digits, as in the literature."""

    path: str | None = None
    """Folder of images; its subfolders are the classes. With train/ and validation/ (or val/) inside, those are
    the splits; otherwise about 10 % of the files, chosen by a hash of their path, are held out."""

    resolution: int = 32
    """Height and width in pixels, 8 to 1024. OpenMoji is drawn at this size; folders are centre-cropped and resized."""

    frames: int = 16
    """Length of a clip, of a source that moves."""

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
        if self.source == "folder" and self.path is None:
            raise ValueError("--data.source folder needs --data.path, the folder with your images")
        if self.source != "folder" and self.path is not None:
            raise ValueError(
                f"--data.path {self.path} is not used by --data.source {self.source}: add --data.source folder"
            )
        if self.frames < 1:
            raise ValueError(f"--data.frames {self.frames}: a clip has at least one frame")
        check_resolution(self.resolution)
        if self.workers < 0:
            raise ValueError(f"--data.workers {self.workers}: must be 0 or more")
        check_limit(self.limit)

    @property
    def is_video(self) -> bool:
        return self.source in ("moving-emoji", "moving-digits")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: `h w 3`, or `t h w 3` of a clip."""
        image = (self.resolution, self.resolution, 3)
        return (self.frames, *image) if self.is_video else image


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that `config` names, prepared first if it is not in the cache yet.

    Raises `FileNotFoundError`, `NotADirectoryError` or `ValueError` for a folder that cannot serve, `OSError` for a
    cache that cannot be written, `ImportError` for a missing extra.
    """
    # Imported here: `ulx.data` itself stays light enough for a command line's --help.
    if config.source == "openmoji":
        from ulx.data.openmoji import open_openmoji

        return open_openmoji(config.resolution, cache_dir=config.cache_dir, limit=config.limit)
    if config.source == "folder" and config.path is not None:
        from ulx.data.folder import open_folder

        return open_folder(
            config.path,
            config.resolution,
            on_unreadable=config.on_unreadable,
            cache_dir=config.cache_dir,
            limit=config.limit,
        )
    if config.source in ("moving-emoji", "moving-digits"):
        from ulx.data.moving import open_moving

        return open_moving(
            config.source, config.resolution, frames=config.frames, cache_dir=config.cache_dir, limit=config.limit
        )
    raise ValueError(f"--data.source {config.source}: there are openmoji, folder, moving-emoji and moving-digits")
