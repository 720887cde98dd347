"""Speed of training, encoding, decoding and sampling; with `--against torch` beside the same in PyTorch, in one run.

    python benchmarks/speed.py
    python benchmarks/speed.py --against torch                     the extra torch; eager, and torch.compile
    python benchmarks/speed.py --experiment kinetics600 --work stage1 stage2
    python benchmarks/speed.py --experiment imagenet512 --preset small --batch-size 1 --dtype float32 --work stage1 \
        --repeats 2 --rounds-before 1 --out FILE       and the rest in processes of their own, into the same file

| work | what is timed |
|---|---|
| `stage1`, `stage2` | a training step, the latter on latents that were encoded before |
| `stage2_online` | a step of stage 2 that encodes its batch; not in PyTorch |
| `encode` | images to latents |
| `decode` | latents to images, with as many Euler steps as the preset's decoder has |
| `sample` | noise to latents, with as many Euler steps as the preset's base model has |

All are timed in turn, PyTorch's and ours, so that ratios mean something on a shared machine; times alone do not. The
share of the machine's speed is the FLOPs of the model (`ulx.flops`, without recomputation) over those of a 2048³ matrix
product in the same precision (training steps in the preset's, all else in float32), measured between them by both
libraries, of which the faster counts. Training steps take their batches from the data pipeline; the time that they wait
for it is counted, in ours and in PyTorch's alike.

All works of a command are in memory at once. A file that has other works of the same preset and batch keeps them.
"""

import dataclasses
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import points

Work = Literal["stage1", "stage2", "stage2_online", "encode", "decode", "sample"]
TRAINS = ("stage1", "stage2", "stage2_online")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Speed of training, encoding, decoding and sampling."""

    experiment: Literal["openmoji", "imagenet512", "kinetics600"] = "openmoji"
    preset: str = "tiny"
    """A preset of that experiment; its embedded data."""
    work: tuple[Work, ...] = ("stage1", "stage2", "stage2_online", "encode", "decode", "sample")
    against: Literal["nothing", "torch"] = "nothing"
    """The same work in PyTorch (benchmarks/torch_models.py), with the same weights."""
    batch_size: int | None = None
    """Images or clips at once; by default the preset's."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """By default the preset's."""
    repeats: int = 10
    """Timed rounds."""
    rounds_before: int = 2
    """Rounds that are not timed."""
    sampling_steps: int | None = None
    """Euler steps of decoding and sampling, whose time grows with them; by default the preset's."""
    out: str | None = None
    """Also write the numbers to this JSON file."""


@dataclasses.dataclass
class Job:
    """One kind of work, by one library."""

    run: Callable[[Any], Any]
    """On a batch; returns when it is done."""
    compile_s: float | None = None
    memory_mib: float | None = None
    """Arguments and temporary arrays, by the compiler; in PyTorch on a GPU, the most that was allocated."""
    seconds: list[float] = dataclasses.field(default_factory=list)


class Setting:
    """What both libraries are given: configuration, models, batches."""

    def __init__(self, settings: Settings):
        import jax
        import jax.numpy as jnp
        import numpy as np

        from ulx import job, run_folder, runs
        from ulx.data import open_dataset
        from ulx.data.pipeline import train_batches
        from ulx.flops import TRAINING
        from ulx.latents import encoded

        config = importlib.import_module(settings.experiment).PRESETS[settings.preset]
        change = {name: getattr(settings, name) for name in ("batch_size", "dtype") if getattr(settings, name)}
        config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, **change),
            train_base=dataclasses.replace(config.train_base, **change),
            sample=dataclasses.replace(
                config.sample,
                solver="euler",
                decoder_solver="euler",
                num_steps=settings.sampling_steps or config.sample.num_steps,
                decoder_num_steps=settings.sampling_steps or config.sample.decoder_num_steps,
            ),
        )
        self.config = config
        limit = 4 * max(config.train.batch_size, config.train_base.batch_size)
        dataset = open_dataset(dataclasses.replace(config.data, limit=limit))
        self.told = run_folder.spec_of(dataset.class_names)
        state = runs.stage1_state(config, self.told)
        self.model = jax.tree.map(lambda leaf: jnp.array(leaf) if hasattr(leaf, "shape") else leaf, state.model)
        self.base = runs.stage2_state(config, self.model, self.told).model
        self.folder = tempfile.TemporaryDirectory()
        cached = dataset
        if "stage2" in settings.work:
            size, first = min(limit, config.evaluate.batch_size), config.model.given_frames
            cached = encoded(dataset, self.model, Path(self.folder.name), batch_size=size, flip=False, first=first)
        data = {"stage1": dataset, "stage2": cached, "stage2_online": dataset}
        trains = {"stage1": config.train, "stage2": config.train_base, "stage2_online": config.train_base}
        self.batches: dict[str, Any] = {
            name: train_batches(data[name], batch_size=trains[name].batch_size, seed=0)
            for name in settings.work
            if name in TRAINS
        }
        self.size = {
            name: trains[name].batch_size if name in TRAINS else config.train.batch_size for name in settings.work
        }
        rng = np.random.default_rng(0)
        size = config.train.batch_size
        self.latents = rng.standard_normal((size, *self.model.latent_shape)).astype(np.float32)
        self.images = rng.uniform(-1, 1, (size, *config.data.shape)).astype(np.float32)
        cost = job.cost(self.model, self.base, config)["forward_flops_per_image"]
        stage2 = TRAINING * cost["base"]
        self.flops = {
            "stage1": TRAINING * (cost["encoder"] + cost["prior"] + cost["decoder"]),
            "stage2": stage2,
            "stage2_online": stage2 + cost["encoder"],
            "encode": cost["encoder"],
            "decode": config.sample.decoder_num_steps * cost["decoder"],
            "sample": config.sample.num_steps * cost["base"],
        }

    def dtype(self, name: str) -> str:
        """What the work computes in: weights are float32, and only training casts them."""
        return self.config.train.dtype if name in TRAINS else "float32"

    def batch(self, name: str) -> Any:
        return next(self.batches[name]) if name in self.batches else None


def ours(setting: Setting, name: str) -> Job:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from ulx import generate, runs, stages
    from ulx.nn.conditions import Conditions
    from ulx.sharding import make_mesh
    from ulx.training import make_optimizer, make_step

    config, model, key = setting.config, setting.model, jax.random.key(0)
    began = time.perf_counter()
    if name in TRAINS:
        if name == "stage1":
            state, frozen, train = runs.stage1_state(config, setting.told), None, config.train
            loss = stages.autoencoder_loss(config)
        else:
            state, frozen, train = runs.stage2_state(config, model, setting.told), model, config.train_base
            loss = stages.base_loss(config, math.prod(model.shape[:-1]))
        mesh = make_mesh(devices=jax.devices()[:1])
        began = time.perf_counter()
        step = make_step(loss, make_optimizer(train), train, key=key, mesh=mesh)
        compiled = step.lower((frozen, setting.batch(name)), state).compile()

        def run(batch: Any) -> None:
            nonlocal state
            state, _ = jax.block_until_ready(compiled((frozen, batch), state))

    else:
        keys = generate.example_keys(key, 0, setting.size[name])
        frames = None
        if config.model.given_frames:
            from ulx.frames import given_frames

            frames = given_frames(jnp.asarray(setting.images), 0)
        conditions = Conditions(label=jnp.zeros(setting.size[name], jnp.int32), frames=frames)
        function, inputs, told = {
            "encode": (eqx.filter_jit(lambda model, x: model.posterior(x).mean), (model, setting.images), {}),
            "decode": (
                generate.decode,
                (model, setting.latents, config.sample),
                {"keys": keys, "conditions": conditions},
            ),
            "sample": (
                generate.sample_latents,
                (setting.base, model.latent_schedule, config.sample),
                {"keys": keys, "conditions": conditions.known_to(setting.base.conditions)},
            ),
        }[name]
        compiled = function.lower(*inputs, **told).compile()

        def run(batch: Any) -> None:
            jax.block_until_ready(compiled(*inputs, **told))

    seconds = time.perf_counter() - began
    analysis = compiled.compiled.memory_analysis()
    taken = (analysis.temp_size_in_bytes + analysis.argument_size_in_bytes) / 2**20
    return Job(run, seconds, taken)


def torchs(setting: Setting, name: str, *, compiled: bool) -> Job:
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import torch_models
    import torch_training

    config, device = setting.config, "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = torch_models.Autoencoder(config)
    base = torch_models.base_of(config, setting.model.latent_shape, setting.base.conditions.num_classes)
    torch_models.copy_autoencoder(autoencoder, setting.model)
    torch_models.copy_weights(base, setting.base.network)
    autoencoder, base = (torch_models.for_device(module, device) for module in (autoencoder, base))
    tensor = lambda values: torch.from_numpy(np.asarray(values)).to(device, non_blocking=True)  # noqa: E731
    noise = lambda shape: torch.randn(shape, device=device)  # noqa: E731
    maybe = (lambda function: torch.compile(function, dynamic=False)) if compiled else lambda function: function
    train = config.train if name == "stage1" else config.train_base
    autocast = torch.bfloat16 if setting.dtype(name) == "bfloat16" else None

    def times(count: int) -> Any:
        return (torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1

    size = setting.size[name]
    work: Callable[[Any], Any]
    if name == "stage1":
        loss = maybe(torch_training.stage1_loss(config, autoencoder, noise))
        trainer = torch_training.Trainer(autoencoder, loss, train, autocast=autocast)
        work = lambda batch: trainer.step(tensor(batch["image"]), times(size), times(size), config.prior_gradient)  # noqa: E731
    elif name == "stage2":
        loss = maybe(torch_training.base_loss(config, base, noise))
        trainer = torch_training.Trainer(base, loss, train, autocast=autocast)
        work = lambda batch: trainer.step(tensor(batch["mean"]), tensor(batch["label"]), times(size))  # noqa: E731
    else:
        infer = inference(setting, name, autoencoder, base, maybe, tensor)

        def without_gradients(batch: Any) -> None:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=autocast is not None):
                infer()

        work = without_gradients

    def run(batch: Any) -> None:
        work(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run(setting.batch(name))
    seconds = time.perf_counter() - began if compiled else None
    taken = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return Job(run, seconds, taken)


def inference(
    setting: Setting, name: str, autoencoder: Any, base: Any, maybe: Callable[[Any], Any], tensor: Callable[[Any], Any]
) -> Callable[[], Any]:
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import torch_training

    latents, images = tensor(setting.latents), tensor(setting.images)
    if name == "encode":
        encoder = maybe(autoencoder.encoder)
        return lambda: encoder(images)
    sample, told = setting.config.sample, {}
    if name == "decode":
        network, steps, schedule = maybe(autoencoder.decoder), sample.decoder_num_steps, setting.model.decoder.schedule
        like, told = images, {"context": latents}
    else:
        network, steps, schedule, like = maybe(base), sample.num_steps, setting.model.latent_schedule, latents
        if setting.base.conditions.num_classes:
            told = {"label": torch.zeros(len(latents), dtype=torch.int64, device=latents.device)}
    grid = np.linspace(schedule.logsnr_min, schedule.logsnr_max, steps + 1).tolist()
    return lambda: torch_training.euler(lambda z, level: network(z, level, **told), torch.randn_like(like), grid)


def torch_matmul_speed(dtype: str, size: int = 2048) -> float:
    """FLOP/s of one size³ matrix product by PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    torch.mm(a, a)
    if device == "cuda":
        torch.cuda.synchronize()
    return 2 * size**3 / (time.perf_counter() - began)


def measure(settings: Settings) -> dict[str, Any]:
    import jax

    from ulx.dry_run import matmul_speed

    setting = Setting(settings)
    jobs: dict[str, dict[str, Job]] = {}
    for name in settings.work:
        jobs[name] = {"ulx": ours(setting, name)}
        if settings.against == "torch" and name != "stage2_online":
            for library, compiled in (("torch", False), ("torch.compile", True)):
                jobs[name][library] = torchs(setting, name, compiled=compiled)
                print(f"{name} by {library} is ready", file=sys.stderr)
    waits: dict[str, list[float]] = {name: [] for name in setting.batches}
    peaks: dict[str, list[float]] = {}
    for done in range(settings.rounds_before + settings.repeats):
        timed = done >= settings.rounds_before
        for name, libraries in jobs.items():
            dtype = setting.dtype(name)
            speeds = [matmul_speed(dtype, rounds=1)]
            if settings.against == "torch":
                speeds.append(torch_matmul_speed(dtype))
            for library, job in libraries.items():
                began = time.perf_counter()
                batch = setting.batch(name)
                waited = time.perf_counter() - began
                job.run(batch)
                if timed:
                    job.seconds.append(time.perf_counter() - began)
                    if name in waits and library == "ulx":
                        waits[name].append(waited)
            if timed:
                peaks.setdefault(dtype, []).append(max(speeds))
        print(f"round {done + 1} of {settings.rounds_before + settings.repeats}", file=sys.stderr)
    sampler = setting.config.sample
    results: dict[str, Any] = {
        "experiment": settings.experiment,
        "preset": settings.preset,
        "device": jax.devices()[0].device_kind,
        "machine": points.here()["machine"],
        "work": {},
    }
    for name, libraries in jobs.items():
        size, flops, dtype = setting.size[name], setting.flops[name], setting.dtype(name)
        peak = statistics.median(peaks[dtype])
        found = results["work"][name] = {
            "batch_size": size,
            "dtype": dtype,
            "gflops_per_example": flops / 1e9,
            "steps": {"decode": sampler.decoder_num_steps, "sample": sampler.num_steps}.get(name, 1),
            "matmul_gflop_per_s": peak / 1e9,
            "date": points.here()["date"],
        }
        if waits.get(name):
            found["input_share"] = sum(waits[name]) / sum(libraries["ulx"].seconds)
        for library, job in libraries.items():
            rate = size / statistics.median(job.seconds)
            ratios = [theirs / own for theirs, own in zip(job.seconds, libraries["ulx"].seconds, strict=True)]
            found[library] = {
                "seconds": statistics.median(job.seconds),
                "examples_per_s": rate,
                "share_of_matmul": flops * rate / peak,
                "time_over_ulx": spread(ratios),
                "compile_s": job.compile_s,
                "memory_mib": job.memory_mib,
            }
    if {"stage2", "stage2_online"} <= jobs.keys():
        pairs = zip(jobs["stage2_online"]["ulx"].seconds, jobs["stage2"]["ulx"].seconds, strict=True)
        results["online_over_cached"] = spread([online / cached for online, cached in pairs])
    return results


def merged(results: dict[str, Any], file: Path) -> dict[str, Any]:
    """With the works that the file has beside them, if it is of the same preset on the same machine."""
    before = json.loads(file.read_text()) if file.exists() else {}
    if any(before.get(name) != results[name] for name in ("experiment", "preset", "device", "machine")):
        return results
    return before | results | {"work": before["work"] | results["work"]}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    import numpy as np

    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high}


def table(results: dict[str, Any]) -> str:
    lines = [
        "| work | by | examples/s | of matmul | time over ulx (quartiles) | compiling | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results["work"].items():
        for library, one in found.items():
            if not isinstance(one, dict):
                continue
            ratio = one["time_over_ulx"]
            told = "" if library == "ulx" else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            compiling = "" if one["compile_s"] is None else f"{one['compile_s']:.1f} s"
            memory = "" if one["memory_mib"] is None else f"{one['memory_mib']:,.0f} MiB"
            lines.append(
                f"| {name} | {library} | {one['examples_per_s']:.3g} | {one['share_of_matmul']:.1%} | {told} | "
                f"{compiling} | {memory} |"
            )
    return "\n".join(lines)


def main() -> None:
    import tyro

    from ulx.memory import keep_freed_memory

    settings = tyro.cli(Settings, description=__doc__)
    keep_freed_memory()  # as commands do, for both libraries: one process has one heap
    results = measure(settings)
    print(table(results))
    if "online_over_cached" in results:
        ratio = results["online_over_cached"]["median"]
        print(f"\nA step of stage 2 that encodes its batch takes {ratio:.2f} times one on cached latents.")
    if settings.out:
        Path(settings.out).write_text(json.dumps(merged(results, Path(settings.out)), indent=2) + "\n")


if __name__ == "__main__":
    main()
