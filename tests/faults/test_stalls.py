"""What must not stop the executor: many results, output that nobody reads, old logs, huge pages,
early signals, a journal that is removed, scripts without number, and a kernel that is too old."""

import contextlib
import datetime
import fcntl
import http.client
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, PROGRAM, launch, result_of, run_job, wait_until
from tools import Ledger, forget_peak, rss

MIB = 1 << 20
TOKEN = "a-token-of-this-test"
DOWN = (503, b"")  # an answer of an admin that takes no results


# -- helpers


def refuse_results(admin):
    """Heartbeats are taken, results are not, until `take_results`."""
    admin.behave = lambda path, body: DOWN if "callback" in path else None


def take_results(admin):
    admin.behave = lambda path, body: None


def metrics(daemon):
    """{name with its labels: value} of what /metrics shows."""
    text = daemon.session.get(daemon.url + "/metrics", timeout=20).text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.replace("xxl_executor_", "", 1): float(value) for name, _, value in lines}


def results(daemon):
    """(undelivered, dead) as /metrics shows them."""
    found = metrics(daemon)
    return found["undelivered_results"], found["dead_results"]


@contextlib.contextmanager
def threads(count, work, seconds=30):
    """`count` threads call work(stopping), which is set at the end of the block; what one of them
    raised is raised there."""
    stopping, errors = threading.Event(), []

    def loop():
        try:
            work(stopping)
        except Exception as error:  # raised again in the test's own thread
            errors.append(error)

    running = [threading.Thread(target=loop) for _ in range(count)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in running:
            thread.join(seconds)
    if errors:
        raise errors[0]


def request(port, path, body):
    """The bytes of a POST of JSON."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def logged(daemon, log_id):
    """What the log of a run holds by now."""
    with contextlib.suppress(StopIteration):  # there is none yet
        return daemon.log_text(log_id)
    return ""


class Caller:
    """POSTs on one connection; keeps how long the slowest answer took."""

    def __init__(self, daemon, seconds=20):
        self.slowest = 0.0
        self._connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()

    def fetch(self, path, body=None, **headers):
        began = time.monotonic()
        self._connection.request("POST", path, json.dumps(body) if body else b"", headers)
        answer = self._connection.getresponse().read()
        self.slowest = max(self.slowest, time.monotonic() - began)
        return answer

    def post(self, path, body=None, **headers):
        return json.loads(self.fetch(path, body, **headers))


@contextlib.contextmanager
def fifo(path):
    """A FIFO from which jobs read a line each; yields a function that lets one of them through."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)  # so that neither side waits for the other to open it
    try:
        yield lambda: os.write(fd, b"\n")
    finally:
        os.close(fd)


def traced(file, *options):
    """A prefix with which strace writes a daemon's calls to `file`, without being its parent."""
    command = ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-y", "-o", str(file), *options]
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=20)
    if tried.returncode or tried.stderr:
        pytest.skip(f"strace may not trace: {tried.stderr.strip()[:200]}")
    return command


# -- /metrics and many results that wait


def fill_journal(data, waiting, dead):
    """Have the journal of a stopped daemon hold this many results."""
    now = time.time()
    rows = [
        (-number, int(now * 1000), "finished" if number <= waiting else "dead", now, now)
        for number in range(1, waiting + dead + 1)
    ]
    with contextlib.closing(sqlite3.connect(data / "journal.db")) as db, db:
        db.executemany(
            "INSERT INTO runs (log_id, log_date_time, state, accepted, code, message, finished)"
            " VALUES (?, ?, ?, ?, 200, 'fine', ?)",
            rows,
        )


def test_scrapers_do_not_hold_up_triggers(executor, admin):
    """With 100,000 results that the admin does not take, and 12 scrapers, a trigger is answered at
    once and the numbers are right."""
    refuse_results(admin)
    daemon = executor({"noop": {"shell": "true"}}, admin=admin)
    assert daemon.stop() == 0
    fill_journal(daemon.data, 100_000, 7)
    daemon.start()

    def scrape(stopping):
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        ) as connection:
            while not stopping.wait(0.001):
                connection.request("GET", "/metrics")
                answer = connection.getresponse()
                text = answer.read().decode()
                assert answer.status == 200, text
                waiting = re.search(r"(?m)^xxl_executor_undelivered_results (\S+)$", text)
                assert float(waiting[1]) >= 100_000

    port, accepted = daemon.port, 0
    with Caller(daemon) as caller:
        with threads(12, scrape):
            until = time.monotonic() + 3
            while time.monotonic() < until:
                accepted += 1
                body = {"jobId": accepted, "logId": accepted, "executorHandler": "noop"}
                assert caller.post("/run", body)["code"] == 200
        print(f"slowest answer to one of {accepted} triggers: {caller.slowest:.2f} s")
        assert accepted >= 20, f"only {accepted} triggers were answered"
        assert caller.slowest < 1.0, f"a trigger was answered after {caller.slowest:.1f} s"
    wait_until(lambda: results(daemon) == (100_000 + accepted, 7), 20, "the exact numbers")
    assert daemon.status()["undelivered"] == 100_000 + accepted


def test_the_numbers_of_results_are_exact(executor, admin):
    """After runs have finished, were delivered, were given up, and after each restart."""
    refuse_results(admin)
    daemon = executor({"noop": {"shell": "true"}}, admin=admin)

    def finish(count):
        name = 'run_duration_seconds_count{handler="noop"}'
        before = metrics(daemon).get(name, 0)
        for _ in range(count):
            assert admin.trigger(daemon.url, "noop")[1]["code"] == 200
        wait_until(lambda: metrics(daemon).get(name) == before + count)

    def restart(**env):
        assert daemon.stop() == 0
        daemon.env.update(env)
        daemon.start()

    def expect(*wanted):
        wait_until(lambda: results(daemon) == wanted, 10, f"{wanted} in place of {results(daemon)}")
        assert (metrics(daemon)["oldest_undelivered_seconds"] > 0) == (wanted[0] > 0)

    expect(0, 0)
    finish(3)
    expect(3, 0)
    restart()
    expect(3, 0)
    finish(2)
    expect(5, 0)
    daemon.program = LAUNCH
    restart(**launch(DEAD_AFTER=0.01))
    expect(0, 5)
    restart(**launch())
    expect(0, 5)
    finish(4)
    expect(4, 5)
    daemon.kill()
    daemon.start()
    expect(4, 5)
    take_results(admin)
    restart()
    expect(0, 5)
    assert len(admin.results) == 4
    finish(1)
    expect(0, 5)


# -- output that nobody reads


class Unread:
    """Starts `daemon` with a small pipe that nobody reads as its "stdout" or "stderr"."""

    def __init__(self, daemon, stream):
        self._read, write = os.pipe()
        fcntl.fcntl(self._read, 1031, 4096)  # F_SETPIPE_SZ
        os.set_blocking(self._read, False)
        command = [sys.executable, str(daemon.program), "-c", str(daemon.file), *daemon.arguments]
        with open(daemon.stderr, "ab") as file:
            outputs = {"stdout": file, "stderr": file, stream: write}
            daemon.process = subprocess.Popen(
                [command[0], *daemon.flags, *command[1:]],
                env=daemon.env,
                stdin=subprocess.DEVNULL,
                cwd=daemon.directory,
                start_new_session=True,
                **outputs,
            )
        os.close(write)
        self._process, self.data = daemon.process, b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._read)  # whoever is stuck in a write gets an error
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)

    def full(self):
        """Whether poll(2) says so of a pipe of one page: as soon as something is in it."""
        count = bytearray(4)
        fcntl.ioctl(self._read, 0x541B, count)  # FIONREAD
        return int.from_bytes(count, sys.byteorder) > 0

    def read(self):
        """Read what there is; all that was ever read."""
        with contextlib.suppress(BlockingIOError):
            while True:
                part = os.read(self._read, 1 << 16)
                if not part:
                    break
                self.data += part
        return self.data.decode()


OUTPUT = "0" + "x" * 98
UNREAD_LINE = {  # what each line looks like
    "stdout": rf"\w+ logId=\d+ (?:{OUTPUT}|quick|after)",
    "stderr": r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ +\S.*",
}
DROPPED = r".*\b(\d+)\b.*\b(?:dropped|lost|left out|missing).*"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_that_nobody_reads(executor, admin, stream):
    """A full pipe holds up no run, no limit of time, no kill, no request and no stop; who reads
    again gets whole lines, and one that says how much is missing."""
    lines = f"yes {OUTPUT} | head -n 10500"  # 1 MiB
    numbers = itertools.count(1)
    daemon = executor(
        {
            "limited": {"shell": f"{lines}; sleep 600", "timeout": "1s"},
            "killed": {"shell": f"{lines}; sleep 600"},
            "quick": {"shell": "echo quick"},
            "after": {"shell": "echo after"},
        },
        admin=admin,
        executor={"log_to_stdout": True, "drain_timeout": "1s"},
        env=launch(OUTPUT_LIMIT=2000),
        program=LAUNCH,
        start=False,
    )

    def flood():
        """Have more be told than fits, on either stream."""
        with Caller(daemon, 5) as caller:
            for _ in range(30):
                log_id = next(numbers)
                body = {"jobId": 100 + log_id, "logId": log_id, "executorHandler": "quick"}
                assert caller.post("/run", body)["code"] == 200

    with Unread(daemon, stream) as pipe:
        wait_until(lambda: daemon.url, 20, "the start of the daemon")
        flood()
        limited, reply = admin.trigger(daemon.url, "limited", jobId=1)
        assert reply["code"] == 200
        killed, reply = admin.trigger(daemon.url, "killed", jobId=2)
        assert reply["code"] == 200
        quick = [admin.trigger(daemon.url, "quick", jobId=number)[0] for number in (1, 3, 4)]
        item = result_of(admin, limited, 10)
        assert (item["handleCode"], item["handleMsg"]) == (502, "timed out after 1 s")
        assert pipe.full()
        admin.call(daemon.url, "/kill", {"jobId": 2})
        item = result_of(admin, killed, 10)
        assert (item["handleCode"], item["handleMsg"]) == (500, "killed by the admin")
        for log_id in quick:
            assert result_of(admin, log_id, 10)["handleMsg"] == "quick"
        assert logged(daemon, limited).count(OUTPUT) == 10_500, "the job's own log is complete"

        def later():
            pipe.read()
            run_job(daemon, admin, "after", jobId=5)
            return re.search(r"(?m)^after logId=\d+ after$|finished after .*", pipe.read())

        wait_until(later, 10, "a line for a reader that came back")
        wait_until(lambda: re.search(DROPPED, pipe.read()), 10, "how much was dropped")
        told = pipe.read().splitlines()
        whole = [line for line in told if re.fullmatch(UNREAD_LINE[stream], line)]
        notices = [line for line in told if re.fullmatch(DROPPED, line)]
        assert len(notices) == 1, notices
        assert int(re.fullmatch(DROPPED, notices[0])[1]) > 0
        assert [line for line in told if line not in whole and line not in notices] == []

        flood()
        killed, reply = admin.trigger(daemon.url, "killed", jobId=2)
        assert reply["code"] == 200
        wait_until(lambda: logged(daemon, killed).count(OUTPUT) == 10_500, 10, "the output")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(10) == 0
        assert result_of(admin, killed)["handleMsg"] == "killed: the executor stopped"


# -- many old logs


def make_old_logs(logs, first, days):
    """100 empty logs of long ago in each of `days` directories from the day `first` on."""
    long_ago = time.time() - 1000 * 86_400
    for number in range(first, first + days):
        place = logs / (datetime.date(2020, 1, 1) + datetime.timedelta(number)).isoformat()
        place.mkdir(parents=True)
        directory = os.open(place, os.O_RDONLY)
        try:
            for log_id in range(100):
                fd = os.open(f"{log_id}.log", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
                os.utime(fd, (long_ago, long_ago))
                os.close(fd)
        finally:
            os.close(directory)


def test_pruning_holds_nothing_up(executor, tmp_path):
    """While very many old logs are removed, from a slow disk, a reload and a stop are as quick as
    ever; what is left then is removed by the next executor."""
    slow = traced(
        tmp_path / "calls",
        "-e",
        "trace=unlink,unlinkat",
        "-e",
        "inject=unlink,unlinkat:delay_enter=500",
    )
    daemon = executor(
        {"hello": {"shell": "echo hello"}},
        executor={"log_retention": "1s"},
        env=launch(HOUSEKEEPING=2.0, LEAST_RETENTION=1.0),
        program=LAUNCH,
        prefix=slow,
        start=False,
    )
    logs = daemon.data / "logs"
    make_old_logs(logs, 0, 60)
    daemon.start()
    wait_until(lambda: len(os.listdir(logs)) < 60, 20, "the end of the first day")
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reloaded" in daemon.log, 1, "the reload")
    assert daemon.post("/beat")["code"] == 200
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(2) == 0
    print(f"{len(os.listdir(logs))} of 60 days are left")
    make_old_logs(logs, 60, 5)
    daemon.prefix = ()
    daemon.start()
    wait_until(lambda: not os.listdir(logs), 30, "the end of all old logs")


# -- huge pages


@pytest.fixture
def pages(executor, admin, tmp_path):
    """(daemon, running, finished): two runs (logId, logDateTim) whose logs are 4 MiB of control
    characters, which JSON spells with six bytes each."""
    odd = tmp_path / "odd"
    odd.write_bytes((b"\1" * 1023 + b"\n") * 4096)
    with fifo(tmp_path / "go") as go:
        daemon = executor(
            {
                "running": {"shell": f"cat {odd}; read line < {tmp_path / 'go'}"},
                "finished": {"shell": f"cat {odd}"},
            },
            admin=admin,
        )
        now = int(time.time() * 1000)
        running, reply = admin.trigger(daemon.url, "running", logDateTime=now, jobId=2)
        assert reply["code"] == 200
        finished, _ = run_job(daemon, admin, "finished", logDateTime=now)
        wait_until(lambda: len(logged(daemon, running)) > 4 * MIB, 10, "the output")
        yield daemon, (running, now), (finished, now)
        go()
        result_of(admin, running)


def page(daemon, run, first):
    """A page of the log of `run`; asserts that its answer is of a bearable size."""
    body = {"logId": run[0], "logDateTim": run[1], "fromLineNum": first}
    with Caller(daemon) as caller:
        content = caller.fetch("/log", body)
    assert len(content) <= 9 * MIB, f"an answer of {len(content) / MIB:.0f} MiB"
    answer = json.loads(content)
    assert answer["code"] == 200 and answer["content"] == answer["data"]
    return answer["content"]


def test_a_finished_log_of_control_characters(pages):
    """The one page that the admin asks for shows the head and the tail, and between them what is
    left out."""
    daemon, _, run = pages
    text, whole = page(daemon, run, 1)["logContent"], daemon.log_text(run[0])
    head = len(os.path.commonprefix([text, whole]))
    tail = len(os.path.commonprefix([text[::-1], whole[::-1]]))
    assert head > MIB // 10 and tail > MIB // 10, (head, tail)
    notice = text[head : len(text) - tail]
    assert len(notice) < 1000 and re.search(r"\d+ bytes", notice), notice
    assert whole.splitlines()[-1] == text.splitlines()[-1]


def test_a_running_log_of_control_characters(pages):
    """Its pages join to exactly the file."""
    daemon, run, _ = pages
    parts, first = [], 1
    while True:
        found = page(daemon, run, first)
        if not found["logContent"]:
            break
        assert found["fromLineNum"] == first and not found["isEnd"]
        parts.append(found["logContent"])
        first = found["toLineNum"] + 1
        assert len(parts) < 100
    assert "".join(parts) == daemon.log_text(run[0])


def test_readers_of_huge_pages_hold_up_nobody(pages):
    """While 8 readers ask for one after the other, each beat on another connection is answered
    within a second."""
    daemon, *runs = pages
    port, left = daemon.port, [0, 0, 0, 0, 1, 1, 1, 1]

    def read(stopping):
        run = runs[left.pop()]
        ask = request(port, "/log", {"logId": run[0], "logDateTim": run[1], "fromLineNum": 1})
        with socket.create_connection(("127.0.0.1", port), 20) as sock:
            buffer = bytearray(MIB)
            while not stopping.is_set():
                sock.sendall(ask)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += sock.recv(1 << 12)
                head, _, rest = head.partition(b"\r\n\r\n")
                size = int(re.search(rb"(?i)content-length: *(\d+)", head)[1]) - len(rest)
                while size > 0:
                    size -= sock.recv_into(buffer)

    with Caller(daemon) as caller:
        with threads(8, read):
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                assert caller.post("/beat")["code"] == 200
        assert caller.slowest < 1.0, f"a beat was answered after {caller.slowest:.1f} s"


def test_clients_that_ask_for_pages_and_do_not_read(executor, admin, tmp_path):
    """40 of them cost little memory, hold up no beat, and one that reads gets its page."""
    (tmp_path / "text").write_bytes((b"x" * 1023 + b"\n") * 4095)
    daemon = executor(
        {"text": {"shell": f"cat {tmp_path / 'text'}"}},
        admin=admin,
        env=launch(REQUEST_TIMEOUT=3.0),
        program=LAUNCH,
    )
    now = int(time.time() * 1000)
    log_id, _ = run_job(daemon, admin, "text", logDateTime=now)
    ask = request(daemon.port, "/log", {"logId": log_id, "logDateTim": now, "fromLineNum": 1})
    got = []
    forget_peak(daemon.process.pid)
    before = rss(daemon.process.pid)
    with contextlib.ExitStack() as stack:
        caller = stack.enter_context(Caller(daemon))
        for _ in range(40):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(20)
            sock.connect(("127.0.0.1", daemon.port))
            sock.sendall(ask)

        def read(stopping):
            got.append(page(daemon, (log_id, now), 1)["logContent"])

        with threads(1, read):
            until = time.monotonic() + 20
            least = time.monotonic() + 2
            while time.monotonic() < until and (not got or time.monotonic() < least):
                assert caller.post("/beat")["code"] == 200
                threading.Event().wait(0.01)
        assert got == [daemon.log_text(log_id)]
        grown = rss(daemon.process.pid, "VmHWM") - before
        print(f"grown by {grown / MIB:.0f} MiB, slowest beat {caller.slowest:.2f} s")
        assert grown < 160 * MIB, f"grown by {grown / MIB:.0f} MiB"
        assert caller.slowest < 1.0, f"a beat was answered after {caller.slowest:.1f} s"


# -- SIGHUP in the first moments


def begun(daemon):
    """Whether the program itself has begun: nobody can help before Python has read it."""
    place = Path(f"/proc/{daemon.process.pid}")
    with contextlib.suppress(OSError):
        state = dict(re.findall(r"(?m)^(Sig\w+):\s+(\w+)$", (place / "status").read_text()))
        hup = 1 << (signal.SIGHUP - 1)
        if any(int(state[name], 16) & hup for name in ("SigIgn", "SigCgt", "SigBlk")):
            return True
        return "lib-dynload" in (place / "maps").read_text()
    return True


def annoy(daemon, pauses):
    """Send SIGHUP after each of `pauses` until `daemon` listens or has ended."""
    wait_until(lambda: begun(daemon), 20, "the beginning")
    for seconds in pauses:
        threading.Event().wait(seconds)
        if daemon.url or daemon.process.poll() is not None:
            return
        daemon.signal(signal.SIGHUP)


def survives(daemon, pauses):
    """Whether it listens at last; stops it."""
    wait_until(lambda: daemon.url or daemon.process.poll() is not None, 20, "the start or its end")
    status = daemon.process.poll()
    assert status is None, f"ended by {status}, SIGHUP came {len(pauses)} times {pauses[0]:.3f} s"
    wait_until(lambda: "listening" in daemon.log, 10, "listening")
    assert daemon.stop() == 0, daemon.log


def test_a_reload_in_the_first_moments(executor, tmp_path):
    """SIGHUP does not end an executor that has only just begun, whenever it comes; the executor
    starts and stops as ever."""
    moments = [[number * 0.04] for number in range(6)] + [[0.003] * 300, [0.005] * 200]
    for pair in zip(moments[::2], moments[1::2]):  # two at a time
        daemons = []
        for pauses in pair:
            place = tmp_path / f"{len(pauses)}-{pauses[0]}"
            daemons.append((executor(directory=place, program=PROGRAM, start=False), pauses))
        for daemon, _ in daemons:
            daemon.start(wait=False)
        running = [threading.Thread(target=annoy, args=arguments) for arguments in daemons]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(60)
        for daemon, pauses in daemons:
            survives(daemon, pauses)


# -- a journal that is removed


@pytest.mark.parametrize(
    "removed, end",
    [
        (("journal.db", "journal.db-wal", "journal.db-shm"), "stop"),
        (("journal.db", "journal.db-wal", "journal.db-shm"), "kill"),
        (("journal.db-wal",), "kill"),
    ],
    ids=["all-stop", "all-kill", "wal-kill"],
)
def test_a_journal_that_is_removed(executor, admin, tmp_path, removed, end):
    """Somebody removes it from under the executor: that is noticed with the next trigger, and all
    that was accepted has its one result, though the executor is ended soon after."""
    refuse_results(admin)
    ledger = Ledger(admin, tmp_path)
    with fifo(tmp_path / "go") as go:
        daemon = executor(
            {"quick": ledger.job("echo quick"), "long": ledger.job(f"read x < {tmp_path / 'go'}")},
            admin=admin,
            executor={"drain_timeout": "0"},
        )
        waiting = [ledger.trigger(daemon, "quick") for _ in range(3)]
        long = ledger.trigger(daemon, "long", jobId=2)
        wait_until(lambda: daemon.status()["undelivered"] == 3 and long in ledger.started())
        queued = ledger.trigger(daemon, "quick", jobId=2)
        for name in removed:
            os.unlink(daemon.data / name)

        def accepted():
            """Refused with the reason, or taken."""
            log_id = ledger.trigger(daemon, "quick", jobId=3)
            assert "journal" in ledger.refused.get(log_id, "journal"), ledger.refused[log_id]
            return log_id in ledger.accepted

        wait_until(accepted, 10, "an accepted trigger")
        wait_until((daemon.data / "journal.db").exists, 5, "a journal")
        if end == "stop":
            go()
            assert daemon.stop() == 0
        else:
            daemon.kill()
        take_results(admin)
        daemon.start()
        ledger.settle(daemon, 20)
        for log_id in waiting:
            assert ledger.result(log_id) == (200, "quick")
            assert ledger.result(queued)[0] in (200, 500)
        for log_id in (*waiting, long):
            ledger.trigger(daemon, "quick", logId=log_id)
        assert ledger.refused.keys() & {*waiting, long} == set()
        ledger.trigger(daemon, "quick")
        ledger.settle(daemon, 20)
        daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def killed_at(file, call, moment=1):
    """A prefix with which the daemon is killed as it begins its `moment`-th `call`."""
    command = traced(file, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={moment}")
    return [word for word in command if word != "--seccomp-bpf"]  # with it no signal comes


def remove_journal(daemon):
    for name in ("journal.db", "journal.db-wal", "journal.db-shm"):
        os.unlink(daemon.data / name)


def assert_complete(daemon, ledger, known):
    """Every logId of `known` is still known, and the journal is sound."""
    for log_id in known:
        ledger.trigger(daemon, "quick", logId=log_id)
    assert ledger.refused.keys() & set(known) == set()
    ledger.settle(daemon, 20)
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_journal_that_is_replaced(executor, admin, tmp_path):
    """An older copy is moved into its place, with its log: it is set aside and not mixed in, or
    what it does not know would start again."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"quick": ledger.job("echo quick")}, admin=admin)
    known = [ledger.trigger(daemon, "quick") for _ in range(3)]
    ledger.settle(daemon)
    files = ("journal.db", "journal.db-wal", "journal.db-shm")
    for name in files:
        shutil.copy(daemon.data / name, tmp_path / name)
    known += [ledger.trigger(daemon, "quick") for _ in range(20)]
    ledger.settle(daemon)
    for name in files:
        os.replace(tmp_path / name, daemon.data / name)
    wait_until(lambda: ledger.trigger(daemon, "quick") in ledger.accepted, 10, "a trigger")
    assert len(list(daemon.data.glob("journal.db.broken-*"))) == 3
    assert_complete(daemon, ledger, known)


@pytest.mark.parametrize("moment", [1, 2], ids=["copied", "closed"])
def test_a_kill_while_the_journal_is_made_anew(executor, admin, tmp_path, moment):
    """Whenever it comes, what was in the journal is known after it, or was lost with its files."""
    ledger = Ledger(admin, tmp_path)
    kill = killed_at(tmp_path / "calls", "rename", moment)
    daemon = executor({"quick": ledger.job("echo quick")}, admin=admin, prefix=kill)
    known = [ledger.trigger(daemon, "quick") for _ in range(3)]
    ledger.settle(daemon)
    remove_journal(daemon)
    ledger.trigger(daemon, "quick")
    daemon.wait()
    daemon.prefix = ()
    daemon.start()
    assert_complete(daemon, ledger, known if moment == 2 else [])


def test_a_kill_while_the_lock_is_written(executor, admin, tmp_path):
    """The end of what stood there before makes no copy of it: what a crash left is ended."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"long": ledger.job("sleep 600")}, admin=admin)
    long = ledger.trigger(daemon, "long")
    wait_until(lambda: long in ledger.started())
    identity = daemon.identity
    daemon.kill()
    daemon.prefix = killed_at(tmp_path / "calls", "ftruncate")
    daemon.start(wait=False)
    daemon.wait()
    daemon.prefix = ()
    daemon.start()
    assert daemon.identity == identity
    ledger.settle(daemon)


# -- scripts without number


@pytest.fixture
def glue(executor, loopback):
    """glue(prefix=...): (admin, daemon, send), with scripts from the admin enabled; send(source, ...)
    triggers one, which must be accepted, and returns its logId."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            admin = loopback(token=TOKEN)
            daemon = executor(admin=admin, glue={"enabled": True}, **options)
            caller = stack.enter_context(Caller(daemon))
            numbers = itertools.count(1)

            def send(source, **fields):
                body = {
                    "jobId": 1,
                    "logId": next(numbers),
                    "logDateTime": int(time.time() * 1000),
                    "glueType": "GLUE_SHELL",
                    "glueUpdatetime": 1,
                    "glueSource": source,
                    **fields,
                }
                reply = caller.post("/run", body, **{"XXL-JOB-ACCESS-TOKEN": TOKEN})
                assert reply["code"] == 200, reply
                return body["logId"]

            return admin, daemon, send

        yield make


def test_many_scripts_make_few_metrics(glue):
    """The runs of all scripts are counted together: whoever sends triggers cannot make ever more
    series."""
    admin, daemon, send = glue()
    runs = [send("exit 0", jobId=number) for number in range(1, 301)]
    assert admin.wait(lambda: all(log_id in admin.results for log_id in runs), 30)
    found = metrics(daemon)
    series = [name for name in found if name.startswith("runs_total")]
    assert len(series) <= 5, f"{len(series)} series"
    assert sum(found[name] for name in series if 'handler="glue"' in name) == 300


def test_a_repeated_trigger_stores_no_script(glue):
    """A logId that is known starts nothing, so its script is not needed, however often it comes."""
    admin, daemon, send = glue()
    log_id = send("echo once")
    result_of(admin, log_id)
    for number in range(50):
        send(f"echo {number}", logId=log_id, glueUpdatetime=2 + number)
    assert [file.name for file in (daemon.data / "gluesource").iterdir()] == ["1_1.sh"]
    assert len(admin.results[log_id]) == 1


def test_a_script_is_on_the_disk_before_its_run_is_accepted(glue, tmp_path):
    """Else a run that was accepted would have no script after a loss of power: first the script is
    synced, then its directory, then the journal, then comes the answer."""
    calls = tmp_path / "calls"
    admin, daemon, send = glue(prefix=traced(calls, "-e", "trace=fsync,fdatasync"))
    place = re.escape(str(daemon.data))
    before = calls.stat().st_size
    log_id = send("echo once")
    text = calls.read_bytes()[before:].decode()
    result_of(admin, log_id)
    synced = re.findall(rf"f(?:data)?sync\(\d+<{place}/([^>]*)>", text)
    scripts = [number for number, name in enumerate(synced) if name.startswith("gluesource/")]
    assert scripts, f"only {synced} were synced before the answer"
    assert "gluesource" in synced[scripts[0] :], synced
    assert "journal.db-wal" in synced[synced.index("gluesource") :], synced


# -- a kernel that is too old


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_kernel_without_pidfd_open(executor, tmp_path, command):
    """The executor says which kernel it needs instead of failing with the first run."""
    daemon = executor(
        {"hello": {"shell": "echo hello"}},
        prefix=traced(
            tmp_path / "calls", "-e", "trace=pidfd_open", "-e", "inject=pidfd_open:error=ENOSYS"
        ),
        start=False,
    )
    daemon.arguments = (command,)
    daemon.start(wait=False)
    wait_until(lambda: daemon.url or daemon.process.poll() is not None, 20, "the start or its end")
    assert not daemon.url, "it has started"
    assert daemon.wait() in ((1,) if command == "run" else (1, 2)), daemon.log
    [line] = daemon.log.splitlines()
    assert re.search(r"Linux 5\.3\b", line) and platform.release() in line, line
