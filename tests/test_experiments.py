"""Experiments as their commands run them, by the smallest preset on the embedded data (`-m slow`: minutes each)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "distance"), [("openmoji", "fd_efflite0"), ("kinetics600", "fvd")])
def test_the_smallest_preset_leaves_a_report(tmp_path, name, distance):
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--preset", "smoke", "--runs", str(tmp_path)]
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
