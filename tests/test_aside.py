import os
import re
import subprocess
import sys
import threading
import time

import pytest

from ulx import aside
from ulx.aside import AsideError, remove_left, write_aside


def test_the_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "notes.json"
    with write_aside(path) as file:
        file.write_text("first")
        assert not path.exists()
    with write_aside(path) as file:
        file.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_where_writing_fails_the_old_file_stays_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    path.write_text("old")

    def half(error: BaseException) -> None:
        with write_aside(path) as file:
            file.write_text("half")
            raise error

    for error in (ValueError("not finite"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            half(error)

    def no_room(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    said = f"{re.escape(str(path))} cannot be written: no space left"
    with pytest.raises(AsideError, match=said), write_aside(path) as file:
        file.write_text("whole, but not on the disk")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "notes.json", []
    flush = os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (done.append(path.exists()), flush(file)))
    with write_aside(path) as file:
        file.write_text("whole")
    assert done == [False]


STOPPED = """
import sys, time
from pathlib import Path
from ulx.aside import write_aside
with write_aside(Path(sys.argv[1])) as file:
    file.write_text("half")
    print(flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_there(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    (half,) = tmp_path.iterdir()
    with write_aside(tmp_path / "other.json") as file:
        file.write_text("beside it")
    assert half.exists()  # of a process that runs
    process.kill()
    process.wait()
    monkeypatch.setattr(aside, "_tidied", set())  # as in another process
    with write_aside(path) as file:
        file.write_text("whole")
    assert half.exists() == (aside.where() == aside.NOWHERE)  # else after an hour
    assert path.read_text() == "whole"


def test_of_what_was_left_only_what_nobody_writes_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    long_ago = time.time() - 2 * aside.STALE_SECONDS
    kept = ["notes.json", "my.tmp", "of.mine.3.tmp", f"a.{aside.where()}.{os.getpid()}-aa.tmp"]
    kept.append(f"a.elsewhere.{ended.pid}-aa.tmp")  # another process there
    if aside.where() == aside.NOWHERE:
        kept.append(f"a.{aside.NOWHERE}.{ended.pid}-aa.tmp")
    gone = [f"a.{aside.where()}.{ended.pid}-aa.tmp", "a.elsewhere.2-aa.tmp"]
    for name in {*kept, *gone}:
        (tmp_path / name).touch()
        if name in ("my.tmp", "a.elsewhere.2-aa.tmp"):
            os.utime(tmp_path / name, (long_ago, long_ago))
    remove_left(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    for name in ("n" * 255, "é" * 127):
        with write_aside(tmp_path / name) as file:
            file.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_threads_that_write_one_file_each_write_a_whole_one(tmp_path):
    path = tmp_path / "notes.json"
    failed = []

    def write(content: str) -> None:
        for _ in range(20):
            try:
                with write_aside(path) as file:
                    file.write_text(content)
            except OSError as error:
                failed.append(error)

    contents = [letter * 100_000 for letter in "abc"]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path]
