"""The host fails: its clock jumps, it is short of processes and descriptors, its PIDs come again,
it has no init."""

import contextlib
import ctypes
import functools
import glob
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, PROGRAM, alive, children_of, launch, result_of, run_job, wait_until
from tools import Ledger, Proxy, need_root, rounds

import xxl_executor

program = PROGRAM  # limits and namespaces hold from the first moment


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"needs {program}")


def idle(daemon):
    """Whether no run runs or waits."""
    status = daemon.status()
    return not status["running"] and not status["queued"]


# -- the wall clock

DAY = 86_400


class Clock:
    """The wall clock of the processes that got `env`: `jump` moves it, the monotonic one goes on;
    see faketime(1)."""

    def __init__(self, file):
        libraries = [
            path
            for name in ("libfaketimeMT.so.1", "libfaketime.so.1")
            for path in glob.glob(f"/usr/lib/*/faketime/{name}")
            + glob.glob(f"/usr/lib*/faketime/{name}")
        ]
        if not libraries:
            pytest.skip("needs libfaketime (Debian: faketime)")
        self.file = file
        self.jump(0)
        self.env = {
            "LD_PRELOAD": libraries[0],
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # else threads that wait for each other spin
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1",
        }

    def jump(self, seconds):
        """Set the clock to the true time and `seconds`."""
        new = self.file.with_name("clock.new")
        new.write_text(f"{seconds:+d}\n")
        os.replace(new, self.file)  # nobody reads half of it


def stamps(daemon):
    """The times of the lines in the daemon's log, in seconds since the epoch."""
    return [
        time.mktime(time.strptime(found, "%Y-%m-%d %H:%M:%S"))
        for found in re.findall(
            r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.\d{3} ", daemon.log, re.MULTILINE
        )
    ]


def heartbeats(admin):
    return sum(path == "/api/registry" for path, _, _ in admin.requests)


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
def test_the_wall_clock_jumps(executor, admin, tmp_path, jump):
    """Timeouts, heartbeats, backoff and draining take as long as always when the clock jumps a day
    while they wait."""
    if not sysconfig.get_config_var("HAVE_SEM_CLOCKWAIT"):
        pytest.skip(
            "waits for locks by the wall clock: needs CPython 3.9.8, 3.10.1 or later, built with"
            " glibc 2.30"
        )
    ledger, clock, down = Ledger(admin, tmp_path), Clock(tmp_path / "clock"), False
    with Proxy(admin, lambda number: "reset" if down else "pass") as proxy:
        daemon = executor(
            {
                "process": ledger.job("exec sleep 60", timeout="3s", kill_grace="0.3s"),
                "thread": ledger.python_job(
                    tmp_path,
                    "waits",
                    "context.cancelled.wait(60)",
                    isolation="thread",
                    timeout="3s",
                ),
                "job": ledger.job("echo done"),
                "long": ledger.job("exec sleep 600", kill_grace="0.3s"),
            },
            program=LAUNCH,
            env={**clock.env, **launch(REGISTRY_INTERVAL=1.0)},
            executor={"drain_timeout": "2s"},
            admin_options={"addresses": [proxy.url]},
        )
        assert ledger.result(ledger.trigger(daemon)) == (200, "done")
        wait_until(lambda: heartbeats(admin) >= 2, 10, "the second heartbeat")

        began, wall = time.monotonic(), time.time()
        timed = [
            ledger.trigger(daemon, name, jobId=number)
            for number, name in enumerate(("process", "thread"), 2)
        ]
        wait_until(lambda: set(timed) <= set(ledger.started()), 10, "the start of both")
        beats, jumped = heartbeats(admin), time.monotonic()
        clock.jump(jump)
        for log_id in timed:
            assert ledger.result(log_id) == (502, "timed out after 3 s")
            assert time.monotonic() - began >= 2.9 and time.monotonic() - jumped <= 8
        wait_until(lambda: abs(stamps(daemon)[-1] - wall - jump) < 60, 10, "the jump in the daemon")
        wait_until(lambda: heartbeats(admin) >= beats + 2, 8, "two more heartbeats")
        assert heartbeats(admin) - beats <= time.monotonic() - jumped + 2, (
            "no more of them than always"
        )

        down = True
        log_id = ledger.trigger(daemon)
        wait_until(lambda: "cannot deliver 1 result," in daemon.log, 10, "the first attempt")
        clock.jump(2 * jump)
        down = False
        assert ledger.result(log_id, 8) == (200, "done")
        wait_until(lambda: abs(stamps(daemon)[-1] - wall - 2 * jump) < 60, 10, "the second jump")

        log_id = ledger.trigger(daemon, "long", jobId=4)
        wait_until(lambda: log_id in ledger.started(), 10, "the start of the long run")
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: "stopping: " in daemon.log, 10, "the beginning of the end")
        clock.jump(3 * jump)
        assert daemon.wait(30) == 0
        assert 1.9 <= time.monotonic() - began <= 30
        assert ledger.result(log_id) == (500, "killed: the executor stopped")
        ledger.settle(daemon)


# -- no more processes and threads


class Unprivileged:
    """A user of its own, whom RLIMIT_NPROC binds; it may read what root may, to run the interpreter
    of the tests."""

    def __init__(self, directory):
        """`directory` will belong to it."""
        need_root()
        need("setpriv", "prlimit")
        self.uid, self.directory = 1_000_000 + os.getpid(), directory
        read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        self.prefix = [
            "setpriv",
            "--reuid",
            str(self.uid),
            "--regid",
            str(self.uid),
            "--clear-groups",
            *read,
        ]
        tried = subprocess.run(
            [*self.prefix, sys.executable, "-c", "import requests, sqlite3, yaml"],
            capture_output=True,
            text=True,
        )
        if tried.returncode:
            pytest.skip(
                f"needs an interpreter that every user can run: {tried.stderr.strip()[-200:]}"
            )
        self.hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        self.hard = "unlimited" if self.hard == resource.RLIM_INFINITY else self.hard
        directory.mkdir()
        os.chown(directory, self.uid, self.uid)

    def processes(self):
        """The threads of each process of this user, which are what the limit counts."""
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == self.uid:
                    found[int(name)] = len(os.listdir(f"/proc/{name}/task"))
        return found

    def limit(self, more):
        """Allow `more` than there are now; 0: none at all, even when some end; None: no limit of
        its own."""
        found = self.processes()
        most = self.hard if more is None else sum(found.values()) + more if more else 1
        for pid in found:  # as this user: root in a container may not change the limits of others
            subprocess.run(
                [*self.prefix, "prlimit", "--pid", str(pid), f"--nproc={most}:"], check=True
            )


@pytest.fixture
def poor(executor, admin, tmp_path):
    """(user, ledger, daemon) with room for a few runs, all of which were warmed up once."""
    user = Unprivileged(tmp_path / "executor")
    ledger = Ledger(admin, user.directory)
    fork = (
        "import os, signal, sys\n"
        "for _ in range(100):\n"
        "    try:\n        pid = os.fork()\n"
        "    except OSError as error:\n        sys.exit(error.strerror)\n"
        "    if pid == 0:\n        signal.pause()\n"
    )
    daemon = executor(
        {
            "job": ledger.job("echo done"),
            "gate": ledger.job("until [ -e gate ]; do sleep 0.05; done; echo done"),
            "forks": {"command": [sys.executable, "-c", fork], "kill_grace": "0.3s"},
            "python": ledger.python_job(user.directory, "quick", "return 'done'"),
            "thread": ledger.python_job(
                user.directory, "cooperative", "return 'done'", isolation="thread"
            ),
            "holds": ledger.python_job(
                user.directory,
                "holds",
                "while not os.path.exists('free'):\n"
                "    context.cancelled.wait(0.02)\nreturn 'done'",
                isolation="thread",
            ),
            "watched": ledger.python_job(
                user.directory, "watched", "return 'done'", isolation="thread", timeout="1m"
            ),
        },
        admin=admin,
        directory=user.directory,
        prefix=user.prefix,
        executor={"max_running": 3},
    )
    assert Path(f"/proc/{daemon.process.pid}").stat().st_uid == user.uid
    for name in ("job", "python", "thread"):
        assert ledger.result(ledger.trigger(daemon, name)) == (200, "done")
    return user, ledger, daemon


def test_no_more_processes(poor):
    """A run that finds no process fails and says so, its slot is free again, and the next runs
    succeed."""
    user, ledger, daemon = poor
    user.limit(0)
    for pid in daemon.family():  # what was forked for the next run of `python` beforehand
        process = xxl_executor.process_stat(pid)
        if process is not None and process.parent != daemon.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    expected = {
        "job": "cannot start /bin/sh: Resource temporarily unavailable",
        "python": f"cannot start {sys.executable}: cannot fork: Resource temporarily unavailable",
    }
    failed = {}
    for number in range(rounds(4)):
        for name in expected:
            failed[ledger.trigger(daemon, name, jobId=number)] = name
    wait_until(lambda: idle(daemon), 20, "the end of all")
    assert daemon.post("/beat")["code"] == 200
    user.limit(None)
    for log_id, name in failed.items():
        assert ledger.result(log_id) == (500, expected[name])
    for name in expected:
        assert ledger.result(ledger.trigger(daemon, name)) == (200, "done")
    ledger.settle(daemon)


def test_a_job_finds_no_more_processes(poor):
    """A job that uses up its user's processes fails by itself, nothing of it stays, and the daemon
    goes on."""
    user, ledger, daemon = poor
    user.limit(8)
    hungry = ledger.trigger(daemon, "forks")
    wait_until(lambda: idle(daemon), 20, "the end of the job")
    user.limit(None)
    assert ledger.result(hungry) == (500, "exit status 1: Resource temporarily unavailable")
    assert ledger.result(ledger.trigger(daemon)) == (200, "done")
    ledger.settle(daemon)


def test_no_more_threads(poor):
    """Slots that cannot be added leave the work to those there are; later they are added."""
    user, ledger, daemon = poor
    user.limit(0)
    ids = [ledger.trigger(daemon, "holds", jobId=200)]
    wait_until(
        lambda: ids[0] in ledger.started(), 10, "the start of the one that holds the only slot"
    )
    ids += [ledger.trigger(daemon, "thread", jobId=number) for number in range(rounds(20))]
    assert "cannot start another thread, 1 slots instead of 3" in daemon.log and not ledger.refused
    watched = ledger.trigger(daemon, "watched", jobId=100)
    (user.directory / "free").touch()
    wait_until(lambda: idle(daemon), 20, "the end of all")
    user.limit(None)
    assert [ledger.result(log_id) for log_id in ids] == [(200, "done")] * len(ids)
    assert ledger.result(watched) == (200, "done"), "its timeout needs no thread"
    ids = [ledger.trigger(daemon, "gate", jobId=number) for number in range(3)]
    wait_until(lambda: len(daemon.status()["running"]) == 3, 10, "the third slot")
    (user.directory / "gate").touch()
    assert [ledger.result(log_id) for log_id in ids] == [(200, "done")] * 3
    ledger.settle(daemon)


# -- no more descriptors

FILES = 128


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid):
    """What a process has used, all threads, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def beat_within(port, seconds):
    """A heartbeat over a new connection is answered in time."""
    deadline = time.monotonic() + seconds
    with socket.create_connection(("127.0.0.1", port), seconds) as fresh:
        fresh.sendall(b"POST /beat HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        while b"200" not in fresh.recv(4096):
            pass
    assert time.monotonic() <= deadline


def run_within(ledger, daemon, seconds):
    """A run succeeds in time; whether its result has arrived is another matter."""
    deadline, log_id = time.monotonic() + seconds, ledger.trigger(daemon)
    wait_until(
        lambda: re.search(rf"finished job logId={log_id} .*code=200", daemon.log), 10, "the run"
    )
    assert time.monotonic() <= deadline


def assert_no_busy_loop(pid):
    used, began = cpu_seconds(pid), time.monotonic()
    wait_until(lambda: time.monotonic() - began >= 1.0)
    assert cpu_seconds(pid) - used < 0.2 * (time.monotonic() - began), "a busy loop"


def trigger_over_open_connection(ledger, daemon, count=5):
    """Accepted logIds of as many lanes, over the connection of the daemon's session."""
    accepted = []
    for _ in range(count):
        log_id = len(ledger.accepted) + 1
        reply = daemon.post(
            "/trigger", {"jobId": log_id, "logId": log_id, "executorHandler": "job"}
        )
        assert reply["code"] == 200, reply
        ledger.accepted.add(log_id)
        accepted.append(log_id)
    return accepted


def assert_done_or_short_of_files(ledger, log_ids):
    for log_id in log_ids:
        code, message = ledger.result(log_id, 70)
        assert (
            (code, message) == (200, "done")
            or code == 500
            and message.endswith("Too many open files")
        ), message


@pytest.fixture
def short(executor, admin, tmp_path):
    """(ledger, daemon, how many descriptors it has at rest) with at most FILES of them."""
    need("prlimit")
    ledger = Ledger(admin, tmp_path)
    daemon = executor(
        {"job": ledger.job("echo done")},
        admin=admin,
        executor={"max_running": 2},
        prefix=["prlimit", f"--nofile={FILES}:{FILES}"],
    )  # prlimit becomes the daemon
    wait_until(lambda: daemon.status()["registered"], 10, "the registration")
    for _ in range(2):  # so that whatever stays open is open
        assert ledger.result(ledger.trigger(daemon)) == (200, "done")
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    return ledger, daemon, descriptors(daemon.process.pid)


def test_the_limit_of_descriptors_that_would_do_is_told(executor, short):
    """The number in the warning is enough: with it there is none."""
    _, daemon, _ = short
    told = re.search(
        rf"at most {FILES} files may be open; .* may need (\d+): raise .*LimitNOFILE=(\d+)",
        daemon.log,
    )
    assert told[1] == told[2]
    other = executor(
        {}, executor={"max_running": 2}, prefix=["prlimit", f"--nofile={told[1]}:{told[1]}"]
    )
    assert "files may be open" not in other.log


def test_more_connections_than_descriptors(short):
    """Connections beyond the limit wait and cost nothing, accepted runs get results, all is well
    when they close."""
    ledger, daemon, before = short
    pid = daemon.process.pid
    for _ in range(rounds(2)):
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(socket.create_connection(("127.0.0.1", daemon.port)))
            wait_until(lambda: descriptors(pid) >= before + 30, 10, "the shortage")
            assert_no_busy_loop(pid)
            log_ids = trigger_over_open_connection(ledger, daemon)
            wait_until(lambda: idle(daemon), 20, "the end of all")
        beat_within(daemon.port, 1.0)
        run_within(ledger, daemon, 1.0)
        assert_done_or_short_of_files(ledger, log_ids)
        ledger.settle(daemon, 70)
        wait_until(lambda: descriptors(pid) <= before, 10, "the closing of descriptors")


def test_no_descriptor_at_all(short):
    """Accepted runs fail and say why, new connections wait without a busy loop, all is well with
    some again."""
    ledger, daemon, before = short
    pid = daemon.process.pid
    for _ in range(rounds(2)):
        daemon.post("/beat")  # the connection that stays
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, FILES))
        with socket.create_connection(("127.0.0.1", daemon.port)) as waiting:
            waiting.sendall(b"POST /beat HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            log_ids = trigger_over_open_connection(ledger, daemon)
            wait_until(lambda: idle(daemon), 20, "the end of all")
            assert_no_busy_loop(pid)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (FILES, FILES))
            waiting.settimeout(1.0)
            assert b"200" in waiting.recv(4096), "what waited is answered"
        run_within(ledger, daemon, 1.0)
        for log_id in log_ids:
            assert ledger.result(log_id, 70) == (500, "cannot start /bin/sh: Too many open files")
        ledger.settle(daemon, 70)
        wait_until(lambda: descriptors(pid) <= before, 10, "the closing of descriptors")


# -- PID namespaces: PIDs that are given out again, and the daemon as process 1

NAMESPACE = [
    "unshare",
    "--fork",
    "--pid",
    "--mount-proc",
    "--kill-child",
]  # all in it end with unshare


@pytest.fixture
def namespace():
    """namespace(daemon) -> its process 1, as the PID that we see; whatever is in the namespace at
    the end is killed."""
    need_root()
    need("unshare")
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs PID namespaces: {tried.stderr.strip()}")
    made = []

    def find(daemon):
        children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
        made.append((daemon, int(wait_until(children.read_text, 10, "process 1").split()[0])))
        return made[-1][1]

    yield find
    for daemon, first in made:
        if daemon.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)  # the kernel ends the others
            daemon.process.wait(10)


def members(inode):
    """{pid: state} of what is in the PID namespace with this inode."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            stat = xxl_executor.process_stat(pid)
            if stat and (os.stat(f"/proc/{pid}/ns/pid").st_ino == inode):
                found[pid] = stat[0]
    return found


INIT = """
# Process 1 of the namespace: starts the daemon (argv), does what it is told over one FIFO, and answers over another.
import json, os, signal, subprocess, sys

commands, answers = open(sys.argv[1]), open(sys.argv[2], "w", buffering=1)
strangers, daemon = {}, subprocess.Popen(sys.argv[3:])
for line in commands:
    name, *arguments = json.loads(line)
    if name == "kill":
        daemon.kill()
        answer = daemon.wait()
    elif name == "pid":
        answer = daemon.pid
    elif name == "occupy":
        pid, = arguments
        try:  # what the dead daemon left is our child: its PID is free when it is reaped
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        for _ in range(100):
            with open("/proc/sys/kernel/ns_last_pid", "w") as file:
                file.write(str(pid - 1))
            stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
            if stranger.pid == pid:
                break
            stranger.kill()
            stranger.wait()
        strangers[stranger.pid] = stranger
        answer = stranger.pid
    elif name == "start":
        daemon = subprocess.Popen(sys.argv[3:])
        answer = daemon.pid
    elif name == "alive":
        answer = {pid: stranger.poll() is None for pid, stranger in strangers.items()}
    elif name == "stop":
        daemon.terminate()
        answer = daemon.wait()
    answers.write(json.dumps(answer) + "\\n")
"""


def test_pids_that_are_given_out_again(executor, admin, tmp_path, namespace):
    """Who got the PIDs of the dead daemon and its job survives the next daemon; what is really left
    of jobs dies."""
    ledger = Ledger(admin, tmp_path)
    (tmp_path / "init.py").write_text(INIT)
    for name in ("commands", "answers"):
        os.mkfifo(tmp_path / name)
    script = (
        'echo $$ > "$XXL_JOB_PARAM"; setsid sleep 600 & echo $! > "$XXL_JOB_PARAM.child"; exec'
        " sleep 600"
    )
    daemon = executor(
        {"waits": ledger.job(script, cwd=str(tmp_path))},
        admin=admin,
        start=False,
        prefix=[
            *NAMESPACE,
            sys.executable,
            str(tmp_path / "init.py"),
            str(tmp_path / "commands"),
            str(tmp_path / "answers"),
        ],
    )
    daemon.start(wait=False)
    first = namespace(daemon)
    with (
        open(tmp_path / "commands", "w", buffering=1) as commands,
        open(tmp_path / "answers") as answers,
    ):

        def tell(*command):
            commands.write(json.dumps(command) + "\n")
            return json.loads(answers.readline())

        def pid_in(file):
            return int(
                wait_until(
                    lambda: (tmp_path / file).exists() and (tmp_path / file).read_text(), 10, file
                )
            )

        def outside(pid):
            """The PID that we see of a process in the namespace, 0 when there is none."""
            for found in members(inode):
                with contextlib.suppress(OSError):
                    if (
                        int(
                            re.search(
                                r"NSpid:.*\s(\d+)\n", Path(f"/proc/{found}/status").read_text()
                            )[1]
                        )
                        == pid
                    ):
                        return found
            return 0

        inode = os.stat(f"/proc/{first}/ns/pid").st_ino
        wait_until(lambda: daemon.url, 20, "the start of the daemon")
        for turn in range(1, rounds(1) + 1):
            log_ids = [
                ledger.trigger(daemon, "waits", jobId=number, executorParams=f"{number}-{turn}")
                for number in (1, 2)
            ]
            jobs = [pid_in(f"{number}-{turn}") for number in (1, 2)]
            left = [
                outside(pid)
                for pid in (jobs[1], *(pid_in(f"{number}-{turn}.child") for number in (1, 2)))
            ]
            old = tell("pid")
            assert all(left) and tell("kill") == -signal.SIGKILL
            assert [tell("occupy", pid) for pid in (old, jobs[0])] == [old, jobs[0]]
            assert all(map(alive, left)), "nobody has ended them yet"
            listening = daemon.log.count("listening on")
            assert tell("start") not in (old, *jobs)
            wait_until(
                lambda: daemon.log.count("listening on") > listening,
                20,
                "the start of the next daemon",
            )
            assert not any(map(alive, left)), "leftovers of the old daemon"
            for log_id in log_ids:
                assert ledger.result(log_id) == (
                    500,
                    "executor restarted while the job ran, its outcome is unknown",
                )
            ledger.settle(daemon)
            assert all(tell("alive").values()), (
                "strangers with the PIDs of the old daemon and its job"
            )
        assert tell("stop") == 0
        assert len(tell("alive")) == 2 * turn and all(tell("alive").values())
    assert daemon.wait(10) == 0
    wait_until(lambda: not members(inode), 10, "the end of the namespace")


def test_as_process_1_of_a_container(executor, admin, tmp_path, namespace):
    """With no init above it the daemon reaps orphans of jobs, tells exit statuses exactly, and
    drains at SIGTERM."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor(
        {
            "exit": ledger.job("exit $1"),
            # two that end at once, two that end later, in the session of the job and in their own
            "orphans": ledger.job(
                "(true &); (setsid sh -c 'exit 3' &); (sleep 0.3 &);"
                " (setsid sh -c 'sleep 0.5; exit 4' &); echo done",
                background="keep",
            ),
            "gate": ledger.job(f"until [ -e {tmp_path}/gate ]; do sleep 0.05; done; echo drained"),
        },
        admin=admin,
        prefix=NAMESPACE,
        executor={"max_running": 4},
    )
    first = namespace(daemon)
    inode = os.stat(f"/proc/{first}/ns/pid").st_ino
    assert daemon.status()["pid"] == 1
    expected = {}
    for _ in range(rounds(1)):
        for status in range(256):
            log_id = ledger.trigger(daemon, "exit", jobId=status % 4, executorParams=str(status))
            expected[log_id] = (500, f"exit status {status}") if status else (200, "")
            if status % 16 == 0:
                expected[ledger.trigger(daemon, "orphans", jobId=10 + status % 64)] = 200, "done"
    for log_id, result in expected.items():
        assert ledger.result(log_id, 60) == result
    wait_until(lambda: len(members(inode)) == 1, 10, "the reaping of every orphan")

    last = ledger.trigger(daemon, "gate", jobId=5)
    wait_until(lambda: last in ledger.started(), 10, "the start of the last run")
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: "stopping: " in daemon.log, 10, "the beginning of the end")
    (tmp_path / "gate").touch()
    assert ledger.result(last) == (200, "drained")
    assert daemon.wait(15) == 0, daemon.log
    ledger.settle(daemon)
    wait_until(lambda: not members(inode), 10, "the end of the namespace")


# -- a file system that does not answer


@contextlib.contextmanager
def silent_mount(place):
    """A FUSE file system whose server never answers, such as an NFS server that is away; yields
    what ends that."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"needs /dev/fuse: {error}")
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"test", str(place).encode(), b"fuse", 0, options):
        os.close(fd)
        pytest.skip(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    with contextlib.ExitStack() as stack:
        stack.callback(libc.umount2, str(place).encode(), 2)  # MNT_DETACH
        answering = contextlib.ExitStack()
        answering.callback(os.close, fd)  # everybody who waits gets an error then
        stack.enter_context(answering)
        yield answering.close


@pytest.fixture
def hung(tmp_path):
    """(A directory on such a file system, what ends that.)"""
    need_root()
    place = tmp_path / "hung"
    place.mkdir()
    with silent_mount(place) as end:
        yield str(place / "sub"), end


@pytest.mark.parametrize("what", ["directory", "program"])
def test_a_job_whose_directory_or_program_does_not_answer_holds_up_nobody(
    executor, admin, hung, what
):
    """Its start hangs; others start, end, time out and are killed meanwhile."""
    directory, end = hung
    jobs = {
        "directory": {"shell": "true", "cwd": directory},
        "program": {"command": [f"{directory}/program"]},
    }
    daemon = executor(
        {
            "hangs": jobs[what],
            "ok": {"shell": "echo hi"},
            "slow": {"shell": "exec sleep 600", "timeout": "1s"},
            "killed": {"shell": "exec sleep 600"},
        },
        admin=admin,
    )
    try:
        ids = {}
        for number, name in enumerate(("hangs", "slow", "killed", "ok"), 1):
            ids[name], reply = admin.trigger(daemon.url, name, jobId=number)
            assert reply["code"] == 200
        assert result_of(admin, ids["ok"])["handleMsg"] == "hi"
        # What hangs is a thread, and not a child with copies of what other starts wait to see closed.
        children = functools.partial(children_of, daemon.process.pid, "RSD")
        wait_until(
            lambda: (
                {os.readlink(f"/proc/{pid}/exe").rpartition("/")[2] for pid in children()}
                == {"sleep"}
            ),
            5,
            "both starts",
        )
        assert result_of(admin, ids["slow"])["handleMsg"] == "timed out after 1 s"
        assert admin.call(daemon.url, "/kill", {"jobId": 3})["code"] == 200
        assert result_of(admin, ids["killed"])["handleMsg"] == "killed by the admin"
        assert ids["hangs"] not in admin.results
    finally:
        end()
    found = result_of(admin, ids["hangs"])
    assert found["handleCode"] == 500 and found["handleMsg"].startswith("cannot start")
    assert daemon.stop() == 0


def test_scripts_on_a_disk_that_does_not_answer_hold_up_no_other_job(executor, admin, hung):
    directory, end = hung
    daemon = executor(
        {"listed": {"shell": "echo listed"}},
        admin=admin,
        scripts={"directories": [directory]},
    )
    try:
        for number in range(2):
            _, reply = admin.trigger(daemon.url, "report.sh", jobId=10 + number)
            assert reply["code"] == 500 and "within 2.5 s" in reply["msg"]
        assert run_job(daemon, admin, "listed")[1]["handleMsg"] == "listed"
        assert daemon.status()["recent"] == {"listed": [200]}
    finally:
        end()
    assert daemon.stop() == 0
