"""Requests that nobody should send: the daemon answers each, and lives (row 25)."""

import collections

from client import Pulse, clients, quantiles
from fuzzer import HANDLERS, fuzz
from tools import Ledger, forget_peak, rounds, rss, stderr_lines

import xxl_executor

MIB = 1 << 20


def test_fuzzed_requests(executor, admin, tmp_path):
    """Whatever bytes come, the daemon lives, answers every request, keeps its memory, and beats
    take at most 100 ms."""
    count, seed = rounds(50_000, "XXL_FAULT_REQUESTS"), rounds(25, "XXL_FAULT_SEED")
    ledger = Ledger(admin, tmp_path)
    jobs = {
        "noop": ledger.python_job(tmp_path, "noop", "pass", isolation="thread"),
        "job": ledger.job(),
    }
    daemon = executor(jobs, admin=admin)
    for handler in HANDLERS:  # what is made once is not the fuzzer's
        ledger.trigger(daemon, handler)
    ledger.settle(daemon)
    pid = daemon.process.pid
    before = rss(pid)
    forget_peak(pid)
    first = max(ledger.accepted) + 1_000_000
    calls = [
        (
            fuzz,
            {
                "port": daemon.port,
                "seed": seed + i,
                "first": first + i * 10 * count,
                "count": count // 2,
            },
        )
        for i in range(2)
    ]
    with Pulse(daemon.port) as pulse, clients(tmp_path, *calls) as found:
        pass
    grown = rss(pid, "VmHWM") - before
    p50, p99, most = quantiles(pulse.times)
    answered, framed = (
        sum(one["answered"] for one in found),
        sum(one["well_framed"] for one in found),
    )
    ledger.accepted |= {log_id for one in found for log_id in one["accepted"]}
    statuses = sum((collections.Counter(one["statuses"]) for one in found), collections.Counter())
    print(
        f"{count} requests, {count / max(one['seconds'] for one in found):.0f}/s, {answered} of"
        f" {framed} answered, {count - framed} broken, {sum(one['connections'] for one in found)}"
        f" connections, {dict(statuses)}, {len(ledger.accepted)} accepted; memory"
        f" +{grown / MIB:.1f} MiB; {len(pulse.times)} beats, ms: p50 {p50}, p99 {p99}, max {most}"
    )
    assert not [problem for one in found for problem in one["problems"]]
    assert answered == framed
    assert daemon.process.poll() is None
    assert not stderr_lines(daemon, "unexpected error|unexpectedly|Traceback|please report")
    assert pulse.error is None, pulse.error
    assert p99 <= 100, (p50, p99, most)
    assert grown <= 32 * MIB, f"{grown / MIB:.1f} MiB"
    # It is a fuzzer only if it comes everywhere.
    assert {"200", "400", "404", "405", "411", "413", "417", "431", "505"} <= set(statuses), (
        statuses
    )
    assert len(ledger.accepted) >= min(10, count // 1000)
    ledger.settle(daemon, 60)
    assert set(ledger.started()) <= ledger.accepted and set(admin.results) <= ledger.accepted


def test_long_texts_in_every_field(executor, admin, tmp_path):
    """A text as long as a body may be costs little beyond that: in memory, in the answer and in the
    daemon's log."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    ledger.trigger(daemon)
    ledger.settle(daemon)
    pid, size = daemon.process.pid, xxl_executor.BODY_LIMIT - 1000
    for text in ("x" * size, "job " * (size // 4)):
        for field in (
            "executorHandler",
            "glueType",
            "jobId",
            "logId",
            "executorTimeout",
            "logDateTime",
        ):
            fields = {"jobId": 1, "logId": 1, "executorHandler": "ghost", field: text}
            before, logged = rss(pid), daemon.stderr.stat().st_size
            forget_peak(pid)
            answer = daemon.post("/run", fields)
            grown, told = rss(pid, "VmHWM") - before, daemon.stderr.stat().st_size - logged
            assert answer["code"] == 500, field
            assert (len(answer["msg"]) < 1000, told < 10_000, grown <= 32 * MIB) == (
                True,
                True,
                True,
            ), (
                f"{field}: answer of {len(answer['msg'])}, {told} bytes logged,"
                f" +{grown / MIB:.1f} MiB"
            )
    ledger.settle(daemon)
