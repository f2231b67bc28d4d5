"""What a second reading of the callbacks, the registration and the daemon found: defects that no
other test would see come back."""

import contextlib
import json
import select
import signal
import socket
import subprocess

import pytest
from conftest import LAUNCH, launch, wait_until
from tools import Proxy, items_of

REFUSAL = json.dumps({"code": 500, "msg": "no such log"}).encode()
CONFIG = "executor: {bind: '127.0.0.1:0', data_dir: ./data, drain_timeout: 5s}\n"


def gate(directory):
    """(shell, open): a job that runs until `open()`."""
    file = directory / "gate"
    return f"until [ -e '{file}' ]; do sleep 0.05; done", file.touch


def begin_to_stop(daemon):
    """SIGTERM; returns once the registration is taken back, the only request of a stop that has no
    result to deliver."""
    daemon.signal(signal.SIGTERM)
    wait_until(
        lambda: "took back the registration" in daemon.log, 20, "the end of the registration"
    )


def reload(daemon, told="reloaded"):
    """SIGHUP; returns what was logged until `told`."""
    before = len(daemon.log)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: told in daemon.log[before:], 20, told)
    return daemon.log[before:]


# -- the address that is registered


@pytest.fixture
def ipv6():
    """A socket that listens on ::1."""
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("needs IPv6")
    with listener:
        yield listener


EVERYWHERE = {"bind": "0.0.0.0:0", "allow_no_token": True}


def test_no_address_of_ipv6_is_registered_of_what_listens_on_ipv4(executor, ipv6):
    """Nobody would be reached there: the log says what to do instead."""
    addresses = [f"http://[::1]:{ipv6.getsockname()[1]}"]
    daemon = executor(executor=EVERYWHERE, admin_options={"addresses": addresses})
    wait_until(lambda: "executor.address can say where" in daemon.log, 10, "a word of it")
    assert not select.select([ipv6], [], [], 0)[0], "the admin was asked"


def test_the_admin_that_has_an_address_of_ipv4_tells_it(executor, admin, ipv6):
    """As a name does that stands for an address of each kind, whichever comes first."""
    addresses = ["http://[::1]:1", admin.url]
    daemon = executor(executor=EVERYWHERE, admin_options={"addresses": addresses})
    assert admin.wait(lambda: admin.registry, 10)
    assert admin.registry == [f"http://127.0.0.1:{daemon.port}/"]


# -- proxies


def test_an_http_proxy_that_drips_is_given_up(executor, admin):
    """An exchange ends after admin.timeout, also where each byte comes in time."""
    with Proxy(admin, lambda number: "drip") as proxy:
        daemon = executor(
            admin_options={
                "addresses": ["http://10.99.99.1:8080"],
                "timeout": "1s",
                "connect_timeout": "1s",
            },
            env={
                **dict.fromkeys(("http_proxy", "HTTP_PROXY"), f"http://127.0.0.1:{proxy.port}"),
                **dict.fromkeys(("no_proxy", "NO_PROXY"), ""),
            },
        )
        wait_until(lambda: "cannot register at the admin" in daemon.log, 10, "the end of it")
        proxy.plan = lambda number: "pass"
        wait_until(lambda: "registered" in daemon.log, 20, "a registration")


# -- results while the executor stops


def test_a_stop_delivers_although_the_first_attempt_is_reset(executor, admin, tmp_path):
    """As by what has forgotten an idle connection to the admin."""
    shell, open_gate = gate(tmp_path)
    with Proxy(admin) as proxy:
        daemon = executor(
            {"a": {"shell": shell}},
            admin_options={"addresses": [proxy.url]},
            executor={"drain_timeout": "60s"},
        )
        wait_until(lambda: "registered" in daemon.log, 10, "a registration")
        log_id, _ = admin.trigger(daemon.url, "a")
        begin_to_stop(daemon)
        first = proxy.requests
        proxy.plan = lambda number: "reset" if number == first else "pass"
        open_gate()
        assert daemon.wait() == 0
        assert proxy.requests > first and log_id in admin.results


def test_a_stop_delivers_although_a_backoff_runs(executor, admin):
    """The admin may be back: a stop asks once more instead of giving up."""
    with Proxy(admin) as proxy:
        daemon = executor({"a": {"shell": "true"}}, admin_options={"addresses": [proxy.url]})
        wait_until(lambda: "registered" in daemon.log, 10, "a registration")
        proxy.plan = lambda number: "reset"
        log_id, _ = admin.trigger(daemon.url, "a")
        wait_until(
            lambda: "cannot deliver 1 result, next attempt in" in daemon.log, 10, "a backoff"
        )
        proxy.plan = lambda number: "pass"
        assert daemon.stop() == 0
        assert log_id in admin.results


def test_a_stop_delivers_what_is_good_in_a_batch_that_is_refused(executor, admin, tmp_path):
    """It is split until what is bad is alone, however many requests that takes."""
    shell, open_gate = gate(tmp_path)
    daemon = executor({"a": {"shell": shell}}, admin=admin, executor={"drain_timeout": "60s"})
    wait_until(lambda: "registered" in daemon.log, 10, "a registration")
    log_ids = [admin.trigger(daemon.url, "a", jobId=number)[0] for number in range(1, 25)]
    good, bad = log_ids[:16], set(log_ids[16:])

    def behave(path, body):
        refused = path.endswith("callback") and bad & {item["logId"] for item in items_of(body)}
        return (200, REFUSAL) if refused else None

    admin.behave = behave
    begin_to_stop(daemon)
    open_gate()
    assert daemon.wait() == 0
    assert sorted(admin.results) == good


def test_a_second_signal_ends_a_stop_while_the_admin_hangs(executor, admin, tmp_path):
    """Whoever cannot wait for its answer need not send SIGKILL."""
    shell, open_gate = gate(tmp_path)
    with Proxy(admin) as proxy:
        daemon = executor(
            {"a": {"shell": shell}},
            admin_options={"addresses": [proxy.url], "timeout": "600s"},
            executor={"drain_timeout": "600s"},
            program=LAUNCH,
            env=launch(DELIVER_LIMIT=600.0),
        )
        wait_until(lambda: "registered" in daemon.log, 10, "a registration")
        admin.trigger(daemon.url, "a")
        begin_to_stop(daemon)
        hung = proxy.requests
        proxy.plan = lambda number: "hang"
        open_gate()
        wait_until(lambda: proxy.requests > hung, 10, "the callback")
        for _ in range(2):  # one that comes while the last run is still ended is for the runs
            daemon.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        status = daemon.process.poll()
        if status is None:
            daemon.kill()
    assert status == 0
