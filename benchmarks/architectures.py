"""Parameters and FLOPs of the paper's networks (§5.1, §5.2), from shapes alone: nothing is computed or allocated.

    python benchmarks/architectures.py

FLOPs are of linear projections, convolutions and attention products, a multiply and an add being two; training is
3 × forward. Leaves benchmarks/results/architectures.md.
"""

import dataclasses
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

HEADER = """\
Counted by `python benchmarks/architectures.py` from the shapes of `ulx.presets.PAPER`, for one example. A multiply and
an add are two FLOPs; linear projections, convolutions and attention products count; training is 3 × forward. `paper`:
forward GFLOPs of the base model where the paper names them. The text-to-image bases are counted without text.

| preset | example | latent | network | channels | parameters (M) | forward GFLOPs | training GFLOPs | paper |
|---|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Parameters and FLOPs of the paper's networks, from shapes alone."""

    out: str = str(RESULTS / "architectures.md")
    """The table's file."""


def rows(name: str) -> list[str]:
    """One line of the table for each network of a preset."""
    import equinox as eqx
    import jax

    from ulx.cost import network_costs
    from ulx.models import UnifiedLatents
    from ulx.nn.conditions import ConditionSpec
    from ulx.presets import PAPER
    from ulx.stages import make_base

    preset = PAPER[name]

    def build(key):
        model = UnifiedLatents(preset.shape, preset.model, key=key)
        return model, make_base(model, preset.model, ConditionSpec(preset.num_classes), key=key)

    model, base = eqx.filter_eval_shape(build, jax.random.key(0))
    lines = []
    for network, cost in network_costs(model, base).items():
        paper = preset.paper_base_gflops if network == "base" else None
        lines.append(
            f"| {name} | {_size(preset.shape)} | {_size(model.latent_shape)} | {network} "
            f"| {_layers(getattr(preset.model, network))} | {cost.parameters / 1e6:,.1f} "
            f"| {cost.forward_flops / 1e9:,.1f} | {cost.training_flops / 1e9:,.1f} | {'' if paper is None else paper} |"
        )
    return lines


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _layers(config) -> str:
    """Channels of the stages, convolutions before the bar, and transformer blocks of the levels."""
    from ulx.nn.encoder import EncoderConfig

    if isinstance(config, EncoderConfig):
        return f"{list(config.channels)}"
    convolutions = f"{list(config.conv_channels)} + " if config.conv_channels else ""
    return f"{convolutions}{list(config.channels)} × {list(config.blocks)} blocks"


def page() -> str:
    from ulx.presets import PAPER

    return HEADER + "".join(row + "\n" for name in PAPER for row in rows(name))


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    text = page()
    Path(settings.out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
