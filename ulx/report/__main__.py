"""Write a run's page anew, `report.html`, as training does at its end; at any time, also of a run under way.

python -m ulx.report runs/openmoji
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ulx.command_line import parse_arguments, run_command
from ulx.report.document import write


@dataclasses.dataclass(frozen=True)
class Options:
    run: Path
    """Folder of the run."""


def main(args: Sequence[str] | None = None) -> None:
    run_command(lambda: print(write(parse_arguments(Options, __doc__ or "", args).run)))


if __name__ == "__main__":
    main()
