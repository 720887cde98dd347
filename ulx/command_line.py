"""What every command shares: presets and options by tyro, errors as one line, the compilation cache."""

import argparse
import dataclasses
import functools
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ulx.data.extras import optional
from ulx.memory import keep_freed_memory
from ulx.processes import INTERRUPTED, PREEMPTED, Address, are_connected, connect, is_first, split_arguments

if TYPE_CHECKING:
    from ulx.config import Config

__all__ = ["experiment", "parse", "parse_arguments", "run_command", "run_together"]

Settings = TypeVar("Settings")


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
    data set `of` files says that it has them not. With --dry-run nothing is trained. Where it is one of several
    processes (`ulx.processes`), --coordinator, --processes and --process say so. The job is imported after the command
    line is read, so that --help is quick.
    """
    from ulx.config import Config
    from ulx.variants import VARIANTS

    with _errors_in_one_line():
        address, args = split_arguments(sys.argv[1:])
    dry = "--dry-run" in args
    args = [arg for arg in args if arg != "--dry-run"]
    default = next(iter(presets))
    if on_files is not None and _option(args, "--data.path") is not None:
        default = on_files
        if _option(args, "--data.source") is None:
            args += ["--data.source", "prepared"]
    resolution = _option(args, "--data.resolution")

    def changed(config: Config, change: Callable[[Config], Config]) -> Config:
        """A variant knows of the images' size, which noise levels and weightings follow from."""
        if resolution is not None and resolution.isdecimal():
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, resolution=int(resolution)))
        return change(config)

    changes = {name: functools.partial(changed, change=variant.change) for name, variant in VARIANTS.items()}
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

    run_together(work, address)


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
    keep_freed_memory()
    use_compilation_cache()
    with _errors_in_one_line():
        command()


def run_together(command: Callable[[], object], address: Address | None = None) -> None:
    """The same for a command that may be one of several processes: those of an address, or that a scheduler started.

    A call among them that fails because one is gone ends in status 75, and so does SIGTERM at any time.
    """

    def connected() -> None:
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            connect(address)
            command()
        finally:
            signal.signal(signal.SIGTERM, before)

    run_command(connected)


def use_compilation_cache() -> None:
    """Keep compiled programs between processes, in the user's cache directory ($JAX_COMPILATION_CACHE_DIR wins)."""
    import jax

    from ulx.data.cache import cache_root

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _stop(number: int, frame: object) -> None:
    """While training, `ulx.training.fit` takes the signal itself, and saves first."""
    from ulx.training import Interrupted

    raise Interrupted("stopped; what was finished is kept, and --resume goes on", number)


LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "onnection", "NCCL", "heartbeat")
"""In the message of an error of JAX, which may be a ValueError, words that mean that a process cannot be reached."""


def _tells_of_loss(error: BaseException) -> bool:
    return any(word in str(error) for word in LOST)


class _errors_in_one_line:
    def __enter__(self) -> None:
        # One line per warning, without the source line that raised it.
        warnings.formatwarning = lambda message, category, *_, **__: f"warning: {message}\n"
        # Orbax reports every step of a save, and of one that fails all calls that led there, several times over. The
        # progress line, and what `ulx.checkpoint` says of it, are what a user wants to know.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        import jax

        from ulx.guard import DivergedError
        from ulx.processes import FailedElsewhereError
        from ulx.training import Interrupted

        status = None
        if isinstance(error, Interrupted):
            status = INTERRUPTED if error.number == signal.SIGINT else PREEMPTED
            if is_first():  # all of several say the same
                print(f"\n{error}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            status = INTERRUPTED
            print("\nstopped", file=sys.stderr)
        elif isinstance(error, FailedElsewhereError):
            status = 1
        elif are_connected() and isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and _tells_of_loss(error):
            reason, status = str(error).splitlines()[0], PREEMPTED
            print(f"error: another process is gone, or cannot be reached ({reason}): --resume goes on", file=sys.stderr)
        elif "ULX_TRACEBACK" not in os.environ and isinstance(error, (ValueError, OSError, ImportError, DivergedError)):
            print(f"error: {error}", file=sys.stderr)
            status = 1
        if are_connected() and not isinstance(error, Interrupted):
            # The others wait for this process: that it is gone tells them at once, a goodbye only in a minute.
            if status is None:
                traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(1 if status is None else status)
        if status is not None:
            sys.exit(status)
