"""The network to the admin fails: refused, hanging, reset, nonsense for an answer, unknown names,
one of two dead."""

import concurrent.futures
import contextlib
import itertools
import os
import re
import select
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LAUNCH, launch, wait_until
from tools import Ledger, Proxy, forget_peak, items_of, need_root, rounds, rss

import xxl_executor

FAST_CLOCK = Path(__file__).with_name("fast_clock.py")
HOURS = 6 * 3600
TIMEOUT = 1.5  # admin.timeout where it is what is tested
LATE = 1.0  # how much later than that a timer may act on a busy machine


def at(url):
    """What `executor(admin=...)` needs to know of an admin that is somewhere else or not there
    yet."""
    return SimpleNamespace(url=url, token="")


def fast(speed, **more):
    """Arguments of `executor` for a clock that runs `speed` times as fast; exchanges may take as
    long as ever."""
    return {
        "program": FAST_CLOCK,
        "env": {"FAST_CLOCK": str(speed), **more},
        "admin_options": dict.fromkeys(("timeout", "connect_timeout"), f"{int(20 * speed)}s"),
    }


def prefill(daemon, ledger, count):
    """Have `count` finished runs wait in the journal of a daemon that was not started yet; returns
    their logIds."""
    daemon.data.mkdir()
    now = int(time.time() * 1000)
    triggers = [
        xxl_executor.Trigger(1, log_id, "job", log_date_time=now) for log_id in range(1, count + 1)
    ]
    with contextlib.closing(xxl_executor.Journal(str(daemon.data / "journal.db"))) as journal:
        journal.begin()
        assert all(map(journal.accept, triggers))
        journal.commit()
        for start in range(0, count, 100):
            ended = [
                xxl_executor.Span(trigger, now / 1000, 1.0)
                for trigger in triggers[start : start + 100]
            ]
            journal.begin()
            journal.finish(ended, xxl_executor.Result(200, f"result {start}"))
            journal.commit()
        assert journal.counts()["undelivered"] == count
    ledger.accepted |= {trigger.log_id for trigger in triggers}
    return range(1, count + 1)


def metric(daemon, name):
    """The value of a counter, 0 when it was never counted."""
    text = daemon.session.get(daemon.url + "/metrics", timeout=20).text
    found = re.search(rf"^xxl_executor_{name} (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0


def answer(status, body):
    return b"HTTP/1.1 %d -\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


class Line(Proxy):
    """A proxy that keeps what it did: `seen` has (call, items, act, seconds that it was stalled) of
    each request.

    `choose(call)` names the act for a request: those of Proxy, or "silent" and "dripping", which
    keep the connection until the client leaves it; the admin never sees such a request.
    """

    def __init__(self, admin, choose=lambda call: "pass"):
        self.choose, self.seen = choose, []
        self._of_thread = threading.local()
        super().__init__(admin, self._plan)

    def _message(self, sock):  # of the client, then of the admin
        data = Proxy._message(sock)
        if data.startswith(b"POST "):
            self._of_thread.request = data
        return data

    def _exchange(self, client):
        self._of_thread.client = client
        return super()._exchange(client)

    def _plan(self, number):
        head, _, body = self._of_thread.request.partition(b"\r\n\r\n")
        call = head.split()[1].rpartition(b"/")[2].decode()
        act = self.choose(call)
        began = time.monotonic()
        if act in ("silent", "dripping"):
            self._stall(act == "dripping")
        self.seen.append(
            (call, items_of(body) if call == "callback" else [], act, time.monotonic() - began)
        )
        return "reset" if act in ("silent", "dripping") else act

    def _stall(self, drips):
        client = self._of_thread.client
        for byte in itertools.cycle(answer(200, b'{"code":200}' + b" " * 60)):
            if select.select([client], [], [], 0.7)[0] or self.closing.is_set():  # it was closed
                return
            if drips:
                client.sendall(bytes([byte]))

    def count(self, *calls, act=None):
        return sum(call in calls and act in (None, was) for call, _, was, _ in list(self.seen))


# -- refused


def gaps(times):
    return [after - before for before, after in zip(times, times[1:])]


def attempts(file, thread):
    """The daemon's own times at which `thread` tried to open a connection; see fast_clock.py."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [float(words[0]) for words in lines if words[1] == thread]


def test_attempts_at_an_address_that_refuses(executor, port, tmp_path):
    """Results and heartbeats together try an address that refuses connections at most once a
    second."""
    speed, seconds, file = 20, rounds(60, "XXL_FAULT_REFUSED"), tmp_path / "attempts"
    ledger = Ledger(None, tmp_path)
    daemon = executor(
        admin=at(f"http://127.0.0.1:{port}"),
        start=False,
        **fast(speed, FAST_CLOCK_ATTEMPTS=str(file)),
    )
    prefill(daemon, ledger, 1)
    daemon.start()
    wait_until(lambda: attempts(file, "registration"))
    first = attempts(file, "registration")[0]
    wait_until(
        lambda: attempts(file, "registration")[-1] - first >= seconds,
        seconds,
        f"{seconds} s on the fast clock",
    )
    both = sorted(attempts(file, "callback") + attempts(file, "registration"))
    print(
        f"{len(attempts(file, 'callback'))} of {len(both)} attempts were callbacks, gaps from"
        f" {min(gaps(both)):.2f} s"
    )
    assert min(gaps(both)) >= 1.0


def test_six_hours_of_refused_connections(executor, loopback, port, tmp_path):
    """After six hours of refused connections 10,000 results arrive within 60 s; meanwhile memory
    does not grow."""
    seconds, file = float(os.environ.get("XXL_FAULT_OUTAGE", 8)), tmp_path / "attempts"
    ledger = Ledger(None, tmp_path)
    daemon = executor(
        admin=at(f"http://127.0.0.1:{port}"),
        start=False,
        **fast(HOURS / seconds, FAST_CLOCK_ATTEMPTS=str(file)),
    )
    prefill(daemon, ledger, 10_000)
    daemon.start()
    wait_until(lambda: attempts(file, "registration"))
    before = rss(daemon.process.pid)
    forget_peak(daemon.process.pid)
    first = attempts(file, "registration")[0]
    wait_until(
        lambda: attempts(file, "registration")[-1] - first >= HOURS,
        2 * seconds + 60,
        "the end of six hours",
    )
    daemon.signal(signal.SIGUSR2)
    (until,) = wait_until(lambda: attempts(file, "real"))
    grown = rss(daemon.process.pid, "VmHWM") - before
    beats = [moment for moment in attempts(file, "registration") if moment <= until]

    ledger.admin = admin = loopback(port=port)
    returned = time.monotonic()
    ledger.settle(daemon, 60)
    took = time.monotonic() - returned
    grown_later = rss(daemon.process.pid, "VmHWM") - before
    print(
        f"{len(beats)} heartbeats and {len(attempts(file, 'callback'))} callbacks tried; memory"
        f" grew by {grown / 2**20:.1f} MiB, with the delivery {grown_later / 2**20:.1f} MiB;"
        f" delivered after {took:.1f} s"
    )
    assert took <= 60
    assert max(grown, grown_later) <= 20 << 20
    # A heartbeat that fails puts off the callbacks too, one that works wakes them: so heartbeats go
    # on all the time. At this speed a moment of the machine is seconds of the clock: how close
    # attempts may come is the test above.
    assert len(beats) >= 100 and max(gaps(beats)) < HOURS / 4, "the daemon did not go on trying"
    assert sorted(admin.results) == sorted(ledger.accepted)
    assert all(len(items) == 1 for items in admin.results.values())
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    assert daemon.status()["uptime"] >= HOURS


# -- hanging


@pytest.mark.parametrize("act", ["silent", "dripping"])
def test_an_admin_that_never_completes_an_answer(executor, admin, tmp_path, act):
    """Each exchange ends within admin.timeout; triggers are answered and jobs run meanwhile;
    results come later."""
    ledger = Ledger(admin, tmp_path)
    with Line(admin, lambda call: act) as line:
        daemon = executor(
            {"job": ledger.job("echo done")},
            admin=at(line.url),
            start=False,
            admin_options={"timeout": f"{TIMEOUT}s"},
        )
        prefill(daemon, ledger, 3)  # so that a callback and a heartbeat stall from the start
        daemon.start()
        slowest, triggered = 0.0, []
        for number in range(5):
            began = time.monotonic()
            triggered.append(ledger.trigger(daemon, jobId=number))
            slowest = max(slowest, time.monotonic() - began)
        wait_until(lambda: sorted(ledger.started()) == triggered, what="the start of the jobs")
        wait_until(
            lambda: line.count("callback") and line.count("registry"),
            30,
            "the end of the stalled exchanges",
        )
        wait_until(lambda: daemon.status()["undelivered"] == 8, what="the end of the jobs")
        assert len(ledger.accepted) == 8 and not admin.requests
        line.choose = lambda call: "pass"
        ledger.settle(daemon)
        assert admin.wait(lambda: admin.registry, 30)
        longest = max(seconds for _, _, was, seconds in line.seen if was == act)
        print(
            f"exchanges open for {longest:.2f} s at most, triggers answered within {slowest:.3f} s"
        )
        assert TIMEOUT - 0.5 < longest <= TIMEOUT + LATE
        assert slowest <= 1
        wait_until(lambda: daemon.status()["undelivered"] == 0)


# -- resets

RESETS = ("reset", "lost", "reset-in", "reset-after")


def test_resets_at_every_moment_of_an_exchange(executor, admin, tmp_path):
    """A result stays until an unambiguous acknowledgement, through any resets; its duplicates are
    identical."""
    wanted, ledger = rounds(300, "XXL_FAULT_RESETS"), Ledger(admin, tmp_path)
    acts = itertools.cycle(
        [
            "reset",
            "lost",
            "pass",
            "reset-in",
            "reset-after",
            "pass",
            "reset",
            "pass",
            "lost",
            "pass",
            "reset-in",
        ]
    )
    lock = threading.Lock()

    def choose(call):
        with lock:
            return next(acts)

    with Line(admin, choose) as line:
        daemon = executor({"job": ledger.job("echo done")}, admin=at(line.url), **fast(100))
        began = time.monotonic()
        while sum(act in RESETS for _, _, act, _ in list(line.seen)) < wanted:
            before = line.count("callback")
            ledger.trigger(daemon)
            wait_until(lambda: line.count("callback") > before, 30, "the next attempt to deliver")
        took = time.monotonic() - began
        line.choose = lambda call: "pass"
        ledger.settle(daemon)
        wait_until(lambda: daemon.status()["undelivered"] == 0)
    met = {log_id: [] for log_id in ledger.accepted}
    payloads = {}
    for _call, items, act, _ in line.seen:
        for item in items:
            met[item["logId"]].append(act)
            assert item == payloads.setdefault(item["logId"], item)
    for log_id, acts in met.items():
        assert {"pass", "reset-after"} & set(acts), (
            f"{log_id} was forgotten without an acknowledgement: {acts}"
        )
        # On this clock it is soon sent twice more, for the admin may have lost it.
        assert acts.count("pass") <= 3, (
            f"{log_id} was sent again after its acknowledgements: {acts}"
        )
    counts = {act: line.count("callback", act=act) for act in RESETS}
    duplicates = sum(len(items) > 1 for items in admin.results.values())
    print(
        f"{wanted} resets in {took:.1f} s, of callbacks {counts}; {len(met)} runs, {duplicates}"
        f" delivered more than once, at most {max(map(len, met.values()))} attempts for one"
    )
    assert min(counts.values()) >= wanted // 20 and duplicates


# -- answers that are no acknowledgement

BAD_ANSWERS = {
    "HTTP 500": (500, b'{"code":200}'),
    "HTTP 502": (502, b"<html>Bad Gateway</html>"),
    "HTTP 503": (503, b""),
    "HTML": (200, b"<!DOCTYPE html><title>login</title>"),
    "half a JSON": (200, b'{"code":200'),
    "code 500": (200, b'{"code":500,"msg":"no"}'),
    "10 MB": (200, b'{"code":200,"msg":"' + b"x" * 10_000_000 + b'"}'),
}
bad_answers = pytest.mark.parametrize("bad", BAD_ANSWERS.values(), ids=BAD_ANSWERS)


@bad_answers
def test_an_answer_that_is_no_acknowledgement(executor, admin, tmp_path, bad):
    """The result stays undelivered, little of the answer is read, and the result arrives when the
    admin is well."""
    ledger = Ledger(admin, tmp_path)
    with Line(admin, lambda call: answer(*bad)) as line:
        daemon = executor({"job": ledger.job("echo done")}, admin=at(line.url), **fast(10))
        log_id = ledger.trigger(daemon)
        wait_until(lambda: line.count("callback") >= 3, 30, "attempts to deliver")
        assert not admin.requests and daemon.status()["undelivered"] == 1
        line.choose = lambda call: "pass"
        assert ledger.result(log_id) == (200, "done")
        ledger.settle(daemon)
        wait_until(lambda: daemon.status()["undelivered"] == 0)
        exchanges = sum(act != "pass" for _, _, act, _ in line.seen)
        print(f"{exchanges} bad answers, {line.sent // exchanges} bytes of each taken on average")
        # The line waits 20 ms after each 8 KiB: more goes out only while the daemon does not come
        # to close it.
        assert line.sent <= exchanges * (xxl_executor.REPLY_LIMIT + (1 << 20))


@bad_answers
def test_a_poisonous_result(executor, admin, tmp_path, bad):
    """A result that has every batch with it answered so holds back the others for no more than one
    backoff."""
    ledger, alone = Ledger(admin, tmp_path), []
    daemon = executor({"job": ledger.job("echo done")}, admin=admin, start=False, **fast(4))
    others, poison = {*prefill(daemon, ledger, 60)} - {30}, 30

    def behave(path, body):
        found = [item["logId"] for item in items_of(body)] if path.endswith("/callback") else []
        if found == [poison]:
            alone.append(len(others - set(admin.results)))
        return bad if poison in found else None

    admin.behave = behave
    daemon.start()
    assert admin.wait(lambda: alone and others <= set(admin.results), 30)
    # It was alone once, in both dialects, and perhaps after one backoff, before the last of the
    # others was there.
    assert sum(missing > 0 for missing in alone) <= 4
    print(
        f"alone {len(alone)} times, {sum(missing > 0 for missing in alone)} of them before the last"
        " of the others"
    )
    later = ledger.trigger(daemon)
    assert ledger.result(later) == (200, "done")
    wait_until(lambda: daemon.status()["undelivered"] == 1)
    assert poison not in admin.results
    admin.behave = lambda path, body: None
    ledger.settle(daemon)
    assert all(len(items) == 1 for items in admin.results.values())


# -- names


class Resolver:
    """A name server on an address of its own that answers "no such name", or nothing at all."""

    def __init__(self, address, answers):
        self.questions, self._answers = 0, answers
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 53))
        self._over, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="resolver")
        self._thread.start()

    def _serve(self):
        while self._over not in select.select([self._socket, self._over], [], [])[0]:
            question, client = self._socket.recvfrom(4096)
            self.questions += 1
            if self._answers:  # RFC 1035, 4.1.1: the same id and question, an answer, RCODE 3
                self._socket.sendto(
                    question[:2] + b"\x81\x83" + question[4:6] + bytes(6) + question[12:], client
                )

    def close(self):
        self._end.close()
        self._thread.join()
        self._over.close()
        self._socket.close()


@pytest.mark.parametrize("answers", [True, False], ids=["no such name", "resolver hangs"])
def test_one_of_two_admins_has_a_name_that_is_not_resolved(executor, admin, tmp_path, answers):
    """The heartbeats to the other slip by less than 5 s, results reach it, the daemon stops without
    the resolver."""
    need_root()
    ledger, beats, interval = Ledger(admin, tmp_path), [], 1.5

    def behave(path, body):
        if path.endswith("/registry"):
            beats.append(time.monotonic())

    admin.behave = behave
    address = (  # of this test run: resolv.conf knows no ports
        f"127.53.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
    )
    (tmp_path / "resolv.conf").write_text(f"nameserver {address}\noptions timeout:30 attempts:1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    mounts = "".join(
        f"mount --bind {tmp_path / name} /etc/{name} && "
        for name in ("resolv.conf", "nsswitch.conf")
        if os.path.exists(f"/etc/{name}")
    )
    with contextlib.closing(Resolver(address, answers)) as resolver:
        began = time.monotonic()
        daemon = executor(
            {"job": ledger.job("echo done")},
            program=LAUNCH,
            env=launch(REGISTRY_INTERVAL=interval),
            admin_options={"addresses": ["http://admin.example:8080", admin.url]},
            prefix=["unshare", "-m", "sh", "-c", mounts + 'exec "$@"', "sh"],
        )
        ledger.trigger(daemon)
        ledger.settle(daemon)
        count = rounds(3, "XXL_FAULT_HEARTBEATS")
        assert admin.wait(lambda: len(beats) >= count, count * (interval + 5))
        first, *_ = daemon.status()["admins"]
        reason = "Name or service not known" if answers else "was not resolved within 3 s"
        assert reason in first["error"] and not first["ok"] and resolver.questions
        began_stop = time.monotonic()
        assert daemon.stop() == 0
        stopped = time.monotonic() - began_stop
        slips = [gap - interval for gap in gaps([began, *beats])[1:]]
        print(
            f"first heartbeat after {beats[0] - began:.1f} s, slips"
            f" {', '.join(f'{slip:.1f}' for slip in slips)} s, {resolver.questions} questions,"
            f" stopped in {stopped:.1f} s"
        )
        assert beats[0] - began < 5 + 5  # the start of the daemon is in it
        assert max(slips) < 5
        assert stopped < 15, "the resolver hangs for 30 s"


# -- one of two admins dies


def cut(path, body):
    """What happens to the open connections of an admin that died."""
    raise ConnectionResetError


def test_one_of_two_admins_dies_under_load(executor, loopback, tmp_path):
    """The second gets heartbeats and results at the next attempt; the first gets them again when it
    is back."""
    one, two = loopback(), loopback()
    two.results, two.changed = one.results, one.changed  # one cluster over one database
    ledger = Ledger(one, tmp_path)
    daemon = executor(
        {"job": ledger.job("echo done")},
        program=LAUNCH,
        env=launch(REGISTRY_INTERVAL=1.0),
        admin_options={"addresses": [one.url, two.url]},
    )

    def calls(admin, name):
        return sum(path.endswith(f"/{name}") for path, _, _ in list(admin.requests))

    over = threading.Event()

    def load():
        while not over.is_set():
            wait_until(lambda: len(ledger.accepted) - len(one.results) < 10, 30, "results")
            ledger.trigger(daemon, jobId=len(ledger.accepted) % 4)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load)
        try:
            assert one.wait(lambda: len(one.results) >= 10 and one.registry, 30)
            assert not two.requests
            one.behave = cut
            one.close()
            died = time.monotonic()
            assert two.wait(lambda: calls(two, "callback"), 30)
            results = time.monotonic() - died
            assert two.wait(lambda: calls(two, "registry"), 30)
            beats = time.monotonic() - died
            assert two.wait(lambda: calls(two, "callback") >= 10, 30), "the load goes on"
            # Where the first failed the second was asked at once: no attempt failed as a whole.
            assert (
                metric(daemon, "callback_failures_total")
                == metric(daemon, "registration_failures_total")
                == 0
            )
            assert [entry["ok"] for entry in daemon.status()["admins"]] == [False, True]
            again = loopback(port=int(one.url.rpartition(":")[2]))
            again.results, again.changed = one.results, one.changed
            returned = time.monotonic()
            assert again.wait(lambda: calls(again, "callback") and calls(again, "registry"), 60)
            back = time.monotonic() - returned
            wait_until(lambda: [entry["ok"] for entry in daemon.status()["admins"]] == [True, True])
        finally:
            over.set()
        loading.result()
    ledger.settle(daemon)
    print(
        f"{len(ledger.accepted)} runs; the second got results after {results:.2f} s, a heartbeat"
        f" after {beats:.2f} s, the first was asked again {back:.1f} s after its return"
    )
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    assert calls(again, "registry")
