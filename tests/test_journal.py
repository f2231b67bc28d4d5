"""The journal: what it stores, how it commits, what it survives, and what a daemon makes of it
after a crash."""

import contextlib
import glob
import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import alive, command_line, result_of, run_job, wait_until

import xxl_executor
from xxl_executor import (
    ExecutorError,
    Journal,
    JournalError,
    Note,
    Refused,
    Result,
    RunState,
    Settled,
    Span,
    Trigger,
)

NOW = 1_790_000_000_000  # ms
DAY = 86_400


def trigger(log_id, **fields):
    return Trigger(job_id=7, log_id=log_id, handler="hello", log_date_time=NOW, **fields)


def turn(journal, decide=lambda: None):
    """The value of `decide()`, committed in one transaction, as the core does it."""
    for last in (False, True):
        try:
            journal.begin()
            value = decide()
            journal.commit()
        except (sqlite3.Error, OSError) as error:
            journal.take_back()
            if last or not journal.mend(error):
                raise JournalError(journal.cannot_store(error)) from None
        else:
            journal.publish()
            return value


def tolerant(journal):
    """A turn that is not told of, as one that only stores what has happened; whether it did."""
    with contextlib.suppress(JournalError):
        turn(journal)
        return True
    return False


def accept(journal, *wanted):
    """Whether each of these is new, a single one for a single trigger. Raises Refused."""

    def decide():
        try:
            return [journal.accept(one) for one in wanted]
        except Refused as error:  # it refuses a trigger, the others of the batch are stored
            return error

    found = turn(journal, decide)
    if isinstance(found, Refused):
        raise found
    return found if len(wanted) > 1 else found[0]


def start(journal, log_id):
    turn(journal, lambda: journal.start(log_id))


def restart(journal, log_id):
    turn(journal, lambda: journal.restart(trigger(log_id)))


def finish(journal, log_id, code=200, message="fine"):
    journal.finish(ended(log_id), Result(code, message))
    turn(journal)


def ended(*log_ids):
    return [Span(trigger(log_id), 100.0, 1.5) for log_id in log_ids]


def settle(journal, log_ids, state, before=RunState.FINISHED, stored=lambda message: None):
    journal.hold(Settled(log_ids, before, state, stored))
    turn(journal)


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "journal.db")


@pytest.fixture
def journal(file):
    with contextlib.closing(Journal(file)) as journal:
        yield journal


@pytest.fixture
def posted(journal):
    """Does at once what is posted to the core, which there is none of; the messages so far."""
    messages = []

    def post(message):
        messages.append(message)
        if isinstance(message, Note):
            journal.hold(message)
            return
        try:
            value = turn(journal, message.work)
        except JournalError as error:
            value = error
        message.done(value)

    journal.post = post
    return messages


def waiting(journal):
    """The logIds of undelivered results, in their order."""
    return [row[0] for row in journal.undelivered(1000)]


def outside(file, statement, *values):
    """Run a statement in the file of a journal, from outside."""
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        return db.execute(statement, values).fetchall()


# -- what it stores


def test_a_run_from_its_acceptance_to_its_delivery(journal):
    wanted = trigger(
        5, param='a "b" 你好', timeout=9, shard_index=1, shard_total=3, block_strategy="COVER_EARLY"
    )
    assert not journal.state(5)
    began = journal.clock.now()
    assert abs(began - time.time()) < 60, "a new journal begins with the time of the wall clock"
    assert accept(journal, wanted) is True
    assert accept(journal, trigger(5, param="again")) is False
    ((found, state, age, began, starts, cancelled),) = journal.unfinished()
    assert (found, state, starts, cancelled) == (wanted, RunState.ACCEPTED, 0, None)
    assert 0 <= age < 60
    start(journal, 5)
    assert [(row.state, row.starts) for row in journal.unfinished()] == [(RunState.RUNNING, 1)]
    assert journal.undelivered(10) == [] and journal.oldest() == 0.0
    assert journal.counts() == {"undelivered": 0, "held": 0, "dead": 0}
    finish(journal, 5, 502, "timed out 你好")
    assert journal.unfinished() == []
    ((*row, finished),) = journal.undelivered(10)
    assert row == [5, NOW, 502, "timed out 你好"] and began <= finished <= journal.clock.now()
    assert journal.counts() == {"undelivered": 1, "held": 0, "dead": 0}
    assert 0 < journal.oldest() <= journal.clock.now() - began
    settle(journal, [5], RunState.DELIVERED)
    assert journal.undelivered(10) == [] and journal.oldest() == 0.0
    assert journal.counts() == {"undelivered": 0, "held": 0, "dead": 0}
    # Still known, so that its repeated trigger starts nothing.
    assert journal.state(5) and accept(journal, wanted) is False


def test_every_value_that_a_trigger_can_have_comes_back(journal):
    for wanted in (
        trigger(2**63 - 1),
        trigger(-(2**63)),
        trigger(0, param="\0\ud800\U0001f600" * 3, timeout=2**62),
    ):
        assert accept(journal, wanted)
        assert wanted in [row.trigger for row in journal.unfinished()]
        start(journal, wanted.log_id)


def test_a_run_that_was_dropped_goes_from_accepted_to_finished(journal):
    accept(journal, trigger(1))
    finish(journal, 1, 500, "covered by run 2")
    assert [row[:4] for row in journal.undelivered(10)] == [(1, NOW, 500, "covered by run 2")]


def test_undelivered_results_come_the_oldest_first(journal):
    order = [30, 10, 20, 50, 40]
    accept(journal, *map(trigger, order))
    for log_id in order:
        finish(journal, log_id)
    assert waiting(journal) == order
    assert [row[0] for row in journal.undelivered(2)] == order[:2]
    settle(journal, [30, 20], RunState.DELIVERED)
    settle(journal, [40], RunState.DEAD)
    assert waiting(journal) == [10, 50]
    found = journal.counts()
    assert (found["undelivered"], found["dead"]) == (2, 1)


def test_what_the_admin_acknowledged_can_be_sent_again(journal):
    """By the state that it is in and the time at which it came into it."""
    accept(journal, trigger(1), trigger(2), trigger(3))
    journal.finish(ended(1, 2, 3), Result(200, "fine"))
    turn(journal)
    began = journal.clock.now()
    settle(journal, [1, 2], RunState.ACKNOWLEDGED)
    between = journal.clock.now()
    settle(journal, [3], RunState.ACKNOWLEDGED)
    until = journal.clock.now() + 1

    def found(state, since=0.0, until=until, limit=10):
        return [row[0] for row in journal.acknowledged(state, since, until, limit)]

    assert waiting(journal) == [] and journal.counts()["undelivered"] == 0
    assert found(RunState.ACKNOWLEDGED) == [1, 2, 3]
    assert found(RunState.ACKNOWLEDGED, until=between) == [1, 2]
    assert found(RunState.ACKNOWLEDGED, since=between) == [3]
    assert found(RunState.ACKNOWLEDGED, until=began) == []
    assert len(found(RunState.ACKNOWLEDGED, limit=2)) == 2
    ((*row, at),) = journal.acknowledged(RunState.ACKNOWLEDGED, between, until, 10)
    assert row == [3, NOW, 200, "fine"] and between <= at < until
    settle(journal, [1, 2, 3], RunState.RESENT, RunState.ACKNOWLEDGED)
    assert (found(RunState.ACKNOWLEDGED), found(RunState.RESENT)) == ([], [1, 2, 3])
    settle(journal, [2], RunState.DELIVERED, RunState.RESENT)
    assert found(RunState.RESENT) == [1, 3] and journal.state(2)


def test_unfinished_runs_come_in_the_order_of_their_acceptance(journal):
    for log_id in (3, 1, 2):
        accept(journal, trigger(log_id))
    start(journal, 2)
    assert [(row.trigger.log_id, row.state) for row in journal.unfinished()] == [
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


def test_for_how_long_something_is_known(journal, file):
    journal.learn("since outage", str(journal.clock.now() - 100))
    assert 100 <= journal.known_for("outage") < 160
    journal.forget_since("outage")
    assert journal.known_for("outage") == 0.0, "it is noted anew"
    assert journal.known_for("outage") < 60
    journal.forget_since("outage")
    turn(journal)
    assert outside(file, "SELECT name FROM facts WHERE name LIKE 'since %'") == []


def test_it_survives_reopening(file):
    with contextlib.closing(Journal(file)) as journal:
        for log_id in (1, 2, 3, 4, 5):
            accept(journal, trigger(log_id))
        start(journal, 1)
        finish(journal, 1)
        start(journal, 2)
        journal.learn("dialect", "wrapper")
        finish(journal, 4)
        settle(journal, [4], RunState.DELIVERED)
        finish(journal, 5)
        settle(journal, [5], RunState.DEAD)
    with contextlib.closing(Journal(file)) as journal:
        assert waiting(journal) == [1]
        assert [(row.trigger.log_id, row.state, row.starts) for row in journal.unfinished()] == [
            (2, RunState.RUNNING, 1),
            (3, RunState.ACCEPTED, 0),
        ]
        assert journal.fact("dialect") == "wrapper" and journal.state(4)
        assert journal.counts() == {"undelivered": 1, "held": 0, "dead": 1}


@pytest.fixture
def connections(monkeypatch):
    """The connections that are made meanwhile."""
    made, connect = [], sqlite3.connect

    def keep(*arguments, **options):
        made.append(connect(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", keep)
    return made


def of_file(connections, file):
    """Those to this file; others are closed again, with what they were good for."""
    found = []
    for db in connections:
        with contextlib.suppress(sqlite3.ProgrammingError):
            if db.execute("PRAGMA database_list").fetchone()[2] == os.path.realpath(file):
                found.append(db)
    return found


def test_every_commit_reaches_the_disk(connections, file):
    with contextlib.closing(Journal(file)):
        used = of_file(connections, file)
        assert len(used) == 2, "one that writes and one that reads"
        for db in used:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


# -- transitions


def test_a_run_starts_once(journal):
    accept(journal, trigger(1))
    start(journal, 1)
    start(journal, 1)
    assert [(row.state, row.starts) for row in journal.unfinished()] == [(RunState.RUNNING, 1)]


@pytest.mark.parametrize("state", ["unknown", "finished", "delivered", "dead"])
def test_only_an_accepted_run_starts(journal, state):
    if state != "unknown":
        accept(journal, trigger(1))
        finish(journal, 1)
    if state in ("delivered", "dead"):
        settle(journal, [1], RunState(state))
    before = waiting(journal), journal.counts(), journal.state(1)
    start(journal, 1)
    assert journal.unfinished() == []
    assert (waiting(journal), journal.counts(), journal.state(1)) == before


def test_the_first_result_stays(journal):
    accept(journal, trigger(1))
    finish(journal, 1, 500, "first")
    finish(journal, 1, 200, "second")
    assert [row[:4] for row in journal.undelivered(10)] == [(1, NOW, 500, "first")]
    assert journal.counts()["undelivered"] == 1
    settle(journal, [1], RunState.DELIVERED)
    finish(journal, 1, 200, "third")
    finish(journal, 99, 200, "of nobody")
    assert (
        journal.undelivered(10) == []
        and journal.counts()["undelivered"] == 0
        and not journal.state(99)
    )


def test_only_a_finished_run_is_settled(journal):
    accept(journal, trigger(1), trigger(2))
    start(journal, 2)
    settle(journal, [1, 2, 3], RunState.DELIVERED)
    assert [row.trigger.log_id for row in journal.unfinished()] == [1, 2]
    finish(journal, 1)
    settle(journal, [1], RunState.DEAD)
    settle(journal, [1], RunState.DELIVERED)
    assert journal.counts() == {"undelivered": 0, "held": 0, "dead": 1}


def test_only_a_running_run_is_put_back(journal):
    for log_id in (1, 2, 3):
        accept(journal, trigger(log_id))
    start(journal, 1)
    finish(journal, 2)
    for log_id in (1, 2, 3, 4):
        restart(journal, log_id)
    assert [(row.trigger.log_id, row.state, row.starts) for row in journal.unfinished()] == [
        (3, RunState.ACCEPTED, 0),
        (1, RunState.ACCEPTED, 1),
    ]
    start(journal, 1)
    assert [row.starts for row in journal.unfinished() if row.trigger.log_id == 1] == [2]


def test_why_a_run_was_ended_is_known_after_a_crash(journal):
    """Of one that runs: what waits is dropped, not ended."""
    accept(journal, trigger(1), trigger(2))
    start(journal, 1)
    for log_id in (1, 2, 3):
        journal.cancel(log_id, Result(502, f"timed out {log_id}"))
    turn(journal)
    assert [(row.trigger.log_id, row.state, row.cancelled) for row in journal.unfinished()] == [
        (1, RunState.RUNNING, Result(502, "timed out 1")),
        (2, RunState.ACCEPTED, None),
    ]
    finish(journal, 1, 500, "it ended otherwise")
    assert [row[:4] for row in journal.undelivered(10)] == [(1, NOW, 500, "it ended otherwise")]


def test_what_is_taken_back_before_the_commit_is_not_stored(journal):
    """As the core does with what it decided in a turn that failed."""
    accept(journal, trigger(1), trigger(2), trigger(3))
    start(journal, 1)
    journal.finish(ended(2), Result(200, "it happened"))
    journal.begin()
    journal.cancel(1, Result(500, "killed"))
    journal.finish(ended(1, 3), Result(500, "dropped"))
    journal.take_back()
    turn(journal)
    assert {row.trigger.log_id: row.cancelled for row in journal.unfinished()} == {1: None, 3: None}
    assert [row[:4] for row in journal.undelivered(10)] == [(2, NOW, 200, "it happened")]


# -- with the callbacks


def test_a_result_whose_delivery_is_committed_as_it_is_looked_for_is_not_sent_again(tmp_path):
    """The commit comes after the rows were read and before they are used, which a busy core makes
    likely."""

    class Journal(xxl_executor.Journal):
        def undelivered(self, limit):
            rows = super().undelivered(limit)
            if rows and sent:
                turn(self)
            return rows

    sent = []
    admin = SimpleNamespace(addresses=["one"], missed_at=0.0)
    admin.callback = lambda rows: sent.append([row[0] for row in rows])
    with contextlib.closing(Journal(str(tmp_path / "journal.db"))) as journal:
        journal.post = journal.hold
        accept(journal, trigger(1), trigger(2))
        finish(journal, 1)
        callbacks = xxl_executor.Callbacks(journal, admin, xxl_executor.Metrics())
        callbacks.start()
        try:
            callbacks.retry(False)
            wait_until(lambda: journal.counts()["undelivered"] == 0, 10, "the delivery of one")
            finish(journal, 2)  # so that it has looked again
            callbacks.wake()
            wait_until(lambda: journal.counts()["undelivered"] == 0, 10, "of the other")
        finally:
            callbacks.close()
    assert sent == [[1], [2]]


# -- pruning


def test_prune_forgets_what_is_old_and_settled(journal, posted, file):
    ages = {
        1: ("delivered", 2),
        2: ("delivered", 0.5),
        3: ("dead", 29),
        4: ("dead", 27),
        5: ("finished", 100),
        6: ("acknowledged", 2),
        7: ("acknowledged", 0.5),
        8: ("resent", 2),
        9: ("resent", 0.5),
    }  # days
    for log_id, (state, age) in ages.items():
        accept(journal, trigger(log_id))
        finish(journal, log_id)
        if state != "finished":
            settle(journal, [log_id], RunState(state))
        at = journal.clock.now() - age * DAY
        outside(file, "UPDATE runs SET finished = ? WHERE log_id = ?", at, log_id)
    accept(journal, trigger(10))
    outside(file, "UPDATE runs SET accepted = 0 WHERE log_id = 10")
    assert journal.counts()["dead"] == 2
    assert journal.prune() == 4
    assert [log_id for log_id in range(1, 11) if journal.state(log_id)] == [2, 4, 5, 7, 9, 10]
    assert journal.counts()["dead"] == 1
    assert journal.prune() == 0


def many_delivered(file, count):
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        db.executemany(
            "INSERT INTO runs (log_id, log_date_time, state, accepted, finished) VALUES (?, ?,"
            " 'delivered', 0, 0)",
            ((i, NOW) for i in range(count)),
        )


def test_prune_works_in_parts(journal, posted, file):
    many_delivered(file, 2500)
    assert journal.prune() == 2500
    assert len(posted) >= 3, "triggers could not come in between"
    assert not journal.state(1)


def test_prune_ends_when_it_is_told(journal, posted, file):
    many_delivered(file, 2500)
    assert journal.prune(lambda: len(posted) == 1) == 1000
    assert outside(file, "SELECT count(*) FROM runs") == [(1500,)]


def test_prune_tells_why_it_cannot(journal, posted, file):
    many_delivered(file, 10)
    with failing(file, "DELETE"):
        with pytest.raises(JournalError) as caught:
            journal.prune()
        assert str(caught.value) == f"{file}: the disk is full"
    assert journal.prune() == 10


def test_a_prune_that_fails_fails_no_trigger_beside_it(journal, file):
    """What only the prune meets, such as a damaged page, costs the triggers nothing that come into
    the same transaction."""
    many_delivered(file, 10)

    def post(message):
        _, value = turn(journal, lambda: (journal.accept(trigger(11)), message.work()))
        message.done(value)

    journal.post = post
    with failing(file, "DELETE"), pytest.raises(JournalError) as caught:
        journal.prune()
    assert str(caught.value) == f"{file}: the disk is full"
    assert journal.state(11) is RunState.ACCEPTED


# -- a batch is one transaction


def test_nothing_of_a_batch_is_stored_before_all_of_it(journal, file):
    accept(journal, trigger(1), trigger(2), trigger(3))
    start(journal, 1)
    finish(journal, 3)
    # a copy of the files at any moment is what a crash would leave
    query = "SELECT log_id, state FROM runs ORDER BY log_id"
    before = [(1, "running"), (2, "accepted"), (3, "finished")]
    told = []
    journal.on_results = lambda: told.append("results")
    journal.begin()
    assert [journal.accept(trigger(i)) for i in (4, 5, 4, 1)] == [True, True, False, False]
    journal.start(2)
    journal.finish(ended(1), Result(200, "fine"))
    journal.hold(Settled([3], RunState.FINISHED, RunState.DEAD, told.append))
    journal.learn("dialect", "wrapper")
    assert journal.has(4) and not journal.state(4) and waiting(journal) == [3]
    assert journal.fact("dialect") == "wrapper"
    assert outside(file, query) == before
    assert outside(file, "SELECT * FROM facts WHERE name = 'dialect'") == []
    journal.commit()
    assert told == [], "who waits is told by `publish`, after all that goes first"
    assert outside(file, query) == [
        (1, "finished"),
        (2, "running"),
        (3, "dead"),
        (4, "accepted"),
        (5, "accepted"),
    ]
    assert outside(file, "SELECT * FROM facts WHERE name = 'dialect'") == [("dialect", "wrapper")]
    assert journal.state(4) and waiting(journal) == [1]
    journal.publish()
    assert told == [Settled([3], RunState.FINISHED, RunState.DEAD, told.append), "results"]
    journal.publish()
    assert len(told) == 2


def test_of_equal_triggers_one_is_new(journal):
    found = accept(journal, *(trigger(1, param=str(i)) for i in range(32)))
    assert found == [True] + [False] * 31
    assert [row.trigger.param for row in journal.unfinished()] == ["0"]


def test_a_batch_that_is_taken_back_leaves_nothing_but_what_has_happened(journal, file):
    accept(journal, trigger(1), trigger(2), trigger(3), trigger(4))
    start(journal, 2)
    finish(journal, 3)
    told = []
    journal.finish(ended(4), Result(200, "fine"))
    journal.hold(Settled([3], RunState.FINISHED, RunState.ACKNOWLEDGED, told.append))
    journal.hold(Note("dialect", "wrapper"))
    journal.begin()
    assert journal.accept(trigger(5))
    journal.start(1)
    journal.restart(trigger(2))
    journal.take_back()
    journal.publish()
    assert not journal.state(5) and told == []
    assert [(row.trigger.log_id, row.state, row.starts) for row in journal.unfinished()] == [
        (1, RunState.ACCEPTED, 0),
        (2, RunState.RUNNING, 1),
        (4, RunState.ACCEPTED, 0),
    ]
    assert waiting(journal) == [3]
    assert journal.counts() == {"undelivered": 2, "held": 1, "dead": 0} and journal.has_unstored()
    assert accept(journal, trigger(5)) is True
    assert waiting(journal) == [4] and [message.log_ids for message in told] == [[3]]
    assert (
        journal.counts() == {"undelivered": 1, "held": 0, "dead": 0} and not journal.has_unstored()
    )
    assert outside(file, "SELECT state FROM runs WHERE log_id = 3") == [("acknowledged",)]
    assert outside(file, "SELECT value FROM facts WHERE name = 'dialect'") == [("wrapper",)]


def test_who_reads_does_not_wait_for_who_writes(journal):
    accept(journal, trigger(1))
    finish(journal, 1)
    found = []

    def read():
        found.append(
            (waiting(journal), journal.state(1) is not None, journal.counts()["undelivered"])
        )
        found.append((journal.fact("dialect"), journal.oldest() > 0, journal.unfinished()))

    journal.begin()
    journal.accept(trigger(2))
    reader = threading.Thread(target=read)
    reader.start()
    reader.join(30)  # the transaction goes on as long
    assert found == [([1], True, 1), ("", True, [])]
    journal.commit()


# -- failures


@contextlib.contextmanager
def failing(file, *kinds):
    """Let every INSERT, UPDATE or DELETE of a run fail, as a full disk does."""
    for kind in kinds:
        outside(
            file,
            f"CREATE TRIGGER full_{kind} BEFORE {kind} ON runs BEGIN SELECT RAISE(ABORT, 'the disk"
            " is full'); END",
        )
    yield
    for kind in kinds:
        outside(file, f"DROP TRIGGER full_{kind}")


@contextlib.contextmanager
def no_file_above(size):
    """What SQLite gets of a disk that takes no more: an error as it commits, for that is when it
    writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_accept_that_cannot_be_stored_raises(journal, file):
    accept(journal, trigger(1))
    with failing(file, "INSERT"):
        for wanted in ([trigger(2)], [trigger(i) for i in range(10, 20)], [trigger(2)]):
            with pytest.raises(JournalError) as caught:
                accept(journal, *wanted)
            assert str(caught.value) == f"{file}: the disk is full"
    assert [row.trigger.log_id for row in journal.unfinished()] == [1]
    assert accept(journal, trigger(2)) is True


def test_a_full_disk_refuses_triggers_and_holds_results(journal, file, tmp_path, caplog):
    """The real thing: the files may not grow, nor can the reserve be made again."""
    accept(journal, trigger(1))
    with no_file_above(64 << 10):
        # The first is refused when its commit is tried again: what the reserve freed is for
        # results.
        for wanted in (trigger(2, param="x" * 100_000), trigger(3)):
            with pytest.raises(Refused) as refused:
                accept(journal, wanted)
            assert str(refused.value) == (
                f"the executor cannot store the trigger: {file}: the disk is full"
            )
            assert refused.value.reason == "journal"
            assert (
                journal.reserve.lost
                and not (tmp_path / "reserve").exists()
                and journal.has_unstored()
            )
        journal.finish(ended(1), Result(200, "y" * 100_000))
        with pytest.raises(JournalError) as caught:
            turn(journal)
        assert str(caught.value) == f"{file}: disk I/O error"
        assert not tolerant(journal) and waiting(journal) == []
        assert journal.counts() == {"undelivered": 1, "held": 1, "dead": 0}
    assert tolerant(journal) and not journal.reserve.lost and not journal.has_unstored()
    assert (tmp_path / "reserve").stat().st_size == 4 << 20
    assert [row[:4] for row in journal.undelivered(10)] == [(1, NOW, 200, "y" * 100_000)]
    assert not journal.state(2) and not journal.state(3)
    assert accept(journal, trigger(2, param="x" * 100_000)) is True
    assert [record.getMessage() for record in caplog.records] == [
        f"the disk is full: the reserve {tmp_path}/reserve of 4 MiB is given up for results;"
        " triggers are refused and output of jobs is dropped until there is space",
        f"cannot store results, holding them until it works again: {file}: disk I/O error",
    ]


def test_a_commit_that_failed_leaves_nothing_to_come_back(journal, file, tmp_path):
    """What it wrote may be whole nevertheless, and would count after a crash."""
    accept(journal, trigger(1))
    os.unlink(tmp_path / "reserve")  # with it the commit would be tried again
    for number in range(2):
        with no_file_above(64 << 10), pytest.raises(JournalError) as caught:
            accept(journal, trigger(2, param="x" * 100_000))
        assert str(caught.value) == f"{file}: disk I/O error"
        assert not journal.has_unstored() and not journal.state(2)
        crashed = tmp_path / f"crashed{number}"
        crashed.mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(file + suffix, crashed)
        with contextlib.closing(Journal(str(crashed / "journal.db"))) as found:
            assert found.state(1) and not found.state(2)
    assert accept(journal, trigger(3)) is True
    assert [row.trigger.log_id for row in journal.unfinished()] == [1, 3]


def test_the_reserve_is_what_lets_results_be_stored(journal):
    """A file in its place holds the space; once it is given up the same commit is tried again."""
    accept(journal, trigger(1), trigger(2))
    tried = []

    def decide():
        tried.append(journal.reserve.lost)
        if not journal.reserve.lost:
            raise sqlite3.OperationalError("database or disk is full")

    journal.finish(ended(1), Result(200, "fine"))
    turn(journal, decide)
    assert tried == [False, True] and waiting(journal) == [1]


def test_a_commit_that_was_stored_ends_what_a_failed_one_left(journal, file, tmp_path):
    """It lies where the other lay."""
    accept(journal, trigger(1))
    os.unlink(tmp_path / "reserve")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT log_id FROM runs").fetchall() == [(1,)]
        with no_file_above(64 << 10), pytest.raises(JournalError):
            accept(journal, trigger(2, param="x" * 100_000))
        finish(journal, 1)
        assert waiting(journal) == [1] and not journal.has_unstored()
        assert accept(journal, trigger(3)) is True


def test_a_trigger_is_refused_where_the_files_were_removed(journal, file, caplog):
    """They are made anew with all that was in them; the admin sends the trigger again or
    elsewhere."""
    accept(journal, trigger(1))
    finish(journal, 1)
    accept(journal, trigger(2))
    for suffix in ("", "-wal", "-shm"):
        os.unlink(file + suffix)
    journal.finish(ended(2), Result(200, "held meanwhile"))
    with pytest.raises(Refused) as caught:
        accept(journal, trigger(3))
    assert str(caught.value) == (
        f"the executor cannot store the trigger: {file}: its files were removed or replaced while"
        " it was open: try again"
    )
    assert caught.value.reason == "journal"
    assert [row[::3][:2] for row in journal.undelivered(10)] == [
        (1, "fine"),
        (2, "held meanwhile"),
    ]
    assert accept(journal, trigger(3)) is True and not journal.state(4)
    assert outside(file, "SELECT log_id FROM runs ORDER BY log_id") == [(1,), (2,), (3,)]
    assert [record.getMessage() for record in caplog.records] == [
        f"the files of the journal {file} were removed: made anew, all is there"
    ]


def test_results_that_cannot_be_stored_are_held(journal, file, caplog):
    accept(journal, *map(trigger, (1, 2, 3, 4)))
    finish(journal, 1)
    told = []
    with failing(file, "UPDATE"):
        journal.finish(ended(2), Result(200, "two"))
        assert not tolerant(journal)
        journal.finish(ended(3, 4), Result(500, "three and four"))
        assert not tolerant(journal)
        assert waiting(journal) == [1]
        assert journal.counts() == {"undelivered": 4, "held": 3, "dead": 0}
        assert not tolerant(journal)
        with pytest.raises(JournalError) as caught:
            settle(journal, [1], RunState.ACKNOWLEDGED, stored=told.append)
        assert str(caught.value) == f"{file}: the disk is full"
        assert told == []
    assert waiting(journal) == [1] and journal.has_unstored()
    journal.on_results = lambda: told.append("results")
    assert tolerant(journal)
    assert [row[0::3][:2] for row in journal.undelivered(10)] == [
        (2, "two"),
        (3, "three and four"),
        (4, "three and four"),
    ]
    assert journal.counts() == {"undelivered": 3, "held": 0, "dead": 0}
    assert [getattr(entry, "log_ids", entry) for entry in told] == [[1], "results"]
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot store results, holding them until it works again: {file}: the disk is full"
    ]
    assert tolerant(journal)  # nothing is held any more
    assert waiting(journal) == [2, 3, 4] and len(told) == 2


def test_an_outage_is_told_once_and_the_next_one_again(journal, file, caplog):
    caplog.set_level("INFO")
    accept(journal, *map(trigger, range(1, 5)))
    for first in (1, 3):
        with failing(file, "UPDATE"):
            for log_id in (first, first + 1):
                journal.finish(ended(log_id), Result(200, "fine"))
                assert not tolerant(journal)
        assert tolerant(journal)
    told = f"cannot store results, holding them until it works again: {file}: the disk is full"
    assert [record.getMessage() for record in caplog.records] == [
        told,
        "stored 2 held results",
    ] * 2


def test_what_is_held_is_stored_at_the_end(file):
    """Without a core, as it has ended before."""
    with contextlib.closing(Journal(file)) as journal:
        accept(journal, trigger(1), trigger(2))
        finish(journal, 1)
        journal.finish(ended(2), Result(500, "two"))
        journal.hold(Settled([1], RunState.FINISHED, RunState.ACKNOWLEDGED, lambda message: None))
        journal.learn("dialect", "wrapper")
    with contextlib.closing(Journal(file)) as journal:
        assert waiting(journal) == [2] and journal.fact("dialect") == "wrapper"


def test_a_file_that_cannot_be_opened_is_not_taken_for_broken(tmp_path):
    file = tmp_path / "none" / "journal.db"
    with pytest.raises(ExecutorError) as caught:
        Journal(str(file))
    assert str(caught.value) == f"{file}: cannot be opened: No such file or directory"


def many_rows(file):
    with contextlib.closing(Journal(file)) as journal:
        accept(journal, *map(trigger, range(50)))
        with contextlib.closing(sqlite3.connect(file)) as db, db:
            db.executemany(
                "INSERT INTO runs (log_id, log_date_time, state, accepted, trigger) VALUES (?, ?,"
                " 'accepted', 1, ?)",
                ((i, NOW, "x" * 300) for i in range(1000, 5000)),
            )


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
        assert journal.unfinished() == [] and accept(journal, trigger(1)) is True
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
        assert accept(journal, trigger(1)) is True
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
    return outside(str(daemon.data / "journal.db"), statement, *values)


def said(daemon, *arguments):
    """What a command says, which succeeds, or fails for there is no executor that runs."""
    command = command_line("-c", str(daemon.file), *arguments)
    found = subprocess.run(command, text=True, capture_output=True, timeout=30)
    gone = arguments[0] == "status" and daemon.process.poll() is not None
    assert (found.returncode, found.stderr) == (int(gone), ""), found
    return found.stdout


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
    assert found[gone]["handleMsg"] == (
        'job handler "again" was removed or disabled before the run started'
    )
    assert slow.quick.read_text().split() == [str(young)]
    unfinished = "SELECT count(*) FROM runs WHERE state IN ('accepted', 'running')"
    assert edit(slow, unfinished) == [(0,)]


def test_a_disabled_job_does_not_start_again(slow, admin):
    """enabled: false while the executor is down: neither what ran, which on_crash would have run
    again, nor what waited is started."""
    log_ids = [admin.trigger(slow.url, "again")[0] for _ in range(2)]
    starts_of(slow)
    slow.kill()
    config = slow.file.read_text()
    slow.file.write_text(config.replace("  again:\n", "  again:\n    enabled: false\n"))
    slow.start()
    assert [result_of(admin, log_id)["handleMsg"] for log_id in log_ids] == [
        "executor restarted while the job ran, its outcome is unknown",
        'job handler "again" was removed or disabled before the run started',
    ]
    run_job(slow, admin, "quick")
    starts_of(slow)


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


# -- texts that are not UTF-8


@pytest.fixture
def foreign(tmp_path):
    """A directory whose name is of another encoding."""
    place = tmp_path / os.fsdecode("中文".encode("gbk"))
    place.mkdir()
    return place


def test_a_result_that_is_not_utf8_is_stored(executor, admin, foreign, tmp_path):
    """It names the file of the journal, whose path is not UTF-8: it arrives with ? in place of what
    cannot be stored, and holds up nothing that comes later."""
    go = tmp_path / "go"
    job = {"shell": f"until [ -e {go} ]; do sleep 0.02; done; echo done"}
    daemon = executor({"job": job}, admin=admin, directory=foreign)
    first, _ = admin.trigger(daemon.url, "job")
    behind, _ = admin.trigger(daemon.url, "job")
    wait_until(lambda: daemon.status()["running"], what="the start of the run")
    edit(
        daemon,
        "CREATE TRIGGER full BEFORE UPDATE OF state ON runs WHEN NEW.state = 'running' BEGIN SELECT"
        " RAISE(ABORT, 'the disk is full'); END",
    )
    go.touch()
    shown = str(daemon.data / "journal.db").encode("utf-8", "replace").decode()
    assert [result_of(admin, log_id)["handleMsg"] for log_id in (first, behind)] == [
        "done",
        f"not started, the executor cannot store the start: {shown}: the disk is full",
    ]
    edit(daemon, "DROP TRIGGER full")
    assert run_job(daemon, admin, "job")[1]["handleMsg"] == "done"


def test_a_handler_that_is_not_utf8_is_told_of(executor, admin):
    """A script with such a name was accepted by an earlier executor, and is gone: its result comes,
    and that of the next run too."""
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin, start=False)
    daemon.data.mkdir()
    handler, now = os.fsdecode("caf\xe9.sh".encode("latin-1")), int(time.time() * 1000)
    with contextlib.closing(Journal(str(daemon.data / "journal.db"))) as journal:
        accept(journal, Trigger(1, 1, handler, log_date_time=now))
    daemon.start()
    told = 'job handler "caf?.sh" was removed or disabled before the run started'
    assert result_of(admin, 1)["handleMsg"] == told
    assert run_job(daemon, admin, "hello")[1]["handleMsg"] == "hello"


def test_a_data_dir_that_is_not_utf8_is_read_and_pruned(executor, admin, foreign):
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin, directory=foreign)
    log_id, _ = run_job(daemon, admin, "hello")
    assert str(log_id) in said(daemon, "runs")
    assert daemon.stop() == 0
    edit(daemon, "UPDATE runs SET state = 'delivered', finished = 0 WHERE log_id = ?", log_id)
    daemon.start()
    wait_until(lambda: "pruned 0 logs and 1 run\n" in daemon.log, what="the end of the old run")
    assert str(log_id) not in said(daemon, "runs")


# -- what the review of the queries showed


def test_no_query_of_the_daily_work_reads_delivered_runs(connections, file):
    """They stay for a day, and there may be millions of them."""
    asked = []
    with contextlib.closing(Journal(file)) as journal:
        journal.post = lambda message: message.done(turn(journal, message.work))
        for db in of_file(connections, file):
            db.set_trace_callback(asked.append)
        journal.undelivered(10), journal.oldest(), journal.unfinished(), journal.prune()
        journal.acknowledged(RunState.ACKNOWLEDGED, 0.0, 1.0, 10)
        for db in of_file(connections, file):
            db.set_trace_callback(None)
        asked = [query for query in asked if "FROM runs" in query]
        assert len(asked) == 9
        for query in asked:
            plan = " ".join(row[3] for row in outside(file, "EXPLAIN QUERY PLAN " + query))
            assert "SCAN runs" not in plan or re.search("USING (COVERING )?INDEX", plan), (
                query,
                plan,
            )


def test_the_file_is_not_for_everybody(journal, file):
    accept(journal, trigger(1))
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


def test_facts_that_are_no_text_are_left_out(file):
    """One flipped bit makes a text a BLOB, which SQLite's own check does not mind."""
    with contextlib.closing(Journal(file)) as journal:
        journal.learn("dialect", "array")
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.execute("INSERT INTO facts VALUES (x'01', 'one'), (NULL, 'two'), ('three', x'02')")
        db.commit()
    with contextlib.closing(Journal(file)) as journal:
        assert journal.fact("dialect") == "array" and journal.fact("three") == ""
        assert journal.unfinished() == []
        journal.forget_dropped()


@pytest.mark.parametrize("column", ["message", "code", "log_date_time", "finished"])
def test_a_value_of_another_type_holds_up_no_other_result(executor, admin, column):
    """One flipped bit makes a text or a number a BLOB: the results of the other runs are delivered,
    and what looks at the journal shows them."""
    hold = (503, b"")
    admin.behave = lambda path, body: hold if path.endswith("/callback") else None
    daemon = executor({"bad": {"shell": "echo why; exit 3"}}, admin=admin)
    log_ids = [admin.trigger(daemon.url, "bad", jobId=number)[0] for number in (1, 2, 3)]
    wait_until(lambda: daemon.status()["undelivered"] == 3, what="the results")
    daemon.kill()
    first, damaged, last = log_ids
    edit(
        daemon,
        f"UPDATE runs SET {column} = CAST({column} AS BLOB) WHERE log_id = ?",
        damaged,
    )
    for arguments in (["runs"], ["runs", "--json"], ["runs", "--failed"], ["status"]):
        found = said(daemon, *arguments)
        assert all(str(log_id) in found for log_id in (first, last)) or arguments == ["status"]
    admin.behave = lambda path, body: None
    daemon.start()
    for log_id in (first, last):
        item = result_of(admin, log_id)
        assert (item["handleCode"], item["handleMsg"]) == (500, "exit status 3: why")
    later, _ = run_job(daemon, admin, "bad")
    assert str(later) in said(daemon, "runs")
    assert said(daemon, "status").splitlines()[0].endswith("  registered")
    wait_until(lambda: daemon.status()["recent"]["bad"][-1:] == [500], what="the last results")


@pytest.mark.parametrize("state", ["running", "accepted"])
def test_runs_of_another_age_are_shown(executor, admin, tmp_path, state):
    """A time of the clock that a flipped bit made enormous: `runs` shows the run, and the next life
    gives it its result."""
    go = tmp_path / "go"
    job = {"shell": f"until [ -e {go} ]; do sleep 0.02; done"}
    daemon = executor({"job": job}, admin=admin)
    running, _ = admin.trigger(daemon.url, "job")
    wait_until(lambda: daemon.status()["running"], what="the start of the run")
    waiting, _ = admin.trigger(daemon.url, "job")
    wait_until(lambda: daemon.status()["queued"] == {"job": 1})
    daemon.kill()
    go.touch()  # what was started lives on
    log_id = running if state == "running" else waiting
    edit(daemon, "UPDATE runs SET finished = 1e300 WHERE log_id = ?", log_id)
    for arguments in (["runs"], ["runs", "--json"]):
        found = said(daemon, *arguments)
        assert str(running) in found and str(waiting) in found
    daemon.start()
    for one in (running, waiting):
        result_of(admin, one)
