"""Training: the state, one step, one loop. Both stages go through `fit`; they differ by their loss.

Read top to bottom: `TrainState` → `make_step` → `fit`.
"""

import contextlib
import dataclasses
import signal
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree

from ulx import diffusion, losses, sharding
from ulx.checkpoint import Checkpoints, Position
from ulx.config import TrainConfig
from ulx.ema import average_decay, gamma_of, power_average
from ulx.guard import NORMS, DivergedError, Guard, SpikeError, layer_norms
from ulx.metrics_log import MetricsLog
from ulx.nn.split import WEIGHTS, whole
from ulx.nn.transformer import Stack
from ulx.precision import cast
from ulx.processes import Vote, all_agree, are_connected
from ulx.progress import Progress
from ulx.snapshots import Snapshots
from ulx.typing import PerExample
from ulx.watchdog import Watchdog

__all__ = ["Draws", "Interrupted", "Spread", "TrainState", "fit", "make_optimizer", "make_step", "pace"]


class TrainState(eqx.Module):
    """Everything that a step changes, and so everything that a checkpoint holds (beside the data iterator)."""

    step: Int[Array, ""]
    model: PyTree
    ema: PyTree
    """The moving average of the model's arrays, in float32."""
    posthoc: tuple[PyTree, ...]
    """Their averages by power functions of the step (`ulx.ema`), in float32: one for each of `posthoc_ema`."""
    opt_state: optax.OptState
    control: PyTree
    """What is adapted between steps (`ulx.rate_control`); None: nothing."""

    def __init__(
        self,
        model: PyTree,
        optimizer: optax.GradientTransformation,
        *,
        posthoc: int = 0,
        control: PyTree = None,
    ):
        params = eqx.filter(model, eqx.is_inexact_array)
        self.step = jnp.zeros((), jnp.int32)
        self.model = model

        def average() -> PyTree:
            # A copy of its own: the step donates the whole state, and no buffer may be donated twice.
            return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)

        self.ema = average()
        self.posthoc = tuple(average() for _ in range(posthoc))
        self.opt_state = optimizer.init(params)
        self.control = control

    @property
    def ema_model(self) -> PyTree:
        """The model with averaged weights."""
        return eqx.combine(self.ema, self.model)


class Draws(eqx.Module):
    """The randomness of one step for some of its examples: a key each, and for each loss term their stratified times.

    They are those of a batch of `total` examples, of which these are consecutive ones from `first` on: how the batch is
    divided among devices changes nothing.
    """

    keys: Key[Array, " b"]
    step_key: Key[Array, ""]
    first: Int[Array, ""] | int = 0
    total: int | None = eqx.field(static=True, default=None)
    """None: these are all."""

    def times(self, term: int) -> PerExample:
        """Low-discrepancy times for the `term`-th loss term, independent between terms."""
        size = self.keys.shape[0]
        everyone = losses.sample_t(jax.random.fold_in(self.step_key, term), self.total or size)
        return jax.lax.dynamic_slice_in_dim(everyone, self.first, size)


class Spread(eqx.Module):
    """Two means over examples, by which their spread is known however they are divided: means of these are means over
    all."""

    mean: Float[Array, " *dims"]
    square: Float[Array, " *dims"]

    @classmethod
    def of(cls, x: Float[Array, " b *dims"]) -> "Spread":
        return cls(x.mean(axis=0), (x**2).mean(axis=0))

    @property
    def std(self) -> Float[Array, ""]:
        """The standard deviation over examples, mean over dimensions."""
        return jnp.sqrt(jnp.maximum(self.square - self.mean**2, 0)).mean()


Batch = dict[str, Array]
Loss = Callable[..., tuple[Float[Array, ""], dict[str, Any]]]
"""loss(model, frozen, batch, draws, step, control) -> (what is minimised, what is logged: numbers, of a `Spread` its
`std`)."""
Controller = Callable[[int, Callable[[], Any], PyTree], PyTree]
"""controller(step, averaged model, control) -> control, called after every step; the model is made when asked for."""


def learning_rates(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up and cosine decay, by step."""
    warmup = min(config.warmup_steps, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate,
        config.learning_rate,
        warmup,
        config.steps,
        config.learning_rate * config.final_lr_fraction,
    )


def pace(config: TrainConfig) -> Float[np.ndarray, " steps"]:
    """The learning rate of every step, as a part of the peak."""
    return np.asarray(jax.vmap(learning_rates(config))(jnp.arange(config.steps)), np.float64) / config.learning_rate


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip → AdamW, or Muon and AdamW, with the learning rates above. Only entries called `weight` decay."""
    rates, decay = learning_rates(config), config.weight_decay

    def decays(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] == "weight", params)

    def methods(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _moved_by_muon(path) else "adamw", params)

    method = optax.adamw(rates, b2=config.beta2, weight_decay=decay, mask=decays)
    if config.optimizer == "muon":
        muon = optax.contrib.muon(
            rates,
            weight_decay=decay,
            muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(_matrix_axes, params),
            # The root mean square of an update, about that of AdamW's: one learning rate for both (Liu et al. 2025).
            consistent_rms=0.2,
        )
        method = optax.partition({"muon": muon, "adamw": method}, methods)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), method)


def _moved_by_muon(path: tuple[Any, ...]) -> bool:
    """The matrices that act on the tokens of transformer blocks, and the convolutions of residual blocks. Not first and
    last layers, vectors, and what makes scales and shifts of the conditioning."""
    names = _names(path)
    return names[-1] == "weight" and "modulation" not in names and ("blocks" in names or _convolves(path))


def _convolves(path: tuple[Any, ...]) -> bool:
    return not {"conv_1", "conv_2"}.isdisjoint(_names(path))


def _matrix_axes(path: tuple[Any, ...], weight: Array) -> optax.contrib.MuonDimensionNumbers:
    """Which axes make Muon's matrices: a stack of them is (block, in, out), and a convolution (*kernel, in, out) is one
    matrix, of all that an output sees (Jordan 2024)."""
    inputs = tuple(range(weight.ndim - 1)) if _convolves(path) else 1
    return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=weight.ndim - 1)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [getattr(entry, "name", "") for entry in path]


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, config: TrainConfig, *, key: Key[Array, ""], mesh: Mesh
):
    """The jitted step ((frozen, batch), state) -> (state, metrics), for arrays on `mesh`. It donates the state.

    `metrics` holds what the loss logs, the gradient norm of each part of the model, their global norm, and under
    `guard.NORMS` those of all layers. With `config.skip_nonfinite` a step whose loss or gradient is not finite changes
    nothing but the count of steps.
    An example's noise comes from fold_in(fold_in(key, step), its index in the batch): resuming needs no history, and
    another mesh draws the same.
    """
    gammas = [gamma_of(sigma_rel) for sigma_rel in config.posthoc_ema]

    @eqx.filter_jit(donate="all-except-first")
    def step(given: tuple[Any, Batch], state: TrainState) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        step_key = jax.random.fold_in(key, state.step)
        grads, logged = _gradients(loss, given, state, step_key, config, mesh)
        metrics = {name: value.std if isinstance(value, Spread) else value for name, value in logged.items()}
        params, static = eqx.partition(state.model, eqx.is_inexact_array)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - average_decay(config.ema_decay, state.step))
        posthoc = tuple(
            power_average(average, params, state.step + 1, gamma)
            for average, gamma in zip(state.posthoc, gammas, strict=True)
        )
        metrics |= {f"gradient/{part}": optax.tree.norm(value) for part, value in _parts(grads)}
        metrics["gradient"] = optax.tree.norm(grads)
        found = eqx.tree_at(
            lambda s: (s.step, s.model, s.ema, s.posthoc, s.opt_state),
            state,
            (state.step + 1, eqx.combine(params, static), ema, posthoc, opt_state),
        )
        if config.skip_nonfinite:
            good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient"])
            left_out = eqx.tree_at(lambda s: s.step, state, found.step)
            found = jax.tree.map(
                lambda new, old: jnp.where(good, new, old) if eqx.is_array(new) else new, found, left_out
            )
        return sharding.constrained(found, mesh), metrics | {NORMS: layer_norms(grads)}

    return step


def _gradients(
    loss: Loss, given: tuple[Any, Batch], state: TrainState, step_key: Key[Array, ""], config: TrainConfig, mesh: Mesh
) -> tuple[PyTree, dict[str, Any]]:
    """Of the batch's mean loss with respect to the model's weights, cut as these are, and what the loss logs.

    Each device takes the gradient of its own examples' mean loss, `config.accumulate` pieces of them one after another.
    """
    frozen, batch = given
    total = next(iter(batch.values())).shape[0]
    keys = diffusion.per_example_keys(step_key, total)
    params, static = eqx.partition(state.model, eqx.is_inexact_array)
    frozen, frozen_rest = eqx.partition(frozen, eqx.is_array)
    cuts, frozen_cuts = (sharding.specs(tree, mesh.shape[WEIGHTS]) for tree in (params, frozen))

    def here(params, frozen, batch, keys, step_key, step, control):
        frozen = eqx.combine(whole(sharding.parts(frozen, frozen_cuts)), frozen_rest)

        def objective(params: PyTree, batch: Batch, keys: Key[Array, " b"], first: Int[Array, ""]):
            model = eqx.combine(cast(params, config.dtype), static)
            model = whole(sharding.parts(model, cuts), leave=(Stack,))
            draws = Draws(keys, step_key, first, total)
            return loss(model, frozen, batch, draws, step, control)

        gradient = jax.grad(objective, has_aux=True)
        size = keys.shape[0] // config.accumulate
        first = jax.lax.axis_index(sharding.AXES) * keys.shape[0]
        if config.accumulate == 1:
            grads, metrics = gradient(params, batch, keys, first)
        else:
            pieces = jax.tree.map(lambda x: x.reshape(config.accumulate, size, *x.shape[1:]), (batch, keys))
            firsts = first + size * jnp.arange(config.accumulate)

            def add(sums: PyTree, piece: tuple[tuple[Batch, Array], Array]) -> tuple[PyTree, None]:
                (batch, keys), first = piece
                return jax.tree.map(jnp.add, sums, gradient(params, batch, keys, first)), None

            shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], pieces), firsts[0])
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            sums, _ = jax.lax.scan(add, zeros, (pieces, firsts))
            grads, metrics = jax.tree.map(lambda x: x / config.accumulate, sums)
        return sharding.mean_gradients(grads, cuts, mesh), jax.lax.pmean(metrics, sharding.AXES)

    each, same = sharding.BATCH, sharding.WHOLE
    sharded = jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(cuts, frozen_cuts, each, each, same, same, same),
        out_specs=(cuts, same),
        check_vma=False,
    )
    return sharded(params, frozen, batch, keys, jax.random.fold_in(step_key, total), state.step, state.control)


def _parts(grads: PyTree) -> list[tuple[str, PyTree]]:
    """The top-level fields of a module's gradient that hold arrays: encoder, prior, decoder."""
    fields = [(field.name, eqx.filter(getattr(grads, field.name), eqx.is_array)) for field in dataclasses.fields(grads)]
    return [(name, value) for name, value in fields if jax.tree.leaves(value)]


@runtime_checkable
class Batches(Position, Protocol):
    """`ulx.data.pipeline.TrainBatches`, say."""

    def __next__(self) -> dict[str, np.ndarray]: ...


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, by this signal; in training its state has been saved."""

    def __init__(self, message: str = "", number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


def fit(
    state: TrainState,
    step: Any,
    frozen: Any,
    batches: Batches,
    config: TrainConfig,
    *,
    guard: Guard,
    mesh: Mesh,
    checkpoints: Checkpoints,
    snapshots: Snapshots,
    log: MetricsLog,
    name: str,
    controller: Controller | None = None,
    on_log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> TrainState:
    """Train from `state.step` to `config.steps`; checkpoint, store averages, log and show progress on the way.

    `step` is `make_step`'s, and the state and what is frozen are on its `mesh`; `batches` is a checkpointable iterator
    standing where `state` left it, and so is `guard`. On Ctrl-C or SIGTERM the step in progress is finished and saved.
    Where training diverges it goes back to a checkpoint, if the guard lets it, and on with the batches that follow.

    Of several processes all must call it, with what is theirs of the batches.

    Raises:
        NonFiniteError: names the terms and parts that are not finite, and the step. Nothing is saved then.
        OSError: an example cannot be read (of a single process the state is saved then); the log, the last checkpoint
            or that of an interrupt cannot be written.
        Interrupted: after saving.
    """
    compiled = None
    vote, positions = Vote(), {"data": batches, "guard": guard}
    number, stopping = int(state.step), False
    unseen: tuple[int, dict[str, Array]] | None = None
    losses: list[float] = []
    """Since the last checkpoint."""

    def look() -> None:
        """At the metrics of a step that has not been looked at: waits for it."""
        nonlocal unseen
        if unseen is None:
            return
        (at, metrics), unseen = unseen, None
        watchdog.expect(f"step {at} of {name}")
        try:
            judge(at, jax.device_get(metrics))
        finally:
            watchdog.rest()

    def judge(at: int, host: dict[str, Any]) -> None:
        """What a step came to, once it is on the host, and for the log. Watched too: whoever asks a device for anything
        here waits for the step that is under way."""
        norms = host.pop(NORMS)
        values = {name: float(value) for name, value in host.items()}
        try:
            if not guard.passes(at, values, norms):
                return
        except SpikeError as error:
            if guard.may_go_back and checkpoints.has_before(error.step):
                raise
            warnings.warn(str(error), stacklevel=3)
        losses.append(values["loss"])
        if guard.skipped:
            values["skipped"] = guard.skipped
        if at % config.log_every == 0 or at in (1, config.steps):
            log.write(at, values)
            on_log(at, values)
            progress.fields.update({key: value for key, value in values.items() if "/" not in key})

    with (
        _stop_on_signal() as stop,
        Watchdog(60 * config.hang_minutes) as watchdog,
        Progress(name, total=config.steps, unit="steps", start=number) as progress,
    ):
        while number < config.steps:
            number += 1
            watchdog.expect(f"reading the batch for step {number} of {name}")
            try:
                batch = sharding.place_batch(next(batches), mesh)
            except OSError:
                # What has been trained is good. One of several processes cannot save without the others.
                watchdog.rest()
                if compiled is not None and not are_connected():
                    with contextlib.suppress(DivergedError):  # there is nothing good to save then
                        look()
                        checkpoints.save(number - 1, state, positions, wait=True)
                raise
            watchdog.rest()
            if compiled is None:
                # Compiled ahead for these very shapes: a step can be refused from now on, but never recompiled.
                compiled = step.lower((frozen, batch), state).compile()
                all_agree(True)  # who compiles faster must not count the others' compiling as a step
                progress.restart()
            watchdog.expect(f"step {number} of {name}")
            state, metrics = compiled((frozen, batch), state)
            # Here, since several processes wait for the step before. Once: a signal may come at any moment.
            stopping = vote(bool(stop))
            watchdog.rest()
            if controller is not None and state.control is not None:
                control = controller(number, lambda now=state: now.ema_model, state.control)
                control = sharding.place(control, mesh)
                state = eqx.tree_at(lambda s: s.control, state, control)
            progress.advance()
            saving = number == config.steps or number % config.save_every == 0 or stopping
            storing = config.stores_averages(number)
            try:
                look()  # at the step before, so that this one is under way while the host waits
                unseen = number, metrics
                if saving or storing:
                    look()
            except DivergedError as error:
                if not guard.may_go_back or not checkpoints.has_before(error.step):
                    raise
                state, good = checkpoints.back_before(error.step, state)
                warnings.warn(f"{error} Back to step {good}, and on with other batches", stacklevel=2)
                log.back_to(good)
                guard.forget()
                guard.rolled_back += 1
                number, progress.count, unseen = good, good, None
                losses.clear()
                continue
            if storing:  # before the checkpoint, after which a resumed run would not come by again
                snapshots.save(number, state.posthoc)
            if saving:
                loss = sum(losses) / len(losses) if losses else None
                checkpoints.save(number, state, positions, wait=stopping or number == config.steps, loss=loss)
                losses.clear()
            if stopping:
                break
        if stopping or not all_agree(not stop):  # a signal in the last step, or to another process meanwhile
            said = f"stopped after step {number}, which is saved; --resume continues from it"
            raise Interrupted(said, stop.number)
    return state


class _stop_on_signal:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one acts at once."""

    def __enter__(self) -> "_stop_on_signal":
        self.number = 0
        self.handlers: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: whoever runs it there handles signals
            pass
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def __bool__(self) -> bool:
        return bool(self.number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
