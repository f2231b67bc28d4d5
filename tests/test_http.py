"""The HTTP server, by raw sockets: whatever comes is answered, whatever else is connected or
runs."""

import contextlib
import json
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import threading

import pytest
import requests
from conftest import Executor, result_of, wait_until

import xxl_executor

ALIVE = {"code": 200, "msg": None, "content": None, "data": None}
STOPPING = {"code": 500, "msg": "the executor is stopping", "content": None, "data": None}
BEAT = b"POST /beat HTTP/1.1\r\nHost: x\r\n\r\n"
NO_PATH = (
    "no such path; this is an XXL-JOB executor: /beat, /idleBeat, /run, /trigger, /kill, /log, "
    "/health, /metrics, /status"
)
HEAD, BODY = 16 << 10, 5 << 20  # the limits


def failure(text):
    return {"code": 500, "msg": text, "content": None, "data": None}


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


class Client:
    """One connection that sends bytes as they are and reads answers one by one."""

    def __init__(self, port, small=False):
        self.sock = socket.socket()
        if small:  # what does not fit stays at the server
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(20)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.sock.makefile("rb")

    def send(self, data):
        self.sock.sendall(data)

    def line(self):
        line = self.stream.readline()
        assert line.endswith(b"\r\n"), f"the connection ended after {line!r}"
        return line[:-2].decode("latin-1")

    def answer(self, body=True):
        """The next answer; with body=False one to HEAD."""
        found = re.fullmatch(r"HTTP/1\.1 (\d{3}) \S.*", self.line())
        assert found
        headers = {}
        while True:
            line = self.line()
            if not line:
                break
            name, _, value = line.partition(": ")
            assert name.lower() not in headers, f"{name} twice"
            headers[name.lower()] = value
        length = int(headers["content-length"])
        data = self.stream.read(length) if body else b""
        assert len(data) == (length if body else 0)
        return Answer(int(found[1]), headers, data)

    def beat(self):
        self.send(BEAT)
        found = self.answer()
        assert (found.status, found.json) == (200, ALIVE)

    def readable(self):
        return bool(select.select([self.sock], [], [], 0)[0])

    def ended(self):
        """Whether the server closes in order (a reset raises) and says nothing more."""
        return self.stream.read() == b""

    def close(self):
        self.stream.close()
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of one daemon for all tests that change nothing in it."""
    config = {
        "executor": {
            "bind": "127.0.0.1:0",
            "address": "http://127.0.0.1:9/some/prefix/",
            "max_connections": 200,
        }
    }
    daemon = Executor(tmp_path_factory.mktemp("http"), config).start()
    yield daemon.port
    daemon.close()
    assert not re.search(r"ResourceWarning|Traceback|unexpected error|cannot accept", daemon.log), (
        daemon.log
    )


@pytest.fixture
def client(port):
    with Client(port) as made:
        yield made


class Answers:
    """The place of the Api: trusts everybody."""

    def __init__(self, answer):
        self._answer = answer

    def trusts(self, request):
        return True

    def route(self, request):
        return xxl_executor.Route.POOL

    def answer(self, request, ticket):
        return xxl_executor.Reply(200, "application/json", self._answer(request.path))


@pytest.fixture
def serve():
    """A factory of servers in this process: serve(answer, max_connections=100) returns
    (server, port); `answer(target)` returns the answer's bytes."""
    with contextlib.ExitStack() as stack:

        def make(answer, max_connections=100):
            listener = xxl_executor.listen(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            server = xxl_executor.HttpServer(listener, Answers(answer), max_connections)
            server.start()
            closing = []  # a test may close it itself

            def close():
                if not closing:
                    closing.append(True)
                    close_once()

            close_once, server.close = server.close, close
            stack.callback(close)
            return server, port

        yield make


# -- heartbeats


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"POST /beat HTTP/1.1\r\nHost: x\r\n\r\n", id="no-body-no-length"),
        pytest.param(b"POST /beat HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", id="length-0"),
        pytest.param(
            b'POST /beat HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n""', id="empty-text"
        ),
        pytest.param(b"POST //beat HTTP/1.1\r\nHost: x\r\n\r\n", id="doubled-slash"),
        pytest.param(b"POST /some///prefix////beat HTTP/1.1\r\nHost: x\r\n\r\n", id="many-slashes"),
        pytest.param(b"POST /some/prefix/beat HTTP/1.1\r\nHost: x\r\n\r\n", id="prefix"),
        pytest.param(
            b"POST //some/prefix//beat HTTP/1.1\r\nHost: x\r\n\r\n", id="prefix-doubled-slashes"
        ),
        pytest.param(
            b"POST /beat HTTP/1.1\r\nhost: x\r\ncontent-type: text/json\r\ncontent-length:"
            b' 2\r\n\r\n""',
            id="lowercase",
        ),
        pytest.param(b"POST /beat?a=/b HTTP/1.1\r\nHost: x\r\n\r\n", id="query"),
        pytest.param(b"POST http://x:9/beat HTTP/1.1\r\nHost: x\r\n\r\n", id="absolute-form"),
        pytest.param(b"\r\n\r\nPOST /beat HTTP/1.1\r\nHost: x\r\n\r\n", id="empty-lines-before"),
        pytest.param(
            b"POST /beat HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", id="http10-keep-alive"
        ),
    ],
)
def test_every_heartbeat_is_answered(client, request_):
    """Twice on one connection: what belongs to the first must not reach into the second."""
    for _ in range(2):
        client.send(request_)
        found = client.answer()
        assert (found.status, found.json) == (200, ALIVE)
        assert found.headers["content-type"] == "application/json;charset=UTF-8"
        assert found.headers.get("connection") == (
            "keep-alive" if b"HTTP/1.0" in request_ else None
        )


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"POST /beat HTTP/1.0\r\n\r\n", id="http10"),
        pytest.param(b'POST /beat HTTP/1.0\r\nContent-Length: 2\r\n\r\n""', id="http10-body"),
        pytest.param(b"POST /beat HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", id="close"),
    ],
)
def test_a_heartbeat_that_wants_no_keep_alive(client, request_):
    client.send(request_)
    found = client.answer()
    assert (found.status, found.json, found.headers["connection"]) == (200, ALIVE, "close")
    assert client.ended()


def test_a_client_that_sends_its_end_first_is_answered(client):
    client.send(BEAT + BEAT)
    client.sock.shutdown(socket.SHUT_WR)
    for _ in range(2):
        assert client.answer().json == ALIVE
    assert client.ended()


# -- paths and methods


@pytest.mark.parametrize(
    "path", ["/health", "/metrics", "/status", "//health", "/some/prefix/health"]
)
def test_get_and_head(client, path):
    client.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    got = client.answer()
    client.send(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = client.answer(body=False)
    client.beat()  # no byte of a body came after the head
    assert (got.status, head.status) == (200, 200)
    assert got.body and int(head.headers["content-length"]) > 0
    assert head.headers["content-type"] == got.headers["content-type"]
    if path.endswith("/health"):
        assert got.json == ALIVE and head.headers["content-length"] == got.headers["content-length"]
    elif path == "/metrics":
        assert got.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b"\nxxl_executor_connections " in got.body
    else:
        assert got.json["draining"] is False and got.json["version"] == xxl_executor.__version__


@pytest.mark.parametrize(
    "method, path, status, text",
    [
        ("GET", "/", 404, NO_PATH),
        ("POST", "/nope", 404, NO_PATH),
        ("POST", "/beat/x", 404, NO_PATH),
        ("POST", "/some/prefixbeat", 404, NO_PATH),
        ("POST", "/../beat", 404, NO_PATH),
        ("GET", "/beat", 405, "/beat takes POST, not GET"),
        ("PUT", "/run", 405, "/run takes POST, not PUT"),
        ("GET", "/some/prefix/log", 405, "/log takes POST, not GET"),
        ("DELETE", "/kill", 405, "/kill takes POST, not DELETE"),
        ("POST", "/health", 405, "/health takes GET, not POST"),
        ("PATCH", "/status", 405, "/status takes GET, not PATCH"),
    ],
)
def test_unknown_paths_and_wrong_methods(client, method, path, status, text):
    """They are well-formed, so the connection stays; a body that came along is skipped."""
    client.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nPOST ".encode())
    found = client.answer()
    assert (found.status, found.json) == (status, failure(text))
    client.beat()


# -- framing


def test_keep_alive(client):
    for _ in range(200):
        client.beat()


def test_pipelined_requests_are_answered_in_order(client):
    post = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
    five = (
        BEAT
        + b"GET /beat HTTP/1.1\r\nHost: x\r\n\r\n"
        + post % (b"/kill", 11, b'{"jobId":7}')
        + b"PUT /log HTTP/1.1\r\nHost: x\r\n\r\n"
        + post % (b"/nope", 4, b"GET ")
    )
    expected = [
        ALIVE,
        failure("/beat takes POST, not GET"),
        {**ALIVE, "msg": "nothing was running"},
        failure("/log takes POST, not PUT"),
        failure(NO_PATH),
    ]
    client.send(five * 40)
    assert [client.answer().json for _ in range(200)] == expected * 40


def test_a_request_byte_by_byte(client):
    """And the next one begins in the packet that ends the one before."""
    request_ = b'POST /kill HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"jobId":7}'
    for byte in request_[:-1]:
        client.send(bytes([byte]))
    client.send(request_[-1:] + BEAT[:9])
    assert client.answer().json == {**ALIVE, "msg": "nothing was running"}
    client.send(BEAT[9:])
    assert client.answer().json == ALIVE


def test_expect_100_continue(client):
    head = b"POST /kill HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 11\r\n\r\n"
    for _ in range(2):
        client.send(head)
        assert (client.line(), client.line()) == ("HTTP/1.1 100 Continue", "")
        client.send(b'{"jobId":7}')
        assert client.answer().json == {**ALIVE, "msg": "nothing was running"}
    # Nothing is missing, so there is nothing to ask for.
    client.send(head + b'{"jobId":7}')
    assert client.answer().json == {**ALIVE, "msg": "nothing was running"}
    client.send(BEAT[:-2] + b"Expect: 100-continue\r\n\r\n")
    assert client.answer().json == ALIVE


def post(*lines, path=b"/beat"):
    return b"\r\n".join([b"POST " + path + b" HTTP/1.1", b"Host: x", *lines, b"", b""])


BAD_LINE = (400, 'the request line is not "METHOD target HTTP/1.1"')
BAD_FIELD = (400, "a header line is not a name, a colon and a value")
BAD_LENGTH = (400, "Content-Length is not one whole number")
NO_LENGTH = (411, "send the body with a Content-Length, without Transfer-Encoding")
TOO_LONG_BODY = (413, "the body is longer than 5242880 bytes")
TOO_LONG_HEAD = (431, "the request head is longer than 16384 bytes")


@pytest.mark.parametrize(
    "request_, expected",
    [
        pytest.param(post(b"Content-Length: x"), BAD_LENGTH, id="length-no-number"),
        pytest.param(post(b"Content-Length: -1"), BAD_LENGTH, id="length-negative"),
        pytest.param(post(b"Content-Length: +1"), BAD_LENGTH, id="length-plus"),
        pytest.param(post(b"Content-Length: 1_0"), BAD_LENGTH, id="length-underscore"),
        pytest.param(post(b"Content-Length: 0x2"), BAD_LENGTH, id="length-hex"),
        pytest.param(post(b"Content-Length: \xb2"), BAD_LENGTH, id="length-superscript"),
        pytest.param(post(b"Content-Length:"), BAD_LENGTH, id="length-empty"),
        pytest.param(post(b"Content-Length:", b" 2"), BAD_FIELD, id="length-folded"),
        pytest.param(post(b"Content-Length: " + b"9" * 5000), TOO_LONG_BODY, id="5000-digits"),
        pytest.param(post(b"Content-Length: 2", b"Content-Length: 2"), BAD_LENGTH, id="same-twice"),
        pytest.param(post(b"Content-Length: 2, 2"), BAD_LENGTH, id="length-list"),
        pytest.param(
            post(b"Content-Length: 2", b"content-length: 3"), BAD_LENGTH, id="length-twice"
        ),
        pytest.param(
            post(b"Content-Length: 2", b"Transfer-Encoding: chunked"),
            (400, "Content-Length and Transfer-Encoding exclude each other"),
            id="length-and-encoding",
        ),
        pytest.param(
            post(b"Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", NO_LENGTH, id="encoding"
        ),
        pytest.param(
            post(b"transfer-encoding : identity"), BAD_FIELD, id="encoding-spelled-otherwise"
        ),
        pytest.param(post(b"Content-Length: %d" % (BODY + 1)), TOO_LONG_BODY, id="body-too-long"),
        pytest.param(
            post(b"Content-Length: %d" % (BODY + 1), b"Expect: 100-continue"),
            TOO_LONG_BODY,
            id="body-too-long-expecting",
        ),
        pytest.param(
            post(b"Content-Length: 2", b"Expect: 200-ok"),
            (417, "the only expectation that can be met is 100-continue"),
            id="other-expectation",
        ),
        pytest.param(
            b"POST /beat HTTP/1.1\r\nX: " + b"x" * HEAD, TOO_LONG_HEAD, id="head-too-long"
        ),
        pytest.param(
            post(b"X: ".ljust(HEAD + 1 - len(post(b"")), b"x")),
            TOO_LONG_HEAD,
            id="head-one-byte-too-long",
        ),
        pytest.param(b"x" * HEAD, TOO_LONG_HEAD, id="no-head-at-all"),
        pytest.param(post(*[b"X: x"] * 150), (431, "Too many headers"), id="too-many-headers"),
        pytest.param(b"GARBAGE\r\n\r\n", BAD_LINE, id="one-word"),
        pytest.param(b"what on earth is it\r\n\r\n", BAD_LINE, id="five-words"),
        pytest.param(b"\x16\x03\x01\x02\xfc\x03\x03\r\n\r\n", (400, None), id="binary"),
        pytest.param(b" \r\n\r\n", (400, None), id="blank"),
        pytest.param(
            b"POST /beat HTTP/x\r\n\r\n",
            (400, "expected HTTP/1.1 at the end of the request line"),
            id="no-version",
        ),
        pytest.param(b"POST /beat\r\n\r\n", BAD_LINE, id="http09-post"),
    ],
)
def test_malformed_requests(client, request_, expected):
    """The client sees why, although it goes on sending: the connection is not reset under its
    feet."""
    status, text = expected
    client.send(request_)
    client.send(b"x" * (6 << 20))
    found = client.answer()
    assert found.status == status
    assert found.json == failure(found.json["msg"] if text is None else text) and found.json["msg"]
    assert found.headers["content-type"] == "application/json;charset=UTF-8"
    assert found.headers["connection"] == "close"
    assert client.ended()


def test_the_limits_themselves_are_allowed(client):
    head = post(b"X: ".ljust(HEAD - len(post(b"")), b"x"))
    assert len(head) == HEAD
    client.send(head)
    assert client.answer().json == ALIVE
    client.send(post(b"Content-Length: %d" % BODY) + b" " * BODY)
    assert client.answer().json == ALIVE
    client.beat()


def test_what_came_before_a_malformed_request_is_answered(client):
    client.send(BEAT + post(b"Content-Length: x") + BEAT)
    assert client.answer().json == ALIVE
    assert client.answer().json == failure(BAD_LENGTH[1])
    assert client.ended()


# -- time limits, with a server in this process so that they can be short


def beat_only(target):
    return xxl_executor.envelope(200)


LATE = failure("the request did not arrive in time")


@pytest.mark.parametrize(
    "half",
    [b"PO", BEAT[:-2], post(b"Content-Length: 5") + b"{", BEAT + BEAT[:-1]],
    ids=["line", "head", "body", "second"],
)
def test_a_half_sent_request_is_answered_408(serve, monkeypatch, half):
    monkeypatch.setattr(xxl_executor, "REQUEST_TIMEOUT", 0.3)
    with Client(serve(beat_only)[1]) as client:
        client.send(half)
        if half.startswith(BEAT):
            assert client.answer().json == ALIVE
        found = client.answer()
        assert (found.status, found.json, found.headers["connection"]) == (408, LATE, "close")
        assert client.ended()


def test_dripping_does_not_prolong_the_time(serve, monkeypatch):
    monkeypatch.setattr(xxl_executor, "REQUEST_TIMEOUT", 0.5)
    with Client(serve(beat_only)[1]) as client:
        for byte in b"POST /beat HTTP/1.1\r\nX: " + b"x" * 400:
            client.send(bytes([byte]))
            if select.select([client.sock], [], [], 0.05)[0]:
                break
        else:
            pytest.fail("no answer while the client drips")
        assert client.answer().status == 408


def test_silent_and_idle_connections_are_closed_without_a_word(serve, monkeypatch):
    monkeypatch.setattr(xxl_executor, "STRANGER_TIMEOUT", 0.3)
    monkeypatch.setattr(xxl_executor, "IDLE_TIMEOUT", 0.3)
    server, port = serve(beat_only)
    with Client(port) as silent, Client(port) as idle:
        idle.beat()
        assert silent.ended() and idle.ended()
        assert server.connections == 0


def test_a_client_that_stays_after_its_last_answer_is_left_soon(serve, monkeypatch):
    """Its place is needed; it had LINGER to read why the connection ends."""
    monkeypatch.setattr(xxl_executor, "LINGER", 0.2)
    server, port = serve(beat_only)
    with Client(port) as client:
        client.send(b"GARBAGE\r\n\r\n")
        assert client.answer().status == 400
        wait_until(
            lambda: server.connections == 0,
            xxl_executor.REQUEST_TIMEOUT / 2,
            "the end of the connection",
        )


def test_an_idle_connection_outlives_the_time_for_a_request(serve, monkeypatch):
    """Proxies keep connections for minutes; the time for a request counts from its first byte."""
    for name in ("REQUEST_TIMEOUT", "STRANGER_TIMEOUT"):
        monkeypatch.setattr(xxl_executor, name, 0.2)
    with contextlib.ExitStack() as stack:
        port = serve(beat_only)[1]
        idle, fresh = (stack.enter_context(Client(port)) for _ in range(2))
        idle.beat()
        assert fresh.ended()  # it was never used, so its time has passed
        with Client(port) as later:
            assert later.ended()
        idle.beat()


def test_the_time_limits_suit_the_admin():
    """The admin's client waits 3 s, 10 at most; proxies keep idle connections for an hour (Envoy)."""
    assert (xxl_executor.REQUEST_TIMEOUT, xxl_executor.IDLE_TIMEOUT) == (10.0, 3900.0)


# -- load


def test_at_max_connections_the_listener_pauses(executor):
    """Nobody is evicted while his request is under way: who comes later waits, and gets in as soon
    as one leaves or is idle."""
    daemon = executor(executor={"max_connections": 8})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(daemon.port)) for _ in range(8)]
        for client in clients:
            client.beat()
            client.send(BEAT[:-1])
        late = [stack.enter_context(Client(daemon.port)) for _ in range(4)]
        for client in late:
            client.send(BEAT + BEAT[:-1])
        for client in clients[1:]:
            client.send(BEAT[-1:] + BEAT[:-1])
            assert client.answer().json == ALIVE
        clients[0].send(BEAT[-1:] + b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" + BEAT[:-1])
        assert clients[0].answer().json == ALIVE
        assert b"\nxxl_executor_connections 8\n" in clients[0].answer().body
        assert not any(client.readable() for client in late)
        for gone, entered in zip(clients, late):
            gone.close()
            assert entered.answer().json == ALIVE
        for client in clients[4:] + late:
            client.send(BEAT[-1:])
            assert client.answer().json == ALIVE


def test_clients_that_do_not_read_hold_no_thread(executor):
    """More of them than http threads, each with megabytes to take; the answer is whole for who
    reads it at last."""
    daemon = executor(
        {"long": {"shell": "yes 'a line of some forty characters, no more' | head -c 3000000"}}
    )
    assert (
        daemon.post("/run", {"jobId": 1, "logId": 5, "executorHandler": "long", "logDateTime": 0})
        == ALIVE
    )
    wait_until(
        lambda: daemon.post("/idleBeat", {"jobId": 1})["code"] == 200, 30, "the end of the job"
    )
    date = int(next((daemon.data / "logs").glob("*/5.log")).stat().st_mtime * 1000)
    body = json.dumps({"logId": 5, "logDateTim": date, "fromLineNum": 1}).encode()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Client(daemon.port, small=True)) for _ in range(20)]
        for client in slow:
            client.send(
                b"POST /log HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
        for client in slow:  # each answer has begun
            assert client.sock.recv(1, socket.MSG_PEEK) == b"H"
        old = stack.enter_context(Client(daemon.port))
        for _ in range(50):
            old.beat()
            with Client(daemon.port) as fresh:
                fresh.beat()
        page = slow[-1].answer().json
        assert page["data"]["logContent"] == daemon.log_text(5)
        assert len(page["data"]["logContent"]) > 3_000_000 and page["data"]["isEnd"] is True
        slow[-1].beat()


@pytest.fixture
def many_files():
    """Room for 3,000 descriptors here and in the daemon."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3000:
        pytest.skip(f"only {hard} descriptors are allowed")
    if soft != resource.RLIM_INFINITY and soft < 3000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_heartbeat_is_answered_among_1100_connections_and_8_loud_jobs(many_files, executor):
    daemon = executor(
        {"loud": {"command": ["yes"], "timeout": "120s", "kill_grace": "0.2s"}},
        executor={"max_connections": 2000, "log_limit": "256KiB"},
    )
    port = daemon.port
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Client(port)) for _ in range(500)]
        for client in idle:
            client.beat()
        for job in range(8):
            reply = daemon.post("/run", {"jobId": job, "logId": job + 1, "executorHandler": "loud"})
            assert reply == ALIVE
        wait_until(lambda: len(daemon.status()["running"]) == 8, 20, "the start of the jobs")
        for number in range(300):
            stack.enter_context(Client(port)).send(
                post(b"Content-Length: 5") + b"{" if number % 2 else BEAT[:-1]
            )
            stack.enter_context(Client(port))
        for client in idle[::10]:
            client.beat()
            with Client(port) as fresh:
                fresh.beat()
        assert len(daemon.status()["running"]) == 8
        for job in range(8):
            assert (
                daemon.post("/kill", {"jobId": job})["msg"] == "killed 1 running, dropped 0 waiting"
            )
        wait_until(lambda: not daemon.status()["running"], 20, "the end of the jobs")


# -- the end


def test_a_daemon_that_stops_answers_to_the_last(executor):
    daemon = executor(
        {"hold": {"shell": "touch ready; while [ ! -e go ]; do sleep 0.02; done"}},
        executor={"drain_timeout": "60s"},
    )
    with contextlib.ExitStack() as stack:
        old, idle, half = (stack.enter_context(Client(daemon.port)) for _ in range(3))
        old.beat()
        idle.beat()
        assert daemon.post("/run", {"jobId": 1, "logId": 1, "executorHandler": "hold"}) == ALIVE
        wait_until((daemon.directory / "ready").exists, what="the start of the job")
        daemon.signal(signal.SIGTERM)

        def health():
            old.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            return old.answer()

        found = wait_until(
            lambda: next((a for a in [health()] if a.status != 200), None), what="the stop"
        )
        assert (found.status, found.json) == (503, failure("stopping"))
        old.send(BEAT + post(b"Content-Length: 11", path=b"/idleBeat") + b'{"jobId":9}')
        answers = [old.answer() for _ in range(2)]
        assert [(a.status, a.json) for a in answers] == [(200, STOPPING)] * 2
        assert "connection" not in answers[0].headers
        with Client(
            daemon.port
        ) as fresh:  # new connections too: the admin needs the reason, not a refused connection
            fresh.send(BEAT)
            assert fresh.answer().json == STOPPING
        assert daemon.post("/run", {"jobId": 2, "logId": 2, "executorHandler": "hold"}) == STOPPING
        assert (
            daemon.post("/run", {"jobId": 1, "logId": 1, "executorHandler": "hold"}) == ALIVE
        )  # accepted before
        half.send(BEAT[:-1])
        (daemon.directory / "go").touch()
        assert idle.ended()
        half.send(BEAT[-1:])  # on its way when the closing began
        found = half.answer()
        assert (found.json, found.headers["connection"]) == (STOPPING, "close")
        assert half.ended() and old.ended()
        half.close()
        old.close()
        assert daemon.wait() == 0


def test_close_answers_what_was_sent(serve):
    """More requests than threads, and one more on each connection, which only learns that the
    connection closes."""
    go, entered = threading.Event(), threading.Semaphore(0)

    def answer(target):
        if target == "/wait":
            entered.release()
            go.wait(20)
        return beat_only(target)

    server, port = serve(answer)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(port)) for _ in range(20)]
        for client in clients:
            client.beat()
        idle = stack.enter_context(Client(port))
        idle.beat()
        for client in clients:
            client.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + BEAT)
        assert entered.acquire(timeout=10) and entered.acquire(timeout=10)
        closer = threading.Thread(target=server.close)
        closer.start()
        assert idle.ended()
        go.set()
        for client in clients:
            found = client.answer()
            assert (found.json, found.headers["connection"]) == (ALIVE, "close")
            assert client.ended()
            client.close()
        closer.join(10)
        assert not closer.is_alive()


def test_close_lets_a_slow_reader_have_its_answer(serve):
    text = b"x" * (16 << 20)
    server, port = serve(lambda target: text)
    with Client(port, small=True) as slow, Client(port) as idle:
        slow.send(BEAT)
        assert slow.line() == "HTTP/1.1 200 OK"
        idle.send(BEAT)
        assert idle.answer().body == text
        closer = threading.Thread(target=server.close)
        closer.start()
        assert idle.ended()
        assert f"Content-Length: {len(text)}" in list(iter(slow.line, ""))
        # Big steps from here on: this is about what the server does, not about small windows.
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        assert len(slow.stream.read(len(text))) == len(text)
        closer.join(10)
        assert not closer.is_alive()


@pytest.mark.parametrize("end", ["request", "end"])
def test_a_long_answer_is_whole_for_who_goes_on(serve, end):
    """The next request, or the end of the client's sending, comes while the answer is made."""
    text = b"x" * (16 << 20)
    go, entered = threading.Event(), threading.Event()

    def answer(target):
        entered.set()
        go.wait(20)
        return text

    server, port = serve(answer)
    for _ in range(5):
        go.clear()
        entered.clear()
        with Client(port, small=True) as client, Client(port) as other:
            client.send(BEAT)
            assert entered.wait(10)
            go.set()
            client.send(BEAT) if end == "request" else client.sock.shutdown(socket.SHUT_WR)
            other.send(BEAT)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            assert client.answer().body == text
            assert other.answer().body == text
            if end == "request":
                assert client.answer().body == text


def test_a_newline_behind_a_request_costs_no_connection(serve, monkeypatch):
    """RFC 9112, 2.2: some clients send one. No request has begun, so none is late."""
    monkeypatch.setattr(xxl_executor, "REQUEST_TIMEOUT", 0.3)
    port = serve(beat_only)[1]
    with Client(port) as client, Client(port) as late:
        client.send(BEAT + b"\r\n")
        assert client.answer().json == ALIVE
        late.send(b"PO")
        assert late.answer().status == 408  # its time was the same
        client.beat()


# -- behind a proxy

NGINX = """
daemon off;
master_process off;
worker_processes 1;
pid {place}/nginx.pid;
error_log {place}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log {place}/access.log;
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    upstream executor {{ server 127.0.0.1:{upstream}; keepalive 4; keepalive_timeout 1s; }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_timeout 1s;
        location / {{
            proxy_pass http://executor;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream off;
        }}
    }}
}}
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def nginx(tmp_path):
    """A factory: nginx(port of the daemon) returns the URL of a proxy before it."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    started = []

    def make(upstream):
        place, port = tmp_path / "nginx", free_port()
        place.mkdir()
        (place / "nginx.conf").write_text(NGINX.format(place=place, port=port, upstream=upstream))
        with open(place / "stderr", "wb") as errors:
            command = [
                program,
                "-e",
                f"{place}/error.log",
                "-p",
                str(place),
                "-c",
                f"{place}/nginx.conf",
            ]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
            )
        started.append(process)

        def listening():
            assert process.poll() is None, (place / "stderr").read_text() + (
                place / "error.log"
            ).read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
                return True

        wait_until(listening, 20, "the start of nginx")
        return f"http://127.0.0.1:{port}"

    yield make
    for process in started:
        process.terminate()
        process.wait(10)


def test_behind_nginx_nothing_is_lost_over_idle_times(executor, admin, nginx):
    """A heartbeat, silence until the proxy has dropped its connection, a trigger, a heartbeat,
    several times over."""
    daemon = executor({"hello": {"shell": 'echo "hello $1"'}}, admin=admin)
    url, runs, upstream = nginx(daemon.port), [], set()

    def send(session, path, data=None):
        reply = session.post(url + path, data=data, timeout=20)
        assert (reply.status_code, reply.json()) == (200, ALIVE)

    def connections():
        """The daemon's sockets of the proxy's connections, by port and inode: ports come again."""
        found = set()
        with open("/proc/net/tcp", encoding="ascii") as table:
            for fields in map(str.split, list(table)[1:]):
                if fields[3] == "01" and fields[1] == f"0100007F:{daemon.port:04X}":
                    found.add((fields[2], fields[9]))
        return found - own

    with requests.Session() as session:
        session.trust_env = False
        own = set()
        own = connections()
        for number in range(4):
            log_id = 1000 + number
            trigger = json.dumps(
                {
                    "jobId": number % 2,
                    "logId": log_id,
                    "executorHandler": "hello",
                    "executorParams": str(number),
                }
            ).encode()
            send(session, "/beat")
            assert connections(), "the proxy keeps its connection"
            upstream |= connections()
            wait_until(lambda: not connections(), 20, "the end of the proxy's idle connection")
            send(session, "/trigger", trigger)
            send(session, "/beat", b'""')
            send(
                session, "/trigger", trigger
            )  # as a client does whose connection broke: it must not run again
            runs.append(log_id)
        for log_id in runs:
            assert result_of(admin, log_id)["handleMsg"] == f"hello {log_id - 1000}"
        send(session, "/beat")
    assert len(upstream) >= 4, "each round had a connection of its own"
    assert sorted(admin.results) == runs
