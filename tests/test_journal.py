"""The journal: what it stores, how it commits, what it survives, and what a daemon makes of it
after a crash."""

import contextlib
import glob
import json
import os
import re
import sqlite3
import threading
import time

import pytest
from conftest import alive, result_of, run_job, wait_until

from xxl_executor import Journal, JournalError, Result, RunState, Trigger

NOW = 1_790_000_000_000  # ms


def trigger(log_id, **fields):
    return Trigger(job_id=7, log_id=log_id, handler="hello", log_date_time=NOW, **fields)


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "journal.db")


@pytest.fixture
def journal(file):
    with contextlib.closing(Journal(file)) as journal:
        yield journal


def finish(journal, log_id, code=200, message="fine"):
    journal.finish([trigger(log_id)], Result(code, message))


def waiting(journal):
    """The logIds of undelivered results, in their order."""
    return [row[0] for row in journal.undelivered(1000)]


# -- what it stores


def test_a_run_from_its_acceptance_to_its_delivery(journal):
    wanted = trigger(
        5, param='a "b" 你好', timeout=9, shard_index=1, shard_total=3, block_strategy="COVER_EARLY"
    )
    assert not journal.knows(5)
    began = time.time()
    assert journal.accept(wanted) is True
    assert journal.accept(trigger(5, param="again")) is False
    ((found, state, age, starts),) = journal.unfinished()
    assert (found, state, starts) == (wanted, RunState.ACCEPTED, 0) and 0 <= age < 10
    journal.start(5)
    assert [row[1:2] + row[3:] for row in journal.unfinished()] == [(RunState.RUNNING, 1)]
    assert journal.undelivered(10) == [] and journal.oldest() == 0.0
    assert journal.counts() == {"undelivered": 0, "held": 0, "dead": 0}
    finish(journal, 5, 502, "timed out 你好")
    assert journal.unfinished() == []
    ((*row, finished),) = journal.undelivered(10)
    assert row == [5, NOW, 502, "timed out 你好"] and began <= finished <= time.time()
    assert journal.counts() == {"undelivered": 1, "held": 0, "dead": 0}
    assert 0 < journal.oldest() < time.time() - began + 1
    journal.settle([5], RunState.DELIVERED)
    assert journal.undelivered(10) == [] and journal.oldest() == 0.0
    assert journal.counts() == {"undelivered": 0, "held": 0, "dead": 0}
    # Still known, so that its repeated trigger starts nothing.
    assert journal.knows(5) and journal.accept(wanted) is False


def test_every_value_that_a_trigger_can_have_comes_back(journal):
    for wanted in (
        trigger(2**63 - 1),
        trigger(-(2**63)),
        trigger(0, param="\0\ud800\U0001f600" * 3, timeout=2**62),
    ):
        assert journal.accept(wanted)
        assert wanted in [row[0] for row in journal.unfinished()]
        journal.start(wanted.log_id)


def test_a_run_that_was_dropped_goes_from_accepted_to_finished(journal):
    journal.accept(trigger(1))
    finish(journal, 1, 500, "covered by run 2")
    assert [row[:4] for row in journal.undelivered(10)] == [(1, NOW, 500, "covered by run 2")]


def test_undelivered_results_come_the_oldest_first(journal):
    order = [30, 10, 20, 50, 40]
    for log_id in order:
        journal.accept(trigger(log_id))
    for log_id in order:
        finish(journal, log_id)
    assert waiting(journal) == order
    assert [row[0] for row in journal.undelivered(2)] == order[:2]
    journal.settle([30, 20], RunState.DELIVERED)
    journal.settle([40], RunState.DEAD)
    assert waiting(journal) == [10, 50]
    found = journal.counts()
    assert (found["undelivered"], found["dead"]) == (2, 1)


def test_unfinished_runs_come_in_the_order_of_their_acceptance(journal):
    for log_id in (3, 1, 2):
        journal.accept(trigger(log_id))
    journal.start(2)
    assert [(row[0].log_id, row[1]) for row in journal.unfinished()] == [
        (3, RunState.ACCEPTED),
        (1, RunState.ACCEPTED),
        (2, RunState.RUNNING),
    ]


def test_facts(journal):
    assert journal.fact("dialect") == ""
    journal.learn("dialect", "array")
    journal.learn("dialect", "wrapper")
    journal.learn("other", "x")
    assert (journal.fact("dialect"), journal.fact("other")) == ("wrapper", "x")


def test_it_survives_reopening(file):
    with contextlib.closing(Journal(file)) as journal:
        for log_id in (1, 2, 3, 4):
            journal.accept(trigger(log_id))
        journal.start(1)
        finish(journal, 1)
        journal.start(2)
        journal.learn("dialect", "wrapper")
        finish(journal, 4)
        journal.settle([4], RunState.DELIVERED)
    with contextlib.closing(Journal(file)) as journal:
        assert waiting(journal) == [1]
        assert [(row[0].log_id, row[1], row[3]) for row in journal.unfinished()] == [
            (2, RunState.RUNNING, 1),
            (3, RunState.ACCEPTED, 0),
        ]
        assert journal.fact("dialect") == "wrapper" and journal.knows(4)


def test_every_commit_reaches_the_disk(journal):
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


# -- transitions


def test_a_run_starts_once(journal):
    journal.accept(trigger(1))
    journal.start(1)
    with pytest.raises(JournalError) as caught:
        journal.start(1)
    assert str(caught.value) == "run 1 is not waiting to be started"
    assert [row[3] for row in journal.unfinished()] == [1]


@pytest.mark.parametrize("state", ["unknown", "finished", "delivered", "dead"])
def test_only_an_accepted_run_starts(journal, state):
    if state != "unknown":
        journal.accept(trigger(1))
        finish(journal, 1)
    if state in ("delivered", "dead"):
        journal.settle([1], RunState(state))
    with pytest.raises(JournalError) as caught:
        journal.start(1)
    assert str(caught.value) == "run 1 is not waiting to be started"
    assert journal.unfinished() == []


def test_the_first_result_stays(journal):
    journal.accept(trigger(1))
    finish(journal, 1, 500, "first")
    finish(journal, 1, 200, "second")
    assert [row[:4] for row in journal.undelivered(10)] == [(1, NOW, 500, "first")]
    journal.settle([1], RunState.DELIVERED)
    finish(journal, 1, 200, "third")
    finish(journal, 99, 200, "of nobody")
    assert (
        journal.undelivered(10) == []
        and journal.counts()["undelivered"] == 0
        and not journal.knows(99)
    )


def test_only_a_finished_run_is_settled(journal):
    for log_id in (1, 2):
        journal.accept(trigger(log_id))
    journal.start(2)
    journal.settle([1, 2, 3], RunState.DELIVERED)
    assert [row[0].log_id for row in journal.unfinished()] == [1, 2]
    finish(journal, 1)
    journal.settle([1], RunState.DEAD)
    journal.settle([1], RunState.DELIVERED)
    assert journal.counts()["dead"] == 1


def test_only_a_running_run_is_put_back(journal):
    for log_id in (1, 2, 3):
        journal.accept(trigger(log_id))
    journal.start(1)
    finish(journal, 2)
    for log_id in (1, 2, 3, 4):
        journal.restart(trigger(log_id))
    assert [(row[0].log_id, row[1], row[3]) for row in journal.unfinished()] == [
        (3, RunState.ACCEPTED, 0),
        (1, RunState.ACCEPTED, 1),
    ]
    journal.start(1)
    assert [row[3] for row in journal.unfinished() if row[0].log_id == 1] == [2]


# -- pruning


def test_prune_forgets_what_is_old_and_settled(journal):
    ages = {
        1: ("delivered", 2),
        2: ("delivered", 0.5),
        3: ("dead", 29),
        4: ("dead", 27),
        5: ("finished", 100),
    }  # days
    for log_id, (state, age) in ages.items():
        journal.accept(trigger(log_id))
        finish(journal, log_id)
        if state != "finished":
            journal.settle([log_id], RunState(state))
        journal._db.execute(
            "UPDATE runs SET finished = ? WHERE log_id = ?", (time.time() - age * 86_400, log_id)
        )
    journal.accept(trigger(6))
    journal._db.execute("UPDATE runs SET accepted = 0 WHERE log_id = 6")
    assert journal.prune() == 2
    assert [log_id for log_id in range(1, 7) if journal.knows(log_id)] == [2, 4, 5, 6]
    assert journal.prune() == 0


def test_prune_works_in_parts(journal):
    rows = [(i, NOW, "delivered", 0.0, 0.0) for i in range(2500)]
    journal._db.executemany(
        "INSERT INTO runs (log_id, log_date_time, state, accepted, finished) VALUES (?, ?, ?,"
        " ?, ?)",
        rows,
    )
    with commits(journal) as count:
        assert journal.prune() == 2500
    assert count[0] >= 3, "triggers could not come in between"
    assert not journal.knows(1)


# -- group commit


@contextlib.contextmanager
def commits(journal):
    """Counts the transactions that are committed meanwhile."""
    count = [0]

    def trace(statement):
        count[0] += statement.strip().upper().startswith("COMMIT")

    journal._db.set_trace_callback(trace)
    try:
        yield count
    finally:
        journal._db.set_trace_callback(None)


def together(work, arguments):
    """Call `work` with each of `arguments` in a thread of its own, all at once; returns what each
    gave or raised."""
    found, barrier = {}, threading.Barrier(len(arguments))

    def call(argument):
        barrier.wait()
        try:
            found[argument] = work(argument)
        except Exception as error:
            found[argument] = error

    threads = [threading.Thread(target=call, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_many_threads_share_a_transaction(journal):
    """Whoever gets the lock commits all that wait for it."""
    with commits(journal) as count:
        with journal._group.lock:  # as a slow disk would hold it
            threads = [
                threading.Thread(target=journal.accept, args=(trigger(i),)) for i in range(32)
            ]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(journal._group.waiting) == 32)
        for thread in threads:
            thread.join()
    assert count == [1]
    assert sorted(row[0].log_id for row in journal.unfinished()) == list(range(32))


def test_many_threads_lose_and_double_nothing(journal):
    with commits(journal) as count:
        found = together(
            lambda i: [journal.accept(trigger(i * 100 + j)) for j in range(20)], range(32)
        )
    assert found == {i: [True] * 20 for i in range(32)}
    assert sorted(row[0].log_id for row in journal.unfinished()) == sorted(
        i * 100 + j for i in range(32) for j in range(20)
    )
    assert 0 < count[0] < 640


def test_of_equal_triggers_one_is_new(journal):
    found = together(lambda i: journal.accept(trigger(1, param=str(i))), range(32))
    winner = [i for i, fresh in found.items() if fresh is True]
    assert len(winner) == 1 and sorted(map(repr, found.values())) == ["False"] * 31 + ["True"]
    assert [row[0].param for row in journal.unfinished()] == [str(winner[0])]


def test_of_many_starts_one_succeeds(journal):
    journal.accept(trigger(1))
    found = together(lambda i: journal.start(1), range(16))
    assert sum(value is None for value in found.values()) == 1
    assert {str(value) for value in found.values() if value is not None} == {
        "run 1 is not waiting to be started"
    }


# -- failures


@contextlib.contextmanager
def failing(journal, what="INSERT"):
    """Let every INSERT or UPDATE of a run fail, as a full disk does."""
    journal._db.execute(
        f"CREATE TEMP TRIGGER full BEFORE {what} ON main.runs BEGIN SELECT RAISE(ABORT, 'the disk"
        " is full'); END"
    )
    yield
    journal._db.execute("DROP TRIGGER full")


def test_accept_that_cannot_be_stored_raises(journal, file):
    journal.accept(trigger(1))
    with failing(journal):
        with pytest.raises(JournalError) as caught:
            journal.accept(trigger(2))
        assert str(caught.value) == f"{file}: the disk is full"
        found = together(lambda i: journal.accept(trigger(i)), range(10, 20))
        assert {str(error) for error in found.values()} == {f"{file}: the disk is full"}
    assert [row[0].log_id for row in journal.unfinished()] == [1]
    assert journal.accept(trigger(2)) is True


def test_a_full_disk_refuses_triggers_and_holds_results(journal, file):
    """The real thing: SQLite may not take another page."""
    journal.accept(trigger(1))
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalError) as caught:
        journal.accept(trigger(2, param="x" * 100_000))
    assert str(caught.value) == f"{file}: database or disk is full"
    finish(journal, 1, 200, "y" * 100_000)
    assert (
        journal.store_held() is False
        and waiting(journal) == []
        and journal.counts()["undelivered"] == 1
    )
    journal._db.execute("PRAGMA max_page_count = 1000000")
    assert journal.store_held() is True
    assert [row[:4] for row in journal.undelivered(10)] == [(1, NOW, 200, "y" * 100_000)]
    assert journal.accept(trigger(2, param="x" * 100_000)) is True


def test_results_that_cannot_be_stored_are_held(journal, file, caplog):
    for log_id in (1, 2, 3, 4):
        journal.accept(trigger(log_id))
    finish(journal, 1)
    with failing(journal, "UPDATE"):
        finish(journal, 2, 200, "two")
        journal.finish([trigger(3), trigger(4)], Result(500, "three and four"))
        assert waiting(journal) == [1] and journal.counts()["undelivered"] == 4
        assert journal.store_held() is False
        assert journal.store_held() is False
        with pytest.raises(JournalError) as caught:
            journal.settle([1], RunState.DELIVERED)
        assert str(caught.value) == f"{file}: the disk is full"
    assert waiting(journal) == [1]
    assert journal.store_held() is True
    assert [row[0::3][:2] for row in journal.undelivered(10)] == [
        (1, "fine"),
        (2, "two"),
        (3, "three and four"),
        (4, "three and four"),
    ]
    assert journal.counts()["undelivered"] == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot store results, holding them until it works again: {file}: the disk is full"
    ]
    assert journal.store_held() is True  # nothing is held any more
    assert waiting(journal) == [1, 2, 3, 4]


def test_a_file_that_cannot_be_opened_is_not_taken_for_broken(tmp_path):
    from xxl_executor import ExecutorError

    file = tmp_path / "none" / "journal.db"
    with pytest.raises(ExecutorError) as caught:
        Journal(str(file))
    assert str(caught.value) == f"{file}: cannot be opened: No such file or directory"


def many_rows(file):
    with contextlib.closing(Journal(file)) as journal:
        for log_id in range(50):
            journal.accept(trigger(log_id))
        journal._db.execute("BEGIN")
        journal._db.executemany(
            "INSERT INTO runs (log_id, log_date_time, state, accepted, trigger) VALUES (?, ?,"
            " 'accepted', 1, ?)",
            ((i, NOW, "x" * 300) for i in range(1000, 5000)),
        )
        journal._db.execute("COMMIT")


def garbage(file):
    with open(file, "wb") as stream:
        stream.write(os.urandom(100_000))


def text(file):
    with open(file, "w", encoding="ascii") as stream:
        stream.write("this is no database\n" * 1000)


def truncated(file):
    os.truncate(file, os.path.getsize(file) // 2 // 4096 * 4096)


def truncated_within_a_page(file):
    os.truncate(file, os.path.getsize(file) // 2 + 1000)


def zero_header(file):
    with open(file, "r+b") as stream:
        stream.write(bytes(100))


def zero_middle(file):
    with open(file, "r+b") as stream:
        stream.seek(os.path.getsize(file) // 2)
        stream.write(bytes(200_000))


@pytest.mark.parametrize(
    "damage",
    [garbage, text, truncated, truncated_within_a_page, zero_header, zero_middle],
    ids=lambda damage: damage.__name__,
)
def test_a_broken_file_is_set_aside(file, tmp_path, damage, caplog):
    many_rows(file)
    damage(file)
    with open(file, "rb") as stream:
        before = stream.read()
    with contextlib.closing(Journal(file)) as journal:
        assert journal.unfinished() == [] and journal.accept(trigger(1)) is True
        finish(journal, 1)
        assert waiting(journal) == [1]
    (aside,) = [
        path
        for path in tmp_path.glob("journal.db.broken-*")
        if not path.name.endswith(("-wal", "-shm"))
    ]
    assert aside.read_bytes() == before, "it is kept as it was"
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert re.fullmatch(
        rf"the journal {re.escape(file)} is broken \(.+\): moved to {re.escape(str(aside))},"
        r" starting with an empty "
        r"one; the admin will show runs that were in it as running",
        record.getMessage(),
        re.S,
    )
    assert "\n" not in record.getMessage()


def test_an_older_broken_file_is_not_replaced(file, tmp_path):
    """Twice within a second, as a service manager restarts."""
    for content in (b"first " * 1000, b"second " * 1000, b"third " * 1000):
        with open(file, "wb") as stream:
            stream.write(content)
        Journal(file).close()
    kept = [path.read_bytes()[:5] for path in tmp_path.glob("journal.db.broken-*")]
    assert sorted(kept) == [b"first", b"secon", b"third"]


def test_an_empty_file_is_a_new_journal(file, caplog):
    open(file, "wb").close()
    with contextlib.closing(Journal(file)) as journal:
        assert journal.accept(trigger(1)) is True
    assert not caplog.records


# -- through the daemon


@pytest.fixture
def slow(executor, admin, tmp_path):
    """A daemon with a job that notes its pids and then stays until a file appears."""
    pids, go = tmp_path / "pids", tmp_path / "go"
    body = (
        f"echo $$ >> {pids}; sleep 600 & echo $! >> {pids}; setsid sleep 600 & echo $! >> {pids}; "
        f"echo >> {pids}.ready; while [ ! -e {go} ]; do sleep 0.02; done; echo done"
    )
    jobs = {
        "slow": {"shell": body, "kill_grace": "0.2s"},
        "again": {"shell": body, "kill_grace": "0.2s", "on_crash": "rerun"},
        "quick": {"shell": f'echo "$XXL_JOB_LOG_ID" >> {pids}.quick'},
    }
    daemon = executor(jobs, admin=admin)
    daemon.pids, daemon.go, daemon.ready, daemon.quick = (
        pids,
        go,
        tmp_path / "pids.ready",
        tmp_path / "pids.quick",
    )
    return daemon


def starts_of(daemon, count=1):
    """The pids of all processes of the slow runs, when `count` of them have started."""
    wait_until(
        lambda: daemon.ready.exists() and daemon.ready.read_text().count("\n") == count,
        10,
        f"start {count} of the job",
    )
    return list(map(int, daemon.pids.read_text().split()))


def edit(daemon, statement, *values):
    """Run a statement in the journal of a daemon, from outside."""
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db, db:
        return db.execute(statement, values).fetchall()


def test_a_result_that_was_not_delivered_survives_a_crash(executor, loopback, tmp_path):
    admin = loopback()
    refused = threading.Event()

    def behave(path, body):
        if path.endswith("/callback"):
            refused.set()
            return 503, b""

    admin.behave = behave
    daemon = executor({"hello": {"shell": "echo hello $1"}}, admin=admin)
    log_id, reply = admin.trigger(daemon.url, "hello", executorParams="you")
    assert reply["code"] == 200 and refused.wait(10)
    daemon.kill()
    admin.behave = lambda path, body: None
    daemon.start()
    result = result_of(admin, log_id)
    assert (result["handleCode"], result["handleMsg"]) == (200, "hello you")
    # Its trigger repeated, as a Java client does after a lost connection: the same answer, nothing
    # runs.
    wait_until(lambda: daemon.status()["undelivered"] == 0)
    assert admin.trigger(daemon.url, "hello", logId=log_id)[1]["code"] == 200
    later, _ = run_job(daemon, admin, "hello")
    assert len(admin.results[log_id]) == 1
    assert len(re.findall(f"started hello logId={log_id} ", daemon.log)) == 1


def test_a_crash_in_the_middle_of_a_run(slow, admin):
    """The tree is ended, the run is failed, what waited starts once, what was delivered does not
    start again."""
    done, _ = run_job(slow, admin, "quick", jobId=2)
    log_id, reply = admin.trigger(slow.url, "slow")
    behind, reply_behind = admin.trigger(slow.url, "quick")
    assert reply["code"] == reply_behind["code"] == 200
    pids = starts_of(slow)
    assert len(pids) == 3 and all(map(alive, pids))
    slow.kill()
    slow.start()
    wait_until(
        lambda: not any(map(alive, pids)), 10, "the end of what the crashed daemon had started"
    )
    result = result_of(admin, log_id)
    assert (result["handleCode"], result["handleMsg"]) == (
        500,
        "executor restarted while the job ran, its outcome is unknown",
    )
    assert re.search(
        r"(^|\n)----- [-\d]+ [:\d]+ failed: executor restarted while the job ran, its outcome is"
        r" unknown -----\n$",
        slow.log_text(log_id),
    )
    assert re.search(
        f"failed slow logId={log_id} jobId=1: executor restarted while the job ran, its outcome is"
        " unknown",
        slow.log,
    )
    assert re.search(r"ending [1-9]\d* processes that jobs of an earlier executor left", slow.log)
    assert result_of(admin, behind)["handleCode"] == 200
    for repeated, handler in ((done, "quick"), (log_id, "slow"), (behind, "quick")):
        assert admin.trigger(slow.url, handler, logId=repeated, jobId=3)[1]["code"] == 200
    run_job(slow, admin, "quick", jobId=3)
    assert (
        slow.quick.read_text().split()[:2] == [str(done), str(behind)]
        and len(slow.quick.read_text().split()) == 3
    )
    assert slow.ready.read_text().count("\n") == 1
    assert [len(admin.results[i]) for i in (done, log_id, behind)] == [1, 1, 1]


def test_on_crash_rerun(slow, admin):
    log_id, _ = admin.trigger(slow.url, "again")
    pids = starts_of(slow)
    wait_until(lambda: slow.log_text(log_id).count(" pid=") == 1)
    slow.kill()
    slow.start()
    starts_of(slow, 2)
    wait_until(lambda: slow.log_text(log_id).count(" pid=") == 2)
    assert not any(map(alive, pids)), "the first one is dead before the second starts"
    slow.kill()
    slow.start()
    starts_of(slow, 3)
    slow.go.touch()
    result = result_of(admin, log_id)
    assert (result["handleCode"], result["handleMsg"]) == (200, "done")
    text = slow.log_text(log_id)
    assert (
        len(
            re.findall(
                "-----.* executor restarted while the job ran; it is run again -----\n", text
            )
        )
        == 2
    )
    assert text.count(" pid=") == 3 and text.count("\ndone\n") == 1
    assert len(admin.results[log_id]) == 1


def test_on_crash_rerun_has_an_end(slow, admin):
    """A job that brings the daemon down every time would otherwise do so for ever."""
    log_id, _ = admin.trigger(slow.url, "again")
    for count in (1, 2, 3):
        starts_of(slow, count)
        slow.kill()
        slow.start()
    result = result_of(admin, log_id)
    assert (result["handleCode"], result["handleMsg"]) == (
        500,
        "executor restarted while the job ran, its outcome is unknown",
    )
    assert slow.ready.read_text().count("\n") == 3


def test_what_is_too_old_or_gone_is_failed_at_the_start(slow, admin):
    log_id, _ = admin.trigger(slow.url, "slow")
    old, _ = admin.trigger(slow.url, "quick")
    young, _ = admin.trigger(slow.url, "quick")
    gone, _ = admin.trigger(slow.url, "again")
    starts_of(slow)
    slow.kill()
    for run, seconds in ((old, 301), (young, 280)):
        ((stored,),) = edit(slow, "SELECT trigger FROM runs WHERE log_id = ?", run)
        fields = json.loads(stored)
        boot, ticks, wall = fields["accepted"]
        fields["accepted"] = [boot, ticks - seconds, wall]
        edit(slow, "UPDATE runs SET trigger = ? WHERE log_id = ?", json.dumps(fields), run)
    config = slow.file.read_text()
    config = config[: config.index("  again:")] + config[config.index("  quick:") :]
    slow.file.write_text(config)
    slow.start()
    found = {log_id: result_of(admin, log_id) for log_id in (log_id, old, young, gone)}
    assert [item["handleCode"] for item in found.values()] == [500, 500, 200, 500]
    assert (
        found[log_id]["handleMsg"] == "executor restarted while the job ran, its outcome is unknown"
    )
    assert re.fullmatch(
        r"accepted 5m \d+s before the executor restarted, too long ago to start now",
        found[old]["handleMsg"],
    )
    assert found[gone]["handleMsg"] == 'job handler "again" was removed before the run started'
    assert slow.quick.read_text().split() == [str(young)]
    assert edit(slow, "SELECT count(*) FROM runs WHERE state NOT IN ('delivered', 'finished')") == [
        (0,)
    ]


def test_a_broken_journal_does_not_stop_the_daemon(executor, admin):
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin)
    run_job(daemon, admin, "hello")
    assert daemon.stop() == 0
    (daemon.data / "journal.db").write_bytes(b"\xff" * 20_000)
    daemon.start()
    run_job(daemon, admin, "hello")
    assert len(re.findall(" ERROR .*the journal .* is broken", daemon.log)) == 1
    assert len(list(daemon.data.glob("journal.db.broken-*"))) == 1


def test_a_journal_that_cannot_store_refuses_triggers_and_holds_results(executor, admin, tmp_path):
    """As with a full disk: the reason is told, and no accepted run and no result is lost."""
    go = tmp_path / "go"
    daemon = executor(
        {"job": {"shell": f"while [ ! -e {go} ]; do sleep 0.02; done; echo done"}}, admin=admin
    )
    log_id, _ = admin.trigger(daemon.url, "job")
    behind, _ = admin.trigger(daemon.url, "job")
    wait_until(lambda: daemon.status()["running"])
    for what in ("INSERT", "UPDATE"):
        edit(
            daemon,
            f"CREATE TRIGGER full_{what} BEFORE {what} ON runs BEGIN SELECT RAISE(ABORT, 'the disk"
            " is full'); END",
        )
    refused, reply = admin.trigger(daemon.url, "job", jobId=2)
    reason = f"{daemon.data / 'journal.db'}: the disk is full"
    assert (reply["code"], reply["msg"]) == (
        500,
        f"the executor cannot store the trigger: {reason}",
    )
    go.touch()
    # The one behind it could not be stored as running, so it was not started, lest it start twice.
    wait_until(lambda: daemon.status()["undelivered"] == 2)
    assert (
        daemon.log.count(f"cannot store results, holding them until it works again: {reason}") == 1
        and not admin.results
    )
    assert daemon.post("/beat")["code"] == 200
    for what in ("INSERT", "UPDATE"):
        edit(daemon, f"DROP TRIGGER full_{what}")
    assert (result_of(admin, log_id)["handleCode"], result_of(admin, log_id)["handleMsg"]) == (
        200,
        "done",
    )
    result = result_of(admin, behind)
    assert (result["handleCode"], result["handleMsg"]) == (
        500,
        f"not started, the executor cannot store the start: {reason}",
    )
    assert run_job(daemon, admin, "job", jobId=2)[1]["handleCode"] == 200
    assert refused not in admin.results


def test_the_journal_is_compatible_with_its_own_triggers(executor, admin):
    """What is stored of a trigger is all that a restart needs: nothing of it is lost on the way."""
    daemon = executor(
        {
            "show": {"shell": 'echo "$1|$2|$3|$XXL_JOB_TIMEOUT|$XXL_JOB_TRIGGER_TIME"'},
            "block": {"shell": "sleep 600", "kill_grace": "0.2s"},
        },
        admin=admin,
    )
    first, _ = admin.trigger(daemon.url, "block")
    wait_until(lambda: daemon.status()["running"])
    date = int(time.time() * 1000)
    log_id, _ = admin.trigger(
        daemon.url,
        "show",
        executorParams="ä 'x'",
        broadcastIndex=2,
        broadcastTotal=5,
        executorTimeout=77,
        logDateTime=date,
    )
    daemon.kill()
    (stored,) = edit(daemon, "SELECT trigger FROM runs WHERE log_id = ?", log_id)
    assert json.loads(stored[0])["param"] == "ä 'x'"
    daemon.start()
    assert result_of(admin, log_id)["handleMsg"] == f"ä 'x'|2|5|77|{date}"
    assert result_of(admin, first)["handleCode"] == 500


# -- what the review of the queries showed


def test_no_query_of_the_daily_work_reads_delivered_runs(journal):
    """They stay for a day, and there may be millions of them."""
    asked = []
    for db in (journal._db, journal._reader):
        db.set_trace_callback(asked.append)
    journal.undelivered(10), journal.oldest(), journal.unfinished(), journal.prune()
    for db in (journal._db, journal._reader):
        db.set_trace_callback(None)
    asked = [query for query in asked if "FROM runs" in query]
    assert len(asked) == 5
    for query in asked:
        plan = " ".join(row[3] for row in journal._db.execute("EXPLAIN QUERY PLAN " + query))
        assert "SCAN runs" not in plan or "USING INDEX" in plan or "USING COVERING INDEX" in plan, (
            query,
            plan,
        )


def test_the_file_is_not_for_everybody(journal, file):
    journal.accept(trigger(1))
    assert {os.stat(place).st_mode & 0o777 for place in glob.glob(f"{file}*")} == {0o640}


def test_a_full_disk_at_the_start_reports_what_cannot_be_run_again(slow, admin):
    """The daemon comes up and says so, instead of going down again and again."""
    log_id, _ = admin.trigger(slow.url, "again")
    starts_of(slow)
    slow.kill()
    with contextlib.closing(sqlite3.connect(slow.data / "journal.db")) as db:
        db.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON runs WHEN new.state = 'accepted' BEGIN SELECT"
            " RAISE(FAIL, 'disk full'); END"
        )
    slow.start()
    result = result_of(admin, log_id)
    assert (result["handleCode"], result["handleMsg"]) == (
        500,
        (
            f"executor restarted while the job ran, it cannot be run again: {slow.data}/journal.db:"
            " disk full"
        ),
    )
