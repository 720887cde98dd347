"""Processes that find each other, as a scheduler starts them, and what they agree on."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

from ulx import launch, processes

WORKER = """
    import json, sys
    import numpy as np
    from ulx import processes, sharding

    processes.connect()
    import jax

    index = jax.process_index()
    found = {"first": processes.is_first(), "share": processes.share(list("abcde"))}
    found["agree"] = [processes.all_agree(True), processes.all_agree(index == 0)]
    found["in turn"] = processes.in_turn(lambda: index + 10)

    def fail():
        raise ValueError("no such folder")

    try:
        processes.first(fail)
    except (ValueError, processes.FailedElsewhereError) as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    vote = processes.Vote()
    found["votes"] = [vote(step == 1 and index == 1) for step in range(4)]
    mesh = sharding.make_mesh()
    rows = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    placed = sharding.place_rows((rows, jax.random.split(jax.random.key(0), 4)), mesh)
    found["rows here"] = placed[0].addressable_shards[0].data.tolist()
    found["rows"] = sharding.on_host(placed[0]).tolist()
    found["keys"] = sharding.on_host(jax.random.key_data(placed[1])).tolist()
    own = sharding.on_own_devices({"a": placed[0], "name": "a"})
    found["own"] = [own["a"].is_fully_addressable, own["a"].tolist(), own["name"]]
    sys.stderr.write("RESULT" + json.dumps(found) + "\\n")
    print("only the first one is heard")
"""


@pytest.fixture(scope="module")
def both() -> list[tuple[dict, str]]:
    """What each of two processes found, started as SLURM starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    common = os.environ | slurm | {"JAX_COORDINATOR_PORT": str(port), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER)],
            env=common | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    found = []
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        (line,) = [line for line in errors.splitlines() if line.startswith("RESULT")]
        found.append((json.loads(line.removeprefix("RESULT")), out))
    return found


def test_two_processes_agree(both):
    (one, said), (two, silent) = both
    assert (one["first"], two["first"]) == (True, False)
    assert (one["share"], two["share"]) == (["a", "c", "e"], ["b", "d"])
    assert one["agree"] == two["agree"] == [True, False]
    assert (one["in turn"], two["in turn"]) == (10, 11)
    assert one["failed"] == "ValueError: no such folder"
    assert two["failed"] == "FailedElsewhereError: the first process stopped: see its message"
    # Said by the second one at the second step, known to both at the third.
    assert one["votes"] == two["votes"] == [False, False, True, False]
    assert "only the first one is heard" in said
    assert "only the first one is heard" not in silent


def test_rows_on_two_processes(both):
    rows = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
    for index, (found, _) in enumerate(both):
        assert found["rows here"] == rows[2 * index : 2 * index + 2]
        assert found["rows"] == rows
        assert found["own"] == [True, rows, "a"]
    assert both[0][0]["keys"] == both[1][0]["keys"]
    assert len({tuple(key) for key in both[0][0]["keys"]}) == 4


def test_alone_there_is_nobody_to_ask():
    assert processes.is_first()
    assert not processes.are_connected()
    assert processes.all_agree(True)
    assert not processes.all_agree(False)
    assert processes.in_turn(lambda: 3) == 3
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.Vote()(True)
    with pytest.raises(ValueError, match="invalid literal for int"):
        processes.first(lambda: int("this"))


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, False),  # a batch script, or a single task of a job
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "one"}, False),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, True),
    ],
)
def test_whether_a_scheduler_started_several(environment, several):
    assert processes.are_several(environment) == several


def test_addresses_on_the_command_line():
    address = processes.Address("localhost:1234", 4, 2)
    found, rest = processes.split_arguments(["--name", "a", *address.arguments, "--resume"])
    assert (found, rest) == (address, ["--name", "a", "--resume"])
    assert processes.split_arguments(["--name", "a"]) == (None, ["--name", "a"])
    for arguments, message in (
        (["--process", "0"], "go together: --coordinator and --processes missing"),
        (["--process", "one"], "invalid int value: 'one'"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "--coordinator here: must be HOST:PORT"),
        (["--coordinator", "h:1", "--processes", "2", "--process", "2"], "--process 2: must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            processes.split_arguments(arguments)


def test_the_launcher_ends_with_the_first_bad_status(capfd):
    script = "import sys, time; index = int(sys.argv[-1]); {}"
    assert launch.launch(2, ["-c", script.format("print(sys.argv[1], index)"), "x"]) == 0
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "x 0", "x 1"]
    waits = script.format("sys.exit(3) if index == 1 else time.sleep(60)")
    assert launch.launch(2, ["-c", waits], grace=0.5) == 3
    assert "process 1 of 2 ended with status 3; process 0 stopped. The same command" in capfd.readouterr().err
    killed = script.format("import os; os.kill(os.getpid(), 9) if index == 0 else sys.exit(0)")
    assert launch.launch(2, ["-c", killed], grace=0.5) == 137
    assert "process 0 of 2 was killed by signal 9. The same command" in capfd.readouterr().err
    # The first to be seen is not always the cause.
    both = script.format("import os, time; os.kill(os.getpid(), 6 if index == 0 else 9)")
    assert launch.launch(2, ["-c", both], grace=5) == 137
    assert "process 1 of 2 was killed by signal 9. The same command" in capfd.readouterr().err
    told = script.format("import os; os.kill(os.getpid(), 9) if index == 1 else sys.exit(1)")
    assert launch.launch(2, ["-c", told], grace=5) == 137
    assert "process 1 of 2 was killed by signal 9. The same command" in capfd.readouterr().err
    follows = script.format("(time.sleep(1), sys.exit(4)) if index == 1 else sys.exit(75)")
    assert launch.launch(2, ["-c", follows], grace=5) == 4
    assert "process 1 of 2 ended with status 4. The same command" in capfd.readouterr().err
    again = script.format("sys.exit(75)")
    assert launch.launch(2, ["-c", again], grace=0.5) == processes.PREEMPTED
    assert capfd.readouterr().err == ""
