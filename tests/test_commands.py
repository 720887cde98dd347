"""`ulx.sample`, `ulx.reconstruct`, `ulx.encode` on a run whose weights are drawn, against the mathematics by hand."""

import dataclasses
import itertools
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ulx import encode, reconstruct, runs, sample
from ulx.config import from_json
from ulx.decoders import DiffusionDecoder
from ulx.image_files import ImageFolder, contact_sheet, png_names, write_png
from ulx.nn.conditions import NO_LABEL, Conditions
from ulx.seeding import root_key

LEVEL = 1  # of 255: another batch shape rounds differently, and a value between two levels may go either way


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def ddim(denoise, z, logsnrs):
    """The plain DDIM update, z_s = α_s x̂ + σ_s ε̂, along log-SNRs: what two Euler steps must equal."""
    alpha, sigma = (lambda logsnr: jax.nn.sigmoid(logsnr) ** 0.5), (lambda logsnr: jax.nn.sigmoid(-logsnr) ** 0.5)
    for now, then in itertools.pairwise(logsnrs):
        x_hat = denoise(z, jnp.full(len(z), now))
        eps_hat = (z - alpha(now) * x_hat) / sigma(now)
        z = alpha(then) * x_hat + sigma(then) * eps_hat
    return z


def to_pixels(x) -> np.ndarray:
    return np.clip(np.round((np.asarray(x) + 1) * 127.5), 0, 255).astype(int)


def first_noise(key, shape):
    """The other half of the key is the solver's, for those that draw noise on the way."""
    return jax.random.normal(jax.random.split(key)[0], shape)


call = eqx.filter_jit(lambda network, *args, **given: network(*args, **given))


def decoded(run: runs.Run, z_0, key) -> np.ndarray:
    """Pixels of one z_0 by two DDIM steps of the decoder, evenly spaced in λ."""
    assert isinstance(run.model.decoder, DiffusionDecoder)
    denoiser, schedule = run.model.decoder.denoiser, run.model.decoder.schedule
    top, bottom = schedule.logsnr_max, schedule.logsnr_min
    denoise = lambda x, logsnr: call(denoiser, x, logsnr, context=z_0)  # noqa: E731
    return to_pixels(ddim(denoise, first_noise(key, (1, 16, 16, 3)), [bottom, (top + bottom) / 2, top])[0])


@pytest.fixture(scope="module")
def run(trained_run) -> runs.Run:
    return runs.load(trained_run)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images of several sizes and kinds, two that differ by the suffix alone, one that is none, in two folders."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels[:16, :16]).save(folder / "exact.png")
    Image.fromarray(pixels).save(folder / "large.png")
    Image.fromarray(pixels[:30, :20, 0]).save(folder / "grey.jpg")
    Image.fromarray(pixels[:20, :30]).save(folder / "grey.bmp")
    Image.fromarray(pixels[:8, :8]).save(folder / "deep" / "tiny.png")
    (folder / "broken.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def out(trained_run, images, tmp_path_factory) -> Path:
    """Those images, reconstructed."""
    out = tmp_path_factory.mktemp("out")
    reconstruct.reconstruct(reconstruct.Options(trained_run, images, out))
    return out


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    """`run_command` would put compiled programs into the user's cache."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))


def fails(main, args, capsys) -> str:
    """The one line with which a command refuses."""
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args])
    assert exit.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.fixture(scope="module")
def guided(trained_run, tmp_path_factory) -> sample.Options:
    """Options of samples that are there: six of two classes in turn, in batches of four."""
    out = tmp_path_factory.mktemp("samples")
    options = sample.Options(trained_run, out, num=6, label=("stars", "0"), guidance_scale=1.5, seed=3)
    sample.sample(options)
    return options


class TestSample:
    def test_is_ddim_of_the_averaged_base_model_then_of_the_decoder(self, run, guided):
        """Image 5, of the second batch: its own keys, its label, guidance, λ from −10 to 5 and no further."""
        latent_key, decoder_key = jax.random.split(jax.random.fold_in(root_key(3, "sample"), 5))

        def denoise(z, logsnr):
            x_label, x_none = (call(run.base, z, logsnr, Conditions(jnp.array([index]))) for index in (0, NO_LABEL))
            return x_none + 1.5 * (x_label - x_none)

        z_0 = ddim(denoise, first_noise(latent_key, (1, 8, 8, 4)), [-10.0, -2.5, 5.0])
        found = read(guided.out / "base-seed3-000005.png")
        assert np.abs(found - decoded(run, z_0, decoder_key)).max() <= LEVEL
        assert found.std() > 20
        assert np.abs(found - read(guided.out / "base-seed3-000003.png")).mean() > 5  # of the same class

    def test_the_prior_is_another_model_and_the_files_say_what_they_are(self, guided, tmp_path):
        sample.sample(sample.Options(guided.run, tmp_path, num=4, prior=True, seed=3))
        base, prior = read(guided.out / "base-seed3-000001.png"), read(tmp_path / "prior-seed3-000001.png")
        assert np.abs(base - prior).mean() > 2
        facts = json.loads((guided.out / "base-seed3.json").read_text())
        assert [file["label"] for file in facts["files"]] == ["stars", "circles"] * 3
        assert (facts["steps"], facts["weights"]) == ([6, 4], "EMA")
        assert facts["nfe"] == {"latent": 4, "decoder": 2}
        # The sheet holds the images, enlarged by 6 = 96 / 16, from its first tile on.
        sheet = read(tmp_path / "prior-seed3-sheet.png")
        assert np.array_equal(sheet[6 : 6 + 96 : 6, 6 : 6 + 96 : 6], read(tmp_path / "prior-seed3-000000.png"))

    def test_without_a_label_the_classes_come_in_turn(self):
        names = ("circles", "squares", "7")
        assert sample.labels_in_turn((), names, 5).tolist() == [0, 1, 2, 0, 1]
        assert sample.labels_in_turn(("7", "1"), names, 3).tolist() == [2, 1, 2]  # a name before an index

    def test_options_over_the_runs(self, run):
        given = sample.SamplerOptions(num_steps=7, decoder_solver="heun").over(run.config.sample)
        assert (given.num_steps, given.solver, given.decoder_num_steps, given.decoder_solver) == (7, "euler", 2, "heun")

    def test_command_line(self, trained_run, tmp_path, capsys):
        args = ["--out", str(tmp_path), "--num", "4", "--label", "1", "--seed", "9", "--guidance-scale", "1.5"]
        sampler = ["--sample.num-steps", "2", "--sample.solver", "ancestral", "--sample.guidance-interval", "-3", "5"]
        sample.main([str(trained_run), *args, *sampler, "--ema", "0.1"])
        # Of the steps from −10 and from −2.5 the second is guided.
        assert "4 images of the base model, NFE 3 + 2 (decoder)" in capsys.readouterr().out
        facts = json.loads((tmp_path / "base-seed9.json").read_text())
        assert facts["sampler"]["solver"] == "ancestral"
        assert facts["sampler"]["guidance_interval"] == [-3.0, 5.0]
        assert facts["weights"] == "EMA; stage2: sigma_rel 0.1"
        assert {f"base-seed9-{index:06d}.png" for index in range(4)} <= {file.name for file in tmp_path.iterdir()}
        assert "--overwrite" in fails(sample.main, [trained_run, *args], capsys)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--label", "star"], "did you mean stars?"),
            (["--label", "3"], "no class '3'"),
            (["--sample.num-steps", "0"], "num_steps must be at least 1"),
            (["--sample.solver", "dpmpp_2m", "--sample.churn", "1"], "'dpmpp_2m' takes no churn"),
        ],
    )
    def test_options_that_do_not_fit_the_run(self, trained_run, tmp_path, capsys, args, message):
        assert message in fails(sample.main, [trained_run, "--out", tmp_path / "out", *args], capsys)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--num", "0"], "num must be at least 1"),
            (["--prior", "--label", "1"], "knows no classes"),
            (["--guidance-scale", "nan"], "guidance_scale must be a finite number"),
            (["--guidance", "2"], "--guidance-scale"),  # a typo is answered with what was meant
        ],
    )
    def test_options_that_fit_no_run(self, tmp_path, capsys, args, message):
        with pytest.raises(SystemExit) as exit:
            sample.main([str(tmp_path), *args])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err

    def test_a_folder_that_is_no_run(self, tmp_path, capsys):
        assert "is not a run: it has no config.json" in fails(sample.main, [tmp_path / "nothing"], capsys)

    def test_a_run_without_a_null_label_cannot_guide(self, run, trained_run, tmp_path, monkeypatch):
        config = dataclasses.replace(run.config, label_dropout=0.0)
        monkeypatch.setattr(runs, "load", lambda path, **_: dataclasses.replace(run, config=config))
        with pytest.raises(ValueError, match="trained with label_dropout=0"):
            sample.sample(sample.Options(trained_run, tmp_path / "out", num=2, guidance_scale=2.0))
        assert not (tmp_path / "out").exists()

    def test_a_run_without_stage_2(self, run, trained_run, tmp_path, monkeypatch):
        monkeypatch.setattr(
            runs, "load", lambda path, **_: runs.Run(path, run.config, run.class_names, run.model, None, (6, 0))
        )
        with pytest.raises(FileNotFoundError, match=r"no base model: finish stage 2 first .* or sample the raw prior"):
            sample.sample(sample.Options(trained_run, tmp_path))
        sample.sample(sample.Options(trained_run, tmp_path, num=4, prior=True))


class TestReconstruct:
    def test_names(self, out):
        names = {file.relative_to(out).as_posix() for file in out.rglob("*.png")}
        assert names == {"exact.png", "large.png", "grey.jpg.png", "grey.bmp.png", "deep/tiny.png", "contact_sheet.png"}

    def test_one_image_by_hand(self, run, images, out):
        """The last image, of the second batch; it is the fifth, since the file that is none does not count."""
        ((names, stack),) = ImageFolder(images, 16).batches(9)
        assert names[4] == "large.png"
        latent_key, decoder_key = jax.random.split(jax.random.fold_in(root_key(0, "reconstruct"), 4))
        z_clean = call(run.model.encoder, jnp.asarray(stack[4:]) / 127.5 - 1)
        alpha, sigma = jax.nn.sigmoid(5.0) ** 0.5, jax.nn.sigmoid(-5.0) ** 0.5
        z_0 = alpha * z_clean + sigma * jax.random.normal(latent_key, z_clean.shape[1:])
        assert np.abs(read(out / "large.png") - decoded(run, z_0, decoder_key)).max() <= LEVEL

    def test_prints_the_mean_psnr_of_what_it_wrote_and_names_what_it_skipped(
        self, trained_run, images, tmp_path, capsys
    ):
        args = [str(trained_run), str(images), "--out", str(tmp_path)]
        reconstruct.main(args)
        printed = capsys.readouterr().out
        folder = ImageFolder(images, 16)
        prepared = {name: image for names, stack in folder.batches(9) for name, image in zip(names, stack, strict=True)}
        new = dict(zip(folder.names, png_names(folder.names), strict=True))
        errors = [np.mean((read(tmp_path / new[name]) - image.astype(int)) ** 2) for name, image in prepared.items()]
        decibels = 10 * np.log10(255**2 / np.array(errors))
        error = decibels.std(ddof=1) / np.sqrt(5)
        assert f"PSNR {decibels.mean():.2f} ± {error:.2f} dB over 5 images, decoder NFE 2" in printed
        assert "1 of 6 files cannot be read and were skipped: broken.png (is no image that Pillow knows)" in printed
        assert "5 images from" in printed
        assert "centre-cropped and resized to 16×16" in printed
        assert "1 of them are smaller than that" in printed
        assert "exists already (6 such files)" in fails(reconstruct.main, args, capsys)
        reconstruct.main([*args, "--overwrite"])

    def test_originals_are_safe(self, trained_run, images, tmp_path, capsys):
        before = {file: file.read_bytes() for file in images.rglob("*") if file.is_file()}
        for out in (images, images / "deep", images / "." / "new"):
            line = fails(reconstruct.main, [trained_run, images, "--out", out, "--overwrite"], capsys)
            assert "lies inside" in line
        assert before == {file: file.read_bytes() for file in images.rglob("*") if file.is_file()}

    def test_bad_folders(self, trained_run, tmp_path, capsys):
        assert "is no folder" in fails(reconstruct.main, [trained_run, tmp_path / "no"], capsys)
        (tmp_path / "file.txt").write_text("")
        assert "is no folder" in fails(reconstruct.main, [trained_run, tmp_path / "file.txt"], capsys)
        assert "no images in" in fails(reconstruct.main, [trained_run, tmp_path], capsys)
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "a.png").write_bytes(b"")
        line = fails(reconstruct.main, [trained_run, tmp_path / "bad", "--out", tmp_path / "out"], capsys)
        assert "none of the files" in line
        assert "a.png (is empty)" in line


class TestEncode:
    def test_latents(self, run, trained_run, images, tmp_path, capsys):
        out = tmp_path / "new" / "latents.npz"
        encode.main([str(trained_run), str(images), "--out", str(out)])
        assert "broken.png" in capsys.readouterr().out
        with np.load(out, allow_pickle=False) as found:
            found = dict(found)
        assert found["names"].tolist() == ["deep/tiny.png", "exact.png", "grey.bmp", "grey.jpg", "large.png"]
        x = jnp.asarray(read(images / "exact.png"))[None] / 127.5 - 1
        expected = np.asarray(run.model.encoder(x))[0]
        assert found["z_clean"].shape == (5, 8, 8, 4)
        assert found["z_clean"].dtype == np.float32
        # Two compilations of one network, about 1e-6 apart on values of order 1.
        np.testing.assert_allclose(found["z_clean"][1], expected, atol=2e-5)
        assert expected.std() > 0.1
        assert found["logsnr_0"] == 5.0
        assert (found["step"], found["weights"]) == (6, "EMA")
        assert from_json(str(found["config"])) == run.config
        assert str(found["encoder"]) == encode.weights_hash(run.model.encoder)
        assert "exists already" in fails(encode.main, [trained_run, images, "--out", out], capsys)
        assert not list(out.parent.glob("*aside*"))

    def test_the_hash_tells_encoders_apart(self, run):
        other = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), run.model.encoder)
        assert encode.weights_hash(other) != encode.weights_hash(run.model.encoder)

    def test_out_must_be_an_npz_file(self, trained_run, images, tmp_path):
        with pytest.raises(ValueError, match=r"the \.npz file to write, got .*latents"):
            encode.Options(trained_run, images, tmp_path / "latents")


class TestImageFiles:
    def test_png_names(self):
        assert png_names(["a.PNG", "b.jpg", "b.png", "c/b.webp"]) == ["a.png", "b.jpg.png", "b.png.png", "c/b.png"]
        with pytest.raises(ValueError, match=r"x\.jpg\.png: rename one"):
            png_names(["x.jpg", "x.png", "x.jpg.png"])

    def test_a_picture_that_cannot_be_written_leaves_the_one_before(self, tmp_path, monkeypatch):
        path = tmp_path / "a.png"
        write_png(path, np.zeros((4, 4, 3), np.uint8))
        before = path.read_bytes()

        def full(self: Path, data: bytes) -> int:
            with self.open("wb") as file:
                file.write(data[: len(data) // 2])
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            write_png(path, np.ones((4, 4, 3), np.uint8))
        assert path.read_bytes() == before

    def test_contact_sheet_keeps_every_pixel(self):
        rng = np.random.default_rng(0)
        above, below = rng.integers(0, 256, (2, 5, 4, 4, 3), dtype=np.uint8)
        sheet = contact_sheet(above, below, captions=["a caption that is far too long"] * 5, zoom=3)
        # 5 tiles of 24×12 pixels in 3 columns, 6 pixels apart, 14 for the caption under each.
        assert sheet.shape == (2 * (24 + 6 + 14) + 6, 3 * (12 + 6) + 6, 3)
        y, x = 6 + 44, 6 + 18  # tile 4: second row, second column
        assert np.array_equal(sheet[y : y + 12, x : x + 12], np.kron(above[4], np.ones((3, 3, 1), np.uint8)))
        assert np.array_equal(sheet[y + 12 : y + 24 : 3, x : x + 12 : 3], below[4])

    def test_contact_sheet_refuses(self):
        images = np.zeros((2, 4, 4, 3), np.uint8)
        for stacked, captions in (([], []), ([images[:0]], []), ([images], ["one"])):
            with pytest.raises(ValueError, match="a contact sheet needs"):
                contact_sheet(*stacked, captions=captions)
