"""Lanes, block strategies, bounds, fairness, kill and stuck threads, through the HTTP API of a real
daemon."""

import concurrent.futures
import contextlib
import itertools
import json
import re
import socket
import time

import pytest
from conftest import alive, result_of, run_job, wait_until

# Says that it started, then waits for its file or for go-all. `order` is opened for appending:
# lines never mix.
GATED = (
    'echo "start $1" >> order; until [ -e "go-$1" ] || [ -e go-all ]; do sleep 0.02; done; '
    'echo "end $1" >> order; echo "done $1"'
)


def gated(directory, **options):
    return {"shell": GATED, "cwd": str(directory), "kill_grace": "0.3s", **options}


def order(directory):
    file = directory / "order"
    return file.read_text().splitlines() if file.exists() else []


def started(directory, *names):
    wait_until(
        lambda: {f"start {name}" for name in names} <= set(order(directory)),
        15,
        f"the start of {names}",
    )


def release(directory, name="all"):
    (directory / f"go-{name}").touch()


def accept(daemon, admin, handler="gated", **fields):
    """Trigger, expect acceptance; returns the logId."""
    log_id, reply = admin.trigger(daemon.url, handler, **fields)
    assert reply["code"] == 200, reply
    return log_id


def refusal(daemon, admin, handler="gated", **fields):
    """Trigger, expect a refusal; returns its text."""
    _, reply = admin.trigger(daemon.url, handler, **fields)
    assert reply["code"] == 500, reply
    return reply["msg"]


def ending(admin, log_id):
    result = result_of(admin, log_id)
    return result["code"], result["handleMsg"]


def all_results(admin, log_ids, seconds=60):
    """{logId: number of results} when each has one at least."""
    complete = admin.wait(lambda: set(log_ids) <= set(admin.results), seconds)
    assert complete, f"missing: {set(log_ids) - set(admin.results)}"
    return {log_id: len(found) for log_id, found in admin.results.items()}


def test_serial_runs_in_order_and_never_two_at_once(executor, admin, tmp_path):
    daemon = executor({"gated": gated(tmp_path)}, admin=admin)
    names = [f"n{i}" for i in range(12)]
    # An unknown strategy is serial, as in the Java executor.
    strategies = ["SERIAL_EXECUTION", "", "NO_SUCH_STRATEGY"]
    ids = [
        accept(daemon, admin, executorParams=name, executorBlockStrategy=strategies[i % 3])
        for i, name in enumerate(names)
    ]
    started(tmp_path, "n0")
    assert daemon.status()["queued"] == {"gated": 11}
    release(tmp_path)
    assert [ending(admin, log_id) for log_id in ids] == [(200, f"done {name}") for name in names]
    assert order(tmp_path) == [line for name in names for line in (f"start {name}", f"end {name}")]


@pytest.mark.parametrize("second", ["other", "gated"], ids=["two handlers", "one handler"])
def test_two_job_ids_run_in_parallel(executor, admin, tmp_path, second):
    daemon = executor({"gated": gated(tmp_path), "other": gated(tmp_path)}, admin=admin)
    ids = [
        accept(daemon, admin, "gated", jobId=1, executorParams="a"),
        accept(daemon, admin, second, jobId=2, executorParams="b"),
    ]
    started(tmp_path, "a", "b")
    assert not any(line.startswith("end") for line in order(tmp_path))
    release(tmp_path)
    assert [ending(admin, log_id) for log_id in ids] == [(200, "done a"), (200, "done b")]


def test_discard_later(executor, admin, tmp_path):
    daemon = executor({"gated": gated(tmp_path)}, admin=admin, executor={"max_running": 1})
    discard = {"executorBlockStrategy": "DISCARD_LATER"}
    refused = "block strategy effect: DISCARD_LATER, the job is running or waiting"
    first = accept(daemon, admin, jobId=1, executorParams="a", **discard)
    started(tmp_path, "a")
    assert refusal(daemon, admin, jobId=1, **discard) == refused, "while it runs"
    waiting = accept(daemon, admin, jobId=2, executorParams="b", **discard)
    assert refusal(daemon, admin, jobId=2, **discard) == refused, (
        "while it waits, the only slot is taken"
    )
    release(tmp_path)
    assert ending(admin, first) == (200, "done a")
    assert ending(admin, waiting) == (200, "done b")
    # The admin may hear of the result a moment before the lane is idle.
    wait_until(lambda: admin.call(daemon.url, "/idleBeat", {"jobId": 1})["code"] == 200)
    assert ending(admin, accept(daemon, admin, jobId=1, executorParams="c", **discard)) == (
        200,
        "done c",
    )
    assert order(tmp_path) == [f"{what} {name}" for name in "abc" for what in ("start", "end")]


# The lock stays as long as any process of the tree lives. All ignore SIGTERM; the child writes
# while it lives.
HOLDER = """
exec 9>tree.lock
flock -n 9 || { echo "$1" >> overlap; exit 9; }
[ "$1" = quick ] && { echo quick; exit 0; }
trap "" TERM
while :; do echo alive >> beats; sleep 0.02; done &
echo "$!" > child
echo "start $1" >> order
wait
"""


def test_cover_early_starts_when_the_old_tree_is_dead(executor, admin, tmp_path):
    job = {"shell": HOLDER, "cwd": str(tmp_path), "kill_grace": "0.3s"}
    daemon = executor({"holder": job}, admin=admin)
    running = accept(daemon, admin, "holder", executorParams="old")
    started(tmp_path, "old")
    waiting = [accept(daemon, admin, "holder", executorParams="waits") for _ in range(3)]
    cover = accept(
        daemon, admin, "holder", executorParams="quick", executorBlockStrategy="COVER_EARLY"
    )
    assert ending(admin, cover) == (200, "quick")
    for log_id in [running, *waiting]:
        assert ending(admin, log_id) == (500, f"covered by run {cover}")
    assert not (tmp_path / "overlap").exists()
    assert order(tmp_path) == ["start old"]
    assert not alive(int((tmp_path / "child").read_text()))
    assert daemon.stop() == 0
    assert all_results(admin, [running, *waiting, cover]) == dict.fromkeys(
        [running, *waiting, cover], 1
    )


def burst(daemon, bodies):
    """POST all `bodies` to /run at the same moment, each on a connection of its own; returns the
    envelopes."""
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", daemon.port), 20))
            for _ in bodies
        ]
        for connection, body in zip(connections, bodies):
            data = json.dumps(body).encode()
            head = (
                b"POST /run HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            )
            connection.sendall(head % len(data) + data)
        replies = [
            stack.enter_context(connection.makefile("rb")).read() for connection in connections
        ]
    return [json.loads(reply.partition(b"\r\n\r\n")[2]) for reply in replies]


def test_cover_early_in_bursts_loses_nothing(executor, admin, tmp_path):
    """Runs that cover each other while they are being accepted: whatever was accepted gets one
    result."""
    daemon = executor(
        {
            "note": {
                "shell": 'echo "$XXL_JOB_LOG_ID" >> starts',
                "cwd": str(tmp_path),
                "kill_grace": "0.2s",
            }
        },
        admin=admin,
    )
    ids = list(range(1000, 1320))
    for first in range(1000, 1320, 16):
        # The shortest job, so that lanes come and go; every fourth trigger only queues.
        replies = burst(
            daemon,
            [
                {
                    "jobId": 1,
                    "logId": log_id,
                    "executorHandler": "note",
                    "logDateTime": int(time.time() * 1000),
                    "executorBlockStrategy": (
                        "SERIAL_EXECUTION" if log_id % 4 == 0 else "COVER_EARLY"
                    ),
                }
                for log_id in range(first, first + 16)
            ],
        )
        assert [reply for reply in replies if reply["code"] != 200] == []
    assert all_results(admin, ids) == dict.fromkeys(ids, 1)
    wait_until(
        lambda: admin.call(daemon.url, "/idleBeat", {"jobId": 1})["code"] == 200,
        what="the end of the lane",
    )
    assert daemon.status()["queued"] == {}
    assert (
        "\nxxl_executor_queued 0\n" in daemon.session.get(daemon.url + "/metrics", timeout=10).text
    )
    assert daemon.stop() == 0
    assert all_results(admin, ids) == dict.fromkeys(ids, 1)
    starts = (tmp_path / "starts").read_text().split()
    assert len(starts) == len(set(starts))


def test_queue_limits(executor, admin, tmp_path):
    daemon = executor(
        {"gated": gated(tmp_path, queue_limit=2)},
        admin=admin,
        executor={"max_queued": 3, "max_running": 1},
    )
    ids = [accept(daemon, admin, jobId=1, executorParams="a")]
    started(tmp_path, "a")
    ids += [accept(daemon, admin, jobId=1, executorParams=name) for name in "bc"]
    assert (
        refusal(daemon, admin, jobId=1) == "2 triggers of this job wait already: queue_limit is 2"
    )
    ids.append(accept(daemon, admin, jobId=2, executorParams="d"))
    assert refusal(daemon, admin, jobId=3) == "3 triggers wait already: executor.max_queued is 3"
    release(tmp_path)
    assert [ending(admin, log_id) for log_id in ids] == [(200, f"done {name}") for name in "abcd"]
    # What was refused was never accepted, and the places are free again.
    assert ending(admin, accept(daemon, admin, jobId=3, executorParams="e")) == (200, "done e")
    assert sorted(line[6:] for line in order(tmp_path) if line.startswith("start")) == list("abcde")


def test_triggers_that_come_at_once_do_not_wait_for_each_other(executor, admin, tmp_path):
    """A trigger for each of ten idle jobs, and a second one for three of them, in one moment: what
    can start at once takes no place of what waits; once max_running is taken, the limits hold."""
    daemon = executor(
        {"gated": gated(tmp_path, queue_limit=1)},
        admin=admin,
        executor={"max_queued": 5, "max_running": 10},
    )
    numbers = itertools.count(1)

    def refused(*job_ids):
        bodies = [
            {"jobId": job_id, "logId": next(numbers), "executorHandler": "gated"}
            for job_id in job_ids
        ]
        return [reply["msg"] for reply in burst(daemon, bodies) if reply["code"] != 200]

    assert refused(*range(1, 11), 1, 2, 3) == []
    wait_until(lambda: len(order(tmp_path)) == 10, what="ten starts")
    assert refused(1, 2) == ["1 triggers of this job wait already: queue_limit is 1"] * 2
    assert refused(11, 12, 13, 14) == ["5 triggers wait already: executor.max_queued is 5"] * 2
    release(tmp_path)
    wait_until(lambda: len(admin.results) == 15, 30, "every result")


def test_cover_early_may_replace_a_full_queue(executor, admin, tmp_path):
    daemon = executor({"gated": gated(tmp_path, queue_limit=1)}, admin=admin)
    ids = [accept(daemon, admin, executorParams="a")]
    started(tmp_path, "a")
    ids.append(accept(daemon, admin, executorParams="b"))
    release(tmp_path, "c")
    cover = accept(daemon, admin, executorParams="c", executorBlockStrategy="COVER_EARLY")
    assert ending(admin, cover) == (200, "done c")
    assert [ending(admin, log_id) for log_id in ids] == [(500, f"covered by run {cover}")] * 2


def test_max_running(executor, admin, tmp_path):
    daemon = executor({"gated": gated(tmp_path)}, admin=admin, executor={"max_running": 3})
    ids = [
        accept(daemon, admin, jobId=number, executorParams=f"n{number}") for number in range(1, 13)
    ]
    wait_until(lambda: len(order(tmp_path)) == 3, what="three starts")
    found = daemon.status()
    assert (len(found["running"]), found["queued"]) == (3, {"gated": 9})
    release(tmp_path)
    assert {ending(admin, log_id)[0] for log_id in ids} == {200}
    depth = most = 0
    for line in order(tmp_path):
        depth += 1 if line.startswith("start") else -1
        most = max(most, depth)
    assert (depth, most) == (0, 3)


def test_max_delay(executor, admin, tmp_path):
    daemon = executor(
        {"gated": gated(tmp_path), "late": gated(tmp_path, max_delay="1s")}, admin=admin
    )
    old = int((time.time() - 7230) * 1000)
    assert (
        refusal(daemon, admin, "late", logDateTime=old)
        == "the trigger is 2h old, more than max_delay 1 s"
    )
    ids = [
        accept(daemon, admin, "gated", executorParams="a", logDateTime=old)
    ]  # another job does not mind
    started(tmp_path, "a")
    ids.append(accept(daemon, admin, "late", executorParams="b"))
    since = time.monotonic()
    wait_until(lambda: time.monotonic() > since + 1.1)
    release(tmp_path)
    assert ending(admin, ids[0]) == (200, "done a")
    code, message = ending(admin, ids[1])
    assert code == 500
    assert re.fullmatch(r"waited \d[\d.]* s, more than max_delay 1 s", message)
    assert "start b" not in order(tmp_path)
    assert ending(admin, accept(daemon, admin, "late", executorParams="c")) == (200, "done c")


def test_a_long_queue_does_not_hold_back_another_lane(executor, admin, tmp_path):
    daemon = executor({"gated": gated(tmp_path)}, admin=admin, executor={"max_running": 1})
    ids = [accept(daemon, admin, jobId=1, executorParams="a0")]
    started(tmp_path, "a0")
    ids += [accept(daemon, admin, jobId=1, executorParams=f"a{i}") for i in range(1, 51)]
    ids += [accept(daemon, admin, jobId=2, executorParams=f"b{i}") for i in range(6)]
    release(tmp_path)
    all_results(admin, ids)
    starts = [line[6:] for line in order(tmp_path) if line.startswith("start")]
    assert starts[:12] == [f"{lane}{i}" for i in range(6) for lane in "ab"]
    assert starts[12:] == [f"a{i}" for i in range(6, 51)]


def test_kill_ends_what_runs_and_what_waits(executor, admin, tmp_path):
    # It ignores SIGTERM and has all the time: only an answer that does not wait for its end comes
    # at all.
    stubborn = f'trap "" TERM; {GATED}'
    daemon = executor(
        {"stubborn": gated(tmp_path, shell=stubborn, kill_grace="1h"), "gated": gated(tmp_path)},
        admin=admin,
    )
    running = accept(daemon, admin, "stubborn", jobId=7, executorParams="a")
    bystander = accept(daemon, admin, "gated", jobId=8, executorParams="other")
    started(tmp_path, "a", "other")
    waiting = [accept(daemon, admin, "stubborn", jobId=7, executorParams=name) for name in "bc"]
    reply = admin.call(daemon.url, "/kill", {"jobId": 7})
    assert (reply["code"], reply["msg"]) == (200, "killed 1 running, dropped 2 waiting")
    for log_id in waiting:
        assert ending(admin, log_id) == (500, "killed by the admin before it started")
    assert running not in admin.results
    assert [run["logId"] for run in daemon.status()["running"] if run["jobId"] == 7] == [running]
    release(tmp_path, "a")  # it ends by itself, and yet it was killed
    assert ending(admin, running) == (500, "killed by the admin")
    # The job is not poisoned: the next trigger runs. Who was not meant still runs.
    release(tmp_path, "d")
    assert ending(admin, accept(daemon, admin, "stubborn", jobId=7, executorParams="d")) == (
        200,
        "done d",
    )
    assert bystander not in admin.results
    release(tmp_path, "other")
    assert ending(admin, bystander) == (200, "done other")
    assert [line for line in order(tmp_path) if line in ("start b", "start c")] == []


def test_kill_of_what_only_waits_and_of_nothing(executor, admin, tmp_path):
    daemon = executor({"gated": gated(tmp_path)}, admin=admin, executor={"max_running": 1})
    reply = admin.call(daemon.url, "/kill", {"jobId": 4711})
    assert (reply["code"], reply["msg"]) == (200, "nothing was running")
    running = accept(daemon, admin, jobId=1, executorParams="a")
    started(tmp_path, "a")
    waiting = accept(daemon, admin, jobId=2, executorParams="b")
    reply = admin.call(daemon.url, "/kill", {"jobId": 2})
    assert (reply["code"], reply["msg"]) == (200, "killed 0 running, dropped 1 waiting")
    assert ending(admin, waiting) == (500, "killed by the admin before it started")
    assert admin.call(daemon.url, "/idleBeat", {"jobId": 2})["code"] == 200
    again = accept(daemon, admin, jobId=2, executorParams="c")
    release(tmp_path)
    assert [ending(admin, log_id) for log_id in (running, again)] == [
        (200, "done a"),
        (200, "done c"),
    ]
    assert "start b" not in order(tmp_path)


def test_a_repeated_log_id_is_accepted_and_starts_nothing(executor, admin, tmp_path):
    daemon = executor({"gated": gated(tmp_path, queue_limit=1)}, admin=admin)
    busy = "job thread is running or has trigger queue."
    running = accept(daemon, admin, executorParams="a")
    started(tmp_path, "a")
    waiting = accept(daemon, admin, executorParams="b")
    for log_id in (
        running,
        waiting,
    ):  # DISCARD_LATER and the full queue do not refuse it: it is in already
        for strategy in ("SERIAL_EXECUTION", "DISCARD_LATER", "COVER_EARLY"):
            accept(daemon, admin, logId=log_id, executorBlockStrategy=strategy)
    assert admin.call(daemon.url, "/idleBeat", {"jobId": 1})["msg"] == busy
    release(tmp_path)
    assert [ending(admin, log_id) for log_id in (running, waiting)] == [
        (200, "done a"),
        (200, "done b"),
    ]
    wait_until(lambda: admin.call(daemon.url, "/idleBeat", {"jobId": 1})["code"] == 200)
    for job_id in (
        1,
        99,
    ):  # after its end, even under another jobId: accepted, and nothing is busy with it
        accept(daemon, admin, logId=running, jobId=job_id)
        assert admin.call(daemon.url, "/idleBeat", {"jobId": job_id})["code"] == 200
        accept(daemon, admin, logId=running, jobId=job_id, executorBlockStrategy="COVER_EARLY")
    assert daemon.stop() == 0
    assert order(tmp_path) == ["start a", "end a", "start b", "end b"]
    assert all_results(admin, [running, waiting]) == {running: 1, waiting: 1}


def test_many_threads_many_lanes(executor, admin, tmp_path):
    """300 runs over 10 lanes, every trigger sent twice: exactly one start and one result each."""
    daemon = executor(
        {"note": {"shell": 'echo "$XXL_JOB_LOG_ID" >> starts; echo "$1"', "cwd": str(tmp_path)}},
        admin=admin,
    )
    ids = range(5000, 5300)

    def trigger(log_id):
        return admin.trigger(
            daemon.url, "note", jobId=log_id % 10, logId=log_id, executorParams=f"p{log_id}"
        )[1]["code"]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert set(pool.map(trigger, [log_id for log_id in ids for _ in range(2)])) == {200}
    all_results(admin, ids)
    assert daemon.stop() == 0
    assert all_results(admin, ids) == dict.fromkeys(ids, 1)
    assert {
        (admin.results[log_id][0]["code"], admin.results[log_id][0]["handleMsg"] == f"p{log_id}")
        for log_id in ids
    } == {(200, True)}
    assert sorted(map(int, (tmp_path / "starts").read_text().split())) == list(ids)


def test_kill_and_triggers_at_the_same_time(executor, admin, tmp_path):
    daemon = executor(
        {"note": {"shell": "exit 0", "kill_grace": "0.2s"}},
        admin=admin,
        executor={"max_running": 4},
    )

    def act(number):
        if number % 10 == 9:
            return admin.call(daemon.url, "/kill", {"jobId": number % 3})["code"]
        return admin.trigger(daemon.url, "note", jobId=number % 3, logId=9000 + number)[1]["code"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(act, range(150))) == {200}
    ids = [9000 + number for number in range(150) if number % 10 != 9]
    all_results(admin, ids)
    assert {result["handleMsg"] for found in admin.results.values() for result in found} <= {
        "",
        "killed by the admin",
        "killed by the admin before it started",
    }
    found = daemon.status()
    assert found["queued"] == {}
    assert daemon.stop() == 0
    assert all_results(admin, ids) == dict.fromkeys(ids, 1)


def test_a_thread_that_never_returns(executor, admin, tmp_path):
    (tmp_path / "stuck_job.py").write_text(
        "import pathlib, threading\n"
        "def main(context):\n"
        "    pathlib.Path(context.param).touch()\n"
        "    threading.Event().wait()\n"
    )
    daemon = executor(
        {
            "stuck": {
                "python": "stuck_job:main",
                "isolation": "thread",
                "pythonpath": [str(tmp_path)],
                "timeout": "1s",
                "kill_grace": "0.2s",
            },
            "fine": {"shell": "echo fine"},
        },
        admin=admin,
        executor={"max_running": 2, "drain_timeout": "25s"},
    )
    mark = tmp_path / "started"
    stuck = accept(daemon, admin, "stuck", jobId=1, executorParams=str(mark))
    wait_until(mark.exists)
    waiting = [accept(daemon, admin, "stuck", jobId=1) for _ in range(2)]
    assert ending(admin, stuck) == (502, "timed out after 1 s; its thread did not return")
    reason = f"run {stuck} of this job does not return from its thread"
    for log_id in waiting:
        assert ending(admin, log_id) == (500, reason)
    assert (
        refusal(daemon, admin, "stuck", jobId=1)
        == f"{reason}: restart the executor, and let the job watch Context.cancelled or use"
        " isolation: process"
    )
    assert [(run["logId"], run["stuck"]) for run in daemon.status()["running"]] == [(stuck, True)]
    assert (
        "\nxxl_executor_stuck_threads 1\n"
        in daemon.session.get(daemon.url + "/metrics", timeout=10).text
    )
    assert run_job(daemon, admin, "fine", jobId=2)[1]["handleMsg"] == "fine", (
        "another job has the other slot"
    )
    reply = admin.call(daemon.url, "/kill", {"jobId": 1})
    assert (reply["code"], reply["msg"]) == (200, f"nothing to kill: {reason}")
    accept(daemon, admin, "stuck", jobId=1, logId=stuck)  # a repeated logId is still answered 200
    assert daemon.stop(10) == 0, "shorter than drain_timeout: nothing waits for the stuck thread"
    assert (
        all_results(admin, [stuck, *waiting]).items() >= dict.fromkeys([stuck, *waiting], 1).items()
    )


def in_a_thread(directory, entry_point):
    """A job of a module in `directory` that is soon told to be stuck."""
    return {
        "python": entry_point,
        "isolation": "thread",
        "pythonpath": [str(directory)],
        "kill_grace": "0.2s",
    }


def test_a_stuck_thread_killed_by_the_admin_or_covered(executor, admin, tmp_path):
    (tmp_path / "stuck_job.py").write_text(
        "import pathlib, threading\n"
        "def main(context):\n"
        "    pathlib.Path(context.param).touch()\n"
        "    threading.Event().wait()\n"
    )
    job = in_a_thread(tmp_path, "stuck_job:main")
    daemon = executor({"stuck": job}, admin=admin, executor={"drain_timeout": "0.2s"})
    marks = [tmp_path / "one", tmp_path / "two"]
    ids = [
        accept(daemon, admin, "stuck", jobId=number, executorParams=str(mark))
        for number, mark in enumerate(marks)
    ]
    wait_until(lambda: all(mark.exists() for mark in marks))
    admin.call(daemon.url, "/kill", {"jobId": 0})
    cover = accept(daemon, admin, "stuck", jobId=1, executorBlockStrategy="COVER_EARLY")
    assert ending(admin, ids[0]) == (500, "killed by the admin; its thread did not return")
    assert ending(admin, ids[1]) == (500, f"covered by run {cover}; its thread did not return")
    assert ending(admin, cover) == (
        500,
        f"run {ids[1]} of this job does not return from its thread",
    )
    assert daemon.stop(8) == 0


def test_what_waits_behind_a_stuck_thread_is_kept_at_a_stop(executor, admin, tmp_path):
    """The next start, which is the remedy, runs it."""
    mark, go = tmp_path / "started", tmp_path / "go"
    (tmp_path / "stuck_job.py").write_text(
        "import pathlib, threading\n"
        "def main(context):\n"
        f"    pathlib.Path({str(mark)!r}).touch()\n"
        f"    if not pathlib.Path({str(go)!r}).exists():\n"
        "        threading.Event().wait()\n"
        "    return 'returned'\n"
    )
    job = in_a_thread(tmp_path, "stuck_job:main")
    daemon = executor({"stuck": job}, admin=admin, executor={"drain_timeout": "0.2s"})
    stuck, *waiting = [accept(daemon, admin, "stuck") for _ in range(3)]
    wait_until(mark.exists)
    assert daemon.stop() == 0
    go.touch()
    daemon.start()
    assert ending(admin, stuck) == (500, "killed: the executor stopped; its thread did not return")
    assert [ending(admin, log_id) for log_id in waiting] == [(200, "returned")] * 2
    assert all_results(admin, [stuck, *waiting]) == dict.fromkeys([stuck, *waiting], 1)


def test_a_thread_that_returns_late(executor, admin, tmp_path):
    """Its result was given already and stays the only one; then the lane is open again."""
    (tmp_path / "late_job.py").write_text(
        "import pathlib, threading\n"
        "def main(context):\n"
        "    while not pathlib.Path(context.param).exists():\n"
        "        threading.Event().wait(0.02)\n"
        "    return 'returned'\n"
    )
    job = in_a_thread(tmp_path, "late_job:main")
    daemon = executor({"late": job}, admin=admin, executor={"max_running": 1})
    gate = tmp_path / "go"
    late = accept(daemon, admin, "late", executorParams=str(gate), executorTimeout=1)
    assert ending(admin, late) == (502, "timed out after 1 s; its thread did not return")
    gate.touch()
    wait_until(
        lambda: admin.call(daemon.url, "/idleBeat", {"jobId": 1})["code"] == 200,
        what="the end of the thread",
    )
    again = accept(daemon, admin, "late", executorParams=str(gate))
    assert ending(admin, again) == (200, "returned")
    assert daemon.stop() == 0
    assert all_results(admin, [late, again]) == {late: 1, again: 1}
