"""What comes in over HTTP and signals: fuzzed requests, paths in /log, tokens, reloads under a
flood of triggers.

As a program, this file is the client of the tests with many requests: see `client`.
"""

import ast
import collections
import contextlib
import dataclasses
import datetime
import functools
import hmac
import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, wait_until
from tools import Ledger, forget_peak, rounds, rss, stderr_lines, traced

import xxl_executor

AUDIT = Path(__file__).with_name("audit.py")
POST_PATHS = ("/beat", "/idleBeat", "/run", "/trigger", "/kill", "/log")
WRONG_TOKEN = (
    "The access token is wrong: give admin and executor the same xxl.job.accessToken /"
    " admin.access_token."
)
MIB = 1 << 20


# -- helpers


class Client:
    """Requests and answers on one connection, as bytes."""

    def __init__(self, port, seconds=30):
        self.sock = socket.create_connection(("127.0.0.1", port), seconds)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def answer(self, bodiless=False):
        """(status, head, body) of the next answer, None at the end; ValueError when it cannot be
        parsed. `bodiless`: it answers a HEAD."""
        while True:
            head, found, rest = self.buffer.partition(b"\r\n\r\n")
            if found:
                status = re.match(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n", head)
                if not status:
                    if head != b"HTTP/1.1 100 Continue":
                        raise ValueError(f"no status line: {head[:200]!r}")
                    self.buffer = rest
                    continue
                length = re.findall(rb"\r\nContent-Length: (\d+)(?=\r\n|$)", head)
                if len(length) != 1:
                    raise ValueError(f"no Content-Length: {head[:200]!r}")
                size = 0 if bodiless else int(length[0])
                if len(rest) >= size:
                    self.buffer = rest[size:]
                    return int(status[1]), head, rest[:size]
            part = self.sock.recv(1 << 16)
            if not part:
                if self.buffer:
                    raise ValueError(f"half an answer: {self.buffer[:200]!r}")
                return None
            self.buffer += part

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def post(path, body=b"", headers=()):
    """A request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def quantiles(times):
    """(p50, p99, max) of seconds, in ms."""
    times = sorted(times)
    return tuple(round(times[int(part * (len(times) - 1))] * 1000, 2) for part in (0.5, 0.99, 1))


class Pulse:
    """Beats every few ms on a connection of its own, in a thread, and keeps how long each answer
    took."""

    def __init__(self, port):
        self.times, self.error = [], None
        self._port, self._stop = port, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _beat(self):
        try:
            with Client(self._port) as client:
                while not self._stop.wait(0.004):
                    began = time.perf_counter()
                    client.sock.sendall(post("/beat"))
                    status, _, body = client.answer()
                    self.times.append(time.perf_counter() - began)
                    assert status == 200 and json.loads(body)["code"] == 200, body
        except Exception as error:  # asserted on in the test's own thread
            self.error = error


@contextlib.contextmanager
def clients(directory, *calls):
    """Run this file as a program for each (function, arguments); the list that is yielded holds at
    the end what they returned."""
    found, running = [], []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    with contextlib.ExitStack() as stack:
        for number, (function, arguments) in enumerate(calls):
            out = stack.enter_context(open(directory / f"client{number}.out", "w+b"))
            command = [sys.executable, __file__, function.__name__, json.dumps(arguments)]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
            )
            stack.callback(process.kill)  # nothing when it has ended
            running.append((process, out))
        yield found
        for process, out in running:
            status = process.wait()  # it has an alarm of its own
            out.seek(0)
            text = out.read().decode("utf-8", "replace")
            assert status == 0, text
            found.append(json.loads(text))


# -- 25: the fuzzer

HANDLERS = ("noop", "job")
BODIES = {
    "/run": {
        "jobId": "1",
        "logId": "1",
        "executorHandler": '"ghost"',
        "executorParams": '"a b"',
        "executorBlockStrategy": '"SERIAL_EXECUTION"',
        "executorTimeout": "0",
        "logDateTime": "1700000000000",
        "glueType": '"BEAN"',
        "glueSource": '""',
        "glueUpdatetime": "1700000000000",
        "broadcastIndex": "0",
        "broadcastTotal": "1",
    },
    "/kill": {"jobId": "1"},
    "/log": {"logId": "1", "logDateTim": "1700000000000", "fromLineNum": "1"},
    "/idleBeat": {"jobId": "1"},
    "/beat": {},
}
BODIES["/trigger"] = BODIES["/run"]
ODD = [
    "null",
    "true",
    "false",
    "0",
    "-0",
    "-1",
    "1.5",
    "-0.0",
    "1e3",
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "-Infinity",
    "1E",
    "01",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "9" * 400,
    "9" * 5000,
    '"7"',
    '""',
    '" 7 "',
    '"1_0"',
    '"\u0663"',
    '"\\ud800"',
    '"\\udfff\\ud800"',
    '"\\u0000"',
    '"a\\nb\\r\\n\\tc"',
    '"\U0001f4a9\u202e\u0301"',
    '"\ufeff\uffff"',
    '"../../etc/passwd"',
    '"%s%n{0}{x}"',
    '"SERIAL_EXECUTION"',
    '"DISCARD_LATER"',
    '"COVER_EARLY"',
    '"GLUE_SHELL"',
    '"noo"',
    "[]",
    "{}",
    "[1,2]",
    '{"a":{"b":[{}]}}',
    "[" * 50 + "]" * 50,
    "[" * 900 + "]" * 900,
    "[" * 985 + "]" * 985,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 300 + "1" + "}" * 300,
    '"' + "x" * 3000 + '"',
    '"' + "\u6f22" * 3000 + '"',
    "'x'",
    "undefined",
    "",
    "//",
]
LONG = [
    '"' + "y" * 100_000 + '"',
    '"' + "\u6f22\U0001f4a9" * 20_000 + '"',
    '"' + "ghost " * 50_000 + '"',
    '"' + "\\n" * 30_000 + '"',
]
TARGETS = [
    "/",
    "//run",
    "/run/",
    "/RUN",
    "/run?x=1",
    "/%72un",
    "/run#x",
    "/run;x",
    "/../run",
    "/run/../../etc/passwd",
    "*",
    "http://x/run",
    "http://x/health",
    "/health",
    "//health",
    "/metrics",
    "/status",
    "/status?token=x",
    "/favicon.ico",
    "/\xe9\xff",
    "/\x01\x7f",
    "run",
    "x:/y",
    "[::1]",
    "//[",
    "http://[::1/beat",
    "/" + "a" * 4000,
    "/" * 3000,
    "?",
    "/beat?" + "&" * 2000,
]
METHODS = [
    "GET",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "TRACE",
    "CONNECT",
    "get",
    "Post",
    "M-SEARCH",
    "X" * 300,
    "(",
    "\x00",
    "\xff",
]
HEADERS = [
    "XXL-JOB-APPNAME: other",
    "XXL-JOB-APPNAME: xxl-job-executor-sample",
    "XXL-JOB-APPNAME:",
    "XXL-JOB-ACCESS-TOKEN: x",
    "XXL-JOB-ACCESS-TOKEN: \xff\x00",
    "Content-Type: text/plain; charset=\x80",
    "X:" + "z" * 8000,
    "X: " + "\xe9" * 500,
    ":",
    ": x",
    "Host: a\r\nHost: b",
    "Accept-Encoding: gzip, br",
    "X-Folded: a\r\n b\r\n\tc",
    "X: a\rY: b",
    "X: \x0b\x0c\x1c\x85",
    "Cookie: " + "a=b; " * 300,
    "Range: bytes=0-",
    "Upgrade: h2c",
    "Connection: Upgrade",
    "Expect: 100-continue",
    "Connection: keep-alive",
    "A\tB: c",
]
CLOSING = [
    "Connection: close",
    "Connection: CLOSE",
    "Expect: 200-ok",
    "no colon",
    "a b: c",
    "\r",
    "\n".join(f"X{i}: {i}" for i in range(150)),
]
VERSIONS = [
    "HTTP/1.0",
    "HTTP/2.0",
    "HTTP/0.9",
    "HTTP/1",
    "HTTP/1.10",
    "HTTP/1.1.1",
    "HTTP/-1.1",
    "HTTP/9999999999.1",
    "http/1.1",
    "FTP/1.1",
    "",
    "HTTP/1.1 HTTP/1.1",
    "HTTP/\u00b9.1",
]


class Fuzzer:
    """Requests from a seed; `first` is the first logId of those that are triggers in earnest."""

    def __init__(self, seed, first):
        self.random, self.log_id = random.Random(seed), first

    def body(self, path, handlers=HANDLERS):
        """The bytes of a body for `path`, most often with something odd; seldom a trigger that may
        be accepted."""
        rand = self.random
        pairs = list(BODIES[path].items())
        if path in ("/run", "/trigger"):
            self.log_id += 1
            pairs[1] = ("logId", str(self.log_id))
            if handlers and rand.random() < 0.03:
                pairs[2] = ("executorHandler", f'"{rand.choice(handlers)}"')
        for _ in range(rand.choice((0, 1, 1, 1, 2, 3))):
            act, at = rand.randrange(7), rand.randrange(len(pairs)) if pairs else 0
            odd = rand.choice(LONG if rand.random() < 0.004 else ODD)
            if act < 3 and pairs:
                pairs[at] = (pairs[at][0], odd)
            elif act == 3 and pairs:
                del pairs[at]
            elif act == 4 and pairs:
                pairs.append((pairs[at][0], odd))  # the same key again
            elif act == 5 and pairs:
                other = rand.randrange(len(pairs))
                pairs[at], pairs[other] = (
                    (pairs[at][0], pairs[other][1]),
                    (pairs[other][0], pairs[at][1]),
                )
            else:
                pairs.append(
                    (
                        rand.choice(("", "x", "job\\u0049d", "__class__", "logId ", "\U0001f4a9")),
                        odd,
                    )
                )
        text = "{" + ",".join(f'"{key}":{value}' for key, value in pairs) + "}"
        data = text.encode("utf-8", "surrogatepass")
        act = rand.randrange(40)
        if act == 0:
            return self.mangled(data)
        if act == 1:
            return rand.choice(
                (
                    b"",
                    b"null",
                    b"[]",
                    b"7",
                    b'"x"',
                    b"{}",
                    b"\xef\xbb\xbf" + data,
                    text.encode("utf-16"),
                    data + data,
                    b"[" + data + b"]",
                    b" " * 2000 + data,
                    data[:-1],
                    b"\xff" * 50,
                    b"{" * 3000,
                    b"[{" * 1000,
                )
            )
        return data

    def mangled(self, data):
        """`data` with a few bytes flipped, removed or put in."""
        data = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(data) + 1)
            act = self.random.randrange(3)
            if act == 0 and at < len(data):
                data[at] ^= 1 << self.random.randrange(8)
            elif act == 1:
                del data[at : at + self.random.randint(1, 20)]
            else:
                data[at:at] = self.noise(8)
        return bytes(data)

    def noise(self, most):
        return bytes(self.random.randrange(256) for _ in range(self.random.randint(1, most)))

    def framed(self):
        """(request, its method, its path, its body): odd in all ways that leave clear where it
        ends."""
        rand = self.random
        path = rand.choice(POST_PATHS)
        body, method, target, version, headers = (
            self.body(path),
            "POST",
            path,
            "HTTP/1.1",
            ["Host: x"],
        )
        act = rand.randrange(100)
        if act < 4:
            target = rand.choice(TARGETS)
        elif act < 8:
            method = rand.choice(METHODS)
        elif act < 10:
            method, target = (
                rand.choice(("GET", "HEAD")),
                rand.choice(("/health", "/metrics", "/status", "/run")),
            )
        elif act < 16:
            headers.append(rand.choice(HEADERS))
        elif act < 18:
            headers.append(rand.choice(CLOSING))
        elif act < 19:
            version = rand.choice(VERSIONS)
        if body or rand.random() < 0.5:
            headers.insert(rand.randrange(len(headers) + 1), f"Content-Length: {len(body)}")
        head = "\r\n".join([f"{method} {target} {version}".rstrip(" "), *headers]) + "\r\n\r\n"
        return head.encode("latin-1"), method, path, body

    def unframed(self):
        """A request of which nobody can tell where it ends, or that does not end. It triggers
        nothing."""
        rand = self.random
        path = rand.choice(POST_PATHS)
        body = self.body(path, handlers=())
        whole = post(path, body)
        head, length = whole[: len(whole) - len(body)], b"Content-Length: %d" % len(body)
        act = rand.randrange(11)
        if act == 0:
            return self.noise(300) + rand.choice((b"", b"\r\n\r\n", b"\n\n"))
        if act == 1:
            flipped = bytearray(whole)
            for _ in range(rand.randint(1, 8)):
                flipped[rand.randrange(len(flipped))] ^= 1 << rand.randrange(8)
            return bytes(flipped)
        if act == 2:
            more, less = len(body) + rand.randint(1, 99), max(0, len(body) - rand.randint(1, 99))
            value = rand.choice(
                (
                    b"-1",
                    b"+5",
                    b"0x10",
                    b"1e3",
                    b"5, 5",
                    b"",
                    b"9" * 18,
                    b"9" * 19,
                    b"9" * 5000,
                    b"\xb2",
                    b"5 5",
                    b"5;",
                    b"%d" % more,
                    b"%d" % less,
                    b"0",
                    b"6000000",
                )
            )
            return head.replace(length, b"Content-Length: " + value) + body
        if act == 3:
            return head.replace(length, length + b"\r\nContent-Length: 7") + body
        if act == 4:
            value = rand.choice(
                (
                    b"Transfer-Encoding: chunked",
                    b"transfer-encoding:\tgzip, chunked",
                    length + b"\r\nTransfer-Encoding: chunked",
                )
            )
            return head.replace(length, value) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        if act == 5:
            return head.replace(length, b"Content-Length:\r\n " + length[16:]) + body  # obs-fold
        if act == 6:
            at = rand.randrange(len(head))
            return (
                head[:at]
                + rand.choice((b"\0", b"\r", b"\n", b"\r\n", b"\0" * 20, b"\r\n\r\n"))
                + head[at:]
                + body
            )
        if act == 7:
            return head.replace(b"\r\n", rand.choice((b"\n", b"\r", b"", b"\n\r"))) + body
        if act == 8:
            return (
                rand.choice(
                    (
                        b"\r\n" * 200,
                        b"X" * 17_000,
                        b"POST /run HTTP/1.1\r\n" + b"A: b\r\n" * 3000,
                        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                        b"POST /log HTTP/1.1\r\nA:" + b"a" * 16_400,
                        b"\0" * 5000,
                    )
                )
                + whole
            )
        if act == 9:
            return whole + whole[: rand.randrange(len(whole))]
        return whole[: rand.randrange(len(whole))]


def check_envelope(status, head, body, bodiless):
    """ValueError unless it is an answer as the API promises."""
    if b"text/plain; version=0.0.4" in head:
        if not bodiless and b"\n# TYPE xxl_executor_runs_total counter\n" not in body:
            raise ValueError(f"no metrics: {body[:200]!r}")
        return 200
    if bodiless:
        return None
    found = json.loads(body)
    if "code" not in found and status == 200 and found["app"] == "xxl-job-executor-sample":
        return 200  # /status
    known = found.keys() == {"code", "msg", "content", "data"} and found["code"] in (200, 500)
    if not known or not isinstance(found["msg"], (str, type(None))):
        raise ValueError(f"no envelope: {body[:200]!r}")
    return found["code"]


def fuzz(port, seed, first, count):
    """Send `count` requests and read what is answered; a part breaks the framing, on connections of
    their own."""
    fuzzer, statuses, found = Fuzzer(seed, first), collections.Counter(), collections.Counter()
    accepted, problems = [], []
    began = time.perf_counter()
    broken = count // 12
    client, waiting, silent = None, collections.deque(), 0
    left = count - broken
    while left or waiting:
        if broken and fuzzer.random.random() < 0.8:  # between two batches
            broken -= 1
            break_framing(port, fuzzer, statuses, problems, found)
        while left and len(waiting) < 10:
            waiting.append(fuzzer.framed())
            left -= 1
        if client is None:
            client = Client(port)
            found["connections"] += 1
        batch = list(waiting)
        with contextlib.suppress(ConnectionError):  # closed after an answer: that comes first
            client.sock.sendall(b"".join(head + body for head, _, _, body in batch))
        for head, method, path, body in batch:
            try:
                answer = client.answer(method == "HEAD")
                if answer is None:
                    raise ValueError("the end instead of an answer")
                code = check_envelope(*answer, method == "HEAD")
            except (ValueError, KeyError, TypeError, OSError) as error:
                problems.append(f"{type(error).__name__}: {error} after {(head + body)[:300]!r}")
                waiting.popleft()
                client.sock.close()
                client = None
                silent += isinstance(error, socket.timeout)
                break
            waiting.popleft()
            found["answered"] += 1
            statuses[answer[0]] += 1
            if code == answer[0] == 200 and path in ("/run", "/trigger") and method == "POST":
                target = head.split(b" ", 2)[1].decode("latin-1").partition("?")[0]
                target = re.sub("/+", "/", re.sub("^http://x(?=/)", "", target))
                if target in ("/run", "/trigger"):
                    accepted.append(xxl_executor.number_of(xxl_executor.decode(body), "logId"))
            if (
                b"\r\nConnection: close" in answer[1]
            ):  # those behind it were not looked at: they come again
                client.sock.close()
                client = None
                break
        if silent or len(problems) > 20:
            break
    if client is not None:
        client.sock.close()
    for _ in range(broken):
        break_framing(port, fuzzer, statuses, problems, found)
    return {
        "seconds": time.perf_counter() - began,
        "well_framed": count - count // 12,
        "statuses": statuses,
        "accepted": accepted,
        "problems": problems,
        **found,
    }


def break_framing(port, fuzzer, statuses, problems, found):
    """One connection with bytes that are no request, then its end: closed, reset, or the answers
    read to their end."""
    data = fuzzer.unframed()
    found["broken"] += 1
    with contextlib.suppress(ConnectionError), Client(port) as client:
        client.sock.sendall(data)
        end = fuzzer.random.randrange(5)
        if end == 0:
            return
        if end == 1:
            client.reset()
            return
        client.sock.shutdown(socket.SHUT_WR)
        try:
            answer = client.answer()
            while answer is not None:
                check_envelope(*answer, False)
                statuses[answer[0]] += 1
                answer = client.answer(False)
        except (ValueError, KeyError, TypeError, socket.timeout) as error:
            problems.append(f"{type(error).__name__}: {error} after {data[:300]!r}")


def test_fuzzed_requests(executor, admin, tmp_path):
    """Whatever bytes come, the daemon lives, answers every request, keeps its memory, and beats
    take at most 100 ms."""
    count, seed = rounds(50_000, "XXL_FAULT_REQUESTS"), rounds(25, "XXL_FAULT_SEED")
    ledger = Ledger(admin, tmp_path)
    jobs = {
        "noop": ledger.python_job(tmp_path, "noop", "pass", isolation="thread"),
        "job": ledger.job(),
    }
    daemon = executor(jobs, admin=admin)
    for handler in HANDLERS:  # what is made once is not the fuzzer's
        ledger.trigger(daemon, handler)
    ledger.settle(daemon)
    pid = daemon.process.pid
    before = rss(pid)
    forget_peak(pid)
    first = max(ledger.accepted) + 1_000_000
    calls = [
        (
            fuzz,
            {
                "port": daemon.port,
                "seed": seed + i,
                "first": first + i * 10 * count,
                "count": count // 2,
            },
        )
        for i in range(2)
    ]
    with Pulse(daemon.port) as pulse, clients(tmp_path, *calls) as found:
        pass
    grown = rss(pid, "VmHWM") - before
    p50, p99, most = quantiles(pulse.times)
    answered, framed = (
        sum(one["answered"] for one in found),
        sum(one["well_framed"] for one in found),
    )
    ledger.accepted |= {log_id for one in found for log_id in one["accepted"]}
    statuses = sum((collections.Counter(one["statuses"]) for one in found), collections.Counter())
    print(
        f"{count} requests, {count / max(one['seconds'] for one in found):.0f}/s, {answered} of"
        f" {framed} answered, {count - framed} broken, {sum(one['connections'] for one in found)}"
        f" connections, {dict(statuses)}, {len(ledger.accepted)} accepted; memory"
        f" +{grown / MIB:.1f} MiB; {len(pulse.times)} beats, ms: p50 {p50}, p99 {p99}, max {most}"
    )
    assert not [problem for one in found for problem in one["problems"]]
    assert answered == framed
    assert daemon.process.poll() is None
    assert not stderr_lines(daemon, "unexpected error|unexpectedly|Traceback|please report")
    assert pulse.error is None, pulse.error
    assert p99 <= 100, (p50, p99, most)
    assert grown <= 32 * MIB, f"{grown / MIB:.1f} MiB"
    # It is a fuzzer only if it comes everywhere.
    assert {"200", "400", "404", "405", "411", "413", "417", "431", "505"} <= set(statuses), (
        statuses
    )
    assert len(ledger.accepted) >= min(10, count // 1000)
    ledger.settle(daemon, 60)
    assert set(ledger.started()) <= ledger.accepted and set(admin.results) <= ledger.accepted


def test_long_texts_in_every_field(executor, admin, tmp_path):
    """A text as long as a body may be costs little beyond that: in memory, in the answer and in the
    daemon's log."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    ledger.trigger(daemon)
    ledger.settle(daemon)
    pid, size = daemon.process.pid, xxl_executor.BODY_LIMIT - 1000
    for text in ("x" * size, "job " * (size // 4)):
        for field in (
            "executorHandler",
            "glueType",
            "jobId",
            "logId",
            "executorTimeout",
            "logDateTime",
        ):
            fields = {"jobId": 1, "logId": 1, "executorHandler": "ghost", field: text}
            before, logged = rss(pid), daemon.stderr.stat().st_size
            forget_peak(pid)
            answer = daemon.post("/run", fields)
            grown, told = rss(pid, "VmHWM") - before, daemon.stderr.stat().st_size - logged
            assert answer["code"] == 500, field
            assert (len(answer["msg"]) < 1000, told < 10_000, grown <= 32 * MIB) == (
                True,
                True,
                True,
            ), (
                f"{field}: answer of {len(answer['msg'])}, {told} bytes logged,"
                f" +{grown / MIB:.1f} MiB"
            )
    ledger.settle(daemon)


# -- 26: paths and numbers in /log

DAY = datetime.datetime(2024, 5, 6, 12)
ODD_NUMBERS = [
    '"../../etc/passwd"',
    '"/etc/passwd"',
    '"../1"',
    '"1/../../../secret"',
    '"..%2f..%2fsecret"',
    '"1.log"',
    '"1\\u0000"',
    '"\\ud800"',
    '"~"',
    '"*"',
    '"-"',
    '""',
    '" 1 "',
    '"1_0"',
    '"\u0661"',
    "-1",
    "-9223372036854775808",
    "9223372036854775807",
    "9223372036854775808",
    "9" * 60,
    "9" * 5000,
    "1.5",
    "1.0",
    "-0.0",
    "1e300",
    "1e400",
    "NaN",
    "-Infinity",
    "true",
    "null",
    "[]",
    "[1]",
    "{}",
    '{"a":1}',
    "[" * 100 + "]" * 100,
    '["../../etc/passwd"]',
]


def at(days):
    """The time in ms of `DAY` and some days."""
    return int((DAY + datetime.timedelta(days)).timestamp() * 1000)


def plant(logs, outside):
    """One log in earnest and all that must not be opened as one; returns [(what, logId, days after
    DAY)]."""
    secret = outside / "secret"
    outside.mkdir()
    secret.write_text("SECRET\n")
    for name in ("1.log", "etc", "passwd", "None.log", "..log"):
        (outside / name).write_text("SECRET\n")
    for file in (logs / "1.log", logs / "passwd", logs.parent / "1.log", logs.parent / "secret"):
        file.write_text("SECRET\n")
    day = logs / f"{DAY:%Y-%m-%d}"
    day.mkdir()
    (day / "1.log").write_text("hello\n")
    (day / "2.log").symlink_to(secret)
    (day / "3.log").symlink_to(os.path.relpath(secret, day))
    (day / "4.log").symlink_to("1.log")
    (day / "5.log").symlink_to("nowhere")
    (day / "6.log").symlink_to("6.log")
    os.mkfifo(day / "7.log")
    (day / "8.log").mkdir()
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(day)  # the name of a socket must be short
        sock.bind("9.log")
    places = [
        *(("a symlink", number, 0) for number in range(2, 7)),
        ("a FIFO", 7, 0),
        ("a directory", 8, 0),
        ("a socket", 9, 0),
    ]
    whats = (
        "a day that is a symlink",
        "one to another day",
        "a day that is a file",
        "a day that is a FIFO",
    )
    for days, what in enumerate(whats, 1):
        place = logs / f"{DAY + datetime.timedelta(days):%Y-%m-%d}"
        if days < 3:
            place.symlink_to(outside if days == 1 else day.name)
        elif days == 3:
            place.write_text("SECRET\n")
        else:
            os.mkfifo(place)
        places.append((what, 1, days))
    return places


@contextlib.contextmanager
def audited(daemon, directory):
    """The list that is yielded holds at the end (path, flags) of what the daemon opened meanwhile.

    Without the main thread: it answers no request, and looks into /proc for orphans whenever a run
    has ended.
    """
    notes, found = directory / "audit.txt", []
    before = notes.stat().st_size
    yield found
    lines = map(json.loads, notes.read_bytes()[before:].splitlines())
    found += [(path, flags) for path, flags, main in lines if not main]


@contextlib.contextmanager
def straced(daemon, directory):
    """As `audited`, as the kernel sees it; the path of a descriptor that was opened counts as
    well."""
    out, found = directory / "strace.txt", []
    options = ("-f", "-s", "4096", "-e", "trace=open,openat,openat2", "-y", "-o", str(out))
    with traced(daemon, [daemon.process.pid], *options):
        yield found
    for line in out.read_text().splitlines():
        if int(line.split()[0]) == daemon.process.pid:  # the main thread
            continue
        named = re.findall(r'open(?:at2?)?\((?:[^"]*, )?"((?:[^"\\]|\\.)*)"', line)
        found += [(path, line) for path in named + re.findall(r"= \d+<([^>]*)>$", line)]


WATCHES = {"audit": audited, "strace": straced}


@pytest.mark.parametrize("watch", WATCHES)
def test_log_requests_open_nothing_but_logs(executor, admin, tmp_path, watch):
    """Whatever /log is asked for, only directories of days and numbered files in them are
    opened."""
    ledger = Ledger(admin, tmp_path)
    notes = tmp_path / "audit.txt"
    daemon = executor(
        {"job": ledger.job()}, admin=admin, program=AUDIT, env={"AUDIT_FILE": str(notes)}
    )
    logs = daemon.data / "logs"
    places = plant(logs, tmp_path / "outside")
    ledger.trigger(daemon)
    ledger.settle(daemon)
    assert b"journal.db" in notes.read_bytes(), "the hook sees nothing"
    answers, pages = [], {}
    with WATCHES[watch](daemon, tmp_path) as opened:
        for key in ("logId", "logDateTim", "logDateTime", "fromLineNum"):
            for odd in ODD_NUMBERS:
                fields = {"logId": "1", "logDateTim": str(at(0)), "fromLineNum": "1", key: odd}
                if key == "logDateTime":
                    del fields["logDateTim"]
                body = "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
                answers.append((body, daemon.post("/log", body.encode())))
        for what, number, days in places:
            pages[what, number] = daemon.post(
                "/log", {"logId": number, "logDateTim": at(days), "fromLineNum": 1}
            )
            daemon.post("/log", {"logId": number, "logDateTim": at(days), "fromLineNum": 2})
        for target in (
            "/log/../../../etc/passwd",
            "/log/2024-05-06/1.log",
            "/log?file=/etc/passwd",
            "/log/%2e%2e/secret",
            "//log//..//secret",
        ):
            with Client(daemon.port) as client:
                client.sock.sendall(post(target, b'{"logId":1,"logDateTim":0}'))
                answers.append((target, client.answer()[2].decode()))
        legitimate = daemon.page(1, at(0))
    assert legitimate["logContent"] == "hello\n"
    for body, answer in [*answers, *pages.items()]:
        assert not re.search("SECRET|root:", json.dumps(answer)), (body, answer)
        fault = "" if isinstance(answer, str) or answer["code"] == 200 else answer["msg"]
        assert not fault or re.match("(logId|logDateTime?|fromLineNum): |the body ", fault), (
            body,
            answer,
        )
    for place, answer in pages.items():
        assert answer["code"] == 200 and answer["content"]["logContent"].startswith("no log: "), (
            place,
            answer,
        )
    days, names, others = [], [], []
    for path, how in opened:
        day = re.fullmatch(re.escape(str(logs)) + r"/\d{4}-\d\d-\d\d", path)
        name = re.fullmatch(r"-?\d{1,19}\.log", path)
        inside = watch == "strace" and re.fullmatch(
            re.escape(str(logs)) + r"/\d{4}-\d\d-\d\d/-?\d{1,19}\.log", path
        )
        (days if day else names if name else [] if inside else others).append((path, how))
    assert len(names) >= 20 and len(days) > 1, opened  # that of the last day is kept open
    assert not others, others
    if watch == "audit":
        for _, flags in days:
            assert flags & os.O_DIRECTORY and flags & os.O_NOFOLLOW, flags
        for _, flags in names:
            assert (
                flags & os.O_NOFOLLOW
                and not flags & os.O_CREAT
                and flags & os.O_ACCMODE == os.O_RDONLY
            ), flags
    assert not stderr_lines(daemon, "please report")
    ledger.settle(daemon)


def test_what_is_no_file_in_place_of_a_log(executor, admin, tmp_path):
    """A FIFO holds no http thread, and no run whose log it stands for; nor does anything else fail
    one."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job("echo output")}, admin=admin, executor={"max_running": 2})
    logs = daemon.data / "logs"
    places = plant(logs, tmp_path / "outside")
    body = json.dumps({"logId": 7, "logDateTim": at(0), "fromLineNum": 1}).encode()
    fifo = logs / f"{DAY:%Y-%m-%d}" / "7.log"
    with contextlib.ExitStack() as stack:
        waiting = [
            stack.enter_context(Client(daemon.port)) for _ in range(20)
        ]  # more than there are http threads
        # Let go whoever waits for the other end.
        stack.callback(lambda: os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK)))
        for client in waiting:
            client.sock.sendall(post("/log", body))
        beat = stack.enter_context(Client(daemon.port, 10))
        beat.sock.sendall(post("/beat"))
        assert json.loads(beat.answer()[2])["code"] == 200
        for client in waiting:
            assert json.loads(client.answer()[2])["content"]["logContent"].startswith("no log: ")
        # And to write to.
        for what, number, days in places:
            log_id = ledger.trigger(
                daemon, jobId=number + 100 * days, logId=number + 1000 * days, logDateTime=at(days)
            )
            assert ledger.result(log_id, 10) == (200, "output"), what
    assert (tmp_path / "outside" / "secret").read_text() == "SECRET\n"
    assert not list((tmp_path / "outside").glob("1001.log"))
    assert not stderr_lines(daemon, "please report")
    ledger.settle(daemon)
    assert sorted(ledger.started()) == sorted(ledger.accepted) and len(ledger.accepted) == len(
        places
    )


# -- 27: tokens

TOKEN = "correct-Horse.Battery~42"
RIGHT = ("XXL-JOB-ACCESS-TOKEN", TOKEN)


def flipped(text, at):
    return "".join(
        chr(ord(char) ^ 1) if i == at % len(text) else char for i, char in enumerate(text)
    )


SINGLE = {  # one wrong token
    "empty": "",
    "first byte": flipped(TOKEN, 0),
    "last byte": flipped(TOKEN, -1),
    "a prefix": TOKEN[:-1],
    "one byte": TOKEN[:1],
    "longer": TOKEN + "x",
    "twice as long": TOKEN * 2,
    "very long": TOKEN * 200,
    "lower case": TOKEN.lower(),
    "upper case": TOKEN.upper(),
    "Latin-1 bytes": b"\xe9" + TOKEN.encode(),
    "UTF-8 bytes": TOKEN.encode() + "é".encode(),
    "a byte 0xff": b"\xff" * len(TOKEN),
    "a full-width letter": TOKEN.replace("c", "ｃ").encode(),
    "quoted": f'"{TOKEN}"',
    "bearer": f"Bearer {TOKEN}",
    "a list": f"{TOKEN},{TOKEN}",
    "NUL": TOKEN.encode() + b"\0",
    "null": "null",
    "percent": TOKEN.replace("~", "%7E"),
}
WRONG = {  # [(name, value)] of headers
    **{what: [(RIGHT[0], value)] for what, value in SINGLE.items()},
    "missing": [],
    "doubled, equal": [RIGHT, RIGHT],
    "doubled, right first": [RIGHT, (RIGHT[0], "wrong")],
    "doubled, right last": [(RIGHT[0], "wrong"), RIGHT],
    "doubled, one empty": [(RIGHT[0], ""), RIGHT],
    "doubled, other case": [RIGHT, (RIGHT[0].lower(), TOKEN)],
    "three": [RIGHT] * 3,
    **{
        f"in {name}": [(name, value)]
        for name, value in [
            ("XXL-JOB-ACCESSTOKEN", TOKEN),
            ("XXL_JOB_ACCESS_TOKEN", TOKEN),
            ("X-XXL-JOB-ACCESS-TOKEN", TOKEN),
            ("XXL-JOB-ACCESS-TOKEN2", TOKEN),
            ("XXL-JOB-ACCESS-TOKEN ", TOKEN),
            ("Authorization", f"Bearer {TOKEN}"),
            ("Cookie", f"XXL-JOB-ACCESS-TOKEN={TOKEN}"),
            ("X", f"y\rXXL-JOB-ACCESS-TOKEN : {TOKEN}"),
        ]
    },
}


# what no head may hold: these get no further than that
NO_REQUEST = {"NUL", "in XXL-JOB-ACCESS-TOKEN ", "in X"}


def ask(client, method, path, body=b"", headers=()):
    """(HTTP status, body) on a connection of its own; any headers, any number of times, in
    bytes."""
    lines = [
        f"{method} {path} HTTP/1.1".encode(),
        b"Host: x",
        b"Content-Length: %d" % len(body),
        b"Connection: close",
    ]
    for name, value in headers:
        lines.append(
            name.encode("latin-1")
            + b": "
            + (value if isinstance(value, bytes) else value.encode("latin-1"))
        )
    with Client(client) as connection:
        connection.sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        status, _, answer = connection.answer()
    return status, answer.decode()


def test_wrong_tokens(executor, loopback, tmp_path):
    """Only the right token, once, in its header, is taken; /health and /metrics need none and tell
    no secret."""
    admin = loopback(token=TOKEN)
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job('echo "OUTPUT-of-a-run $1"')}, admin=admin)
    ask_daemon = functools.partial(ask, daemon.port)
    for number, (what, headers) in enumerate(WRONG.items()):
        trigger = json.dumps(
            {"jobId": 1, "logId": 1000 + number, "executorHandler": "job"}
        ).encode()
        for path in (*POST_PATHS, f"/run?XXL-JOB-ACCESS-TOKEN={TOKEN}", "//beat"):
            status, body = ask_daemon("POST", path, trigger, headers)
            refusal = (400, 500) if what in NO_REQUEST else (200, 500)
            assert (status, json.loads(body)["code"]) == refusal, (what, path)
            assert what in NO_REQUEST or json.loads(body)["msg"] == WRONG_TOKEN, (what, path)
        status, body = ask_daemon("GET", "/status", headers=headers)
        assert status == (400 if what in NO_REQUEST else 403), what
        assert what in NO_REQUEST or json.loads(body)["msg"] == WRONG_TOKEN, what
    assert not ledger.started()
    log_id = ledger.trigger(daemon, executorParams="PARAMETER-of-a-run")  # with the right one
    assert log_id in ledger.accepted and ledger.result(log_id) == (
        200,
        "OUTPUT-of-a-run PARAMETER-of-a-run",
    )
    for name in (RIGHT[0], RIGHT[0].lower(), "Xxl-Job-Access-Token"):
        for path, body in {
            "/beat": b"",
            "/idleBeat": b'{"jobId":1}',
            "/kill": b'{"jobId":1}',
            "/log": b'{"logId":1}',
        }.items():
            assert json.loads(ask_daemon("POST", path, body, [(name, TOKEN)])[1])["code"] == 200, (
                name,
                path,
            )
        assert ask_daemon("GET", "/status", headers=[(name, TOKEN)])[0] == 200
    for path in ("/health", "/metrics"):
        for headers in ([], [RIGHT], [(RIGHT[0], "wrong")]):
            status, body = ask_daemon("GET", path, headers=headers)
            assert status == 200 and body
            assert not re.search("PARAMETER|OUTPUT|" + re.escape(TOKEN), body), body
    assert TOKEN not in daemon.log
    ledger.settle(daemon)
    assert ledger.started() == [log_id]


def headers_of(*pairs):
    """As http.server gives them to the API."""
    message = http.client.HTTPMessage()
    for name, value in pairs:
        message[name] = value.decode("latin-1") if isinstance(value, bytes) else value
    return message


def test_tokens_are_compared_in_constant_time(executor, admin, tmp_path, monkeypatch):
    """hmac.compare_digest sees the whole of every token that comes, and nothing else compares
    it."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin, start=False)
    config = xxl_executor.load_config(str(daemon.file))
    config = dataclasses.replace(
        config, admin=dataclasses.replace(config.admin, access_token=TOKEN)
    )

    class Core:
        def busy(self, job_id):
            return False

        def put(self, message):
            message.ticket.give(None)  # as the core does with what it takes

    class Ticket:
        def give(self, reply):
            self.reply = reply

    api = xxl_executor.Api(
        config, Core(), None, None, xxl_executor.Metrics(), dict, lambda path: None
    )
    compared, real = [], hmac.compare_digest

    def spy(one, other):
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(xxl_executor.hmac, "compare_digest", spy)
    for what, headers in {**WRONG, "right": [RIGHT]}.items():
        given = [value for name, value in headers if name.lower() == RIGHT[0].lower()]
        for method, path in [*(("POST", path) for path in POST_PATHS), ("GET", "/status")]:
            compared.clear()
            request = xxl_executor.Request(method, path, headers_of(*headers), "")
            request.body, request.trusted = b'{"jobId":1}', api.trusts(request)
            ticket = Ticket()
            body = json.loads((api.answer(request, ticket) or ticket.reply).body)
            assert (body.get("msg") == WRONG_TOKEN) == (what != "right"), (what, body)
            seen = [value if isinstance(value, bytes) else value.encode() for value in given]
            seen = [value.strip(b" \t") for value in seen]
            expected = (
                [sorted((seen[0], TOKEN.encode()))] if len(seen) == 1 else []
            )  # two are refused as two
            assert [sorted(pair) for pair in compared] == expected, what
    # Nor is there another way: no other method looks at the token.
    source = Path(xxl_executor.__file__).read_text(encoding="utf-8")
    users = {
        function.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Api"
        for function in node.body
        if isinstance(function, ast.FunctionDef)
        if any(
            isinstance(name, ast.Attribute) and name.attr == "access_token"
            for name in ast.walk(function)
        )
    }
    assert users == {"trusts"}
    daemon.start()
    ledger.trigger(daemon)
    ledger.settle(daemon)


# -- 28: a flood and reloads

# By jobId; "slow" keeps the slots busy and the queues full.
FLOODED = [None, "noop", "noop", "job", "job", "slow", "slow", "slow", "slow"]
REFUSALS = {
    r"\d+ triggers of this job wait already: queue_limit is 40": "queue_limit",
    r"\d+ triggers wait already: executor\.max_queued is 150": "max_queued",
    r"block strategy effect: DISCARD_LATER, the job is running or waiting": "DISCARD_LATER",
}


def reason(message):
    """Which of the known refusals it is; the message itself when none."""
    return next(
        (name for pattern, name in REFUSALS.items() if re.fullmatch(pattern, message)), message
    )


def flood(port, first, count, seconds, callers):
    """`count` triggers spread over `seconds`, on `callers` connections; returns what came of
    them."""
    accepted, times, refused, errors = (
        [],
        {"accepted": [], "refused": []},
        collections.Counter(),
        [],
    )
    start, pause = time.perf_counter() + 0.2, threading.Event()

    def call(number):
        try:
            rand = random.Random(number)
            with Client(port) as client:
                for i in range(number, count, callers):
                    pause.wait(max(0.0, start + i * seconds / count - time.perf_counter()))
                    job_id = rand.randrange(1, len(FLOODED))
                    strategy = rand.choices(
                        ("SERIAL_EXECUTION", "DISCARD_LATER", "COVER_EARLY"), (85, 10, 5)
                    )[0]
                    body = {
                        "jobId": job_id,
                        "logId": first + i,
                        "executorHandler": FLOODED[job_id],
                        "executorBlockStrategy": strategy,
                        "logDateTime": int(time.time() * 1000),
                    }
                    request = post("/run", json.dumps(body).encode())
                    began = time.perf_counter()
                    client.sock.sendall(request)
                    status, _, answer = client.answer()
                    took, answer = time.perf_counter() - began, json.loads(answer)
                    if status == 200 and answer["code"] == 200:
                        accepted.append(first + i)
                    else:
                        refused[reason(answer["msg"])] += 1
                    times["accepted" if answer["code"] == 200 else "refused"].append(took)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "accepted": accepted,
        "times": times,
        "refused": refused,
        "errors": errors,
        "seconds": time.perf_counter() - start,
    }


class Tail:
    """The lines that the daemon wrote since the last look, without reading the old ones again."""

    def __init__(self, file):
        self._stream, self.lines, self._rest = file.open("rb"), [], b""

    def close(self):
        self._stream.close()

    def count(self, text):
        *lines, self._rest = (self._rest + self._stream.read()).split(b"\n")
        self.lines += [line.decode("utf-8", "replace") for line in lines if b"reload" in line]
        return sum(text in line for line in self.lines)


BROKEN = {
    "no YAML": lambda good: good + "\njobs: [unclosed\n",
    "unknown key": lambda good: good.replace("max_running:", "max_runing:"),
    "wrong type": lambda good: good.replace("max_queued: 150", "max_queued: many"),
    "half": lambda good: good[: good.index("jobs:")] + "jobs: {noop: {shel",
    "a job without work": lambda good: good + "  odd: {description: nothing}\n",
    "duplicate job": lambda good: good + "  noop: {shell: 'true'}\n",
    "no mapping": lambda good: "- a\n- b\n",
    "control characters": lambda good: good + "\x00\x01",
    "missing include": lambda good: "include: 7\n" + good,
}


def test_a_flood_of_triggers_while_good_and_broken_files_are_reloaded(executor, admin, tmp_path):
    """Refusals are explicit and fast, nothing accepted is lost, and a broken file changes
    nothing."""
    count, reloads = rounds(10_000, "XXL_FAULT_TRIGGERS"), rounds(100, "XXL_FAULT_RELOADS")
    ledger = Ledger(admin, tmp_path)
    options = {"queue_limit": 40}
    jobs = {
        "noop": ledger.python_job(tmp_path, "noop", "pass", isolation="thread", **options),
        "job": ledger.job(**options),
        "slow": ledger.python_job(
            tmp_path, "slow", "context.cancelled.wait(0.04)", isolation="thread", **options
        ),
    }
    daemon = executor(
        {**jobs, "good_0": ledger.job()},
        admin=admin,
        executor={"max_running": 4, "max_queued": 150},
    )
    config = yaml.safe_load(daemon.file.read_text())
    for handler in jobs:
        ledger.trigger(daemon, handler)
    ledger.settle(daemon)
    pid, before, first = (
        daemon.process.pid,
        rss(daemon.process.pid),
        max(ledger.accepted) + 1_000_000,
    )
    forget_peak(pid)

    def replace(text):
        new = daemon.file.with_name("new.yaml")
        new.write_text(text)
        os.replace(new, daemon.file)
        daemon.signal(signal.SIGHUP)

    def probe(number):
        """Trigger the job that only the good file `number` has; returns why it was refused, or
        None."""
        return ledger.refused.get(ledger.trigger(daemon, f"good_{number}", jobId=100 + number % 7))

    pause, seconds = threading.Event(), count / 1000
    call = (
        flood,
        {"port": daemon.port, "first": first, "count": count, "seconds": seconds, "callers": 24},
    )
    with contextlib.closing(Tail(daemon.stderr)) as tail, clients(tmp_path, call) as found:
        wait_until(
            lambda: any(log_id >= first for log_id in list(admin.results)),
            30,
            "the first result of the flood",
        )
        start = time.monotonic()
        for number in range(1, reloads + 1):
            for broken in (True, False):
                pause.wait(
                    max(
                        0.0,
                        start
                        + (number - (0.5 if broken else 0)) * seconds / reloads
                        - time.monotonic(),
                    )
                )
                good = yaml.safe_dump(
                    {**config, "jobs": {**jobs, f"good_{number}": ledger.job()}}, sort_keys=False
                )
                if broken:
                    replace(list(BROKEN.values())[number % len(BROKEN)](good))
                    wait_until(
                        lambda: tail.count("reload failed, the old jobs stay: ") == number,
                        20,
                        "the refusal of the file",
                    )
                    kept = number - 1
                else:
                    replace(good)
                    wait_until(lambda: tail.count("INFO    reloaded ") == number, 20, "the reload")
                    kept = number
                refusal = probe(kept)
                assert refusal is None or reason(refusal) in REFUSALS.values(), (
                    number,
                    broken,
                    refusal,
                )
                assert probe(2 * number - 1 - kept).startswith("job handler"), (number, broken)
        reloaded = time.monotonic() - start
        assert tail.count("reload failed, ") == tail.count("INFO    reloaded ") == reloads
    [found] = found
    grown = rss(pid, "VmHWM") - before
    ledger.accepted |= set(found["accepted"])
    ledger.settle(daemon, 60)
    refused, accepted = quantiles(found["times"]["refused"]), quantiles(found["times"]["accepted"])
    print(
        f"{count} triggers in {found['seconds']:.1f} s; ms: (p50, p99, max);"
        f" {len(found['accepted'])} accepted {accepted}, {sum(found['refused'].values())} refused"
        f" {refused} {found['refused']}; 2 x {reloads} reloads in {reloaded:.1f} s; memory"
        f" +{grown / MIB:.1f} MiB"
    )
    assert not found["errors"]
    assert len(found["accepted"]) + sum(found["refused"].values()) == count
    assert set(found["refused"]) == set(REFUSALS.values()), found["refused"]
    assert refused[1] <= 100 and refused[2] <= 1000, refused
    assert grown <= 64 * MIB, f"{grown / MIB:.1f} MiB"
    times = collections.Counter(ledger.started())
    assert set(times.values()) == {1} and set(times) <= ledger.accepted
    assert daemon.stop() == 0


def main(name, arguments):
    """The client: one function, its arguments as JSON; its result on stdout. It ends by itself."""
    arguments = json.loads(arguments)
    signal.alarm(600 + arguments["count"] // 100)
    json.dump({"fuzz": fuzz, "flood": flood}[name](**arguments), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
