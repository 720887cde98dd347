"""What every command shares: presets and options by tyro, errors as one line, the compilation cache."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ulx.data.extras import optional

if TYPE_CHECKING:
    from ulx.config import Config

__all__ = ["experiment", "parse", "parse_arguments", "run_command"]

Settings = TypeVar("Settings")

INTERRUPTED, PREEMPTED = 130, 75
"""Exit statuses: the shell's for Ctrl-C, and "try again" (EX_TEMPFAIL) for SIGTERM, which a scheduler sends before it
takes the machine away: the same command with --resume goes on."""


def parse(
    kind: type[Settings],
    presets: Mapping[str, Settings],
    *,
    default: str,
    description: str,
    variants: Mapping[str, Callable[[Settings], Settings]] | None = None,
    args: Sequence[str] | None = None,
) -> Settings:
    """A configuration from the command line: every field is an option, and `--preset` chooses the defaults.

    `--variant` changes these: by default the first of `variants`, if there are any.
    """
    import tyro

    args = list(sys.argv[1:] if args is None else args)
    variants = variants or {}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=sorted(presets), default=default)
    first.add_argument("--variant", choices=list(variants), default=next(iter(variants), None))
    chosen = first.parse_known_args(args)[0]
    with _errors_in_one_line():
        defaults = presets[chosen.preset]
        if chosen.variant is not None:
            defaults = variants[chosen.variant](defaults)
        return tyro.cli(
            kind, default=defaults, description=description, args=args, config=(tyro.conf.AvoidSubcommands,)
        )


def experiment(
    presets: Mapping[str, "Config"], description: str, *, of: str | None = None, on_files: str | None = None
) -> None:
    """The main of an experiment: the job by a configuration from the command line, of the first preset by default.

    With --data.path the default is the preset `on_files`, and the source what was prepared there; without, one of a
    data set `of` files says that it has them not. With --dry-run nothing is trained. The job is imported after the
    command line is read, so that --help is quick.
    """
    from ulx.config import Config
    from ulx.variants import VARIANTS

    args = sys.argv[1:]
    dry = "--dry-run" in args
    args = [arg for arg in args if arg != "--dry-run"]
    default = next(iter(presets))
    if on_files is not None and _option(args, "--data.path") is not None:
        default = on_files
        if _option(args, "--data.source") is None:
            args += ["--data.source", "prepared"]
    changes = {name: variant.change for name, variant in VARIANTS.items()}
    config = parse(Config, presets, default=default, variants=changes, description=description, args=args)
    if of is not None and config.data.path is None:
        print(
            f"No --data.path: this is not {of} but the embedded {config.data.source}, {config.data.resolution} pixels."
        )

    def work() -> None:
        if dry:
            from ulx.dry_run import describe

            print(describe(config))
        else:
            from ulx import job

            job.run(config)

    run_command(work)


def _option(args: Sequence[str], name: str) -> str | None:
    """What a command line gives to an option, if it has it."""
    found = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    found.add_argument(name, dest="value")
    return found.parse_known_args(list(args))[0].value


def parse_arguments(kind: type[Settings], description: str, args: Sequence[str] | None = None) -> Settings:
    """A command's options from the command line; fields without a default are positional."""
    tyro = optional("tyro", extra="run")
    script = Path(sys.argv[0])
    return tyro.cli(
        kind,
        prog=f"python -m ulx.{script.parent.name if script.stem == '__main__' else script.stem}",
        description=description,
        args=args,
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
    )


def run_command(command: Callable[[], object]) -> None:
    """Run `command`; what a user can mend (ValueError, OSError, a missing extra) ends in one line and status 1."""
    use_compilation_cache()
    with _errors_in_one_line():
        command()


def use_compilation_cache() -> None:
    """Keep compiled programs between processes, in the user's cache directory ($JAX_COMPILATION_CACHE_DIR wins)."""
    import jax

    from ulx.data.cache import cache_root

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


class _errors_in_one_line:
    def __enter__(self) -> None:
        # One line per warning, without the source line that raised it.
        warnings.formatwarning = lambda message, category, *_, **__: f"warning: {message}\n"
        # Orbax and absl report every step of a save; the progress line says what a user wants to know.
        logging.getLogger("absl").setLevel(logging.ERROR)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from ulx.guard import NonFiniteError
        from ulx.training import Interrupted

        if isinstance(error, Interrupted):
            print(f"\n{error}", file=sys.stderr)
            sys.exit(PREEMPTED if error.number == signal.SIGTERM else INTERRUPTED)
        if isinstance(error, (ValueError, OSError, ImportError, NonFiniteError)) and "ULX_TRACEBACK" not in os.environ:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
