"""What was decided is stored before anybody learns of it, what could not be stored never was, and
what the admin acknowledged is sent again, for it may have lost it."""

import contextlib
import http.client
import json
import re
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, launch, result_of, wait_until
from tools import Ledger, items_of, run_processes, traced

ACKNOWLEDGED = (200, b'{"code":200,"msg":null,"data":null}')
UNAVAILABLE = (503, b"")
KILLED = (500, "killed by the admin")
DROPPED = (500, "killed by the admin before it started")
TOO_SLOW = "the executor could not store this within 2.5 s: its disk is too slow"
LATE = (500, "refused: it could not be stored in time")
# It ends by SIGKILL only, and says so before anybody may rely on it.
STUBBORN = "trap '' TERM; echo > \"$READY\"; exec sleep 600"


def stored(daemon, query, *values):
    """Rows of the journal, which is only read."""
    with contextlib.closing(
        sqlite3.connect(f"file:{daemon.data}/journal.db?mode=ro", uri=True)
    ) as db:
        return db.execute(query, values).fetchall()


def states(daemon, log_ids=None):
    """The states in the journal, by logId."""
    found = dict(stored(daemon, "SELECT log_id, state FROM runs"))
    return found if log_ids is None else {log_id: found.get(log_id) for log_id in log_ids}


def tampered(daemon, how):
    """What the threads that the daemon has now ask of its disk fails or takes longer: `how` is a
    fault of strace's, such as error=EIO. Its children are not traced."""
    calls = "fdatasync,fsync"
    tasks = [task.name for task in Path(f"/proc/{daemon.process.pid}/task").iterdir()]
    return traced(
        daemon, tasks, "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={calls}:{how}"
    )


@contextlib.contextmanager
def concurrently(work):
    """`work()` in a thread, which has ended at the end; yields where its value will be."""
    value = []
    thread = threading.Thread(target=lambda: value.append(work()))
    thread.start()
    try:
        yield value
    finally:
        thread.join()


def hold_results(admin):
    """No result arrives until `admin.behave` is set anew."""
    admin.behave = lambda path, body: UNAVAILABLE if path.endswith("/callback") else None


def deliver_results(admin):
    admin.behave = lambda path, body: None


def outcome(admin, log_id, seconds=30):
    """(code, message) of the result of `log_id`; waits for it."""
    item = result_of(admin, log_id, seconds)
    return item["handleCode"], item["handleMsg"]


def callbacks(admin):
    """The logIds of each callback request so far, in their order."""
    found = []
    for path, _, body in list(admin.requests):
        if path.endswith("/callback"):
            found.append([item["logId"] for item in items_of(body)])
    return found


def trigger(log_id, job_id=1, handler="job", **fields):
    """The body of a request."""
    return {
        "jobId": job_id,
        "logId": log_id,
        "executorHandler": handler,
        "glueType": "BEAN",
        "executorBlockStrategy": "SERIAL_EXECUTION",
        "logDateTime": int(time.time() * 1000),
        **fields,
    }


def fill_lane(daemon, first, count, job_id=1, handler="job"):
    """Trigger `count` runs of a job over a few connections that live on, all accepted; their
    logIds begin with `first`."""
    connections = [http.client.HTTPConnection("127.0.0.1", daemon.port, 30) for _ in range(16)]
    try:
        for start in range(first, first + count, len(connections)):
            busy = connections[: first + count - start]
            for log_id, connection in enumerate(busy, start):
                body = trigger(log_id, job_id, handler)
                connection.request("POST", "/trigger", json.dumps(body))
            for connection in busy:
                reply = json.loads(connection.getresponse().read())
                assert reply["code"] == 200, reply
    finally:
        for connection in connections:
            connection.close()
    return range(first, first + count)


# -- a cancellation is committed before it is answered or carried out


@pytest.mark.parametrize("on_crash", ["fail", "rerun"])
@pytest.mark.parametrize("how", ["kill", "cover", "timeout"])
def test_a_cancellation_survives_a_crash(executor, admin, tmp_path, how, on_crash):
    """Killed while it ends a run, the executor knows at its next start why it did so: that is the
    result, and the run is not started again."""
    ledger, ready = Ledger(admin, tmp_path), tmp_path / "ready"
    stubborn = ledger.job(STUBBORN, kill_grace="20s", on_crash=on_crash)
    stubborn["env"]["READY"] = str(ready)
    daemon = executor({"job": stubborn, "next": ledger.job()}, admin=admin)
    # A second would be over before the trap is set.
    limit = {"executorTimeout": 3} if how == "timeout" else {}
    log_id = ledger.trigger(daemon, **limit)
    wait_until(ready.exists)
    covering = None
    if how == "kill":
        assert daemon.post("/kill", {"jobId": 1}) == {
            "code": 200,
            "msg": "killed 1 running, dropped 0 waiting",
            "data": None,
            "content": None,
        }
        expected = KILLED
    elif how == "cover":
        covering = ledger.trigger(daemon, "next", executorBlockStrategy="COVER_EARLY")
        assert covering in ledger.accepted
        expected = (500, f"covered by run {covering}")
    else:
        query = "SELECT state, code FROM runs WHERE log_id = ?"
        wait_until(lambda: stored(daemon, query, log_id) == [("running", 502)], 20, "the timeout")
        expected = (502, "timed out after 3 s")
    assert states(daemon)[log_id] == "running" and log_id not in admin.results
    assert run_processes(daemon), "the run has ended, so nothing is at stake"
    daemon.kill()
    daemon.start()
    assert outcome(admin, log_id) == expected
    ledger.settle(daemon)
    assert ledger.started() == [log_id] + [covering] * (how == "cover")


@pytest.mark.parametrize("how", ["kill", "cover"])
def test_what_was_dropped_stays_dropped_after_a_crash(executor, admin, tmp_path, how):
    """Whatever the answer says is committed: a crash right after it starts none of the runs that
    waited."""
    ledger, ready = Ledger(admin, tmp_path), tmp_path / "ready"
    stubborn = ledger.job(STUBBORN, kill_grace="20s", on_crash="rerun")
    stubborn["env"]["READY"] = str(ready)
    daemon = executor({"job": stubborn, "next": ledger.job()}, admin=admin)
    hold_results(admin)
    running = ledger.trigger(daemon)
    wait_until(ready.exists)
    waiting = fill_lane(daemon, running + 1000, 50)
    ledger.accepted.update(waiting)
    covering = None
    if how == "kill":
        assert daemon.post("/kill", {"jobId": 1})["msg"] == "killed 1 running, dropped 50 waiting"
    else:
        covering = ledger.trigger(daemon, "next", executorBlockStrategy="COVER_EARLY")
        assert covering in ledger.accepted
    daemon.kill()
    assert not admin.results
    deliver_results(admin)
    daemon.start()
    covered = (500, f"covered by run {covering}")
    assert outcome(admin, running) == (KILLED if how == "kill" else covered)
    for log_id in waiting:
        assert outcome(admin, log_id) == (DROPPED if how == "kill" else covered)
    ledger.settle(daemon)
    assert ledger.started() == [running] + [covering] * (how == "cover")


# -- what could not be committed has no effect


def cannot_store(daemon, what="trigger"):
    """What is answered: an I/O error may be for want of space, so that is what it is taken for."""
    start = f"the executor cannot store the {what}: {daemon.data}/journal.db: "
    return {start + "disk I/O error", start + "the disk is full"}


def quiet(daemon):
    """Wait until the journal has all that is known, so that the next commit is the one that
    fails."""
    wait_until(lambda: daemon.status()["registered"], 10, "the registration")
    wait_until(lambda: set(states(daemon).values()) <= {"acknowledged"}, 10, "a quiet journal")


@pytest.mark.parametrize("known", [True, False])
def test_a_trigger_that_was_not_stored_does_not_return(executor, admin, tmp_path, known):
    """The disk fails as a trigger is committed: it is refused, and a crash brings nothing of it
    back. `known`: nothing else is to be committed with it."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    if known:
        ledger.trigger(daemon)
        ledger.settle(daemon)
    before = ledger.started()
    quiet(daemon)
    with tampered(daemon, "error=EIO"):
        log_id = ledger.trigger(daemon, jobId=2)
        assert ledger.refused[log_id] in cannot_store(daemon)
        daemon.kill()
    daemon.start()
    assert log_id not in states(daemon)
    after = ledger.trigger(daemon)
    ledger.settle(daemon)
    assert ledger.started() == [*before, after] and set(admin.results) == {*before, after}


def test_a_trigger_that_was_not_stored_can_come_again(executor, admin, tmp_path):
    """The disk works again: the same logId is accepted, and runs once, also after a crash."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    quiet(daemon)
    with tampered(daemon, "error=EIO"):
        log_id = ledger.trigger(daemon)
        assert ledger.refused[log_id] in cannot_store(daemon)
        assert daemon.post("/beat")["code"] == 200
    assert not ledger.accepted
    wait_until(
        lambda: ledger.trigger(daemon, logId=log_id) in ledger.accepted, 20, "an accepted trigger"
    )
    assert outcome(admin, log_id) == (200, "")
    ledger.settle(daemon)
    daemon.kill()
    daemon.start()
    ledger.trigger(daemon, jobId=2)
    ledger.settle(daemon)
    assert ledger.started().count(log_id) == 1


def test_a_kill_that_was_not_stored_ends_nothing(executor, admin, tmp_path):
    """The disk fails as a kill is committed: it is refused, what runs goes on and what waits still
    waits; a crash does not carry it out either."""
    ledger, go = Ledger(admin, tmp_path), tmp_path / "go"
    job = ledger.job('until [ -e "$GO" ]; do sleep 0.05; done; echo done')
    job["env"]["GO"] = str(go)
    daemon = executor({"job": job}, admin=admin)
    running = [ledger.trigger(daemon, jobId=number) for number in (1, 2)]
    waiting = [ledger.trigger(daemon, jobId=number) for number in (1, 2)]
    wait_until(lambda: sorted(ledger.started()) == running)
    wait_until(lambda: daemon.status()["registered"], 10, "the registration")
    with tampered(daemon, "error=EIO"):
        reply = daemon.post("/kill", {"jobId": 1})
        assert reply["code"] == 500 and reply["msg"] in cannot_store(daemon, "kill")
        assert daemon.status()["queued"] == {"job": 2} and len(run_processes(daemon)) >= 2
        daemon.kill()
    go.touch()
    daemon.start()
    unknown = (500, "executor restarted while the job ran, its outcome is unknown")
    assert [outcome(admin, log_id) for log_id in running] == [unknown] * 2
    assert [outcome(admin, log_id) for log_id in waiting] == [(200, "done")] * 2
    ledger.settle(daemon)


# -- many that wait


@pytest.mark.parametrize("how", ["kill", "cover"])
def test_ten_thousand_are_dropped_at_once(executor, admin, tmp_path, how):
    """/kill and COVER_EARLY of a job with 10,000 runs that wait are answered soon, and the admin
    gets a result of each."""
    ledger, count = Ledger(admin, tmp_path), 10_000
    daemon = executor(
        {
            "job": ledger.job("exec sleep 600", queue_limit=count + 10),
            "next": ledger.job(queue_limit=count + 10),
        },
        admin=admin,
        executor={"max_queued": count + 10},
    )
    running = ledger.trigger(daemon)
    wait_until(lambda: ledger.started() == [running])
    waiting = fill_lane(daemon, running + 1000, count)
    ledger.accepted.update(waiting)
    assert daemon.status()["queued"] == {"job": count}
    began = time.monotonic()
    covering = None
    if how == "kill":
        assert daemon.post("/kill", {"jobId": 1})["msg"] == (
            f"killed 1 running, dropped {count} waiting"
        )
    else:
        covering = ledger.trigger(daemon, "next", executorBlockStrategy="COVER_EARLY")
        assert covering in ledger.accepted
    took = time.monotonic() - began
    print(f"{how}: answered after {took:.3f} s")
    assert took < 2
    ledger.settle(daemon, 120)
    covered = (500, f"covered by run {covering}")
    assert outcome(admin, running) == (KILLED if how == "kill" else covered)
    assert {outcome(admin, log_id) for log_id in waiting} == {DROPPED if how == "kill" else covered}
    assert ledger.started() == [running] + [covering] * (how == "cover")


@pytest.mark.parametrize("passage", [1, 4])
def test_what_was_dropped_is_dropped_after_a_crash_too(executor, admin, tmp_path, passage):
    """A kill -9 when 1,000 that waited are dropped, and when only some of them are finished: none
    of them runs, and the admin gets a result of each."""
    ledger, count = Ledger(admin, tmp_path), 1000
    daemon = executor(
        {"job": ledger.job("exec sleep 600", queue_limit=count)},
        admin=admin,
        env={"XXL_EXECUTOR_FAILPOINT": f"dropped:{passage}"},
    )
    running = ledger.trigger(daemon)
    wait_until(lambda: ledger.started() == [running])
    waiting = fill_lane(daemon, running + 1000, count)
    ledger.accepted.update(waiting)
    with contextlib.suppress(OSError):  # the answer, or the crash that comes right after it
        assert daemon.post("/kill", {"jobId": 1})["code"] == 200
    assert daemon.wait() == -signal.SIGKILL
    dropped = set(map(states(daemon).get, waiting))
    assert "accepted" in dropped and (len(dropped) == 1) == (passage == 1)
    daemon.env.pop("XXL_EXECUTOR_FAILPOINT")
    daemon.start()
    ledger.settle(daemon, 60)
    assert outcome(admin, running) == KILLED
    assert {outcome(admin, log_id) for log_id in waiting} == {DROPPED}
    assert ledger.started() == [running]
    assert not stored(daemon, "SELECT * FROM facts WHERE name LIKE 'dropped%'")


# -- a single statement that fails


@contextlib.contextmanager
def failing(daemon, when):
    """Each statement fails that does `when`, such as "INSERT ON facts"; all others work."""
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db", timeout=20)) as db:
        db.execute(f"CREATE TRIGGER fails BEFORE {when} BEGIN SELECT RAISE(ABORT, 'fails'); END")
        db.commit()
        yield
        db.execute("DROP TRIGGER fails")
        db.commit()


def test_a_drop_that_cannot_be_written_drops_nothing(executor, admin, tmp_path):
    """The statement that notes very many as dropped fails, not the commit: the kill is refused, and
    all still wait; the next kill drops them."""
    ledger, count = Ledger(admin, tmp_path), 300
    daemon = executor({"job": ledger.job("exec sleep 600")}, admin=admin)
    running = ledger.trigger(daemon)
    wait_until(lambda: ledger.started() == [running])
    waiting = fill_lane(daemon, running + 1000, count)
    ledger.accepted.update(waiting)
    with failing(daemon, "INSERT ON facts WHEN NEW.name LIKE 'dropped%'"):
        reply = daemon.post("/kill", {"jobId": 1})
        assert reply["code"] == 500 and "cannot store the kill" in reply["msg"], reply
        assert daemon.status()["queued"] == {"job": count}
    reply = daemon.post("/kill", {"jobId": 1})
    assert reply["msg"] == f"killed 1 running, dropped {count} waiting"
    ledger.settle(daemon, 60)
    assert {outcome(admin, log_id) for log_id in waiting} == {DROPPED}
    assert ledger.started() == [running]


def test_a_repeated_trigger_is_known_while_nothing_can_be_stored(executor, admin, tmp_path):
    """The caller lost the answer, and asks again when the journal cannot store: the run was
    accepted, though it has ended since, and does not start again."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    known = ledger.trigger(daemon)
    ledger.settle(daemon)
    with failing(daemon, "INSERT ON runs"):
        assert ledger.trigger(daemon) in ledger.refused
        assert ledger.trigger(daemon, logId=known) not in ledger.refused
    after = ledger.trigger(daemon)
    ledger.settle(daemon)
    assert ledger.started() == [known, after]


def test_a_lane_that_was_killed_is_not_taken_for_its_successor(executor, admin, tmp_path):
    """A job is killed while it waits for a slot, and triggered anew; then its start cannot be
    stored. That run fails, and later ones of the job still run one at a time."""
    ledger, go = Ledger(admin, tmp_path), tmp_path / "go"
    waits = ledger.job(f"until [ -e {go} ]; do sleep 0.05; done")
    daemon = executor(
        {"waits": waits, "job": ledger.job("sleep 0.3")}, admin=admin, executor={"max_running": 1}
    )
    first = ledger.trigger(daemon, "waits", jobId=1)
    wait_until(lambda: ledger.started() == [first])
    killed = ledger.trigger(daemon, jobId=2)
    assert daemon.post("/kill", {"jobId": 2})["msg"] == "killed 0 running, dropped 1 waiting"
    again = ledger.trigger(daemon, jobId=2)
    with failing(daemon, "UPDATE OF state ON runs WHEN NEW.state = 'running'"):
        go.touch()
        code, message = outcome(admin, again)
    assert code == 500 and message.startswith("not started, the executor cannot store the start")
    later = [ledger.trigger(daemon, jobId=2) for _ in range(3)]
    wait_until(lambda: daemon.status()["running"])
    while daemon.status()["queued"]:
        assert len(daemon.status()["running"]) <= 1
    ledger.settle(daemon)
    assert outcome(admin, killed) == DROPPED
    assert ledger.started() == [first, *later]
    assert "unexpected error" not in daemon.log


# -- a slow disk


SLOW = "delay_exit=4000000"


def others(daemon, log_id):
    """The seconds that each request takes that decides nothing."""
    date = int(time.time() * 1000)
    asked = {
        "/beat": lambda: daemon.post("/beat")["code"] == 200,
        "/idleBeat": lambda: daemon.post("/idleBeat", {"jobId": 77})["code"] == 200,
        "/log": lambda: "hello" in daemon.page(log_id, date)["logContent"],
        "/health": lambda: daemon.session.get(daemon.url + "/health", timeout=20).ok,
        "/metrics": lambda: (
            "runs_total" in daemon.session.get(daemon.url + "/metrics", timeout=20).text
        ),
        "/status": lambda: daemon.status()["version"] != "",
    }
    took = {}
    for path, ask in asked.items():
        began = time.monotonic()
        assert ask(), path
        took[path] = time.monotonic() - began
    return took


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_slow_disk(executor, admin, tmp_path, end):
    """A trigger that cannot be stored in time is refused and never runs, also after a restart; what
    needs no decision is answered meanwhile."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job("echo hello")}, admin=admin)
    before = ledger.trigger(daemon)
    ledger.settle(daemon)
    quiet(daemon)
    worst = {}
    with tampered(daemon, SLOW):
        with concurrently(lambda: ledger.trigger(daemon)) as late:
            while not late:
                for path, seconds in others(daemon, before).items():
                    worst[path] = max(worst.get(path, 0.0), seconds)
        print("the worst:", {path: round(seconds, 3) for path, seconds in worst.items()})
        assert max(worst.values()) < 1
        [log_id] = late
        assert ledger.refused[log_id] == TOO_SLOW
        assert outcome(admin, log_id, 40) == LATE
    assert daemon.post("/beat")["code"] == 200
    daemon.stop() if end == "stop" else daemon.kill()
    daemon.start()
    after = ledger.trigger(daemon)
    ledger.settle(daemon)
    assert ledger.started() == [before, after]


def test_what_was_dropped_is_delivered_before_the_end(executor, admin, tmp_path):
    """A stop right after 1,000 were dropped, on a disk that takes a while for each commit: the admin
    has every result when the executor has ended."""
    ledger, count = Ledger(admin, tmp_path), 1000
    daemon = executor({"job": ledger.job("exec sleep 600", queue_limit=count)}, admin=admin)
    running = ledger.trigger(daemon)
    wait_until(lambda: ledger.started() == [running])
    waiting = fill_lane(daemon, running + 1000, count)
    wait_until(lambda: daemon.status()["registered"], 10, "the registration")
    with tampered(daemon, "delay_exit=200000"):
        assert daemon.post("/kill", {"jobId": 1})["code"] == 200
        assert daemon.stop() == 0
    assert set(waiting) <= set(admin.results) and "every result is delivered" in daemon.log


def test_a_stop_on_a_disk_that_does_not_answer(executor, admin, tmp_path):
    """The core cannot store the last in time: nobody else writes with its connection, what it
    decided is whole or not there, and the next start reports the rest."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    ledger.trigger(daemon)
    ledger.settle(daemon)
    wait_until(lambda: daemon.status()["registered"], 10, "the registration")
    with tampered(daemon, "delay_exit=14000000"):
        with concurrently(lambda: ledger.trigger(daemon)):
            wait_until(lambda: daemon.post("/beat")["code"] == 200)
        assert daemon.stop(60) == 0
    assert "the disk of the journal does not answer" in daemon.log
    assert "transaction" not in daemon.log and "Traceback" not in daemon.log
    daemon.start()
    ledger.trigger(daemon)
    ledger.settle(daemon)
    assert len(ledger.started()) == len(set(ledger.started()))


@pytest.mark.parametrize("param", ["x" * 40_000, "GLUE"], ids=["long", "word"])
def test_a_trigger_that_a_thread_decodes_is_refused_in_time_too(executor, admin, tmp_path, param):
    """A long body is decoded beside the selector: its answer is awaited no longer for that."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    quiet(daemon)
    with tampered(daemon, SLOW):
        log_id = ledger.trigger(daemon, executorParams=param)
        assert ledger.refused[log_id] == TOO_SLOW
    after = ledger.trigger(daemon)
    ledger.settle(daemon)
    assert ledger.started() == [after]


@contextlib.contextmanager
def held_core(daemon, log_id, told=TOO_SLOW):
    """The core commits a trigger of job 9, for as long as the disk takes; what is sent inside waits
    for the next commit. Yields a function that sends one request more, and returns a function that
    reads its answer. `told`: what the trigger is answered."""
    wal = Path(f"{daemon.data}/journal.db-wal")
    with contextlib.ExitStack() as stack:

        def send(path, body):
            connection = http.client.HTTPConnection("127.0.0.1", daemon.port, 30)
            stack.callback(connection.close)
            connection.request("POST", path, json.dumps(body))
            assert daemon.post("/beat")["code"] == 200  # so that it has come before the next one
            return lambda: json.loads(connection.getresponse().read())

        before = wal.stat().st_mtime_ns
        first = send("/trigger", trigger(log_id, 9))
        wait_until(lambda: wal.stat().st_mtime_ns != before, 3, "the first commit")
        yield send
        assert first()["msg"] == told


@pytest.mark.parametrize("after", [0.0, 2.0])
@pytest.mark.parametrize("how", ["kill", "cover"])
def test_what_comes_late_may_be_dropped_in_the_same_commit(executor, admin, tmp_path, how, after):
    """A trigger, and what drops it, wait for one commit: both are refused for the slow disk,
    nothing of them starts, and the executor goes on. `after`: for how many seconds the disk is busy
    when they come; with 0 they are refused before the executor decides them, else afterwards."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin)
    before = ledger.trigger(daemon)
    ledger.settle(daemon)
    quiet(daemon)
    held, dropped, dropping = range(before + 1, before + 4)
    with tampered(daemon, SLOW), held_core(daemon, held) as send:
        then = time.monotonic() + after
        wait_until(lambda: time.monotonic() >= then)
        answers = [send("/trigger", trigger(dropped))]
        if how == "kill":
            answers.append(send("/kill", {"jobId": 1}))
        else:
            covering = trigger(dropping, executorBlockStrategy="COVER_EARLY")
            answers.append(send("/trigger", covering))
        assert [answer()["msg"] for answer in answers] == [TOO_SLOW] * 2
    late = [held, dropped] + [dropping] * (how == "cover")
    last = ledger.trigger(daemon, logId=before + 10)
    assert outcome(admin, last) == (200, "")
    quiet(daemon)
    for log_id in late:  # none, where it was not stored at all
        assert {item["handleCode"] for item in admin.results.get(log_id, [])} <= {500}
    ledger.settle(daemon)
    assert ledger.started() == [before, last]


@pytest.mark.parametrize("how", ["kill", "cover"])
def test_who_has_given_up_decides_nothing(executor, admin, tmp_path, how):
    """A kill or a COVER_EARLY is refused for the slow disk before the executor comes to decide it:
    what runs and what waits goes on."""
    ledger, go = Ledger(admin, tmp_path), tmp_path / "go"
    job = ledger.job('until [ -e "$GO" ]; do sleep 0.05; done; echo done')
    job["env"]["GO"] = str(go)
    daemon = executor({"job": job}, admin=admin)
    running, waiting = ledger.trigger(daemon), ledger.trigger(daemon)
    wait_until(lambda: ledger.started() == [running])
    wait_until(lambda: daemon.status()["registered"], 10, "the registration")
    held, covering = waiting + 1, waiting + 2
    with tampered(daemon, SLOW), held_core(daemon, held) as send:
        if how == "kill":
            answer = send("/kill", {"jobId": 1})
        else:
            answer = send("/trigger", trigger(covering, executorBlockStrategy="COVER_EARLY"))
        assert answer()["msg"] == TOO_SLOW
    assert outcome(admin, held) == LATE
    go.touch()
    assert [outcome(admin, log_id) for log_id in (running, waiting)] == [(200, "done")] * 2
    ledger.settle(daemon)
    assert ledger.started() == [running, waiting]


def test_a_cover_that_is_refused_as_it_is_stored_ends_nothing(executor, admin, tmp_path):
    """It was decided in time, but not stored in time: what runs goes on, unless a kill came in the
    same moment. What it dropped stays dropped, for that is stored."""
    ledger, go = Ledger(admin, tmp_path), tmp_path / "go"
    job = ledger.job('until [ -e "$GO" ]; do sleep 0.05; done; echo done')
    job["env"]["GO"] = str(go)
    # What is sent waits for one commit to be decided, and for another one to be stored.
    daemon = executor({"job": job}, admin=admin, program=LAUNCH, env=launch(PATIENCE=3.0))
    covered, killed, waiting = (ledger.trigger(daemon, jobId=number) for number in (1, 2, 1))
    wait_until(lambda: sorted(ledger.started()) == [covered, killed])
    wait_until(lambda: daemon.status()["registered"], 10, "the registration")
    held, *covering = range(waiting + 1, waiting + 4)
    with tampered(daemon, "delay_exit=2000000"), held_core(daemon, held, None) as send:
        answers = [send("/trigger", trigger(covering[0], 1, executorBlockStrategy="COVER_EARLY"))]
        answers.append(send("/kill", {"jobId": 2}))
        again = trigger(covering[1], 2, executorBlockStrategy="COVER_EARLY")
        answers.append(send("/trigger", again))
        too_slow = TOO_SLOW.replace("2.5 s", "3 s")
        assert [answer()["msg"] for answer in answers] == [too_slow] * 3
    assert [outcome(admin, log_id) for log_id in covering] == [LATE] * 2
    assert outcome(admin, waiting) == (500, f"covered by run {covering[0]}")
    assert outcome(admin, killed) == KILLED
    query = "SELECT state, code, message FROM runs WHERE log_id = ?"
    assert stored(daemon, query, covered) == [("running", None, None)], "as after a crash"
    go.touch()
    assert [outcome(admin, log_id) for log_id in (covered, held)] == [(200, "done")] * 2
    ledger.settle(daemon)
    assert sorted(ledger.started()) == [covered, killed, held]


# -- an acknowledged result is sent again

QUIET = [1.0, 3.0]  # seconds, instead of minutes


def lose_results(admin):
    """The admin acknowledges results and forgets them, as while its database is away."""
    admin.behave = lambda path, body: ACKNOWLEDGED if path.endswith("/callback") else None


def resent(daemon):
    text = daemon.session.get(daemon.url + "/metrics", timeout=20).text
    found = re.search(r"^xxl_executor_results_resent_total (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0


def times(admin, log_id):
    """How often the result of `log_id` has come."""
    return sum(log_ids.count(log_id) for log_ids in callbacks(admin))


def repeating(executor, admin, directory, job="true", after=QUIET):
    """(ledger, daemon): it repeats results after so many seconds; jobs "job" and "endless"."""
    ledger = Ledger(admin, directory)
    jobs = {"job": ledger.job(job), "endless": ledger.job("exec sleep 600")}
    env = launch(RESEND_AFTER=after)
    return ledger, executor(jobs, admin=admin, program=LAUNCH, env=env)


def test_a_result_that_the_admin_lost_comes_again(executor, admin, tmp_path):
    """The admin acknowledges without its database: the result is there soon after that has come
    back, and the run has started once."""
    lose_results(admin)
    ledger, daemon = repeating(executor, admin, tmp_path, "echo fine")
    log_id = ledger.trigger(daemon)
    wait_until(lambda: states(daemon)[log_id] == "acknowledged", 10, "the acknowledgement")
    assert not admin.results
    deliver_results(admin)
    assert outcome(admin, log_id, 10) == (200, "fine")
    ledger.settle(daemon)
    assert ledger.started() == [log_id]


def test_a_result_is_sent_three_times(executor, admin, tmp_path):
    """In quiet times each result is repeated twice, as it was, and then never again; repetitions
    are counted apart."""
    ledger, daemon = repeating(executor, admin, tmp_path, "echo fine")
    log_ids = [ledger.trigger(daemon, jobId=number) for number in range(1, 6)]
    ledger.settle(daemon)
    wait_until(lambda: set(states(daemon).values()) == {"delivered"}, 20, "the last repetition")
    # Whatever would come too often comes until the last of these.
    last = ledger.trigger(daemon)
    wait_until(lambda: set(states(daemon).values()) == {"delivered"}, 20, "the last repetition")
    assert {log_id: len(items) for log_id, items in admin.results.items()} == dict.fromkeys(
        [*log_ids, last], 3
    )
    ledger.settle(daemon)  # they are all alike
    assert resent(daemon) == 2 * 6


def test_repetitions_survive_a_restart(executor, admin, tmp_path):
    """A crash between the acknowledgement and a repetition loses neither of the two, and adds
    none."""
    ledger, daemon = repeating(executor, admin, tmp_path, "echo fine")
    log_id = ledger.trigger(daemon)
    for state, count in (("acknowledged", 1), ("resent", 2)):
        wait_until(lambda: states(daemon)[log_id] == state, 20, f"the state {state}")
        daemon.kill()
        assert times(admin, log_id) == count
        daemon.start()
    wait_until(lambda: states(daemon)[log_id] == "delivered", 20, "the last repetition")
    assert len(admin.results[log_id]) == 3 and ledger.started() == [log_id]


def test_a_slow_disk_does_not_put_off_repetitions(executor, admin, tmp_path):
    """The state of a result takes a while to be stored: its repetitions come in time nevertheless,
    not only with the next heartbeat."""
    ledger, daemon = repeating(executor, admin, tmp_path)
    quiet(daemon)
    with tampered(daemon, "delay_exit=700000"):
        log_id = ledger.trigger(daemon)
        result_of(admin, log_id)
        began = time.monotonic()
        wait_until(lambda: times(admin, log_id) == 3, 90, "the second repetition")
    took = time.monotonic() - began
    print(f"the second repetition came {took:.1f} s after the first result")
    assert took < 20


def finish_many(daemon, ledger, count):
    """Have `count` runs end at once, which is what /kill does; returns their logIds."""
    first = ledger.trigger(daemon, "endless", jobId=7)
    wait_until(lambda: first in ledger.started())
    waiting = fill_lane(daemon, first + 1000, count - 1, 7, "endless")
    ledger.accepted.update(waiting)
    told = daemon.post("/kill", {"jobId": 7})["msg"]
    assert told == f"killed 1 running, dropped {count - 1} waiting"
    return {first, *waiting}


def test_repetitions_go_in_full_batches(executor, admin, tmp_path):
    """300 results that were acknowledged one after the other are repeated in at most four
    requests."""
    ledger, daemon = repeating(executor, admin, tmp_path, after=[5.0, 1000.0])
    log_ids = finish_many(daemon, ledger, 300)
    ledger.settle(daemon)
    wait_until(lambda: set(states(daemon).values()) == {"resent"}, 30, "the repetition")
    seen, repeated = set(), []
    for batch in callbacks(admin):
        repeated += [len(batch)] * bool(seen & set(batch))
        seen.update(batch)
    print("repeated:", repeated)
    assert seen == log_ids and sum(repeated) == 300 and len(repeated) <= 4
    assert resent(daemon) == 300


def test_repetitions_let_fresh_results_go_first(executor, admin, tmp_path):
    """However many results are to be repeated, a fresh one waits for at most the request that is
    under way."""
    ledger, daemon = repeating(executor, admin, tmp_path, after=[5.0, 1000.0])
    old = finish_many(daemon, ledger, 500)
    ledger.settle(daemon)
    begun, go = threading.Event(), threading.Event()

    def hang(path, body):
        if path.endswith("/callback"):
            begun.set()
            go.wait(8)

    admin.behave = hang
    assert begun.wait(20)
    before = len(callbacks(admin))
    fresh = ledger.trigger(daemon)
    wait_until(lambda: states(daemon)[fresh] == "finished", 5, "the end of the run")
    go.set()
    assert outcome(admin, fresh) == (200, "")
    ledger.settle(daemon)
    wait_until(lambda: set(states(daemon)[log_id] for log_id in old) == {"resent"}, 30)
    first, second, *others = callbacks(admin)[before:]
    assert set(first) <= old and second == [fresh] and len(others) >= 3, (first, second)


def test_repetitions_that_are_refused_hold_up_nobody(executor, admin, tmp_path):
    """An admin that refuses a result which it took before, as for a log that was deleted there,
    gets fresh results without delay."""
    ledger, daemon = repeating(executor, admin, tmp_path)
    refused = []
    old = ledger.trigger(daemon)
    ledger.settle(daemon)

    def behave(path, body):
        if path.endswith("/callback") and b'"logId": %d,' % old in body:
            refused.append(time.monotonic())
            return 200, b'{"code":500,"msg":"no such log","data":null}'
        return None

    admin.behave = behave
    wait_until(lambda: len(refused) >= 2, 60, "the refusals")
    fresh = ledger.trigger(daemon)
    began = time.monotonic()
    assert outcome(admin, fresh) == (200, "")
    took = time.monotonic() - began
    print(f"a fresh result came after {took:.2f} s")
    assert took < 2
    deliver_results(admin)


def test_a_refused_repetition_ends(executor, admin, tmp_path):
    """Two results came in one batch, and the admin refuses one of them when they are repeated: the
    other one is repeated twice nevertheless, and no more."""
    ledger, daemon = repeating(executor, admin, tmp_path)
    hold_results(admin)
    bad, good = (ledger.trigger(daemon, jobId=number) for number in (1, 2))
    wait_until(lambda: set(states(daemon).values()) == {"finished"}, 10, "the results")
    deliver_results(admin)
    ledger.settle(daemon)

    def behave(path, body):
        if path.endswith("/callback") and b'"logId": %d,' % bad in body:
            return 200, b'{"code":500,"msg":"no such log","data":null}'
        return None

    admin.behave = behave
    wait_until(lambda: states(daemon)[good] == "delivered", 30, "the last repetition")
    assert len(admin.results[good]) == 3
    deliver_results(admin)


def test_a_repetition_that_a_proxy_answers_is_none(executor, admin, tmp_path):
    """The admin is away and its proxy says so with a 502: a repetition that meets that is made when
    the admin is back, twice as ever."""
    ledger, daemon = repeating(executor, admin, tmp_path, "echo fine")
    log_id = ledger.trigger(daemon)
    ledger.settle(daemon)
    admin.behave = lambda path, body: (
        (502, b"<html>Bad Gateway</html>") if path.endswith("/callback") else None
    )
    # Each attempt is made in both dialects.
    wait_until(lambda: times(admin, log_id) >= 5, 40, "two repetitions that meet the proxy")
    assert len(admin.results[log_id]) == 1 and resent(daemon) == 0
    deliver_results(admin)
    wait_until(lambda: len(admin.results[log_id]) == 3, 60, "both repetitions")
    wait_until(lambda: states(daemon)[log_id] == "delivered", 10)
    ledger.settle(daemon)
    assert ledger.started() == [log_id] and resent(daemon) == 2


@pytest.mark.parametrize("how", ["closed", "behind a proxy"])
def test_an_admin_that_goes_away_gets_the_latest_results_again(executor, loopback, tmp_path, how):
    """An admin that crashes loses what it has acknowledged shortly before: as soon as it is back it
    gets that again, and nothing twice; be it that a proxy in front of it says that it is away."""
    admin = loopback()
    ledger, port = Ledger(admin, tmp_path), int(admin.url.rpartition(":")[2])
    daemon = executor(
        {"job": ledger.job("echo fine")},
        admin=admin,
        program=LAUNCH,
        env=launch(REGISTRY_INTERVAL=1.0),
    )
    log_ids = [ledger.trigger(daemon, jobId=number) for number in range(1, 6)]
    ledger.settle(daemon)
    wait_until(lambda: set(states(daemon).values()) == {"acknowledged"}, 10)

    def vanish(path, body):  # connections that live on do not end with the listener
        raise ConnectionResetError

    if how == "closed":
        admin.behave = vanish
        admin.close()
    else:
        admin.behave = lambda path, body: (502, b"<html>Bad Gateway</html>")
    wait_until(lambda: "cannot register at the admin" in daemon.log, 20, "the absence")
    if how == "closed":
        back = loopback(port=port)
    else:
        back = admin
        admin.results.clear()
        deliver_results(admin)
    for log_id in log_ids:
        assert outcome(back, log_id, 20) == (200, "fine")
    wait_until(lambda: set(states(daemon).values()) == {"resent"}, 10)
    assert resent(daemon) == 5
    count = len(back.requests)
    back.wait(lambda: len(back.requests) > count + 3, 20)  # some heartbeats more
    assert all(len(items) == 1 for items in back.results.values())
    assert sorted(ledger.started()) == log_ids
