"""Peers without the token attack the port: the others are answered, and nothing grows."""

import collections
import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from client import clients
from conftest import LAUNCH, Executor, launch, run_job, wait_until
from crowd import ask_for_metrics
from tools import Ledger, forget_peak, rounds, rss, traced

import xxl_executor

TOKEN = "secret"
HELLO = {"hello": {"shell": "true"}}
GUARDED = {"admin_options": {"access_token": TOKEN}}
SHOWN = b"XXL-JOB-ACCESS-TOKEN: secret"
WRONG = b"XXL-JOB-ACCESS-TOKEN: Secret"
MIB, HEAD, BODY = 1 << 20, 16 << 10, 5 << 20
PROMPT = 3.0  # seconds that an answer may take; the admin waits no longer
# A crowd needs a cap that is soon reached.
CROWDED = {"executor": {"max_connections": 8}}
PATHS = [
    *((b"GET", path) for path in (b"/health", b"/metrics", b"/status")),
    *(
        (b"POST", path)
        for path in (b"/beat", b"/idleBeat", b"/run", b"/trigger", b"/kill", b"/log")
    ),
]


# -- helpers

Answer = collections.namedtuple("Answer", "status headers body")


def request(method, path, *fields, body=b"", length=None):
    """A request as bytes; `length` is told in place of that of `body`."""
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: x", *fields]
    if body or length is not None:
        lines.append(b"Content-Length: %d" % (len(body) if length is None else length))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def beat(*fields):
    return request(b"POST", b"/beat", *fields)


def health():
    return request(b"GET", b"/health")


def trigger(log_id=1, **fields):
    """The body of a trigger."""
    fields = {"jobId": 1, "logId": log_id, "executorHandler": "job", "glueType": "BEAN", **fields}
    return json.dumps(fields).encode()


def envelope(found):
    """(code, message) of an answer; both must be there, as the admin reads them."""
    fields = json.loads(found.body)
    return fields["code"], fields["msg"]


class Client:
    """One connection that sends bytes as they are and takes answers one by one."""

    def __init__(self, port, seconds=20):
        self.buffer = b""
        self.sock = socket.create_connection(("127.0.0.1", port), seconds)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)

    def reset(self):
        """Go away without a goodbye."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def parse(self, bodiless=False):
        """The first whole answer in the buffer, or None."""
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        line, *fields = head.decode("latin-1").split("\r\n")
        status = re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", line)
        assert status, f"no status line: {line!r}"
        headers = {name.lower(): value for name, _, value in (f.partition(": ") for f in fields)}
        length = 0 if bodiless else int(headers.get("content-length", 0))
        if len(rest) < length:
            return None
        self.buffer = rest[length:]
        return Answer(int(status[1]), headers, rest[:length])

    def answer(self, seconds=20, bodiless=False):
        """The next answer, None at the end of the connection; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.parse(bodiless)
            if found:
                return found
            if not self.readable(deadline - time.monotonic()):
                pytest.fail(f"no answer within {seconds} s")
            data = self.sock.recv(1 << 16)
            if not data:
                assert not self.buffer, f"half an answer: {self.buffer!r}"
                return None
            self.buffer += data

    def readable(self, seconds=0.0):
        return bool(select.select([self.sock], [], [], max(0.0, seconds))[0])

    def ended(self, seconds=20):
        """Whether the server closes within `seconds` and says nothing more."""
        deadline = time.monotonic() + seconds
        while self.readable(deadline - time.monotonic()):
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionError:
                data = b""
            self.buffer += data
            if not data:
                return not self.buffer
        return False

    def alive(self, *fields, seconds=20):
        """A heartbeat is answered, and well."""
        self.send(beat(*fields))
        found = self.answer(seconds)
        assert found, "the connection ended"
        assert (found.status, envelope(found)) == (200, (200, None))


@contextlib.contextmanager
def killed_when_it_fails(daemon):
    """A daemon that is stuck does not stop by itself."""
    try:
        yield
    except BaseException:
        daemon.kill()
        raise


@contextlib.contextmanager
def in_threads(*acts):
    """Run each act in a thread meanwhile; they end by themselves once the event that they get is
    set."""
    stop = threading.Event()
    threads = [threading.Thread(target=act, args=(stop,), name="peer") for act in acts]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def slow_selector(daemon, call, seconds):
    """The thread that waits for the connections takes `seconds` longer for each system call
    `call`."""
    numbers = {"epoll_wait": "232", "epoll_pwait": "281"}
    if os.uname().machine != "x86_64":
        numbers = {"epoll_pwait": "22"}

    def waiting():
        for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                if (task / "syscall").read_text().split()[0] in numbers.values():
                    return task.name
        return None

    try:
        next(Path(f"/proc/{daemon.process.pid}/task").iterdir()).joinpath("syscall").read_text()
    except OSError as error:
        pytest.skip(f"what a thread waits for is not shown: {error}")
    calls = ",".join(numbers) if call == "epoll_wait" else call
    slow = f"inject={calls}:delay_enter={int(seconds * 1e6)}"
    task = wait_until(waiting, 10, "the selector")
    with traced(daemon, [task], "-o", "/dev/null", "-e", f"trace={calls}", "-e", slow):
        yield


def shared(tmp_path_factory, admin):
    daemon = Executor(
        tmp_path_factory.mktemp("peers"),
        {"admin": admin, "executor": {"bind": "127.0.0.1:0", "data_dir": "./data"}},
    ).start()
    yield daemon
    daemon.close()
    assert not re.search(r"ResourceWarning|Traceback|unexpected error", daemon.log), daemon.log


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory):
    """One daemon without a token, for all tests that change nothing in it."""
    yield from shared(tmp_path_factory, {})


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """One daemon with a token, for all tests that change nothing in it."""
    yield from shared(tmp_path_factory, GUARDED["admin_options"])


# -- hostile heads


def filled(before, piece, after=b"\r\n\r\n"):
    """A head of 16,000 bytes: `before`, then `piece` over and over, then `after`."""
    return before + piece * ((16_000 - len(before) - len(after)) // len(piece)) + after


START = b"POST /beat HTTP/1.1\r\nHost: x\r\n"
HOST = b"POST /beat HTTP/1.1\r\nHost: "
TO_BEAT = b"/beat HTTP/1.1\r\nHost: x\r\n\r\n"
FREEZING = {
    "spaces-then-a-cr": filled(b"GET /health HTTP/1.1\r\nExpect:", b" ", b"\rX\r\n\r\n"),
    "tabs-then-a-cr": filled(START + b"Content-Length:", b"\t", b"\rX\r\n\r\n"),
    "blanks-then-a-cr": filled(START + b"transfer-encoding:", b" \t", b"\rX\r\n\r\n"),
    "blanks-between-then-a-cr": filled(
        START + b"Expect:" + b" " * 4000 + b"x", b" ", b"\rX\r\n\r\n"
    ),
    "letters-in-the-host-then-a-quote": filled(HOST, b"a", b'"\r\n\r\n'),
    "encoded-letters-in-the-host-then-a-percent-sign": filled(HOST, b"%41", b"%\r\n\r\n"),
    "digits-and-colons-in-the-host-then-a-bracket": filled(HOST + b"[", b"1:", b"[\r\n\r\n"),
    "letters-in-an-authority-then-a-quote": filled(b"POST http://", b"a", b'"' + TO_BEAT),
    "encoded-letters-in-the-target-then-a-percent-sign": filled(b"POST /", b"%41", b"%" + TO_BEAT),
}
HOSTILE = {
    "spaces": filled(START + b"X: a", b" ", b"b\r\n\r\n"),
    "spaces-in-an-expectation": filled(START + b"Expect: a", b" ", b"b\r\n\r\n"),
    "spaces-before-a-colon": filled(START + b"Expect", b" ", b": 100-continue\r\n\r\n"),
    "spaces-in-the-first-line": filled(b"POST", b" ", b"/beat HTTP/1.1\r\nHost: x\r\n\r\n"),
    "words": filled(START + b"Content-Length: ", b"1 "),
    "commas": filled(START + b"Connection: ", b", "),
    "closes": filled(START + b"Connection: ", b"close,"),
    "colons": filled(START + b"X", b":"),
    "colons-and-blanks": filled(START + b"X", b": \t"),
    "crs": filled(START + b"Expect:", b"\r"),
    "crs-and-spaces": filled(START + b"Expect:", b" \r"),
    "crs-and-tabs-before-a-colon": filled(START + b"Content-Length", b"\t\r", b": 5\r\n\r\n"),
    "lfs": filled(START + b"X:", b"\n"),
    "nuls": filled(START + b"X:", b"\0"),
    "semicolons-and-quotes": filled(START + b"Cookie: ", b';"\\'),
    "a-long-name": filled(START, b"x", b": y\r\n\r\n"),
    "no-colon": filled(START, b"x "),
    "repeated-empty-fields": filled(START, b"X:\r\n", b"\r\n"),
    "repeated-lengths": filled(START, b"Content-Length: 0\r\n", b"\r\n"),
    "repeated-expectations": filled(START, b"Expect:   \r\n", b"\r\n"),
    "repeated-encodings": filled(START, b"Transfer-Encoding: x\r\n", b"\r\n"),
    "repeated-hosts": filled(START, b"Host: x\r\n", b"\r\n"),
    "folded": filled(START + b"X: a", b"\r\n b"),
    "digits": filled(START + b"Content-Length: ", b"9"),
    "zeros": filled(START + b"Content-Length: ", b"0", b"0\r\n\r\n"),
    "a-long-version": filled(b"POST /beat HTTP/1.", b"1", b"\r\nHost: x\r\n\r\n"),
    "a-long-method": filled(b"P", b"X", b" /beat HTTP/1.1\r\nHost: x\r\n\r\n"),
    "slashes": filled(b"POST ", b"/", b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "authorities": filled(b"POST http://", b"@[:", b"/beat HTTP/1.1\r\nHost: x\r\n\r\n"),
    "queries": filled(b"POST /beat?", b"&?=%", b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "dots-in-the-host": filled(HOST, b"a."),
    "letters-in-the-host": filled(HOST, b"a"),
    "percents-in-the-host": filled(HOST, b"%"),
    "encoded-letters-in-the-host": filled(HOST, b"%41"),
    "colons-in-the-host": filled(HOST, b":"),
    "brackets-in-the-host": filled(HOST, b"[:]"),
    "letters-in-the-target": filled(b"POST /", b"a", TO_BEAT),
    "percents-in-the-target": filled(b"POST /", b"%", TO_BEAT),
    "encoded-letters-in-the-target": filled(b"POST /", b"%41", TO_BEAT),
    "letters-in-an-authority": filled(b"POST http://", b"a", TO_BEAT),
    "percents-in-an-authority": filled(b"POST http://", b"%", TO_BEAT),
    "percents-in-the-query": filled(b"POST /beat?", b"%", b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "empty-lines-before": filled(b"", b"\r\n", START + b"\r\n"),
    "no-line-at-all": b"\xff" * HEAD,
}


@pytest.mark.parametrize("head", FREEZING.values(), ids=FREEZING)
def test_no_head_freezes_the_daemon(executor, head):
    """The time that a head takes is linear in its bytes, or one packet would stop all jobs'
    triggers for ever."""
    daemon = executor()
    with killed_when_it_fails(daemon), Client(daemon.port) as other, Client(daemon.port) as hostile:
        other.alive()
        hostile.send(head)
        other.alive(seconds=PROMPT)
        assert hostile.answer(PROMPT).status == 400


@pytest.mark.parametrize("head", HOSTILE.values(), ids=HOSTILE)
def test_hostile_heads_are_answered_and_delay_nobody(unguarded, head):
    with Client(unguarded.port) as other, Client(unguarded.port) as hostile:
        other.alive()
        hostile.send(head)
        other.alive(seconds=PROMPT)
        assert hostile.answer(PROMPT).status in (
            200,
            400,
            404,
            405,
            411,
            413,
            414,
            417,
            431,
            501,
            505,
        )


# -- a strict parser

FOLLOWS = health()  # what is refused must not hide a second request


def line(text):
    """A request with this first line."""
    return text + b"\r\nHost: x\r\n\r\n"


def field(*lines):
    """A heartbeat with these further lines in its head."""
    return START + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


MALFORMED = {
    # line ends
    "cr-in-the-method": line(b"PO\rST /beat HTTP/1.1"),
    "cr-after-the-method": line(b"POST\r /beat HTTP/1.1"),
    "cr-for-a-space": line(b"POST\r/beat HTTP/1.1"),
    "cr-in-the-target": line(b"POST /be\rat HTTP/1.1"),
    "cr-in-the-version": line(b"POST /beat HTTP/1\r.1"),
    "cr-after-the-version": line(b"POST /beat HTTP/1.1\r"),
    "cr-before-the-request": b"\r" + field(),
    "cr-between-empty-lines": b"\r\n\r\r\n" + field(),
    "cr-in-a-name": field(b"X\rY: z"),
    "cr-before-a-colon": field(b"X\r: z"),
    "cr-in-a-value": field(b"X: y\rz"),
    "cr-at-the-start-of-a-value": field(b"X:\ry"),
    "cr-at-the-end-of-a-value": field(b"X: y\r"),
    "cr-and-space-at-the-end-of-a-value": field(b"X: y\r "),
    "cr-at-the-start-of-a-line": field(b"\rX: y"),
    "cr-that-would-end-a-line": field(b"X: y\rContent-Length: 5"),
    "cr-in-a-last-line": field(b"\r"),
    "cr-after-a-length": field(b"Content-Length: 5\r"),
    "cr-after-a-length-and-a-space": field(b"Content-Length: 5 \r"),
    "cr-before-a-length": field(b"Content-Length:\r5"),
    "cr-and-space-after-an-encoding": field(b"Transfer-Encoding: chunked\r "),
    "cr-after-an-encoding": field(b"Transfer-Encoding: chunked\r"),
    "cr-before-an-encoding": field(b"Transfer-Encoding:\rchunked"),
    "cr-in-the-host": b"POST /beat HTTP/1.1\r\nHost: x\ry\r\n\r\n",
    "lf-everywhere": b"POST /beat HTTP/1.1\nHost: x\n\n",
    "lf-after-the-first-line": b"POST /beat HTTP/1.1\nHost: x\r\n\r\n",
    "lf-after-a-field": b"POST /beat HTTP/1.1\r\nHost: x\nX: y\r\n\r\n",
    "lf-after-the-last-field": b"POST /beat HTTP/1.1\r\nHost: x\n\r\n",
    "lf-at-the-end": b"POST /beat HTTP/1.1\r\nHost: x\r\n\n",
    "lf-after-a-length": field(b"Content-Length: 5\nX: y"),
    "lf-in-the-target": line(b"POST /be\nat HTTP/1.1"),
    "lf-before-the-request": b"\n" + field(),
    # field names
    "space-before-the-colon": field(b"X : y"),
    "tab-before-the-colon": field(b"X\t: y"),
    "space-before-the-colon-of-the-host": b"POST /beat HTTP/1.1\r\nHost : x\r\n\r\n",
    "space-before-the-colon-of-a-length": field(b"Content-Length : 5"),
    "space-before-the-colon-of-an-encoding": field(b"Transfer-Encoding : chunked"),
    "tab-before-the-colon-of-an-encoding": field(b"Transfer-Encoding\t: chunked"),
    "space-in-a-name": field(b"X Y: z"),
    "empty-name": field(b": y"),
    "only-a-colon": field(b":"),
    "nul-in-a-name": field(b"X\0: y"),
    "control-character-in-a-name": field(b"X\x1b: y"),
    "delete-in-a-name": field(b"X\x7f: y"),
    "non-ascii-in-a-name": field(b"X\xc3\xa9: y"),
    "no-break-space-in-a-name": field(b"Content-Length\xa0: 5"),
    "parentheses-in-a-name": field(b"(X): y"),
    "at-in-a-name": field(b"X@Y: z"),
    "slash-in-a-name": field(b"X/Y: z"),
    "comma-in-a-name": field(b"X,Y: z"),
    "semicolon-in-a-name": field(b"X;Y: z"),
    "equals-in-a-name": field(b"X=Y: z"),
    "brackets-in-a-name": field(b"X[0]: y"),
    "braces-in-a-name": field(b"{X}: y"),
    "quotes-in-a-name": field(b'"X": y'),
    "backslash-in-a-name": field(b"X\\Y: z"),
    "angles-in-a-name": field(b"<X>: y"),
    "question-mark-in-a-name": field(b"X?: y"),
    "no-colon": field(b"garbage"),
    "no-colon-but-a-space": field(b"Content-Length 5"),
    "no-colon-but-an-equals-sign": field(b"X=y"),
    # field values
    "nul-in-a-value": field(b"X: a\0b"),
    "nul-at-the-end-of-a-value": field(b"X: a\0"),
    "0x01-in-a-value": field(b"X: a\x01b"),
    "0x08-in-a-value": field(b"X: a\x08b"),
    "vertical-tab-in-a-value": field(b"X: a\x0bb"),
    "form-feed-in-a-value": field(b"X: a\x0cb"),
    "escape-in-a-value": field(b"X: \x1b[2Jb"),
    "0x1f-in-a-value": field(b"X: a\x1fb"),
    "delete-in-a-value": field(b"X: a\x7fb"),
    "vertical-tab-before-a-length": field(b"Content-Length: \x0b5"),
    "form-feed-after-an-encoding": field(b"Transfer-Encoding: chunked\x0c"),
    "nul-in-the-host": b"POST /beat HTTP/1.1\r\nHost: x\0\r\n\r\n",
    # lines that begin with a blank
    "folded-by-a-space": field(b"X: a", b" b"),
    "folded-by-a-tab": field(b"X: a", b"\tb"),
    "folded-to-nothing": field(b"X: a", b" "),
    "folded-length": field(b"Content-Length:", b" 5"),
    "folded-encoding": field(b"Transfer-Encoding:", b" chunked"),
    "folded-host": b"POST /beat HTTP/1.1\r\nHost:\r\n x\r\n\r\n",
    "space-before-the-first-field": b"POST /beat HTTP/1.1\r\n Host: x\r\nHost: x\r\n\r\n",
    "tab-before-the-first-field": b"POST /beat HTTP/1.1\r\n\tX: y\r\nHost: x\r\n\r\n",
    "space-before-a-later-field": field(b" Content-Length: 5"),
    # versions
    "version-with-one-number": line(b"POST /beat HTTP/1"),
    "version-with-a-dot-only": line(b"POST /beat HTTP/1."),
    "version-without-numbers": line(b"POST /beat HTTP/"),
    "version-with-three-numbers": line(b"POST /beat HTTP/1.1.1"),
    "version-11.1": line(b"POST /beat HTTP/11.1"),
    "version-1.10": line(b"POST /beat HTTP/1.10"),
    "version-01.1": line(b"POST /beat HTTP/01.1"),
    "version-1.01": line(b"POST /beat HTTP/1.01"),
    "version--1.1": line(b"POST /beat HTTP/-1.1"),
    "version-+1.1": line(b"POST /beat HTTP/+1.1"),
    "version-in-lower-case": line(b"POST /beat http/1.1"),
    "version-in-mixed-case": line(b"POST /beat Http/1.1"),
    "version-1.1x": line(b"POST /beat HTTP/1.1x"),
    "version-x.1": line(b"POST /beat HTTP/x.1"),
    "version-with-a-comma": line(b"POST /beat HTTP/1,1"),
    "version-with-a-space": line(b"POST /beat HTTP/ 1.1"),
    "version-without-a-slash": line(b"POST /beat HTTP1.1"),
    "version-in-other-digits": line(b"POST /beat HTTP/\xb9.\xb9"),
    "version-of-another-protocol": line(b"POST /beat ICAP/1.0"),
    "version-twice": line(b"POST /beat HTTP/1.1 HTTP/1.1"),
    "no-version": line(b"POST /beat"),
    "no-version-of-get": line(b"GET /health"),
    "no-version-and-no-field": b"GET /health\r\n\r\n",
    "no-target": line(b"POST HTTP/1.1"),
    "one-word": line(b"POST"),
    # targets
    "target-asterisk": line(b"OPTIONS * HTTP/1.1"),
    "target-authority": line(b"CONNECT host:80 HTTP/1.1"),
    "target-authority-of-post": line(b"POST host:80 HTTP/1.1"),
    "target-address": line(b"CONNECT [::1]:80 HTTP/1.1"),
    "target-without-a-slash": line(b"POST beat HTTP/1.1"),
    "target-relative": line(b"POST ./beat HTTP/1.1"),
    "target-backslash": line(b"POST \\beat HTTP/1.1"),
    "target-only-a-query": line(b"POST ?x HTTP/1.1"),
    "target-with-nul": line(b"POST /beat\0 HTTP/1.1"),
    "target-with-0x01": line(b"POST /be\x01at HTTP/1.1"),
    "target-with-tab": line(b"POST /be\tat HTTP/1.1"),
    "target-with-escape": line(b"POST /beat?\x1b[2J HTTP/1.1"),
    "target-with-delete": line(b"POST /beat\x7f HTTP/1.1"),
    "target-with-utf-8": line(b"POST /b\xc3\xa9at HTTP/1.1"),
    "target-with-latin-1": line(b"POST /beat?\xe9 HTTP/1.1"),
    "target-with-no-break-space": line(b"POST /beat\xa0x HTTP/1.1"),
    "target-with-next-line": line(b"POST /beat\x85x HTTP/1.1"),
    "target-with-fragment": line(b"POST /beat#x HTTP/1.1"),
    "target-with-fragment-in-query": line(b"POST /beat?x#y HTTP/1.1"),
    "target-absolute-with-fragment": line(b"POST http://any:1/beat#x HTTP/1.1"),
    "target-absolute-with-control-character": line(b"POST http://any:1/be\x02at HTTP/1.1"),
    "target-absolute-with-no-host": line(b"POST http://:80/beat HTTP/1.1"),
    "target-absolute-with-two-colons": line(b"POST http://a:b:c/beat HTTP/1.1"),
    "target-absolute-with-an-open-bracket": line(b"POST http://[::1/beat HTTP/1.1"),
    "target-absolute-with-a-backslash-in-the-host": line(b"POST http://a\\b/beat HTTP/1.1"),
    "target-absolute-with-an-angle-in-the-host": line(b"POST http://a<b/beat HTTP/1.1"),
    "target-absolute-with-a-bad-percent-sign-in-the-host": line(b"POST http://a%zz/beat HTTP/1.1"),
    "target-absolute-with-a-user": line(b"POST http://user@a/beat HTTP/1.1"),
    "target-with-a-quote": line(b'POST /beat" HTTP/1.1'),
    "target-with-a-quote-in-the-query": line(b'POST /beat?x=" HTTP/1.1'),
    "target-with-an-angle": line(b"POST /beat< HTTP/1.1"),
    "target-with-an-angle-in-the-query": line(b"POST /beat?x=< HTTP/1.1"),
    "target-with-a-closing-angle": line(b"POST /beat> HTTP/1.1"),
    "target-with-a-closing-angle-in-the-query": line(b"POST /beat?x=> HTTP/1.1"),
    "target-with-a-backslash": line(b"POST /beat\\ HTTP/1.1"),
    "target-with-a-backslash-in-the-query": line(b"POST /beat?x=\\ HTTP/1.1"),
    "target-with-a-circumflex": line(b"POST /beat^ HTTP/1.1"),
    "target-with-a-circumflex-in-the-query": line(b"POST /beat?x=^ HTTP/1.1"),
    "target-with-a-backtick": line(b"POST /beat` HTTP/1.1"),
    "target-with-a-backtick-in-the-query": line(b"POST /beat?x=` HTTP/1.1"),
    "target-with-a-brace": line(b"POST /beat{ HTTP/1.1"),
    "target-with-a-brace-in-the-query": line(b"POST /beat?x={ HTTP/1.1"),
    "target-with-a-bar": line(b"POST /beat| HTTP/1.1"),
    "target-with-a-bar-in-the-query": line(b"POST /beat?x=| HTTP/1.1"),
    "target-with-a-closing-brace": line(b"POST /beat} HTTP/1.1"),
    "target-with-a-closing-brace-in-the-query": line(b"POST /beat?x=} HTTP/1.1"),
    "target-with-a-percent-sign-and-no-digits": line(b"POST /beat%zz HTTP/1.1"),
    "target-with-a-percent-sign-and-no-digits-in-the-query": line(b"POST /beat?x=%zz HTTP/1.1"),
    "target-with-a-percent-sign-and-one-digit": line(b"POST /beat%4 HTTP/1.1"),
    "target-with-a-percent-sign-and-one-digit-in-the-query": line(b"POST /beat?x=%4 HTTP/1.1"),
    "target-with-a-lone-percent-sign": line(b"POST /beat% HTTP/1.1"),
    "target-with-a-lone-percent-sign-in-the-query": line(b"POST /beat?x=% HTTP/1.1"),
    # the first line
    "two-spaces-after-the-method": line(b"POST  /beat HTTP/1.1"),
    "two-spaces-after-the-target": line(b"POST /beat  HTTP/1.1"),
    "space-in-the-target": line(b"POST /be at HTTP/1.1"),
    "space-after-the-version": line(b"POST /beat HTTP/1.1 "),
    "space-before-the-method": line(b" POST /beat HTTP/1.1"),
    "tab-before-the-method": line(b"\tPOST /beat HTTP/1.1"),
    "tab-after-the-method": line(b"POST\t/beat HTTP/1.1"),
    "tab-after-the-target": line(b"POST /beat\tHTTP/1.1"),
    "vertical-tab-after-the-method": line(b"POST\x0b/beat HTTP/1.1"),
    "only-a-space": line(b" "),
    "parenthesis-in-the-method": line(b"PO(ST /beat HTTP/1.1"),
    "colon-in-the-method": line(b"POST: /beat HTTP/1.1"),
    "nul-in-the-method": line(b"POST\0 /beat HTTP/1.1"),
    "non-ascii-in-the-method": line(b"P\xd6ST /beat HTTP/1.1"),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x5a" * 100 + b"\r\n\r\n",
    "socks": b"\x05\x01\x00\r\n\r\n",
    # hosts
    "no-host": b"POST /beat HTTP/1.1\r\n\r\n",
    "no-host-but-another-field": b"POST /beat HTTP/1.1\r\nX: y\r\n\r\n",
    "no-host-for-an-absolute-target": b"POST http://any:1/beat HTTP/1.1\r\n\r\n",
    "two-hosts": field(b"Host: y"),
    "two-equal-hosts": field(b"Host: x"),
    "two-hosts-in-other-spelling": field(b"hOST: x"),
    "host-with-a-space": b"POST /beat HTTP/1.1\r\nHost: x y\r\n\r\n",
    "host-with-two-colons": b"POST /beat HTTP/1.1\r\nHost: a:b:c\r\n\r\n",
    "host-with-an-open-bracket": b"POST /beat HTTP/1.1\r\nHost: [::1\r\n\r\n",
    "host-with-a-lone-bracket": b"POST /beat HTTP/1.1\r\nHost: a]b\r\n\r\n",
    "host-with-a-port-that-is-no-number": b"POST /beat HTTP/1.1\r\nHost: x:port\r\n\r\n",
    "host-with-a-bad-percent-sign": b"POST /beat HTTP/1.1\r\nHost: a%zz\r\n\r\n",
    "host-with-brackets-around-no-address": b"POST /beat HTTP/1.1\r\nHost: [zz]\r\n\r\n",
    "two-hosts-in-1.0": b"POST /beat HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
    # lengths
    "two-lengths": field(b"Content-Length: 5", b"Content-Length: 6"),
    "two-equal-lengths": field(b"Content-Length: 0", b"Content-Length: 0"),
    "two-lengths-in-other-spelling": field(b"Content-Length: 5", b"content-length: 5"),
    "length-+5": field(b"Content-Length: +5"),
    "length--1": field(b"Content-Length: -1"),
    "length--0": field(b"Content-Length: -0"),
    "length-0x5": field(b"Content-Length:  0x5"),
    "length-1_0": field(b"Content-Length: 1_0"),
    "length-list": field(b"Content-Length: 5, 5"),
    "length-list-without-a-space": field(b"Content-Length: 5,5"),
    "length-list-with-one-part": field(b"Content-Length: 5,"),
    "length-two-words": field(b"Content-Length: 5 5"),
    "length-two-words-by-a-tab": field(b"Content-Length: 5\t5"),
    "length-empty": field(b"Content-Length:"),
    "length-blank": field(b"Content-Length: \t "),
    "length-empty-and-length": field(b"Content-Length:", b"Content-Length: 5"),
    "length-fraction": field(b"Content-Length: 5.0"),
    "length-exponent": field(b"Content-Length: 1e1"),
    "length-quoted": field(b'Content-Length: "5"'),
    "length-with-a-unit": field(b"Content-Length: 5B"),
    "length-with-a-parameter": field(b"Content-Length: 5;x=y"),
    "length-no-number": field(b"Content-Length: five"),
    "length-superscript": field(b"Content-Length: \xb2"),
    "length-arabic-digit": field(b"Content-Length: \xd9\xa3"),
    "length-in-1.0-twice": b"POST /beat HTTP/1.0\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
    # encodings
    "length-and-encoding": field(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "encoding-and-length": field(b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    "encoding-identity-and-length": field(b"Transfer-Encoding: identity", b"Content-Length: 0"),
    "encoding-empty-and-length": field(b"Transfer-Encoding:", b"Content-Length: 5"),
    "encoding-in-1.0": b"POST /beat HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    "encoding-and-length-in-1.0": (
        b"POST /beat HTTP/1.0\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"
    ),
}


@pytest.mark.parametrize("head", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_request_is_refused_and_ends_the_connection(unguarded, head):
    """A proxy may read it otherwise; then what follows would be a request that nobody has looked
    at."""
    with Client(unguarded.port) as client:
        client.send(head + FOLLOWS)
        found = client.answer(PROMPT)
        assert found and found.status == 400, found
        code, message = envelope(found)
        assert code == 500 and isinstance(message, str) and message.strip()
        assert found.headers["connection"] == "close"
        client.sock.shutdown(socket.SHUT_WR)
        assert client.ended(), f"a second answer: {client.buffer!r}"


@pytest.mark.parametrize(
    "head, status",
    [
        pytest.param(field(b"Transfer-Encoding: chunked"), 411, id="encoding-alone"),
        pytest.param(field(b"Content-Length: " + b"9" * 30), 413, id="length-of-30-digits"),
        pytest.param(field(b"Content-Length: %d" % (BODY + 1)), 413, id="length-beyond-the-limit"),
    ],
)
def test_well_formed_bodies_that_are_not_taken(unguarded, head, status):
    """They are told apart from what is malformed, so that the caller knows what to change."""
    with Client(unguarded.port) as client:
        client.send(head + FOLLOWS)
        found = client.answer(PROMPT)
        assert (found.status, found.headers["connection"]) == (status, "close")
        assert envelope(found)[0] == 500
        client.sock.shutdown(socket.SHUT_WR)
        assert client.ended(), f"a second answer: {client.buffer!r}"


WELL_FORMED = {
    "plain": beat(),
    "target-absolute": line(b"POST http://any:1/beat HTTP/1.1"),
    "target-absolute-with-a-query": line(b"POST http://any/beat?x=/y HTTP/1.1"),
    "target-absolute-with-a-port": line(b"POST http://a.example:8080/beat HTTP/1.1"),
    "target-absolute-of-ipv6": line(b"POST http://[::1]:80/beat HTTP/1.1"),
    "target-with-a-query": line(b"POST /beat?x=http://y/ HTTP/1.1"),
    "target-with-an-encoded-character": line(b"POST /beat?x=%41 HTTP/1.1"),
    "target-with-brackets-in-the-query": line(b"POST /beat?name[]=x HTTP/1.1"),
    "target-with-every-mark": line(b"POST /beat?-._~!$&'()*+,;=/?:@%7b HTTP/1.1"),
    "upper-case": b"POST /beat HTTP/1.1\r\nHOST: x\r\nCONTENT-LENGTH: 2\r\n\r\n{}",
    "lower-case": b"POST /beat HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
    "mixed-case": b"POST /beat HTTP/1.1\r\nhOsT: x\r\ncOnTeNt-LeNgTh: 2\r\n\r\n{}",
    "empty-value": field(b"X:"),
    "blank-value": field(b"X: \t "),
    "every-character-of-a-name": field(b"!#$%&'*+-.^_`|~09azAZ: x"),
    "tab-in-a-value": field(b"X: a\tb"),
    "colons-and-quotes-in-a-value": field(b'X: :a:"b\\c",;=?@[]{}()<>'),
    "obs-text": field(b"X: \x80\xe9\xff"),
    "utf-8-in-a-value": field("X: \u6f22\u5b57".encode()),
    "no-space-after-the-colon": field(b"X:y"),
    "blanks-around-a-length": START + b"Content-Length:\t 2 \t\r\n\r\n{}",
    "host-with-a-port": b"POST /beat HTTP/1.1\r\nHost: executor.example:9999\r\n\r\n",
    "host-of-ipv6": b"POST /beat HTTP/1.1\r\nHost: [::1]:9999\r\n\r\n",
    "host-of-ipv6-with-a-zone": b"POST /beat HTTP/1.1\r\nHost: [fe80::1%25eth0]:9999\r\n\r\n",
    "host-of-ipv6-with-a-plain-zone": b"POST /beat HTTP/1.1\r\nHost: [fe80::1%eth0]:9999\r\n\r\n",
    "host-of-ipv6-with-port-80": b"POST /beat HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
    "host-with-an-encoded-character": b"POST /beat HTTP/1.1\r\nHost: a%41\r\n\r\n",
    "host-with-blanks-around": b"POST /beat HTTP/1.1\r\nHost:\t x \t\r\n\r\n",
    "one-empty-line-before": b"\r\n" + beat(),
    "two-empty-lines-before": b"\r\n\r\n" + beat(),
    "1.0": b"POST /beat HTTP/1.0\r\n\r\n",
    "1.0-with-a-host-and-a-body": b"POST /beat HTTP/1.0\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    "1.0-that-is-kept": b"POST /beat HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
}


@pytest.mark.parametrize("whole", WELL_FORMED.values(), ids=WELL_FORMED)
def test_every_well_formed_request_is_taken(unguarded, whole):
    """Strict is not picky: what the standard allows is answered, twice on one connection."""
    with Client(unguarded.port) as client:
        for _ in range(2):
            client.send(whole)
            found = client.answer(PROMPT)
            assert (found.status, envelope(found)) == (200, (200, None))
            if found.headers.get("connection") == "close":
                assert b"HTTP/1.0" in whole and client.ended()
                break


@pytest.mark.parametrize(
    "shown",
    [
        SHOWN,
        SHOWN + b" \t  ",
        SHOWN + b"\t",
        SHOWN.replace(b": ", b":"),
        SHOWN.replace(b": ", b":\t \t"),
        SHOWN.replace(b"XXL-JOB-ACCESS-TOKEN", b"xxl-job-access-token"),
        SHOWN.replace(b"XXL-JOB-ACCESS-TOKEN", b"Xxl-Job-Access-Token") + b" ",
    ],
    ids=["plain", "blanks", "tab", "no-space", "tabs-before", "lower-case", "mixed-case"],
)
def test_blanks_around_a_token_are_not_part_of_it(guarded, shown):
    with Client(guarded.port) as client:
        client.alive(shown)


# -- the cap of connections


@pytest.mark.parametrize("slow", [False, True], ids=["in-full-speed", "with-a-slow-selector"])
def test_after_a_crowd_the_next_connection_is_answered(executor, slow):
    """Who leaves makes room at the cap, however many leave at once;
    else nobody would be heard until a restart."""
    daemon = executor(**CROWDED)
    port, count, lock = daemon.port, iter(range(800 if slow else 5000)), threading.Lock()

    def come_and_go(stop):
        while not stop.is_set():
            with lock:
                number = next(count, None)
            if number is None:
                return
            try:
                with Client(port, PROMPT) as client:
                    client.send(beat() * 20 if slow else beat())
                    if slow:  # so that it leaves when its answers are on their way
                        client.sock.recv(1)
                    client.reset()
            except ConnectionError:
                pass
            except OSError:
                return  # too late: it is deaf, or only slow, so the test asks once more

    delay = slow_selector(daemon, "epoll_ctl", 0.0005) if slow else contextlib.nullcontext()
    with delay:
        with in_threads(*[come_and_go] * 16) as stop:
            wait_until(
                lambda: stop.is_set() or not any(t.name == "peer" for t in threading.enumerate()),
                40,
                "the end of the crowd",
            )
        try:
            with Client(port, 5) as client:
                client.alive(seconds=5)
        except OSError as error:
            pytest.fail(f"the next connection: {error}")


def test_strangers_make_room_for_who_shows_the_token(executor):
    """Eight connections that never show the token cost nothing; they must not keep the admin
    out."""
    daemon = executor(
        **GUARDED,
        **CROWDED,
        env=launch(REQUEST_TIMEOUT=60.0, STRANGER_TIMEOUT=60.0),
        program=LAUNCH,
    )
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Client(daemon.port)) for _ in range(4)]
        answered = [stack.enter_context(Client(daemon.port)) for _ in range(4)]
        for client in answered:
            client.send(health())
            assert client.answer().status == 200
        admins = []
        for _ in range(8):
            admins.append(stack.enter_context(Client(daemon.port)))
            admins[-1].alive(SHOWN, seconds=5)
        assert all(client.ended(5) for client in silent + answered)
        for client in admins:
            client.alive(SHOWN)


def test_strangers_who_do_not_read_make_room(executor):
    """They ask for more than they take, and take a little now and then, so that they are never idle
    and never late."""
    daemon = executor(**GUARDED, executor={"max_connections": 8})
    with contextlib.ExitStack() as stack:
        greedy = []
        for _ in range(8):
            client = stack.enter_context(Client(daemon.port))
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.send(request(b"GET", b"/metrics") * 2000)  # answered with some 10 MiB
            client.sock.setblocking(False)
            greedy.append(client)
        stat = Path(f"/proc/{daemon.process.pid}/stat")

        def at_rest():
            before = stat.read_text().split()[13:15]
            threading.Event().wait(0.3)
            return stat.read_text().split()[13:15] == before

        wait_until(at_rest, 30, "the end of all room for answers")
        for _ in range(8):
            for client in greedy:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    client.sock.recv(1024)
            with Client(daemon.port) as admin:
                admin.alive(SHOWN, seconds=5)


def test_strangers_who_always_wait_for_an_answer_make_room(executor, tmp_path):
    """More of them than there are connections ask for metrics again and again, so that each of them
    waits for an answer nearly always: whoever shows the token is heard all the same."""
    daemon, over = executor(**GUARDED, executor={"max_connections": 64}), tmp_path / "over"

    def connections():
        found = 0
        for fd in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += os.readlink(fd).startswith("socket:")
        return found

    arguments = {"port": daemon.port, "count": 80, "over": str(over), "seconds": 60}
    with clients(tmp_path, (ask_for_metrics, arguments)) as found:
        try:
            wait_until(lambda: connections() >= 64, 30, "the crowd")
            for _ in range(5):
                try:
                    with Client(daemon.port, 10) as admin:
                        admin.alive(SHOWN, seconds=10)
                except OSError as error:
                    pytest.fail(f"nobody hears the admin: {error!r}")
        finally:
            over.touch()
    [answers] = found
    assert answers > 0, "no stranger had an answer"


def test_strangers_who_ask_for_more_than_is_being_answered_are_told_so(executor):
    """Metrics take a moment to make: a stranger who comes when many others wait for theirs gets a
    503 at once, and whoever shows the token gets them."""
    daemon = executor(**GUARDED, executor={"max_connections": 64})
    statuses = collections.Counter()

    def burst():
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(Client(daemon.port)) for _ in range(48)]
            for client in strangers:
                client.send(request(b"GET", b"/metrics"))
            with Client(daemon.port) as admin:
                admin.send(request(b"GET", b"/metrics", SHOWN))
                found = admin.answer(PROMPT)
                assert found.status == 200 and b"xxl_executor_" in found.body
            statuses.update(client.answer(PROMPT).status for client in strangers)
        return statuses[503]

    wait_until(burst, 20, "an answer that says that there are too many")
    assert statuses[200] > 0 and set(statuses) == {200, 503}
    print(dict(statuses))


def test_strangers_who_leave_before_their_answer_keep_nobody_out(executor):
    """The disk is slow, so metrics take seconds, and a crowd that asks for them does not wait, but
    comes over new connections: each new connection of the admin is answered, and the one that it
    has lives on."""
    daemon = executor(**GUARDED, executor={"max_connections": 64})
    port = daemon.port

    def come_and_go(stop):
        mine = collections.deque()
        with contextlib.ExitStack() as stack:
            while not stop.wait(0.02):
                with contextlib.suppress(OSError):
                    mine.append(stack.enter_context(Client(port, 1)))
                    mine[-1].send(request(b"GET", b"/metrics"))
                if len(mine) > 100:
                    mine.popleft().sock.close()

    tasks = [task.name for task in Path(f"/proc/{daemon.process.pid}/task").iterdir()]
    slow = "-o", "/dev/null", "-e", "trace=fcntl", "-e", "inject=fcntl:delay_enter=3000000"
    with Client(port) as idle:
        idle.alive(SHOWN)
        # The journal is locked for whoever looks what is undelivered.
        with traced(daemon, tasks, *slow), in_threads(*[come_and_go] * 2) as stop:
            for number in range(60):
                try:
                    with Client(port, PROMPT) as admin:
                        admin.alive(SHOWN, seconds=PROMPT)
                except OSError as error:
                    pytest.fail(f"nobody hears the admin, connection {number}: {error!r}")
                stop.wait(0.1)  # for the crowd to grow
        idle.alive(SHOWN)


def test_who_resets_takes_no_other_connection_with_it(executor):
    """The descriptor of a client that vanished is given to the next one in the same moment."""
    daemon = executor(**GUARDED)
    going = threading.Event()

    def vanish():
        while not going.is_set():
            with contextlib.suppress(OSError):
                client = Client(daemon.port, 5)
                client.send(request(b"GET", b"/metrics"))
                client.reset()

    crowd = [threading.Thread(target=vanish) for _ in range(4)]
    for thread in crowd:
        thread.start()
    try:
        for _ in range(rounds(1500, "XXL_FAULT_RESETS")):
            with Client(daemon.port, 10) as client:
                client.alive(SHOWN, seconds=10)
    finally:
        going.set()
        for thread in crowd:
            thread.join()


def test_a_stranger_goes_before_who_has_been_idle_for_longer(executor):
    daemon = executor(
        **GUARDED,
        **CROWDED,
        env=launch(REQUEST_TIMEOUT=60.0, STRANGER_TIMEOUT=60.0),
        program=LAUNCH,
    )
    with contextlib.ExitStack() as stack:
        admins = [stack.enter_context(Client(daemon.port)) for _ in range(7)]
        for client in admins:
            client.alive(SHOWN)
        stranger = stack.enter_context(Client(daemon.port))
        stranger.send(health())
        assert stranger.answer().status == 200
        admins.append(stack.enter_context(Client(daemon.port)))
        admins[-1].alive(SHOWN, seconds=5)
        assert stranger.ended(5)
        for client in admins:
            client.alive(SHOWN)


@pytest.mark.parametrize("token", [True, False], ids=["with-a-token", "without-a-token"])
def test_at_the_cap_the_longest_idle_connection_goes(executor, token):
    """Where no token is configured, whoever has had an answer counts as one that has shown it."""
    daemon = executor(**(GUARDED if token else {}), **CROWDED)
    shown = [SHOWN] if token else []
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(daemon.port)) for _ in range(8)]
        for client in clients:
            client.alive(*shown)
        clients[0].alive(*shown)  # so the next one is idle for longest
        for _ in range(2):
            clients.append(stack.enter_context(Client(daemon.port)))
            clients[-1].alive(*shown, seconds=5)
        gone = clients[1:3]
        assert all(client.ended(5) for client in gone)
        for client in clients:
            if client not in gone:
                client.alive(*shown)


def test_who_sends_or_waits_for_an_answer_never_has_to_go(executor):
    """Only idle connections make room: half a request, and one that the daemon has not even read,
    are finished."""
    daemon = executor(
        **GUARDED,
        **CROWDED,
        env=launch(REQUEST_TIMEOUT=60.0, STRANGER_TIMEOUT=60.0),
        program=LAUNCH,
    )
    whole = beat(SHOWN)
    body = request(b"POST", b"/idleBeat", SHOWN, body=b'{"jobId":1}')
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(Client(daemon.port)) for _ in range(7)]
        for client in halves:
            client.alive(SHOWN)
        idle = stack.enter_context(Client(daemon.port))
        idle.alive(SHOWN)
        for number, client in enumerate(halves):
            client.send(body[:-3] if number % 2 else whole[:-1])
        late = stack.enter_context(Client(daemon.port))
        late.alive(SHOWN, seconds=5)
        assert idle.ended(5)
        late.send(whole[:-1])
        outside = stack.enter_context(Client(daemon.port))
        outside.send(whole)
        assert not outside.readable(0.3), "somebody had to go, or the cap was exceeded"
        for number, client in enumerate(halves):
            client.send(body[-3:] if number % 2 else whole[-1:])
            found = client.answer()
            assert found and envelope(found)[0] == 200
        late.send(whole[-1:])
        for client in (late, outside):
            found = client.answer(5)
            assert found and envelope(found)[0] == 200


# -- time


def test_the_times_that_connections_are_kept():
    """The admin's connections outlive an hourly schedule; a stranger's place is free again before
    anybody misses it."""
    times = [getattr(xxl_executor, name, None) for name in ("IDLE_TIMEOUT", "STRANGER_TIMEOUT")]
    assert times == [3900.0, 15.0]


@pytest.mark.parametrize("token", [True, False], ids=["with-a-token", "without-a-token"])
def test_an_idle_stranger_is_left_and_who_showed_the_token_is_kept(executor, token):
    """Where no token is configured, whoever has had an answer is kept."""
    short = launch(IDLE_TIMEOUT=60.0, STRANGER_TIMEOUT=1.0, REQUEST_TIMEOUT=1.0)
    daemon = executor(**(GUARDED if token else {}), env=short, program=LAUNCH)
    shown = [SHOWN] if token else []
    with contextlib.ExitStack() as stack:
        known, silent, asking = (stack.enter_context(Client(daemon.port)) for _ in range(3))
        known.alive(*shown)
        began = time.monotonic()
        asking.send(health())
        assert asking.answer().status == 200
        assert silent.ended(6)
        if token:
            refused = stack.enter_context(Client(daemon.port))
            refused.send(beat(WRONG))
            assert envelope(refused.answer())[0] == 500
            assert asking.ended(6)
            assert time.monotonic() >= began + 0.9, "it might have sent another request"
            assert refused.ended(6)
        else:
            with Client(daemon.port) as later:
                assert later.ended(6)
            asking.alive()
        known.alive(*shown)


def test_a_flood_of_empty_lines_delays_nobody(executor):
    """They are skipped in a time that is linear in their number, or 200 connections would hold up
    every trigger."""
    daemon, flood = executor(), b"\r\n" * (32 << 10)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(Client(daemon.port))
        other.alive()
        peers = [stack.enter_context(Client(daemon.port)).sock for _ in range(200)]
        for sock in peers:
            sock.setblocking(False)

        def pour(stop):
            going = list(peers)
            while going and not stop.wait(0.001):
                for sock in list(going):
                    try:
                        sock.send(flood)
                    except BlockingIOError:
                        pass
                    except OSError:  # refused: it may
                        going.remove(sock)

        with killed_when_it_fails(daemon), in_threads(pour):
            for _ in range(5):
                threading.Event().wait(0.1)
                other.alive(seconds=PROMPT)
            with Client(daemon.port) as fresh:
                fresh.alive(seconds=PROMPT)


DRIPS = {
    "empty-lines": (False, lambda: iter(lambda: b"\r\n", None)),
    "empty-lines-after-an-answer": (True, lambda: iter(lambda: b"\r\n", None)),
    "an-empty-line-then-a-head": (
        False,
        lambda: (bytes([b]) for b in b"\r\n\r\n" + START + b"X" * 999),
    ),
    "a-head": (False, lambda: (bytes([b]) for b in START + b"X" * 999)),
    "a-head-after-an-answer": (True, lambda: (bytes([b]) for b in START + b"X" * 999)),
    "a-body": (False, lambda: iter([request(b"POST", b"/beat", length=9999), *[b" "] * 999])),
}


@pytest.mark.parametrize("after, pieces", DRIPS.values(), ids=DRIPS)
def test_who_drips_is_left_in_time(executor, after, pieces):
    """The time for a request counts from its first byte, empty lines before it included, and no
    byte prolongs it."""
    daemon = executor(env=launch(REQUEST_TIMEOUT=1.0), program=LAUNCH)
    with Client(daemon.port) as client:
        if after:
            client.alive()
        began = time.monotonic()
        try:
            for piece in pieces():
                client.send(piece)
                if client.readable(0.05):
                    break
                assert time.monotonic() < began + 6, "it still goes on"
            found = client.answer(1)
        except ConnectionError:
            found = None
        assert found is None or found.status in (400, 408)


# -- bodies


@pytest.mark.parametrize("expect", [[], [b"Expect: 100-continue"]], ids=["at-once", "continue"])
@pytest.mark.parametrize("shown", [[], [WRONG], [SHOWN, SHOWN]], ids=["none", "wrong", "two"])
@pytest.mark.parametrize("path", [b"/beat", b"/run", b"/trigger", b"/log"])
def test_without_the_token_a_body_is_refused_before_it_comes(guarded, path, shown, expect):
    """A stranger gets neither memory for a body nor the time that it takes."""
    with Client(guarded.port) as client:
        client.send(request(b"POST", path, *shown, *expect, length=5_000_000))
        found = client.answer(PROMPT)
        assert found.headers.get("connection") == "close", found
        code, message = envelope(found)
        assert code == 500 and "access token" in message
        client.sock.shutdown(socket.SHUT_WR)
        assert client.ended()


def test_bodies_without_the_token_take_no_memory(executor):
    """300 connections that send megabytes each are answered although they go on sending."""
    daemon = executor(**GUARDED)
    pid, head = daemon.process.pid, request(b"POST", b"/run", length=BODY)
    data = head + b" " * int(4.9 * MIB)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Client(daemon.port))
        first.alive(SHOWN)
        before, unread = rss(pid), []
        forget_peak(pid)
        for number in range(300):
            client = stack.enter_context(Client(daemon.port))
            with contextlib.suppress(OSError):
                client.send(data)
            grown = rss(pid) - before
            assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB after {number + 1} connections"
            unread.append(client)
            if len(unread) == 20:
                for client in unread:
                    found = client.answer(PROMPT)
                    assert found.headers["connection"] == "close"
                    assert envelope(found)[0] == 500 and "access token" in envelope(found)[1]
                unread.clear()
        first.alive(SHOWN, seconds=PROMPT)
        assert rss(pid, "VmHWM") - before < 64 * MIB


def test_all_bodies_together_keep_within_a_budget(executor, loopback):
    """Who has the token may send long bodies on any number of connections: those that do not fit in
    wait their turn."""
    admin = loopback(token=TOKEN)
    patient = launch(REQUEST_TIMEOUT=60.0)
    daemon = executor({"job": {"shell": "true"}}, admin=admin, env=patient, program=LAUNCH)
    run_job(daemon, admin, "job")
    pid, data = daemon.process.pid, memoryview(request(b"POST", b"/beat", SHOWN, body=b" " * BODY))
    before, last = rss(pid), len(data) - MIB // 10
    forget_peak(pid)

    def pour(clients, end):
        """Send what the sockets of these clients take, up to `end`; returns (who can be read,
        whether anything was sent)."""
        pending = [client.sock for client in clients if client.sent < end]
        readable, writable, _ = select.select([c.sock for c in clients], pending, [], 0.5)
        for client in clients:
            if client.sock in writable:
                with contextlib.suppress(BlockingIOError):
                    part = data[client.sent : min(end, client.sent + (256 << 10))]
                    client.sent += client.sock.send(part)
        return [client for client in clients if client.sock in readable], bool(writable)

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(daemon.port)) for _ in range(60)]
        for client in clients:
            client.sent = 0
            client.sock.setblocking(False)
        while pour(clients, last)[1]:
            grown = rss(pid) - before
            assert grown < 110 * MIB, f"{grown / MIB:.0f} MiB"
        with Client(daemon.port) as other:
            other.alive(SHOWN, seconds=PROMPT)
        began = time.monotonic()
        _, result = run_job(daemon, admin, "job")
        assert result["handleCode"] == 200 and time.monotonic() < began + PROMPT
        waiting, deadline = list(clients), time.monotonic() + 40
        while waiting:
            assert time.monotonic() < deadline, f"{len(waiting)} are not answered"
            for client in pour(waiting, len(data))[0]:
                found = client.answer(5)
                assert found and (found.status, envelope(found)[0]) == (200, 200)
                waiting.remove(client)
        assert rss(pid, "VmHWM") - before < 110 * MIB


# -- what the log shows


def messages(daemon, lines=0):
    """The messages in the log as they are, without the time; `lines`: how many were there
    before."""
    # Neither text mode nor splitlines(): both take other characters for line ends, too.
    text = daemon.stderr.read_bytes().decode("utf-8", "replace")
    return [re.sub(r"^\S+ \S+ \w+ +", "", line) for line in text.split("\n")[lines:-1]]


def lines_of_the_start(daemon):
    """How many lines a daemon writes before anybody asks it for something."""
    wait_until(lambda: "listening on" in daemon.log, 10, "the line of the start")
    return len(messages(daemon))


def test_refused_triggers_do_not_flood_the_log(executor):
    """A stranger must not fill the disk: one line a second for a reason, with the number of those
    that it stands for."""
    daemon = executor(HELLO, **GUARDED)
    lines, whole = lines_of_the_start(daemon), request(b"POST", b"/run", WRONG, body=trigger())
    began = time.monotonic()
    refused = 0
    while refused < 3000:
        with Client(daemon.port) as client:
            while refused < 3000:
                client.send(whole)
                found = client.answer()
                assert found and envelope(found)[0] == 500
                refused += 1
                if found.headers.get("connection") == "close":
                    break
    shown = messages(daemon, lines)
    assert 1 <= len(shown) <= time.monotonic() - began + 5, f"{len(shown)} lines: {shown[:5]}"
    with Client(daemon.port) as client:
        client.send(request(b"GET", b"/metrics", SHOWN))
        metrics = client.answer().body.decode()
    assert '\nxxl_executor_refused_triggers_total{reason="token"} 3000\n' in metrics
    threading.Event().wait(1.1)  # the next one may be shown, and tells of the others
    with Client(daemon.port) as client:
        client.send(whole)
        assert envelope(client.answer())[0] == 500

    def told():
        """How many refusals the lines stand for; numbers of an address are none."""
        found = messages(daemon, lines)
        numbers = re.findall(r"(?<![\w.:])\d[\d,_]*(?![\w.:]*\d)", "\n".join(found))
        return len(found) + sum(int(re.sub(r"\D", "", number)) for number in numbers)

    wait_until(lambda: told() >= 3001, 5, "a line that tells how many were not shown")


@pytest.mark.parametrize(
    "fields, body",
    [
        ([], trigger(executorHandler="\x1b]0;owned\x07\x1b[31mred\x00\x08\x7f\x9b2J\r\tx")),
        ([], trigger(glueType="\x1b[2J\x9b\x7f\r\tx")),
        ([b"XXL-JOB-APPNAME: \x9b2J\x90x\x85"], trigger()),
    ],
    ids=["handler", "glue", "application"],
)
def test_control_characters_from_the_network_are_shown_escaped(executor, fields, body):
    """Who reads the log in a terminal must not be at the mercy of who sends a name."""
    daemon = executor(HELLO)
    lines = lines_of_the_start(daemon)
    with Client(daemon.port) as client:
        client.send(request(b"POST", b"/run", *fields, body=body))
        assert envelope(client.answer())[0] == 500
    logged = wait_until(lambda: messages(daemon, lines), 5, "a line about it")
    assert len(logged) == 1, logged
    raw = re.findall(r"[\x00-\x1f\x7f-\x9f\ufffd]", logged[0])
    assert not raw, f"{raw} in {logged}"
    assert re.search(r"(?i)\\(x|u00)(1b|9b)", logged[0]), logged


# -- web pages


@pytest.mark.parametrize(
    "origin",
    [b"Origin: http://evil.example", b"origin: null", b"ORIGIN:"],
    ids=["site", "null", "empty"],
)
@pytest.mark.parametrize("shown", [[SHOWN], []], ids=["with-the-token", "without-the-token"])
def test_a_request_of_a_web_page_is_refused_on_every_path(guarded, shown, origin):
    """A browser sends Origin for a page that posts to a port of its own host; the admin never
    does."""
    for method, path in [*PATHS, (b"HEAD", b"/health"), (b"OPTIONS", b"/run"), (b"POST", b"/nope")]:
        length = 5_000_000 if method == b"POST" else None  # the answer does not wait for it
        with Client(guarded.port) as client:
            client.send(request(method, path, *shown, origin, length=length))
            found = client.answer(PROMPT, bodiless=method == b"HEAD")
            assert found and found.status == 403, (method, path, found)
            if method != b"HEAD":
                code, message = envelope(found)
                assert code == 500 and message


def test_a_web_page_triggers_nothing_where_no_token_is_needed(executor, admin, tmp_path):
    """A page can post text to the port of an executor on the developer's own machine."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    origin, kind = b"Origin: http://evil.example", b"Content-Type: text/plain"
    for log_id, path in enumerate((b"/run", b"/trigger"), 1):
        with Client(daemon.port) as client:
            client.send(request(b"POST", path, origin, kind, body=trigger(log_id)))
            found = client.answer()
            assert found.status == 403 and envelope(found)[0] == 500
    log_id = ledger.trigger(daemon)
    ledger.settle(daemon)
    assert ledger.started() == [log_id]


# -- a stop under load


def exchange(client, outcomes):
    """One heartbeat; whether the connection lives on. Half an answer, or none for a long time,
    raises."""
    client.send(beat())
    found = client.answer()
    if found is None:  # closed while nothing had come, as any server may
        outcomes["closed"] += 1
        return False
    code, message = envelope(found)
    assert found.status == 200 and (code == 200 or "stopping" in message), found
    outcomes["answered"] += 1
    return found.headers.get("connection") != "close"


def test_a_stop_under_load_leaves_nobody_without_an_answer(executor):
    """Who is connected is answered to the last, who comes later is refused; the thread that serves
    them all survives."""
    for number in range(rounds(8)):
        daemon = executor()
        port, outcomes, errors = daemon.port, collections.Counter(), []

        def come(stop, port=port, outcomes=outcomes, errors=errors):
            try:
                while not stop.is_set():
                    try:
                        with Client(port) as client:
                            exchange(client, outcomes)
                    except ConnectionRefusedError:
                        outcomes["refused"] += 1
                        return
                    except ConnectionError:
                        outcomes["reset"] += 1
            except BaseException as error:  # raised in the test's own thread
                errors.append(error)

        with contextlib.ExitStack() as stack:
            early = [stack.enter_context(Client(port)) for _ in range(8)]
            for client in early:
                client.alive()
            with in_threads(*[come] * 8):
                wait_until(lambda o=outcomes: o["answered"] >= 100, 20, "some load")
                for client in early:  # connected, and whole before the stop
                    client.send(beat())
                daemon.signal(signal.SIGTERM)
                for client in early:
                    found = client.answer()
                    assert found and found.status == 200, f"round {number}: {found}"
                    client.sock.close()
                assert daemon.wait() == 0
                ended = lambda o=outcomes, e=errors: o["refused"] == 8 or e  # noqa: E731
                wait_until(ended, 20, "the last refusals")
        assert not errors, f"round {number}: {errors}"
        assert "Traceback" not in daemon.log, f"round {number}: {daemon.log}"
        assert outcomes["reset"] + outcomes["closed"] <= 8 * 2, f"round {number}: {outcomes}"


def test_a_connection_that_comes_with_the_stop(executor, admin):
    """The selector learns of the stop and of a new connection in one look, the stop first."""
    daemon = executor(admin=admin)
    wait_until(lambda: admin.registry, 10, "the registration")
    outcomes, leaving, stuck = collections.Counter(), threading.Event(), []
    admin.behave = lambda path, body: leaving.set() if path.endswith("/registryRemove") else None

    def keep_turning(stop):
        try:
            with Client(daemon.port) as client:
                while exchange(client, outcomes):
                    pass
        except ConnectionError:
            pass
        except BaseException as error:
            stuck.append(error)

    with slow_selector(daemon, "epoll_wait", 0.2), in_threads(keep_turning):
        wait_until(lambda: outcomes["answered"] >= 2, 20, "some answers")
        daemon.signal(signal.SIGTERM)
        assert leaving.wait(20), "the registration is not taken back"
        threading.Event().wait(0.06)  # then the connections' turn comes, while the selector is slow
        with contextlib.suppress(ConnectionError), Client(daemon.port) as late:
            exchange(late, outcomes)
        assert daemon.wait() == 0
    assert not stuck, stuck
    assert "Traceback" not in daemon.log, daemon.log
