"""Cards of `ulx.metrics`, or evaluated runs, side by side, if their numbers may be compared.

    python -m ulx.cards one.json two.json three.json
    python -m ulx.cards runs/one runs/two --only fd_efflite0.base bits_per_pixel

Two numbers of one name may be compared if they mean the same: one definition and one network, the same reference
images, as many images on either side, prepared in the same way. Otherwise the cards are refused, and what differs is
named. --only names the metrics to compare.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulx.command_line import parse_arguments, run_command
from ulx.metrics.entries import plus_minus, rank_remark

__all__ = ["Options", "differences", "main", "read", "table"]

OF_CARD = {
    "the reference's pixels": ("a", "pixels_sha256"),
    "the resolution": ("resolution",),
    "the preparation": ("preparation",),
    "the frames of each video": ("clip", "frames"),
    "the stride of frames": ("clip", "stride"),
    "the rule of clips": ("clip", "rule"),
    "the dtype": ("dtype",),
}
OF_METRIC = {
    "the definition": ("definition",),
    "the network": ("network", "definition"),
    "the network's weights": ("network", "sha256"),
    "the number of reference images": ("n_a",),
    "the number of measured images": ("n_b",),
    "the number of images": ("n",),
    "the size of the reference": ("n_reference",),
    "the number of pairs": ("n_pairs",),
    "the neighbours": ("neighbours",),
    "the reference": ("reference",),
    "the noise levels": ("levels",),
    "the draws of each": ("draws",),
    "the labels": ("labels",),
    "the probes": ("probes",),
    "the given frames": ("given",),
}
OF_RUN = {
    "solver of the latent": ("sampler", "latent"),
    "solver of the decoder": ("sampler", "decoder"),
    "NFE of the base model": ("distances", "base", "nfe"),
    "NFE of the decoder": ("sampler", "decoder_nfe"),
    "guidance": ("sampler", "guidance_scale"),
    "interval of guidance": ("sampler", "guidance_interval"),
    "weights": ("weights",),
    "seed": ("provenance", "seed"),
    "commit": ("provenance", "commit"),
}
"""How a run's numbers were made: part of what is compared, and so shown beside it."""
CONTINUED = {"base", "continuation"}
"""What is measured of a base model's samples, which of clips are continuations of the given frames."""


@dataclasses.dataclass(frozen=True)
class Options:
    cards: tuple[Path, ...]
    """Files written by `python -m ulx.metrics --out`, or folders of evaluated runs; two at least."""
    only: tuple[str, ...] = ()
    """The metrics to compare; by default all that are on every card."""


def read(path: Path) -> dict[str, Any]:
    """A card, or a run's evaluation as one. Raises FileNotFoundError, or ValueError naming a file that is none."""
    if path.is_dir():
        return _of_run(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: write a card with python -m ulx.metrics DIR_A DIR_B --out {path}")
    try:
        card = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no card: it is not JSON ({error})") from error
    missing = [name for name in ("metrics", "a", "b") if not isinstance(card, dict) or name not in card]
    if missing:
        raise ValueError(f"{path} is no card: it has no {missing[0]!r}")
    card["facts"] = {}
    return card


def _of_run(path: Path) -> dict[str, Any]:
    """The numbers of a run's metrics.json under one name each, with what they mean and what they were measured on."""
    file = path / "evaluation" / "metrics.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} is no evaluated run: it has no evaluation/metrics.json")
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): python -m ulx.evaluate {path}") from error
    if "definitions" not in found or ("fvd" in found and "clip" not in found):
        raise ValueError(f"{path} was evaluated before runs said what their numbers are: python -m ulx.evaluate {path}")
    metrics: dict[str, Any] = {}

    def gather(value: Any, names: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            return
        if "value" not in value:
            for name, part in value.items():
                gather(part, (*names, name))
            return
        meant = next((found["definitions"][name] for name in names if name in found["definitions"]), None)
        assert meant is not None, f"{file}: no definition of {'.'.join(names)}"
        reference = found["references"][value.get("against", "held-out images")]
        known = "{data} {split}, {n} images {fingerprint}".format(**reference)
        given = {"given": _at(found, ("clip", "given"))} if CONTINUED & set(names) else {}
        metrics[".".join(names)] = value | meant | {"reference": known} | given

    gather({name: part for name, part in found.items() if name not in ("definitions", "references")}, ())
    made = found | {"distances": found.get("fvd", found.get("fd_efflite0"))}
    facts = {what: _at(made, where) for what, where in OF_RUN.items()}
    same = {"clip": found.get("clip"), "dtype": found["provenance"]["dtype"]}
    return {"metrics": metrics, "facts": facts, "b": {"path": str(path)}, **same}


def differences(one: dict[str, Any], other: dict[str, Any], metric: str) -> list[str]:
    """What forbids comparing this metric on two cards: each as "what: one's, other's"."""
    found = []
    for (a, b), fields in (((one, other), OF_CARD), ((one["metrics"][metric], other["metrics"][metric]), OF_METRIC)):
        for what, path in fields.items():
            mine, theirs = _at(a, path), _at(b, path)
            if mine != theirs:
                found.append(f"{what}: {mine}, {theirs}")
    # The pixels of an encoded video depend on who decodes it. Of the reference's they are known.
    decoders = [str(_at(card, ("b", "decoder"))) for card in (one, other)]
    if decoders[0] != decoders[1] and all("PyAV" in decoder for decoder in decoders):
        found.append(f"what decoded the videos: {', '.join(decoders)}")
    return found


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def table(paths: Sequence[Path], only: Sequence[str] = ()) -> str:
    """The numbers, a column for each card.

    Raises ValueError, naming what differs, for cards that may not be compared, fewer than two, or a metric that is not
    on all of them.
    """
    if len(paths) < 2:
        raise ValueError(f"{paths[0]} is one card: name another to compare it with")
    cards = [read(path) for path in paths]
    common = [name for name in cards[0]["metrics"] if all(name in card["metrics"] for card in cards)]
    for name in only:
        if name not in common:
            raise ValueError(f"{name} is not on all cards; on all of them: {', '.join(common) or 'nothing'}")
    names = list(only) or common
    if not names:
        raise ValueError("the cards have no metric in common")
    for path, card in zip(paths[1:], cards[1:], strict=True):
        refused = {name: found for name in names if (found := differences(cards[0], card, name))}
        if refused:
            reasons = list(dict.fromkeys(reason for found in refused.values() for reason in found))
            raise ValueError(
                f"{paths[0]} and {path} may not be compared by {', '.join(refused)}: " + "; ".join(reasons)
            )
    rows = [["", *(str(card["b"]["path"]) for card in cards)]]
    rows += [[name, *(plus_minus(card["metrics"][name]) for card in cards)] for name in names]
    facts = [name for name in OF_RUN if any(name in card["facts"] for card in cards)]
    rows += [[name, *(str(card["facts"].get(name, "")) for card in cards)] for name in facts]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name in names:
        if remarks := list(dict.fromkeys(filter(None, (rank_remark(card["metrics"][name]) for card in cards)))):
            lines.append(f"{name}: {remarks[0]}")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    options = parse_arguments(Options, __doc__ or "", args)
    run_command(lambda: print(table(options.cards, options.only)))


if __name__ == "__main__":
    main()
