"""One run in several processes, on one machine or many: connecting them, and what they must agree on.

Every process runs the same program with the same order of the data, the same steps and decisions; each reads its own
rows of a batch, and files are written by the first. `python -m ulx.launch` starts them on one machine; under SLURM,
Open MPI and on GKE's TPU pods they find each other.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

__all__ = [
    "Address",
    "FailedElsewhereError",
    "Vote",
    "all_agree",
    "are_connected",
    "connect",
    "first",
    "in_turn",
    "is_first",
    "share",
    "split_arguments",
]

Item = TypeVar("Item")

INTERRUPTED, PREEMPTED = 130, 75
"""Exit statuses: the shell's for Ctrl-C, and "try again" (EX_TEMPFAIL), where the same command with --resume goes on:
after SIGTERM, which a scheduler sends before it takes the machine away, a hang, or when another process is gone."""

HEARTBEAT = 60
"""Seconds without a sign of life after which the others take a process for dead."""
GOODBYE = 60
"""Seconds that a process waits for the others to end too."""
PATIENCE = 24 * 3600
"""Seconds that the others wait for what the first does alone, such as preparing the data."""

_index, _processes = 0, 1
_meetings = itertools.count()


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the processes meet, how many they are, and which one this is."""

    coordinator: str
    """HOST:PORT of the first."""
    processes: int
    process: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator {self.coordinator}: must be HOST:PORT of the first process")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"--process {self.process}: must be from 0 to {self.processes - 1}, below --processes")

    @property
    def arguments(self) -> list[str]:
        """As options of a command line."""
        fields = dataclasses.asdict(self)
        return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def split_arguments(args: Sequence[str]) -> tuple[Address | None, list[str]]:
    """The address that a command line gives, and the rest of it. Raises ValueError for a part of an address."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for field in dataclasses.fields(Address):
        options.add_argument(f"--{field.name}", type=field.type)  # pyright: ignore[reportArgumentType]
    try:
        found, rest = options.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    given = {name: value for name, value in vars(found).items() if value is not None}
    if not given:
        return None, rest
    missing = [f"--{name}" for name in vars(found) if name not in given]
    if missing:
        raise ValueError(f"--coordinator, --processes and --process go together: {' and '.join(missing)} missing")
    return Address(**given), rest


def are_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a scheduler has started this as one of several processes, by what it leaves in the environment."""
    counts, hosts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"), ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    return any(int(environment.get(name) or 1) > 1 for name in counts) or any(
        "," in environment.get(name, "") for name in hosts
    )


def connect(address: Address | None = None) -> None:
    """Meet the other processes, before anything else asks for a device; without an address, those that a scheduler
    started, if any. Only the first one prints from then on.

    Raises RuntimeError if they do not all come.
    """
    global _index, _processes
    if address is None and not are_several():
        return
    import jax

    where: dict[str, Any] = {}
    if address is not None:
        where = {
            "coordinator_address": address.coordinator,
            "num_processes": address.processes,
            "process_id": address.process,
            "cluster_detection_method": "deactivate",
        }
    # Signals are this program's own: with the service, SIGTERM would only be noted.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=GOODBYE)
    _index, _processes = jax.process_index(), jax.process_count()
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def are_connected() -> bool:
    """Whether there are others."""
    return _processes > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return _index == 0


class FailedElsewhereError(RuntimeError):
    """Another process has failed, and says why."""


def share(items: Sequence[Item]) -> list[Item]:
    """Those that are this process's to do."""
    return list(items[_index::_processes])


def first(work: Callable[[], object]) -> None:
    """`work` by the first process, while the others wait.

    Raises what it raises; in the others FailedElsewhereError.
    """
    failed: Exception | None = None
    if is_first():
        try:
            work()
        except Exception as error:  # not an interruption: nobody is to wait then
            failed = error
    good = all_agree(failed is None)
    if failed is not None:
        raise failed
    if not good:
        raise FailedElsewhereError("the first process stopped: see its message")


def in_turn(work: Callable[[], Item]) -> Item:
    """`work` by the first process, and when it is done by the others, who find what it left. Raises as `first`."""
    done: list[Item] = []
    first(lambda: done.append(work()))
    return done[0] if done else work()


def all_agree(flag: bool) -> bool:
    """Whether all processes say yes."""
    if _processes == 1:
        return flag
    import orbax.checkpoint as ocp
    from jax.experimental import multihost_utils

    # Among devices nobody may wait for long, so the processes meet first.
    ocp.multihost.get_barrier_sync_fn()(key=f"ulx {next(_meetings)}", timeout_ms=1000 * PATIENCE)
    return bool(np.all(multihost_utils.process_allgather(np.array([flag]), tiled=True)))


class Vote:
    """Whether any process has said yes, the same for all of them.

    One process knows at once. Of several, each is told what was said the time before: what is asked now travels while
    the devices are at work.
    """

    def __init__(self) -> None:
        self.asked: deque[Any] = deque()

    def __call__(self, flag: bool) -> bool:
        if _processes == 1:
            return flag
        self.asked.append(_any(flag))
        return len(self.asked) > 1 and bool(self.asked.popleft())


def _any(flag: bool) -> Any:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("all",))
    flags = np.full(jax.local_device_count(), flag)
    said = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")), flags)
    return _reduction(NamedSharding(mesh, PartitionSpec()))(said)


@functools.cache
def _reduction(everywhere: Any) -> Any:
    import jax

    return jax.jit(lambda flags: flags.any(), out_shardings=everywhere)
