import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest
import tyro
from PIL import Image

from ulx.data import DataConfig, open_dataset

FILES, PREPARED = ({"source": source, "path": "no-such-folder"} for source in ("folder", "prepared"))


def test_importing_the_config_imports_nothing_heavy():
    heavy = ("jax", "grain", "PIL", "array_record", "pyarrow", "emoji")
    program = f"import sys, ulx.data; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"


def test_every_field_is_explained_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(DataConfig, args=["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())  # wherever lines are broken
    for field in fields(DataConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    first = ("nothing to download", "centre-cropped", "a text file beside each image", "Mirror half")
    for words in (*first, "named and counted", "quick trials"):
        assert words in shown


def test_the_command_line_sets_it(tmp_path):
    args = ["--source", "folder", "--path", str(tmp_path), "--captions", "txt", "--flip", "--limit", "10"]
    config = tyro.cli(DataConfig, args=args)
    assert config == DataConfig(source="folder", path=str(tmp_path), captions="txt", flip=True, limit=10)
    with pytest.raises(FrozenInstanceError):
        config.flip = False  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "folder"}, "--data.source folder needs --data.path"),
        ({"path": "photos"}, "--data.path photos is not used by --data.source openmoji: add --data.source folder"),
        ({"resolution": 4}, "--data.resolution 4: must be from 8 to 1024"),
        ({"workers": -1}, "--data.workers -1: must be 0 or more"),
        ({"limit": 2}, "--data.limit 2: at least 3 are needed, one to train on, 2 to validate"),
        ({"captions": "txt"}, "--data.captions txt: --data.source openmoji takes a language"),
        ({"captions": "a.csv"}, "--data.captions a.csv: --data.source openmoji takes a language"),
        ({"captions": ""}, "--data.source openmoji takes a language"),
        (FILES | {"captions": "en"}, "--data.captions en: --data.source folder takes txt, or .*table"),
        (FILES | {"captions": "a.json"}, r"--data.source folder takes txt, .* \(\.csv \.tsv \.parquet\)"),
        (PREPARED | {"captions": "txt"}, "--data.captions txt: --data.source prepared takes the path of a table"),
        (PREPARED | {"captions": "en"}, "--data.captions en: --data.source prepared takes the path of a table"),
        (FILES | {"captions": "txt", "clips": True}, "captions are for images, and --data.clips asks for clips"),
        ({"source": "moving-emoji", "captions": "en", "clips": True}, "captions are for images"),
        ({"source": "vizdoom", "captions": "en"}, "it needs --data.clips"),
    ],
)
def test_what_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"captions": "de"},
        FILES | {"captions": "txt"},
        *(given | {"captions": table} for given in (FILES, PREPARED) for table in ("a.csv", "b/A.TSV", "c.parquet")),
    ],
)
def test_captions_that_can_be_meant(arguments):
    assert DataConfig(**arguments).captions == arguments["captions"]


def test_opening_each_source(tmp_path):
    emoji = open_dataset(DataConfig(resolution=16, limit=8, cache_dir=str(tmp_path / "mine")))
    assert (emoji.name, emoji.resolution, len(emoji.train)) == ("openmoji", 16, 6)
    assert (tmp_path / "mine").is_dir()
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.new("L", (20, 30), 50 * i).save(tmp_path / "photos" / f"{i}.png")
    own = open_dataset(DataConfig(source="folder", path=str(tmp_path / "photos"), resolution=16))
    assert (own.name, own.class_names) == ("folder", ("all",))
    assert own.train[0]["image"].shape == (16, 16, 3)
    (tmp_path / "photos" / "5.png").write_text("text")
    with pytest.raises(ValueError, match=r"1 of 6 files .*5\.png"):
        open_dataset(DataConfig("folder", str(tmp_path / "photos"), resolution=16, on_unreadable="refuse"))
