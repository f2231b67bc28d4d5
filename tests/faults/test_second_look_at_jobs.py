"""Job processes and logs, looked at a second time: finalizers that write, first threads that end,
Python servers that are slow, children that become root, time zones, and loggers and directories
that somebody takes away."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, alive, children_of, launch, result_of, run_job, wait_until
from tools import need_root, stderr_lines

JOBS = """
import gc, logging, logging.config, os, sys, time, types

class Own:
    def __init__(self):
        self.itself = self  # a cycle: the collector comes for it, wherever it is

    def __del__(self):
        sys.stdout.write("not closed\\n")

def finalizers(context):
    before = gc.get_threshold()
    try:
        for number in range(3000):
            gc.set_threshold(2 + number % 50, 1000, 1000)  # it comes now here, now there
            Own()
            sys.stdout.write(f"line {number}\\n")
    finally:
        gc.set_threshold(*before)
    return "done"

def zone():
    return time.strftime("%H:%M %Z", time.localtime(0))

def configures():
    logging.config.dictConfig({"version": 1, "root": {"level": "INFO"}})

def forces():
    logging.basicConfig(level=logging.INFO, force=True)

def disables():
    logging.disable(logging.CRITICAL)

class Talker:
    def __init__(self):
        self.itself, self.logger = self, logging.getLogger("talker")

    def __del__(self):
        self.logger.warning("x" * 200_000)

def leaves():
    left = sys.modules["left"] = types.ModuleType("left")
    left.talker = Talker()  # until the interpreter ends

def waits(context):
    while not os.path.exists(context.param):
        time.sleep(0.01)
    return "done"

def lines():
    sys.stdout.writelines(["one\\n", "two\\n"])

def notes():
    error = ValueError("the amount is negative")
    error.add_note("row 7 of orders.csv")
    raise error
"""


@pytest.fixture
def job(tmp_path):
    """A factory: job(function of JOBS, option=...), as a Python job of a configuration."""
    (tmp_path / "mine.py").write_text(JOBS)
    return lambda name, **options: {
        "python": f"mine:{name}",
        "pythonpath": [str(tmp_path)],
        **options,
    }


# -- logs


def test_a_finalizer_that_prints(executor, admin, job):
    """In the middle of a line of its thread job, a finalizer may print one more: the log does not
    wait for itself, and neither do the runs beside it."""
    daemon = executor(
        {"finalizers": job("finalizers", isolation="thread"), "shell": {"shell": "echo ok"}},
        admin=admin,
        executor={"log_to_stdout": True},
    )
    log_id, reply = admin.trigger(daemon.url, "finalizers")
    assert reply["code"] == 200
    assert run_job(daemon, admin, "shell")[1]["handleMsg"] == "ok"
    assert result_of(admin, log_id)["handleMsg"] == "done"
    wait_until(lambda: "line 2999\n" in daemon.log_text(log_id), what="the last line")
    assert "not closed\n" in daemon.log_text(log_id)


@pytest.mark.parametrize("name", ["configures", "forces", "disables"])
def test_a_job_that_sets_up_logging(executor, admin, job, name):
    """What a thread job does to the loggers of its process, as django.setup() does, does not
    silence the executor."""
    daemon = executor(
        {"job": job(name, isolation="thread"), "shell": {"shell": "echo ok"}}, admin=admin
    )
    assert run_job(daemon, admin, "job")[1]["handleCode"] == 200
    log_id, _ = run_job(daemon, admin, "shell")
    [line] = wait_until(lambda: stderr_lines(daemon, f"finished.*logId={log_id}"), what="its line")
    assert line.startswith("20"), "not with the executor's own format"


def test_the_directory_of_the_logs_is_removed(executor, admin):
    """Somebody frees the disk while the executor runs: the next run has a log."""
    daemon = executor({"job": {"shell": "echo ok"}}, admin=admin)
    run_job(daemon, admin, "job")
    shutil.rmtree(daemon.data / "logs")
    log_id, result = run_job(daemon, admin, "job")
    assert result["handleMsg"] == "ok"
    assert "ok\n" in daemon.page(log_id, result["logDateTim"])["logContent"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs add_note")
def test_an_exception_with_a_note(executor, admin, job):
    """The result is its type and its text; a note may be anything and stands in the log."""
    daemon = executor({"job": job("notes")}, admin=admin)
    log_id, result = run_job(daemon, admin, "job")
    assert result["handleMsg"] == "ValueError: the amount is negative"
    assert "row 7 of orders.csv" in daemon.log_text(log_id)


def test_lines_of_a_thread_job(executor, admin, job):
    """sys.stdout.writelines, too, goes to the log of its run."""
    daemon = executor({"job": job("lines", isolation="thread")}, admin=admin)
    log_id, _ = run_job(daemon, admin, "job")
    assert "one\ntwo\n" in daemon.log_text(log_id)
    assert "two" not in daemon.log.splitlines()


def test_the_limit_of_a_log_within_a_character(executor, admin):
    """executor.log_limit ends the log before the character that it would cut."""
    daemon = executor(
        {"job": {"shell": 'printf %s "$XXL_JOB_PARAM"'}},
        admin=admin,
        executor={"log_limit": "1KiB"},
    )
    for start in ("", "x", "xx"):
        text = start + "\u20ac" * 700
        log_id, _ = run_job(daemon, admin, "job", executorParams=text)
        data = next((daemon.data / "logs").glob(f"*/{log_id}.log")).read_bytes()
        assert "\u20ac\n----- output beyond executor.log_limit" in data.decode("utf-8")


# -- processes

HEADLESS = """
import ctypes, threading
threading.Thread(target=threading.Event().wait, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_has_ended(executor, admin):
    """The kernel shows it as a zombie, while its other threads go on: it is ended by its
    timeout."""
    daemon = executor(
        {
            "job": {
                "command": [sys.executable, "-c", HEADLESS],
                "timeout": "1s",
                "kill_grace": "0.5s",
            }
        },
        admin=admin,
    )
    log_id, reply = admin.trigger(daemon.url, "job")
    assert reply["code"] == 200
    [main] = wait_until(lambda: children_of(daemon.process.pid, "Z"), what="the end of its thread")
    try:
        result = result_of(admin, log_id)
        assert (result["handleCode"], result["handleMsg"]) == (502, "timed out after 1 s")
        assert not children_of(daemon.process.pid, "Z")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(main, signal.SIGKILL)


def test_the_time_zone_of_a_python_job(executor, admin, job):
    """env TZ holds from its first moment, although the Python server has another."""
    daemon = executor(
        {"there": job("zone", env={"TZ": "XYZ-9"}), "here": job("zone")},
        admin=admin,
        env={"TZ": "UTC"},
    )
    for name, zone in (("there", "09:00 XYZ"), ("here", "00:00 UTC")):
        assert run_job(daemon, admin, name)[1]["handleMsg"] == zone


@contextlib.contextmanager
def stopped(pid):
    """Inside, the process does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def python_server(daemon):
    """The pid of the Python server, while no job runs."""
    return wait_until(lambda: children_of(daemon.process.pid, "S"), what="the server")[0]


def test_a_python_server_that_was_stopped(executor, admin, job, tmp_path):
    """While a Python server is stopped, one run fails for its silence and another one ends unheard.
    Once the server goes on, it tells of that end, and the children that it still has live on."""
    limit, first, second = 2.0, tmp_path / "first", tmp_path / "second"
    daemon = executor(
        {"job": job("waits")}, admin=admin, program=LAUNCH, env=launch(SERVER_LIMIT=limit)
    )
    run_job(daemon, admin, "job", executorParams=str(tmp_path))
    server = python_server(daemon)
    ids = [
        admin.trigger(daemon.url, "job", jobId=10 + number, executorParams=str(path))[0]
        for number, path in enumerate((first, second))
    ]
    wait_until(
        lambda: all(stderr_lines(daemon, f"started job logId={n}") for n in ids), what="starts"
    )
    with stopped(server):
        _, silent = run_job(daemon, admin, "job", jobId=12)
        since = time.monotonic()
        assert "the Python server does not answer" in silent["handleMsg"]
        first.touch()
        wait_until(lambda: children_of(server, "Z"), what="the end of the first")
        # after the look at its children, before the next
        wait_until(lambda: time.monotonic() > since + 1.5 * limit, 2 * limit)
    assert result_of(admin, ids[0])["handleMsg"] == "done"
    assert ids[1] not in admin.results
    second.touch()
    assert result_of(admin, ids[1])["handleMsg"] == "done"


SLOW = """
import os, time
os.register_at_fork(before=lambda: time.sleep(0.15))
"""


def test_a_python_server_that_is_slow_but_answers(executor, admin, job, tmp_path):
    """It has more to do than it can within SERVER_LIMIT, and gets through: no run fails."""
    (tmp_path / "slow.py").write_text(SLOW)
    daemon = executor(
        {"job": job("waits", preload=["slow"])},
        admin=admin,
        executor={"max_running": 20},
        program=LAUNCH,
        env=launch(SERVER_LIMIT=1.5),
    )
    run_job(daemon, admin, "job", executorParams=str(tmp_path))
    fields = {"executorParams": str(tmp_path)}
    ids = [admin.trigger(daemon.url, "job", jobId=10 + n, **fields)[0] for n in range(20)]
    for log_id in ids:
        assert result_of(admin, log_id, 30)["handleMsg"] == "done"


def test_a_finalizer_at_the_very_end(executor, admin, job, tmp_path):
    """What a thread job left logs more than a slow reader of stderr has taken, when the interpreter
    has no threads any more: the executor exits."""
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        daemon = executor(
            {"job": job("leaves", isolation="thread")},
            admin=admin,
            prefix=["sh", "-c", f'exec "$0" "$@" 2> {tmp_path}/fifo'],
        )
        assert run_job(daemon, admin, "job")[1]["handleCode"] == 200
        daemon.signal(signal.SIGTERM)
        try:
            assert daemon.wait(15) == 0
        finally:
            if daemon.process.poll() is None:
                daemon.kill()
        assert b"xxxx" in os.read(fifo, 1 << 16)
    finally:
        os.close(fifo)


# -- a child that became root

NOBODY = 65534


class Elevating:
    """A directory of another user than root, and a program with the setuid bit by which that user
    becomes root, as by sudo. What it starts is ended at the end."""

    def __init__(self, directory):
        need_root()
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv")
        ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        self.directory, self.prefix = directory / "executor", ["setpriv", *ids]
        directory.chmod(0o755)
        self.directory.mkdir()
        os.chown(self.directory, NOBODY, NOBODY)
        program = directory / "become-root"
        shutil.copy(shutil.which("setpriv"), program)
        program.chmod(0o4755)
        self.words = [str(program), "--reuid=0", "--regid=0", "--clear-groups"]
        tried = subprocess.run(
            [*self.prefix, *self.words, "id", "-u"], capture_output=True, text=True
        )
        if tried.stdout != "0\n":
            pytest.skip(f"needs a directory with setuid programs: {tried.stderr.strip()[-200:]}")
        code = "import requests, sqlite3, yaml"
        tried = subprocess.run([*self.prefix, sys.executable, "-c", code], capture_output=True)
        if tried.returncode:
            pytest.skip("needs an interpreter that every user can run")
        # A link of its own is seen in the command line of each process that became root.
        self.sleep = directory / "sleeps-as-root"
        self.sleep.symlink_to(shutil.which("sleep"))
        self.words += [str(self.sleep), "300"]
        self.shell = " ".join(self.words)

    def processes(self, first_word=True):
        """Those that became root and live, or all that name the link."""
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                at = line.find(os.fsencode(self.sleep))
                if (at == 0 or at > 0 and not first_word) and alive(pid):
                    found.append(pid)
        return found

    def wait(self, count):
        wait_until(lambda: len(self.processes()) == count, what="the processes that became root")

    def end(self):
        for pid in self.processes(first_word=False):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def elevating():
    with tempfile.TemporaryDirectory(prefix="xxl-executor-test-") as directory:
        made = Elevating(Path(directory))
        try:
            yield made
        finally:
            made.end()


@pytest.fixture
def start(elevating, executor, admin):
    """A factory: start(jobs), the executor of that user."""

    def make(jobs):
        return executor(
            jobs,
            admin=admin,
            directory=elevating.directory,
            prefix=elevating.prefix,
            program=LAUNCH,
            env={"HOME": "/", **launch(KILL_LIMIT=2.0)},
        )

    yield make
    elevating.end()  # before the executor is stopped


def descriptors(daemon):
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def test_a_child_that_became_root(start, admin, elevating):
    """It cannot be signalled. Its run gets the result of its timeout nevertheless, the rest of its
    tree is ended, no descriptor is lost, and the next run is none the worse."""
    daemon = start(
        {
            "root": {
                "shell": f"sleep 300 & {elevating.shell}",
                "timeout": "1s",
                "kill_grace": "0.5s",
            },
            "shell": {"shell": "echo ok"},
        }
    )
    run_job(daemon, admin, "shell")
    before = descriptors(daemon)
    log_id, reply = admin.trigger(daemon.url, "root")
    assert reply["code"] == 200
    elevating.wait(1)
    result = result_of(admin, log_id)
    assert (result["handleCode"], result["handleMsg"]) == (502, "timed out after 1 s")
    assert set(daemon.family()) == set(elevating.processes())
    assert run_job(daemon, admin, "shell")[1]["handleMsg"] == "ok"
    wait_until(lambda: descriptors(daemon) <= before, what="descriptors as before")


def test_a_start_beside_a_child_that_became_root(start, admin, elevating):
    """What a killed executor left and cannot be signalled does not keep the next from its start:
    it is told."""
    daemon = start({"root": {"shell": elevating.shell}, "shell": {"shell": "echo ok"}})
    assert admin.trigger(daemon.url, "root")[1]["code"] == 200
    elevating.wait(1)
    daemon.kill()
    daemon.start()
    [left] = elevating.processes()
    assert stderr_lines(daemon, rf"processes \[{left}\] cannot be ended")
    assert run_job(daemon, admin, "shell")[1]["handleMsg"] == "ok"
