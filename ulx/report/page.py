"""Pieces of a self-contained HTML page: no script, nothing from outside it; light and dark, wide and narrow screens.

Arguments called `text` are escaped here; those called `html` are taken as they are.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from jaxtyping import UInt8

from ulx.image_files import png, zoom_for

__all__ = ["card", "document", "note", "plot", "section", "table", "tiles"]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5b6068; --paper: #fff; --raised: #f4f5f7; --line: #d9dce1;
  --good: #00674b; --bad: #b34700; --zoom: 1 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a3a9b2; --paper: #16181b; --raised: #202429;
  --line: #3a3f45; --good: #00c08b; --bad: #e69f00 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: .2rem 0; font-size: 1.7rem } h2 { margin: 2.2rem 0 .4rem; font-size: 1.25rem }
p { margin: .4rem 0; max-width: 48rem } .soft, figcaption, dd, caption { color: var(--soft) }
code, pre { font-family: ui-monospace, monospace; font-size: .88em }
pre { background: var(--raised); padding: .7rem; border-radius: .4rem; overflow-x: auto; white-space: pre }
.cards, .plots { display: grid; gap: .9rem; margin: 1rem 0 }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
.card { background: var(--raised); border-radius: .5rem; padding: .7rem .9rem }
.card b { display: block; font-size: 1.45rem; line-height: 1.3 } .card span { color: var(--soft); font-size: .88rem }
.good { color: var(--good) } .bad { color: var(--bad) }
.note { border-left: .25rem solid var(--bad); padding: .1rem .8rem; background: var(--raised) }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.plots figure, .tiles figure { margin: 0 } .plots figure { max-width: 40rem }
.plots img { width: 100%; height: auto; display: block }
.tiles { display: flex; flex-wrap: wrap; gap: .9rem .5rem; margin: .8rem 0 }
.tiles figure { width: min-content } .tiles figcaption { font-size: .72rem; line-height: 1.25 }
.tiles img { display: block; width: calc(var(--width) * var(--large) * 1px); max-width: 90vw; height: auto;
  image-rendering: pixelated; margin-bottom: 2px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0 }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { font-variant-numeric: tabular-nums }
th, td { white-space: nowrap } th:last-child, td:last-child { white-space: normal; min-width: 15rem }
dt { font-weight: 600; margin-top: .7rem } dd { margin: 0; max-width: 48rem }
@media (max-width: 40rem) { .tiles img { width: calc(var(--width) * var(--small) * 1px) }
  th:first-child, td:first-child { white-space: normal; min-width: 9rem } }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole page; `title` is text, `body` the HTML of its parts."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *html: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(html) + "\n</section>"


def note(text: str) -> str:
    """Something the reader must know before trusting the rest."""
    return f'<p class="note">{escape(text)}</p>'


def card(title: str, text: str, small: str, kind: str = "") -> str:
    """One number of the headline. `kind` is "good", "bad" or nothing."""
    number = f'<b class="{escape(kind)}">{escape(text)}</b>'
    return f'<div class="card">{escape(title)}{number}<span>{escape(small)}</span></div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """All cells are text."""
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"  # noqa: E731
    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def tiles(*stacked: UInt8[np.ndarray, "..."], captions: Sequence[str] = (), alt: Sequence[str]) -> str:
    """Images `n h w 3`, or clips `n t h w 3`, which move; they flow with the page's width, pixels enlarged by a whole
    number, image i of every array in one tile.

    `captions`, one per tile, and `alt`, one per array, are text.
    """
    count, *_, height, width, _ = stacked[0].shape
    large = zoom_for(height)
    parts = []
    for i in range(count):
        images = "".join(
            f'<img src="{_data_uri(png(images[i]))}" alt="{escape(name)} {i}">'
            for images, name in zip(stacked, alt, strict=True)
        )
        caption = f"<figcaption>{escape(captions[i])}</figcaption>" if captions else ""
        parts.append(f"<figure>{images}{caption}</figure>")
    style = f"--width: {width}; --large: {large}; --small: {max(1, large - 1)}"
    return f'<div class="tiles" style="{style}">\n' + "\n".join(parts) + "\n</div>"


def plot(light: bytes, dark: bytes, text: str) -> str:
    """A plot drawn twice, for a light and for a dark page, with its caption."""
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" alt="{escape(text)}"></picture><figcaption>{escape(text)}</figcaption></figure>'
    )


def _data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
