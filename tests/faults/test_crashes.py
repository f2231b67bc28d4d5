"""The daemon dies by SIGKILL at each moment of a run and starts again on the same data
directory."""

import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import sqlite3
import threading
import time

import pytest
from conftest import alive, wait_until
from tools import Ledger, rounds, run_processes, stderr_lines

from xxl_executor import MAX_STARTS, Journal, Trigger

FAILPOINT = "XXL_EXECUTOR_FAILPOINT"
UNKNOWN = "executor restarted while the job ran, its outcome is unknown"
RERUN = "executor restarted while the job ran; it is run again"


def crash_at(daemon, point):
    """Start (again) so that the daemon dies at the n-th passage of `name:n`."""
    daemon.env[FAILPOINT] = point
    return daemon.start()


def died(daemon):
    """Wait until the daemon has died by SIGKILL."""
    assert daemon.wait(10) == -signal.SIGKILL, daemon.log


def start(daemon):
    daemon.env.pop(FAILPOINT, None)
    return daemon.start()


def family_of(daemon, count):
    """The pids of all processes of runs, when there are `count`."""

    def found():
        pids = set(run_processes(daemon))
        return len(pids) == count and pids

    return wait_until(found, 20, f"{count} processes of runs")


def assert_dead(pids, since):
    """Everything of a crashed daemon's runs is dead within 5 s of the restart."""
    left = max(0.0, since + 5 - time.monotonic())
    wait_until(lambda: not any(map(alive, pids)), left, f"the end of {pids} after the restart")


def edit(daemon, statement, *values):
    """Run a statement in the journal of a daemon, from outside."""
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db, db:
        return db.execute(statement, values).fetchall()


def open_gate(gate):
    """Let go the one job that waits for a writer of the FIFO `gate`, when it waits."""

    def opened():
        with contextlib.suppress(OSError):
            return open(os.open(gate, os.O_WRONLY | os.O_NONBLOCK), "w")

    wait_until(opened, 10, "a job at the gate").close()


def shell_first(ledger, first, then="echo done"):
    """A shell job that does `first` at its first start and `then` at the next."""
    return f'if [ "$(grep -cx "$XXL_JOB_LOG_ID" "$STARTS")" = 1 ]; then {first}; else {then}; fi'


def python_first(ledger, first):
    """The same as the body of a Python job: the lines of `first`, then "done"."""
    lines = "".join(f"        {line}\n" for line in first.splitlines())
    return (
        f"with open({str(ledger.starts)!r}) as stream:\n"
        f"    if stream.read().split().count(str(context.log_id)) == 1:\n{lines}return 'done'"
    )


# -- 7 to 12: one moment after the other. Each daemon recovers from one round and crashes in the
# next.


def test_after_the_accept_before_the_answer(executor, admin, tmp_path):
    """The same trigger comes again: it is answered, and the run starts once."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job("echo done")}, admin=admin, start=False)
    crash_at(daemon, "accepted:1")
    for i in range(rounds(6)):
        log_id = ledger.trigger(daemon)
        died(daemon)
        assert log_id in ledger.unanswered
        crash_at(daemon, "accepted:1")
        if (
            i % 2
        ):  # the trigger comes again when the run has ended; otherwise while it waits or runs
            ledger.result(log_id)
        assert ledger.trigger(daemon, logId=log_id) in ledger.accepted
        assert ledger.result(log_id) == (200, "done")
        ledger.settle(daemon)
        assert ledger.started().count(log_id) == 1
    assert len(ledger.started()) == len(ledger.accepted) == rounds(6)


def test_after_the_answer_before_the_start(executor, admin, tmp_path):
    """An accepted run starts once after the restart; one that was accepted more than 5 minutes ago
    is failed."""
    ledger, gate = Ledger(admin, tmp_path), tmp_path / "gate"
    os.mkfifo(gate)
    jobs = {"first": ledger.job(f"read _ < {gate}; true"), "job": ledger.job("echo done")}
    daemon = executor(jobs, admin=admin, start=False)
    crash_at(daemon, "starting:2")
    for _ in range(rounds(6)):
        first, young, old = [ledger.trigger(daemon, name) for name in ("first", "job", "job")]
        assert {first, young, old} <= ledger.accepted
        open_gate(gate)
        died(daemon)
        assert ledger.started()[-1] == first
        ((stored,),) = edit(daemon, "SELECT trigger FROM runs WHERE log_id = ?", old)
        fields = json.loads(stored)
        fields["accepted"][1] -= 400  # seconds since the host's boot
        edit(daemon, "UPDATE runs SET trigger = ? WHERE log_id = ?", json.dumps(fields), old)
        crash_at(daemon, "starting:3")  # the first passage is the resumed run's
        assert ledger.result(young) == (200, "done")
        code, message = ledger.result(old)
        assert code == 500
        assert re.fullmatch(
            r"accepted 6m [45]\ds before the executor restarted, too long ago to start now", message
        )
        # Its end may have been stored just before the crash, or not.
        assert ledger.result(first) in [(200, ""), (500, UNKNOWN)]
        ledger.settle(daemon)
        assert ledger.started().count(young) == 1 and old not in ledger.started()


def test_after_the_fork_before_anything_is_stored(executor, admin, tmp_path):
    """A child that nothing is known of is found and killed; its run is failed, or run again when
    the job wants that."""
    ledger = Ledger(admin, tmp_path)
    shell, wait = (
        shell_first(ledger, "sleep 600"),
        python_first(ledger, "subprocess.run(['sleep', '600'])"),
    )
    jobs = {
        "shell": ledger.job(shell),
        "shell again": ledger.job(shell, on_crash="rerun"),
        "python": ledger.python_job(tmp_path, "waits", wait),
        "python again": ledger.python_job(tmp_path, "again", wait, on_crash="rerun"),
    }
    daemon, again = executor(jobs, admin=admin, start=False), set()
    crash_at(daemon, "forked:1")
    for _, name in zip(range(rounds(6)), itertools.cycle(jobs)):
        log_id = ledger.trigger(daemon, name)
        died(daemon)
        # It lives on: its first process, which notes the start, and the sleep.
        wait_until(lambda: log_id in ledger.started(), 10, "the start that the child notes")
        pids = family_of(daemon, 2)
        assert "pid=" not in daemon.log_text(log_id)
        since = time.monotonic()
        crash_at(daemon, "forked:2" if jobs[name].get("on_crash") else "forked:1")
        assert_dead(pids, since)
        if jobs[name].get("on_crash"):
            again.add(log_id)
            assert ledger.result(log_id) == (200, "done")
            assert f" {RERUN} -----\n" in daemon.log_text(log_id)
        else:
            assert ledger.result(log_id) == (500, UNKNOWN)
            assert daemon.log_text(log_id).endswith(f" failed: {UNKNOWN} -----\n")
        assert ledger.started().count(log_id) == 1 + (log_id in again)
        ledger.settle(daemon, again=again)


# What a job may start: a child, one in a session of its own, one whose parent has ended, one that
# ignores SIGTERM.
TREE = 'sleep 600 & setsid sleep 600 & (setsid sleep 600 &); (trap "" TERM; exec sleep 600) & '


def test_in_the_middle_of_a_run(executor, admin, tmp_path):
    """The whole tree is dead within 5 s of the restart, the run is failed or run again, its log
    says what happened."""
    ledger = Ledger(admin, tmp_path)
    shell = shell_first(
        ledger, TREE + 'trap "" TERM; echo "one"; printf "two\\nha"; wait; sleep 600'
    )
    wait = (
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsubprocess.run({TREE!r}, shell=True)\n"
        "print('one\\ntwo\\nha', end='', flush=True)\nwhile True:\n    signal.pause()"
    )
    jobs = {
        "shell": ledger.job(shell),
        "shell again": ledger.job(shell, on_crash="rerun"),
        "python": ledger.python_job(tmp_path, "waits", python_first(ledger, wait)),
        "python again": ledger.python_job(
            tmp_path, "again", python_first(ledger, wait), on_crash="rerun"
        ),
        "thread": ledger.python_job(
            tmp_path,
            "thread",
            "print('one\\ntwo\\nha', end='')\nthreading.Event().wait()",
            isolation="thread",
        ),
    }
    daemon, again, date = executor(jobs, admin=admin), set(), int(time.time() * 1000)
    for _ in range(rounds(6)):
        runs = {
            name: ledger.trigger(daemon, name, jobId=i, logDateTime=date)
            for i, name in enumerate(jobs)
        }
        assert set(runs.values()) <= ledger.accepted

        def printed():
            return all(
                daemon.page(log_id, date)["toLineNum"] >= 3
                and daemon.log_text(log_id).endswith("\none\ntwo\nha")
                for log_id in runs.values()
            )

        wait_until(printed, 20, "the output of every run")
        pids = family_of(daemon, 4 * 5)
        daemon.kill()
        before = {log_id: daemon.log_text(log_id) for log_id in runs.values()}
        assert all(text.endswith("\none\ntwo\nha") for text in before.values())
        since = time.monotonic()
        daemon.start()
        assert_dead(pids, since)
        for name, log_id in runs.items():
            if jobs[name].get("on_crash"):
                again.add(log_id)
                assert ledger.result(log_id) == (200, "done")
            else:
                assert ledger.result(log_id) == (500, UNKNOWN)
            assert ledger.started().count(log_id) == 1 + (log_id in again)
            note = re.escape(RERUN if log_id in again else f"failed: {UNKNOWN}")
            wait_until(lambda: daemon.page(log_id, date)["isEnd"])
            text = daemon.log_text(log_id)
            # On a line of its own, although the last one before it is not complete.
            found = re.match(
                rf"{re.escape(before[log_id])}\n----- [-\d]+ [:\d]+ {note} -----\n", text
            )
            assert found and (log_id in again) == (found.end() < len(text)), text
            page = daemon.page(log_id, date)
            assert (page["logContent"], page["toLineNum"], page["isEnd"]) == (
                text,
                text.count("\n"),
                True,
            )
        ledger.settle(daemon, again=again)


def test_after_the_exit_before_the_result_is_stored(executor, admin, tmp_path):
    """Nobody knows any more how the run ended: it is reported as a failure with unknown outcome,
    never as a success."""
    ledger = Ledger(admin, tmp_path)
    jobs = {
        "shell": ledger.job("echo done"),
        "python": ledger.python_job(tmp_path, "process", "return 'done'"),
        "thread": ledger.python_job(tmp_path, "thread", "return 'done'", isolation="thread"),
        "again": ledger.job("echo done", on_crash="rerun"),
    }
    daemon, again = executor(jobs, admin=admin, start=False), set()
    crash_at(daemon, "exited:1")
    for _, name in zip(range(rounds(6)), itertools.cycle(jobs)):
        log_id = ledger.trigger(daemon, name)
        died(daemon)
        assert ledger.started().count(log_id) == 1 and log_id not in admin.results
        assert ": code 200, done -----\n" in daemon.log_text(log_id)
        crash_at(daemon, "exited:2" if name == "again" else "exited:1")
        if name == "again":
            again.add(log_id)
        assert ledger.result(log_id) == ((200, "done") if name == "again" else (500, UNKNOWN))
        assert ledger.started().count(log_id) == 1 + (name == "again")
        ledger.settle(daemon, again=again)
    start_again_quietly(daemon, ledger, again)


def start_again_quietly(daemon, ledger, again=()):
    """A start with nothing to recover sends no result."""
    before = {log_id: list(items) for log_id, items in ledger.admin.results.items()}
    assert daemon.stop() == 0
    start(daemon)
    log_id = ledger.trigger(daemon, next(iter(daemon.status()["jobs"])))
    ledger.result(log_id)
    ledger.settle(daemon, again=again)
    assert {**ledger.admin.results, log_id: None} == {**before, log_id: None}


def test_after_a_callback_before_its_acknowledgement_is_stored(executor, admin, tmp_path):
    """The same result is sent once more, which the admin ignores, and not again."""
    ledger, twice = Ledger(admin, tmp_path), []
    daemon = executor(
        {"job": ledger.job("echo done; exit $(( $$ % 2 ))")}, admin=admin, start=False
    )
    crash_at(daemon, "sent:1")
    for _ in range(rounds(6)):
        log_id = ledger.trigger(daemon)
        died(daemon)
        assert len(admin.results[log_id]) == 1
        crash_at(daemon, "sent:2")  # the first passage is the repeated callback's
        assert admin.wait(lambda: len(admin.results[log_id]) == 2, 30)
        assert admin.results[log_id][0] == admin.results[log_id][1]
        ledger.settle(daemon)
        twice.append(log_id)
    start_again_quietly(daemon, ledger)
    assert [len(admin.results[log_id]) for log_id in twice] == [2] * len(twice)
    assert sorted(ledger.started()[: len(twice)]) == sorted(twice)


# -- 13: broken files


def replace(file, offset, data):
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def overwrite(file, offset, size):
    replace(file, offset, random.Random(offset).randbytes(size))


def size_of(file):
    return os.path.getsize(file)


def break_first_page(db, wal, offset, data):
    """SQLite takes a page from the log if it is there, as the first one is when the file has grown,
    and sees no damage."""
    replace(db, offset, data)
    log = wal.read_bytes()
    for frame in range(
        32, len(log), 24 + 4096
    ):  # each: the number of the page, five more numbers, the page
        if log[frame : frame + 4] == b"\0\0\0\1":
            os.truncate(wal, frame)
            return


def database_empty(db, wal):
    os.truncate(db, 0)


def database_half(db, wal):
    os.truncate(db, size_of(db) // 2)


def database_little_more_than_a_header(db, wal):
    os.truncate(db, 101)


def database_first_page(db, wal):
    break_first_page(db, wal, 0, random.Random(0).randbytes(4096))


def database_middle_page(db, wal):
    overwrite(db, size_of(db) // 2 // 4096 * 4096, 4096)


def database_format(db, wal):
    """SQLite: "unsupported file format"."""
    break_first_page(db, wal, 47, b"\xff")


def database_version(db, wal):
    """SQLite: "attempt to write a readonly database"."""
    break_first_page(db, wal, 18, b"\xff")


def database_schema(db, wal):
    """SQLite: "no such column: starts"."""
    break_first_page(db, wal, db.read_bytes().index(b"starts INTEGER"), b"startz")


def database_schema_text(db, wal):
    """SQLite: "malformed database schema", in a message that is no UTF-8."""
    break_first_page(db, wal, db.read_bytes().index(b"KEY, log_date_time"), b"\xff\xff")


def wal_garbage(db, wal):
    overwrite(wal, 0, size_of(wal))


def wal_truncated(db, wal):
    os.truncate(wal, size_of(wal) // 2)


def both_overwritten(db, wal):
    database_middle_page(db, wal)
    wal_garbage(db, wal)


def both_truncated(db, wal):
    database_half(db, wal)
    wal_truncated(db, wal)


@pytest.mark.parametrize(
    "damage, broken",
    [
        (database_empty, "journal"),
        (database_half, "journal"),
        (database_little_more_than_a_header, "journal"),
        (database_first_page, "journal"),
        (database_middle_page, "journal"),
        (database_format, "journal"),
        (database_version, "journal"),
        (database_schema, "journal"),
        (database_schema_text, "journal"),
        (wal_garbage, "write-ahead log"),
        (wal_truncated, ""),  # it looks as after a power cut
        (both_overwritten, "write-ahead log|journal"),
        (both_truncated, "journal"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or value.replace("|", ", ") or "unnoticed",
)
def test_a_broken_journal(executor, admin, tmp_path, damage, broken):
    """The daemon is up within 5 s, sets the broken file aside and says so once, and serves; the
    next start is quiet."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job('echo "result of $1"')}, admin=admin, start=False)
    daemon.data.mkdir()
    db, wal = daemon.data / "journal.db", daemon.data / "journal.db-wal"
    with contextlib.closing(Journal(str(db))) as journal:
        journal.learn("dialect", "wrapper")
        with contextlib.closing(sqlite3.connect(db)) as other, other:
            other.executemany(
                "INSERT INTO runs (log_id, log_date_time, state, accepted, code, message, finished)"
                " VALUES (?, 1, 'delivered', ?, 200, ?, ?)",
                (
                    (i, time.time(), f"result of {i} {'x' * 300}", time.time())
                    for i in range(1, 4001)
                ),
            )
    daemon.start()
    for i in range(3):
        assert ledger.trigger(daemon, executorParams=f"fresh-{i}") in ledger.accepted
    ledger.settle(daemon)
    daemon.kill()
    assert size_of(db) > 1_000_000 and size_of(wal) > 10_000
    damage(db, wal)
    # From here on: what a journal has lost may be started and reported again.
    admin.results.clear(), ledger.accepted.clear(), ledger.starts.unlink()
    stored = re.compile(rb"result of (?:fresh-\d|\d+ x{300})")
    kept, whole = set(stored.findall(db.read_bytes() + wal.read_bytes())), wal.read_bytes()
    said = len(daemon.log.splitlines())

    began = time.monotonic()
    daemon.start()
    took = time.monotonic() - began
    assert took <= 5
    errors = [
        line for line in daemon.log.splitlines()[said:] if " ERROR " in line or " WARNING " in line
    ]
    aside = sorted(daemon.data.glob("journal.db*broken-*"))
    assert bool(aside) == bool(broken)
    if broken:
        said_so = [
            line
            for line in errors
            if re.search(rf" ERROR .*the ({broken}) \S+ is broken.*: moved to ", line)
        ]
        assert errors == said_so and len(errors) == 1 + broken.count("|"), errors
        # Nothing of it is lost: it is in the files set aside, or still in use. SQLite itself may
        # move what a log holds.
        assert kept <= set(stored.findall(b"".join(file.read_bytes() for file in [*aside, db])))
        assert "write-ahead log" not in broken or whole in [file.read_bytes() for file in aside]
    else:  # a run whose end is lost is failed
        assert not [line for line in errors if "WARNING failed job" not in line]
    for _ in range(3):
        log_id = ledger.trigger(daemon, executorParams="now")
        assert log_id in ledger.accepted and ledger.result(log_id) == (200, "result of now")
    ledger.settle(daemon)

    said = len(daemon.log.splitlines())
    daemon.kill()
    daemon.start()
    assert ledger.trigger(daemon, executorParams="now") in ledger.accepted
    ledger.settle(daemon)
    assert not [
        line for line in daemon.log.splitlines()[said:] if " ERROR " in line or " WARNING " in line
    ]
    assert sorted(daemon.data.glob("journal.db*broken-*")) == aside
    if "journal" not in broken:
        assert edit(daemon, "SELECT count(*) FROM runs WHERE log_id <= 4000") == [(4000,)]


def stored_before_a_crash(daemon, ledger, log_ids):
    """Have the journal of a daemon that has not started yet hold these accepted runs."""
    daemon.data.mkdir()
    with contextlib.closing(Journal(str(daemon.data / "journal.db"))) as journal:
        journal.begin()
        for log_id in log_ids:
            now = int(time.time() * 1000)
            assert journal.accept(Trigger(1, log_id, "job", log_date_time=now))
        journal.commit()
    ledger.accepted.update(log_ids)


@pytest.mark.parametrize("garbage", [b"????????", b"\xff" * 8], ids=["no JSON", "no UTF-8"])
def test_a_broken_row(executor, admin, tmp_path, garbage):
    """A run that cannot be read, which SQLite does not notice, is failed; those beside it run."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job("echo done")}, admin=admin, start=False)
    runs = [101, 102, 103]
    stored_before_a_crash(daemon, ledger, runs)
    db = daemon.data / "journal.db"
    replace(db, db.read_bytes().index(b'"log_id": 102'), garbage)
    daemon.start()
    assert [ledger.result(log_id)[0] for log_id in runs] == [200, 500, 200]
    assert len(stderr_lines(daemon, " WARNING failed .*logId=102 .* broken")) == 1
    ledger.settle(daemon)
    assert sorted(ledger.started()) == [101, 103]


@pytest.mark.parametrize("digit", [b"3", b"7"], ids=["of the run beside it", "of no run"])
def test_a_damaged_log_id(executor, admin, tmp_path, digit):
    """A digit of the logId in a stored trigger is another one: each run starts as the one that was
    accepted, and gets its own result."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job("echo done")}, admin=admin, start=False)
    runs = [101, 102, 103]
    stored_before_a_crash(daemon, ledger, runs)
    db = daemon.data / "journal.db"
    replace(db, db.read_bytes().index(b'"log_id": 102'), b'"log_id": 10' + digit)
    daemon.start()
    assert [ledger.result(log_id) for log_id in runs] == [(200, "done")] * 3
    ledger.settle(daemon)
    assert sorted(ledger.started()) == sorted(admin.results) == runs


# -- 14: at any moment


def free_port():
    """One that no outgoing connection takes while the daemon is down, least of all one to this very
    port."""
    ports = list(range(20000, 32000))
    random.shuffle(ports)
    for port in ports:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def test_at_random_moments_under_load(executor, admin, tmp_path):
    """Every accepted run gets one result, starts at most once and leaves nothing, and the journal
    is sound."""
    seed, seconds = int(os.environ.get("XXL_FAULT_SEED", "14")), rounds(12, "XXL_FAULT_SECONDS")
    ledger, plan, port = Ledger(admin, tmp_path), random.Random(seed), free_port()
    tree = "sleep 0.3 & (setsid sleep 0.3 &); wait; echo done"
    jobs = {
        "quick": ledger.job("echo done"),
        "slow": ledger.job(tree),
        "again": ledger.job(tree, on_crash="rerun"),
        "python": ledger.python_job(tmp_path, "process", "return 'done'"),
        "sleeps": ledger.python_job(
            tmp_path, "sleeps", "subprocess.run(['sleep', '0.2'])\nreturn 'done'"
        ),
    }
    daemon = executor(jobs, admin=admin, executor={"bind": f"127.0.0.1:{port}"})
    names, asked, failures = list(jobs) + ["quick", "python"] * 3, {}, []
    over, repeated = threading.Event(), itertools.count()

    class At:
        url = f"http://127.0.0.1:{port}"

    def call(number):
        """One run after the other, with up to 5 that wait; an unanswered trigger is sent until it
        is answered."""
        choice, own = random.Random(seed + number), []
        while not over.is_set():
            kind = choice.randrange(len(names))
            # Two jobIds of each kind, two callers of each jobId: some runs wait for others, some do
            # not.
            fields = {
                "jobId": 10 * list(jobs).index(names[kind]) + number % 2,
                "logDateTime": int(time.time() * 1000),
            }
            log_id = ledger.trigger(At, names[kind], **fields)
            while log_id not in ledger.accepted and log_id not in ledger.refused:
                next(repeated)
                over.wait(0.01)
                ledger.trigger(At, names[kind], logId=log_id, **fields)
            asked[log_id] = names[kind]
            own.append(log_id)
            # Not without end, so that triggers come also while the daemon is down.
            admin.wait(
                lambda: (
                    over.is_set() or sum(log_id not in admin.results for log_id in own[-20:]) < 5
                ),
                choice.uniform(0, 1),
            )

    def caller(number):
        try:
            call(number)
        except BaseException as error:
            failures.append(error)

    callers = [
        threading.Thread(target=caller, args=(number,), name=f"caller-{number}")
        for number in range(4)
    ]
    for thread in callers:
        thread.start()
    kills, deadline, pause = 0, time.monotonic() + seconds, threading.Event()
    try:
        while time.monotonic() < deadline:
            pause.wait(plan.uniform(0.2, 1.2))
            daemon.kill()
            kills += 1
            # One in five may die while it starts.
            daemon.start(wait=plan.random() < 0.8)
        wait_until(lambda: daemon.url or daemon.process.poll() is not None, 20, "the last start")
    finally:
        over.set()
        with admin.changed:
            admin.changed.notify_all()
        for thread in callers:
            thread.join()
    assert not failures and daemon.process.poll() is None, (failures, daemon.log[-2000:])
    assert not ledger.refused

    again = {log_id for log_id, name in asked.items() if name == "again"}
    ledger.settle(daemon, 60, again=again)
    starts = collections.Counter(ledger.started())
    results = {log_id: ledger.result(log_id) for log_id in ledger.accepted}
    assert set(results.values()) <= {(200, "done"), (500, UNKNOWN)}
    assert max(starts.values()) <= MAX_STARTS
    assert not [
        log_id for log_id, (code, _) in results.items() if code == 200 and not starts[log_id]
    ], "never started"
    assert admin.results.keys() == ledger.accepted == asked.keys() >= starts.keys()
    assert daemon.stop() == 0
    assert edit(daemon, "PRAGMA integrity_check") == [("ok",)]
    # A long version is older than the first repetition.
    sent = "state IN ('acknowledged', 'resent', 'delivered')"
    assert edit(daemon, f"SELECT count(*), min({sent}) FROM runs") == [(len(asked), 1)]
    assert not stderr_lines(daemon, " ERROR ") and not list(daemon.data.glob("journal.db*broken-*"))
    codes = collections.Counter(code for code, _ in results.values())
    rerun, twice = (
        sum(starts[log_id] > 1 for log_id in again),
        sum(len(items) > 1 for items in admin.results.values()),
    )
    print(
        f"{seconds} s, seed {seed}: {kills} kills, {next(repeated)} triggers repeated,"
        f" {len(results)} accepted, {codes[200]} succeeded, {codes[500]} failed as unknown, {rerun}"
        f" of {len(again)} run again, {twice} results sent twice"
    )
    assert kills > 3 and codes[200] > kills
