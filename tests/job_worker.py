"""The whole job of a configuration file, as a command runs it: to be killed, started again, or one of several.

python tests/job_worker.py CONFIG.json [--coordinator HOST:PORT --processes N --process I]
"""

import sys
from pathlib import Path

from ulx.processes import split_arguments


def main() -> None:
    address, (path,) = split_arguments(sys.argv[1:])
    from ulx import job
    from ulx.command_line import run_together
    from ulx.config import from_json

    run_together(lambda: job.run(from_json(Path(path).read_text())), address)


if __name__ == "__main__":
    main()
