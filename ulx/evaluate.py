"""Evaluate a finished run again and write its report anew.

python -m ulx.evaluate runs/openmoji
python -m ulx.evaluate runs/openmoji --ema 0.07        the base model with another average of its weights
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ulx import job, runs
from ulx.command_line import parse_arguments, run_command
from ulx.data import open_dataset

__all__ = ["Options", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Options:
    run: Path
    """Folder of the trained run."""
    ema: float | None = None
    """Width σ_rel of the base model's average, for a run with snapshots (`--train-base.posthoc-ema`); by default the
    moving average of training."""


def evaluate(options: Options) -> Path:
    """Evaluate with the run's own settings; returns the path of the report."""
    run = runs.load(options.run, ema=options.ema)
    if run.base is None:
        raise ValueError(f"{options.run} has no base model yet: finish stage 2 first (--resume)")
    dataset = open_dataset(run.config.data)
    runs.remember_data(run.path, dataset)
    return job.measure(run.path, run.model, run.base, dataset, run.config, weights=run.weights)


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: print(evaluate(parse_arguments(Options, __doc__ or "", args))))


if __name__ == "__main__":
    main()
