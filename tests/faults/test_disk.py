"""The disk of the data directory is full, or becomes read-only, while runs are accepted, run and
finish."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, run_job, wait_until
from tools import Ledger, need_root, run_processes

MIB = 1 << 20
FULL = "the executor cannot store the trigger: {}/journal.db: the disk is full"


@pytest.fixture
def disk(tmp_path):
    """A small disk, mounted for the time of the test: disk("tmpfs") or disk("ext4"), each of `mib`
    MiB, at `place`."""
    need_root()
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(kind, mib=16, place=place):
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)]
        else:
            image = tmp_path / "image"
            with open(image, "wb") as stream:
                stream.truncate(mib * MIB)
            subprocess.run(
                ["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True
            )
            command = ["mount", "-o", "loop,errors=remount-ro", str(image), str(place)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            pytest.skip(f"cannot mount {kind}: {ran.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        wait_until(
            lambda: subprocess.run(["umount", str(place)], capture_output=True).returncode == 0,
            10,
            "the unmounting",
        )


@pytest.fixture
def gates():
    """A factory of FIFOs that jobs read a line from: gates(path).open(count) lets `count` of them
    through."""

    class Gate:
        def __init__(self, path):
            os.mkfifo(path)
            self.fd = os.open(
                path, os.O_RDWR
            )  # so that neither side ever waits for the other to open it

        def open(self, count):
            os.write(self.fd, b"\n" * count)

    made = []
    yield lambda path: made.append(Gate(path)) or made[-1]
    for gate in made:
        os.close(gate.fd)


def fill(place):
    """Take all that is free, to the last byte."""
    with open(place / "ballast", "ab", buffering=0) as stream, contextlib.suppress(OSError):
        for size in (64 << 10, 4096, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(b"x" * size)


def shown(daemon):
    """What `status` (whether it says that the disk is full) and the metrics tell."""
    words = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "status"]
    told = subprocess.run(words, capture_output=True, text=True).stdout
    metrics = daemon.session.get(daemon.url + "/metrics", timeout=20).text
    return "\nDISK FULL: " in told, re.search(r"(?m)^xxl_executor_disk_full .*", metrics)[0]


def use_up(daemon, ledger, handler):
    """Trigger until the reserve is given up: SQLite needs no new block for a while."""

    def given_up():
        fill(daemon.data.parent)
        ledger.trigger(daemon, handler, jobId=99, executorParams="x" * 100_000)
        return "is given up for results" in daemon.log

    wait_until(given_up, 20, "the shortage")


def check_journal(data):
    with contextlib.closing(sqlite3.connect(data / "journal.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_disk(disk, executor, admin, tmp_path, gates, kind):
    """Triggers are refused with the reason; what runs ends, its result is stored with the help of
    the reserve and delivered; triggers are accepted again within 5 s of space returning."""
    place, ledger = disk(kind, 24), Ledger(admin, tmp_path)
    go = tmp_path / "go"
    gate = gates(go)
    daemon = executor(
        {
            "job": ledger.job(
                f"echo before; read line < {go}; yes output | head -c 300000; echo; echo done"
            ),
            "quick": ledger.job("echo quick"),
        },
        admin=admin,
        executor={"data_dir": str(place / "data")},
        start=False,
    )
    daemon.data = place / "data"
    daemon.start()
    running = [ledger.trigger(daemon, jobId=number) for number in range(1, 5)]
    waiting = [ledger.trigger(daemon, "quick", jobId=1) for _ in range(20)]
    wait_until(lambda: len(ledger.started()) == 4)
    assert os.stat(daemon.data / "reserve").st_size == 4 * MIB
    fill(place)

    use_up(daemon, ledger, "quick")
    log_id = ledger.trigger(daemon, "quick")
    assert ledger.refused[log_id] == FULL.format(daemon.data)
    assert not (daemon.data / "reserve").exists()
    assert shown(daemon) == (True, "xxl_executor_disk_full 1")
    assert (
        daemon.log.count(
            "is given up for results; triggers are refused and output of jobs is dropped until"
            " there is space"
        )
        == 1
    )

    # At log write and at result store: all that was accepted runs and its result arrives while
    # there is no space.
    gate.open(4)
    wait_until(
        lambda: all(log_id in admin.results for log_id in running), 20, "the results on a full disk"
    )
    assert {ledger.result(log_id) for log_id in running} == {(200, "done")}
    assert {ledger.result(log_id) for log_id in waiting} == {(200, "quick")}
    ledger.settle(daemon)
    text = daemon.log_text(running[0])
    assert "before" in text and len(text) < 300_000
    log_id = ledger.trigger(daemon, "quick")
    assert ledger.refused[log_id] == FULL.format(daemon.data)

    os.unlink(place / "ballast")
    began = time.monotonic()
    wait_until(
        lambda: "there is space on the disk again, triggers are accepted" in daemon.log,
        5,
        "the end of the shortage",
    )
    print(f"space was noticed after {time.monotonic() - began:.2f} s")
    log_id = ledger.trigger(daemon, "quick")
    assert ledger.result(log_id) == (200, "quick")
    assert (daemon.data / "reserve").exists()
    assert shown(daemon) == (False, "xxl_executor_disk_full 0")
    ledger.settle(daemon)
    daemon.stop()
    check_journal(daemon.data)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_results_beyond_the_reserve_are_held(disk, executor, admin, tmp_path, gates, kind):
    """Somebody else takes even the reserve: results are held in memory, stored within 5 s of space
    returning, then delivered."""
    place, ledger = disk(kind, 24), Ledger(admin, tmp_path)
    go = tmp_path / "go"
    gate = gates(go)
    message = "m" * 4000
    daemon = executor(
        {"job": ledger.job(f"read line < {go}; echo {message}")},
        admin=admin,
        start=False,
        executor={"data_dir": str(place / "data"), "max_running": 16},
    )
    daemon.data = place / "data"
    daemon.start()
    admin.behave = lambda path, body: (503, b"") if "callback" in path else None
    running = [ledger.trigger(daemon, jobId=number) for number in range(1, 17)]
    wait_until(lambda: len(ledger.started()) == 16)

    use_up(daemon, ledger, "job")
    accepted = set(ledger.accepted)
    # The write-ahead log has room of its own in blocks that it has already: take those too, one
    # result after the other.
    for count in range(1, 17):
        fill(place)
        gate.open(1)
        wait_until(lambda: daemon.status()["undelivered"] >= count, 10, "the end of a run")
    assert daemon.log.count("holding them until it works again") == 1
    os.unlink(place / "ballast")
    wait_until(lambda: "held results" in daemon.log, 5, "the storing")
    admin.behave = lambda path, body: None
    for log_id in running:
        assert ledger.result(log_id, 90) == (200, message)
    gate.open(len(accepted))  # the last that was accepted before the refusal
    ledger.settle(daemon, 60)
    daemon.stop()
    check_journal(daemon.data)


def test_start_on_a_full_disk(disk, executor, admin, tmp_path, gates):
    """Killed while the disk was full, it starts on the full disk, reports what was interrupted, and
    goes on when there is space."""
    place, ledger = disk("ext4"), Ledger(admin, tmp_path)
    go = tmp_path / "go"
    gate = gates(go)
    daemon = executor(
        {"job": ledger.job(f"read line < {go}")},
        admin=admin,
        executor={"data_dir": str(place / "data")},
        start=False,
    )
    daemon.data = place / "data"
    daemon.start()
    log_id = ledger.trigger(daemon)
    wait_until(lambda: ledger.started() == [log_id])
    daemon.kill()
    fill(place)
    daemon.start()
    assert ledger.result(log_id) == (
        500,
        "executor restarted while the job ran, its outcome is unknown",
    )
    ledger.settle(daemon)
    fill(place)
    daemon.kill()
    for _ in range(3):  # no crash loop, whatever is still missing
        fill(place)
        daemon.start()
        fill(place)
        daemon.kill()
    daemon.start()
    os.unlink(place / "ballast")
    wait_until(lambda: ledger.trigger(daemon) in ledger.accepted, 10, "an accepted trigger")
    gate.open(1)
    ledger.settle(daemon)
    daemon.stop()
    check_journal(daemon.data)


def test_a_disk_without_room_for_the_reserve(disk, executor, admin, tmp_path):
    """A first start on a disk that has too little room answers heartbeats and refuses triggers,
    until there is space."""
    place, ledger = disk("tmpfs", 16), Ledger(admin, tmp_path)
    with open(place / "ballast", "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 13 * MIB)
    daemon = executor(
        {"job": ledger.job()}, admin=admin, executor={"data_dir": str(place / "data")}, start=False
    )
    daemon.data = place / "data"
    daemon.start()
    assert daemon.post("/beat")["code"] == 200
    log_id = ledger.trigger(daemon)
    assert ledger.refused[log_id] == FULL.format(daemon.data)
    assert (
        f"the disk is full: the reserve {daemon.data}/reserve cannot be made; triggers are refused"
        " and output of jobs is dropped until there is space" in daemon.log
    )
    os.unlink(place / "ballast")
    wait_until(lambda: ledger.trigger(daemon) in ledger.accepted, 5, "an accepted trigger")
    ledger.settle(daemon)


def test_a_disk_that_becomes_read_only(disk, executor, admin, tmp_path, gates):
    """As after an I/O error: triggers are refused with the reason, what runs ends, its results are
    held; after the disk was mended and the executor restarted each accepted run has a result."""
    place, ledger = disk("ext4", 24), Ledger(admin, tmp_path)
    go = tmp_path / "go"
    gate = gates(go)
    daemon = executor(
        {"job": ledger.job(f"read line < {go}; echo done")},
        admin=admin,
        executor={"data_dir": str(place / "data")},
        start=False,
    )
    daemon.data = place / "data"
    daemon.start()
    running = [ledger.trigger(daemon, jobId=number) for number in range(1, 4)]
    wait_until(lambda: len(ledger.started()) == 3)
    device = Path(
        os.path.realpath(
            subprocess.run(
                ["findmnt", "-n", "-o", "SOURCE", str(place)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
        )
    ).name
    trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")
    if not trigger.exists():
        pytest.skip("this kernel cannot be told to fail a file system")
    trigger.write_text("a test")
    log_id = ledger.trigger(daemon)
    assert log_id in ledger.refused
    print(ledger.refused[log_id])
    assert ledger.refused[log_id].startswith(
        f"the executor cannot store the trigger: {daemon.data}/journal.db: "
    )
    gate.open(3)
    wait_until(lambda: daemon.status()["undelivered"] == 3, 10, "the end of the runs")
    wait_until(lambda: "holding them until it works again" in daemon.log, 5, "the complaint")
    assert daemon.log.count("holding them until it works again") == 1
    assert daemon.post("/beat")["code"] == 200 and not run_processes(daemon)
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    assert daemon.log.endswith(
        "stopped, 3 results could not be stored: the next start reports their outcome as unknown\n"
    )
    subprocess.run(["umount", str(place)], check=True)

    def given_back():  # a namespace of another test may have a copy of the mount
        attached = ["losetup", "-j", str(tmp_path / "image")]
        return not subprocess.run(attached, check=True, capture_output=True).stdout

    wait_until(given_back, 60, "the end of the mount")
    subprocess.run(["e2fsck", "-p", "-f", str(tmp_path / "image")], capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(tmp_path / "image"), str(place)], check=True)
    daemon.start()
    for log_id in running:
        assert ledger.result(log_id) == (
            500,
            "executor restarted while the job ran, its outcome is unknown",
        )
    ledger.settle(daemon)
    daemon.stop()
    check_journal(daemon.data)


def test_space_returns_while_no_run_ends(disk, executor, admin, tmp_path, gates):
    """Triggers are accepted again within 5 s of space returning, also when nothing else stirs."""
    place, ledger, go = disk("tmpfs", 24), Ledger(admin, tmp_path), tmp_path / "go"
    gate = gates(go)
    daemon = executor(
        {"job": ledger.job(f"read line < {go}")},
        admin=admin,
        executor={"data_dir": str(place / "data")},
        start=False,
    )
    daemon.data = place / "data"
    daemon.start()
    wait_until(lambda: daemon.status()["registered"])
    use_up(daemon, ledger, "job")
    os.unlink(place / "ballast")
    wait_until(
        lambda: "there is space on the disk again, triggers are accepted" in daemon.log,
        5,
        "the end of the shortage",
    )
    log_id = ledger.trigger(daemon, jobId=2)
    assert log_id in ledger.accepted
    gate.open(len(ledger.accepted))
    ledger.settle(daemon)


def test_a_full_disk_of_logs_holds_up_no_job(executor, admin, disk, tmp_path):
    """A thread whose job writes there says so in the executor's log, and goes on; so do the other
    jobs."""
    (tmp_path / "prints.py").write_text(
        "def main():\n    for _ in range(3000):\n        print('x' * 1000)\n    return 'done'\n"
    )
    prints = {"python": "prints:main", "isolation": "thread", "pythonpath": [str(tmp_path)]}
    daemon = executor({"prints": prints, "other": {"shell": "echo fine"}}, admin=admin, start=False)
    logs = daemon.data / "logs"
    logs.mkdir(parents=True)
    disk("tmpfs", 1, logs)
    daemon.start()
    assert run_job(daemon, admin, "prints")[1]["handleMsg"] == "done"
    assert run_job(daemon, admin, "other", jobId=2)[1]["handleMsg"] == "fine"
    assert "cannot write a job log, output is dropped: No space left on device" in daemon.log
    assert daemon.stop() == 0
