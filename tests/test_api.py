"""The executor API: what the admin may send, what is refused with which words, tokens, and the
operators' paths."""

import http.client
import itertools
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Executor, run_job, wait_until

import xxl_executor

ALIVE = {"code": 200, "msg": None, "content": None, "data": None}
TOKEN = "a-token-that-nobody-guesses"
WRONG_TOKEN = (
    "The access token is wrong: give admin and executor the same xxl.job.accessToken /"
    " admin.access_token."
)
BUSY = "job thread is running or has trigger queue."
RUN_PATHS = ["/run", "/trigger"]
JSON_PATHS = ["/idleBeat", "/run", "/trigger", "/kill", "/log"]
POST_PATHS = ["/beat", *JSON_PATHS]
NUMBERS = [
    "jobId",
    "logId",
    "executorTimeout",
    "broadcastIndex",
    "broadcastTotal",
    "logDateTime",
    "logDateTim",
]
JOBS = {
    "count": {"shell": 'echo "$XXL_JOB_LOG_ID" >> ran'},
    "arguments": {"shell": 'echo "$1|$2|$3" > "arguments.$XXL_JOB_LOG_ID"'},
    "hold": {
        "shell": (
            'echo "start $XXL_JOB_LOG_ID" >> held; while [ ! -e "go.$XXL_JOB_ID" ]; do sleep 0.02;'
            ' done; echo "end $XXL_JOB_LOG_ID" >> held'
        ),
        "kill_grace": "0.2s",
        "timeout": "60s",
    },
    'say "\\"\n': {"shell": "true"},
    "secret": {"shell": 'test -n "$1"'},
}
job_ids = itertools.count(100)
log_ids = itertools.count(1000)


def failure(text):
    return {"code": 500, "msg": text, "content": None, "data": None}


class Caller:
    """Calls a daemon, each time over a new connection; keeps nothing open."""

    def __init__(self, daemon):
        self.port, self.directory, self.daemon = daemon.port, daemon.directory, daemon

    def request(self, method, path, body=b"", headers=()):
        """(status, body); `headers` are pairs, so that one may come twice."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path)
            connection.putheader("Content-Length", str(len(body)))
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(body)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def post(self, path, body=None, headers=()):
        """The envelope of a POST, which is HTTP 200 whatever comes; `body` is JSON, or bytes as
        they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, reply = self.request("POST", path, data, headers)
        assert status == 200, reply
        found = json.loads(reply)
        assert (
            sorted(found) == ["code", "content", "data", "msg"]
            and found["content"] == found["data"]
        )
        return found

    def run(self, handler, path="/run", **fields):
        return self.post(
            path,
            {"jobId": next(job_ids), "logId": next(log_ids), "executorHandler": handler, **fields},
        )

    def idle(self, job_id):
        reply = self.post("/idleBeat", {"jobId": job_id})
        assert reply in (ALIVE, failure(BUSY))
        return reply == ALIVE

    def wait_idle(self, job_id):
        wait_until(lambda: self.idle(job_id), 20, f"the end of job {job_id}")

    def ends(self, handler):
        """{result code: how many runs}."""
        _, samples = parse_metrics(self.request("GET", "/metrics")[1].decode())
        return {
            labels[1][1]: int(value)
            for (name, labels), value in samples.items()
            if name == "xxl_executor_runs_total" and dict(labels)["handler"] == handler
        }

    def lines(self, name):
        file = self.directory / name
        return file.read_text().splitlines() if file.exists() else []

    def release(self, job_id):
        (self.directory / f"go.{job_id}").touch()


def start(factory, name, jobs, token=""):
    executor = {"bind": "127.0.0.1:0", "app_name": "billing", "drain_timeout": "0s"}
    config = {"admin": {"addresses": [], "access_token": token}, "executor": executor, "jobs": jobs}
    return Executor(factory.mktemp(name), config).start()


def stop(daemon):
    daemon.close()
    wait_until(lambda: not daemon.family(), 5, "the end of every process")
    assert not re.search(r"ResourceWarning|Traceback|unexpected", daemon.log), daemon.log


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """A daemon without a token."""
    daemon = start(tmp_path_factory, "api", JOBS)
    yield Caller(daemon)
    stop(daemon)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A daemon with a token."""
    daemon = start(tmp_path_factory, "guarded", JOBS, TOKEN)
    yield Caller(daemon)
    stop(daemon)


@pytest.fixture
def quiet(api):
    """Fails when what a test sends makes the daemon report an error."""
    before = len(api.daemon.log)
    yield api
    assert not re.search(r"Traceback|unexpected| ERROR ", api.daemon.log[before:]), api.daemon.log[
        before:
    ]


# -- the protocol paths


@pytest.mark.parametrize("path", RUN_PATHS)
def test_both_run_paths(api, path):
    job_id, log_id = next(job_ids), next(log_ids)
    assert api.run("count", path, jobId=job_id, logId=log_id) == ALIVE
    api.wait_idle(job_id)
    assert api.lines("ran").count(str(log_id)) == 1


def test_idle_beat_and_kill(api):
    """Busy is the job, not the executor: another jobId of the same handler is idle."""
    job_id, first, second = next(job_ids), next(log_ids), next(log_ids)
    assert api.post("/kill", {"jobId": job_id}) == {**ALIVE, "msg": "nothing was running"}
    assert api.idle(job_id)
    assert api.run("hold", jobId=job_id, logId=first) == ALIVE
    assert api.post("/idleBeat", {"jobId": job_id}) == failure(BUSY)
    assert api.run("hold", jobId=job_id, logId=second) == ALIVE
    wait_until(lambda: f"start {first}" in api.lines("held"), what="the start of the job")
    assert api.idle(next(job_ids))
    assert api.post("/kill", {"jobId": job_id}) == {
        **ALIVE,
        "msg": "killed 1 running, dropped 1 waiting",
    }
    api.wait_idle(job_id)
    assert api.post("/kill", {"jobId": job_id}) == {**ALIVE, "msg": "nothing was running"}
    held = api.lines("held")
    assert f"end {first}" not in held and f"start {second}" not in held


def test_the_payload_is_under_both_names(api):
    """`content` up to 3.2, `data` from 3.3; `Caller.post` compares the two."""
    job_id, log_id = next(job_ids), next(log_ids)
    assert api.run("count", jobId=job_id, logId=log_id, logDateTime=1_700_000_000_000) == ALIVE
    api.wait_idle(job_id)
    for name in ("logDateTim", "logDateTime"):
        page = api.post("/log", {"logId": log_id, name: 1_700_000_000_000, "fromLineNum": 1})
        assert (page["code"], page["msg"]) == (200, None)
        assert sorted(page["data"]) == ["fromLineNum", "isEnd", "logContent", "toLineNum"]
        assert page["data"]["isEnd"] is True and "no log" not in page["data"]["logContent"]


# -- numbers


@pytest.mark.parametrize(
    "text, shown",
    [
        ('"1_0"', '"1_0"'),
        ("1e30", "1e+30"),
        ("true", "true"),
        ('"٣"', '"\\u0663"'),
        ('" 7 "', '" 7 "'),
        ("1.5", "1.5"),
        ('"1.0"', '"1.0"'),
        ('""', '""'),
        ('"+1"', '"+1"'),
        ('"7\\n"', '"7\\n"'),
        ("[1]", "[1]"),
        ('{"a":1}', '{"a": 1}'),
        ("9223372036854775808", "9223372036854775808"),
        ("-9223372036854775809", "-9223372036854775809"),
        ('"9223372036854775808"', "9223372036854775808"),
        ('"' + "9" * 400 + '"', '"' + "9" * 99),
        ("1e400", "Infinity"),
        ("9" * 4000, "9" * 100),
        ("NaN", "NaN"),
        ("9007199254740994.0", "9007199254740994.0"),
    ],
)
def test_numbers_that_are_none(quiet, text, shown):
    """Each path and field says which field, and shows what it got."""
    expected = "expected a whole number of 64 bits, got " + shown
    for path in ("/idleBeat", "/kill"):
        assert quiet.post(path, f'{{"jobId":{text}}}'.encode()) == failure(f"jobId: {expected}")
    assert quiet.post("/log", f'{{"logId":{text},"fromLineNum":1}}'.encode()) == failure(
        f"logId: {expected}"
    )
    assert quiet.post("/log", f'{{"logId":1,"fromLineNum":{text}}}'.encode()) == failure(
        f"fromLineNum: {expected}"
    )
    for name in NUMBERS:
        fields = ",".join(
            f'"{key}":{value}' for key, value in {"jobId": 1, "logId": 1, name: text}.items()
        )
        for path in RUN_PATHS:
            body = f'{{"executorHandler":"count",{fields}}}'.encode()
            assert quiet.post(path, body) == failure(f"{name}: {expected}")


@pytest.mark.parametrize("fields", [{}, {"jobId": None, "logId": None}], ids=["missing", "null"])
def test_numbers_that_are_missing(quiet, fields):
    text = "missing, expected a whole number"
    for path in ("/idleBeat", "/kill", *RUN_PATHS):
        assert quiet.post(path, {"executorHandler": "count", **fields}) == failure(f"jobId: {text}")
    assert quiet.post("/log", fields) == failure(f"logId: {text}")
    for path in RUN_PATHS:
        assert quiet.post(path, {"executorHandler": "count", "jobId": 1}) == failure(
            f"logId: {text}"
        )


@pytest.mark.parametrize("text", ['"%d"', "%d.0", "%d", "%de0"])
def test_numbers_in_other_clothes(api, text):
    """Accepted, and equal to the plain number: busy under it."""
    job_id, log_id = next(job_ids), next(log_ids)
    body = f'{{"executorHandler":"hold","jobId":{text % job_id},"logId":{text % log_id},"executorTimeout":{text % 60}}}'
    assert api.post("/run", body.encode()) == ALIVE
    assert not api.idle(job_id)
    assert api.post("/idleBeat", f'{{"jobId":{text % job_id}}}'.encode()) == failure(BUSY)
    api.release(job_id)
    api.wait_idle(job_id)
    assert f"end {log_id}" in api.lines("held")


@pytest.mark.parametrize("number", [(1 << 63) - 1, -(1 << 63), 0, -1])
def test_the_borders_of_int64(quiet, number):
    """As jobId and logId, as number and text, and the run is known under them afterwards."""
    for text in (str(number), f'"{number}"'):
        trigger = f'{{"executorHandler":"count","jobId":{text},"logId":{text}}}'.encode()
        assert quiet.post("/run", trigger) == ALIVE
        quiet.wait_idle(number)
        page = quiet.post(
            "/log", f'{{"logId":{text},"logDateTim":{text},"fromLineNum":{text}}}'.encode()
        )
        assert (
            page["code"] == 200
            or page["msg"] == f"logDateTime: {number} is no time in ms since 1970"
        )
    assert quiet.lines("ran").count(str(number)) == 1  # the second was a repeated trigger


@pytest.mark.parametrize(
    "seconds", [-1, -(1 << 63), 0, None, 2_147_484, 3_000_000, 1 << 40, (1 << 63) - 1]
)
def test_any_executor_timeout(quiet, seconds):
    """Negative and 0: none. And no number of seconds is too long for the calls that wait."""
    job_id, log_id = next(job_ids), next(log_ids)
    assert quiet.run("hold", jobId=job_id, logId=log_id, executorTimeout=seconds) == ALIVE
    wait_until(lambda: f"start {log_id}" in quiet.lines("held"), what="the start of the job")
    quiet.release(job_id)
    quiet.wait_idle(job_id)
    assert f"end {log_id}" in quiet.lines("held")


@pytest.mark.parametrize("seconds", [3_000_000, (1 << 63) - 1])
def test_no_timeout_is_too_long(executor, tmp_path, seconds):
    """2,147,483 s is the longest that poll() takes; the admin's timeout and the job's own may both
    be longer."""
    (tmp_path / "worker.py").write_text("def main():\n    return 'done'\n")
    python = {"python": "worker:main", "pythonpath": [str(tmp_path)]}
    daemon = executor(
        {
            "none": {"shell": "echo done"},
            "own": {"shell": "echo done", "timeout": "30d"},
            "python": python,
            "thread": {**python, "isolation": "thread"},
        }
    )
    for number, handler in enumerate(("none", "own", "python", "thread")):
        trigger = {
            "jobId": number,
            "logId": number,
            "executorHandler": handler,
            "executorTimeout": seconds,
        }
        assert daemon.post("/run", trigger) == ALIVE
        wait_until(
            lambda: daemon.post("/idleBeat", {"jobId": number}) == ALIVE, 20, "the end of the job"
        )
    assert daemon.status()["recent"] == {
        "none": [200],
        "own": [200],
        "python": [200],
        "thread": [200],
    }


def test_log_pages_beyond_every_border(quiet):
    job_id, log_id = next(job_ids), next(log_ids)
    assert quiet.run("count", jobId=job_id, logId=log_id, logDateTime=1_700_000_000_000) == ALIVE
    quiet.wait_idle(job_id)
    most, least = (1 << 63) - 1, -(1 << 63)
    page = quiet.post(
        "/log", {"logId": log_id, "logDateTim": 1_700_000_000_000, "fromLineNum": most}
    )["data"]
    assert page == {"fromLineNum": most, "toLineNum": most - 1, "logContent": "", "isEnd": True}
    page = quiet.post(
        "/log", {"logId": log_id, "logDateTim": 1_700_000_000_000, "fromLineNum": least}
    )["data"]
    assert page["fromLineNum"] == 1 and page["toLineNum"] >= 1
    for date in (most, least):
        reply = quiet.post("/log", {"logId": log_id, "logDateTim": date, "fromLineNum": 1})
        assert reply == failure(f"logDateTime: {date} is no time in ms since 1970")


# -- bodies


def unreadable():
    short, most = "the body is not JSON: ", getattr(sys, "get_int_max_str_digits", lambda: 0)()
    start = "line 1 column 1 (char 0)"
    no_utf8 = short + "'utf-8' codec can't decode byte 0xff in position %d: invalid start byte"
    yield "empty", b"", short + f"Expecting value: {start}"
    yield "words", b"jobId=1", short + f"Expecting value: {start}"
    yield "cut", b'{"jobId":', short + "Expecting value: line 1 column 10 (char 9)"
    yield "more", b'{"jobId":1}}', short + "Extra data: line 1 column 12 (char 11)"
    yield (
        "quotes",
        b"{'jobId':1}",
        (short + "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    )
    yield "not-utf-8", b'{"jobId":"\xff"}', no_utf8 % 10
    yield "utf-16", b'\xff\xfe{\0"\0', no_utf8 % 0
    yield (
        "bom",
        b'\xef\xbb\xbf{"jobId":1}',
        short + f"Unexpected UTF-8 BOM (decode using utf-8-sig): {start}",
    )
    yield "null", b"null", "expected a JSON object, got null"
    yield "number", b"1", "expected a JSON object, got 1"
    yield "list", b'[{"jobId":1}]', 'expected a JSON object, got [{"jobId": 1}]'
    yield "text", b'"' + b"x" * 200 + b'"', 'expected a JSON object, got "' + "x" * 99
    yield "deep-lists", b"[" * 100_000, "the body is nested too deeply"
    yield "deep-objects", b'{"jobId":' * 100_000, "the body is nested too deeply"
    yield (
        "deep-and-whole",
        b'{"jobId":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "the body is nested too deeply",
    )
    if most:
        yield (
            "5000-digits",
            b'{"jobId":' + b"9" * 5000 + b"}",
            "the body holds a number of too many digits",
        )


@pytest.mark.parametrize(
    "body, text", [pytest.param(body, text, id=name) for name, body, text in unreadable()]
)
def test_bodies_that_cannot_be_read(quiet, body, text):
    for path in JSON_PATHS:
        assert quiet.post(path, body) == failure(text)
    assert quiet.post("/beat", body) == ALIVE  # a heartbeat has no body to read


def test_no_depth_of_nesting_is_an_error_of_the_executor(quiet):
    """What can just be read must also be shown: every depth about the interpreter's limit."""
    low, high = 100, 100_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            json.loads("[" * middle + "]" * middle)
            low = middle
        except RecursionError:
            high = middle
    shown, found = "[" * 100, set()
    expected = {
        "the body is nested too deeply",
        f"expected a JSON object, got {shown}",
        f"jobId: expected a whole number of 64 bits, got {shown}",
    }
    for depth in (100, *range(low - 60, low + 60), 100_000):
        for body in ("[" * depth + "]" * depth, '{"jobId":' + "[" * depth + "]" * depth + "}"):
            reply = quiet.post("/kill", body.encode())
            assert reply == failure(reply["msg"])
            found.add(reply["msg"])
    assert found == expected


@pytest.mark.parametrize(
    "name", ["executorHandler", "executorParams", "executorBlockStrategy", "glueType"]
)
@pytest.mark.parametrize("value", [5, True, ["count"], {"a": "b"}, 1.5], ids=str)
def test_text_that_is_none(quiet, name, value):
    for path in RUN_PATHS:
        reply = quiet.run("count", path, **{name: value})
        assert reply == failure(f"{name}: expected text, got {json.dumps(value)}")


# -- handlers


@pytest.mark.parametrize(
    "handler, near",
    [
        ("cuont", "count"),
        ("Count", "count"),
        ("argument", "arguments"),
        ("nothing-like-it", None),
        ("", None),
        (None, None),
        ("报表", None),
        ("\ud800", None),
        ("count\0", "count"),
        ("x" * 10_000, None),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_unknown_handlers(quiet, handler, near):
    hint = f', did you mean "{near}"?' if near else f": add it under jobs in {quiet.daemon.file}"
    shown = (handler or "").replace("\ud800", "?")[:100]
    for path in RUN_PATHS:
        assert quiet.run(handler, path) == failure(f'job handler "{shown}" not found{hint}')


@pytest.mark.parametrize(
    "kind",
    [
        "GLUE_SHELL",
        "GLUE_PYTHON",
        "GLUE_PYTHON2",
        "GLUE_NODEJS",
        "GLUE_PHP",
        "GLUE_POWERSHELL",
        "GLUE_GROOVY",
    ],
)
def test_scripts_of_the_admin_are_refused(quiet, kind):
    """Also under the name of a job that exists."""
    for handler in ("", "count"):
        log_id = next(log_ids)
        reply = quiet.run(
            handler,
            logId=log_id,
            glueType=kind,
            glueSource=f"echo {log_id} >> ran",
            glueUpdatetime=1,
        )
        assert reply == failure(
            "GLUE_GROOVY: Groovy runs inside the Java executor only: choose another language, or a"
            " script of this host"
            if kind == "GLUE_GROOVY"
            else (
                f"{kind}: scripts from the admin are not enabled here: write the script to this"
                " host, list it under jobs in the configuration and choose BEAN with its name as"
                " JobHandler, or set glue.enabled: true"
            )
        )
        assert str(log_id) not in quiet.lines("ran")


# -- fields

OPTIONAL = [
    "executorParams",
    "executorBlockStrategy",
    "executorTimeout",
    "logDateTime",
    "glueType",
    "glueSource",
    "glueUpdatetime",
    "broadcastIndex",
    "broadcastTotal",
]


@pytest.mark.parametrize("fields", [{}, dict.fromkeys(OPTIONAL)], ids=["left-out", "null"])
def test_optional_fields_null_and_left_out(api, fields):
    job_id, log_id = next(job_ids), next(log_ids)
    assert api.run("arguments", jobId=job_id, logId=log_id, **fields) == ALIVE
    api.wait_idle(job_id)
    assert api.lines(f"arguments.{log_id}") == ["|0|1"]


def test_all_fields_and_unknown_ones(api):
    job_id, log_id = next(job_ids), next(log_ids)
    known = {
        "executorParams": "a 'b' $c 报表",
        "broadcastIndex": 2,
        "broadcastTotal": 7,
        "glueType": "BEAN",
        "glueSource": "",
        "glueUpdatetime": 1_700_000_000_000,
        "executorBlockStrategy": "SERIAL_EXECUTION",
        "executorTimeout": 30,
        "logDateTime": 1_700_000_000_000,
    }
    unknown = {"futureField": {"a": [1, None, {"b": "c"}]}, "job_id": "x", "another": None}
    assert api.run("arguments", jobId=job_id, logId=log_id, **known, **unknown) == ALIVE
    api.wait_idle(job_id)
    assert api.lines(f"arguments.{log_id}") == ["a 'b' $c 报表|2|7"]
    assert api.post("/kill", {"jobId": job_id, "futureField": []}) == {
        **ALIVE,
        "msg": "nothing was running",
    }


@pytest.mark.parametrize(
    "strategy", ["SERIAL_EXECUTION", "SOMETHING_NEW", "discard_later", "", None]
)
def test_serial_is_the_strategy_when_no_other_is_known(api, strategy):
    job_id, logs = next(job_ids), [next(log_ids) for _ in range(3)]
    for log_id in logs:
        assert api.run("hold", jobId=job_id, logId=log_id, executorBlockStrategy=strategy) == ALIVE
    api.release(job_id)
    api.wait_idle(job_id)
    own = [line for line in api.lines("held") if int(line.split()[1]) in logs]
    assert own == [f"{what} {log_id}" for log_id in logs for what in ("start", "end")]


# -- repeated logIds


@pytest.mark.parametrize("strategy", ["SERIAL_EXECUTION", "DISCARD_LATER", "COVER_EARLY"])
def test_a_repeated_log_id_runs_once(api, strategy):
    """While it runs, while it waits, after its end, behind another run: answered 200, starts and
    covers nothing."""
    job_id, log_id, ends = next(job_ids), next(log_ids), api.ends("hold")

    def again(path="/run"):
        assert (
            api.run("hold", path, jobId=job_id, logId=log_id, executorBlockStrategy=strategy)
            == ALIVE
        )

    again()
    again()
    wait_until(lambda: f"start {log_id}" in api.lines("held"), what="the start of the job")
    again("/trigger")
    waiting = next(log_ids)
    for _ in range(2):
        assert api.run("hold", jobId=job_id, logId=waiting) == ALIVE
    api.release(job_id)
    api.wait_idle(job_id)
    again()
    assert api.idle(job_id)
    # While another run of the job holds the lane, too.
    (api.directory / f"go.{job_id}").unlink()
    other = next(log_ids)
    assert api.run("hold", jobId=job_id, logId=other) == ALIVE
    wait_until(lambda: f"start {other}" in api.lines("held"), what="the start of the other run")
    again()
    api.release(job_id)
    api.wait_idle(job_id)
    own = [line for line in api.lines("held") if int(line.split()[1]) in (log_id, waiting, other)]
    assert own == [
        f"{what} {number}" for number in (log_id, waiting, other) for what in ("start", "end")
    ]
    assert api.ends("hold") == {**ends, "200": ends.get("200", 0) + 3}


@pytest.mark.parametrize("strategy", ["SERIAL_EXECUTION", "DISCARD_LATER", "COVER_EARLY"])
def test_the_same_log_id_from_many_threads_runs_once(api, strategy):
    """The journal decides, not the moment: all are answered 200. Some come while the run is being
    accepted, some after its end, so it takes many rounds to meet every order of events."""
    job_id, callers, ends = next(job_ids), 12, api.ends("count")
    logs = [next(log_ids) for _ in range(40)]
    together = threading.Barrier(callers)

    def send(log_id):
        together.wait(20)
        return api.run("count", jobId=job_id, logId=log_id, executorBlockStrategy=strategy)

    with ThreadPoolExecutor(callers) as pool:
        for log_id in logs:
            assert list(pool.map(send, [log_id] * callers)) == [ALIVE] * callers
            api.wait_idle(job_id)
    ran = api.lines("ran")
    assert [ran.count(str(log_id)) for log_id in logs] == [1] * len(logs)
    assert api.ends("count") == {**ends, "200": ends.get("200", 0) + len(logs)}


def test_the_same_log_id_for_two_jobs_runs_once(api):
    """A logId is the admin's primary key; whichever came first has it."""
    first, second, log_id = next(job_ids), next(job_ids), next(log_ids)
    for job_id in (first, second):
        assert api.run("count", jobId=job_id, logId=log_id) == ALIVE
    api.wait_idle(first)
    api.wait_idle(second)
    assert api.lines("ran").count(str(log_id)) == 1


# -- tokens and the app name


def flipped(text, at):
    return "".join(chr(ord(c) ^ 1) if i == at % len(text) else c for i, c in enumerate(text))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([], id="missing"),
        pytest.param([""], id="empty"),
        pytest.param(["wrong"], id="wrong"),
        pytest.param([TOKEN, TOKEN], id="doubled"),
        pytest.param(["wrong", TOKEN], id="right-after-wrong"),
        pytest.param([TOKEN, "wrong"], id="wrong-after-right"),
        pytest.param([flipped(TOKEN, 0)], id="first-byte"),
        pytest.param([flipped(TOKEN, -1)], id="last-byte"),
        pytest.param([TOKEN[:-1]], id="too-short"),
        pytest.param([TOKEN + "x"], id="too-long"),
        pytest.param([TOKEN.upper()], id="upper-case"),
        pytest.param(["tökén".encode()], id="not-ascii"),
        pytest.param([b"\xff"], id="not-utf-8"),
    ],
)
def test_wrong_tokens_are_refused(guarded, given):
    """Before anything of the body is looked at, and a trigger starts nothing."""
    log_id = next(log_ids)
    headers = [("XXL-JOB-ACCESS-TOKEN", value) for value in given]
    for path in POST_PATHS:
        trigger = {"jobId": 1, "logId": log_id, "executorHandler": "count"}
        assert guarded.post(path, trigger, headers) == failure(WRONG_TOKEN)
        assert guarded.post(path, b"no JSON", headers) == failure(WRONG_TOKEN)
    status, body = guarded.request("GET", "/status", headers=headers)
    assert (status, json.loads(body)) == (403, failure(WRONG_TOKEN))
    for path in ("/health", "/metrics"):
        assert guarded.request("GET", path, headers=headers)[0] == 200
    good = [("XXL-JOB-ACCESS-TOKEN", TOKEN)]
    assert guarded.post("/idleBeat", {"jobId": 1}, good) == ALIVE
    assert str(log_id) not in guarded.lines("ran")
    assert TOKEN[1:-1] not in guarded.daemon.log


@pytest.mark.parametrize(
    "name", ["XXL-JOB-ACCESS-TOKEN", "xxl-job-access-token", "Xxl-Job-Access-Token"]
)
def test_the_right_token(guarded, name):
    job_id, log_id = next(job_ids), next(log_ids)
    good = [(name, TOKEN)]
    assert (
        guarded.post("/run", {"jobId": job_id, "logId": log_id, "executorHandler": "count"}, good)
        == ALIVE
    )
    wait_until(
        lambda: guarded.post("/idleBeat", {"jobId": job_id}, good) == ALIVE,
        what="the end of the job",
    )
    assert guarded.lines("ran").count(str(log_id)) == 1
    assert guarded.post("/beat", b"", good) == ALIVE
    assert guarded.post("/kill", {"jobId": job_id}, good)["msg"] == "nothing was running"
    assert guarded.post("/log", {"logId": log_id}, good)["code"] == 200
    status, body = guarded.request("GET", "/status", headers=good)
    assert status == 200 and json.loads(body)["app"] == "billing"


def test_a_token_nobody_asked_for(api):
    """An executor without a token takes every one, and none."""
    for given in ([], ["x"], ["x", "y"]):
        assert api.post("/beat", b"", [("XXL-JOB-ACCESS-TOKEN", value) for value in given]) == ALIVE


@pytest.mark.parametrize("sent", ["accounting", "", "Billing", "billing2"])
def test_another_app_name_is_refused(guarded, sent):
    token = ("XXL-JOB-ACCESS-TOKEN", TOKEN)
    text = f"this executor is billing, not {sent}: check its address in the admin"
    for names in ([sent], ["billing", sent], [sent, "billing"]):
        headers = [token, *(("XXL-JOB-APPNAME", name) for name in names)]
        for path in POST_PATHS:
            assert guarded.post(
                path, {"jobId": 1, "logId": 1, "executorHandler": "count"}, headers
            ) == failure(text)
        status, body = guarded.request("GET", "/status", headers=headers)
        assert (status, json.loads(body)) == (403, failure(text))
    # Who has no token learns nothing of the name.
    assert guarded.post("/beat", b"", [("XXL-JOB-APPNAME", sent)]) == failure(WRONG_TOKEN)


def test_the_right_app_name(api, guarded):
    name = ("xxl-job-appname", "billing")
    assert guarded.post("/beat", b"", [("XXL-JOB-ACCESS-TOKEN", TOKEN), name]) == ALIVE
    assert api.post("/beat", b"", [name]) == ALIVE
    assert api.post("/beat", b"", []) == ALIVE  # before 3.5 none is sent


# -- the operators' paths


def parse_metrics(text):
    """{(name, ((label, value), ...)): number} of Prometheus text; fails where a scraper would, or
    might."""
    name, number = (
        r"[a-zA-Z_:][a-zA-Z0-9_:]*",
        r"[+-]?(?:[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|Inf|NaN)",
    )
    label = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
    assert text.endswith("\n")
    helped, kinds, samples, family = set(), {}, {}, None
    for line in text[:-1].split("\n"):
        found = re.fullmatch(f"# HELP ({name}) (\\S.*)", line)
        if found:
            assert found[1] not in helped, f"HELP twice: {line}"
            helped.add(found[1])
            family = found[1]
            continue
        found = re.fullmatch(f"# TYPE ({name}) (counter|gauge|histogram)", line)
        if found:
            assert found[1] == family and found[1] not in kinds, (
                f"TYPE without its HELP, or twice: {line}"
            )
            kinds[family] = found[2]
            continue
        found = re.fullmatch(f"({name})(?:{{({label}(?:,{label})*)}})? ({number})", line)
        assert found, f"no sample: {line!r}"
        suffixes = ("_bucket", "_sum", "_count") if kinds[family] == "histogram" else ("",)
        assert found[1] in [family + suffix for suffix in suffixes], f"{line} is not below its TYPE"
        assert kinds[family] != "counter" or family.endswith("_total")
        labels = tuple(
            (key, re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value))
            for key, value in re.findall(r'([a-zA-Z0-9_]+)="((?:[^"\\]|\\.)*)"', found[2] or "")
        )
        assert len(dict(labels)) == len(labels) and (found[1], labels) not in samples, (
            f"twice: {line}"
        )
        samples[found[1], labels] = float(found[3])
    assert helped == kinds.keys()
    for family in [name for name, kind in kinds.items() if kind == "histogram"]:
        series = {}
        for (name, labels), value in samples.items():
            if name == family + "_bucket":
                bound = float(dict(labels)["le"])
                series.setdefault(labels[:-1], []).append((bound, value))
        for labels, buckets in series.items():
            bounds, counts = zip(*buckets)
            assert list(bounds) == sorted(set(bounds)) and bounds[-1] == float("inf")
            assert list(counts) == sorted(counts), "buckets are cumulative"
            assert counts[-1] == samples[family + "_count", labels]
            assert (family + "_sum", labels) in samples
    return kinds, samples


def test_metrics_are_prometheus_text_and_say_nothing_of_parameters(executor, admin):
    daemon = executor(JOBS, admin=admin)
    for handler, count in (('say "\\"\n', 2), ("count", 3), ("secret", 1)):
        for _ in range(count):
            run_job(daemon, admin, handler, executorParams="p4ssw0rd")
    assert run_job(daemon, admin, "secret", executorParams="")[1]["handleCode"] == 500
    assert admin.trigger(daemon.url, "p4ssw0rd")[1]["code"] == 500
    reply = daemon.session.get(daemon.url + "/metrics", timeout=20)
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    kinds, samples = parse_metrics(reply.text)
    runs = {
        labels: value
        for (name, labels), value in samples.items()
        if name == "xxl_executor_runs_total"
    }
    assert runs == {
        (("handler", 'say "\\"\n'), ("code", "200")): 2,
        (("handler", "count"), ("code", "200")): 3,
        (("handler", "secret"), ("code", "200")): 1,
        (("handler", "secret"), ("code", "500")): 1,
    }
    for handler, count in (('say "\\"\n', 2), ("count", 3), ("secret", 2)):
        label = (("handler", handler),)
        assert samples["xxl_executor_run_duration_seconds_count", label] == count
        assert 0 < samples["xxl_executor_run_duration_seconds_sum", label] < count * 60
        last, success = (
            samples[f"xxl_executor_last_{what}_timestamp_seconds", label]
            for what in ("run", "success")
        )
        assert (last > success) == (handler == "secret") and time.time() - 120 < success <= last
    assert samples["xxl_executor_run_wait_seconds_count", ()] == 7
    assert samples["xxl_executor_refused_triggers_total", (("reason", "unknown_handler"),)] == 1
    assert [
        samples[f"xxl_executor_{name}", ()] for name in ("running", "queued", "stuck_threads")
    ] == [0, 0, 0]
    assert samples["xxl_executor_last_heartbeat_timestamp_seconds", ()] > 1_700_000_000
    version = (("version", xxl_executor.__version__), ("python", sys.version.split()[0]))
    assert samples["xxl_executor_build_info", version] == 1
    assert (
        kinds["xxl_executor_runs_total"] == "counter"
        and kinds["xxl_executor_run_wait_seconds"] == "histogram"
    )
    health = daemon.session.get(daemon.url + "/health", timeout=20).text
    assert "p4ssw0rd" not in reply.text + health


def test_metrics_of_a_daemon_that_has_done_nothing(executor):
    """What cannot be told apart by labels is there from the start, as Prometheus asks: a `rate`
    needs the 0 before the first failure."""
    daemon = executor()
    kinds, samples = parse_metrics(daemon.session.get(daemon.url + "/metrics", timeout=20).text)
    assert all(name.startswith(("xxl_executor_", "process_")) for name in kinds)
    pid, ticks = daemon.process.pid, os.sysconf("SC_CLK_TCK")
    began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]) / ticks
    booted = time.time() - float(Path("/proc/uptime").read_text().split()[0])
    assert abs(samples["process_start_time_seconds", ()] - booted - began) < 5
    assert 10 << 20 < samples["process_resident_memory_bytes", ()] < 200 << 20
    assert 10 < samples["process_open_fds", ()] < samples["process_max_fds", ()]
    assert 0 < samples["process_cpu_seconds_total", ()] < 60
    assert samples["xxl_executor_max_running", ()] == 32
    assert samples["xxl_executor_config_last_reload_successful", ()] == 1
    assert (
        samples["xxl_executor_connections", ()] == 1
        and samples["xxl_executor_undelivered_results", ()] == 0
    )
    labelled = {
        f"xxl_executor_{name}"
        for name in (
            *("runs_total", "refused_triggers_total", "run_duration_seconds_count"),
            *("last_run_timestamp_seconds", "last_success_timestamp_seconds"),
        )
    }
    assert {
        name + ("_count" if kind == "histogram" else "") for name, kind in kinds.items()
    } - labelled - {"xxl_executor_build_info"} == {
        name for name, labels in samples if not labels and not name.endswith("_sum")
    }


def test_the_official_client_reads_the_metrics(executor, admin):
    """The names follow Prometheus' conventions, and its own parser finds what happened."""
    parser = pytest.importorskip("prometheus_client.parser")
    daemon = executor(JOBS, admin=admin)
    for handler in ('say "\\"\n', "count", "count"):
        run_job(daemon, admin, handler)
    assert run_job(daemon, admin, "secret", executorParams="")[1]["handleCode"] == 500
    assert admin.trigger(daemon.url, "unknown")[1]["code"] == 500
    families = {
        family.name: family
        for family in parser.text_string_to_metric_families(
            daemon.session.get(daemon.url + "/metrics", timeout=20).text
        )
    }
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    runs = {key[1:]: value for key, value in samples.items() if key[0] == "xxl_executor_runs_total"}
    assert runs == {('say "\\"\n', "200"): 1, ("count", "200"): 2, ("secret", "500"): 1}
    assert samples["xxl_executor_refused_triggers_total", "unknown_handler"] == 1
    counted = {
        key[1]: value
        for key, value in samples.items()
        if key[0] == "xxl_executor_run_duration_seconds_count"
    }
    assert counted == {'say "\\"\n': 1, "count": 2, "secret": 1}
    for name in ("xxl_executor_run_wait_seconds",):
        buckets = [value for key, value in samples.items() if key[0] == name + "_bucket"]
        assert (
            buckets == sorted(buckets)
            and buckets[-1] == samples[name + "_bucket", "+Inf"] == samples[name + "_count",] == 4
        )
        assert families[name].type == "histogram" and samples[name + "_sum",] > 0
    assert families["xxl_executor_build_info"].samples[0].labels == {
        "version": xxl_executor.__version__,
        "python": sys.version.split()[0],
    }
    assert (
        samples["xxl_executor_last_heartbeat_timestamp_seconds",]
        >= samples["process_start_time_seconds",]
        > 1_700_000_000
    )
    for family in families.values():
        assert family.type in ("counter", "gauge", "histogram") and family.documentation.endswith(
            "."
        ), family
        assert re.fullmatch(r"(xxl_executor|process)_[a-z_]+", family.name) and not re.search(
            "_(ms|millis|minutes|mib|kb)$", family.name
        ), family
        # The parser takes _total off the name of a counter; only counters may end so.
        assert family.name.endswith("_total") is False, family


def test_no_secret_reaches_the_log(executor, loopback):
    """Neither our token nor one that a caller tries, whatever else goes wrong meanwhile."""
    admin = loopback(token=TOKEN)
    daemon = executor(JOBS, admin=admin)
    run_job(daemon, admin, "count")
    tried = [flipped(TOKEN, 0), "another-secret"]
    for token in [TOKEN, *tried]:
        for path in POST_PATHS:
            for body in (
                b"",
                b"no JSON",
                b'{"jobId":[]}',
                b'{"jobId":1,"logId":2,"executorHandler":"none"}',
            ):
                daemon.post(path, body, **{"XXL-JOB-ACCESS-TOKEN": token})
        for method in ("GET", "PUT"):
            for path in ("/status", "/nope", "/beat"):
                daemon.session.request(
                    method, daemon.url + path, headers={"XXL-JOB-ACCESS-TOKEN": token}, timeout=20
                )
    admin.token = "changed-at-the-admin"  # results and heartbeats are refused from now on
    refusals = len(admin.requests)
    daemon.post(
        "/run",
        {"jobId": 1, "logId": 77, "executorHandler": "count"},
        **{"XXL-JOB-ACCESS-TOKEN": TOKEN},
    )
    assert admin.wait(lambda: len(admin.requests) > refusals, 10)
    assert daemon.stop() == 0
    assert "refused a trigger" in daemon.log
    assert not [token for token in [TOKEN, *tried] if token in daemon.log]
