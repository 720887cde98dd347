"""The untrained states of a run's stages, and loading what was trained in its folder (`ulx.run_folder`)."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import equinox as eqx

from ulx.checkpoint import Checkpoints
from ulx.config import Config, TrainConfig, from_json
from ulx.data.source import Dataset
from ulx.decoders import DiffusionDecoder
from ulx.denoiser import Denoiser
from ulx.ema import gamma_of
from ulx.models import UnifiedLatents
from ulx.nn.conditions import ConditionSpec
from ulx.rate_control import Control
from ulx.run_folder import described, latest, read_config, read_data, spec_in
from ulx.seeding import root_key
from ulx.sharding import make_mesh, place
from ulx.snapshots import Snapshots
from ulx.stages import make_base, make_decoder
from ulx.text.encoders import TextEncoder
from ulx.text.examples import open_encoder
from ulx.training import TrainState, make_optimizer
from ulx.weights_file import WeightsFile

__all__ = [
    "Run",
    "Stage",
    "autoencoder",
    "decoder_state",
    "load",
    "parts",
    "stage1_state",
    "stage2_state",
    "with_decoder",
]

Stage = Literal["stage1", "decoder", "stage2"]
Widths = Mapping[Stage, float | Literal["best"]]

_OPTION = {"stage1": "--train", "decoder": "--train-decoder", "stage2": "--train-base"}


TOO_FAR = 0.05
"""Error of a profile above which `load` warns. 32 snapshots of widths 0.05 and 0.10 make 0.02 to 0.25 below it."""


def stage1_state(config: Config, spec: ConditionSpec = ConditionSpec()) -> TrainState:
    """Untrained encoder, prior and decoder with their optimizer, for data that have that much to tell. The prior is
    told it where it is the base too."""
    key = root_key(config.seed, "stage1 weights")
    model = UnifiedLatents(config.data.shape, config.model, spec=spec, prior_conditioned=config.single_stage, key=key)
    control = None if config.rate.target_bits_per_pixel is None else Control.start(config.loss_factor)
    posthoc = len(config.train.posthoc_ema)
    return TrainState(model, make_optimizer(config.train), posthoc=posthoc, control=control)


def decoder_state(config: Config, model: UnifiedLatents, spec: ConditionSpec) -> TrainState:
    """Untrained diffusion decoder for a trained encoder, with its optimizer."""
    decoder = make_decoder(model, config.model, spec, key=root_key(config.seed, "decoder weights"))
    return TrainState(decoder, make_optimizer(config.train_decoder), posthoc=len(config.train_decoder.posthoc_ema))


def with_decoder(model: UnifiedLatents, decoder: DiffusionDecoder) -> UnifiedLatents:
    """That autoencoder with another decoder."""
    return eqx.tree_at(lambda m: m.decoder, model, decoder)


def stage2_state(config: Config, model: UnifiedLatents, spec: ConditionSpec) -> TrainState:
    """Untrained base model with its optimizer."""
    base = make_base(model, config.model, spec, key=root_key(config.seed, "stage2 weights"))
    return TrainState(base, make_optimizer(config.train_base), posthoc=len(config.train_base.posthoc_ema))


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run: EMA weights, ready to encode, decode and sample."""

    path: Path
    config: Config
    class_names: tuple[str, ...]
    model: UnifiedLatents
    base: Denoiser | None
    """None while stage 2 has no checkpoint, and beside another average of stage 1 than it was trained on."""
    step: tuple[int, int]
    """Steps of stage 1 and stage 2 in these weights; 0 for a stage that the run has not."""
    weights: str = "EMA"
    """Which average they are, in words."""
    text: Mapping[str, Any] | None = None
    """What embedded the captions that it was trained on: `definition` and `channels`."""
    fingerprint: str = ""
    """Of the data set that it was trained on."""

    @property
    def folder(self) -> Path:
        """Where what is made of the run goes: its own folder, or that of its file."""
        return self.path if self.path.is_dir() else self.path.parent

    def open_text(self, file: Path | None = None) -> TextEncoder:
        """What embeds prompts for this run: its own encoder, or, of a run that was trained on a file of embeddings,
        another file with those of new prompts, which is believed to be by the same encoder.

        Raises ValueError for a run without captions, or an encoder that cannot be the one that it was trained with;
        and as `ulx.text.examples.open_encoder`.
        """
        if self.text is None:
            raise ValueError(f"{self.path} was trained without captions (--data.captions): it takes no prompts")
        config = self.config.text
        encoder = open_encoder(config if file is None else dataclasses.replace(config, encoder=str(file)))
        known, found = dict(self.text), described(encoder)
        if file is not None:  # of a file by other means the sha256 is all that its definition says
            known, found = {"channels": known["channels"]}, {"channels": encoder.channels}
        if known != found:
            raise ValueError(
                f"{self.path} was trained on captions embedded by {known}, and the encoder here is {found}"
            )
        return encoder

    def check_data(self, dataset: Dataset) -> None:
        """Raises ValueError for other data than it was trained on."""
        if dataset.fingerprint != self.fingerprint:
            raise ValueError(
                f"{self.path} was trained on other data than {dataset.name} is now, and what it was not shown is not "
                "known: restore the data"
            )

    def check_guidance(self, scale: float) -> None:
        """Raises ValueError where there is nothing to move away from."""
        if scale != 1 and self.config.label_dropout == 0:
            raise ValueError(
                f"{self.path} was trained with label_dropout=0, so its base model has no prediction without a label to "
                "move away from: sample it with --guidance-scale 1"
            )

    def refuse_clips(self, what: str) -> None:
        """Raises ValueError for a run on clips, which `what` does not know."""
        if self.config.data.clips:
            raise ValueError(f"{self.path} was trained on clips, and {what} takes images alone")


def load(path: str | Path, *, ema: float | None = None, stage: Stage = "stage2", best: bool = False) -> Run:
    """Load a run's newest weights: the moving average of training or, with `ema`, one that its snapshots make.

    Args:
        path: the folder of a run, or the file that `python -m ulx.export` made of one.
        ema: σ_rel of an average up to the newest snapshot of `stage`, in place of that stage's moving average; needs a
            run that was trained with `posthoc_ema`. Warns if the snapshots cannot make it well (`ema.Synthesis`).
        stage: "stage2" is the base model. "stage1" is encoder, prior and decoder; then the base model, which knows the
            latents of the moving average's encoder, is left out.
        best: the moving average at the checkpoint of `stage` with the lowest loss, in place of the newest; needs a run
            that was trained with `keep_best`.

    Raises:
        FileNotFoundError: naming what is missing, for a folder that is no run or has no checkpoint or snapshot yet.
        ValueError: `ema` is out of range, the stage was trained without `posthoc_ema` or `keep_best`, both are asked
            for, or one of a file; or as `weights_file.WeightsFile`.
    """
    path = Path(path)
    if ema is not None and best:
        raise ValueError("ema and best are two choices of weights: give one of them")
    if path.is_file():
        if ema is not None or best:
            raise ValueError(
                f"{path} holds the one average that it was exported with: ask the run's folder for another"
            )
        return _from_file(path)
    if ema is not None:
        gamma_of(ema)  # refused before anything is read
    for file in ("config.json", "dataset.json"):
        if not (path / file).exists():
            raise FileNotFoundError(f"{path} is not a run: it has no {file}")
    config = read_config(path)
    data = read_data(path)
    classes, text, known, fingerprint = tuple(data["class_names"]), data.get("text"), spec_in(data), data["fingerprint"]
    if (ema is not None or best) and stage not in config.stages:
        raise ValueError(f"{path} has no {stage} to choose weights of: it trained {', '.join(config.stages)}")
    weights = "EMA" if ema is None else f"EMA; {stage}: sigma_rel {ema:g}"
    width: Widths = {} if ema is None and not best else {stage: "best" if ema is None else float(ema)}
    if best:
        weights = f"EMA; {stage}: lowest loss"
    model, steps = autoencoder(path, config, known, width)
    if config.single_stage:
        assert isinstance(model.prior, Denoiser)
        return Run(path, config, classes, model, model.prior, (steps, 0), weights, text, fingerprint)
    if width and stage == "stage1":
        return Run(path, config, classes, model, None, (steps, 0), weights, text, fingerprint)
    base, base_steps = None, 0
    if latest(path, "stage2") is not None:
        base, base_steps = _averaged(path, "stage2", stage2_state(config, model, known), config, width)
    elif stage in width:
        raise FileNotFoundError(f"{path} has no base model yet: finish stage 2 first (--resume)")
    return Run(path, config, classes, model, base, (steps, base_steps), weights, text, fingerprint)


def parts(model: UnifiedLatents, base: Denoiser | None) -> dict[str, Any]:
    """The models of a run by name, each once."""
    found = {"encoder": model.encoder, "prior": model.prior, "decoder": model.decoder, "base": base}
    return {
        name: part for name, part in found.items() if part is not None and (name != "base" or part is not model.prior)
    }


def _from_file(path: Path) -> Run:
    file = WeightsFile(path)
    config = from_json(json.dumps(file.facts["config"]))
    data, (steps, base_steps) = file.facts["dataset"], file.facts["steps"]
    classes, text, known = tuple(data["class_names"]), data.get("text"), spec_in(data)
    model = stage1_state(config, known).model
    if "decoder" in config.stages:
        model = with_decoder(model, decoder_state(config, model, known).model)
    base = stage2_state(config, model, known).model if base_steps else None
    filled = file.filled(parts(model, base))
    where = lambda m: (m.encoder, m.prior, m.decoder)  # noqa: E731
    model = eqx.tree_at(where, model, tuple(filled[name] for name in ("encoder", "prior", "decoder")))
    base = model.prior if config.single_stage else filled.get("base")
    return Run(
        path, config, classes, model, base, (steps, base_steps), file.facts["weights"], text, data["fingerprint"]
    )


def autoencoder(
    path: Path, config: Config, spec: ConditionSpec, width: Widths = MappingProxyType({})
) -> tuple[UnifiedLatents, int]:
    """The newest encoder, prior and decoder of a run, and the steps of its stage 1. Raises as `load`.

    `width` holds σ_rel, or "best", for a stage that is not to have the newest of its moving average.
    """
    state = stage1_state(config, spec)
    model, steps = state.model, 0
    if "stage1" in config.stages:
        model, steps = _averaged(path, "stage1", state, config, width)
    if "decoder" in config.stages:
        decoder, _ = _averaged(path, "decoder", decoder_state(config, model, spec), config, width)
        model = with_decoder(model, decoder)
    return model, steps


def _averaged(path: Path, stage: Stage, state: TrainState, config: Config, width: Widths) -> tuple[Any, int]:
    """What a stage trained, with one of its averages, whole on every device, and the step it ends at."""
    if not (path / "checkpoints" / stage).is_dir():
        raise FileNotFoundError(f"{path} has no checkpoint of {stage} yet: finish it first (--resume)")
    chosen, train = width.get(stage), config.train_configs[stage]
    if chosen == "best" and not train.keep_best:
        raise ValueError(f"{path} kept no best checkpoint of {stage}: train with {_OPTION[stage]}.keep-best")
    with Checkpoints(path / "checkpoints" / stage, keep_best=chosen == "best", read_only=True) as checkpoints:
        step = checkpoints.best if chosen == "best" else None
        state = checkpoints.restore(place(state, make_mesh()), step=step)
    if isinstance(chosen, float):
        return _synthesised(path, stage, train, state, chosen)
    return state.ema_model, int(state.step)


def _synthesised(path: Path, stage: Stage, train: TrainConfig, state: TrainState, sigma_rel: float) -> tuple[Any, int]:
    """The model of a stage with the average of width `sigma_rel`, and the step it ends at."""
    option = _OPTION[stage]
    if not train.posthoc_ema:
        raise ValueError(
            f"{path} kept no snapshots of {stage}, so it has the one average it was trained with: train with "
            f"{option}.posthoc-ema 0.05 0.10 to choose another afterwards"
        )
    snapshots = Snapshots(path / "snapshots" / stage, train.posthoc_ema)
    if not snapshots.steps:
        raise FileNotFoundError(f"{path} has no snapshot of {stage} yet: train on (--resume)")
    average, step, error = snapshots.average(sigma_rel, state.ema)
    if error > TOO_FAR:
        widths = ", ".join(f"{width:g}" for width in train.posthoc_ema)
        warnings.warn(
            f"sigma_rel={sigma_rel:g} is beyond what {len(snapshots.steps)} snapshots of widths {widths} can make: the "
            f"profile is off by {error:.0%} of its norm. Choose a width nearer to theirs, or train with more "
            f"{option}.posthoc-snapshots",
            stacklevel=3,
        )
    return eqx.combine(average, state.model), step
