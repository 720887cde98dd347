"""The parts of a transformer block and of a convolution stage, by XLA and by PyTorch in turn: where the time goes.

    python benchmarks/speed_parts.py --out benchmarks/results/speed_parts.json
    taskset 1 python benchmarks/speed_parts.py             on one core

The products of a block of 192 channels on 32 × 64 tokens, forward and for both gradients; its attention; GELU; the
encoder's convolutions. Needs the extra torch.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import points
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from ulx.nn.attention import by_heads

TOKENS, CHANNELS = 32 * 64, 192
PER_TIME = 5
"""Calls that are timed together."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Parts by XLA and by PyTorch."""

    repeats: int = 12
    out: str | None = None
    """Also write the numbers to this JSON file."""


@dataclasses.dataclass
class Part:
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    gflop: float | None = None


def part(
    ours: Callable[..., Any], theirs: Callable[..., Any], *shapes: tuple[int, ...], gflop: float | None = None
) -> Part:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    given, tensors = [jnp.asarray(a) for a in arrays], [torch.from_numpy(a) for a in arrays]
    compiled = jax.jit(ours)
    np.testing.assert_allclose(compiled(*given), theirs(*tensors).detach(), rtol=1e-3, atol=1e-2)
    return Part(lambda: jax.block_until_ready(compiled(*given)), lambda: theirs(*tensors), gflop)


def products(inner: int, outer: int) -> dict[str, Part]:
    x, w, y = (TOKENS, inner), (inner, outer), (TOKENS, outer)
    gflop = 2 * TOKENS * inner * outer / 1e9
    return {
        f"{inner} → {outer}": part(lambda x, w: x @ w, lambda x, w: x @ w, x, w, gflop=gflop),
        f"{inner} → {outer}, input gradient": part(lambda y, w: y @ w.T, lambda y, w: y @ w.T, y, w, gflop=gflop),
        f"{inner} → {outer}, weight gradient": part(lambda x, y: x.T @ y, lambda x, y: x.T @ y, x, y, gflop=gflop),
    }


def attention() -> Part:
    def theirs(q: Any, k: Any, v: Any) -> Any:
        heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return heads.transpose(1, 2)

    shape = (32, 64, CHANNELS // 64, 64)
    return part(by_heads, theirs, shape, shape, shape, gflop=4 * TOKENS * 64 * CHANNELS / 1e9)


def convolutions(channels: int, side: int) -> dict[str, Part]:
    numbers, shape, kernel = ("NHWC", "HWIO", "NHWC"), (32, side, side, channels), (3, 3, channels, channels)
    gflop = 2 * 32 * side**2 * 9 * channels**2 / 1e9

    def ours(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    def as_weight(w: Any) -> Any:
        return w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)

    def backward(x: Any, y: Any, w: Any, which: tuple[bool, bool]) -> Any:
        found = torch.ops.aten.convolution_backward(
            y.permute(0, 3, 1, 2),
            x.permute(0, 3, 1, 2),
            as_weight(w),
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
            [*which, False],
        )
        return found[0].permute(0, 2, 3, 1) if which[0] else found[1].permute(2, 3, 1, 0)

    name = f"3×3 convolution, {channels} channels, {side}×{side}"
    return {
        name: part(
            ours,
            lambda x, w: F.conv2d(x.permute(0, 3, 1, 2), as_weight(w), padding=1).permute(0, 2, 3, 1),
            shape,
            kernel,
            gflop=gflop,
        ),
        f"{name}, input gradient": part(
            lambda x, y, w: jax.vjp(lambda x: ours(x, w), x)[1](y)[0],
            lambda x, y, w: backward(x, y, w, (True, False)),
            shape,
            shape,
            kernel,
            gflop=gflop,
        ),
        f"{name}, weight gradient": part(
            lambda x, y, w: jax.vjp(lambda w: ours(x, w), w)[1](y)[0],
            lambda x, y, w: backward(x, y, w, (False, True)),
            shape,
            shape,
            kernel,
            gflop=gflop,
        ),
    }


def measure(settings: Settings) -> dict[str, Any]:
    parts = {"2048³": part(lambda a, b: a @ b, lambda a, b: a @ b, (2048, 2048), (2048, 2048), gflop=2 * 2.048**3)}
    for inner, outer in ((CHANNELS, 3 * CHANNELS), (CHANNELS, 4 * CHANNELS), (4 * CHANNELS, CHANNELS)):
        parts |= products(inner, outer)
    parts["attention"] = attention()
    parts["GELU"] = part(jax.nn.gelu, lambda x: F.gelu(x, approximate="tanh"), (TOKENS, 4 * CHANNELS))
    for channels, side in ((64, 16), (128, 8)):
        parts |= convolutions(channels, side)
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in parts}
    for _ in range(settings.repeats):
        for name, one in parts.items():
            for run, times in zip((one.ours, one.theirs), seconds[name], strict=True):
                began = time.perf_counter()
                for _ in range(PER_TIME):
                    run()
                times.append((time.perf_counter() - began) / PER_TIME)
    found: dict[str, Any] = {}
    for name, one in parts.items():
        ours, theirs = (statistics.median(times) for times in seconds[name])
        ratios = [b / a for a, b in zip(*seconds[name], strict=True)]
        found[name] = {"xla_ms": 1e3 * ours, "torch_ms": 1e3 * theirs, "torch_over_xla": statistics.median(ratios)}
        if one.gflop:
            found[name] |= {"xla_gflop_per_s": one.gflop / ours, "torch_gflop_per_s": one.gflop / theirs}
    return {**points.here(), "parts": found}


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    results = measure(settings)
    print("| part | XLA, GFLOP/s | PyTorch, GFLOP/s | PyTorch's time over XLA's |\n|---|---|---|---|")
    for name, one in results["parts"].items():
        speeds = [f"{one[key]:.0f}" if key in one else "" for key in ("xla_gflop_per_s", "torch_gflop_per_s")]
        print(f"| {name} | {' | '.join(speeds)} | {one['torch_over_xla']:.2f} |")
    if settings.out:
        Path(settings.out).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
