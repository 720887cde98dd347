"""Start several processes of one experiment on this machine.

python -m ulx.launch --processes 2 experiments/openmoji.py --name both --train.batch-size 64

What follows the script is for the script. If a process ends badly, the others are stopped and the status is its own;
Ctrl-C and SIGTERM reach them all. Several machines: a scheduler, or in each the script with --coordinator HOST:PORT,
--processes and --process.
"""

import argparse
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from ulx.processes import INTERRUPTED, PREEMPTED, Address

__all__ = ["launch"]

GRACE = 30.0
"""Seconds in which a process may end by itself when it is asked to."""
LOOK = 0.2
"""Seconds between two looks at them."""


def launch(count: int, command: Sequence[str], *, grace: float = GRACE) -> int:
    """Run `python COMMAND` in so many processes; returns 0, or the status of one that failed.

    Of several that is the one that did so by itself: others end, or are ended, because it is gone.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for index in range(count):
            arguments = Address(coordinator, count, index).arguments
            # In a group of its own, so that Ctrl-C reaches it once, by way of this process.
            children.append(subprocess.Popen([sys.executable, *command, *arguments], process_group=0))
        while True:
            ended = [child.poll() for child in children]
            failed = [index for index, status in enumerate(ended) if status]
            if failed:
                break
            if None not in ended:
                return 0
            time.sleep(LOOK)
        stopped = _end(children, grace)
        left = {index: child.returncode for index, child in enumerate(children) if index not in stopped}
        by_itself = [index for index, status in left.items() if status not in (0, INTERRUPTED, PREEMPTED)]
        by_itself.sort(key=lambda index: _likely_a_consequence(left[index]))
        culprit = (by_itself or failed)[0]
        status = left[culprit]
        if not by_itself and not stopped:
            return status
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        rest = f"; process{'es' * (len(stopped) > 1)} {', '.join(map(str, stopped))} stopped" if stopped else ""
        print(f"process {culprit} of {count} {how}{rest}. The same command with --resume goes on", file=sys.stderr)
        return 128 - status if status < 0 else status
    finally:
        _end(children, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _likely_a_consequence(status: int) -> int:
    """Of a process that ended beside others: 0, not; 2, very. The runtime aborts a process from which another is gone,
    and what it was told of that may look like an error of its own; nothing but a hand or the system kills it."""
    return 2 if status == -signal.SIGABRT else 0 if status < 0 else 1


def _end(children: Sequence[subprocess.Popen[bytes]], grace: float) -> list[int]:
    """Ends those that have not ended in time; returns which they were."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(LOOK)
    left = [index for index, child in enumerate(children) if child.poll() is None]
    for index in left:
        children[index].kill()
        children[index].wait()
    return left


def main(args: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        prog="python -m ulx.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--processes", type=int, required=True, help="how many")
    options.add_argument("--grace", type=float, default=GRACE, help="seconds in which the others may end by themselves")
    options.add_argument("script", help="an experiment")
    options.add_argument("arguments", nargs=argparse.REMAINDER, help="of the experiment")
    found = options.parse_args(args)
    if found.processes < 1:
        options.error(f"--processes {found.processes}: must be at least 1")
    sys.exit(launch(found.processes, [found.script, *found.arguments], grace=found.grace))


if __name__ == "__main__":
    main()
