"""A run's configuration: frozen dataclasses, one field per choice, written to `config.json` beside the results.

Every field is an option of the command line (`experiments/`), with its docstring as the help text.
"""

import dataclasses
import difflib
import json
import math
import typing
import warnings
from pathlib import Path
from typing import Any, Literal, TypeVar

from ulx import weightings
from ulx.data import DataConfig
from ulx.ema import gamma_of
from ulx.guidance import check_interval
from ulx.models import ModelConfig
from ulx.precision import Dtype
from ulx.rate_control import RateConfig, log_excess
from ulx.samplers import Solver, check_inverse_rho, check_solver
from ulx.text.examples import TextConfig, check_prompts

__all__ = [
    "Config",
    "EvaluateConfig",
    "Optimizer",
    "SampleConfig",
    "TrainConfig",
    "differences",
    "from_json",
    "to_json",
]

Optimizer = Literal["adamw", "muon"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 32
    """Images per step."""
    optimizer: Optimizer = "adamw"
    """adamw, or muon for the matrices of transformer blocks and the convolutions of residual blocks (steps along their
    orthogonalised momentum, as large as AdamW's) and AdamW for everything else."""
    learning_rate: float = 1e-3
    """The peak learning rate."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    final_lr_fraction: float = 0.01
    """The cosine decay ends at this fraction of the peak."""
    weight_decay: float = 0.01
    """Decay of weight matrices and kernels (not of biases, norms and embeddings)."""
    beta2: float = 0.99
    """AdamW's decay of the second moment."""
    skip_nonfinite: int = 0
    """So many steps in a row may be left out because their loss or gradient is not finite; the next stops the run."""
    spike: float = 10.0
    """A loss that lies so many (robust) standard deviations above the median of the last 200, five steps in a row, is
    warned of, and gone back from where there are `rollbacks`. 0: not looked for."""
    rollbacks: int = 0
    """So often a run that diverges (no more steps may be left out, or a spike) goes back to its last good checkpoint,
    and on with the batches that follow: those that led there are left out. In all: a run that is resumed counts on."""
    hang_minutes: float = 30.0
    """If a batch or a step takes so long, the program says so and ends with status 75, to be started again with
    --resume. 0: never."""
    clip_norm: float = 1.0
    """The gradient's global norm is clipped to this. Losses are in bits per pixel, so it means the same at any size."""
    ema_decay: float = 0.998
    """Decay of the weights' moving average, which is what gets evaluated; early on it is (1 + step)/(10 + step)."""
    posthoc_ema: tuple[float, ...] = ()
    """Widths σ_rel of further averages, 0.05 0.10 for example, from whose snapshots one of any width is made after
    training (`--ema` of the commands). None by default."""
    posthoc_snapshots: int = 32
    """How often in a run they are stored, evenly spaced: 4 bytes per parameter and width each time."""
    accumulate: int = 1
    """Each device takes its part of a batch in so many pieces, one after another: less memory."""
    dtype: Dtype = "float32"
    """What the networks compute in. Weights, losses, schedules and the average stay in float32."""
    log_every: int = 20
    """Steps between two lines of the stage's log, stage1.jsonl say."""
    save_every: int = 250
    """Steps between two checkpoints; the last step and an interrupt save too."""
    keep_best: bool = False
    """Keep, beside the newest two checkpoints, the one with the lowest training loss (mean since the one before)."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "posthoc_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("skip_nonfinite", "spike", "rollbacks", "hang_minutes"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.optimizer not in typing.get_args(Optimizer):
            raise ValueError(
                f"unknown optimizer {self.optimizer!r}: use one of {', '.join(typing.get_args(Optimizer))}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for sigma_rel in self.posthoc_ema:
            gamma_of(sigma_rel)
        if len(set(self.posthoc_ema)) < len(self.posthoc_ema):
            raise ValueError(f"posthoc_ema holds a width twice: {self.posthoc_ema}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")

    def stores_averages(self, step: int) -> bool:
        """Whether the averages of `posthoc_ema` are stored after `step` steps. They are after the last one."""
        count = self.posthoc_snapshots
        return bool(self.posthoc_ema) and step * count // self.steps > (step - 1) * count // self.steps


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    num_steps: int = 16
    """Solver steps of the latent sampler, from λ_z(1) to λ_z(0)."""
    solver: Solver = "heun"
    """"euler" is DDIM, one network call a step; "heun" is second order with two, "dpmpp_2m" with one; "tsit5" chooses
    its steps by `tolerance`, whatever num_steps; "ancestral" draws noise at every step."""
    churn: float = 0.0
    """Noise that "euler" and "heun" put back before each step, in steps: 0 is the ODE, 1 the reverse SDE."""
    tolerance: float = 1e-3
    """Error that "tsit5" allows itself in each step."""
    inverse_rho: float = 0.0
    """1/ρ of the steps' spacing (`ulx.samplers.logsnr_grid`): 0 is even in λ, EDM's ρ = 7 is 1/7; below 0 steps are
    shorter where there is little noise. benchmarks/tune_grid.py finds it for a run."""
    guidance_scale: float = 2.0
    """Classifier-free guidance of the guided samples that are shown; 1 is off. What is measured is guided as
    `evaluate.guidance_scale` says."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these two log-SNRs, which spares calls elsewhere; by default everywhere."""
    decoder_num_steps: int = 16
    """Solver steps of the decoder."""
    decoder_solver: Solver = "euler"
    """The decoder's solver."""
    decoder_churn: float = 0.0
    """The decoder's churn."""
    decoder_tolerance: float = 1e-3
    """The decoder's tolerance, for "tsit5"."""
    decoder_inverse_rho: float = 0.0
    """The decoder's 1/ρ."""

    def __post_init__(self):
        for name in ("num_steps", "decoder_num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_solver(self.solver, self.churn, self.tolerance)
        check_solver(self.decoder_solver, self.decoder_churn, self.decoder_tolerance)
        check_inverse_rho(self.inverse_rho)
        check_inverse_rho(self.decoder_inverse_rho)
        if self.guidance_interval is not None:
            check_interval(self.guidance_interval)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    num_samples: int = 512
    """Samples of the base model, and as many of the raw prior, whose distance to the training set is measured."""
    batch_size: int = 128
    """Images per call when evaluating and sampling. It changes no result."""
    levels: int = 16
    """Noise levels per image when the rate is measured."""
    draws: int = 2
    """How often each level is drawn per image."""
    flow_images: int = 16
    """Held-out images whose likelihood under the prior's probability flow is measured too; 0: none."""
    held_out: int | None = None
    """Measure on so many held-out examples, spread over them; by default on all."""
    inception_weights: str | None = None
    """The file of FID's InceptionV3 (pytorch-fid's state dict or jax-fid's pickle): FID and KID as well."""
    inception_resize: Literal["tf1-bilinear", "clean-bicubic"] = "tf1-bilinear"
    """How it is shown the images: "clean-bicubic" is Clean-FID's way, and its distances are called so."""
    lpips: bool = False
    """LPIPS of the reconstructions too; needs pip install "ulx[lpips]"."""
    clip_weights: str | None = None
    """Of a run with captions, a folder of CLIP as Hugging Face lays it out (config.json, model.safetensors,
    tokenizer.json): the CLIP score as well."""
    prompts: tuple[str, ...] = ()
    """Of a run with captions, prompts of which the report shows samples, beside captions of held-out images."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the base model's samples whose distance is measured; 1 is off. Of a run with captions
    `guidance_sweep` says it."""
    guidance_sweep: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Of a run with captions, guidance scales at which samples' alignment and distance are measured, besides 1."""

    def __post_init__(self):
        check_prompts(self.prompts)
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.guidance_scale}")
        if not all(map(math.isfinite, self.guidance_sweep)):
            raise ValueError(f"guidance_sweep must hold finite numbers, got {self.guidance_sweep}")
        if self.flow_images < 0:
            raise ValueError(f"flow_images must not be negative, got {self.flow_images}")
        for name in ("num_samples", "batch_size", "levels", "draws", "held_out"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = "tiny"
    """Where the defaults below come from."""
    variant: str = "unified"
    """What of the method is changed in those defaults: one of `ulx.variants`."""
    name: str = "openmoji"
    """The run's folder is RUNS/NAME."""
    runs: str = "runs"
    """Folder of all runs."""
    resume: bool = False
    """Continue an interrupted run of this name from its newest checkpoint."""
    seed: int = 0
    """Weights, data order and noise follow from it."""
    fsdp: int = 1
    """Devices among which one copy of weights, moments and averages is divided: less memory, more sending. The batch is
    divided among all devices in any case, and results depend on neither but for rounding."""
    loss_factor: float = 1.5
    """c_lf, the decoder's loss factor (Eq. 4): higher buys more bits in the latent. At 1 or below it collapses."""
    sigmoid_bias: float | None = None
    """b of the decoder's sigmoid weighting; by default −3 at 512 pixels moved by the resolution rule: 2.5 at 32."""
    rate: RateConfig = RateConfig()
    """Rate control: adapt the loss factor until the held-out rate is the one asked for."""
    prior_warmup: tuple[int, int] = (50, 250)
    """Stage-1 steps between which the gradient that the prior sends into the encoder rises from 0 to 1. The prior
    itself always trains at weight 1, and afterwards the objective is exactly the paper's."""
    prior_gradient: float = 1.0
    """The weight at which the encoder pays for its rate once the warm-up is over. The paper's is 1; 0 stops the
    gradient into the prior (Tab. 6, A)."""
    kl_weight: float = 0.0
    """Weight of KL[q(z_0|x) ‖ N(0, I)] in what the encoder pays, beside its rate (Tab. 6, A)."""
    autoencoder: str | None = None
    """A run whose stage 1, with all its settings, is taken in the place of training one (Tab. 6, C)."""
    single_stage: bool = False
    """No stage 2: the prior, which is then given the classes, generates (App. B)."""
    base_bias: float = 0.0
    """b of the base model's sigmoid weighting on latents."""
    cache_latents: bool = True
    """Encode the training images once before stage 2, into the run's folder; off: encode every batch, which clips that
    begin anywhere in their videos need."""
    frames_dropout: float = 0.5
    """How often the decoder is not given the first frames of a clip while training, so that it can do without. The
    latent then holds these frames too, for the encoder does not know."""
    base_frames_dropout: float = 0.1
    """How often the base model is not given them. What it has to learn is to continue."""
    label_dropout: float = 0.1
    """How often the base model (and a decoder that is told captions) is trained without its class label and caption,
    for classifier-free guidance."""
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    """How the captions are embedded that --data.captions names."""
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    """Stage 1: encoder, prior and decoder together."""
    train_decoder: TrainConfig = TrainConfig()
    """Between the stages, for reconstruction "mse-then-diffusion": the diffusion decoder on frozen latents."""
    train_base: TrainConfig = TrainConfig()
    """Stage 2: the base model on the frozen encoder's latents."""
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self):
        if self.loss_factor <= 1:
            warnings.warn(
                f"loss_factor={self.loss_factor}: at 1 or below no detail is worth its bits and the latent must "
                "collapse (the decoder's weight never exceeds the prior's); the paper uses 1.3 to 1.7",
                stacklevel=2,
            )
        for name in ("label_dropout", "frames_dropout", "base_frames_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.model.decoder_text and self.data.captions is None:
            raise ValueError("model.decoder_text tells the decoder a caption: it needs --data.captions")
        if self.evaluate.clip_weights is not None and self.data.captions is None:
            raise ValueError("evaluate.clip_weights measure how well images fit their captions: --data.captions")
        if self.evaluate.guidance_scale != 1:
            if self.data.captions is not None:
                raise ValueError("evaluate.guidance_scale: of a run with captions evaluate.guidance_sweep is measured")
            if self.label_dropout == 0:
                raise ValueError(
                    f"evaluate.guidance_scale {self.evaluate.guidance_scale:g} moves samples away from what the base "
                    "model makes without a label, and label_dropout=0 trains none: leave it at 1"
                )
        if self.evaluate.prompts and self.data.captions is None:
            raise ValueError("evaluate.prompts need a run with captions: --data.captions")
        if self.model.given_frames and not self.data.clips:
            raise ValueError(
                f"model.given_frames={self.model.given_frames}, but --data.source {self.data.source} has no clips"
            )
        if self.data.clips and self.evaluate.inception_weights is not None:
            raise ValueError("evaluate.inception_weights is for images: clips are measured by FVD")
        if self.model.given_frames and self.single_stage:
            raise ValueError("single_stage generates with the stage-1 prior, which is given no frames")
        if self.data.clips and not 0 <= self.model.given_frames < self.data.frames:
            raise ValueError(
                f"model.given_frames={self.model.given_frames} must leave some of a clip's {self.data.frames} frames"
            )
        if not 0 <= self.prior_warmup[0] < self.prior_warmup[1]:
            raise ValueError(f"prior_warmup is (first step, last step) with first < last, got {self.prior_warmup}")
        if self.prior_warmup[1] >= self.train.steps:
            raise ValueError(
                f"prior_warmup={self.prior_warmup} ends at or after the last step of stage 1 ({self.train.steps}): the "
                "run would never reach the paper's objective; end it earlier, or train longer"
            )
        for name in ("prior_gradient", "kl_weight"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")
        if self.rate.target_bits_per_pixel is not None:
            if self.model.latent == "pixels":
                raise ValueError("rate.target_bits_per_pixel is the rate of a trained latent, and pixels are none")
            log_excess(self.loss_factor)
        if self.single_stage and (self.model.latent == "pixels" or self.model.latent_prior == "normal"):
            raise ValueError(
                "single_stage generates with the stage-1 prior, and there is no network for it with "
                f"latent={self.model.latent!r}, latent_prior={self.model.latent_prior!r}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name is that of a folder inside {self.runs}/, got {self.name!r}")

    @property
    def decoder_weighting(self) -> weightings.Sigmoid:
        bias = weightings.sigmoid_bias(self.data.resolution) if self.sigmoid_bias is None else self.sigmoid_bias
        return weightings.sigmoid(bias=bias, factor=self.loss_factor)

    @property
    def can_guide(self) -> bool:
        """Whether there are guided samples: a scale that does something, and a null label that was trained."""
        return self.sample.guidance_scale != 1 and self.label_dropout > 0

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of what is trained, in order."""
        trained = {
            "stage1": self.model.latent == "encoder",
            "decoder": self.model.latent == "encoder" and self.model.reconstruction == "mse-then-diffusion",
            "stage2": not self.single_stage,
        }
        return tuple(name for name, is_there in trained.items() if is_there)

    @property
    def train_configs(self) -> dict[str, TrainConfig]:
        """How each of `stages` is trained."""
        all_of_them = {"stage1": self.train, "decoder": self.train_decoder, "stage2": self.train_base}
        return {stage: all_of_them[stage] for stage in self.stages}

    @property
    def path(self) -> Path:
        return Path(self.runs) / self.name


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


Dataclass = TypeVar("Dataclass")


def from_json(text: str, cls: type[Dataclass] = Config) -> Dataclass:
    """The inverse of `to_json`.

    Raises ValueError for a field that `cls` does not have, with the nearest name, and for a choice that is none.
    """
    return _build(cls, json.loads(text), "")


def _build(cls: type[Dataclass], values: dict[str, Any], where: str) -> Dataclass:
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"unknown field {where}{name}" + (f"; did you mean {close[0]}?" if close else ""))
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value, f"{where}{name}.")
        elif typing.get_origin(hints[name]) is typing.Literal and value not in typing.get_args(hints[name]):
            choices = ", ".join(map(repr, typing.get_args(hints[name])))
            raise ValueError(f"{where}{name}={value!r} is none of {choices}")
        arguments[name] = _tuples(value)
    return cls(**arguments)


def _tuples(value: Any) -> Any:
    """JSON has lists where a frozen dataclass has tuples, however deep."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def differences(old: Config, new: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """The fields in which two configurations differ, as `field: old -> new`; `ignore` names fields or groups."""
    return [
        f"{path}: {before!r} -> {after!r}"
        for (path, before), (_, after) in zip(_leaves(old), _leaves(new), strict=True)
        if before != after and not _is_in(path, ignore)
    ]


def _is_in(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(name + ".") for name in names)


def _leaves(config: Any, where: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        path = where + field.name
        leaves += _leaves(value, path + ".") if dataclasses.is_dataclass(value) else [(path, value)]
    return leaves
