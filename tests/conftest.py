"""What all tests share: the daemon as a subprocess, the product's own loopback admin, and a watch
over what is left behind."""

import contextlib
import json
import os
import py_compile
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "xxl_executor.py"
LAUNCH = ROOT / "tests" / "launch.py"
sys.path.insert(0, str(ROOT))

from admin import Admin  # noqa: E402

import xxl_executor  # noqa: E402

# In the background of a script it is ignored, and what a process ignores its children ignore too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where PYTHONDONTWRITEBYTECODE is set, as in many images, every daemon and every server of Python
# jobs would compile it once more.
with contextlib.suppress(OSError):
    py_compile.compile(str(PROGRAM))


def wait_until(predicate, seconds=10.0, what="the condition"):
    """The first true value of `predicate`; fails after `seconds`."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            pytest.fail(f"{what} did not come within {seconds} s")
        pause.wait(0.01)


def children_of(pid, states):
    """The children of `pid` that are in one of `states`."""
    found = {
        int(name): xxl_executor.process_stat(int(name))
        for name in os.listdir("/proc")
        if name.isdigit()
    }
    return [
        child
        for child, fields in found.items()
        if fields is not None and fields.parent == pid and fields.state in states
    ]


def alive(pid):
    """Whether process `pid` runs; a zombie does not."""
    found = xxl_executor.process_stat(pid)
    return found is not None and found[0] not in "ZX"


def environment_of(pid):
    """What the kernel shows as the environment of process `pid`; nothing when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def run_processes(daemon):
    """{pid: environment} of what is alive of the runs of this data directory; its Python servers,
    and who waits there for the next run, are not of a run."""
    server = b"=%s-%s" % (daemon.identity.encode(), b"server".rjust(20, b"0"))
    found = {pid: environment_of(pid) for pid in daemon.family()}
    return {pid: shown for pid, shown in found.items() if shown and server not in shown}


def command_line(*arguments, flags=()):
    """The words that run the program as a module: 0.1 s of CPU instead of 0.3, some hundreds of
    times. Not for what depends on how it is started, or on sys.path, which then begins with the
    current directory."""
    interpreter, *words = xxl_executor.run_as_module(sys.executable, *arguments)
    return [interpreter, *flags, *words]


def launch(**constants):
    """Environment for program=LAUNCH: the daemon with other values of constants of its module."""
    return {"LAUNCH_CONSTANTS": json.dumps(constants)}


class Executor:
    """The daemon under test: `python xxl_executor.py -c FILE run` on a free port, its stderr in a
    file.

    Only with program=PROGRAM by these very words, without a program by those of `command_line`.
    """

    def __init__(
        self,
        directory,
        config,
        *,
        env=None,
        arguments=("run",),
        flags=("-W", "error", "-X", "dev"),
        prefix=(),
        program=None,
    ):
        """`prefix`: a command that executes the interpreter, such as setpriv or unshare; `program`:
        a file that runs ours."""
        self.directory, self.flags, self.arguments, self.prefix, self.program = (
            directory,
            flags,
            arguments,
            prefix,
            program,
        )
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        self.file = directory / "config.yaml"
        self.data = directory / "data"
        self.stderr = directory / "stderr.txt"
        self.process = None
        self.pass_fds = ()
        self.session = requests.Session()
        self.session.trust_env = False
        self.write(config)

    def write(self, config):
        self.file.write_text(
            yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )

    def start(self, *, wait=True):
        self.errors = self.stderr.open("ab")
        self.lock_before = self.lock
        arguments = ["-c", str(self.file), *self.arguments]
        command = (
            [sys.executable, *self.flags, str(self.program), *arguments]
            if self.program
            else command_line(*arguments, flags=self.flags)
        )
        self.process = subprocess.Popen(
            [*self.prefix, *command],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
            cwd=self.directory,
            start_new_session=True,
            pass_fds=self.pass_fds,
        )
        self.errors.close()
        if wait:
            wait_until(
                lambda: self.url or self.process.poll() is not None, 20, "the start of the daemon"
            )
            assert self.process.poll() is None, f"{self.process.returncode}: {self.log}"
        return self

    @property
    def url(self):
        """Where the daemon listens, without a slash at the end; "" before it does."""
        with contextlib.suppress(ValueError, IndexError):
            _, pid, url, *_ = self.lock.splitlines()[0].split()
            # In a PID namespace it is not the pid that we know.
            if self.process is not None and (
                self.lock != self.lock_before if self.prefix else int(pid) == self.process.pid
            ):
                return url.rstrip("/") if url != "-" else ""
        return ""

    @property
    def lock(self):
        with contextlib.suppress(OSError):
            return (self.data / "lock").read_text()
        return ""

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    @property
    def identity(self):
        """The beginning of the marker of every process of this daemon."""
        return self.lock.split()[0]

    @property
    def log(self):
        return self.stderr.read_text(encoding="utf-8", errors="replace")

    def post(self, path, body=None, **headers):
        """The envelope of a POST; `body` is JSON, or bytes as they are."""
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        reply = self.session.post(self.url + path, data=data, headers=headers, timeout=20)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def get(self, path, **headers):
        return self.session.get(self.url + path, headers=headers, timeout=20).json()

    def status(self, **headers):
        return self.session.get(self.url + "/status", headers=headers, timeout=20).json()

    def page(self, log_id, date, first=1):
        """A log page, as the admin asks for it."""
        return self.post("/log", {"logId": log_id, "logDateTim": date, "fromLineNum": first})[
            "content"
        ]

    def log_text(self, log_id):
        """The whole log file of a run."""
        return next((self.data / "logs").glob(f"*/{log_id}.log")).read_text(
            encoding="utf-8", errors="replace"
        )

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self, seconds=30):
        """SIGTERM, wait; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds=30):
        return self.process.wait(seconds)

    def kill(self):
        """SIGKILL, as a crash or the OOM killer does."""
        self.process.kill()
        self.process.wait(10)

    def family(self):
        """What is alive of this daemon's jobs and servers."""
        return xxl_executor.family(self.identity)

    def close(self):
        self.session.close()
        if self.process is not None and self.process.poll() is None:
            self.stop()


@pytest.fixture
def executor(tmp_path, request):
    """A factory: executor(jobs={...}, admin=Admin or None, executor={...},
    admin_options={...}, env={...}, start=True, prefix=[...], program=file). A module of tests may
    say with which program, see Executor.

    Every daemon it made is stopped at the end; then none of its processes may live, and it may have
    warned of no resource.
    """
    made = []

    def make(
        jobs=None,
        *,
        admin=None,
        executor=None,
        admin_options=None,
        env=None,
        start=True,
        directory=None,
        prefix=(),
        program=None,
        **others,
    ):
        place = directory or tmp_path / (f"executor{len(made)}" if made else "executor")
        place.mkdir(exist_ok=True)
        config = {
            "admin": {
                "addresses": [admin.url] if admin else [],
                "access_token": admin.token if admin else "",
                **(admin_options or {}),
            },
            "executor": {
                "bind": "127.0.0.1:0",
                "data_dir": "./data",
                "drain_timeout": "5s",
                **(executor or {}),
            },
            "jobs": jobs or {},
            **others,
        }
        chosen = program or getattr(request.module, "program", None)
        made.append(Executor(place, config, env=env, prefix=prefix, program=chosen))
        return made[-1].start() if start else made[-1]

    yield make
    for daemon in made:
        daemon.close()
    for daemon in made:
        if (daemon.data / "lock").exists():
            wait_until(lambda: not daemon.family(), 5, f"the end of every process of {daemon.file}")
        if daemon.stderr.exists():
            assert not re.search(r"ResourceWarning|Traceback|unexpected error", daemon.log), (
                daemon.log
            )


@pytest.fixture
def loopback():
    """A factory of loopback admins: loopback(version="3.5", token="")."""
    with contextlib.ExitStack() as stack:

        def make(version="3.5", token="", port=0):
            admin = Admin(version, token, port)
            stack.callback(admin.close)
            return admin

        yield make


@pytest.fixture
def admin(loopback):
    """One loopback admin that speaks 3.5."""
    return loopback()


@pytest.fixture
def port():
    """A port that refuses connections and that nobody else is given; an Admin can take it
    over."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def result_of(admin, log_id, seconds=15):
    """The one result that the admin has of `log_id`; waits for it."""
    assert admin.wait(lambda: log_id in admin.results, seconds), (
        f"no result of {log_id} within {seconds} s"
    )
    return admin.results[log_id][0]


def run_job(daemon, admin, handler, seconds=15, **fields):
    """Trigger, expect acceptance, and return (logId, result)."""
    log_id, reply = admin.trigger(daemon.url, handler, **fields)
    assert reply["code"] == 200, reply
    return log_id, result_of(admin, log_id, seconds)


@pytest.fixture(autouse=True)
def nothing_left():
    """No test may leave a thread, a child process or a descriptor behind."""

    def children():
        found = set()
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                found |= set(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
        return {pid for pid in found if alive(pid)}

    def descriptors():
        found = {}
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        return {fd: target for fd, target in found.items() if not target.startswith("/proc/")}

    threads, before, fds = set(threading.enumerate()), children(), descriptors()
    yield
    wait_until(lambda: set(threading.enumerate()) <= threads, 5, "the end of the test's threads")
    wait_until(lambda: children() <= before, 5, "the end of the test's children")
    wait_until(
        lambda: descriptors().keys() <= fds.keys(),
        5,
        f"the closing of {descriptors().items() - fds.items()}, of {threading.enumerate()}",
    )
