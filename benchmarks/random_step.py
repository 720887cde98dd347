"""A training step of a preset on random examples, compiled, for benchmarks of the step itself."""

import time
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ulx.config import Config
    from ulx.nn.conditions import ConditionSpec

__all__ = ["Stage", "Step"]

Stage = Literal["stage1", "stage2"]


class Step:
    """A compiled training step, and what it is known to take."""

    def __init__(self, config: "Config", stage: Stage, told: "ConditionSpec | None" = None):
        """Of data that have that much to tell, by default one class."""
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import numpy as np

        from ulx import job
        from ulx.dry_run import planned
        from ulx.nn.conditions import ConditionSpec
        from ulx.sharding import make_mesh
        from ulx.training import make_optimizer, make_step

        plan = planned(config, told or ConditionSpec(num_classes=1), make=lambda build: build())
        planned_step = plan.steps[stage]
        # A step gives its state away, and weights that are made equal may be one buffer.
        self.state, self.frozen = jax.tree.map(
            lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf, (planned_step.state, planned_step.frozen)
        )
        cost, train = job.cost(plan.model, plan.base, config), planned_step.train
        per_example = cost[f"training_flops_{stage}"] / (train.steps * train.batch_size)
        self.gflops = per_example * train.batch_size / 1e9
        rng = np.random.default_rng(0)
        self.batch = {
            name: rng.standard_normal(field.shape).astype(np.float32)
            if field.dtype == jnp.float32
            else rng.integers(0, 256 if name == "image" else 1, field.shape).astype(field.dtype)
            for name, field in planned_step.batch.items()
        }
        mesh = make_mesh(devices=jax.devices()[:1])
        step = make_step(planned_step.loss, make_optimizer(train), train, key=jax.random.key(0), mesh=mesh)
        self.compiled = step.lower((self.frozen, self.batch), self.state).compile()
        analysis: Any = self.compiled.compiled.memory_analysis()
        self.mib = (analysis.temp_size_in_bytes + analysis.argument_size_in_bytes) / 2**20

    def run(self) -> float:
        """Seconds of one step."""
        import jax

        began = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.compiled((self.frozen, self.batch), self.state))
        return time.perf_counter() - began
