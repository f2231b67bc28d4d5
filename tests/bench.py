#!/usr/bin/env python3
"""Measures the executor: `python tests/bench.py [NAME ...]`, all benches when none is named; about
three minutes.

Every speed is the ratio of two things that were measured in this run, in turns (A B A B ...),
medians; nothing is compared with a number from another machine.  Some targets are times as such
(python-start, preload, drop, the first registration), two are sizes (memory).  The load comes from wrk with Lua
scripts that are written to a temporary directory.  The admin is one of tests/admin.py, in
this process, which does nothing else meanwhile.  All traffic stays on 127.0.0.1.

Triggers are sent in a closed loop on results: wrk keeps WINDOW runs between trigger and result, by
waiting before each request for as many milliseconds as there are runs too many.  With an open loop
the executor would accept far faster than it runs, and the figure would be that of a queue being
filled and then emptied.  The number of triggers is fixed, and the time runs from the start of wrk
to the arrival of the last result: no accepted run stays out of the account.

Both executors keep their default log level (INFO) and have stderr in a file on the same disk as
their data.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "xxl_executor.py"
sys.path.insert(0, str(ROOT))

from admin import Admin  # noqa: E402

import xxl_executor  # noqa: E402

PYXXL = "0.4.8"
LANES = 64  # jobIds in turn: one run at a time for each jobId is then no limit
WINDOW = (
    256  # runs between trigger and result: more than two batches of callbacks, four for each lane
)
CALLERS = 8  # connections that trigger, each waiting for its answer
MANY_CALLERS = 32  # an admin has up to 300 threads that trigger
LOADERS = 2  # threads of wrk, which share them
TOKEN = "bench"  # 3.3 answers HTTP 400 to a client without one, as pyxxl is then
LIMIT = 60  # seconds that no single measurement may take

TRIGGER_LUA = """
-- %(count)d triggers in all, each with a logId of its own: every thread has its own range.
-- Then a /beat now and then until SIGINT.
local threads = {}
function setup(thread)
  thread:set("number", #threads)
  thread:set("refused", 0)
  thread:set("reason", "")
  table.insert(threads, thread)
end

local headers = {["Content-Type"] = "application/json;charset=UTF-8", ["XXL-JOB-ACCESS-TOKEN"] = %(token)r}
local handlers = {%(handlers)s}
local quota, sent, probed = %(count)d / %(threads)d, 0, false
local counter = assert(io.open(%(counter)r, "r"))
counter:setvbuf("no")

function request()
  if number == 0 and not probed then  -- wrk looks at one request of its first thread, and does not send it
    probed = true
    return wrk.format("POST", "/beat", headers, "")
  end
  if sent >= quota then return wrk.format("POST", "/beat", headers, "") end
  sent = sent + 1
  local turn = sent * %(threads)d + number
  local body = string.format('{"jobId":%%d,"executorHandler":"%%s","executorParams":"","executorTimeout":0,' ..
    '"executorBlockStrategy":"SERIAL_EXECUTION","logId":%%.0f,"logDateTime":%%d000,"glueType":"BEAN",' ..
    '"glueSource":"","glueUpdatetime":0,"broadcastIndex":0,"broadcastTotal":1}',
    turn %% %(lanes)d + 1, handlers[turn %% #handlers + 1], %(first)d + number * 1e7 + sent, os.time())
  return wrk.format("POST", %(path)r, headers, body)
end

function delay()
  if sent >= quota then return 200 end
  counter:seek("set", 0)
  return math.max(0, sent * %(threads)d - tonumber(counter:read(12)) - %(window)d)
end

function response(status, headers, body)
  if status ~= 200 or not body:find('"code": ?200') then
    refused, reason = refused + 1, body
  end
end

function done()
  for _, thread in ipairs(threads) do
    local refused = thread:get("refused")
    if refused > 0 then print(string.format("refused %%d: %%s", refused, thread:get("reason"))) end
  end
end
"""
BEAT_LUA = f"""
wrk.method, wrk.path, wrk.body, wrk.headers["XXL-JOB-ACCESS-TOKEN"] = "POST", "/beat", "", {TOKEN!r}
"""

POPEN_PY = """
import subprocess, threading, time
def work():
    for _ in range(%d):
        subprocess.Popen(["/bin/sh", "-c", "true"]).wait()
threads = [threading.Thread(target=work) for _ in range(8)]
began = time.perf_counter()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(time.perf_counter() - began, time.process_time())
"""
JOBS_PY = """
import time
def started():
    return time.time_ns()
def nothing():
    pass
"""
PYXXL_PY = f"""
import sys
from pyxxl import ExecutorConfig, JobHandler, PyxxlRunner
admin, port, directory = sys.argv[1:]
handler = JobHandler()

@handler.register(name="nothing")
async def nothing():
    pass

PyxxlRunner(ExecutorConfig(
    xxl_admin_baseurl=admin + "/api/", executor_app_name="pyxxl", executor_listen_host="127.0.0.1",
    executor_listen_port=int(port), executor_log_path=directory + "/pyxxl.log", log_local_dir=directory + "/logs",
    task_queue_length=1000, max_workers=32,
    access_token="{TOKEN}", dotenv_try=False), handler=handler).run_executor()
"""


class BenchError(Exception):
    """A measurement that means nothing; the text says why."""


def wait_until(predicate, seconds, what):
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not predicate():
        if time.monotonic() >= deadline:
            raise BenchError(f"{what} did not come within {seconds} s")
        pause.wait(0.002)


def end(process):
    """SIGTERM, then SIGKILL."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def in_turns(rounds, first, second):
    """Measure A B A B ...; returns both lists."""
    found = [], []
    for _ in range(rounds):
        for values, measure in zip(found, (first, second)):
            values.append(measure())
    return found


def output_of(code):
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, timeout=LIMIT
    ).stdout


def children_of(pid):
    """The processes that its threads have started."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, file.read_text().split())
    return found


def cpu_seconds(pid):
    """What a process has used, its children not counted."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid):
    """MiB"""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {pid} has ended")


class Bench:
    """What the benches share: a directory on a disk, an admin, executors, wrk; and the rows of the
    table."""

    def __init__(self, directory):
        self.directory, self.rows = directory, []
        self.ids = (
            int(time.time()) * 1_000_000
        )  # logIds from here on; every load takes a range of its own
        self.executors = 0
        (directory / "bench_jobs.py").write_text(JOBS_PY)

    def row(self, name, target, value, fits, detail):
        self.rows.append((name, target, value, "ok" if fits else "MISSED", detail))
        print("  ".join(self.rows[-1]), flush=True)

    @contextlib.contextmanager
    def admin(self, version):
        admin = Admin(version, TOKEN)
        try:
            yield admin
        finally:
            admin.close()

    @contextlib.contextmanager
    def executor(self, admin, jobs, **options):
        """The daemon, other `options` at their defaults; (process, URL, seconds from exec to its
        registration)."""
        self.executors += 1
        place = self.directory / f"executor{self.executors}"
        place.mkdir()
        config = {
            "admin": {"addresses": [admin.url], "access_token": TOKEN},
            "jobs": jobs,
            "executor": {"bind": "127.0.0.1:0", "data_dir": "./data", **options},
        }
        (place / "config.yaml").write_text(yaml.safe_dump(config))
        before = len(admin.registry)
        with open(place / "stderr.txt", "wb") as stderr:
            began = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), "-c", str(place / "config.yaml")],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                cwd=place,
            )
        try:
            if not admin.wait(lambda: len(admin.registry) > before, 20):
                raise BenchError(
                    f"the executor did not register: {(place / 'stderr.txt').read_text()[-1000:]}"
                )
            yield process, admin.registry[-1].rstrip("/"), time.monotonic() - began
            end(process)
            told = (place / "stderr.txt").read_text()
            if re.search(r" ERROR |Traceback", told):
                shown = re.search(r".*(ERROR|Traceback)(.*\n?){3}", told)[0]
                raise BenchError(f"the executor reports an error: {shown}")
        finally:
            end(process)

    @contextlib.contextmanager
    def pyxxl(self, admin):
        """pyxxl with one async handler `nothing`; its URL."""
        self.executors += 1
        place = self.directory / f"pyxxl{self.executors}"
        (place / "logs").mkdir(parents=True)
        (place / "main.py").write_text(PYXXL_PY)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        before = len(admin.registry)
        with open(place / "stderr.txt", "wb") as stderr:
            process = subprocess.Popen(
                [str(pyxxl_python()), "main.py", admin.url, str(port), str(place)],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                cwd=place,
            )
        try:
            if not admin.wait(lambda: len(admin.registry) > before, 20):
                raise BenchError(
                    f"pyxxl did not register: {(place / 'stderr.txt').read_text()[-1000:]}"
                )
            yield f"http://127.0.0.1:{port}"
        finally:
            end(process)

    def wrk(self, script, url, seconds, callers=CALLERS):
        file = self.directory / "load.lua"
        file.write_text(script)
        command = [
            shutil.which("wrk"),
            f"-t{LOADERS}",
            f"-c{callers}",
            f"-d{seconds}",
            "--timeout",
            "10",
            "-s",
            str(file),
            url,
        ]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def runs_per_second(self, admin, url, handlers, count, callers=CALLERS):
        """`count` triggers with results, see the docstring of this file."""
        count -= count % LOADERS
        self.ids += 1_000_000_000
        counter = self.directory / "results"
        counter.write_text(f"{0:012d}")
        script = TRIGGER_LUA % {
            "count": count,
            "threads": LOADERS,
            "first": self.ids,
            "lanes": LANES,
            "window": WINDOW,
            "token": TOKEN,
            "handlers": ", ".join(map(json.dumps, handlers)),
            "counter": str(counter),
            "path": "/trigger" if admin.version == "3.5" else "/run",
        }
        before = len(admin.results)
        with open(counter, "r+b", buffering=0) as shown:

            def arrived():
                found = len(admin.results) - before
                os.pwrite(shown.fileno(), b"%012d" % found, 0)
                return found >= count

            failure = None
            began = time.monotonic()
            process = self.wrk(script, url, LIMIT, callers)
            try:
                wait_until(arrived, LIMIT, f"the last of {count} results")
            except BenchError as error:  # wrk may know why
                failure = error
            finally:
                took = time.monotonic() - began
                process.send_signal(signal.SIGINT)
                output = process.communicate(timeout=20)[0]
        wrong = [
            line
            for line in output.splitlines()
            if re.match(r"refused|\s*(Socket errors|Non-2xx)", line)
        ]
        if failure or wrong:
            raise BenchError(
                "; ".join([str(failure or f"not all of {count} triggers were taken"), *wrong])
            )
        with admin.changed:
            wrong = [
                item
                for items in list(admin.results.values())[before:]
                for item in items
                if item["code"] != 200
            ]
        if wrong:
            raise BenchError(f"{len(wrong)} runs failed, such as {wrong[0]}")
        return count / took

    def beats_per_second(self, url, seconds=2):
        output = self.wrk(BEAT_LUA, url, seconds).communicate(timeout=LIMIT)[0]
        if "Socket errors" in output or "Non-2xx" in output or "Requests/sec:" not in output:
            raise BenchError(f"wrk failed: {output}")
        return float(output.split("Requests/sec:")[1].split()[0])

    # -- the benches

    def shell(self):
        """Trigger to result of `true`, against Popen alone."""

        used: dict[str, list[float]] = {"ours": [], "bare": []}  # seconds of CPU for each run

        def popen():
            each = 150
            took, cpu = map(float, output_of(POPEN_PY % each).split())
            used["bare"].append(cpu / (8 * each))
            return 8 * each / took

        def executed():
            before = cpu_seconds(process.pid)
            speed = self.runs_per_second(admin, url, ["true"], 1000)
            used["ours"].append((cpu_seconds(process.pid) - before) / 1000)
            return speed

        with (
            self.admin("3.5") as admin,
            self.executor(admin, {"true": {"shell": "true"}}) as (process, url, _),
        ):
            self.runs_per_second(admin, url, ["true"], 300)
            ours, bare = in_turns(5, executed, popen)
        self.ratio("shell", 0.5, ours, bare, "runs/s", "Popen from 8 threads")
        ours, bare = (1e6 * statistics.median(values) for values in used.values())
        self.row(
            "shell CPU",
            "<= 3 times",
            f"{ours / bare:.1f} times",
            ours <= 3 * bare,
            f"of the daemon for each run {ours:.0f} us; of what calls Popen {bare:.0f} us",
        )

    def python_start(self):
        """Acceptance of a trigger to the first line of the function, in a process of its own."""
        self.start_of("python-start", {}, "bench_jobs")

    def preload(self):
        """The same of a module that imports another one for 0.5 s, which is preloaded."""
        (self.directory / "bench_slow.py").write_text("import time\ntime.sleep(0.5)\n")
        text = "import time\nimport bench_slow\ndef started():\n    return time.time_ns()\n"
        (self.directory / "bench_heavy.py").write_text(text)
        self.start_of("preload", {"preload": ["bench_slow"]}, "bench_heavy")

    def loud(self):
        """Four jobs that print as fast as somebody reads, against reading them alone."""
        command, megabytes = "head -c 100000000 /dev/zero", 400
        with (
            self.admin("3.5") as admin,
            self.executor(admin, {"loud": {"shell": command}}, log_limit="1MiB") as (_, url, _),
        ):

            def executed():
                began = time.monotonic()
                sent = [admin.trigger(url, "loud", jobId=number)[0] for number in range(4)]
                if not admin.wait(lambda: all(map(admin.results.get, sent)), LIMIT):
                    raise BenchError("no results of the loud jobs")
                return megabytes / (time.monotonic() - began)

            def read():
                began = time.monotonic()
                started = [
                    subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE)
                    for _ in range(4)
                ]
                with selectors.DefaultSelector() as selector:
                    for process in started:
                        selector.register(process.stdout, selectors.EVENT_READ)
                    while selector.get_map():
                        for key, _ in selector.select():
                            if not os.read(key.fd, 1 << 16):
                                selector.unregister(key.fileobj)
                for process in started:
                    process.stdout.close()
                    process.wait()
                return megabytes / (time.monotonic() - began)

            ours, alone = in_turns(5, executed, read)
        self.ratio("loud", 0.3, ours, alone, "MB/s", "a loop that only reads")

    def drop(self):
        """The answer to /kill of a job with 10,000 runs that wait."""
        count = 10_000
        job = {"shell": "sleep 600", "queue_limit": count, "kill_grace": 0}
        with (
            self.admin("3.5") as admin,
            self.executor(admin, {"waits": job}, max_queued=count) as (_, url, _),
        ):
            connection = http.client.HTTPConnection(url.partition("//")[2], timeout=10)

            def post(path, body):
                connection.request("POST", path, json.dumps(body), {"XXL-JOB-ACCESS-TOKEN": TOKEN})
                return json.loads(connection.getresponse().read())

            answers = []
            for _ in range(3):
                before, first = len(admin.results), self.ids + 1
                self.ids += count + 1
                for log_id in range(first, first + count + 1):
                    body = {"jobId": 1, "logId": log_id, "executorHandler": "waits"}
                    if post("/trigger", body)["code"] != 200:
                        raise BenchError(f"trigger {log_id} was refused")
                began = time.monotonic()
                told = post("/kill", {"jobId": 1})["msg"]
                answers.append(time.monotonic() - began)
                if told != f"killed 1 running, dropped {count} waiting":
                    raise BenchError(f"the answer was {told}")
                wait_until(lambda: len(admin.results) > before + count, LIMIT, "the last result")
            connection.close()
        shown = ", ".join(f"{1000 * value:.0f} ms" for value in answers)
        took = statistics.median(answers)
        detail = f"/kill of a job with {count:,} runs that wait, to the answer: {shown}"
        self.row("drop", "<= 50 ms", f"{1000 * took:.0f} ms", took <= 0.05, detail)

    def start_of(self, name, fields, module):
        fresh, accepted, sent = [], [], []
        job = {"python": f"{module}:started", "pythonpath": [str(self.directory)], **fields}
        jobs = {"started": job}
        with self.admin("3.5") as admin, self.executor(admin, jobs) as (_, url, _):
            connection = http.client.HTTPConnection(url.partition("//")[2], timeout=10)
            for number in range(210):
                self.ids += 1
                body = {
                    "jobId": 1,
                    "logId": self.ids,
                    "executorHandler": "started",
                    "executorParams": "",
                    "executorBlockStrategy": "SERIAL_EXECUTION",
                    "executorTimeout": 0,
                    "glueType": "BEAN",
                    "logDateTime": int(time.time() * 1000),
                    "broadcastIndex": 0,
                    "broadcastTotal": 1,
                }
                data = json.dumps(body).encode()
                begin = time.time_ns()
                connection.request("POST", "/trigger", data, {"XXL-JOB-ACCESS-TOKEN": TOKEN})
                reply = connection.getresponse().read()
                answered = time.time_ns()
                if json.loads(reply)["code"] != 200 or not admin.wait(
                    lambda: self.ids in admin.results, 10
                ):
                    raise BenchError(f"run {number}: no result, the answer was {reply!r}")
                started = int(admin.results[self.ids][0]["handleMsg"])
                if number >= 10:
                    sent.append((started - begin) / 1e6)
                    accepted.append((started - answered) / 1e6)
                if number % 20 == 19:  # for comparison: what a new interpreter costs
                    begin = time.time_ns()
                    fresh.append(
                        (int(output_of("import time; print(time.time_ns())")) - begin) / 1e6
                    )
            connection.close()

        def shown(values):
            return (
                f"{statistics.median(values):.1f} ms, p95"
                f" {statistics.quantiles(values, n=20)[-1]:.1f} ms"
            )

        value = statistics.median(accepted)
        self.row(
            name,
            "<= 6 ms",
            f"{value:.1f} ms",
            value <= 6,
            f"from the answer: {shown(accepted)}; "
            f"from the sending: {shown(sent)}; a new interpreter: {shown(fresh)}",
        )

    def thread(self):
        """A function that does nothing, in a thread of the daemon; pyxxl's is a coroutine.

        pyxxl starts anew for each measurement: it keeps a logger for every run, and gets slower
        with their number. Few callers show how long an acceptance takes, which pyxxl does not
        store: each waits for a commit.
        """

        def other():
            with self.pyxxl(admin) as url:
                self.runs_per_second(admin, url, ["nothing"], 200, callers)
                return self.runs_per_second(admin, url, ["nothing"], 1500, callers)

        jobs = {
            "nothing": {
                "python": "bench_jobs:nothing",
                "isolation": "thread",
                "pythonpath": [str(self.directory)],
            }
        }
        with self.admin("3.3") as admin, self.executor(admin, jobs) as (_, url, _):
            self.runs_per_second(admin, url, ["nothing"], 500)
            for callers in (MANY_CALLERS, CALLERS):
                ours, theirs = in_turns(
                    5,
                    lambda: self.runs_per_second(admin, url, ["nothing"], 3000, callers),
                    other,
                )
                what = f"pyxxl {PYXXL}, async, log_target disk"
                self.ratio(f"thread, {callers} callers", 4.5, ours, theirs, "runs/s", what)

    def beat(self):
        """POST /beat on kept connections."""
        with (
            self.admin("3.3") as admin,
            self.executor(admin, {}) as (_, url, _),
            self.pyxxl(admin) as other,
        ):
            for place in (url, other):
                self.beats_per_second(place, 1)
            ours, theirs = in_turns(
                5, lambda: self.beats_per_second(url), lambda: self.beats_per_second(other)
            )
        self.ratio("beat", 1.65, ours, theirs, "requests/s", f"pyxxl {PYXXL}")

    def memory(self):
        """Resident sizes, and how soon the executor registers."""
        jobs = {
            "true": {"shell": "true"},
            "nothing": {"python": "bench_jobs:nothing", "pythonpath": [str(self.directory)]},
        }
        sizes, sums, delays, imports = [], [], [], []
        for _ in range(5):
            began = time.monotonic()
            output_of("import requests, yaml")
            imports.append(time.monotonic() - began)
            with self.admin("3.5") as admin, self.executor(admin, jobs) as (process, url, delay):
                wait_until(lambda: children_of(process.pid), 5, "the Python server")
                server = children_of(process.pid)[0]
                # Nothing tells when the start is over for good, so a moment for both.
                threading.Event().wait(0.5)
                sizes.append(rss(process.pid))
                sums.append(sizes[-1] + rss(server))
                delays.append(delay)
        size = statistics.median(sizes)
        self.row(
            "memory idle",
            "<= 33 MiB",
            f"{size:.1f} MiB",
            size <= 33,
            "daemon; with its Python server "
            f"{statistics.median(sums):.1f} MiB, shared pages counted twice",
        )
        delay, bare = statistics.median(delays), statistics.median(imports)
        self.row(
            "registration",
            "<= 2.5 times",
            f"{delay / bare:.2f} times",
            delay <= 2.5 * bare,
            f"from exec to the admin {delay:.2f} s, median of 5; an interpreter that imports"
            f" requests and yaml: {bare:.2f} s",
        )
        jobs["thread"] = {**jobs["nothing"], "isolation": "thread"}
        mix = ["thread"] * 47 + ["true"] * 2 + ["nothing"]
        with self.admin("3.5") as admin, self.executor(admin, jobs) as (process, url, _):
            before = rss(process.pid)
            self.runs_per_second(admin, url, mix, 2000)
            early = rss(process.pid)
            for _ in range(6):
                self.runs_per_second(admin, url, mix, 3000)
            late = rss(process.pid)
        self.row(
            "memory growth",
            "<= 6 MiB",
            f"{late - before:.1f} MiB",
            late - before <= 6,
            "20,000 runs (94 % thread, 4 % shell, 2 % process): "
            f"{before:.1f} MiB idle, {early:.1f} after 2,000, {late:.1f} after 20,000",
        )

    def logs(self):
        """A log of a million lines, page by page, against the whole file at once."""
        directory, lines = str(self.directory / "pages"), 1_000_000
        trigger = xxl_executor.Trigger(1, 1, "pages", log_date_time=int(time.time() * 1000))
        out = xxl_executor.JobLogs(directory, 1 << 30, 86_400).open(trigger)
        for first in range(0, lines, 1000):
            part = [
                f"2024-02-29 12:00:00 INFO line {first + i:7d} of the log\n" for i in range(1000)
            ]
            out.write("".join(part).encode())
        out.end("succeeded")
        file = next(Path(directory).glob("*/1.log"))

        def pages():
            reader, next_line, size = xxl_executor.JobLogs(directory, 1 << 30, 86_400), 1, 0
            began = time.perf_counter()
            while True:
                page = reader.page(1, trigger.log_date_time, next_line, ended=False, limit=46_000)
                next_line, size = page["toLineNum"] + 1, size + len(page["logContent"])
                if page["toLineNum"] < page["fromLineNum"]:
                    break
            took = time.perf_counter() - began
            if next_line < lines or size != file.stat().st_size:
                raise BenchError(
                    f"the pages end at line {next_line} with {size} of {file.stat().st_size} bytes"
                )
            return took

        def straight():
            began = time.perf_counter()
            with open(file, "rb") as stream:
                found = stream.read().decode("utf-8", "replace").splitlines()
            took = time.perf_counter() - began
            if len(found) < lines:
                raise BenchError(f"{len(found)} lines were written")
            return took

        ours, whole = in_turns(5, pages, straight)
        shutil.rmtree(directory)
        value = statistics.median(ours) / statistics.median(whole)
        self.row(
            "logs",
            "<= 3 times",
            f"{value:.2f} times",
            value <= 3,
            f"{lines:,} lines in pages of 1,000: {statistics.median(ours):.3f} s; open, read,"
            f" decode, splitlines: {statistics.median(whole):.3f} s",
        )

    def ratio(self, name, target, ours, other, unit, what):
        value = statistics.median(ours) / statistics.median(other)
        self.row(
            name,
            f">= {target:g}",
            f"{value:.2f}",
            value >= target,
            f"{listed(ours)} {unit} against {listed(other)}, {what}",
        )


def listed(values):
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def pyxxl_python():
    """The interpreter of an environment with pyxxl, kept in the system's directory for temporary
    files."""
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    place = Path(tempfile.gettempdir()) / f"xxl-executor-bench-pyxxl-{PYXXL}-{python}-{os.getuid()}"
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        print(f"installing pyxxl {PYXXL} into {place}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, timeout=120)
        subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                f"pyxxl=={PYXXL}",
            ],
            check=True,
            timeout=300,
        )
        (place / "complete").touch()
    return python


def filesystem(directory):
    """The type of the file system that holds `directory`."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    around = [
        (len(point), kind)
        for point, kind in mounts
        if os.path.commonpath([point, str(directory)]) == point
    ]
    return max(around)[1]


@contextlib.contextmanager
def fresh_disk(directory):
    """A new ext4 below `directory`, or that itself: there the creation of files may be ten times
    slower, after thousands of deletions. Nothing is deleted on it, for the same reason."""
    image, point = directory / "ext4.img", directory / "ext4"
    point.mkdir()
    with open(image, "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 2 << 30)
    steps = (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(point)])
    try:
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no file system of its own, a worn one may be slower: {error}", flush=True)
        yield directory
        return
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True, timeout=60)


def place_on_disk(asked):
    """Where the data goes: FULL in memory would be no FULL."""
    for place in [asked] if asked else [tempfile.gettempdir(), "/var/tmp", str(Path.home())]:
        if os.access(place, os.W_OK) and filesystem(os.path.realpath(place)) not in (
            "tmpfs",
            "ramfs",
        ):
            return place
    raise BenchError("no directory on a disk: give one with --directory")


def syncs_per_second(directory):
    with open(directory / "sync", "wb", buffering=0) as stream:
        began, count = time.monotonic(), 0
        while time.monotonic() - began < 1:
            stream.write(bytes(4096))
            os.fdatasync(stream.fileno())
            count += 1
    os.unlink(directory / "sync")
    return count / (time.monotonic() - began)


def machine(directory):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    syncs = syncs_per_second(directory)
    model, load = models[0] if models else platform.machine(), os.getloadavg()[0]
    return [
        ("CPU", f"{model}, {os.cpu_count()} cores, load {load:.2f} at the start"),
        ("kernel", platform.release()),
        ("Python", platform.python_version()),
        ("SQLite", sqlite3.sqlite_version),
        ("disk", f"{filesystem(directory)}, {syncs:,.0f} fdatasync/s of 4 KiB, one at a time"),
    ]


def show(head, rows):
    print("\n".join(["", *xxl_executor.table(head, rows)]))


def main():
    names = ("shell", "python-start", "preload", "thread", "beat", "loud", "drop", "memory", "logs")
    parser = argparse.ArgumentParser(description=textwrap.fill(__doc__.splitlines()[0]))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--directory", help="where the data goes, on a disk; default: that of temporary files"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names)
    if unknown:
        parser.error(f"no such bench: {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    wanted = [name for name in names if name in (arguments.names or names)]
    if not shutil.which("wrk") and set(wanted) & {"shell", "thread", "beat", "memory"}:
        parser.error("wrk is missing, the load generator: apt-get install wrk")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    failed, began = 0, time.monotonic()
    with (
        tempfile.TemporaryDirectory(
            prefix="xxl-bench-", dir=place_on_disk(arguments.directory)
        ) as directory,
        fresh_disk(Path(directory)) as directory,
    ):
        figures = machine(directory)
        if set(wanted) & {"thread", "beat"}:
            pyxxl_python()
        bench = Bench(directory)
        for name in wanted:
            try:
                getattr(bench, name.replace("-", "_"))()
            except (BenchError, OSError, subprocess.SubprocessError) as error:
                failed += 1
                bench.rows.append((name, "", "", "FAILED", " ".join(str(error).split())[:200]))
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
    show(("BENCH", "TARGET", "MEASURED", "", "DETAILS"), bench.rows)
    show(("MACHINE", ""), [*figures, ("took", f"{time.monotonic() - began:.0f} s")])
    return 1 if failed or any(row[3] == "MISSED" for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
