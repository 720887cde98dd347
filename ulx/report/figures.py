"""The report's plots as PNG bytes, for a light or a dark page. Okabe and Ito's colours; line styles differ as well."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from ulx.data.extras import optional

__all__ = ["curves", "guidance", "rate_by_level", "smooth", "window"]

Points = Float[np.ndarray, " n"]

SIZE = (5.2, 3.4)  # inches at 160 dpi: one plot fills a phone's width and stays readable
LINES = {  # (on white, on black), line style
    0: ("#0072B2", "#56B4E9", "-"),
    1: ("#D55E00", "#E69F00", "--"),
    2: ("#007A5A", "#00C08B", "-."),
    3: ("#9A4F7E", "#CC79A7", ":"),
}


def window(points: int) -> int:
    """Over how many points `curves` smooths so many."""
    return 2 * (points // 30) + 1


def smooth(values: Points, width: int) -> Points:
    """Centred mean over `width` points, over those of them that exist at the ends.

    Raises ValueError for a width that is not odd and positive.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width must be odd and positive, got {width}")
    return np.array([values[max(0, i - width // 2) : i + width // 2 + 1].mean() for i in range(len(values))])


def curves(
    images_seen: Num[np.ndarray, " n"],
    lines: Mapping[str, Points],
    *,
    ylabel: str,
    dark: bool,
    levels: Mapping[str, float] | None = None,
    span: tuple[float, float] | None = None,
) -> bytes:
    """Named curves over images seen, smoothed over raw; `levels` are horizontal lines, `span` a shaded stretch of x.

    The y axis is logarithmic if all values are positive and far apart.
    """
    width = window(len(images_seen))
    with _axes(dark) as (axes, finish):
        for number, (name, values) in enumerate(lines.items()):
            color, style = _look(number, dark)
            if width > 1:
                axes.plot(images_seen, values, color=color, linewidth=0.7, alpha=0.4)
            axes.plot(images_seen, smooth(values, width), style, color=color, linewidth=1.8, label=name)
        for number, (name, value) in enumerate((levels or {}).items(), len(lines)):
            color, _ = _look(number, dark)
            axes.axhline(value, color=color, linewidth=1.2, linestyle=":", label=name)
        if span is not None:
            axes.axvspan(*span, color="#888888", alpha=0.18, linewidth=0)
        shown = np.concatenate([*lines.values(), list((levels or {}).values())])
        if shown.min() > 0 and shown.max() > 10 * shown.min():
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        axes.set(xlabel="training images seen", ylabel=ylabel, xlim=(0, None))
        axes.xaxis.set_major_formatter(optional("matplotlib.ticker", "run").EngFormatter(sep=""))
        axes.legend()
        return finish()


def rate_by_level(
    logsnr_edges: Sequence[float], bits: Sequence[float], standard_error: Sequence[float], *, dark: bool
) -> bytes:
    """Bits per pixel and unit of log-SNR in each slice of noise levels: the area under the steps is the rate."""
    edges, error = np.array(logsnr_edges), np.array(standard_error)
    width = np.abs(np.diff(edges))
    with _axes(dark) as (axes, finish):
        color, _ = _look(0, dark)
        density = np.array(bits) / width
        axes.stairs(density[::-1], edges[::-1], color=color, linewidth=1.8, fill=False)
        axes.stairs(density[::-1], edges[::-1], color=color, alpha=0.2, fill=True)
        centre, other = (edges[1:] + edges[:-1]) / 2, _look(1, dark)[0]
        axes.errorbar(
            centre, density, np.nan_to_num(error / width), fmt="none", ecolor=other, elinewidth=1.4, capsize=3
        )
        axes.set(xlabel="log-SNR λ of the latent (noise ← → detail)", ylabel="bits/pixel per unit of λ")
        axes.set(xlim=(edges.min(), edges.max()), ylim=(min(0.0, density.min()), None))
        return finish()


def guidance(
    scales: Sequence[float],
    scores: Sequence[Mapping[str, Any]],
    distances: Sequence[float],
    *,
    levels: Mapping[str, Mapping[str, Any]],
    distance: str,
    dark: bool,
) -> bytes:
    """Scores with their standard errors at each guidance scale, `levels` to compare them with, and distances by an
    axis of their own at the right."""
    with _axes(dark) as (axes, finish):
        (color, style), (other, dashed) = _look(0, dark), _look(1, dark)
        values, errors = ([score[name] for score in scores] for name in ("value", "standard_error"))
        axes.errorbar(scales, values, errors, fmt=f"{style}o", color=color, linewidth=1.8, capsize=3, label="retrieval")
        for number, (name, level) in enumerate(levels.items(), 2):
            axes.axhline(level["value"], color=_look(number, dark)[0], linewidth=1.2, linestyle=":", label=name)
        right = axes.twinx()
        right.plot(scales, distances, dashed, marker="s", color=other, linewidth=1.8, label=distance)
        right.grid(False)
        right.spines["right"].set_visible(True)
        axes.set(xlabel="guidance scale", ylabel="retrieval score", ylim=(0, None))
        right.set(ylabel=distance, ylim=(0, 1.05 * max(distances)))
        axes.figure.legend(loc="outside lower center", ncols=3)  # of both axes, where no line runs
        return finish()


def _look(number: int, dark: bool) -> tuple[str, str]:
    on_white, on_black, style = LINES[number % len(LINES)]
    return (on_black if dark else on_white), style


def _plain_numbers(axis: Any) -> None:
    """A logarithmic axis labelled 0.2, 0.5, 1, 2, …: the values of interest lie within two decades."""
    ticker = optional("matplotlib.ticker", "run")
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


@contextmanager
def _axes(dark: bool) -> Iterator[tuple[Any, Any]]:
    """Axes to draw on, and a function that gives the PNG. Without pyplot: no window system, no global state."""
    matplotlib, figures = optional("matplotlib", "run"), optional("matplotlib.figure", "run")
    ink, paper, faint = ("#E6E6E6", "#16181B", "#3A3F45") if dark else ("#1B1B1B", "#FFFFFF", "#DDDDDD")
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    style = {
        **dict.fromkeys(names, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor"), paper),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": faint,
        "legend.framealpha": 0.8,
        "legend.edgecolor": faint,
        "font.size": 11,
    }
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=SIZE, layout="constrained")

        def finish() -> bytes:
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=160, metadata={"Software": None})
            return buffer.getvalue()

        yield figure.add_subplot(), finish
