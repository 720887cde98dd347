"""Clips continued from their first frames: a run from end to end, what is measured of it, and the commands on it."""

import base64
import dataclasses
import io
import itertools
import json
import math
import re
from pathlib import Path

import denoising
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from stand_ins import LastCorner

from ulx import encode, evaluate, evaluation, generate, job, predict, reconstruct, runs, sample
from ulx.command_line import parse_arguments
from ulx.data.pixels import to_float
from ulx.data.source import Dataset, InMemory, Split
from ulx.data.video import ShortError, find_videos, frames
from ulx.diffusion import noise, normal
from ulx.evaluation_data import held_out_examples, held_out_rows
from ulx.frames import given_frames
from ulx.generate import example_keys, extend
from ulx.metrics import i3d
from ulx.metrics.frechet import Moments, frechet_distance
from ulx.metrics.kernel import kernel_distance
from ulx.nn.conditions import Conditions
from ulx.samplers import Sample
from ulx.seeding import root_key

SHAPE = (4, 16, 16, 3)


@pytest.fixture(scope="module")
def finished(clip_config, tmp_path_factory):
    """A run on clips from end to end, I3D aside."""
    rng = np.random.default_rng(1)

    def split(count: int) -> Split:
        labels = np.arange(count, dtype=np.int32) % 2
        source = InMemory({"image": rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8), "label": labels})
        return Split(source, tuple(map(str, range(count))), labels)

    dataset = Dataset("clips", 16, ("still", "moving"), split(12), split(6), "f")
    options = dataclasses.replace(clip_config.evaluate, held_out=5, flow_images=0)
    unguided = dataclasses.replace(clip_config.sample, guidance_scale=1.0)
    runs_folder = str(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "open_dataset", lambda data: dataset)
        patch.setattr(i3d, "load", LastCorner)
        patch.setattr(i3d, "MIN_FRAMES", 4)
        job.run(dataclasses.replace(clip_config, runs=runs_folder, evaluate=options, sample=unguided))
    path = Path(runs_folder) / clip_config.name
    return path, evaluation.Evaluation.load(path / "evaluation"), dataset


def test_continuations_begin_with_the_given_frames_and_are_judged_by_the_next(finished):
    path, found, dataset = finished
    originals, continued = found.pictures["originals"], found.pictures["base_samples"]
    assert originals.shape == continued.shape == (5, *SHAPE)
    np.testing.assert_array_equal(originals[:, :2], continued[:, :2])
    assert (originals[:, 2:] != continued[:, 2:]).any()
    rows = held_out_rows(dataset, dataclasses.replace(runs.load(path).config.evaluate, held_out=5))
    np.testing.assert_array_equal(found.pictures["base_labels"], dataset.validation.labels[rows])
    assert found.metrics["sampler"]["labels"] == "the held-out clips' own"
    decibels = lambda a, b: 10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean((1, 2, 3, 4)))  # noqa: E731
    entry = found.metrics["continuation"]
    by_hand = decibels(continued[:, 2:], originals[:, 2:])  # two frames are left, of three that are looked at
    assert entry["psnr"]["value"] == pytest.approx(by_hand.mean(), rel=1e-5)
    repeated = decibels(np.broadcast_to(originals[:, 1:2], originals[:, 2:].shape), originals[:, 2:])
    assert entry["psnr_of_last_frame"]["value"] == pytest.approx(repeated.mean(), rel=1e-5)
    assert entry["gap"]["value"] == pytest.approx((by_hand - repeated).mean(), rel=1e-4)
    assert found.metrics["definitions"]["continuation"]["definition"].startswith("PSNR in dB of the 2 frames after")
    assert found.metrics["clip"] == {"frames": 4, "stride": 1, "given": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"clips of 4 frames .* cannot be evaluated: FVD's I3D takes at least 9"),
        ({"frames_dropout": 0.0}, "--frames-dropout 0: bits and reconstructions are measured without given frames"),
        ({"base_frames_dropout": 0.0}, "--base-frames-dropout 0: the base model's bits are measured without given"),
        ({"evaluate": {"num_samples": 1}}, "--evaluate.num-samples 1: distances need at least 2 examples"),
        ({"evaluate": {"held_out": 1}}, "--evaluate.held-out 1: distances need at least 2 examples"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(clip_config, monkeypatch, changes, message):
    if changes:
        monkeypatch.setattr(i3d, "MIN_FRAMES", 4)
    changes = {
        name: dataclasses.replace(getattr(clip_config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        job.run(dataclasses.replace(clip_config, **changes))


def test_clips_that_are_continued_are_as_many_as_are_held_out(finished):
    with pytest.raises(ValueError, match="continues held-out clips, one sample of each: --held-out says of how many"):
        evaluate.evaluate(evaluate.Options(finished[0], num_samples=50))
    with pytest.raises(ValueError, match=r"^--held-out 1: distances need at least 2 examples"):
        evaluate.evaluate(evaluate.Options(finished[0], held_out=1))


def test_held_out_clips_are_continued_beyond_the_run_s_length(finished, tmp_path, monkeypatch):
    path, _, dataset = finished
    of_run = dataset.validation.source.arrays["image"]
    later = np.random.default_rng(2).integers(0, 256, (6, 3, *SHAPE[1:]), dtype=np.uint8)
    longer = InMemory({"image": np.concatenate([of_run, later], axis=1), "label": dataset.validation.labels})
    held_out = dataclasses.replace(dataset.validation, source=longer)
    opened = {4: dataset, 7: dataclasses.replace(dataset, validation=held_out, fingerprint="of 7 frames")}
    monkeypatch.setattr(predict, "open_dataset", lambda data, frames=None: opened[frames or data.frames])
    run = runs.load(path)
    assert run.base is not None
    guided = dataclasses.replace(run.config, sample=dataclasses.replace(run.config.sample, guidance_scale=2.0))
    monkeypatch.setattr(runs, "load", lambda *_, **__: dataclasses.replace(run, config=guided))
    longer.arrays["image"][0, 2:4] = of_run[0, 1]  # where it stands still
    out = tmp_path / "predicted"
    options = [str(path), "--num", "3", "--frames", "7", "--batch-size", "2", "--out", str(out)]
    predict.main(options)

    rows = [0, 2, 5]
    names = [f"seed0-{row:06d}.png" for row in rows]
    assert find_videos(out / "clips") == find_videos(out / "originals") == names
    originals, clips = (
        np.stack([np.stack(list(frames(out / folder / name))) for name in names]) for folder in ("originals", "clips")
    )
    np.testing.assert_array_equal(originals, longer.arrays["image"][rows])
    # By hand, all three at once: the window is rolled from the given frames on, and 2, 4 and 6 of 7 are reached.
    by_hand = extend(
        run.model,
        run.base,
        to_float(jnp.asarray(originals[:, :2])),
        7,
        run.config.sample,
        given=2,
        keys=example_keys(root_key(0, "predict"), 0, 6)[np.array(rows)],
        conditions=Conditions(label=jnp.asarray([0, 0, 1])),
    )
    np.testing.assert_allclose(clips, (np.asarray(by_hand) + 1) * 127.5, atol=0.51)  # rounded to bytes
    np.testing.assert_array_equal(clips[:, :2], originals[:, :2])
    facts = json.loads((out / "seed0.json").read_text())
    assert facts["sampler"]["guidance_scale"] == 1
    wanted = originals[:, 2:]
    for name, frames_of in (("psnr_by_frame", clips[:, 2:]), ("psnr_of_last_frame_by_frame", originals[:, 1:2])):
        errors = ((frames_of.astype(float) - wanted) ** 2).mean((2, 3, 4)).T
        means = [np.mean(10 * np.log10(255**2 / error[error > 0])) for error in errors]
        np.testing.assert_allclose([entry["value"] for entry in facts[name]], means, rtol=1e-5)
    assert [entry.get("infinite") for entry in facts["psnr_of_last_frame_by_frame"]] == [1, 1, None, None, None]
    with Image.open(out / "seed0-sheet-moving.png") as sheet:
        assert getattr(sheet, "n_frames", 1) == 7
        # The third frame is no longer given: the border of the first tile.
        border = [(sheet.seek(frame), sheet.convert("RGB").getpixel((6, 6)))[1] for frame in range(3)]
    assert border == [(230, 159, 0)] * 2 + [(222, 222, 222)]

    for again, message in (
        (options, "clips/seed0-000000.png exists already"),
        ([str(path), "--num", "7"], "num must be at most the 6 held-out clips of moving-emoji, got 7"),
        ([str(path), "--frames", "2"], f"frames must be above the 2 that {path} is given, got 2"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=re.escape(message)):
            predict.predict(parse_arguments(predict.Options, "", again))
    predict.predict(predict.Options(path, num=2, out=tmp_path / "fewer"))
    fewer = [np.stack(list(frames(tmp_path / "fewer" / "clips" / names[k])))[:4] for k in (0, 2)]
    np.testing.assert_allclose(np.stack(fewer).astype(int), clips[[0, 2], :4], atol=1)  # by other batches: rounding
    opened[4] = dataclasses.replace(dataset, fingerprint="another")
    with pytest.raises(ValueError, match="was trained on other data than clips is now"):
        predict.predict(predict.Options(path, num=1, out=tmp_path / "other"))


def test_clips_that_are_too_short_make_room_for_the_next():
    lengths = [9, 4, 4, 9, 9, 4, 9]

    class Videos:
        def __len__(self):
            return len(lengths)

        def __getitem__(self, index):
            if lengths[index] < 9:
                raise ShortError("has 4 frames")
            return {}

    split = Split(Videos(), tuple("abcdefg"), np.zeros(7, np.int32))
    assert predict.long_enough(split, 1) == [0]
    assert predict.long_enough(split, 3) == [0, 3, 6]
    assert predict.long_enough(split, 4) == [0, 3, 4, 6]
    assert predict.long_enough(split, 6) == [0, 3, 4, 6]


def test_clips_are_compared_with_the_held_out_ones_by_fvd(finished):
    _, found, _ = finished
    assert set(found.metrics["fvd"]) == {"base", "prior", "reconstruction"}
    assert {entry["against"] for entry in found.metrics["fvd"].values()} == {"held-out images"}
    assert found.metrics["fvd"]["base"]["n"] == found.metrics["fvd"]["base"]["n_reference"] == 5
    assert "copies" not in found.metrics
    corner = lambda clips: clips[:, -1, 0, 0] / 127.5 - 1  # noqa: E731
    moments = [Moments.of(corner(found.pictures[name])) for name in ("base_samples", "originals")]
    assert found.metrics["fvd"]["base"]["value"] == pytest.approx(frechet_distance(*moments), rel=1e-4)
    # A continuation is not independent of its clip, whose first frames it has.
    features = [corner(found.pictures[name]).astype(np.float64) for name in ("originals", "base_samples")]
    kernel = found.metrics["against_held_out_images"]["base"]["kd_i3d"]["value"]
    assert kernel == pytest.approx(kernel_distance(*features, paired=True).value, rel=1e-3)
    assert kernel != pytest.approx(kernel_distance(*features).value, rel=1e-2)
    # Pixels of a clip are those of all its frames.
    bits, dims = (found.metrics[f"bits_per_{name}"]["value"] for name in ("pixel", "latent_dim"))
    assert bits * 4 * 16 * 16 == pytest.approx(dims * math.prod(found.metrics["latent_shape"]), rel=1e-5)


def test_the_report_moves(finished):
    path, _, _ = finished
    html = (path / "report.html").read_text()
    section = html.split("Continuations by the base model</h2>")[1].split("</section>")[0]
    images = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]*)"', section)]
    assert len(images) == 10
    with Image.open(io.BytesIO(images[0])) as image:
        frames = getattr(image, "n_frames", 1)
        assert (frames, image.size) == (4, (18, 18))
        border = []
        for frame in range(4):
            image.seek(frame)
            border.append(image.convert("RGB").getpixel((0, 0)))
    assert border == [(230, 159, 0)] * 2 + [(222, 222, 222)] * 2
    with Image.open(path / "figures" / "base_samples.png") as sheet:
        assert sheet.width > 4 * 18
    with Image.open(path / "figures" / "base_samples_moving.png") as sheet:
        assert getattr(sheet, "n_frames", 1) == 4
        inside = []
        for frame in range(4):
            sheet.seek(frame)
            inside.append(sheet.convert("RGB").getpixel((6, 6)))  # the border of the first tile
    assert inside == border
    assert "Are samples copies" not in html
    assert "fvd, base model" in html
    assert "6 held-out clips" in html


def test_windows_of_a_clip_have_noise_of_their_own(finished, tmp_path, monkeypatch):
    """No key, nor one that split and fold_in with small numbers make of it, is used by two of them."""
    path, _, _ = finished
    used, sizes = [], {"sample_latents": runs.load(path).model.latent_shape, "decode": SHAPE}

    def tree(key: jax.Array, depth: int) -> set[bytes]:
        below = (tree(jax.random.fold_in(key, i), depth - 1) for i in range(8)) if depth else ()
        return {jax.random.key_data(key).tobytes()}.union(*below)

    for name, size in sizes.items():

        def recorded(*_, keys, size=size, **__):
            used.append(tree(keys[0], 2))
            return Sample(jnp.zeros((len(keys), *size)), jnp.zeros((), int))

        for module in (sample, generate):
            monkeypatch.setattr(module, name, recorded)
    sample.main([str(path), "--num", "1", "--out", str(tmp_path), "--frames", "7", "--batch-size", "1"])
    assert len(used) == 2 + 2 * 2  # of 4 frames, and twice 2 more
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(used, 2))


def test_commands_on_a_run_of_clips(finished, tmp_path, capsys):
    path, _, _ = finished
    sample.main([str(path), "--num", "3", "--out", str(tmp_path), "--batch-size", "3"])
    said = capsys.readouterr()
    assert "3 clips of the base model" in said.out
    assert "images" not in said.out + said.err
    with Image.open(tmp_path / "base-seed0-000001.png") as image:
        assert (getattr(image, "n_frames", 1), image.size) == (4, (16, 16))
    sample.main([str(path), "--num", "1", "--out", str(tmp_path / "long"), "--frames", "7"])
    with Image.open(tmp_path / "long" / "base-seed0-000000.png") as image:
        assert getattr(image, "n_frames", 1) == 7
    for command in (encode, reconstruct):
        with pytest.raises(SystemExit):
            command.main([str(path), str(tmp_path)])
        assert f"error: {path} was trained on clips, and python -m ulx." in capsys.readouterr().err


def test_what_the_base_model_knows_of_a_clip_frame_by_frame(finished, tmp_path, monkeypatch):
    path, _, dataset = finished
    options = ["--runs", str(path), "--levels", "-30", "30", "--count", "5", "--results", str(tmp_path)]
    monkeypatch.setattr("ulx.data.open_dataset", lambda data: dataset)
    monkeypatch.setattr("sys.argv", ["denoising.py", *options])
    denoising.main()
    (found,) = json.loads((tmp_path / "denoising.json").read_text())["runs"]
    # At λ = 30 a network that predicts v cannot but return what it is given, but for 3e-7 of v.
    assert max(found["share_by_frame"][1]) < 1e-6
    assert np.shape(found["share_by_frame"]) == (2, runs.load(path).model.latent_shape[0])
    # By hand: the base model is given the first frames, and what is given changes what it finds.
    run = runs.load(path)
    base = run.base
    assert base is not None
    images, _ = held_out_examples(dataset, dataclasses.replace(run.config.evaluate, held_out=5))
    x = to_float(jnp.asarray(images))
    z, levels = run.model.posterior(x).mean, jnp.full(5, -30.0)
    z_t = noise(z, levels, normal(example_keys(root_key(0, "denoising"), 0, 5), z))

    def share(count: int) -> float:
        x_hat = base.given(Conditions(frames=given_frames(x, count)))(z_t, levels)
        return float(jnp.sum((x_hat - z) ** 2) / 5 / jnp.sum(jnp.var(z, axis=0, ddof=1)))

    assert found["share"][0] == pytest.approx(share(run.config.model.given_frames), rel=1e-5)  # float32
    assert found["share"][0] != pytest.approx(share(0), rel=5e-5)  # of a base model of 6 steps
    by_frame = np.array(found["share_by_frame"][0])
    assert by_frame.min() <= found["share"][0] <= by_frame.max()  # all together are their average, by variance
    assert (tmp_path / "denoising.png").stat().st_size > 1000
    monkeypatch.setattr("ulx.data.open_dataset", lambda data: dataclasses.replace(dataset, fingerprint="another"))
    with pytest.raises(ValueError, match="was trained on other data than clips is now"):
        denoising.measure(denoising.Settings(runs=(str(path),)))
    with pytest.raises(ValueError, match="at least 2, for a variance"):
        denoising.Settings(runs=(str(path),), count=1)
