"""The proxy on tokenizers whose latents are known, and runs behind the protocol of tokenizers."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import Corner

from ulx import cards, proxy, runs, tokenizers
from ulx.config import SampleConfig, TrainConfig
from ulx.denoiser import StandardNormal
from ulx.generate import decode, example_keys
from ulx.metrics import efficientnet
from ulx.nn.conditions import Conditions
from ulx.nn.transformer import BlockConfig
from ulx.nn.uvit import UViTConfig
from ulx.proxy import Recipe, standardise
from ulx.runner import latent_rate

RECIPE = Recipe(
    base=UViTConfig(channels=(24,), blocks=(1,), block=BlockConfig(head_size=8)),
    train=TrainConfig(steps=3, batch_size=4, warmup_steps=1, ema_decay=0.5, save_every=3),
    sample=SampleConfig(num_steps=2, solver="dpmpp_2m"),
    num_samples=7,
)
KEY = jax.random.key(0)


class Unlabelled(StandardNormal):
    """N(0, I) whatever the label."""

    def given(self, conditions=None):
        return super().given()


class Identity:
    """Pixels as latents, brighter and in other units."""

    def encode(self, x):
        return 3 * x + 0.5

    def decode(self, z, key):
        return (z - 0.5) / 3


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet, "load", Corner)
    monkeypatch.setenv("ULX_CACHE_DIR", str(tmp_path / "cache"))


def test_one_scale_for_all_channels_moves_the_noise_level_by_its_logarithm():
    latents = np.random.default_rng(0).normal([1.0, -2.0], [0.1, 0.3], (500, 4, 4, 2)).astype(np.float32)
    found = standardise(latents, 5.0)
    np.testing.assert_allclose(found.latents.mean((0, 1, 2)), 0, atol=1e-5)
    assert found.latents.std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(found.back(found.latents), latents, atol=1e-6)
    # Noise of exp(−λ/2) on the latents, told in the new units.
    assert math.exp(-found.logsnr_0 / 2) * found.std == pytest.approx(math.exp(-5.0 / 2))
    assert standardise(100 * latents, 9.0).logsnr_0 == tokenizers.NOISE_FREE
    with pytest.raises(ValueError, match="standard deviation is 0: there is nothing to generate"):
        standardise(np.ones((3, 2, 2, 1), np.float32), 5.0)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((8, 8, 8), (1, 1)),
        ((16, 16, 4), (2, 2)),
        ((32, 32, 3), (4, 4)),
        ((4, 32, 32, 16), (1, 4, 4)),
        ((30, 7, 1), (5, 1)),
    ],
)
def test_every_shape_has_eight_tokens_each_way_at_most(shape, patch):
    assert proxy.RECIPE.network(shape).patch == patch


def test_a_perfect_base_model_of_gaussian_latents_gives_their_mean_and_spread(small_dataset, monkeypatch):
    """N(0, 1) on the standardised latents, left with the decoder's noise: variance s² + exp(−λ)."""
    latents = np.random.default_rng(0).normal([1.0, -2.0], 0.5, (len(small_dataset.train), 2, 2, 2)).astype(np.float32)
    made = standardise(latents, 0.0)
    monkeypatch.setattr(proxy, "fit", lambda *_, **__: SimpleNamespace(ema_model=Unlabelled((2, 2, 2))))
    labels = np.zeros(2000, np.int32)
    recipe = dataclasses.replace(RECIPE, sample=SampleConfig(num_steps=64, solver="heun"))
    found = proxy._generated(made, small_dataset.train.labels, small_dataset, labels, recipe, 0, 500).latents
    expected = math.sqrt(made.std**2 + 1)
    assert found.std((0, 1, 2)) == pytest.approx(expected, rel=0.04)  # 8,000 numbers: 0.8 % each, and the solver's
    np.testing.assert_allclose(found.mean((0, 1, 2)), made.mean, atol=0.06)  # four standard errors


def test_pixels_come_back_but_for_noise_that_cannot_be_seen(small_dataset, tmp_path):
    found = proxy.measure(Identity(), small_dataset, RECIPE, batch_size=4)
    metrics = found.metrics
    # Noise of exp(−10/2) of the latents' spread moves a value to the next of 255 levels if it is over half a step.
    images = np.stack([example["image"] for example in small_dataset.train]) / 127.5
    spread = np.sqrt(((images - images.mean(axis=(0, 1, 2))) ** 2).mean())
    step, noise = 2 / 255, math.exp(-5) * spread
    moved = math.erfc(step / 2 / noise / math.sqrt(2))
    # Some 690 of 3,840 values: 0.16 dB of standard error.
    assert metrics["psnr"]["value"] == pytest.approx(10 * math.log10(4 / (moved * step**2)), abs=0.5)
    assert metrics["fd_efflite0_reconstruction"]["value"] < 1e-4 < metrics["fd_efflite0"]["value"]
    assert "bits_per_pixel" not in metrics
    assert found.samples.shape == (7, 16, 16, 3)


def test_of_many_images_it_reads_what_its_training_sees(small_dataset, monkeypatch):
    """Twelve training images and five held-out ones, of which a training of two steps of four takes eight."""
    asked = {}

    def generated(made, own, *_):
        asked.update(latents=made.back(made.latents), own=own)
        return proxy._Generated(made.back(made.latents[:7]), 0, 0)

    monkeypatch.setattr(proxy, "_generated", generated)
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, steps=2), num_held_out=3)
    found = proxy.measure(Identity(), small_dataset, recipe, batch_size=4)
    rows = [0, 1, 3, 4, 6, 7, 9, 11]
    images = np.stack([small_dataset.train[i]["image"] for i in rows]).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(asked["latents"], 3 * images + 0.5, atol=1e-4)
    np.testing.assert_array_equal(asked["own"], small_dataset.train.labels[rows])
    np.testing.assert_array_equal(found.originals, [small_dataset.validation[i]["image"] for i in (0, 2, 4)])
    assert found.metrics["psnr"]["n"] == found.metrics["fd_efflite0_reconstruction"]["n_reference"] == 3
    assert found.metrics["fd_efflite0"]["n_reference"] == 12


def test_distances_by_another_network(small_dataset, monkeypatch):
    monkeypatch.setattr(proxy, "_generated", lambda made, *_: proxy._Generated(made.back(made.latents[:7]), 5, 0))
    own = proxy.measure(Identity(), small_dataset, RECIPE, batch_size=4).metrics
    other = Corner(metric="fid", kernel_metric="kid", definition="FID's", sha256="1d")
    found = proxy.measure(Identity(), small_dataset, RECIPE, network=other, batch_size=4).metrics
    assert found.keys() == {"fid", "kid", "fid_reconstruction", "psnr"}
    for name, same in (
        ("fid", "fd_efflite0"),
        ("kid", "kd_efflite0"),
        ("fid_reconstruction", "fd_efflite0_reconstruction"),
    ):
        assert found[name]["value"] == own[same]["value"]  # of the same features, by another name
        assert found[name]["network"] == {"definition": "FID's", "sha256": "1d"}
    assert found["fid"]["nfe"] == 5
    assert (found["kid"]["n_a"], found["kid"]["n_b"], found["kid"]["against"]) == (5, 7, "held-out images")


def test_a_card_tells_recipes_apart_and_not_tokenizers():
    assert "patch" not in proxy.RECIPE.in_words
    for other in (
        dataclasses.replace(proxy.RECIPE, base=dataclasses.replace(proxy.RECIPE.base, channels=(48,))),
        dataclasses.replace(proxy.RECIPE, train=dataclasses.replace(proxy.RECIPE.train, steps=7)),
    ):
        assert other.in_words != proxy.RECIPE.in_words


def test_the_units_of_latents_change_nothing(small_dataset, monkeypatch):
    monkeypatch.setattr(proxy, "_generated", lambda made, *_: proxy._Generated(made.back(made.latents[:7]), 0, 0))

    class Scaled(Identity):
        def __init__(self, scale):
            self.scale = scale

        def encode(self, x):
            return self.scale * super().encode(x)

        def decode(self, z, key):
            return super().decode(z / self.scale, key)

    found = [proxy.measure(Scaled(scale), small_dataset, RECIPE, batch_size=4).metrics for scale in (1.0, 1e-3, 50.0)]
    # Float32 rounds pixels near the middle between two levels to either.
    for other in found[1:]:
        assert other["psnr"]["value"] == pytest.approx(found[0]["psnr"]["value"], abs=0.1)
    made = [standardise(scale * np.random.default_rng(0).normal(size=(9, 2, 2, 1)), None) for scale in (1.0, 0.01)]
    assert made[0].logsnr_0 == made[1].logsnr_0 == tokenizers.NOISE_FREE
    assert made[1].noise == pytest.approx(0.01 * made[0].noise)
    assert standardise(made[0].latents, 5.0).noise == pytest.approx(math.exp(-2.5))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"encode": lambda x: x[:, ::2] * np.nan},
            "the tokenizer's encode gave NaN or infinity, in the batch from image 0",
        ),
        ({"encode": lambda x: x[:3]}, "the tokenizer's encode gave 3 rows for 4"),
        ({"encode": lambda x: x[:, 0, 0]}, "latents need at least one axis of positions"),
        ({"decode": lambda z, key: z[:, ::2]}, r"gave images of \(8, 16, 3\), the data has \(16, 16, 3\)"),
        ({"rate": lambda x, key: np.ones((len(x), 2))}, "rate is to be nats per image"),
    ],
)
def test_a_tokenizer_s_faults_are_named(fault, message, small_dataset, monkeypatch):
    latents = np.zeros((7, 16, 16, 3), np.float32)
    monkeypatch.setattr(proxy, "_generated", lambda *_: proxy._Generated(latents, 0, 0))
    tokenizer: Any = SimpleNamespace(**{"encode": Identity().encode, "decode": Identity().decode} | fault)
    with pytest.raises(ValueError, match=message):
        proxy.measure(tokenizer, small_dataset, RECIPE, batch_size=4)


def test_a_run_behind_the_protocol(trained_run, small_dataset):
    tokenizer, run = tokenizers.load(str(trained_run)), runs.load(trained_run)
    assert isinstance(tokenizer, tokenizers.RatedRunTokenizer)
    x = np.stack([example["image"] for example in small_dataset.validation])[:4] / np.float32(127.5) - 1
    z = tokenizer.encode(x)
    np.testing.assert_allclose(z, run.model.posterior(jnp.asarray(x)).mean, atol=1e-5)  # compiled or not
    assert tokenizers.noise_level(tokenizer) == 5.0
    z_0 = math.sqrt(1 / (1 + math.exp(-5))) * z
    by_hand = decode(run.model, z_0, run.config.sample, keys=example_keys(KEY, 0, 4)).z
    np.testing.assert_allclose(tokenizer.decode(z, KEY), by_hand, atol=1e-4)
    rate = latent_rate(run.model, run.model.prior, jnp.asarray(x), Conditions(), example_keys(KEY, 0, 4), 16, 1).rate
    np.testing.assert_allclose(tokenizer.rate(x, KEY), rate, rtol=1e-4)


def test_a_run_leaves_a_card_that_can_be_compared(trained_run, small_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proxy, "open_dataset", lambda data: small_dataset)
    monkeypatch.setattr(proxy, "RECIPE", RECIPE)
    out = tmp_path / "out"
    proxy.main([str(trained_run), "--out", str(out), "--batch-size", "4"])
    card = json.loads((out / "card.json").read_text())
    assert set(card["metrics"]) == {
        "fd_efflite0",
        "kd_efflite0",
        "fd_efflite0_reconstruction",
        "psnr",
        "bits_per_pixel",
    }
    assert {path.name for path in out.iterdir()} == {"card.json", "samples.png", "reconstructions.png"}
    table = cards.table([out / "card.json"] * 2).splitlines()
    assert len(table) == 6
    with pytest.raises(SystemExit):
        proxy.main([str(trained_run), "--out", str(out)])
    assert "exists already" in capsys.readouterr().err


def test_other_tokenizers_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_tokenizers.py").write_text(
        "class Half:\n"
        "    logsnr_0 = 3\n"
        "    def encode(self, x): return x[:, ::2, ::2]\n"
        "    def decode(self, z, key): return z.repeat(2, 1).repeat(2, 2)\n"
        "def wrong(): return 5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tokenizers.noise_level(tokenizers.load("my_tokenizers:Half")) == 3.0
    with pytest.raises(ValueError, match="what my_tokenizers:wrong returns has no encode and decode: it is a int"):
        tokenizers.load("my_tokenizers:wrong")
    with pytest.raises(ImportError, match="my_tokenizers has no other"):
        tokenizers.load("my_tokenizers:other")
    with pytest.raises(ValueError, match=r"nowhere is neither the folder of a run nor package\.module:function"):
        tokenizers.load("nowhere")
    with pytest.raises(ValueError, match="my_tokenizers:Half is no folder of a run: give an --out"):
        proxy.run(proxy.Options("my_tokenizers:Half"))
