"""A run with captions from end to end: embedded, trained, measured, shown and asked again."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from stand_ins import Corner, drawn

from ulx import evaluate, export, job, prompted, run_folder, runs, sample
from ulx.checkpoint import Checkpoints
from ulx.config import Config
from ulx.data.pipeline import train_batches
from ulx.data.source import Dataset, Split
from ulx.evaluation import Evaluation
from ulx.evaluation_data import rows_like
from ulx.latents import encoded
from ulx.metrics import clip_score, efficientnet
from ulx.nn.conditions import ConditionSpec
from ulx.seeding import root_int
from ulx.text.examples import Prompts, Remembered, TextConfig, WithText, channels_of, embedded, open_encoder, with_text
from ulx.text.precomputed import Precomputed, write

WORDS = ("a red heart", "星", "", "👩‍🔬 a woman scientist", "moon " * 40)
PROMPTS = ("a blue heart",)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory) -> Path:
    """Any other encoder's: random, of 1 to 6 tokens."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "any.safetensors"
    arrays = {
        caption: rng.standard_normal((1 + i, 8)).astype(np.float32) for i, caption in enumerate((*WORDS, *PROMPTS))
    }
    write(path, arrays, "an encoder of the test")
    return path


@pytest.fixture(scope="module")
def dataset(small_dataset) -> Dataset:
    def captioned(split: Split) -> Split:
        return dataclasses.replace(split, captions=tuple(WORDS[i % len(WORDS)] for i in range(len(split))))

    parts = {"train": captioned(small_dataset.train), "validation": captioned(small_dataset.validation)}
    return dataclasses.replace(small_dataset, **parts)


@pytest.fixture(scope="module")
def config(small_config, embeddings, tmp_path_factory) -> Config:
    return dataclasses.replace(
        small_config,
        runs=str(tmp_path_factory.mktemp("runs")),
        data=dataclasses.replace(small_config.data, source="folder", path="images", captions="txt", labels=False),
        text=TextConfig(encoder=str(embeddings), length=4),
        model=dataclasses.replace(small_config.model, decoder_text=True),
        evaluate=dataclasses.replace(
            small_config.evaluate, prompts=PROMPTS, guidance_sweep=(1.0, 3.0), flow_images=0, num_samples=6
        ),
    )


@pytest.fixture(scope="module")
def replaced(dataset):
    """The data, and a network that needs no package."""
    with pytest.MonkeyPatch.context() as patch:
        # `one_class` is what `--data.no-labels` makes of it.
        told = dataclasses.replace(dataset, class_names=("all",))
        patch.setattr(job, "open_dataset", lambda data: told)
        patch.setattr(evaluate, "open_dataset", lambda data: told)
        patch.setattr(efficientnet, "load", Corner)
        yield


@pytest.fixture(scope="module")
def path(config, replaced, dataset) -> Path:
    """A run as training leaves it, with drawn weights, evaluated."""
    path = run_folder.open_folder(config)
    told = dataclasses.replace(dataset, class_names=("all",))
    text = embedded(told, open_encoder(config.text), path / "text")
    run_folder.remember_data(path, told, text)
    known = run_folder.spec_of(told.class_names, text.channels)
    stage1 = drawn(runs.stage1_state(config, known), seed=1, step=6)
    stage2 = drawn(runs.stage2_state(config, stage1.ema_model, known), seed=2, step=6)
    for name, state in (("stage1", stage1), ("stage2", stage2)):
        with Checkpoints(path / "checkpoints" / name) as checkpoints:
            checkpoints.save(6, state, {"data": train_batches(told, batch_size=4, seed=0)}, wait=True)
        line = {"step": 6, "time": 1.0, "images": 24, "loss": 1.0, "rate": 1.0, "decoder": 1.0, "latent_std": 1.0}
        (path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    evaluate.evaluate(evaluate.Options(path))
    return path


@pytest.fixture(scope="module")
def evaluation(path) -> Evaluation:
    return Evaluation.load(path / "evaluation")


def test_the_model_is_told_captions_and_no_class(path, config, embeddings):
    run = runs.load(path)
    assert run.base is not None
    assert run.base.conditions == ConditionSpec(num_classes=0, text_channels=8)
    assert run.model.decoder.conditions == ConditionSpec(text_channels=8)
    assert run.text == {"channels": 8, "definition": "an encoder of the test"}
    assert channels_of(config.text) == 8
    assert not (path / "text").exists()  # a file of embeddings is read where it is


def test_training_sees_each_image_s_own_caption(config, dataset, embeddings, tmp_path):
    """In the examples of stage 2, whose latents are those of the same images."""
    model = runs.stage1_state(config).model
    text = embedded(dataset, open_encoder(config.text), tmp_path / "text")
    latents = encoded(dataset, model, tmp_path / "latents", batch_size=4, flip=True)
    assert latents.train.captions is not None
    examples, known = with_text(latents, text), Precomputed(embeddings, 4)
    for i, name in enumerate(examples.train.names):
        row = dataset.train.names.index(name.removesuffix(" mirrored"))
        caption = WORDS[row % len(WORDS)]
        assert latents.train.captions[i] == caption
        tokens, mask = known([caption])
        example = examples.train[i]
        np.testing.assert_array_equal(example["text"], tokens[0])
        np.testing.assert_array_equal(example["text_mask"], mask[0])
        assert example["mean"].shape == model.latent_shape
    # A loader's worker opens the file anew.
    source = examples.train.source
    assert isinstance(source, WithText)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[3]["text"], examples.train[3]["text"])


def test_numbers_and_pictures_of_the_prompts(evaluation, dataset):
    metrics, pictures = evaluation.metrics, evaluation.pictures
    by_guidance = metrics["alignment"]["by_guidance"]
    assert list(by_guidance) == ["1", "3"]
    # Without guidance they are the samples whose distance is reported.
    assert by_guidance["1"]["fd_efflite0"]["value"] == pytest.approx(metrics["fd_efflite0"]["base"]["value"], rel=1e-6)
    assert by_guidance["3"]["fd_efflite0"]["value"] != pytest.approx(by_guidance["1"]["fd_efflite0"]["value"], rel=1e-3)
    for found in by_guidance.values():
        assert found["retrieval"]["n"] == found["shuffled_prompts"]["n"] == 6
        assert found["retrieval"]["n_reference"] == 12
    # Every kind has two or three of the twelve images, so each has others.
    assert metrics["alignment"]["ceilings"]["real_images"]["n"] == 6
    assert metrics["alignment"]["ceilings"]["reconstructions"]["n"] == 6
    assert metrics["held_out_prompts"]["retrieval"]["n"] == 5
    assert metrics["held_out_prompts"]["retrieval"]["n_reference"] == 12 + 5
    assert pictures["own_prompts"].tolist() == list(PROMPTS)
    assert pictures["own_prompts_samples"].shape == (1, 3, 16, 16, 3)
    assert pictures["training_prompts"].tolist() == list(dataset.train.captions or ())
    np.testing.assert_array_equal(pictures["training_prompts_real"][7], dataset.train[7]["image"])
    assert pictures["held_out_prompts_samples"].shape == (5, 3, 16, 16, 3)
    # Three samples of a prompt are three.
    assert (pictures["held_out_prompts_samples"][0, 0] != pictures["held_out_prompts_samples"][0, 1]).any()


def test_images_find_others_of_their_kind_and_never_themselves():
    """On a circle, at 0, 10, 50, 60 and 160 degrees; the last is the only one of its kind, and does not count."""
    at = lambda *degrees: np.stack([f(np.radians(degrees)) for f in (np.cos, np.sin)], axis=1)  # noqa: E731
    places = at(0, 10, 50, 60, 160)
    of_line = lambda *kinds: prompted.References([3, 4, 7, 8, 9], list(kinds), places)  # noqa: E731
    asked = np.array([3, 7, 8, 9, 100])  # the last is not among the references
    found = at(0, 50, 60, 160, 0)
    score = lambda kinds, wanted: prompted.leave_one_out(found, asked, wanted, of_line(*kinds))  # noqa: E731
    (one,) = score("aabbc", ["a", "b", "b", "c", "a"]).values()
    assert (one["value"], one["n"]) == (1, 3)
    (one,) = score("abbac", ["a", "b", "a", "c", "a"]).values()
    assert (one["value"], one["n"]) == (0, 3)
    assert score("abcde", ["a", "c", "d", "e", "a"]) == {}


def test_the_report_shows_them(path):
    page = (path / "report.html").read_text()
    for words in ("Prompts and samples", "Do samples follow their prompts?", "a blue heart", "星"):
        assert words in page
    for picture in ("guidance", "own_prompts", "training_prompts", "held_out_prompts"):
        assert (path / "figures" / f"{picture}.png").exists()


def test_prompts_of_a_finished_run(path, embeddings, tmp_path):
    out = sample.sample(sample.Options(path, tmp_path / "a", num=3, prompt=("a blue heart", "星"), guidance_scale=2.0))
    facts = json.loads((out / "base-seed0.json").read_text())
    assert [file["label"] for file in facts["files"]] == ["a blue heart", "星", "a blue heart"]
    read = lambda folder, i: (folder / f"base-seed0-{i:06d}.png").read_bytes()  # noqa: E731
    # The same noise and another caption is another image; the same caption, in another batch, is the same one.
    again = sample.sample(sample.Options(path, tmp_path / "b", num=2, prompt=("星",), guidance_scale=2.0, batch_size=1))
    assert read(out, 0) != read(again, 0)
    assert np.abs(_pixels(out, 1) - _pixels(again, 1)).max() <= 1
    bare = sample.sample(sample.Options(path, tmp_path / "c", num=1))
    assert read(bare, 0) != read(again, 0)
    exported = export.export(export.Options(path, out=tmp_path / "model.safetensors"))
    same = sample.sample(sample.Options(exported, tmp_path / "d", num=2, prompt=("星",), guidance_scale=2.0))
    assert np.abs(_pixels(same, 1) - _pixels(again, 1)).max() <= 1


def _pixels(folder: Path, index: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(folder / f"base-seed0-{index:06d}.png")).astype(int)


def test_what_cannot_be_asked_is_refused(path, trained_run, tmp_path, config):
    ask = lambda *args, **options: sample.sample(sample.Options(*args, out=tmp_path / "no", **options))  # noqa: E731
    with pytest.raises(ValueError, match=r"has no embedding of the caption 'a green heart'"):
        ask(path, prompt=("a green heart",))
    with pytest.raises(ValueError, match="was trained without captions"):
        ask(trained_run, prompt=("a heart",))
    with pytest.raises(ValueError, match="was trained without classes: sample it without --label"):
        ask(path, label=("all",))
    with pytest.raises(ValueError, match="guided towards captions: give a --prompt"):
        ask(path, guidance_scale=2.0)
    with pytest.raises(ValueError, match="knows no classes and captions"):
        ask(path, prompt=("a heart",), prior=True)
    assert not (tmp_path / "no").exists()
    plain = dataclasses.replace(config.data, captions=None)
    model = dataclasses.replace(config.model, decoder_text=False)
    silent = dataclasses.replace(config.evaluate, prompts=())
    clip = dataclasses.replace(silent, clip_weights="clip")
    for changes, message in (
        ({"model": model}, "evaluate.prompts need a run with captions"),
        ({"evaluate": silent}, "model.decoder_text tells the decoder a caption"),
        ({"model": model, "evaluate": clip}, "evaluate.clip_weights measure how well images fit their captions"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, data=plain, **changes)
    with pytest.raises(ValueError, match="encoder is minilm or the path"):
        TextConfig(encoder="t5")


def test_other_embeddings_are_refused(path, config, dataset, tmp_path):
    other = tmp_path / "other.safetensors"
    write(other, {caption: np.ones((2, 8), np.float32) for caption in (*WORDS, *PROMPTS)}, "another encoder")
    changed = dataclasses.replace(config, text=dataclasses.replace(config.text, encoder=str(other)))
    with pytest.raises(ValueError, match=r"text\.encoder"):
        job.run(dataclasses.replace(changed, resume=True))
    assert run_folder.read_config(path) == config  # nothing was changed
    told = dataclasses.replace(dataset, class_names=("all",))
    with pytest.raises(ValueError, match=r"embedded by .*an encoder of the test.*another encoder"):
        run_folder.remember_data(path, told, Precomputed(other))
    # Neither does another run take its autoencoder, whose decoder was told captions by the first.
    taking = dataclasses.replace(changed, name="second", autoencoder=str(path))
    with pytest.raises(ValueError, match=r"the decoder of .* embedded by .*an encoder of the test.*another encoder"):
        job.run(taking)
    assert not taking.path.exists()
    assert run_folder.adopt(taking, Precomputed(Path(config.text.encoder))).model == config.model


def test_evaluated_again_with_other_prompts_and_clip(path, replaced, dataset: Any, tmp_path, evaluation):
    import clip_files

    clip_files.write(tmp_path / "clip", clip_files.config())
    evaluate.evaluate(evaluate.Options(path, prompts=("星",), clip_weights=tmp_path / "clip"))
    again = Evaluation.load(path / "evaluation")
    assert again.pictures["own_prompts"].tolist() == ["星"]
    found = again.metrics["alignment"]["by_guidance"]
    assert found["1"]["retrieval"] == evaluation.metrics["alignment"]["by_guidance"]["1"]["retrieval"]
    assert "clip_score" in again.metrics["definitions"]
    assert found["3"]["clip_score"]["value"] != found["1"]["clip_score"]["value"]
    train, rows = dataset.train, rows_like(dataset.train, 6, root_int(0, "evaluation labels")).tolist()
    images, captions = np.stack([train[row]["image"] for row in rows]), [train.captions[row] for row in rows]
    scores = clip_score.score(clip_score.load(tmp_path / "clip"), images, captions)
    assert again.metrics["alignment"]["ceilings"]["real_images_clip_score"]["value"] == pytest.approx(scores.mean())


def test_a_run_is_trained_on_captions(config, replaced, monkeypatch):
    """From end to end but for what is measured, which is the same for a single stage: captions reach the weights that
    they are for, of the base model and of a decoder that is told them, and of a prior that generates."""
    found = {}

    def measure(path, model, base, dataset, config, text):
        found[config.name] = model, base
        return path / "report.html"

    monkeypatch.setattr(job, "measure", measure)
    # Without decay, which moves weights that nothing reaches.
    trains = {name: dataclasses.replace(getattr(config, name), weight_decay=0.0) for name in ("train", "train_base")}
    for name, single in (("two", False), ("one", True)):
        job.run(dataclasses.replace(config, name=name, single_stage=single, **trains))
    told = run_folder.spec_of(("all",), 8)
    before = runs.stage1_state(config, told).model, runs.stage2_state(config, found["two"][0], told).model
    for then, now in ((before[0].decoder.denoiser, found["two"][0].decoder.denoiser), (before[1], found["two"][1])):
        for where in (lambda d: d.network.text.project.weight, lambda d: d.network.middle.blocks.attention.text.weight):
            assert np.abs(where(then) - where(now)).max() > 1e-8
    # What was measured, and what stage 2 stood on, is the averages, which are what loads.
    loaded = runs.load(Path(config.runs) / "two")
    weights = lambda pair: jax.tree.leaves(eqx.filter(pair, eqx.is_array))  # noqa: E731
    for a, b in zip(weights(found["two"]), weights((loaded.model, loaded.base)), strict=True):
        np.testing.assert_array_equal(a, b)
    model, base = found["one"]
    assert base is model.prior
    assert base.conditions == ConditionSpec(text_channels=8)


class Counting:
    """A text encoder that remembers what it was asked."""

    length, channels, definition = 2, 3, "counting"

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, captions):
        self.asked += captions
        return np.ones((len(captions), 2, 3), np.float32), np.ones((len(captions), 2), bool)


def test_captions_are_embedded_once_and_new_prompts_when_they_come(dataset, tmp_path):
    encoder = Counting()
    for _ in range(2):
        file = embedded(dataset, encoder, tmp_path)
        assert set(encoder.asked) == set(WORDS)
    asked = len(encoder.asked)
    remembered = Remembered(file, encoder)
    remembered(["星", ""])
    assert len(encoder.asked) == asked
    remembered(["星", "new"])
    assert encoder.asked[asked:] == ["星", "new"]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_the_encoder_s_file_lacks_is_said_before_anything_is_made(config, replaced, dataset, tmp_path):
    lacking = tmp_path / "lacking.safetensors"
    write(lacking, {caption: np.ones((2, 8), np.float32) for caption in WORDS}, "some encoder")
    text = dataclasses.replace(config.text, encoder=str(lacking))
    with pytest.raises(ValueError, match="has no embedding of the caption 'a blue heart'"):
        job.run(dataclasses.replace(config, name="lacking", text=text))
    assert not (Path(config.runs) / "lacking").exists()
    with pytest.raises(ValueError, match="guidance_sweep must hold finite numbers"):
        dataclasses.replace(config.evaluate, guidance_sweep=(1.0, float("nan")))
    with pytest.raises(ValueError, match="a prompt is empty"):
        dataclasses.replace(config.evaluate, prompts=("a red heart", " "))
    with pytest.raises(ValueError, match="a prompt is empty"):
        sample.Options(config.path, prompt=("",))


def test_prompts_are_embedded_when_they_are_asked_for():
    encoder = Counting()
    prompts: Any = Prompts(encoder, ["a", "b", "c", "d"])
    assert not encoder.asked
    found = prompts[1:][np.array([2, 0, 2])]
    assert encoder.asked == ["d", "b", "d"]
    assert found.tokens.shape == (3, 2, 3)
