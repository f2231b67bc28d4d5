"""Good and broken files are reloaded under a flood of triggers (row 28)."""

import collections
import contextlib
import os
import signal
import threading
import time

import yaml
from client import clients, quantiles
from conftest import wait_until
from flood import REFUSALS, flood, reason
from tools import Ledger, forget_peak, rounds, rss

MIB = 1 << 20


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
