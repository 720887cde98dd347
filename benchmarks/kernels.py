"""What XLA on a CPU is slow at: its own against ours, which computes the same in another way.

    python benchmarks/kernels.py

A convolution over three axes (`ulx.nn.layers.Conv`) and attention (`ulx.nn.attention`), forward and backward, in turn,
at sizes of the small presets. Leaves benchmarks/results/kernels.md.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import points

from ulx.nn.attention import by_heads
from ulx.nn.layers import Conv, by_frames, convolve

CONVOLUTIONS = ((8, 8, 8, 8, 64), (8, 4, 4, 4, 128), (4, 16, 16, 16, 64))
ATTENTIONS = ((32, 64, 3, 64), (8, 512, 2, 64), (8, 512, 3, 64), (16, 256, 4, 64))
ROUNDS = 9


def seconds(function, *arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def compared(theirs: Callable[..., Any], ours: Callable[..., Any], inputs: tuple[Any, ...]) -> list[str]:
    """Median and quartiles of the ratio of the times of forward and backward."""
    steps = []
    for function in (theirs, ours):
        step = jax.jit(jax.grad(lambda inputs, function=function: jnp.sum(function(*inputs) ** 2)))
        jax.block_until_ready(step(inputs))
        steps.append(step)
    ratios = [seconds(steps[0], inputs) / seconds(steps[1], inputs) for _ in range(ROUNDS)]
    low, *_, high = statistics.quantiles(ratios, n=4)
    return [f"{statistics.median(ratios):.2f}", f"{low:.2f} to {high:.2f}"]


def main() -> None:
    key, rows = jax.random.key(0), []
    for shape in CONVOLUTIONS:
        weight = Conv(3, shape[-1], shape[-1], key=key).weight
        inputs = jax.random.normal(key, shape), weight
        name = f"convolution of b × t × h × w × channels = {' × '.join(map(str, shape))}"
        rows.append([name, *compared(convolve, by_frames, inputs)])
    for shape in ATTENTIONS:
        inputs = tuple(jax.random.normal(key, (3, *shape)))
        name = f"attention of b × tokens × heads × channels = {' × '.join(map(str, shape))}"
        rows.append([name, *compared(jax.nn.dot_product_attention, by_heads, inputs)])
    table = points.markdown(("what", "time of XLA's own / ours", "quartiles"), rows)
    print(table)
    here = points.here()
    Path(points.RESULTS, "kernels.md").write_text(
        f"Measured by `python benchmarks/kernels.py`: forward and backward of one 3×3×3 convolution, as one over three "
        f"axes or as ours over two, and of attention, by `jax.nn.dot_product_attention` or as ours; {ROUNDS} rounds in "
        f"turn. Machine: {here['machine']}, {here['date']}.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
