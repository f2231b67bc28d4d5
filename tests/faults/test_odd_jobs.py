"""Jobs that misbehave: trees that keep forking, floods of output, odd results, Python jobs that
break Python."""

import contextlib
import os
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, alive, environment_of, wait_until
from tools import Ledger, forget_peak, need_root, rounds, rss, stderr_lines

import xxl_executor

MIB = 1 << 20


@pytest.fixture
def ledger(admin, tmp_path):
    return Ledger(admin, tmp_path)


def run(ledger, daemon, handler="job", seconds=60, **fields):
    """Trigger, expect acceptance; returns (logId, (code, message))."""
    log_id = ledger.trigger(daemon, handler, **fields)
    assert log_id in ledger.accepted, ledger.refused
    return log_id, ledger.result(log_id, seconds)


def is_running(daemon, log_id):
    running = lambda: any(run["logId"] == log_id for run in daemon.status()["running"])  # noqa: E731
    return wait_until(running, 20, "the start of the run")


class Fifo:
    """A FIFO between the test and a job. A reader sees its end when the last process that holds it
    has gone: the kernel tells, while a look at /proc is too slow for processes that live for
    milliseconds."""

    def __init__(self, path):
        self.path = path
        os.mkfifo(path)
        self.fd, self.got = -1, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def listen(self):
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self.poller = select.poll()
        self.poller.register(self.fd, select.POLLIN)

    def at_end(self, seconds=0.01):
        """Take what has come in, and tell whether all writers have gone (one must have come
        before)."""
        if self.poller.poll(seconds * 1000):
            data = os.read(self.fd, 1 << 16)
            self.got += len(data)
            return not data
        return False

    def connect(self):
        """Open for writing when the job reads; such a job waits with `read x <FIFO` or `cat
        FIFO`."""

        def opened():
            with contextlib.suppress(OSError):  # ENXIO: the job is not here yet
                self.fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            return self.fd >= 0

        wait_until(opened, 20, f"the job at {self.path}")
        os.set_blocking(self.fd, True)
        return self.fd

    def release(self):
        os.write(self.connect(), b"\n")
        self.__exit__()


# -- a tree that keeps forking

CHAINS = """
import os, signal, sys, time
fifo, stop, gate, count = sys.argv[1:4] + [int(sys.argv[4])]
fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end = time.monotonic() + 60
def chain():
    while time.monotonic() < end and not os.path.exists(stop):
        os.setsid()
        try:
            os.write(fd, b"x")
        except BlockingIOError:
            pass
        time.sleep(0.05)
        if os.fork():
            break
    os._exit(0)
for _ in range(count):
    if os.fork() == 0:
        chain()
while time.monotonic() < end and not os.path.exists(stop) and not os.path.exists(gate):
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", ["timeout", "kill", "cover", "end"])
def test_a_tree_that_keeps_forking(executor, admin, ledger, tmp_path, how):
    """200 chains of processes that fork a successor and exit, each in a session of its own and deaf
    to SIGTERM, are gone soon after the grace: nobody outruns the search."""
    count, grace, timeout = 200, 1, 6
    (tmp_path / "chains.py").write_text(CHAINS)
    stop, gate = tmp_path / "stop", tmp_path / "gate"
    with Fifo(tmp_path / "fifo") as fifo:
        daemon = executor(
            {
                "job": ledger.job(
                    f"exec '{sys.executable}' -I -S chains.py fifo {stop} {gate} {count}",
                    cwd=str(tmp_path),
                    kill_grace=f"{grace}s",
                    timeout=f"{timeout}s" if how == "timeout" else 0,
                ),
                "next": {"shell": "echo next"},
            },
            admin=admin,
        )
        fifo.listen()
        try:
            log_id = ledger.trigger(daemon)
            assert log_id in ledger.accepted
            wait_until(lambda: not fifo.at_end() and fifo.got > 3 * count, 20, "the chains")
            cover, since = 0, time.time()
            if how == "timeout":
                since = ledger.starts.stat().st_mtime + timeout
            elif how == "kill":
                assert admin.call(daemon.url, "/kill", {"jobId": 1})["code"] == 200
            elif how == "cover":
                cover = ledger.trigger(daemon, "next", executorBlockStrategy="COVER_EARLY")
            else:
                gate.touch()
            before = fifo.got
            wait_until(fifo.at_end, 20, "the end of every process")
            took = time.time() - since
            assert fifo.got > before, "they went on forking"
            assert (
                ledger.result(log_id)
                == {
                    "timeout": (502, f"timed out after {timeout} s"),
                    "kill": (500, "killed by the admin"),
                    "cover": (500, f"covered by run {cover}"),
                    "end": (200, ""),
                }[how]
            )
            assert took < grace + xxl_executor.KILL_LIMIT, (
                f"the last process was there {took:.2f} s after the run was to end"
            )
            if cover:
                assert ledger.result(cover) == (200, "next")
            ledger.settle(daemon)
        finally:
            stop.touch()
            wait_until(fifo.at_end, 30, "the chains' own end")


# -- output


def test_a_gigabyte_of_output(executor, admin, ledger):
    """Output beyond log_limit costs neither disk nor memory; the run succeeds and its log says how
    it was cut."""
    size, limit = rounds(1 << 30, "XXL_FAULT_OUTPUT"), 8 * MIB
    daemon = executor(
        {"job": ledger.job(f"yes | head -c {size}; echo the end")},
        admin=admin,
        executor={"log_limit": "8MiB"},
    )
    forget_peak(daemon.process.pid)
    before = rss(daemon.process.pid)
    log_id, result = run(ledger, daemon, seconds=120)
    grown = rss(daemon.process.pid, "VmHWM") - before
    assert result == (200, "the end")
    assert grown < 16 * MIB, f"the daemon grew by {grown / MIB:.1f} MiB"
    files = [file.stat() for file in (daemon.data / "logs").glob("*/*")]
    assert len(files) == 1 and limit <= files[0].st_size < limit + 1024
    lines = daemon.log_text(log_id).splitlines()
    assert lines[-2] == f"----- output beyond executor.log_limit ({limit} bytes) is dropped -----"
    assert re.fullmatch(r"----- .* succeeded after .* s: code 200, the end -----", lines[-1])
    metrics = daemon.session.get(daemon.url + "/metrics", timeout=20).text
    assert (
        f"\nxxl_executor_log_dropped_bytes_total {size + len('the end') + 1 - limit}\n" in metrics
    )
    ledger.settle(daemon)


def test_one_line_of_100_megabytes(executor, admin, ledger, tmp_path):
    """A line far beyond a page is stored whole, shown cut, and costs bounded memory while it is
    read."""
    size, date = 100_000_000, int(time.time() * 1000)
    with Fifo(tmp_path / "gate") as gate:
        script = f"head -c {size} /dev/zero | tr '\\0' x; read go <{gate.path}; echo; echo the end"
        daemon = executor(
            {"job": ledger.job(script)}, admin=admin, executor={"log_limit": "128MiB"}
        )
        forget_peak(daemon.process.pid)
        before = rss(daemon.process.pid)
        log_id = ledger.trigger(daemon, logDateTime=date)
        is_running(daemon, log_id)
        file = wait_until(lambda: next((daemon.data / "logs").glob(f"*/{log_id}.log"), None))

        def head_only():  # the line has not ended: nothing of it is shown yet
            page = daemon.page(log_id, date, 2)
            assert page == {"fromLineNum": 2, "toLineNum": 1, "logContent": "", "isEnd": False}
            return file.stat().st_size > size

        wait_until(head_only, 60, "the whole line")
        running = rss(daemon.process.pid, "VmHWM") - before
        gate.release()
        assert ledger.result(log_id) == (200, "the end")
    shown = "x" * (4 * MIB) + f" ... [line of {size + 1} bytes, cut]\n"
    for _ in range(rounds(3)):
        assert daemon.page(log_id, date, 2) == {
            "fromLineNum": 2,
            "toLineNum": 2,
            "logContent": shown,
            "isEnd": False,
        }
        page = daemon.page(log_id, date)
        assert page["isEnd"] is True and len(page["logContent"]) < 4 * MIB + 1024
        left_out = re.search(
            r"\n----- (\d+) bytes are left out here; the whole log is (\S+) on", page["logContent"]
        )
        assert left_out[2] == str(file) and int(left_out[1]) > size - 4 * MIB
    grown = rss(daemon.process.pid, "VmHWM") - before
    assert grown < 48 * MIB, (
        f"the daemon grew by {running / MIB:.1f} MiB, with the pages by {grown / MIB:.1f} MiB"
    )
    assert file.stat().st_size == size + file.read_bytes().count(b"\n") + sum(
        len(line) for line in file.read_bytes().split(b"\n") if not line.startswith(b"x")
    )
    ledger.settle(daemon)


PIECES = [
    b"cut \xe4\xb8",
    b"\xad here\n",
    b"bad \xff\xfe \xc3(\n",
    b"nul \0\0\n",
    b"a\rb\r\n\r\n",
    b"\x85\xe2\x80",
    b"\xa8\x0b\x0c\x1c\n",
    b"surrogate \xed\xa0\x80 long \xf0\x9f",
    b"\x98",
    b"\x80\n",
    b"\n\n",
    b"half \xe4\xb8",
    b"\n",
    b"z" * 70_000,
    b"\xe4\xb8" * 40_000,
    b"\n",
    b"\xf0\x9f\x98\x80" * 300_000 + b"\n",
    b"q" * (3 * MIB) + b"\0\xff\n",
    b"no newline \xe4",
]


def text_of(data):
    """What the admin is to see of these bytes."""
    return data.decode("utf-8", "replace").replace("\0", "\ufffd")


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_bytes_that_are_no_text(executor, admin, ledger, tmp_path, large):
    """Whatever bytes come in whatever pieces, the pages join to exactly the file, while it grows
    and afterwards."""
    pieces, date = (
        PIECES if large else [piece for piece in PIECES if len(piece) < 10_000],
        int(time.time() * 1000),
    )
    with Fifo(tmp_path / "fifo") as fifo:
        daemon = executor({"job": ledger.job(f"exec cat {fifo.path}")}, admin=admin)
        log_id = ledger.trigger(daemon, logDateTime=date)
        fd = fifo.connect()
        file = wait_until(lambda: next((daemon.data / "logs").glob(f"*/{log_id}.log"), None))
        wait_until(lambda: file.read_bytes().endswith(b"-----\n"), 20, "the header")
        text, line, expected = "", 1, file.read_bytes()

        def follow():
            """Ask for the next page; the end of the run ends it."""
            nonlocal text, line
            page = daemon.page(log_id, date, line)
            assert (
                page["fromLineNum"] == line
                and page["logContent"].count("\n") == page["toLineNum"] - line + 1
            )
            text, line = text + page["logContent"], page["toLineNum"] + 1
            return page

        for piece in pieces:
            while piece:
                piece, expected = (
                    piece[os.write(fd, piece[: 1 << 16]) :],
                    expected + piece[: 1 << 16],
                )
            wait_until(lambda: file.stat().st_size == len(expected), 20, "the piece")
            while follow()["logContent"]:  # a page ends at a bound, too
                pass
            assert text == text_of(expected[: expected.rfind(b"\n") + 1]), "whole lines only"
        fifo.__exit__()
        assert ledger.result(log_id) == (200, text_of(pieces[-1]).strip())
        wait_until(lambda: follow()["isEnd"])
    content = file.read_bytes()
    assert content.startswith(expected + b"\n-----")
    assert text == text_of(content)
    # Afterwards from its second line, page by page, and from its first one at once.
    text, line = "", 2
    wait_until(lambda: follow()["isEnd"])
    assert text == text_of(content[content.index(b"\n") + 1 :])
    page = daemon.page(log_id, date)
    assert (page["toLineNum"], page["isEnd"]) == (content.count(b"\n"), True)
    if large:
        notice = re.search(
            r"\n----- (\d+) bytes are left out here; the whole log is (.*) on (.*) -----\n\n",
            page["logContent"],
        )
        head, tail = page["logContent"][: notice.start()], page["logContent"][notice.end() :]
        lines = [part + b"\n" for part in content.split(b"\n")[:-1]]
        first, last = lines[: head.count("\n")], lines[-tail.count("\n") :]
        assert (head, tail) == (text_of(b"".join(first)), text_of(b"".join(last))), "whole lines"
        assert notice.groups() == (
            str(len(content) - len(b"".join(first + last))),
            str(file),
            socket.gethostname(),
        )
    else:
        assert page["logContent"] == text_of(content)
    ledger.settle(daemon)


# -- shell jobs that turn against themselves


def test_closed_output(executor, admin, ledger, tmp_path):
    """A job that closes its output goes on, costs no CPU time meanwhile, and ends with its own
    result."""
    with Fifo(tmp_path / "gate") as gate:
        script = f'echo before; exec >&- 2>&-; read go <{gate.path}; exit "$1"'
        daemon = executor({"job": ledger.job(script)}, admin=admin)

        def reads():  # a count, which tells the same on a busy machine
            return int(
                re.search(r"syscr: (\d+)", Path(f"/proc/{daemon.process.pid}/io").read_text())[1]
            )

        wait_until(lambda: admin.registry)  # until then it reads the modules for that
        for status, expected in ((0, (200, "before")), (3, (500, "exit status 3: before"))):
            log_id = ledger.trigger(daemon, executorParams=str(status))
            fd = gate.connect()  # from here on its output is closed
            before, since = reads(), time.monotonic()
            wait_until(lambda: time.monotonic() > since + 0.5)
            assert reads() - before < 200, "it does not spin on the closed pipe"
            os.write(fd, b"\n")
            gate.__exit__()
            assert ledger.result(log_id) == expected
        ledger.settle(daemon)


def test_jobs_that_stop_or_kill_themselves(executor, admin, ledger):
    """A stopped job ends by its timeout or a kill, one that kills its process group by that
    signal."""
    short = {"kill_grace": "0.3s"}
    daemon = executor(
        {
            "timeout": ledger.job("kill -STOP $$", timeout="1s", **short),
            "killed": ledger.job("kill -STOP $$", **short),
            "deaf": ledger.job(
                'trap "" TERM; kill -STOP $$; while :; do sleep 0.05; done', **short
            ),
            "group": ledger.job("echo words; sleep 60 & kill -9 0; echo not reached", **short),
        },
        admin=admin,
    )
    ids = {
        name: ledger.trigger(daemon, name, jobId=number)
        for number, name in enumerate(("timeout", "killed", "deaf", "group"))
    }
    assert ledger.result(ids["timeout"]) == (502, "timed out after 1 s")
    assert ledger.result(ids["group"]) == (500, "killed by signal 9")
    for job_id, name in ((1, "killed"), (2, "deaf")):
        is_running(daemon, ids[name])
        session = [
            pid
            for pid in daemon.family()
            if f"XXL_JOB_LOG_ID={ids[name]}\0".encode() in environment_of(pid)
        ]
        wait_until(
            lambda: [xxl_executor.process_stat(pid)[0] for pid in session] == ["T"],
            10,
            "the stop of the job",
        )
        assert admin.call(daemon.url, "/kill", {"jobId": job_id})["code"] == 200
        assert ledger.result(ids[name]) == (500, "killed by the admin")
    ledger.settle(daemon)


def test_a_python_job_that_kills_its_server(executor, admin, ledger, tmp_path):
    """The runs of a Python server that a job kills fail with that reason, and the next ones have a
    new server."""
    daemon = executor(
        {
            "killer": ledger.python_job(
                tmp_path,
                "killer",
                "os.killpg(os.getpgid(os.getppid()), 9)\nthreading.Event().wait()",
            ),
            "sibling": ledger.python_job(tmp_path, "sibling", "threading.Event().wait()"),
            "fine": ledger.python_job(tmp_path, "fine", "return 'fine'"),
            "shell": ledger.job("echo fine"),
        },
        admin=admin,
    )
    for _number in range(rounds(2)):
        siblings = [ledger.trigger(daemon, "sibling", jobId=10 + i) for i in range(3)]
        wait_until(lambda: set(siblings) <= set(ledger.started()), 20, "the siblings")
        killer = ledger.trigger(daemon, "killer", jobId=1)
        for log_id in (killer, *siblings):
            assert ledger.result(log_id) == (
                500,
                "the Python server of this job ended unexpectedly",
            )
        for handler in ("fine", "fine", "shell"):
            assert run(ledger, daemon, handler, jobId=2)[1] == (200, "fine")
    ledger.settle(daemon)


FILE = '"$XXL_JOB_RESULT_FILE"'


def test_result_files(executor, admin, ledger, tmp_path):
    """A huge result file gives its tail and costs no memory; what is no file gives the output; a
    restart cleans up."""
    (tmp_path / "outside").write_text("not yours")
    daemon = executor({"job": ledger.job('eval "$1"', cwd=str(tmp_path))}, admin=admin)
    assert run(ledger, daemon, executorParams="echo warm")[1] == (200, "warm")
    forget_peak(daemon.process.pid)
    before = rss(daemon.process.pid)
    huge = f"{{ head -c 300000000 /dev/zero | tr '\\0' x; echo the end; }} > {FILE}"
    _, (code, message) = run(ledger, daemon, executorParams=huge)
    grown = rss(daemon.process.pid, "VmHWM") - before
    assert (code, message) == (200, "..." + "x" * (15_000 - 10) + "the end")
    assert grown < 16 * MIB, f"the daemon grew by {grown / MIB:.1f} MiB"
    fds = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
    for script in (
        f"mkdir {FILE}",
        f"mkdir {FILE}; touch {FILE}/inside",
        f"mkfifo {FILE}",
        f"ln -s /etc {FILE}",
        f"ln -s {tmp_path}/outside {FILE}",
        f"ln -s nowhere {FILE}",
    ):
        for status, expected in ((0, (200, "output")), (3, (500, "exit status 3: output"))):
            assert (
                run(ledger, daemon, executorParams=f"echo output; {script}; exit {status}")[1]
                == expected
            ), script
    wait_until(
        lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= fds,
        10,
        "the closing of descriptors",
    )
    assert (tmp_path / "outside").read_text() == "not yours"
    ledger.settle(daemon)
    # Also what a crash left is no hindrance.
    log_id = ledger.trigger(daemon, executorParams=f"mkdir {FILE}; echo > made; exec sleep 60")
    wait_until((tmp_path / "made").exists)
    daemon.kill()
    daemon.start()
    assert ledger.result(log_id) == (
        500,
        "executor restarted while the job ran, its outcome is unknown",
    )
    assert run(ledger, daemon, executorParams="echo fine")[1] == (200, "fine")
    ledger.settle(daemon)


def test_an_unreadable_result_file(executor, admin, ledger):
    """A result file that the daemon may not read is none: the message is the last line of the
    output."""
    need_root()
    without = "-dac_override,-dac_read_search"
    daemon = executor(
        {"job": ledger.job(f"echo output; echo hidden > {FILE}; chmod 0 {FILE}")},
        admin=admin,
        prefix=["setpriv", "--inh-caps", without, "--bounding-set", without],
    )
    assert run(ledger, daemon)[1] == (200, "output")
    ledger.settle(daemon)


def test_what_does_not_exist(executor, admin, ledger, tmp_path):
    """A directory, user, interpreter, program or module that does not exist is named in the result,
    with its key."""
    (tmp_path / "thing.py").write_text("def main():\n    return 'fine'\n")
    nowhere, python = (
        str(tmp_path / "nowhere"),
        {"python": "thing:main", "pythonpath": [str(tmp_path)]},
    )
    kinds = {"shell": {"shell": "true"}, "command": {"command": ["true"]}, "python": python}
    jobs = {
        f"{kind}_{key}": {**job, key: value}
        for kind, job in kinds.items()
        for key, value in (("cwd", nowhere), ("user", "no-such-user"))
    }
    jobs.update(
        python_interpreter={**python, "interpreter": "/nonexistent/python"},
        program={"command": ["/nonexistent/program"]},
        name={"command": ["no-such-program-anywhere"]},
        module={**python, "python": "no_such_module:main"},
        function={**python, "python": "thing:nosuch"},
        fine=python,
    )
    expected = {
        "python_interpreter": "cannot start /nonexistent/python: No such file or directory",
        "program": "cannot start /nonexistent/program: No such file or directory",
        "name": "cannot start no-such-program-anywhere: No such file or directory",
        "module": "ModuleNotFoundError: No module named 'no_such_module'",
        "function": "AttributeError: module 'thing' has no attribute 'nosuch'",
    }
    for kind in kinds:
        expected[f"{kind}_cwd"] = (
            f"cannot start: the directory {nowhere} does not exist (jobs.{kind}_cwd.cwd)"
        )
        expected[f"{kind}_user"] = (
            f"cannot start: there is no user no-such-user on this host (jobs.{kind}_user.user)"
        )
    daemon = executor(jobs, admin=admin)
    found = {handler: run(ledger, daemon, handler)[1] for handler in expected}
    assert found == {handler: (500, message) for handler, message in expected.items()}
    assert run(ledger, daemon, "fine")[1] == (200, "fine")
    ledger.settle(daemon)


# -- Python jobs that break their interpreter

PROCESS = {
    "sys.exit()": (200, "words"),
    "sys.exit(0)": (200, "words"),
    "sys.exit(3)": (500, "exit status 3: words"),
    "sys.exit('some text')": (500, "exit status 1: some text"),
    "os._exit(5)": (500, "exit status 5: words"),
    "os._exit(0)": (200, "words"),
    "raise KeyboardInterrupt": (500, "KeyboardInterrupt"),
    "raise SystemExit('some text')": (500, "exit status 1: some text"),
    "limit_memory()\nbytearray(1 << 32)": (500, "MemoryError"),
    "limit_memory()\nfound = []\nwhile True: found.append(bytearray(1 << 20))": (
        500,
        "MemoryError",
    ),
    "limit_memory()\nfound = []\nwhile True: found.append(bytes(100))": (500, "MemoryError"),
    "global found\nlimit_memory()\nfound = []\nwhile True: found.append(bytes(100))": (
        500,
        "MemoryError",
    ),
    "import ctypes\nctypes.string_at(0)": (500, "killed by signal 11"),
    "os.kill(os.getpid(), 11)": (500, "killed by signal 11"),
    "os.kill(os.getpid(), 9)": (500, "killed by signal 9"),
    "os.abort()": (500, "killed by signal 6"),
    # The child lives on in the background, is deaf, or says something else.
    "if os.fork() == 0:\n    threading.Event().wait()\nreturn 'parent'": (200, "parent"),
    "if os.fork() == 0:\n    os.setsid()\n    signal.signal(15, signal.SIG_IGN)\n    threading.Event().wait()\nreturn 'parent'": (
        200,
        "parent",
    ),
    "child = os.fork()\nif child:\n    os.waitpid(child, 0)\nreturn 'parent' if child else 'child'": (
        200,
        "parent",
    ),
    "child = os.fork()\nif child:\n    os.waitpid(child, 0)\n    return 'parent'\nraise ValueError('of the child')": (
        200,
        "parent",
    ),
    "child = os.fork()\nif child:\n    os.waitpid(child, 0)\n    print('of the parent')\n    return\nreturn 'child'": (
        200,
        "of the parent",
    ),
    "child = os.fork()\nif child:\n    os.waitpid(child, 0)\n    sys.exit(7)\nreturn 'child'": (
        500,
        "exit status 7: words",
    ),
    "child = os.fork()\nif child:\n    os.waitpid(child, 0)\n    raise ValueError('of the parent')\nreturn 'child'": (
        500,
        "ValueError: of the parent",
    ),
    # Both at a time, with reports that no pipe takes at once.
    "child = os.fork()\nreturn ('\u6f22' if child else 'c') * 14_000": (200, "\u6f22" * 14_000),
    # Without descriptors nothing can be told but the status.
    "os.closerange(0, 65536)\nreturn 'lost'": (200, "words"),
    "os.closerange(0, 65536)\nos._exit(4)": (500, "exit status 4: words"),
    "os.closerange(0, 65536)\nos.fork()\nthreading.Event().wait(0.01)": (200, "words"),
    "os.closerange(3, 65536)\nfds = [os.open(notes, os.O_CREAT | os.O_APPEND | os.O_WRONLY) for _ in range(30)]\nreturn 'lost'": (
        200,
        "words",
    ),
    "os.execvp('sh', ['sh', '-c', 'echo replaced'])": (200, "replaced"),
    "os.execvp('sh', ['sh', '-c', 'echo replaced; exit 6'])": (500, "exit status 6: replaced"),
    "os.execvp('no-such-program', ['x'])": (
        500,
        "FileNotFoundError: [Errno 2] No such file or directory",
    ),
}
BODY = """
import resource
notes = os.environ.get("NOTES", "")
def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))
print("words", flush=True)
body = "def job():\\n" + "".join(f"    {line}\\n" for line in context.param.splitlines())
names = {**globals(), **locals()}
exec(body, names)
return names["job"]()
"""


def test_ends_of_a_python_process(executor, admin, ledger, tmp_path):
    """However a Python job ends, its result is clear and its own, nothing of it is left, and the
    next run works."""
    notes = tmp_path / "notes"
    daemon = executor(
        {
            "job": ledger.python_job(
                tmp_path, "odd", BODY, kill_grace="0.3s", env={"NOTES": str(notes)}
            ),
            "fine": ledger.python_job(tmp_path, "fine", "return 'fine'"),
        },
        admin=admin,
    )
    ids = {
        body: ledger.trigger(daemon, jobId=number, executorParams=body)
        for number, body in enumerate(PROCESS, 2)
    }
    assert {body: ledger.result(log_id, 60) for body, log_id in ids.items()} == PROCESS
    assert notes.read_bytes() == b"", "no report goes into a file of the job"
    assert run(ledger, daemon, "fine")[1] == (200, "fine")
    ledger.settle(daemon)


THREAD = {
    "sys.exit()": (200, "words"),
    "sys.exit(0)": (200, "words"),
    "sys.exit(3)": (500, "SystemExit: 3"),
    "sys.exit('some text')": (500, "SystemExit: some text"),
    "raise SystemExit('some text')": (500, "SystemExit: some text"),
    "raise KeyboardInterrupt": (500, "KeyboardInterrupt"),
    "raise MemoryError": (500, "MemoryError"),
    "raise MemoryError('too much')": (500, "MemoryError: too much"),
    "raise GeneratorExit": (500, "GeneratorExit"),
    "def deeper():\n    return deeper()\nreturn deeper()": (
        500,
        "RecursionError: maximum recursion depth exceeded",
    ),
}


def test_ends_of_a_thread(executor, admin, ledger, tmp_path):
    """However a job in a thread ends, its result is clear and the daemon goes on."""
    daemon = executor(
        {"job": ledger.python_job(tmp_path, "odd", BODY, isolation="thread")},
        admin=admin,
        executor={"max_running": 2},
    )
    ids = {
        body: ledger.trigger(daemon, jobId=number, executorParams=body)
        for number, body in enumerate(THREAD, 2)
    }
    assert {body: ledger.result(log_id) for body, log_id in ids.items()} == THREAD
    assert run(ledger, daemon, executorParams="return 'fine'")[1] == (200, "fine")
    ledger.settle(daemon)


def test_a_thread_that_never_returns(executor, admin, ledger, tmp_path):
    """Its result comes after timeout and grace, its lost slot is shown, others go on, and a stop is
    not held back."""
    daemon = executor(
        {
            "stuck": ledger.python_job(
                tmp_path,
                "stuck",
                "threading.Event().wait()",
                isolation="thread",
                timeout="1s",
                kill_grace="0.3s",
            ),
            "fine": ledger.job("echo fine"),
        },
        admin=admin,
        executor={"max_running": 2, "drain_timeout": "2s"},
    )
    stuck = ledger.trigger(daemon, "stuck")
    assert ledger.result(stuck) == (502, "timed out after 1 s; its thread did not return")
    assert ledger.starts.exists() and stuck in ledger.started()
    assert [(run["job"], run["logId"], run["stuck"]) for run in daemon.status()["running"]] == [
        ("stuck", stuck, True)
    ]
    assert (
        "\nxxl_executor_stuck_threads 1\n"
        in daemon.session.get(daemon.url + "/metrics", timeout=20).text
    )
    shown = subprocess.run(
        [sys.executable, str(PROGRAM), "-c", str(daemon.file), "status"],
        env=daemon.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.search(
        rf"^stuck +{stuck} +.* s \(cancelled, but its thread does not return\)$",
        shown.stdout,
        re.MULTILINE,
    )
    assert len(stderr_lines(daemon, "thread of stuck .* does not return; it is lost")) == 1
    for _number in range(3):
        assert run(ledger, daemon, "fine", jobId=2)[1] == (200, "fine")
    refused = ledger.trigger(daemon, "stuck")
    assert ledger.refused == {
        refused: (
            f"run {stuck} of this job does not return from its thread: restart the "
            "executor, and let the job watch Context.cancelled or use isolation: process"
        )
    }
    ledger.settle(daemon)
    since = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - since < 2 + 5, "drain_timeout and a few seconds"
    assert not alive(daemon.process.pid)
