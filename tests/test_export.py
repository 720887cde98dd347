"""A run in one safetensors file, and back."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import ulx
from ulx import encode, evaluate, export, run_folder, runs, sample, weights_file
from ulx.checkpoint import Checkpoints
from ulx.config import to_json
from ulx.image_files import write_png

safetensors = pytest.importorskip("safetensors")


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory) -> Path:
    return export.export(export.Options(trained_run, tmp_path_factory.mktemp("exported") / "model.safetensors"))


def rewritten(file: Path, to: Path, change) -> Path:
    """The file with its arrays and metadata changed, by safetensors itself."""
    from safetensors.numpy import save_file

    with safetensors.safe_open(file, framework="np") as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())
    change(arrays, metadata)
    save_file(arrays, to, metadata=metadata)
    return to


def test_comes_back_bit_for_bit(trained_run, exported):
    run, back = ulx.load(trained_run), ulx.load(exported)
    assert jax.tree.structure(eqx.filter(back.model, eqx.is_array)) == jax.tree.structure(
        eqx.filter(run.model, eqx.is_array)
    )
    assert bits(back.model) == bits(run.model)
    assert bits(back.base) == bits(run.base)
    assert (back.config, back.class_names, back.step, back.weights) == (run.config, run.class_names, run.step, "EMA")
    assert back.fingerprint == run.fingerprint == run_folder.read_data(run.path)["fingerprint"]
    assert back.folder == exported.parent


def test_any_reader_finds_the_arrays(trained_run, exported):
    from safetensors.numpy import load_file

    run, arrays = ulx.load(trained_run), load_file(exported)
    assert run.base is not None
    count = sum(len(bits(part)) for part in (run.model.encoder, run.model.prior, run.model.decoder, run.base))
    assert len(arrays) == count
    assert {name.partition(".")[0] for name in arrays} == {"encoder", "prior", "decoder", "base"}
    assert all(array.dtype == np.float32 for array in arrays.values())
    found = arrays["base.network.project_out.bias"]
    np.testing.assert_array_equal(found, np.asarray(run.base.network.project_out.bias))
    with safetensors.safe_open(exported, framework="np") as file:
        facts = json.loads(file.metadata()["ulx"])
    assert facts["config"] == json.loads(to_json(run.config))
    assert facts["config_sha256"] == hashlib.sha256(to_json(run.config).encode()).hexdigest()
    assert facts["dataset"]["fingerprint"] == "fingerprint"
    assert facts["versions"]["jax"] == jax.__version__
    assert (facts["format"], facts["steps"], facts["weights"]) == (1, [6, 4], "EMA")


def test_the_commands_take_it(trained_run, exported, tmp_path):
    """The same samples and latents as of the run."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    write_png(tmp_path / "images" / "a.png", image)
    found = []
    for name, source in (("run", trained_run), ("file", exported)):
        out = tmp_path / name
        sample.sample(sample.Options(source, out=out / "samples", num=2))
        encode.encode(encode.Options(source, tmp_path / "images", out=out / "latents.npz"))
        with np.load(out / "latents.npz") as latents:
            found.append([latents["z_clean"].tobytes(), *(file.read_bytes() for file in sorted(out.rglob("*.png")))])
    assert len(found[0]) > 2
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="is a file, and an evaluation goes into a run's folder"):
        evaluate.evaluate(evaluate.Options(exported))


def test_another_average_and_a_run_without_a_base_model(trained_run, tmp_path, copy_of):
    other = export.export(export.Options(trained_run, tmp_path / "other.safetensors", ema=0.07))
    assert bits(ulx.load(other).base) == bits(ulx.load(trained_run, ema=0.07).base)
    assert ulx.load(other).weights == "EMA; stage2: sigma_rel 0.07"
    young = copy_of(trained_run)
    shutil.copytree(trained_run / "checkpoints" / "stage1", young / "checkpoints" / "stage1")
    back = ulx.load(export.export(export.Options(young)))
    assert back.path == young / "model.safetensors"
    assert back.base is None
    assert bits(back.model) == bits(ulx.load(trained_run).model)
    with pytest.raises(FileExistsError, match="exists already: choose another --out, or --overwrite"):
        export.export(export.Options(young))
    export.export(export.Options(young, overwrite=True))
    with pytest.raises(ValueError, match="is a file already: give the folder of a run"):
        export.export(export.Options(other))
    with pytest.raises(ValueError, match=r"--out is the \.safetensors file to write"):
        export.Options(young, out=Path("model.bin"))


def test_files_that_cannot_be_used_are_named(exported, tmp_path):
    def refused(match: str, file: Path) -> None:
        with pytest.raises(ValueError, match=match) as error:
            ulx.load(file)
        assert str(file) in str(error.value)

    cut = tmp_path / "cut.safetensors"
    for size in (0, 5, 2000, exported.stat().st_size - 1):
        cut.write_bytes(exported.read_bytes()[:size])
        refused("is no safetensors file, or is damaged", cut)
    other = tmp_path / "other.safetensors"
    refused("was not written by python -m ulx.export", rewritten(exported, other, lambda a, m: m.clear()))

    def newer(arrays, metadata):
        metadata["ulx"] = json.dumps(json.loads(metadata["ulx"]) | {"format": 2})

    refused("this one is too old to read it", rewritten(exported, other, newer))
    name = "base.network.project_out.bias"
    refused(f"lacks 1, such as {name}", rewritten(exported, other, lambda a, m: a.pop(name)))
    more = lambda a, m: a.update({"base.more": a[name]})  # noqa: E731
    refused("has 1 too many, such as base.more", rewritten(exported, other, more))
    shape = lambda a, m: a.update({name: a[name][:-1]})  # noqa: E731
    refused(rf"{name} is float32 \(63,\), its configuration has float32 \(64,\)", rewritten(exported, other, shape))
    half = lambda a, m: a.update({name: a[name].astype(np.float16)})  # noqa: E731
    refused(f"{name} is float16", rewritten(exported, other, half))
    with pytest.raises(ValueError, match="holds the one average that it was exported with"):
        ulx.load(exported, ema=0.05)
    with pytest.raises(FileNotFoundError, match="is not there"):
        weights_file.WeightsFile(tmp_path / "none.safetensors")


def test_the_best_checkpoint_of_a_run(small_config, small_dataset, tmp_path):
    """Of stage 1, by hand: the loss was lowest at the second of four checkpoints."""
    train = dataclasses.replace(small_config.train, keep_best=True)
    config = dataclasses.replace(small_config, runs=str(tmp_path), train=train)
    path = run_folder.open_folder(config)
    run_folder.remember_data(path, small_dataset)
    state, weights = runs.stage1_state(config), {}

    with Checkpoints(path / "checkpoints" / "stage1", keep_best=True) as checkpoints:
        for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 6.0)):
            moved = jax.tree.map(lambda leaf, by=step: leaf + by, state.ema)
            now = eqx.tree_at(lambda s: (s.step, s.ema), state, (jax.numpy.asarray(step, jax.numpy.int32), moved))
            checkpoints.save(step, now, {}, loss=loss)
            weights[step] = bits(now.ema_model)
    newest, best = ulx.load(path), ulx.load(path, stage="stage1", best=True)
    assert (newest.step, best.step) == ((4, 0), (2, 0))
    assert (bits(newest.model), bits(best.model)) == (weights[4], weights[2])
    assert best.weights == "EMA; stage1: lowest loss"
    with pytest.raises(ValueError, match="give one of them"):
        ulx.load(path, ema=0.05, best=True)
    job_config = dataclasses.replace(config, train=dataclasses.replace(train, keep_best=False))
    (path / "config.json").write_text(to_json(job_config))
    with pytest.raises(ValueError, match=r"kept no best checkpoint of stage1: train with --train\.keep-best"):
        ulx.load(path, stage="stage1", best=True)
