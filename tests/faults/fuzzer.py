"""Sends requests that nobody should send, and reads what is answered; a program of its own, see
`clients`.
"""

import collections
import contextlib
import json
import random
import re
import socket
import time

from client import Client, post, run_as_program

import xxl_executor

POST_PATHS = ("/beat", "/idleBeat", "/run", "/trigger", "/kill", "/log")


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


def answered(client, bodiless):
    """The next answer and the code of its envelope. Raises ValueError when it is not as it should
    be."""
    answer = client.answer(bodiless)
    if answer is None:
        raise ValueError("the end instead of an answer")
    return answer, check_envelope(*answer, bodiless)


def is_trigger(head, method, path):
    """Whether the request, whatever form its target has, triggers a run."""
    if method != "POST" or path not in ("/run", "/trigger"):
        return False
    target = head.split(b" ", 2)[1].decode("latin-1").partition("?")[0]
    return re.sub("/+", "/", re.sub("^http://x(?=/)", "", target)) in ("/run", "/trigger")


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
                answer, code = answered(client, method == "HEAD")
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
            if code == answer[0] == 200 and is_trigger(head, method, path):
                accepted.append(xxl_executor.number_of(xxl_executor.decode(body), "logId"))
            # those behind it were not looked at: they come again
            if b"\r\nConnection: close" in answer[1]:
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


if __name__ == "__main__":
    run_as_program(fuzz)
