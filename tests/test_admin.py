"""What the daemon tells the admin: registration and results, in every dialect, through every
failure."""

import contextlib
import json
import random
import re
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import result_of, run_job, wait_until

import xxl_executor
from xxl_executor import AdminClient, Backoff, StoredResult, resolve

VERSIONS = ("2.2.0", "2.3", "3.3", "3.5")
HELLO = {"hello": {"shell": "echo hello $1"}}
SHORT = {"timeout": "1s", "connect_timeout": "1s"}


def calls(admin, name):
    """The (headers, decoded body) of every call of `name` that the admin received."""
    with admin.changed:
        return [
            (headers, json.loads(body))
            for path, headers, body in admin.requests
            if path.rpartition("/")[2] == name
        ]


def fail_callbacks(reply):
    """A behaviour: `reply` to each callback; a callable is called with the body and may raise to
    cut the line."""

    def behave(path, body):
        if path.endswith("/callback"):
            return reply(body) if callable(reply) else reply

    return behave


def cut(*_):
    """Close the connection without an answer."""
    raise ConnectionResetError


def normal(path, body):
    """The loopback admin's own behaviour."""


def absent(port, version="3.5", token=""):
    """What `executor(admin=...)` needs to know of an admin that is not there yet."""
    return SimpleNamespace(
        url=f"http://127.0.0.1:{port}" + ("" if version == "3.5" else "/xxl-job-admin"), token=token
    )


def trigger(daemon, log_id, path="/trigger", handler="hello", **fields):
    """A trigger that no admin object needs to send."""
    reply = daemon.post(
        path,
        {
            "jobId": log_id,
            "logId": log_id,
            "executorHandler": handler,
            "logDateTime": int(time.time() * 1000),
            **fields,
        },
    )
    assert reply["code"] == 200, reply


def undelivered(daemon, port, count):
    """Run `count` jobs while there is no admin, and stop: their results wait in the journal."""
    daemon.start()
    for log_id in range(1, count + 1):
        trigger(daemon, log_id, executorParams=str(log_id))
    wait_until(lambda: daemon.status()["undelivered"] == count, 30)
    assert daemon.stop() == 0
    assert f"stopped, {count} results kept for the next start" in daemon.log


# -- the shapes


@pytest.mark.parametrize("token", ["", "s3cret"], ids=["no-token", "token"])
@pytest.mark.parametrize("version", VERSIONS)
def test_registration_and_results_in_every_version(executor, loopback, version, token):
    admin = loopback(version, token)
    daemon = executor(
        {"hello": {"shell": "echo hello; exit $1"}}, admin=admin, executor={"app_name": "my-app"}
    )
    assert admin.wait(lambda: admin.registry, 10) == [daemon.url + "/"]
    date = 1_790_000_000_123
    good, item = run_job(daemon, admin, "hello", executorParams="0", logDateTime=date)
    bad, bad_item = run_job(daemon, admin, "hello", executorParams="3", logDateTime=date)
    assert (item["code"], bad_item["code"]) == (200, 500)
    url = daemon.url + "/"
    assert daemon.stop() == 0
    assert admin.registry == []
    entry = {"registryGroup": "EXECUTOR", "registryKey": "my-app", "registryValue": url}
    assert [body for _, body in calls(admin, "registry")] == [entry]
    assert [body for _, body in calls(admin, "registryRemove")] == [entry]
    wanted = [
        {
            "logId": log_id,
            "logDateTim": date,
            "logDateTime": date,
            "handleCode": code,
            "handleMsg": message,
            "executeResult": {"code": code, "msg": message},
        }
        for log_id, code, message in ((good, 200, "hello"), (bad, 500, "exit status 3: hello"))
    ]
    shapes = [{"callbackList": [one]} if version == "3.5" else [one] for one in wanted]
    assert [body for _, body in calls(admin, "callback")] == shapes
    for path, headers, _ in admin.requests:
        assert path.startswith("/api/" if version == "3.5" else "/xxl-job-admin/api/")
        assert headers["content-type"] == "application/json;charset=UTF-8"
        assert headers["xxl-job-access-token"] == token  # there even when it is empty
        assert headers["xxl-job-appname"] == "my-app"


@pytest.mark.parametrize(
    "version, path, wrong, right", [("3.5", "/run", list, dict), ("2.3", "/trigger", dict, list)]
)
def test_dialect_is_learned_from_the_answer_and_remembered(
    executor, loopback, version, path, wrong, right
):
    admin = loopback(version)
    jobs = {**HELLO, "block": {"shell": "exec sleep 600", "kill_grace": "0.2s"}}
    daemon = executor(jobs, admin=admin)

    def shapes():
        return [type(body) for _, body in calls(admin, "callback")]

    trigger(daemon, 1, path)  # not what this version calls: the guess that follows from it is wrong
    assert result_of(admin, 1)["handleMsg"] == "hello"
    assert shapes() == [wrong, right]
    # A run that a crash interrupts has a result before the admin calls anything again.
    trigger(daemon, 2, path, "block")
    wait_until(lambda: daemon.status()["running"])
    # The path told the wrong dialect again; one more result corrects it.
    trigger(daemon, 3, path)
    result_of(admin, 3)
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    daemon.kill()
    before = len(shapes())
    daemon.start()
    assert (
        result_of(admin, 2)["handleMsg"]
        == "executor restarted while the job ran, its outcome is unknown"
    )
    assert shapes()[before:] == [right]


@pytest.mark.parametrize(
    "version, shape", [("2.2.0", list), ("2.3", list), ("3.3", list), ("3.5", dict)]
)
def test_dialect_is_learned_from_the_path_and_remembered(executor, loopback, version, shape):
    admin = loopback(version)
    daemon = executor({"block": {"shell": "exec sleep 600", "kill_grace": "0.2s"}}, admin=admin)
    log_id, _ = admin.trigger(daemon.url, "block")
    wait_until(lambda: daemon.status()["running"])
    daemon.kill()
    daemon.start()
    result_of(admin, log_id)
    assert [type(body) for _, body in calls(admin, "callback")] == [shape]


def test_a_caller_of_both_paths_does_not_fill_the_log(executor):
    """Which dialect the admin speaks is told when it changes, not as often as somebody who calls
    the paths of two versions in turn likes."""
    daemon = executor(HELLO)
    began = time.monotonic()
    for log_id in range(1, 301):
        path = "/trigger" if log_id % 2 else "/run"
        body = {"jobId": 1, "logId": log_id, "executorHandler": "unknown"}
        assert daemon.post(path, body)["code"] == 500
    took = time.monotonic() - began
    assert daemon.stop() == 0
    told = daemon.log.count("the admin speaks the dialect")
    assert 1 <= told <= took + 3, f"{told} lines in {took:.1f} s"


def test_message_is_cut_to_what_the_admin_stores(executor, admin):
    text = "x" * 30_000
    daemon = executor(
        {
            "long": {"shell": 'printf "%s你好 the end" "$1$1" > "$XXL_JOB_RESULT_FILE"'},
            "exact": {"shell": 'printf "%s" "$1" > "$XXL_JOB_RESULT_FILE"'},
        },
        admin=admin,
    )
    _, item = run_job(daemon, admin, "long", executorParams=text)
    message = item["handleMsg"]
    assert (
        len(message) == 15_000
        and message == "..." + "x" * (15_000 - 3 - len("你好 the end")) + "你好 the end"
    )
    assert item["executeResult"]["msg"] == message
    for size in (14_999, 15_000):
        assert (
            run_job(daemon, admin, "exact", executorParams="y" * size)[1]["handleMsg"] == "y" * size
        )
    assert (
        len(run_job(daemon, admin, "exact", executorParams="y" * 15_001)[1]["handleMsg"]) == 15_000
    )


# -- an admin that is not there


def test_admin_that_comes_later(executor, loopback, port):
    daemon = executor(HELLO, admin=absent(port))
    trigger(daemon, 1, executorParams="later")
    wait_until(lambda: daemon.status()["lastFailedDelivery"])
    status = daemon.status()
    assert (status["undelivered"], status["registered"]) == (1, False)
    refused = rf"http://127\.0\.0\.1:{port}/api/%s: \[Errno 111\] Connection refused"
    assert re.fullmatch(refused % "(callback|registry)", status["lastFailedDelivery"])
    assert [(entry["address"], entry["ok"]) for entry in status["admins"]] == [
        (f"http://127.0.0.1:{port}", False)
    ]
    admin = loopback(port=port)
    assert result_of(admin, 1, 30)["handleMsg"] == "hello later"
    assert admin.wait(lambda: admin.registry, 30) == [daemon.url + "/"]
    wait_until(lambda: daemon.status()["undelivered"] == 0)

    def well():  # the daemon hears of it after the admin
        status = daemon.status()
        return (status["registered"], status["lastFailedDelivery"], status["admins"][0]["ok"]) == (
            True,
            "",
            True,
        )

    wait_until(well)
    # An outage is told once, its end too.
    told = re.findall("cannot register.*", daemon.log)
    assert len(told) == 1 and re.fullmatch(
        "cannot register at the admin, trying again until it works: " + refused % "registry",
        told[0],
    )
    wait_until(
        lambda: daemon.log.count(f" registered {daemon.url}/ as xxl-job-executor-sample") == 1
    )


def test_many_results_go_in_few_requests(executor, loopback, port):
    daemon = executor(
        {"hello": {"command": ["echo", "hello {param}"]}}, admin=absent(port), start=False
    )
    undelivered(daemon, port, 230)
    admin = loopback(port=port)
    daemon.start()
    assert admin.wait(lambda: len(admin.results) == 230, 20)
    assert [len(body["callbackList"]) for _, body in calls(admin, "callback")] == [100, 100, 30]
    assert {
        log_id: [item["handleMsg"] for item in items] for log_id, items in admin.results.items()
    } == {i: [f"hello {i}"] for i in range(1, 231)}
    wait_until(lambda: daemon.status()["undelivered"] == 0)


# -- answers that acknowledge nothing

BAD_ANSWERS = {
    "HTTP 500": (500, b""),
    "HTTP 502 of a proxy": (502, b"<html>Bad Gateway</html>"),
    "HTTP 503 with an envelope": (503, b'{"code":200}'),
    "a redirect": (302, b'{"code":200}'),
    "a login page": (200, b"<!DOCTYPE html><title>login</title>"),
    "nothing": (200, b""),
    "half a JSON": (200, b'{"code":200'),
    "code 500": (200, b'{"code":500,"msg":"no"}'),
    "code as text": (200, b'{"code":"200"}'),
    "code true": (200, b'{"code":true}'),
    "code 200.0": (200, b'{"code":200.0}'),
    "a list": (200, b"[200]"),
    "a number": (200, b"200"),
    "no code": (200, b'{"msg":"fine","data":{"code":200}}'),
    "deep nesting": (200, b"[" * 50_000),
    "10 MB": (200, b'{"code":200,"msg":"' + b"x" * 10_000_000 + b'"}'),
    "not UTF-8": (200, b'{"code":200,"msg":"\xff"}'),
    "no answer": cut,
}


def test_only_a_clear_answer_is_an_acknowledgement(executor, admin):
    """One attempt meets every kind of nonsense: the same admin under several names, each with an
    answer of its own."""
    names = sorted(
        BAD_ANSWERS, key=lambda name: name == "code 500"
    )  # that one is clear: no address after it is asked
    asked = []

    def behave(path, body):
        _, number, _, call = path.split("/")
        if call == "callback":
            asked.append(names[int(number)])
            answer = BAD_ANSWERS[asked[-1]]
            return answer() if callable(answer) else answer

    admin.behave = behave
    addresses = [f"{admin.url}/{number}" for number in range(len(names))]
    daemon = executor(HELLO, admin=admin, admin_options={**SHORT, "addresses": addresses})
    assert admin.wait(lambda: admin.registry, 10)
    log_id, _ = admin.trigger(daemon.url, "hello", executorParams="you")
    wait_until(
        lambda: all(entry["error"] for entry in daemon.status()["admins"]),
        20,
        "a failure of each address",
    )
    assert asked[: len(names)] == names
    assert log_id not in admin.results and daemon.status()["undelivered"] == 1
    for name, entry in zip(names, daemon.status()["admins"]):
        assert (
            entry["error"].startswith(f"{entry['address']}/api/callback: ") and not entry["ok"]
        ), name
    admin.behave = normal
    assert result_of(admin, log_id, 20)["handleMsg"] == "hello you"
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    assert daemon.status()["lastFailedDelivery"] == ""
    metrics = daemon.session.get(daemon.url + "/metrics", timeout=10).text
    assert re.search(r"^xxl_executor_callback_failures_total [1-9]", metrics, re.M)


def test_registration_survives_nonsense(executor, admin):
    answers = [
        answer for name, answer in BAD_ANSWERS.items() if name != "code 500"
    ]  # that one is clear: no next address
    left = iter(answers)

    def behave(path, body):
        answer = next(left, None) if path.endswith("/registry") else None
        return answer() if callable(answer) else answer

    admin.behave = behave
    # The same admin under several names: every address that gives no answer has the next one asked
    # at once.
    addresses = [f"{admin.url}/{number}" for number in range(len(answers) // 2)]
    daemon = executor(HELLO, admin=admin, admin_options={**SHORT, "addresses": addresses})
    assert admin.wait(lambda: admin.registry, 20) == [daemon.url + "/"]
    assert next(left, "used up") == "used up"
    wait_until(lambda: daemon.status()["registered"])
    assert daemon.log.count("cannot register at the admin") == 1
    run_job(daemon, admin, "hello")


def test_a_wrong_token_is_told(executor, loopback):
    admin = loopback(token="right")
    daemon = executor(HELLO, admin=admin, admin_options={"access_token": "wrong"})
    wait_until(
        lambda: (
            f"cannot register at the admin, trying again until it works: {admin.url}/api/registry: "
            "code 500: The access token is wrong; give both the same: xxl.job.accessToken there,"
            " admin.access_token here\n" in daemon.log
        )
    )
    status = daemon.status(**{"XXL-JOB-ACCESS-TOKEN": "wrong"})
    error = status["admins"][0]["error"]
    assert error.startswith(f"{admin.url}/api/registry: code 500: The access token is wrong; give")
    assert not status["registered"]


def test_one_bad_result_holds_back_nobody(executor, loopback, port):
    daemon = executor(HELLO, admin=absent(port), start=False)
    undelivered(daemon, port, 9)
    admin, poison = loopback(port=port), 4

    def reply(body):
        return (
            (200, b'{"code":500,"msg":"poison"}')
            if f'"logId": {poison},'.encode() in body
            else None
        )

    admin.behave = fail_callbacks(reply)
    daemon.start()
    assert admin.wait(lambda: len(admin.results) == 8, 20)
    trigger(daemon, 10)  # one that comes later does not wait for it either
    result_of(admin, 10)
    assert sorted(admin.results) == [1, 2, 3, 5, 6, 7, 8, 9, 10] and all(
        len(items) == 1 for items in admin.results.values()
    )
    wait_until(lambda: daemon.status()["undelivered"] == 1)
    reason = f"{admin.url}/api/callback: code 500: poison"
    assert f"the admin refuses the result of logId=4, trying again later: {reason}\n" in daemon.log
    assert daemon.status()["lastFailedDelivery"] == reason, (
        "while something is refused, the status tells why"
    )
    admin.behave = normal
    assert result_of(admin, 4, 20)["handleMsg"] == "hello 4"
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    assert all(len(items) == 1 for items in admin.results.values())


def test_an_answer_that_is_lost_gives_an_equal_duplicate(executor, admin):
    bodies = []

    def reply(body):
        bodies.append(body)
        if len(bodies) == 1:
            cut()

    admin.behave = fail_callbacks(reply)
    daemon = executor(HELLO, admin=admin)
    log_id, _ = run_job(daemon, admin, "hello", executorParams="you")
    assert len(bodies) == 2 and bodies[0] == bodies[1]
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    assert len(bodies) == 2 and len(admin.results[log_id]) == 1


# -- an admin that is slow


class Stuck:
    """A server that never gives a whole answer: it sends `head` at once, then what `drip` gives a
    byte each 0.2 s."""

    def __init__(self, head=b"", drip=b"", accept=True):
        self.head, self.drip = head, drip
        self.over, self.connections, self.ended = threading.Event(), 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=0 if not accept else 16)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads, self.fillers = [], []
        if accept:
            self._go(self._accept)
        else:  # fill the queue, so that the next connection is not even established
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(self.listener.getsockname())
                self.fillers.append(filler)

    def _go(self, target, *arguments):
        self.threads.append(threading.Thread(target=target, args=arguments))
        self.threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.connections += 1
                self._go(self._serve, sock)

    def _serve(self, sock):
        with sock, contextlib.suppress(OSError):
            sock.settimeout(0.2)
            sent = 0
            got = b""
            while not self.over.is_set():
                try:
                    data = sock.recv(65_536)
                    if not data:
                        break
                    got += data
                except socket.timeout:
                    if not got:
                        continue
                    if not sent:
                        sock.sendall(self.head)
                    if self.drip:
                        sock.sendall(self.drip[sent % len(self.drip) :][:1])
                    sent += 1
        self.ended += 1

    def close(self):
        self.over.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for filler in self.fillers:
            filler.close()
        for thread in self.threads:
            thread.join()


STUCK = {
    "silent": {},
    "dripping status line": {"drip": b"HTTP/1.1 200 OK" + b"K" * 1000},
    "dripping headers": {"head": b"HTTP/1.1 200 OK\r\n", "drip": b"X-A: b\r\n"},
    "dripping body": {"head": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{", "drip": b" "},
    "dripping chunks": {
        "head": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        "drip": b"1\r\n \r\n",
    },
    "full backlog": {"accept": False},
    "no HTTP": {"head": b"\0\xff SSH-2.0-OpenSSH\r\n\r\n"},
}


@pytest.mark.parametrize("kind", STUCK)
def test_a_stuck_address_does_not_stop_the_other(executor, admin, kind):
    with contextlib.closing(Stuck(**STUCK[kind])) as stuck:
        daemon = executor(HELLO, admin_options={**SHORT, "addresses": [stuck.url, admin.url]})
        trigger(daemon, 1)
        assert admin.wait(lambda: admin.registry, 15) == [daemon.url + "/"]
        result_of(admin, 1)
        wait_until(lambda: daemon.status()["undelivered"] == 0)
        first, second = daemon.status()["admins"]
        assert (first["address"], first["ok"], second["ok"]) == (stuck.url, False, True)
        assert first["lastSuccess"] is None and second["lastSuccess"] > 0 and second["error"] == ""
        reason = {"full backlog": "(no complete answer within 1 s|timed out)", "no HTTP": ".+"}.get(
            kind, "no complete answer within 1 s"
        )
        assert re.fullmatch(
            f"{re.escape(stuck.url)}/api/(registry|callback): {reason}", first["error"]
        )
        if kind != "full backlog":  # the daemon has closed what it opened; no exchange goes on
            wait_until(lambda: stuck.ended == stuck.connections > 0)
        assert daemon.stop() == 0


@pytest.mark.parametrize(
    "failure", [cut, (502, b"<html>"), (200, b"<html>")], ids=["dead", "502", "page"]
)
def test_the_second_admin_takes_over(executor, loopback, failure):
    one, two = loopback(), loopback()
    daemon = executor(HELLO, admin_options={**SHORT, "addresses": [one.url, two.url]})
    assert one.wait(lambda: one.registry, 10)
    first, _ = run_job(daemon, one, "hello")
    assert not two.requests, "the first address that answers is enough"
    one.behave = lambda path, body: failure() if callable(failure) else failure
    second, _ = one.trigger(daemon.url, "hello")
    result_of(two, second)
    if callable(failure):  # it may have lost what it had acknowledged
        result_of(two, first)
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    assert [entry["ok"] for entry in daemon.status()["admins"]] == [False, True]
    assert daemon.status()["admins"][0]["error"].startswith(f"{one.url}/api/callback: ")
    url = daemon.url + "/"
    assert daemon.stop() == 0
    assert [body["registryValue"] for _, body in calls(two, "registryRemove")] == [url]
    assert second not in one.results


def test_a_clear_refusal_is_not_asked_again_elsewhere(executor, loopback):
    """The addresses are one cluster over one database: the others would say the same."""
    one, two = loopback(), loopback()
    one.behave = fail_callbacks((200, b'{"code":500,"msg":"no"}'))
    daemon = executor(HELLO, admin_options={**SHORT, "addresses": [one.url, two.url]})
    log_id, _ = one.trigger(daemon.url, "hello")
    wait_until(
        lambda: daemon.status()["lastFailedDelivery"] == f"{one.url}/api/callback: code 500: no"
    )
    assert not calls(two, "callback")
    one.behave = normal
    result_of(one, log_id)


# -- parts


def test_backoff_bounds():
    random.seed(1)
    for failures in range(1, 200):
        values = [Backoff(failures - 1).fail() for _ in range(50)]
        longest = min(60, 2 ** min(failures - 1, 10))
        assert max(1, longest / 2) <= min(values) and max(values) <= max(1, longest)
    assert len({Backoff(9).fail() for _ in range(50)}) > 10, "many executors would come at once"
    assert Backoff().fail() == 1.0 and min(Backoff(10**9 - 1).fail() for _ in range(50)) > 29


@pytest.mark.parametrize(
    "status, reply, verdict",
    [
        (200, b'{"code":200}', (200, "code 200: None")),
        (200, b'{"code":200,"msg":"ok","content":"x"}', (200, "code 200: ok")),
        (200, b' {"code":200,"unknown":[1]} \n', (200, "code 200: None")),
        (
            200,
            b'{"code":500,"msg":"The access token is wrong."}',
            (500, "code 500: The access token is wrong."),
        ),
        (200, b'{"code":404,"msg":"' + b"x" * 600 + b'"}', (404, "code 404: " + "x" * 500)),
        (200, b'{"code":0}', (0, "code 0: None")),
        (500, b'{"code":200}', (None, "HTTP status 500")),
        (204, b"", (None, "HTTP status 204")),
        (302, b"", (None, "HTTP status 302")),
        (200, b"", (None, "no XXL-JOB answer: b''")),
        (200, b"<html>" + b"x" * 100, (None, f"no XXL-JOB answer: {b'<html>' + b'x' * 54!r}")),
        (200, b'{"code":200', (None, "no XXL-JOB answer: b'{\"code\":200'")),
        (200, b'{"code":"200"}', (None, 'no XXL-JOB answer: b\'{"code":"200"}\'')),
        (200, b'{"code":true}', (None, "no XXL-JOB answer: b'{\"code\":true}'")),
        (200, b'{"code":200.0}', (None, "no XXL-JOB answer: b'{\"code\":200.0}'")),
        (200, b'{"code":null}', (None, "no XXL-JOB answer: b'{\"code\":null}'")),
        (200, b'{"msg":"x"}', (None, 'no XXL-JOB answer: b\'{"msg":"x"}\'')),
        (200, b"[]", (None, "no XXL-JOB answer: b'[]'")),
        (200, b"null", (None, "no XXL-JOB answer: b'null'")),
        (200, b'"code"', (None, "no XXL-JOB answer: b'\"code\"'")),
        (200, b"\xff", (None, "no XXL-JOB answer: b'\\xff'")),
        (200, b"[" * 50_000, (None, f"no XXL-JOB answer: {b'[' * 60!r}")),
        (
            200,
            b'{"code":200,"msg":"' + b"x" * 65_536 + b'"}',
            (None, "an answer of more than 65536 bytes"),
        ),
    ],
)
def test_verdict(status, reply, verdict):
    assert AdminClient._verdict(status, reply) == verdict


def test_a_resolver_that_hangs_is_left_behind(monkeypatch):
    release, entered = threading.Event(), threading.Event()

    def hang(*arguments, **options):
        entered.set()
        release.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        with pytest.raises(OSError) as caught:
            resolve("admin.example", 80, 0.2)
        assert str(caught.value) == "admin.example was not resolved within 0.2 s"
        assert entered.is_set() and not release.is_set()
    finally:
        release.set()


def test_resolver(monkeypatch):
    def fail(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert ("127.0.0.1", 80) in [found[4] for found in resolve("127.0.0.1", 80, 0.5)]
    assert ("::1", 80, 0, 0) in [found[4] for found in resolve("::1", 80, 0.5)]
    assert resolve("localhost", 80, 5)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(OSError) as caught:
        resolve("admin.example", 80, 5)
    assert str(caught.value) == "admin.example: Name or service not known"


def test_failover_is_in_process_too(loopback, port, tmp_path):
    """AdminClient alone: which address is asked when, and what it raises."""
    file = tmp_path / "config.yaml"
    admin = loopback()
    file.write_text(
        f"admin:\n  addresses: [http://127.0.0.1:{port}, {admin.url}]\n  timeout: 1s\njobs: {{}}\n"
    )
    learned = []
    client = AdminClient(
        xxl_executor.load_config(str(file)), "wrapper", lambda *fact: learned.append(fact)
    )
    try:
        client.callback([StoredResult(1, 2, 200, "a", 0.0)])
        client.callback([StoredResult(2, 2, 200, "b", 0.0)])
        assert sorted(admin.results) == [1, 2] and not learned
        dead, good = client.addresses
        assert (dead.backoff.failures, good.backoff.failures) == (1, 0), (
            "it is left alone during its backoff"
        )
        assert (
            dead.last_error
            == f"http://127.0.0.1:{port}/api/callback: [Errno 111] Connection refused"
        )
        client.learned("/run")
        client.learned("/run")
        assert learned == [("dialect", "array")]
        client.callback([StoredResult(3, 2, 200, "c", 0.0)])
        assert learned == [("dialect", "array"), ("dialect", "wrapper")]
        admin.behave = lambda path, body: (200, b'{"code":500,"msg":"no"}')
        with pytest.raises(xxl_executor.AdminRefused) as caught:
            client.callback([StoredResult(4, 2, 200, "d", 0.0)])
        assert str(caught.value) == f"{admin.url}/api/callback: code 500: no"
    finally:
        client.close()


def test_a_result_that_is_taken_is_no_heartbeat(executor, admin):
    """The alert on missing heartbeats stayed silent while the admin refused to register us."""
    refused = (200, b'{"code":500,"msg":"no"}')
    admin.behave = lambda path, body: refused if path == "/api/registry" else None
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin)
    run_job(daemon, admin, "hello")
    name = "xxl_executor_last_heartbeat_timestamp_seconds"
    shown = daemon.session.get(daemon.url + "/metrics", timeout=20).text
    assert float(re.search(rf"^{name} (.+)$", shown, re.MULTILINE)[1]) == 0


def test_threads_wait_for_their_turn_at_an_address_that_refuses(port, tmp_path):
    """Each has tried before it says that it failed, though they came within the second in which
    there is one attempt."""
    file = tmp_path / "config.yaml"
    file.write_text(f"admin:\n  addresses: [http://127.0.0.1:{port}]\njobs: {{}}\n")
    client = AdminClient(xxl_executor.load_config(str(file)), "array", lambda *fact: None)
    start = threading.Barrier(2)

    def failure(call, argument):
        start.wait(10)
        with pytest.raises(xxl_executor.AdminUnreachable) as caught:
            call(argument)
        return str(caught.value)

    with contextlib.closing(client), ThreadPoolExecutor(2) as pool:
        beat = pool.submit(failure, client.registry, "http://127.0.0.1:1/")
        result = pool.submit(failure, client.callback, [StoredResult(1, 2, 200, "a", 0.0)])
    for path, told in (("registry", beat.result()), ("callback", result.result())):
        assert told == f"http://127.0.0.1:{port}/api/{path}: [Errno 111] Connection refused"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
        ConnectionRefusedError(111, "Connection refused"),
        TimeoutError("timed out"),
        OSError(101, "Network is unreachable"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_failure_to_connect_is_the_same_kind_of_failure(monkeypatch, port, tmp_path, error):
    """urllib3 takes a reset or a broken pipe for something that happened after the connection was
    made."""
    file = tmp_path / "config.yaml"
    file.write_text(f"admin:\n  addresses: [http://127.0.0.1:{port}]\njobs: {{}}\n")

    def connect(*_):
        raise error

    monkeypatch.setattr(socket.socket, "connect", connect)
    with (
        contextlib.closing(
            AdminClient(xxl_executor.load_config(str(file)), "", lambda *fact: None)
        ) as client,
        pytest.raises(xxl_executor.AdminUnreachable) as caught,
    ):
        client.registry("http://127.0.0.1:1/")
    assert str(caught.value) == f"http://127.0.0.1:{port}/api/registry: {error}"


# -- results that are too old


def test_a_result_is_given_up_after_seven_days(executor, loopback, port):
    daemon = executor(HELLO, admin=absent(port), start=False)
    undelivered(daemon, port, 3)
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db, db:
        db.execute("UPDATE runs SET finished = finished - 7 * 86400 - 60 WHERE log_id = 1")
        db.execute("UPDATE runs SET finished = finished - 7 * 86400 + 3600 WHERE log_id = 2")
    admin = loopback(port=port)
    for _ in range(2):
        daemon.start()
        wait_until(lambda: daemon.status()["undelivered"] == 0)
        assert daemon.status()["dead"] == 1
        run_job(daemon, admin, "hello")
        assert daemon.stop() == 0
    assert 1 not in admin.results and len(admin.results[2]) == len(admin.results[3]) == 1
    assert re.findall("ERROR.*giving up.*", daemon.log) == [
        "ERROR   giving up 1 result that the admin did not take for 7 days: logId=1"
    ]
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db:
        assert db.execute("SELECT log_id, message FROM runs WHERE state = 'dead'").fetchall() == [
            (1, "hello 1")
        ]


# -- the advertised address


@pytest.mark.parametrize(
    "address",
    ["http://10.9.8.7:1234", "http://10.9.8.7:1234/", "http://proxy.example/executors/one"],
)
def test_configured_address_is_registered_as_given(executor, admin, address):
    daemon = executor(HELLO, admin=admin, executor={"address": address})
    assert admin.wait(lambda: admin.registry, 10) == [address]
    assert daemon.status()["address"] == address
    if address.endswith("/one"):  # a proxy in front may leave its path on
        assert daemon.post("/executors/one/beat")["code"] == 200
    assert daemon.post("/beat")["code"] == 200
    assert daemon.stop() == 0
    assert [body["registryValue"] for _, body in calls(admin, "registryRemove")] == [address]


def test_default_address_is_the_interface_that_faces_the_admin(executor, loopback):
    admin = loopback(token="t")
    daemon = executor(HELLO, admin=admin, executor={"bind": "0.0.0.0:0"})
    assert admin.wait(lambda: admin.registry, 10) == [f"http://127.0.0.1:{daemon.port}/"]
    assert daemon.port > 0 and admin.call(admin.registry[0], "/beat")["code"] == 200


def test_without_an_admin(executor):
    """An empty list: serve without an admin; nothing piles up, nothing is complained about."""
    daemon = executor(HELLO)
    trigger(daemon, 1)
    wait_until(lambda: "finished hello logId=1 jobId=1 code=200" in daemon.log)
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    status = daemon.status()
    assert (status["registered"], status["admins"], status["lastFailedDelivery"]) == (False, [], "")
    assert daemon.stop() == 0
    assert not re.search("WARNING|ERROR", daemon.log)
