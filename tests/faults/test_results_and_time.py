"""Results that are refused, a clock that jumps, a long draining, runs at the edge of their end."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import test_host
import yaml
from conftest import LAUNCH, alive, launch, result_of, wait_until
from test_host import DAY, NAMESPACE, Clock, need
from tools import Ledger, items_of, rss

namespace = test_host.namespace  # the fixture
QUICK = {"python": "platform:machine", "isolation": "thread"}
DONE = {"shell": "echo done"}
UNAVAILABLE = 503, b""


def waits(go):
    """A shell command that stays until the file `go` exists."""
    return f"until [ -e {go} ]; do sleep 0.02; done; echo done"


def constants(**values):
    """Arguments of `executor` for other values of constants of the module."""
    return {"program": LAUNCH, "env": launch(**values)}


def trigger(daemon, log_ids, token=""):
    """Trigger runs over the connection that stays; twenty jobIds share them."""
    headers = {"XXL-JOB-ACCESS-TOKEN": token} if token else {}
    for log_id in log_ids:
        fields = {"jobId": log_id % 20, "logId": log_id, "executorHandler": "job"}
        reply = daemon.post("/trigger", fields, **headers)
        assert reply["code"] == 200, reply


def undelivered(daemon, count, token=""):
    """Wait until so many results wait for the admin."""
    headers = {"XXL-JOB-ACCESS-TOKEN": token} if token else {}
    wait_until(
        lambda: daemon.status(**headers)["undelivered"] == count, 20, f"{count} undelivered results"
    )


def code_and_message(admin, log_id):
    item = result_of(admin, log_id)
    return item["handleCode"], item["handleMsg"]


def store_results(daemon, log_ids, message):
    """Have results wait for the admin in the journal of a daemon that does not run."""
    now = time.time()
    kept = {"handler": "job", "glue_type": "BEAN", "shard_index": 0, "shard_total": 1}
    kept.update(began=now, took=1.0, ended=now)
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db, db:
        (clock,) = db.execute("SELECT value FROM facts WHERE name = 'clock'").fetchone()
        rows = [
            (log_id, int(now * 1000), "finished", float(clock), json.dumps(kept), 200, message, at)
            for log_id, at in ((log_id, float(clock) + log_id * 1e-6) for log_id in log_ids)
        ]
        db.executemany(
            "INSERT INTO runs (log_id, log_date_time, state, accepted, trigger, code, message,"
            " finished) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )


def edit(daemon, statement, *values):
    """Run a statement in the file of the daemon's journal, from outside."""
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db", 20)) as db, db:
        db.execute(statement, values)


def rewrite(daemon, change):
    """Have `change` alter the configuration in the daemon's file."""
    config = yaml.safe_load(daemon.file.read_text(encoding="utf-8"))
    change(config)
    daemon.write(config)


# -- what the admin refuses


def left_behind(executor, port, *groups, **options):
    """A daemon that was killed while results of these runs, the oldest first, waited for an admin
    that is not there yet."""
    addresses, count = [f"http://127.0.0.1:{port}"], 0
    daemon = executor({"job": QUICK}, admin_options={"addresses": addresses}, **options)
    for log_ids in groups:
        trigger(daemon, log_ids)
        count += len(log_ids)
        undelivered(daemon, count)
    daemon.kill()
    return daemon


def refuse(admin, poison):
    """Have `admin` refuse callbacks with one of `poison`; returns the logIds of all callbacks."""
    came = []

    def behave(path, body):
        if path.endswith("/callback"):
            came.append({item["logId"] for item in items_of(body)})
            if came[-1] & poison:
                return 200, b'{"code":500,"msg":"no"}'
        return None

    admin.behave = behave
    return came


@pytest.mark.parametrize("bad", [3, 5, 20])
def test_refused_results_do_not_hold_back_the_others(executor, loopback, port, bad):
    """Only what the admin refuses waits: bad results must not cost the good ones their time."""
    poison, others = set(range(1, bad + 1)), set(range(bad + 1, 201))
    daemon = left_behind(executor, port, poison, others)
    admin = loopback(port=port)
    came = refuse(admin, poison)
    daemon.start()
    assert admin.wait(lambda: others <= set(admin.results), 10), (
        f"{len(others - set(admin.results))} good results held back by {bad} bad ones"
    )
    before = len(came)
    for log_id in (201, 202):
        trigger(daemon, [log_id])
        assert result_of(admin, log_id, 5)["handleCode"] == 200
    undelivered(daemon, bad)
    assert admin.wait(lambda: any(ids & poison for ids in came[before:]), 30), (
        "what was refused is tried again"
    )
    assert not poison & set(admin.results)


def test_many_refused_results_do_not_hold_back_what_ends_meanwhile(executor, loopback, port):
    """With 150 results waiting that the admin never takes, the result of a run that ends meanwhile
    goes between the requests for those, not behind them; and those are tried again all the same."""
    poison, good = set(range(1, 151)), range(201, 206)
    daemon = left_behind(executor, port, poison, **constants(REFUSED_PACE=0.05))
    admin = loopback(port=port)
    came = refuse(admin, poison)
    daemon.start()
    wait_until(lambda: len(came) >= 2, 20, "the first refusals")
    for log_id in good:
        trigger(daemon, [log_id])
        before = len(came)
        assert result_of(admin, log_id, 60)["handleCode"] == 200
        sent = came[before:]
        taken = next((i for i, ids in enumerate(sent) if log_id in ids and not ids & poison), 0)
        assert taken <= 40, f"{taken} requests with what is refused came before run {log_id}"
    seen = len(came)

    def again():
        return {log_id for ids in came[seen:] if len(ids) == 1 for log_id in ids}

    wait_until(lambda: poison <= again(), 60, "one more attempt of each that was refused")
    assert sorted(admin.results) == list(good)
    undelivered(daemon, 150)


def test_an_admin_that_refuses_everything_for_a_while(executor, loopback):
    """While the token is wrong requests are few; once it is right, every result arrives soon."""
    admin, token = loopback(token="another"), "one"
    daemon = executor(
        {"job": QUICK},
        admin_options={"addresses": [admin.url], "access_token": token},
        **constants(REGISTRY_INTERVAL=1.0),
    )
    began, before = time.monotonic(), len(admin.requests)
    trigger(daemon, range(1, 121), token=token)
    undelivered(daemon, 120, token)
    threading.Event().wait(2.0)
    assert not admin.results and not admin.registry
    requests, seconds = len(admin.requests) - before, time.monotonic() - began
    assert 2 <= requests <= 100 + 40 * seconds, f"{requests} requests in {seconds:.1f} s"
    admin.token = token
    assert admin.wait(lambda: admin.registry, 10), "a heartbeat succeeds"
    assert admin.wait(lambda: len(admin.results) == 120, 10), f"{len(admin.results)} of 120"
    undelivered(daemon, 0, token)


def test_a_result_that_ends_each_connection_holds_back_no_other(executor, loopback, port):
    """Something before the admin closes the connection on each callback that holds a certain
    result, while heartbeats succeed: all others arrive, and that one is tried again and again."""
    daemon = left_behind(executor, port, range(1, 11), **constants(REGISTRY_INTERVAL=1.0))
    bad, alone = 4, []
    admin = loopback(port=port)

    def behave(path, body):
        if path.endswith("/callback"):
            log_ids = [item["logId"] for item in items_of(body)]
            if bad in log_ids:
                alone.extend([bad] * (log_ids == [bad]))
                raise ConnectionResetError

    admin.behave = behave
    daemon.start()
    others = set(range(1, 11)) - {bad}
    admin.wait(lambda: others <= set(admin.results), 60)
    assert set(admin.results) == others
    trigger(daemon, [11])
    assert code_and_message(admin, 11)[0] == 200
    before = len(alone)
    wait_until(lambda: len(alone) >= before + 2, 60, "two more attempts")
    undelivered(daemon, 1)
    admin.behave = lambda path, body: None
    assert result_of(admin, bad, 90)["handleCode"] == 200


@pytest.mark.parametrize("status", [502, 200], ids=["a proxy's 502", "code 500"])
def test_an_admin_that_refuses_everything_costs_no_memory(executor, admin, status):
    """5,000 results of 2,000 characters wait: however long they are refused, they stay on the disk;
    once the admin takes results again it gets each of them."""
    count, mib = 5000, 1 << 20
    daemon = executor({"job": DONE}, admin=admin, **constants(REGISTRY_INTERVAL=1.0))
    assert admin.wait(lambda: admin.registry, 10)
    before = rss(daemon.process.pid)
    assert daemon.stop() == 0
    store_results(daemon, range(1, count + 1), "m" * 2000)
    sent = []  # the logIds of each callback

    def behave(path, body):
        if path.endswith("/callback"):
            sent.append({item["logId"] for item in items_of(body)})
        return status, b'{"code":500,"msg":"no"}'

    admin.behave = behave
    daemon.start()
    alone = lambda: sum(len(log_ids) == 1 for log_ids in sent)  # noqa: E731
    wait_until(lambda: alone() >= 30, 60, "results that are tried alone")
    grown = rss(daemon.process.pid, "VmHWM") - before
    print(f"{len(sent)} requests, {grown / mib:.1f} MiB more")
    assert grown < 20 * mib
    assert not admin.results and daemon.status()["undelivered"] == count
    admin.behave = lambda path, body: None
    admin.wait(lambda: len(admin.results) == count, 120)
    assert len(admin.results) == count
    undelivered(daemon, 0)


# -- the wall clock


@pytest.fixture
def clock(tmp_path):
    if not sysconfig.get_config_var("HAVE_SEM_CLOCKWAIT"):
        pytest.skip("waits for locks by the wall clock: needs a CPython built with glibc 2.30")
    return Clock(tmp_path / "clock")


def jumping(clock, **values):
    """Arguments of `executor` for a daemon that lives by `clock`, with other values of constants.

    The last variable: else libfaketime has who waits for the GIL turn round all the time.
    """
    env = {**clock.env, **launch(**values), "FAKETIME_FORCE_MONOTONIC_FIX": "0"}
    return {"program": LAUNCH, "env": env}


@pytest.mark.parametrize("end", ["", "kill"], ids=["while it runs", "over a restart"])
def test_no_result_is_given_up_because_the_clock_jumps(executor, loopback, port, clock, end):
    """What has waited for seconds arrives, although the clock says that it has waited for days."""
    daemon = executor(
        {"job": DONE},
        admin_options={"addresses": [f"http://127.0.0.1:{port}"]},
        **jumping(clock, REGISTRY_INTERVAL=1.0),
    )
    trigger(daemon, range(1, 6))
    undelivered(daemon, 5)
    if end:
        getattr(daemon, end)()
    clock.jump(8 * DAY)
    if end:
        daemon.start()
    admin = loopback(port=port)
    wait_until(lambda: len(admin.results) == 5 or daemon.status()["dead"], 20, "the results")
    assert daemon.status()["dead"] == 0, "they were given up"
    assert sorted(admin.results) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "jump, end",
    [
        (25 * 3600, ""),
        (25 * 3600, "stop"),
        (25 * 3600, "kill"),
        (31 * DAY, "stop"),
        (-DAY, "kill"),
    ],
    ids=["25 h", "25 h, stop", "25 h, kill", "31 days, stop", "a day back, kill"],
)
def test_nothing_is_forgotten_because_the_clock_jumps(executor, admin, tmp_path, clock, jump, end):
    """A young run keeps its log and starts no second time, however old it seems to be."""
    ledger, date = Ledger(admin, tmp_path), int(time.time() * 1000)
    daemon = executor(
        {"job": ledger.job("echo done")}, admin=admin, **jumping(clock, HOUSEKEEPING=0.2)
    )
    first = ledger.trigger(daemon, logDateTime=date)
    assert ledger.result(first) == (200, "done")
    undelivered(daemon, 0)
    text = daemon.log_text(first)
    if end:
        getattr(daemon, end)()
    clock.jump(jump)
    if end:
        daemon.start()
    threading.Event().wait(0.6)  # some rounds of housekeeping
    page = daemon.page(first, date)
    ledger.trigger(daemon, logId=first)
    later = ledger.trigger(daemon)  # of the same job: it starts after whatever came before
    assert ledger.result(later) == (200, "done")
    assert page["logContent"] == text and page["isEnd"], "its log was pruned"
    assert not ledger.refused and ledger.started() == [first, later], "it started again"
    ledger.settle(daemon)


def test_old_results_still_die(executor, port):
    """By a clock that goes as it should, a result that no admin takes is given up in the end."""
    daemon = executor(
        {"job": DONE},
        admin_options={"addresses": [f"http://127.0.0.1:{port}"]},
        **constants(DEAD_AFTER=0.5),
    )
    trigger(daemon, [1])
    wait_until(lambda: daemon.status()["dead"] == 1, 20, "the end of the attempts")
    assert daemon.status()["undelivered"] == 0


def test_a_young_run_starts_after_a_restart_with_a_clock_that_is_ahead(
    executor, admin, tmp_path, clock
):
    """It was accepted seconds ago, not an hour: the admin waits for it."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor(
        {"slow": ledger.job("exec sleep 60"), "job": ledger.job("echo done")},
        admin=admin,
        executor={"max_running": 1},
        **jumping(clock),
    )
    slow = ledger.trigger(daemon, "slow", jobId=1)
    wait_until(lambda: slow in ledger.started(), 10, "the start of the one that takes the slot")
    young = ledger.trigger(daemon, jobId=2)
    daemon.kill()
    clock.jump(3600)
    daemon.start()
    assert ledger.result(young) == (200, "done")
    ledger.settle(daemon)
    assert ledger.started() == [slow, young]


# -- draining and the admin's watch over lost runs


class Monitor:
    """The watch of an admin over lost runs, with seconds in place of minutes.

    It fails a run that was triggered more than `age` seconds ago, has no result, and whose address
    was not registered, to the letter but under whatever key, within the last `alive` seconds. A
    result that comes after that is ignored.
    """

    def __init__(self, admin, age=0.5, alive=4.0):
        self.age, self.alive, self.lost = age, alive, set()
        self.calls = []  # (call, key, value) of each registration, ("callback", logIds)
        self._admin, self._rows, self._watched = admin, {}, {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="monitor")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _loop(self):
        while not self._over.wait(0.05):
            self.look()

    def watch(self, log_id, address):
        """A run that was just sent to `address`."""
        with self._lock:
            self._watched[log_id] = address, time.monotonic()

    def old(self, log_id):
        return time.monotonic() > self._watched[log_id][1] + self.age

    def registered(self, key=None):
        """The addresses that are registered, all or under one key."""
        self.look()
        with self._lock:
            return {row[2] for row in self._rows if key in (None, row[1])}

    def count(self, *call):
        self.look()
        return self.calls.count(call)

    def look(self):
        with self._lock:
            now = time.monotonic()
            with self._admin.changed:
                fresh = self._admin.requests[len(self.calls) :]
                results = set(self._admin.results)
            for path, _, body in fresh:
                self._take(path.rpartition("/")[2], body, now)
            for row in [row for row, at in self._rows.items() if now > at + self.alive]:
                del self._rows[row]
            addresses = {row[2] for row in self._rows}
            for log_id, (address, began) in self._watched.items():
                if log_id not in results and now > began + self.age and address not in addresses:
                    self.lost.add(log_id)

    def _take(self, call, body, now):
        if call == "callback":
            self.calls.append((call, tuple(item["logId"] for item in items_of(body))))
            return
        fields = json.loads(body)
        row = fields["registryGroup"], fields["registryKey"], fields["registryValue"]
        self.calls.append((call, *row[1:]))
        if call == "registry":
            self._rows[row] = now
        else:
            self._rows.pop(row, None)


APP, DRAINING = "my-app", "my-app/draining"
HEART = constants(REGISTRY_INTERVAL=1.0)  # as often as a heartbeat may come


def test_a_run_that_ends_while_draining_is_not_lost(executor, admin, tmp_path):
    """Its address stays registered, but not for new runs, until its result is delivered."""
    go = tmp_path / "go"
    daemon = executor(
        {"slow": {"shell": waits(go)}},
        admin=admin,
        executor={"app_name": APP, "drain_timeout": "20s"},
        **HEART,
    )
    with Monitor(admin) as monitor:
        (address,) = wait_until(lambda: monitor.registered(APP), 10, "the registration")
        log_id, reply = admin.trigger(daemon.url, "slow")
        assert reply["code"] == 200
        monitor.watch(log_id, address)
        wait_until(lambda: monitor.old(log_id), 10, "the age")
        daemon.signal(signal.SIGTERM)
        wait_until(
            lambda: monitor.lost or monitor.count("registry", DRAINING, address) >= 3,
            20,
            "heartbeats while the run goes on",
        )
        assert not monitor.lost, "the admin gave up a run that went on"
        assert monitor.registered(APP) == set() and monitor.registered(DRAINING) == {address}
        go.touch()
        assert daemon.wait() == 0
        assert monitor.registered() == set(), "nothing stays registered"
        assert not monitor.lost and code_and_message(admin, log_id) == (200, "done")
    calls = monitor.calls
    removed = calls.index(("registryRemove", APP, address))
    assert calls.index(("registry", DRAINING, address)) <= removed + 1
    assert ("registry", APP, address) not in calls[removed:], "no new runs for it"
    result = calls.index(("callback", (log_id,)))
    assert ("registryRemove", DRAINING, address) in calls[result:]
    assert ("registryRemove", DRAINING, address) not in calls[:result]


def test_a_stop_with_nothing_to_wait_for_leaves_nothing_registered(executor, admin):
    """The admin must not send runs to an executor that is gone."""
    daemon = executor({"job": DONE}, admin=admin, executor={"app_name": APP}, **HEART)
    with Monitor(admin) as monitor:
        (address,) = wait_until(lambda: monitor.registered(APP), 10, "the registration")
        log_id, _ = admin.trigger(daemon.url, "job")
        monitor.watch(log_id, address)
        assert code_and_message(admin, log_id) == (200, "done")
        assert daemon.stop() == 0
        assert monitor.registered() == set()


def test_a_run_that_goes_on_under_another_address_is_not_lost(executor, admin, tmp_path):
    """The address to which it was sent stays registered, but not for new runs, until it ends."""
    go, old, new = tmp_path / "go", "http://127.0.0.1:1/old", "http://127.0.0.1:1/new"
    daemon = executor(
        {"slow": {"shell": waits(go), "on_crash": "rerun"}},
        admin=admin,
        executor={"app_name": APP, "address": old},
        **HEART,
    )
    with Monitor(admin) as monitor:
        wait_until(lambda: monitor.registered(APP) == {old}, 10, "the registration")
        log_id, reply = admin.trigger(daemon.url, "slow")
        assert reply["code"] == 200
        monitor.watch(log_id, old)
        wait_until(lambda: daemon.status()["running"], 10, "the start of the run")
        daemon.kill()
        rewrite(daemon, lambda config: config["executor"].update(address=new))
        daemon.start()
        wait_until(
            lambda: (
                monitor.lost
                or monitor.count("registry", DRAINING, old) >= 2
                and monitor.count("registry", APP, new) >= 2
            ),
            20,
            "heartbeats while the run goes on",
        )
        assert not monitor.lost, "the admin gave up a run that went on"
        assert monitor.registered(DRAINING) == {old} and new in monitor.registered(APP)
        go.touch()
        assert code_and_message(admin, log_id) == (200, "done") and not monitor.lost
        wait_until(
            lambda: monitor.count("registryRemove", DRAINING, old), 10, "the end of the old address"
        )
        assert new in monitor.registered(APP)
        assert daemon.stop() == 0
        assert new not in monitor.registered()
    result = monitor.calls.index(("callback", (log_id,)))
    assert ("registryRemove", DRAINING, old) not in monitor.calls[:result]


@pytest.mark.parametrize("when", ["ends later", "was interrupted", "had ended"])
def test_an_address_stays_known_until_the_results_of_its_runs_are_taken(
    executor, admin, tmp_path, when
):
    """A restart under another address, while the admin takes heartbeats but no results: the address
    to which a run was sent stays registered, but not for new runs, until the result is taken."""
    go, old, new = tmp_path / "go", "http://127.0.0.1:1/old", "http://127.0.0.1:1/new"
    on_crash = "rerun" if when == "ends later" else "fail"
    daemon = executor(
        {"slow": {"shell": waits(go), "on_crash": on_crash}},
        admin=admin,
        executor={"app_name": APP, "address": old},
        **HEART,
    )
    with Monitor(admin) as monitor:
        wait_until(lambda: monitor.registered(APP) == {old}, 10, "the registration")
        admin.behave = lambda path, body: (503, b"") if path.endswith("/callback") else None
        log_id, reply = admin.trigger(daemon.url, "slow")
        assert reply["code"] == 200
        monitor.watch(log_id, old)
        wait_until(lambda: daemon.status()["running"], 10, "the start of the run")
        if when == "had ended":
            go.touch()
            undelivered(daemon, 1)
        daemon.kill()
        rewrite(daemon, lambda config: config["executor"].update(address=new))
        daemon.start()
        go.touch()
        undelivered(daemon, 1)
        beats = monitor.count("registry", APP, new)
        wait_until(
            lambda: monitor.lost or monitor.count("registry", APP, new) >= beats + 4,
            30,
            "heartbeats while the result waits",
        )
        assert not monitor.count("registryRemove", DRAINING, old), "it was taken back too early"
        assert monitor.registered(DRAINING) == {old} and not monitor.lost
        assert log_id not in admin.results
        admin.behave = lambda path, body: None
        result = result_of(admin, log_id, 30)
        assert not monitor.lost
        assert result["handleCode"] == (500 if when == "was interrupted" else 200), result
        wait_until(
            lambda: monitor.count("registryRemove", DRAINING, old), 10, "the end of the old address"
        )
        assert new in monitor.registered(APP)
    calls = monitor.calls[: monitor.calls.index(("registryRemove", DRAINING, old))]
    assert ("registry", DRAINING, old) in calls and ("callback", (log_id,)) in calls


def with_a_result_that_waits(executor, admin):
    """A daemon that was killed while a result of it waited for the admin, which does not take it."""
    daemon = executor({"job": DONE}, admin=admin, executor={"app_name": APP}, **HEART)
    assert admin.wait(lambda: admin.registry, 10)
    admin.behave = lambda path, body: UNAVAILABLE if path.endswith("/callback") else None
    trigger(daemon, [1])
    undelivered(daemon, 1)
    daemon.kill()
    return daemon


def beats(admin, address):
    """How many heartbeats of this address have come."""
    wanted = {"registryGroup": "EXECUTOR", "registryKey": APP, "registryValue": address}
    return sum(
        path.endswith("/registry") and json.loads(body) == wanted
        for path, _, body in list(admin.requests)
    )


def test_the_state_of_a_run_that_nobody_knows_ends_no_heartbeat(executor, admin):
    """A damaged page changes the state of a run of an earlier life, whose address is still to be
    known to the admin: the executor registers all the same, and goes on to."""
    daemon = with_a_result_that_waits(executor, admin)
    earlier = set(admin.registry)
    admin.behave = lambda path, body: UNAVAILABLE
    daemon.start()
    before = len(admin.requests)
    assert admin.wait(lambda: len(admin.requests) > before, 10), "no heartbeat"
    edit(daemon, "UPDATE runs SET state = 'finhshed'")
    admin.behave = lambda path, body: None
    own = daemon.url + "/"
    before = beats(admin, own)
    wait_until(lambda: beats(admin, own) >= before + 3, 20, "heartbeats")
    assert own not in earlier and own in admin.registry
    wait_until(lambda: daemon.status()["registered"], 10, "the registration")


def with_earlier_addresses(executor, admin, count):
    """(daemon, addresses): it has run at `count` other addresses before, a result waits that the
    admin does not take, and it has had two heartbeats."""
    daemon = with_a_result_that_waits(executor, admin)
    earlier = [f"http://127.0.0.1:{number}/" for number in range(1, count + 1)]
    edit(daemon, "UPDATE facts SET value = ? WHERE name = 'addresses'", json.dumps(earlier))
    daemon.start()
    wait_until(lambda: beats(admin, daemon.url + "/") >= 2, 20, "two heartbeats")
    return daemon, earlier


def test_few_earlier_addresses_are_kept(executor, admin):
    """However many lives there were while a result waits: the latest ten, for each costs a request
    with each heartbeat."""
    daemon, earlier = with_earlier_addresses(executor, admin, 40)
    assert len(admin.parked) <= 10 and set(admin.parked) <= set(earlier[-10:])
    assert earlier[-1] in admin.parked
    admin.behave = lambda path, body: None
    result_of(admin, 1)
    wait_until(lambda: not admin.parked, 20, "the end of the earlier addresses")


def test_a_stop_leaves_an_address_whose_results_wait(executor, admin):
    """Else the admin would take the run for lost before the next life delivers its result."""
    daemon, [earlier] = with_earlier_addresses(executor, admin, 1)
    assert admin.parked == [earlier]
    own = daemon.url + "/"
    assert daemon.stop() == 0
    assert earlier in admin.parked and own not in admin.registry
    admin.behave = lambda path, body: None
    daemon.start()
    result_of(admin, 1, 30)
    wait_until(lambda: earlier not in admin.parked, 20, "the end of the earlier address")


# -- a job that was removed


def test_a_repeated_trigger_of_a_removed_job(executor, admin, tmp_path):
    """What was accepted stays so, running or delivered; only a new run of the job is refused."""
    ledger, go = Ledger(admin, tmp_path), tmp_path / "go"
    daemon = executor(
        {"job": ledger.job("echo done"), "slow": ledger.job(waits(go)), "other": ledger.job()},
        admin=admin,
    )
    ended, slow = ledger.trigger(daemon, jobId=1), ledger.trigger(daemon, "slow", jobId=2)
    assert ledger.result(ended) == (200, "done")
    wait_until(lambda: slow in ledger.started(), 10, "the start of the slow run")
    rewrite(daemon, lambda config: [config["jobs"].pop(name) for name in ("job", "slow")])
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "removed job, slow" in daemon.log, 10, "the reload")
    new = [ledger.trigger(daemon, name, jobId=jobs) for jobs, name in ((1, "job"), (3, "slow"))]
    ledger.trigger(daemon, jobId=1, logId=ended)
    ledger.trigger(daemon, "slow", jobId=2, logId=slow)
    assert sorted(ledger.refused) == sorted(new), ledger.refused
    assert all("not found" in message for message in ledger.refused.values())
    other = ledger.trigger(daemon, "other", jobId=1)
    go.touch()
    assert ledger.result(slow) == (200, "done") and ledger.result(other) == (200, "")
    ledger.settle(daemon)
    assert sorted(ledger.started()) == sorted([ended, slow, other])


# -- runs at the edge of their end


def python_server(daemon):
    """The PID of the daemon's Python server."""
    place = f"/proc/{daemon.process.pid}/task"
    for task in os.listdir(place):
        with contextlib.suppress(OSError):  # a thread or a process that has just ended
            children = Path(f"{place}/{task}/children").read_text()
            for pid in map(int, children.split()):
                if b"--serve-python" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
    return 0


def test_a_daemon_that_looks_late_calls_nothing_a_timeout(executor, admin, tmp_path):
    """A run that ended before its deadline succeeded, although the daemon stood still just then."""
    ledger, go, directory = Ledger(admin, tmp_path), tmp_path / "go", tmp_path / "pids"
    directory.mkdir()
    body = (
        f"with open(os.path.join({str(directory)!r}, 'python'), 'w') as file:\n"
        "    file.write(f'{os.getpid()}\\n')\n"
        f"while not os.path.exists({str(go)!r}):\n    time.sleep(0.02)\nreturn 'done'"
    )
    jobs = {
        "shell": ledger.job(f"echo $$ > {directory}/shell; {waits(go)}", timeout="2s"),
        "python": ledger.python_job(tmp_path, "looks", body, timeout="2s"),
        "warm": ledger.python_job(tmp_path, "warm", "return 'done'"),
    }
    daemon = executor(jobs, admin=admin)
    assert ledger.result(ledger.trigger(daemon, "warm")) == (200, "done")
    server = wait_until(lambda: python_server(daemon), 10, "the Python server")
    began = time.monotonic()
    runs = {
        name: ledger.trigger(daemon, name, jobId=number)
        for number, name in enumerate(("shell", "python"), 2)
    }
    pids = [
        int(wait_until(lambda file=directory / name: file.exists() and file.read_text(), 10, name))
        for name in runs
    ]
    late = time.monotonic() + 2.3
    try:
        for pid in (daemon.process.pid, server):
            os.kill(pid, signal.SIGSTOP)
        go.touch()
        wait_until(lambda: not any(map(alive, pids)), 10, "the end of both jobs")
        if time.monotonic() > began + 1.8:
            pytest.skip("this machine is too busy: the jobs ended at their deadline")
        threading.Event().wait(late - time.monotonic())
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
        threading.Event().wait(0.2)  # as a busy machine may have it
        os.kill(server, signal.SIGCONT)
    assert {name: ledger.result(log_id) for name, log_id in runs.items()} == {
        "shell": (200, "done"),
        "python": (200, "done"),
    }
    ledger.settle(daemon)


@pytest.mark.parametrize("way", ["kill", "cover", "stop"])
def test_whoever_ends_the_leftovers_of_a_run_does_not_change_its_result(
    executor, admin, tmp_path, way
):
    """The main process ended by itself and said how; what is ended later are only its leftovers."""
    ready, noted = tmp_path / "ready", tmp_path / "noted"
    stays = f"trap 'touch {noted}' TERM; touch {ready}; while :; do sleep 0.05; done"
    script = f"({stays}) 2> /dev/null & until [ -e {ready} ]; do sleep 0.02; done; echo done"
    daemon = executor(
        {
            "job": {"shell": script, "kill_grace": "1s"},
            "next": {"shell": "echo next"},
        },
        admin=admin,
        executor={"drain_timeout": "0s"},
    )
    log_id, reply = admin.trigger(daemon.url, "job")
    assert reply["code"] == 200
    wait_until(noted.exists, 10, "the end of the leftovers, which takes them a while")
    if way == "kill":
        assert daemon.post("/kill", {"jobId": 1})["code"] == 200
    elif way == "cover":
        covers, reply = admin.trigger(daemon.url, "next", executorBlockStrategy="COVER_EARLY")
        assert reply["code"] == 200
    else:
        daemon.signal(signal.SIGTERM)
    assert code_and_message(admin, log_id) == (200, "done")
    if way == "cover":
        assert code_and_message(admin, covers) == (200, "next")
    elif way == "stop":
        assert daemon.wait() == 0


# -- a PID that is given out again while a run goes on

STRANGER = """
# In the PID namespace of the daemon: try to start the leader of a session with the PID that stdin
# names, as soon as it is free; tell which PID it got, and at the next line whether it lives.
import os, subprocess, sys, time

print("ready", flush=True)
pid = int(sys.stdin.readline())
deadline = time.monotonic() + 0.6
while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
    time.sleep(0.01)
for _ in range(20):
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(pid - 1))
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    if stranger.pid == pid:
        break
    stranger.kill()
    stranger.wait()
print(stranger.pid, flush=True)
sys.stdin.readline()
print(stranger.poll() is None, flush=True)
stranger.kill()
stranger.wait()
"""


@pytest.mark.parametrize("kind", ["shell", "python"])
def test_a_stranger_with_the_pid_of_a_main_process_that_has_ended(
    executor, admin, tmp_path, namespace, kind
):
    """While leftovers are being ended nobody gets the PID of their run, or who gets it lives on."""
    need("nsenter", "setsid")
    ready, file = tmp_path / "ready", tmp_path / "pid"
    (tmp_path / "leftover.sh").write_text(f"trap '' TERM; touch {ready}; exec sleep 60\n")
    start = f"setsid sh {tmp_path}/leftover.sh & until [ -e {ready} ]; do sleep 0.02; done"
    body = (
        f"os.system({start!r})\n"
        f"with open({str(file)!r}, 'w') as file:\n    file.write(f'{{os.getpid()}}\\n')\n"
        "return 'done'"
    )
    ledger = Ledger(admin, tmp_path)
    jobs = {
        "shell": ledger.job(f"{start}; echo $$ > {file}; echo done", kill_grace="1.5s"),
        "python": ledger.python_job(tmp_path, "leaves", body, kill_grace="1.5s"),
    }
    daemon = executor({kind: jobs[kind]}, admin=admin, prefix=NAMESPACE)
    first = namespace(daemon)
    command = ["nsenter", "--target", str(first), "--pid", "--mount", sys.executable]
    with subprocess.Popen(
        [*command, "-c", STRANGER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stranger:
        assert stranger.stdout.readline() == "ready\n"
        log_id = ledger.trigger(daemon, kind)
        pid = wait_until(lambda: file.exists() and file.read_text(), 10, "the main process")
        stranger.stdin.write(pid)
        stranger.stdin.flush()
        got = stranger.stdout.readline()
        assert ledger.result(log_id) == (200, "done")
        stranger.stdin.write("\n")
        stranger.stdin.flush()
        lives = stranger.stdout.readline()
    assert got != pid or lives == "True\n", "a process of somebody else was killed"
    ledger.settle(daemon)
    os.kill(first, signal.SIGTERM)
    assert daemon.wait(15) == 0, daemon.log


# -- a data directory that was copied


def test_the_daemon_on_a_copy_of_a_data_directory_leaves_the_jobs_of_the_original_alone(
    executor, admin, tmp_path
):
    """A copy, for a look on the same host, ends nothing of the original, coming or going."""
    ledger, go = Ledger(admin, tmp_path), tmp_path / "go"
    body = f"while not os.path.exists({str(go)!r}):\n    time.sleep(0.02)\nreturn 'done'"
    jobs = {
        "shell": ledger.job(waits(go)),
        "python": ledger.python_job(tmp_path, "waits", body),
    }
    original = executor(jobs, admin=admin)
    runs = [ledger.trigger(original, name, jobId=number) for number, name in enumerate(jobs, 1)]
    wait_until(lambda: set(runs) <= set(ledger.started()), 10, "the start of both")
    server = wait_until(lambda: python_server(original), 10, "the Python server")
    copy = executor(jobs, directory=tmp_path / "copy", start=False)
    subprocess.run(["cp", "-a", original.data, copy.data], check=True)
    copy.start()
    wait_until(lambda: "listening on" in copy.log, 10, "the daemon on the copy")
    assert copy.stop() == 0
    go.touch()
    assert [ledger.result(log_id) for log_id in runs] == [(200, "done")] * 2
    assert alive(server), "the Python server of the original"
    ledger.settle(original)
