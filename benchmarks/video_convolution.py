"""A convolution over three axes on a CPU: XLA's own against ours, which is one over two (`ulx.nn.layers.Conv`).

    python benchmarks/video_convolution.py

Forward and backward, in turn, on the sizes of the small video presets; the two are the same function. Leaves
benchmarks/results/video_convolution.md.
"""

import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import points

from ulx.nn.layers import Conv, by_frames, convolve

SHAPES = ((8, 8, 8, 8, 64), (8, 4, 4, 4, 128), (4, 16, 16, 16, 64))
ROUNDS = 9


def seconds(function, *arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def main() -> None:
    rows = []
    for shape in SHAPES:
        x = jax.random.normal(jax.random.key(0), shape)
        conv = Conv(3, shape[-1], shape[-1], key=jax.random.key(1))
        steps = {}
        for name, function in {"three": convolve, "two": by_frames}.items():
            steps[name] = jax.jit(jax.grad(lambda both, function=function: jnp.sum(function(*both) ** 2)))
            jax.block_until_ready(steps[name]((x, conv.weight)))
        ratios = [
            seconds(steps["three"], (x, conv.weight)) / seconds(steps["two"], (x, conv.weight)) for _ in range(ROUNDS)
        ]
        low, *_, high = statistics.quantiles(ratios, n=4)
        rows.append([" × ".join(map(str, shape)), f"{statistics.median(ratios):.2f}", f"{low:.2f} to {high:.2f}"])
        print(*rows[-1], sep="   ")
    table = points.markdown(("b × t × h × w × channels", "time of three axes / ours", "quartiles"), rows)
    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, CPU"
    Path(points.RESULTS, "video_convolution.md").write_text(
        f"Measured by `python benchmarks/video_convolution.py`: forward and backward of one 3×3×3 convolution, "
        f"{ROUNDS} rounds in turn. Machine: {machine}, {datetime.date.today().isoformat()}.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
