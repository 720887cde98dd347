"""Write a trained run's weights, with its configuration, to one safetensors file, which `ulx.load` takes like a run.

    python -m ulx.export runs/openmoji
    python -m ulx.export runs/openmoji --out openmoji.safetensors --ema 0.07

Averaged weights, float32: `encoder.…`, `prior.…`, `decoder.…`, and `base.…` of a run whose stage 2 has begun. What
training alone needs stays behind.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ulx import run_folder, runs, weights_file
from ulx.checkpoint import versions
from ulx.command_line import parse_arguments, run_command

__all__ = ["Options", "export"]


@dataclasses.dataclass(frozen=True)
class Options:
    run: Path
    """Folder of the trained run."""
    out: Path | None = None
    """The .safetensors file to write; by default RUN/model.safetensors."""
    ema: float | None = None
    """Width σ_rel of the base model's average, for a run with snapshots (`--train-base.posthoc-ema`); by default the
    moving average of training."""
    overwrite: bool = False
    """Write over a file that exists."""

    def __post_init__(self):
        if self.out is not None and self.out.suffix != ".safetensors":
            raise ValueError(f"--out is the .safetensors file to write, got {self.out}")


def export(options: Options) -> Path:
    """Write the file; returns its path.

    Raises as `runs.load` and `weights_file.write` do; FileExistsError; ValueError for a file in the run's place.
    """
    if options.run.is_file():
        raise ValueError(f"{options.run} is a file already: give the folder of a run")
    run = runs.load(options.run, ema=options.ema)
    out = options.out or run.folder / "model.safetensors"
    if out.exists() and (out.is_dir() or not options.overwrite):
        raise FileExistsError(
            f"{out} exists already: choose another --out" + ("" if out.is_dir() else ", or --overwrite")
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        **run_folder.facts(run.config),
        "dataset": json.loads((options.run / "dataset.json").read_text()),
        "steps": run.step,
        "weights": run.weights,
        "versions": versions(),
    }
    arrays = weights_file.write(out, runs.parts(run.model, run.base), facts)
    size = sum(array.nbytes for array in arrays.values()) / 2**20
    kinds = ", ".join(dict.fromkeys(name.partition(".")[0] for name in arrays))
    print(f"{len(arrays)} arrays, {size:.1f} MiB ({kinds}; {run.weights}) -> {out}")
    return out


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: export(parse_arguments(Options, __doc__ or "", args)))


if __name__ == "__main__":
    main()
