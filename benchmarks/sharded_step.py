"""What dividing a step among devices costs: the sharded step on virtual devices against a plain one on a single device.

    python benchmarks/sharded_step.py
    python benchmarks/sharded_step.py --per-device 8 --repeats 20 --out FILE.json

Weak scaling: n devices get n times the batch. Virtual devices share this machine's cores, so a step on n of them does
the work of a plain step (`jax.jit` of loss, gradient, optimizer and average, no mesh) with n times the batch, and the
ratio of the two times is what the dividing costs: 1 would be nothing. It says nothing of the network between real
devices. All of them are timed in turn, in one run.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import points

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

ROUNDS_BEFORE = 2
"""Steps that are not timed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Overhead of the sharded training step."""

    preset: str = "tiny"
    """A preset of experiments/openmoji.py; random pictures of its size."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Virtual devices; of each number one mesh with the weights whole and one with them divided among all."""
    per_device: int = 4
    """Images per device."""
    repeats: int = 10
    """Timed steps of each."""
    out: str | None = None
    """Also write the numbers to this JSON file."""


def plain_step(loss, optimizer, config, key):
    """As `training.make_step` does, without a mesh and without looking at the gradients."""
    import equinox as eqx
    import jax
    import optax

    from ulx.diffusion import per_example_keys
    from ulx.training import Draws

    @eqx.filter_jit(donate="all-except-first")
    def step(given, state):
        frozen, batch = given
        step_key = jax.random.fold_in(key, state.step)
        total = next(iter(batch.values())).shape[0]
        draws = Draws(per_example_keys(step_key, total), jax.random.fold_in(step_key, total))
        params, static = eqx.partition(state.model, eqx.is_inexact_array)

        def objective(params):
            return loss(eqx.combine(params, static), frozen, batch, draws, state.step, state.control)

        grads, metrics = jax.grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - config.ema_decay)
        changed = (state.step + 1, eqx.combine(params, static), ema, opt_state)
        return eqx.tree_at(lambda s: (s.step, s.model, s.ema, s.opt_state), state, changed), metrics

    return step


def measure(settings: Settings) -> dict:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import openmoji

    from ulx import runs, stages
    from ulx.nn.conditions import ConditionSpec
    from ulx.sharding import make_mesh, place, place_batch
    from ulx.training import make_optimizer, make_step

    config = openmoji.PRESETS[settings.preset]
    told, key = ConditionSpec(num_classes=3), jax.random.key(0)
    model = runs.stage1_state(config, told).model
    # Steps donate their state: each gets one of its own.
    fresh = lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf, tree)  # noqa: E731
    pixels = config.data.resolution**2
    stages_of = {
        "stage1": (lambda: runs.stage1_state(config, told), None, stages.autoencoder_loss(config), config.train),
        "stage2": (
            lambda: runs.stage2_state(config, model, told),
            model,
            stages.base_loss(config, pixels),
            config.train_base,
        ),
    }
    rng, found = np.random.default_rng(0), {}
    for stage, (state_of, frozen, loss, train) in stages_of.items():
        cases = {}
        for count in settings.devices:
            size = count * settings.per_device
            shape = (size, *config.data.shape)
            batch = {"image": rng.integers(0, 256, shape, np.uint8), "label": np.zeros(size, np.int32)}
            optimizer = make_optimizer(train)
            cases[count, "plain"] = [plain_step(loss, optimizer, train, key), (fresh(frozen), batch), fresh(state_of())]
            for name, fsdp in {"data": 1, "fsdp": count}.items() if count > 1 else [("one device", 1)]:
                mesh = make_mesh(fsdp, jax.devices()[:count])
                step = make_step(loss, optimizer, train, key=key, mesh=mesh)
                given = place(fresh(frozen), mesh), place_batch(batch, mesh)
                cases[count, name] = [step, given, place(fresh(state_of()), mesh)]
        for case in cases.values():
            case[0] = case[0].lower(case[1], case[2]).compile()
        seconds = {name: [] for name in cases}
        for done in range(ROUNDS_BEFORE + settings.repeats):
            for name, case in cases.items():
                began = time.perf_counter()
                case[2], _ = jax.block_until_ready(case[0](case[1], case[2]))
                if done >= ROUNDS_BEFORE:
                    seconds[name].append(time.perf_counter() - began)
        for (count, name), times in seconds.items():
            if name != "plain":
                ratios = [own / plain for own, plain in zip(times, seconds[count, "plain"], strict=True)]
                found[f"{stage}, {count} × {name}"] = {
                    "batch": count * settings.per_device,
                    "over_plain": statistics.median(ratios),
                    "quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
                }
    return {"preset": settings.preset, **points.here(), "steps": found}


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    flag = f"--xla_force_host_platform_device_count={max(settings.devices)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = measure(settings)
    print(f"{'':30}{'batch':>6}  time over that of a plain step (quartiles)")
    for name, case in results["steps"].items():
        low, high = case["quartiles"]
        print(f"{name:30}{case['batch']:>6}  {case['over_plain']:.2f} ({low:.2f} to {high:.2f})")
    if settings.out:
        Path(settings.out).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
