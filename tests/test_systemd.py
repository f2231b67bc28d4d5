"""What systemd and the daemon tell each other: the notify socket, the watchdog, inherited
sockets."""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import requests
from conftest import PROGRAM, run_job, wait_until

import xxl_executor

program = PROGRAM  # as the unit does
# Puts a descriptor where systemd does and says so to the process that will be the daemon.
ACTIVATE = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[2], sys.argv[2:])"""


class Manager:
    """The service manager's end of the notify socket; `told` grows by a message a line."""

    def __init__(self, path):
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.told, self.lines = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def read(self):
        """Everything that has come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told.append(self.socket.recv(4096, socket.MSG_DONTWAIT).decode())
        return "\n".join(self.told).split("\n")


@pytest.fixture
def manager(tmp_path):
    with Manager(tmp_path / "notify") as made:
        yield made


def test_the_status_line_tells_what_runs(executor, admin, tmp_path, manager):
    """systemctl status shows how many runs are in progress, waiting and undelivered."""
    go = tmp_path / "go"
    daemon = executor(
        {"job": {"shell": f"while [ ! -e {go} ]; do sleep 0.05; done"}},
        admin=admin,
        env={"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "200000"},
    )
    for _ in range(3):
        admin.trigger(daemon.url, "job")
    wait_until(lambda: "STATUS=1 running, 2 queued, 0 undelivered" in manager.read())
    go.touch()
    wait_until(
        lambda: (
            [line for line in manager.read() if line.startswith("STATUS=")][-1]
            == "STATUS=0 running, 0 queued, 0 undelivered"
        )
    )
    assert daemon.stop() == 0
    assert manager.read().count("READY=1") == 1 and manager.read().count("STOPPING=1") == 1


def test_a_failed_reload_is_told(executor, manager):
    """With its reason: who sees it there needs no other place to look."""
    daemon = executor(
        {"job": {"shell": "true"}},
        env={"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "200000"},
    )
    good = daemon.file.read_text()

    def last():
        lines = [line for line in manager.read() if line.startswith("STATUS=")]
        return lines[-1] if lines else ""

    daemon.file.write_text(good.replace("shell:", "shel:"))
    daemon.signal(signal.SIGHUP)
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    told = r"config\.yaml:\d+: jobs\.job\.shel: unknown key.*"
    failed = rf"STATUS=RELOAD FAILED, the old jobs stay \({at}: .*{told}\), 0 running, .*"
    wait_until(lambda: re.fullmatch(failed, last()), what="the reason")
    daemon.file.write_text(good)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: last() == "STATUS=0 running, 0 queued, 0 undelivered")


def test_a_failed_reload_is_told_whatever_the_file_is_called(executor, manager):
    """A file that another system has named with bytes that are no UTF-8 breaks a reload: that is
    told, the daemon lives on, and the next reload takes the jobs over."""
    daemon = executor(
        {"job": {"shell": "true"}},
        env={"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "200000"},
        include=["jobs.d/*.yaml"],
        start=False,
    )
    included = daemon.directory / "jobs.d"
    included.mkdir()
    daemon.start()

    def last():
        lines = [line for line in manager.read() if line.startswith("STATUS=")]
        return lines[-1] if lines else ""

    wait_until(lambda: last() == "STATUS=0 running, 0 queued, 0 undelivered")
    name = os.fsencode(included) + b"/" + "\u8ba2\u5355.yaml".encode("gbk")
    with open(name, "w", encoding="utf-8") as stream:
        stream.write("jobs: {other: {shel: x}}\n")
    daemon.signal(signal.SIGHUP)
    wait_until(
        lambda: (
            last().startswith("STATUS=RELOAD FAILED, the old jobs stay")
            or daemon.process.poll() is not None
        ),
        what="the reason",
    )
    assert daemon.process.poll() is None, daemon.log
    assert "jobs.other.shel: unknown key" in last()
    os.unlink(name)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: last() == "STATUS=0 running, 0 queued, 0 undelivered")
    assert daemon.stop() == 0


@pytest.mark.parametrize("kind", ["none", "down", "hanging"])
def test_the_watchdog_is_fed_whatever_the_admin_does(executor, admin, manager, kind):
    with socket.create_server(("127.0.0.1", 0)) as hanging, socket.socket() as down:
        down.bind(("127.0.0.1", 0))
        ports = {"down": down.getsockname()[1], "hanging": hanging.getsockname()[1]}
        addresses = [f"http://127.0.0.1:{ports[kind]}"] if kind != "none" else []
        daemon = executor(
            {"job": {"shell": "true"}},
            env={"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "200000"},
            admin_options={"addresses": addresses, "timeout": "1s", "connect_timeout": "1s"},
        )
        assert (
            daemon.post("/run", {"jobId": 1, "logId": 1, "executorHandler": "job"})["code"] == 200
        )
        wait_until(lambda: manager.read().count("WATCHDOG=1") >= 12)
        assert "makes no progress" not in daemon.log
        daemon.stop()


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "nonsense"},
        {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": "1"},
    ],
    ids=str,
)
def test_no_watchdog_is_fed_that_nobody_asked_for(manager, monkeypatch, env):
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"NOTIFY_SOCKET": manager.path, **env}.items():
        monkeypatch.setenv(name, value)
    told = xxl_executor.ServiceManager(lambda: "fine", lambda: pytest.fail("nobody asked"))
    told.tell()
    told.tell()
    assert manager.read() == ["STATUS=fine"]
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert xxl_executor.ServiceManager(lambda: "fine", lambda: True).due is None


def api(answer):
    """What a server asks that trusts everybody."""
    routes = {"/metrics": xxl_executor.Route.POOL}
    return SimpleNamespace(
        trusts=lambda request: True,
        route=lambda request: routes.get(request.path, xxl_executor.Route.POOL),
        answer=answer,
    )


def test_a_selector_that_is_stuck_is_noticed(monkeypatch):
    monkeypatch.setattr(xxl_executor, "ALIVE", 0.5)
    listener = xxl_executor.listen(("127.0.0.1", 0))
    server = xxl_executor.HttpServer(listener, api(lambda request, ticket: None), 100)
    go = threading.Event()
    monkeypatch.setattr(server, "_accept", lambda: go.wait(30))
    server.start()
    try:
        assert server.alive()
        with socket.create_connection(listener.getsockname()[:2]):
            wait_until(lambda: not server.alive())
            go.set()
            wait_until(server.alive)
    finally:
        go.set()
        server.close()


def test_a_callback_that_never_ends_is_noticed(tmp_path):
    go, called = threading.Event(), threading.Event()

    def callback(rows):
        called.set()
        go.wait(30)

    journal = xxl_executor.Journal(str(tmp_path / "journal.db"))
    journal.post = journal.hold  # all that is posted is what was delivered
    admin = SimpleNamespace(addresses=[], callback=callback, missed_at=0.0)
    callbacks = xxl_executor.Callbacks(journal, admin, xxl_executor.Metrics())
    assert not callbacks.alive(1000), "it was not started"
    callbacks.start()
    try:
        wait_until(lambda: callbacks.alive(0), what="that it waits")
        journal.begin()
        journal.accept(xxl_executor.Trigger(1, 1, "job"))
        journal.finish(
            [xxl_executor.Span(xxl_executor.Trigger(1, 1, "job"), 1.0, 1.0)],
            xxl_executor.Result(200, ""),
        )
        journal.commit()
        callbacks.wake()
        assert called.wait(10)
        assert callbacks.alive(1000)
        wait_until(lambda: not callbacks.alive(0.01))
        go.set()
        wait_until(lambda: callbacks.alive(0.01))
    finally:
        go.set()
        callbacks.close()
        journal.close()


# -- inherited sockets


@pytest.fixture
def activated(executor, admin):
    """A factory of daemons that get `listener` as systemd would pass it."""

    def make(listener, jobs, **options):
        daemon = executor(
            jobs,
            admin=admin,
            start=False,
            prefix=[sys.executable, "-c", ACTIVATE, str(listener.fileno())],
            **options,
        )
        daemon.pass_fds = (listener.fileno(),)
        return daemon

    return make


def test_an_inherited_socket_takes_the_place_of_bind(activated, admin):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        daemon = activated(
            listener,
            {"job": {"shell": "echo LISTEN=$LISTEN_FDS$LISTEN_PID; ls /proc/$$/fd"}},
            executor={"bind": "127.0.0.1:1"},
        ).start()
        assert daemon.port == listener.getsockname()[1]
        _, result = run_job(daemon, admin, "job")
        assert result["handleCode"] == 200
        assert "LISTEN=\n0\n1\n2\n" in daemon.log_text(result["logId"]), (
            "jobs get neither the variables nor the socket"
        )
        assert admin.registry == [f"{daemon.url}/"]
        assert daemon.stop() == 0


def test_a_reload_does_not_take_the_inherited_address_for_a_change(activated):
    jobs = {"job": {"shell": "true"}}
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        daemon = activated(listener, jobs, executor={"bind": "127.0.0.1:1"}).start()
        port = listener.getsockname()[1]
        wait_until(lambda: f"listening on the socket unit's [::1]:{port}, 1 job, " in daemon.log)
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded " in daemon.log)
        assert "takes effect at a restart" not in daemon.log
        assert daemon.stop() == 0


def test_an_inherited_socket_that_is_open_to_the_network_needs_a_token(activated):
    with socket.create_server(("0.0.0.0", 0)) as listener:
        daemon = activated(listener, {}).start(wait=False)
        assert daemon.wait() == 2
        assert (
            "admin.access_token: is empty, and ListenStream 0.0.0.0 of the socket unit is open to"
            " the network: set a token, listen on 127.0.0.1 there, or" in daemon.log
        )


@pytest.mark.parametrize("kind", ["unix", "udp", "connected"])
def test_an_inherited_socket_of_another_kind_is_refused(activated, tmp_path, kind):
    with contextlib.ExitStack() as stack:
        if kind == "unix":
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.bind(str(tmp_path / "socket"))
            other.listen()
        elif kind == "udp":
            other = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        else:
            other, _ = (stack.enter_context(end) for end in socket.socketpair())
        daemon = activated(other, {}).start(wait=False)
        assert daemon.wait() == 1
        assert daemon.log.endswith(
            "xxl-executor: the first socket that systemd passed does not listen for TCP: its unit"
            " needs ListenStream=<port>\n"
        )


def test_a_restart_refuses_no_trigger(activated, admin):
    """Triggers come all the time over new connections while the daemon is restarted: each is
    accepted and has a result."""
    accepted, failures, done = [], [], threading.Event()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        daemon = activated(listener, {"job": {"shell": "true"}}).start()

        def caller(job_id):
            while not done.is_set():
                try:
                    log_id, reply = admin.trigger(url, "job", jobId=job_id)
                except requests.RequestException as error:
                    failures.append(error)
                else:
                    (accepted if reply["code"] == 200 else failures).append((log_id, reply))

        callers = [threading.Thread(target=caller, args=(number,)) for number in (1, 2)]
        for thread in callers:
            thread.start()
        try:
            for count in (1, 2, 3):
                wait_until(lambda: len(accepted) >= 50 * count or failures, 20)
                assert daemon.stop() == 0
                daemon.start()
            wait_until(lambda: len(accepted) >= 200 or failures, 30)
        finally:
            done.set()
            for thread in callers:
                thread.join()
        assert failures == []
        assert admin.wait(lambda: all(log_id in admin.results for log_id, _ in accepted), 20)
        assert {admin.results[log_id][0]["handleCode"] for log_id, _ in accepted} == {200}
        daemon.stop()


def test_a_restart_with_a_long_run_refuses_with_the_reason(activated, admin, tmp_path):
    """When the next executor is not near, a caller is told so within a second or two, and running
    jobs end as always."""
    go = tmp_path / "go"
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        daemon = activated(
            listener,
            {"job": {"shell": f"while [ ! -e {go} ]; do sleep 0.05; done; echo done"}},
            executor={"drain_timeout": "30s"},
        ).start()
        log_id, _ = admin.trigger(daemon.url, "job")
        wait_until(lambda: daemon.status()["running"])
        url = daemon.url
        daemon.signal(15)
        wait_until(lambda: "stopping: " in daemon.log)
        began = time.monotonic()

        def refused():
            """Who comes in the very moment of the stop may still be answered as ever."""
            reply = admin.call(url, "/beat")
            return reply["code"] == 500 and reply["msg"]

        assert wait_until(refused, 10, "the refusal") == "the executor is stopping"
        print(f"refused after {time.monotonic() - began:.2f} s")
        go.touch()
        assert daemon.wait() == 0
        assert admin.results[log_id][0]["handleMsg"] == "done"
