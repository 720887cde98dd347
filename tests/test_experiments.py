"""Experiments as their commands run them: the README's are those that its results are of, and the smallest presets run
on the embedded data (`-m slow`: minutes each)."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ulx import job, run_folder
from ulx.config import Config, differences, from_json

ROOT = Path(__file__).parents[1]


def of_command(words: list[str], monkeypatch) -> Config:
    """What `python experiments/NAME.py OPTIONS` would train."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(job, "run", found.append)
        patch.setattr(sys, "argv", [str(ROOT / words[1]), *words[2:]])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    (config,) = found
    return config


def test_the_longer_run_of_the_readme_is_that_of_its_results(monkeypatch):
    """Whatever becomes of the preset that its commands begin from."""
    results = ROOT / "benchmarks" / "results" / "kinetics600"
    commands = [
        of_command(shlex.split(line), monkeypatch)
        for block in re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if "kinetics600.py" in line and "--name longer" in line
    ]
    of_autoencoder, config = commands
    assert config.autoencoder == str(of_autoencoder.path)
    # As `run_folder.adopt` takes it, from a run that is there.
    taken = {name: getattr(of_autoencoder, name) for name in (*run_folder.STAGE_1, "train", "train_decoder")}
    model = dataclasses.replace(of_autoencoder.model, base=config.model.base)
    config = dataclasses.replace(config, model=model, **taken)
    committed = from_json((results / "config.json").read_text())
    # How often it is saved changes nothing, nor how many blocks each of no convolution stages has.
    ignore = ("train.save_every", "train_base.save_every", "model.base.conv_blocks")
    assert config.model.base.conv_channels == ()
    assert differences(committed, config, ignore=ignore) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "distance"), [("openmoji", "fd_efflite0"), ("kinetics600", "fvd")])
def test_the_smallest_preset_leaves_a_report(tmp_path, name, distance):
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--preset", "smoke", "--runs", str(tmp_path)]
    compiled_well = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=compiled_well)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (run,) = tmp_path.iterdir()
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert 0 < metrics["bits_per_pixel"]["value"] < 24
    assert metrics["psnr"]["value"] > 10
    assert min(metrics[distance][what]["value"] for what in ("base", "prior", "reconstruction")) > 0
    assert (run / "figures" / "base_samples.png").stat().st_size > 1000
    html = (run / "report.html").read_text()
    assert "Samples of the base model" in html or "Continuations by the base model" in html
    assert str(run / "report.html") in ran.stdout + ran.stderr
