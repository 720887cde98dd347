"""Freed memory is kept: allocating it again costs no page faults."""

import subprocess
import sys

import pytest

from ulx.memory import keep_freed_memory

PROGRAM = """
import resource
import sys
from ulx.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

size = int(sys.argv[2])  # not a constant, which would be folded

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

b"x" * size
before = faults()
for _ in range(4):
    b"x" * size  # 16,384 pages; beyond 32 MiB glibc maps by default
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_used_again():
    def faults(how: str) -> int:
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, how, str(2**26)], capture_output=True, text=True, check=True
        )
        return int(ran.stdout)

    assert faults("keep") < 50
    # 4 × 16,384, or one for 2 MiB each where huge pages are on for everybody.
    assert faults("default") >= 4 * 32


def test_elsewhere_it_says_no(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
