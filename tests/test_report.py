"""The report on a run whose every number is known: the real evaluation, with networks that do known things."""

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from stand_ins import Corner

from ulx import evaluation, job, run_folder, runs
from ulx.bound import DiffusionEstimate, RateEstimate
from ulx.image_files import contact_sheet
from ulx.metrics.entries import number, rounded
from ulx.metrics.frechet import Moments
from ulx.metrics.kernel import kernel_distance
from ulx.metrics_log import MetricsLog
from ulx.nn.conditions import ConditionSpec
from ulx.report import document, figures
from ulx.report import text as report_text
from ulx.report.__main__ import main

SHIFT = 5  # levels by which the decoder is off: PSNR 20 log10(255 / 5) = 34.15 dB everywhere


class Runner:
    """The latent is the image, the decoder makes it SHIFT levels brighter; samples are grey and tell their label."""

    def __init__(self, model, config, progress, store):
        self.model, self.config = model, config

    def rate(self, images, denoiser, told=None, *, name):
        # Nats: 1, 2, 3, 4 in the four slices and 0.5 of terminal KL, each image i with (i + 1) times that; the base
        # model (of three classes) needs twice the nats of every slice.
        times = jnp.arange(1.0, len(images) + 1)
        slices = jnp.arange(1.0, 5.0) * (2 if denoiser.conditions.num_classes else 1)
        nats = times[:, None, None] * slices
        return RateEstimate(DiffusionEstimate(nats, self.model.latent_schedule), 0.5 * times, 0 * times)

    def decoder_nats(self, images, told, *, name):
        nats = jnp.full((len(images), 1, 4), 25.0).at[0].set(30.0)
        return DiffusionEstimate(nats, self.model.decoder.schedule)

    def flow_nats(self, images):
        return np.full(len(images), 10.0), 7

    def encode(self, images, *, name=None):
        return images.astype(np.float32)

    def decode(self, latents, purpose, told=None, *, name=None):
        return (latents + SHIFT).astype(np.uint8), 2

    def sample(self, denoiser, count, purpose, told=None, *, guidance=1.0, name=None):
        level = np.full(count, 120) if told is None else 40 + 50 * told.label
        level = level + 20 * (guidance != 1) + np.arange(count) % 7
        return np.broadcast_to(level[:, None, None, None], (count, 16, 16, 3)).astype(np.uint8), 4


def corners(network, images, **_):
    """Features of an image: some of its pixels."""
    return images.reshape(len(images), -1)[:, :8].astype(np.float32)


def zeros(module):
    """A module in which nothing was drawn."""
    struct = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if struct(leaf) else leaf, module)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_config, small_dataset) -> Path:
    """A run's folder with logs and evaluation, and its report."""
    config, dataset = dataclasses.replace(small_config, runs=str(tmp_path_factory.mktemp("finished"))), small_dataset
    path = run_folder.open_folder(config)
    run_folder.remember_data(path, dataset)
    for name, factor in (("stage1", 1.0), ("stage2", 0.1)):
        with MetricsLog(path / f"{name}.jsonl") as log:
            for step in range(1, 7):
                values = {"loss": factor * 12 / step, "rate": 4.0, "decoder": 8 / step, "latent_std": 0.5}
                log.write(step, values if name == "stage1" else {"loss": values["loss"]})
    model = zeros(eqx.filter_eval_shape(runs.stage1_state, config).model)
    base = zeros(eqx.filter_eval_shape(runs.stage2_state, config, model, ConditionSpec(num_classes=3)).model)

    train = np.stack([example["image"] for example in dataset.train])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "Runner", Runner)
        patch.setattr(evaluation, "features", corners)
        patch.setattr(evaluation, "training_moments", lambda *_, **__: Moments.of(corners(None, train)))
        patch.setattr(evaluation.efficientnet, "load", Corner)
        found = evaluation.evaluate(model, base, dataset, config)
    found.metrics["collapsed"] = False
    found.metrics["cost"] = job.cost(model, base, config) | {
        "seconds_stage1": 40.0,
        "seconds_stage2": 20.0,
        "seconds_evaluation": 15,
        "device": "abacus",
    }
    found.save(path / "evaluation")
    document.write(path)
    return path


@pytest.fixture(scope="module")
def html(finished) -> str:
    return (finished / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def metrics(finished) -> dict:
    return json.loads((finished / "evaluation" / "metrics.json").read_text())


def sections(html: str) -> dict[str, str]:
    return {part.split("</h2>")[0].split("<h2>")[1]: part for part in html.split("<section>")[1:]}


def text(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def tiles(section: str) -> list[list[np.ndarray]]:
    """The pictures of each tile, as a browser would decode them."""
    figures = re.findall(r"<figure>(.*?)</figure>", section, re.S)
    found = [re.findall(r'<img src="data:image/png;base64,([^"]*)"', figure) for figure in figures]
    return [[np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in tile] for tile in found]


class Checker(HTMLParser):
    """Collects what refers outside the page, and whether tags are nested as they must be."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in {"meta", "img", "source", "br"}:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "srcset", "href"} and not (value or "").startswith("data:image/png;base64,"):
                self.outside.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class TestPage:
    def test_is_self_contained_and_well_formed(self, html):
        checker = Checker()
        checker.feed(html)
        assert not checker.open
        assert not checker.outside
        assert not checker.tags & {"script", "link", "iframe", "i"}  # i: a class is called <i>&squares
        assert not re.search(r"url\(|@import|https?://", html)
        assert "prefers-color-scheme: dark" in html
        assert 'name="viewport"' in html

    def test_swap_flow_and_mean_image(self, metrics, small_dataset):
        """What the stand-in gives: 10 nats by the flow where the bound has 10.5 (i + 1), on 256 pixels; and a decoder
        that shows another image's latent, SHIFT levels off."""
        bits = lambda nats: pytest.approx(nats / 256 / math.log(2), rel=1e-4)  # noqa: E731
        assert metrics["flow"]["bits_per_pixel"]["value"] == bits(10)
        assert metrics["flow"]["bound_less_flow"]["value"] == bits(10.5 * 3 - 10)
        found = metrics["swap"]["psnr_to_the_latents_image"]["value"]
        assert found == pytest.approx(20 * math.log10(255 / SHIFT), abs=1e-3)
        assert metrics["swap"]["gap"]["value"] > 10
        train, held_out = (
            np.stack([example["image"] for example in split]).astype(float)
            for split in (small_dataset.train, small_dataset.validation)
        )
        error = ((held_out - train.mean(axis=0).round()) ** 2).mean(axis=(1, 2, 3))
        expected = (10 * np.log10(255**2 / error)).mean()
        assert metrics["psnr_of_mean_training_image"]["value"] == pytest.approx(expected, rel=1e-4)

    def test_headline(self, html):
        """5 images with 10.5 (i + 1) nats on 256 pixels and as many latent dimensions."""
        bits = 10.5 * np.arange(1, 6) / 256 / math.log(2)
        error = bits.std(ddof=1) / math.sqrt(5)
        cards = text(html.split('<div class="cards">')[1].split("<section>")[0])
        assert f"Held-out rate, bits/pixel {bits.mean():.3f} ± {error:.3f}" in cards
        assert f"{bits.mean():.3f} ± {error:.3f} bits per latent dimension; 5 images, EMA weights" in cards
        assert "Held-out PSNR, dB 34.15" in cards
        assert "N = 8, NFE 4, no guidance. N is too small: biased" in cards
        assert "Latent alive its standard deviation over images ends at 0.50; its noise has 0.08" in cards

    def test_reconstructions(self, html, small_dataset):
        found = tiles(sections(html)["Reconstructions"])
        originals = [example["image"] for example in small_dataset.validation]
        assert len(found) == 5
        for (original, reconstruction), expected in zip(found, originals, strict=True):
            assert np.array_equal(original, expected)
            assert np.array_equal(reconstruction, expected + SHIFT)
        assert text(sections(html)["Reconstructions"]).count("34.2 dB") == 5

    def test_swap_shows_whose_latent_it_was(self, html):
        """The middle image is the one whose latent was decoded, so the lower is the middle one, SHIFT brighter."""
        found = tiles(sections(html)["Whose image is it? The swap test"])
        assert len(found) == 4
        for other, own, decoded in found:
            assert np.array_equal(decoded, own + SHIFT)
            assert not np.array_equal(other, own)

    def test_labels_belong_to_their_samples(self, html):
        """A sample's grey level says its label: 40 + 50 label, 20 more with guidance, and at most 6."""
        names = ["circles", "&lt;i&gt;&amp;squares", "stars"]
        shown = sections(html)
        for title, extra, count in (("Samples of the base model", 0, 8), ("Samples with guidance 2", 20, 64)):
            captions = re.findall(r"<figcaption>(.*?)</figcaption>", shown[title])
            levels = np.array([tile[0][0, 0, 0] for tile in tiles(shown[title])], int)
            assert captions == [names[(level - extra - 40) // 50] for level in levels]
            assert len(captions) == count
        assert captions == sorted(captions, key=names.index)  # the guided ones stand class by class
        assert {tile[0].shape for tile in tiles(shown["Samples of the raw prior"])} == {(16, 16, 3)}

    def test_nearest(self, html, small_dataset):
        train = [example["image"].astype(int) for example in small_dataset.train]
        pairs = tiles(sections(html)["Are samples copies?"])
        assert len(pairs) == 8
        for sample, shown in pairs:
            assert np.array_equal(shown, min(train, key=lambda image: np.sum((image - sample.astype(int)) ** 2)))

    def test_metrics_table(self, html, metrics, small_dataset):
        rows = re.findall(r"<tr>(.*?)</tr>", sections(html)["All metrics"], re.S)
        cells = {row[0]: row[1:] for row in (re.findall(r"<td>(.*?)</td>", row) for row in rows) if row}
        assert cells["PSNR, dB"][0].startswith("34.15")  # and as many digits as images differ by in rounding
        assert cells["fd_efflite0, base"][0] == number(metrics["fd_efflite0"]["base"]["value"])
        assert cells["fd_efflite0, base"][2:4] == ["8", "4"]
        assert "against training images, N = 12; rank-deficient" in cells["fd_efflite0, base"][4]
        full = metrics | {"fd_efflite0": {"base": metrics["fd_efflite0"]["base"] | {"rank_deficient": False}}}
        assert not any("rank-deficient" in cell for row in report_text.metrics_rows(full) for cell in row)
        assert "against held-out images" in cells["fd_efflite0, reconstruction"][4]
        assert float(cells["fd_efflite0, reconstruction"][0]) == pytest.approx(8 * SHIFT**2)  # a shift in 8 features
        originals = np.stack([example["image"] for example in small_dataset.validation])
        grey = np.repeat(120.0 + np.arange(8)[:, None] % 7, 8, axis=1)  # the Runner's samples of the prior
        kernel = kernel_distance(corners(None, originals), grey)
        found = rounded({"value": kernel.value, "standard_error": kernel.standard_error})
        assert tuple(cells["kd_efflite0, prior"][:2]) == found
        assert cells["precision, reconstruction"][2] == cells["recall, reconstruction"][2] == "5"
        assert "against held-out images, N = 5" in cells["recall, base"][4]
        assert cells["SSIM"][0].startswith("0.9")
        assert "L_z, w = 1, 4 noise levels × 1 draws per image" in cells["bits/pixel, held out"][4]
        # 5 images with 20.5 (i + 1) nats under the base model, and 100 (one of them 120) nats of the decoder's.
        base, decoder = cells["bits/pixel under the base model"], cells["decoder bits/pixel"]
        assert float(base[0]) == pytest.approx(20.5 * 3 / 256 / math.log(2), abs=5e-4)
        assert float(base[1]) == pytest.approx(20.5 * math.sqrt(2.5 / 5) / 256 / math.log(2), rel=0.02)
        assert base[4].startswith("L_z, w = 1, 4 noise levels × 1 draws per image; labels: none")
        assert float(decoder[0]) == pytest.approx(104 / 256 / math.log(2), abs=5e-3)
        assert float(decoder[1]) == pytest.approx(4 / 256 / math.log(2), rel=0.05)
        assert decoder[4].startswith("L_x, w = 1, 4 noise levels × 1 draws per image; leaves out x")
        assert decoder[4].endswith("s terminal KL and −log p(x | x_0)")

    def test_cost(self, html, metrics):
        shown = text(sections(html)["Cost"])
        assert "Stage 1 24 images in" in shown
        assert "abacus" in shown
        forward = metrics["cost"]["forward_flops_per_image"]
        assert f"One sample {report_text.si(4 * forward['base'] + 2 * forward['decoder'])}FLOP" in shown

    def test_settings_and_definitions(self, html):
        settings, meaning = text(sections(html)["Settings"]), text(sections(html)["What the numbers are"])
        assert "train.steps 1000 → 6" in settings
        assert "evaluate.levels 4" in settings
        for said in ("It is not FID", "w = 1", "EMA weights", "−log p(x | x_0)", "λ_z(0) = 5", "1,280 features"):
            assert said in meaning

    def test_attribution(self, html, finished):
        assert "Drawn by A &amp; B" in html
        assert (finished / "figures" / "ATTRIBUTION.txt").read_text() == "Drawn by A & B\n"

    def test_figures(self, finished, html):
        names = {file.stem for file in (finished / "figures").glob("*.png")}
        pictures = {"reconstructions", "base_samples", "guided_samples", "prior_samples", "nearest", "swap"}
        assert names == pictures | {"rate_by_level", "stage1_bits", "stage1_latent", "stage2_loss"}
        with np.load(finished / "evaluation" / "pictures.npz") as saved:
            sheet = contact_sheet(saved["originals"], saved["reconstructions"], captions=["34.2 dB"] * 5)
        assert np.array_equal(np.array(Image.open(finished / "figures" / "reconstructions.png")), sheet)
        light = re.findall(r'<img src="([^"]*)" alt="Stage 1', html)
        dark = re.findall(r'srcset="([^"]*)"><img src="[^"]*" alt="Stage 1', html)
        assert len(light) == len(dark) == 2
        brightness = [
            [np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L")).mean() for uri in uris]
            for uris in (light, dark)
        ]
        assert min(brightness[0]) > 200
        assert max(brightness[1]) < 60


class TestCurves:
    def test_areas_add_up_to_the_rate(self, finished, metrics, monkeypatch):
        """Steps drawn, times their widths, are the bits; with the terminal KL they are the rate. Unequal slices."""
        drawn = []
        monkeypatch.setattr(Axes, "stairs", lambda self, values, edges, **_: drawn.append((values, edges)))
        edges = [5.0, 4.0, 1.0, -10.0]
        figures.rate_by_level(edges, [0.1, 0.2, 0.4], [0.01, 0.01, 0.01], dark=False)
        values, x = drawn[0]
        np.testing.assert_allclose(np.diff(x) * values, [0.4, 0.2, 0.1])  # the slice of least noise at the right
        assert list(x) == edges[::-1]
        total = sum(metrics["rate_by_level"]["bits_per_pixel"]) + metrics["terminal_bits_per_pixel"]
        assert total == pytest.approx(metrics["bits_per_pixel"]["value"], rel=1e-6)

    def test_curves_are_over_images_seen(self, finished, monkeypatch):
        """Six steps of four images; the prior's warm-up, steps 1 to 3, is shaded."""
        called = {}

        def record(seen, lines, *, ylabel, dark, levels, span):
            called[ylabel] = (seen, lines, levels, span)
            return b""

        monkeypatch.setattr(figures, "curves", record)
        document.write(finished)
        seen, lines, levels, span = called["bits/pixel"]
        assert seen.tolist() == [4, 8, 12, 16, 20, 24]
        np.testing.assert_allclose(lines["loss"], [12, 6, 4, 3, 2.4, 2])
        assert levels["rate, held out"] == pytest.approx(10.5 * 3 / 256 / math.log(2), rel=1e-5)
        assert span == (4, 12)
        np.testing.assert_allclose(called["weighted bits/pixel"][1]["loss"], [1.2, 0.6, 0.4, 0.3, 0.24, 0.2])

    def test_smooth(self):
        values = np.array([0.0, 3.0, 6.0, 0.0, 0.0])
        np.testing.assert_allclose(figures.smooth(values, 3), [1.5, 3.0, 3.0, 2.0, 0.0])
        np.testing.assert_array_equal(figures.smooth(values, 1), values)
        with pytest.raises(ValueError, match="odd and positive, got 4"):
            figures.smooth(values, 4)


class TestIncomplete:
    @pytest.fixture(autouse=True)
    def _no_plots(self, monkeypatch):
        monkeypatch.setattr(figures, "curves", lambda *_, **__: b"")
        monkeypatch.setattr(figures, "rate_by_level", lambda *_, **__: b"")

    def test_a_run_under_way(self, finished, copy_of):
        path = copy_of(finished)
        (path / "stage2.jsonl").unlink()
        lines = (path / "stage1.jsonl").read_text().splitlines()[:4]
        (path / "stage1.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "los')  # cut short by a crash
        (path / "evaluation" / "metrics.json").unlink()
        shown = text(document.write(path).read_text())
        assert "Stage 1 is at step 4 of 6." in shown
        assert "Stage 2 has no stage2.jsonl: it has not been trained yet." in shown
        assert "No evaluation yet" in shown
        assert "Samples of" not in shown
        assert "Latent alive" in shown

    def test_a_collapse_is_found_in_the_log_whatever_the_last_process_saw(self, finished, copy_of):
        path = copy_of(finished)
        log = (path / "stage1.jsonl").read_text().splitlines()
        log[3] = log[3].replace('"latent_std": 0.5', '"latent_std": 0.03')
        (path / "stage1.jsonl").write_text("\n".join(log))
        assert "Latent collapsed" in text(document.write(path).read_text())

    def test_one_held_out_image_and_no_cost(self, finished, copy_of):
        """One image has no standard error and nobody to swap with; an evaluation run by itself has no cost."""
        path = copy_of(finished)
        found = evaluation.Evaluation.load(path / "evaluation")
        for name in ("originals", "reconstructions", "swapped"):
            found.pictures[name] = found.pictures[name][:1]
        for name in ("bits_per_pixel", "psnr"):
            found.metrics[name]["standard_error"] = math.nan
        del found.metrics["cost"], found.metrics["collapsed"]
        found.save(path / "evaluation")
        html = document.write(path).read_text()
        assert "swap test" not in "".join(sections(html))
        assert "nan" not in text(html)
        assert "counted at the end of training" in text(html)

    def test_rate_control_shows_the_factor_that_was_felt(self, finished, copy_of):
        path = copy_of(finished)
        config = json.loads((path / "config.json").read_text())
        config["rate"]["target_bits_per_pixel"] = 0.3
        (path / "config.json").write_text(json.dumps(config))
        lines = [json.loads(line) for line in (path / "stage1.jsonl").read_text().splitlines()]
        added = [json.dumps(line | {"loss_factor": 2.25, "felt_loss_factor": 2.75}) for line in lines]
        (path / "stage1.jsonl").write_text("\n".join(added) + "\n")
        assert "Loss factor 2.75 (adapted for 0.3 bits/pixel)" in text(document.write(path).read_text())
        assert (path / "figures" / "stage1_loss_factor.png").exists()

    def test_another_average_than_training_s_is_named(self, finished, html, small_dataset, copy_of, monkeypatch):
        path = copy_of(finished)
        found, config = evaluation.Evaluation.load(path / "evaluation"), run_folder.read_config(path)
        monkeypatch.setattr(job, "evaluate", lambda *_: found)
        monkeypatch.setattr(job, "cost", lambda *_: found.metrics["cost"])
        model = eqx.filter_eval_shape(runs.stage1_state, config).model
        written = job.measure(path, model, model.prior, small_dataset, config, weights="EMA; stage2: sigma_rel 0.07")
        assert "Weights: EMA; stage2: sigma_rel 0.07" in text(written.read_text())
        assert "Weights:" not in text(html)

    def test_a_run_that_cannot_guide_has_no_guided_samples(self, finished, small_config, copy_of):
        assert small_config.can_guide
        off = dataclasses.replace(small_config.sample, guidance_scale=1.0)
        assert not dataclasses.replace(small_config, label_dropout=0.0).can_guide
        assert not dataclasses.replace(small_config, sample=off).can_guide
        path = copy_of(finished)
        found = evaluation.Evaluation.load(path / "evaluation")
        del found.metrics["guided_samples"], found.pictures["guided_samples"], found.pictures["guided_labels"]
        found.save(path / "evaluation")
        titles = sections(document.write(path).read_text())
        assert "Samples of the base model" in titles
        assert not any("guidance" in title for title in titles)

    def test_large_pictures_are_fewer(self, finished, copy_of):
        path = copy_of(finished)
        found = evaluation.Evaluation.load(path / "evaluation")
        big = {"prior_samples": np.zeros((64, 512, 512, 3), np.uint8)}
        dataclasses.replace(found, pictures=found.pictures | big).save(path / "evaluation")
        assert len(tiles(sections(document.write(path).read_text())["Samples of the raw prior"])) == 8

    @pytest.mark.parametrize(
        ("break_it", "error", "message"),
        [
            (lambda path: (path / "config.json").unlink(), FileNotFoundError, "is not a run: it has no config.json"),
            (lambda path: (path / "dataset.json").write_text("{"), ValueError, "dataset.json cannot be read"),
            (lambda path: (path / "dataset.json").write_text("{}"), ValueError, "it lacks attribution, class_names"),
            (lambda path: (path / "config.json").write_text("[]"), ValueError, "config.json cannot be read"),
            (
                lambda path: (path / "evaluation" / "metrics.json").write_text("{}"),
                ValueError,
                "lacks 'bits_per_pixel': evaluate again with `python -m ulx.evaluate",
            ),
            (
                lambda path: (path / "evaluation" / "pictures.npz").write_bytes(b"PK"),
                ValueError,
                "evaluation cannot be read .*: evaluate again",
            ),
            (lambda path: (path / "evaluation" / "pictures.npz").unlink(), ValueError, "evaluation cannot be read"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, finished, copy_of, break_it, error, message):
        path = copy_of(finished)
        before = (path / "report.html").read_bytes()
        break_it(path)
        with pytest.raises(error, match=message):
            document.write(path)
        assert (path / "report.html").read_bytes() == before

    def test_command_line(self, finished, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
        main([str(finished)])
        assert capsys.readouterr().out.strip() == str(finished / "report.html")
        (tmp_path / "file").write_text("")
        for path, message in ((tmp_path / "no", "is not a run"), (tmp_path / "file", "is a file")):
            with pytest.raises(SystemExit):
                main([str(path)])
            assert re.fullmatch(rf"error: {path} {message}.*\n", capsys.readouterr().err)
