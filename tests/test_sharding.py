"""However the devices are arranged, training is the same: on eight virtual ones, and on two processes of two."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import mesh_worker
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ulx import job, runs, sharding
from ulx.config import Config
from ulx.data import DataConfig
from ulx.nn.conditions import ConditionSpec
from ulx.nn.transformer import Stack
from ulx.presets import PAPER

WORKER = Path(__file__).parent / "mesh_worker.py"
MESHES = [(1, 1, 1), (8, 1, 1), (4, 2, 1), (1, 8, 1)]
"""Devices along data and fsdp, and pieces of each device's part of the batch. The first is what the others are
compared with."""
LEGS = [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 4)]
"""A training that goes on on another mesh after every five steps: 8 devices, 4, 8, 1; on some in pieces."""


def started(*args: str, devices: int | None = None) -> subprocess.Popen[str]:
    flags = [os.environ["XLA_FLAGS"]]  # conftest.py's
    flags += [] if devices is None else [f"--xla_force_host_platform_device_count={devices}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, str(WORKER), *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict]]:
    trainings = [[mesh] for mesh in MESHES]
    return results(started(json.dumps({"stage1": trainings, "stage2": [*trainings, LEGS]}), devices=8))


def curve(run: dict, name: str = "loss") -> np.ndarray:
    return np.array([line[name] for line in run["logged"]])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("index", range(1, len(MESHES)))
def test_twenty_steps_are_those_of_one_device(trained, stage, index):
    """To 1e-5: sums in another order differ by float32's 1e-7, which Adam's first steps, which go by the gradient's
    sign, carry on."""
    alone, other = trained[stage][0], trained[stage][index]
    np.testing.assert_allclose(curve(other), curve(alone), rtol=1e-5)
    np.testing.assert_allclose(curve(other, "gradient"), curve(alone, "gradient"), rtol=1e-3)
    assert other["ema"] == pytest.approx(alone["ema"], rel=1e-5)
    assert curve(alone)[-1] != curve(alone)[0]
    if stage == "stage1":
        np.testing.assert_allclose(curve(other, "latent_std"), curve(alone, "latent_std"), rtol=1e-5)


def test_goes_on_on_another_mesh(trained):
    """The checkpoint's arrays are laid out anew and the batches go on where they were."""
    alone, *_, legs = trained["stage2"]
    np.testing.assert_allclose(curve(legs), curve(alone), rtol=1e-5)
    assert legs["ema"] == pytest.approx(alone["ema"], rel=1e-5)


def test_two_processes_of_two_devices_are_one_device(trained):
    """Each is given its own half of every batch, and all of what is measured."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    both = {"made": True} | {stage: [[(2, 2, 1)]] for stage in ("stage1", "stage2")}
    alone = mesh_worker.made()
    processes = [started(json.dumps(both), str(index), "2", coordinator) for index in range(2)]
    # Read at once: one that waits to be read would keep the other waiting for it to end.
    with ThreadPoolExecutor() as threads:
        both_found = list(threads.map(results, processes))
    for found in both_found:
        compare_made(found.pop("made"), alone, devices=2)
        for stage, (run,) in found.items():
            np.testing.assert_allclose(curve(run), curve(trained[stage][0]), rtol=1e-5)
            assert run["ema"] == pytest.approx(trained[stage][0]["ema"], rel=1e-5)


def test_evaluation_on_eight_devices_is_that_on_one():
    """Five images in batches of three, which eight devices fill up. Pixels are rounded: one grey level of rounding."""
    alone, eight = mesh_worker.made(), results(started('{"made": true}', devices=8))["made"]
    assert np.ptp(alone["latents"]) > 0.5
    assert np.ptp(alone["samples"]) > 0.5
    assert alone["distance"] > 0.01
    compare_made(eight, alone, devices=8)


def compare_made(found: dict[str, Any], alone: dict[str, Any], devices: int) -> None:
    assert found["devices"] == devices
    assert alone["devices"] == jax.local_device_count()
    for name in alone.keys() - {"devices"}:
        tolerance = 1 if name == "reconstructions" else 1e-4
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-4, atol=tolerance, err_msg=name)
    assert found["distance"] == pytest.approx(alone["distance"], rel=1e-5)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_step_sends_what_it_should(trained, stage):
    """Weights gathered and their gradients summed and scattered over fsdp, or summed over data; of the batch, whose
    images are the one array of bytes, nothing."""
    for run, (data, fsdp, _) in zip(trained[stage], MESHES, strict=False):
        kinds = {kind for kind, _ in run["sent"]}
        assert not {kind for kind in kinds if kind in ("all-to-all", "collective-permute")}
        assert ({"all-gather", "reduce-scatter"} <= kinds) == (fsdp > 1), run["sent"]
        if data * fsdp > 1:
            assert "all-reduce" in kinds
        assert not [array for _, array in run["sent"] if array.startswith("u8")]
        gathered = [array for kind, array in run["sent"] if kind == "all-gather"]
        # No array with an axis of the whole batch: 8 examples. (Weights have none of 8 here.)
        assert not [array for array in gathered if array.split("[")[1].split(",")[0].rstrip("]") == "8"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_devices_hold_parts(trained, stage):
    one, eight = (trained[stage][MESHES.index(mesh)]["bytes"] for mesh in ((1, 1, 1), (1, 8, 1)))
    assert eight < 0.6 * one  # these networks are small, and so are many of their arrays


def test_bytes_of_the_paper_s_base_model_fall_by_the_factor(capsys):
    """Weights, two moments and the average, as shapes."""
    config = Config(data=DataConfig(source="openmoji", resolution=512), model=PAPER["imagenet512-medium"].model)
    model = eqx.filter_eval_shape(lambda: runs.stage1_state(config).model)
    state = eqx.filter_eval_shape(lambda: runs.stage2_state(config, model, ConditionSpec(num_classes=1000)))
    whole, *less = (sharding.bytes_per_device(state, fsdp) for fsdp in (1, 2, 8, 64))
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.ema))
    assert whole == pytest.approx(4 * 4 * weights, abs=64)  # float32, four times; and the steps
    with capsys.disabled():
        print(f"\nbase model of imagenet512-medium, GiB per device by fsdp: {whole / 2**30:.2f}", end="")
        print("".join(f", {fsdp}: {held / 2**30:.3f}" for fsdp, held in zip((2, 8, 64), less, strict=True)))
    for fsdp, held in zip((2, 8, 64), less, strict=True):
        assert whole / fsdp <= held < 1.05 * whole / fsdp


def test_which_axis_is_cut(small_config):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    cuts = sharding.specs(
        {
            "longest": shape(128, 512),
            "last of equals": shape(256, 256),
            "that can be divided": shape(1023, 64),
            "none": shape(255, 1023),
            "small": shape(64, 64),
            "step": shape(),
            "text": "text",
        },
        4,
    )
    assert cuts == {
        "longest": PartitionSpec(None, "fsdp"),
        "last of equals": PartitionSpec(None, "fsdp"),
        "that can be divided": PartitionSpec(None, "fsdp"),
        "none": PartitionSpec(),
        "small": PartitionSpec(),
        "step": PartitionSpec(),
        "text": None,
    }
    block = dataclasses.replace(small_config.model.base.block, head_size=64)
    stack = eqx.filter_eval_shape(lambda: Stack(1024, 128, block, cond_size=128, key=jax.random.key(0)))
    cut = sharding.specs(stack, 4).blocks
    assert cut.up.weight == PartitionSpec(None, None, "fsdp")
    assert cut.down.weight == PartitionSpec(None, "fsdp", None)
    assert cut.attention.out.bias == PartitionSpec()  # 128 numbers in each of 1024 layers


def test_what_devices_cannot_share_is_refused(small_config, tmp_path):
    one = jax.devices()[:1]
    with pytest.raises(ValueError, match="fsdp=3 does not divide the number of devices, 1"):
        sharding.make_mesh(3, one)
    with pytest.raises(ValueError, match="fsdp=0 does not divide"):
        sharding.make_mesh(0, one)
    config = dataclasses.replace(small_config, runs=str(tmp_path), name="shared")
    train = dataclasses.replace(config.train_base, accumulate=3)
    with pytest.raises(ValueError, match="a batch of 4 for stage2 cannot be divided among 1 device in 3 pieces each"):
        job.run(dataclasses.replace(config, train_base=train))
    assert not (tmp_path / "shared").exists()
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        dataclasses.replace(train, accumulate=0)
