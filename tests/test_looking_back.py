"""What ran, what it said and why it failed, without the admin: `runs`, `logs` and `status`."""

import contextlib
import datetime
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, PROGRAM, alive, command_line, launch, result_of, run_job, wait_until

import xxl_executor

AT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
TOKEN = {"XXL-JOB-ACCESS-TOKEN": "s3cret"}


def command(daemon, *arguments, **options):
    return subprocess.run(
        command_line("-c", str(daemon.file), *arguments),
        text=True,
        capture_output=True,
        timeout=30,
        **options,
    )


def said(daemon, *arguments, status=0):
    found = command(daemon, *arguments)
    assert (found.returncode, found.stderr) == (status, ""), found
    return found.stdout


def fails(daemon, *arguments):
    found = command(daemon, *arguments)
    assert (found.returncode, found.stdout) == (1, ""), found
    return found.stderr


@pytest.fixture
def looked(executor, loopback, tmp_path):
    """A daemon with a token, an admin, and jobs of which one waits for the file `go`."""
    admin = loopback(token="s3cret")
    jobs = {
        "ok": {"shell": "echo first; echo fine $1"},
        "bad": {"shell": "echo why >&2; exit 3"},
        "late": {"shell": "sleep 60", "timeout": "0.2s", "kill_grace": "0.2s"},
        "waits": {
            "shell": f"echo begun; until [ -e {tmp_path}/go ]; do sleep 0.05; done; echo end"
        },
    }
    daemon = executor(jobs, admin=admin)
    return daemon, admin


def test_runs(looked, tmp_path):
    daemon, admin = looked
    assert said(daemon, "runs") == f"no run is known in {daemon.data}\n"
    ok, _ = run_job(daemon, admin, "ok", jobId=1, executorParams="x")
    bad, _ = run_job(daemon, admin, "bad", jobId=2, broadcastIndex=1, broadcastTotal=3)
    late, _ = run_job(daemon, admin, "late", jobId=3)
    waits, _ = admin.trigger(daemon.url, "waits", jobId=4)
    behind, _ = admin.trigger(daemon.url, "waits", jobId=4)
    wait_until(lambda: daemon.status(**TOKEN)["running"])
    text = said(daemon, "runs")
    assert re.fullmatch(
        rf"""BEGAN +JOB    LOGID +SHARD  RESULT     TOOK +MESSAGE
{AT}  ok     {ok} +-      succeeded  [\d.]+ s +fine x
{AT}  bad    {bad} +1/3    failed     [\d.]+ s +exit status 3: why
{AT}  late   {late} +-      timed out  [\d.]+ s +timed out after 0.2 s
{AT}  waits  {waits} +-      running    [\d.]+ s
{AT}  waits  {behind} +-      waiting    -
""",
        text,
    ), text
    assert [line.split()[3] for line in said(daemon, "runs", "--failed").splitlines()[1:]] == [
        str(bad),
        str(late),
    ]
    assert said(daemon, "runs", "ok", "-n", "1").count("\n") == 2
    assert (
        said(daemon, "runs", "ok", "--failed")
        == f'no failed run of "ok" is known in {daemon.data}\n'
    )
    found = {run["logId"]: run for run in json.loads(said(daemon, "runs", "--json"))}
    assert found[bad] == {
        **found[bad],
        "job": "bad",
        "shard": "1/3",
        "outcome": "failed",
        "code": 500,
        "message": "exit status 3: why",
    }
    assert abs(found[late]["began"] - time.time()) < 60 and found[late]["seconds"] >= 0.2
    hint = f'xxl-executor: no run of "okk" is known in {daemon.data}, did you mean "ok"?\n'
    assert fails(daemon, "runs", "okk") == hint == fails(daemon, "logs", "okk")

    daemon.kill()
    assert [line.split()[-2:] for line in said(daemon, "runs", "waits").splitlines()[1:]] == [
        ["interrupted", "-"],
        ["waiting", "-"],
    ]
    (tmp_path / "go").touch()
    daemon.start()
    result_of(admin, waits)
    result_of(admin, behind)
    text = said(daemon, "runs", "waits")
    assert re.search("failed +- +executor restarted while the job ran, its outcome is unk", text)
    assert re.search(rf"{behind} +succeeded +[\d.]+ s +end\n", text), text
    assert daemon.stop() == 0
    assert said(daemon, "runs", "waits") == text, "and without a daemon"
    assert not list(daemon.data.glob("journal.db-*")), "nothing is left by who reads"


def test_logs(looked, tmp_path):
    daemon, admin = looked
    first, _ = run_job(daemon, admin, "ok", executorParams="1")
    second, _ = run_job(daemon, admin, "ok", executorParams="2")
    notes, end = r"(?s)----- .* -----\n", r"----- .* succeeded after .* -----\n"
    assert re.fullmatch(f"{notes}first\nfine 2\n{end}", said(daemon, "logs", "ok"))
    assert "\nfine 1\n" in said(daemon, "logs", str(first))
    assert re.fullmatch(f"fine 2\n{end}", said(daemon, "logs", "ok", "-n", "2"))
    assert said(daemon, "logs", "ok", "-f") == said(daemon, "logs", str(second)), "it has ended"
    told = f'xxl-executor: no run of "late" is known in {daemon.data}\n'
    assert fails(daemon, "logs", "late") == told
    assert "no run 12345 is known in" in fails(daemon, "logs", "12345")
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "logs", "waits", "-f"]
    waits, _ = admin.trigger(daemon.url, "waits")
    wait_until(lambda: daemon.status(**TOKEN)["running"])
    with (
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as follows,
        subprocess.Popen(
            [*arguments[:-2], str(waits), "-f"], stdout=subprocess.PIPE, text=True
        ) as left,
    ):
        for process in (follows, left):
            assert waits and str(waits) in process.stdout.readline()
            assert process.stdout.readline() == "begun\n"
        left.send_signal(signal.SIGINT)
        assert left.wait(10) == 130
        assert daemon.status(**TOKEN)["running"], "the run goes on"
        (tmp_path / "go").touch()
        assert re.fullmatch(f"end\n{end}", follows.stdout.read())
        assert follows.wait(20) == 0
    assert daemon.stop() == 0
    assert "\nend\n" in said(daemon, "logs", "waits")


def test_following_a_run_whose_executor_was_killed_ends(looked):
    daemon, admin = looked
    admin.trigger(daemon.url, "waits")
    wait_until(lambda: daemon.status(**TOKEN)["running"])
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "logs", "waits", "-f"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as follows:
        follows.stdout.readline()
        daemon.kill()
        assert follows.stdout.read() == "begun\n" and follows.wait(20) == 0
    daemon.start()  # it ends what is left


def test_the_order_is_that_of_acceptance(executor, admin):
    """Not that of logIds: an admin whose database is new counts from 1 again."""
    daemon = executor({"a": {"shell": 'echo "said $1"; test "$1" = good'}}, admin=admin)
    huge = int(time.time())
    for log_id, param in ((huge, "bad"), (7, "good")):
        run_job(daemon, admin, "a", logId=log_id, executorParams=param)

    def check():
        shown = said(daemon, "runs").splitlines()[1:]
        assert [line.split()[3] for line in shown] == [str(huge), "7"]
        assert "\nsaid good\n" in said(daemon, "logs", "a")

    def same(state):
        assert (state["recent"], state["failures"]) == ({"a": [500, 200]}, [])

    check()
    assert daemon.stop() == 0
    check()
    same(json.loads(said(daemon, "status", "--json", status=1)))
    assert re.search(r"^a +F\. ", said(daemon, "status", status=1), re.MULTILINE)
    daemon.start()
    wait_until(lambda: daemon.status()["recent"])  # it looks back after the start
    same(daemon.status())
    check()


@pytest.fixture
def line_up(executor, admin, tmp_path):
    """A factory: runs of one job, each until a file by the name of its parameter exists; the second
    runs, and waited for the first. Returns the daemon, the logId of the second, what touches such a
    file, and two times between which it began; it was accepted long before."""
    end = lambda name: (tmp_path / name).touch()  # noqa: E731

    def make():
        daemon = executor(
            {"a": {"shell": f'until [ -e "{tmp_path}/$1" ]; do sleep 0.05; done; echo end'}},
            admin=admin,
        )
        first, _ = admin.trigger(daemon.url, "a", executorParams="first")
        second, _ = admin.trigger(daemon.url, "a", executorParams="second")
        wait_until(lambda: daemon.status()["queued"] == {"a": 1})
        passes(2)
        before = time.time()
        end("first")
        result_of(admin, first)
        wait_until(lambda: [run["logId"] for run in daemon.status()["running"]] == [second])
        return daemon, second, end, (before, time.time())

    yield make
    end("first")
    end("second")


def passes(seconds):
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until, seconds + 5)


def lies(moment, between):
    """Whether it does; the clock of the journal may differ a bit from that of the host."""
    first, last = between
    return first - 0.5 <= moment <= last + 0.5


def told_of(daemon, log_id):
    """What `runs` shows of this run, as JSON; its BEGAN is the same in the table."""
    (run,) = [run for run in json.loads(said(daemon, "runs", "--json")) if run["logId"] == log_id]
    (at,) = re.findall(rf"^({AT})  \S+ +{log_id} ", said(daemon, "runs"), re.MULTILINE)
    moment = datetime.datetime.strptime(at, "%Y-%m-%d %H:%M:%S").timestamp()
    assert abs(moment - run["began"]) <= 1, (run, at)
    return run


def test_a_run_that_waited_began_when_it_started(line_up, admin):
    daemon, second, end, start = line_up()
    run = told_of(daemon, second)
    assert run["outcome"] == "running" and lies(run["began"], start), run
    passes(1.5)
    before = time.time()
    end("second")
    result_of(admin, second)
    ended = before, time.time()
    run = told_of(daemon, second)
    assert run["outcome"] == "succeeded" and lies(run["began"], start), run
    assert lies(run["ended"], ended) and abs(run["began"] + run["seconds"] - run["ended"]) <= 0.5


def test_when_an_interrupted_run_began(line_up, admin):
    """That is known after the crash; its end is when the next executor noticed."""
    daemon, second, _, start = line_up()
    daemon.kill()
    run = told_of(daemon, second)
    assert run["outcome"] == "interrupted" and lies(run["began"], start), run
    passes(1.5)
    before = time.time()
    daemon.start()
    result_of(admin, second)
    noticed = before, time.time()
    for _ in range(2):
        run = told_of(daemon, second)
        assert run["outcome"] == "failed" and lies(run["began"], start), run
        assert lies(run["ended"], noticed) and run["seconds"] is None, run
        assert daemon.stop() == 0
        daemon.start()


def test_when_a_run_that_never_started_was_accepted(line_up, admin):
    daemon, second, _, _ = line_up()
    before = time.time()
    third, _ = admin.trigger(daemon.url, "a", executorParams="third")
    accepted = before, time.time()
    passes(2)
    before = time.time()
    assert admin.call(daemon.url, "/kill", {"jobId": 1})["code"] == 200
    result_of(admin, third)
    killed = before, time.time()
    result_of(admin, second)
    run = told_of(daemon, third)
    assert lies(run["began"], accepted) and lies(run["ended"], killed), run
    assert run["seconds"] is None


def test_an_executor_that_nobody_reaps_has_ended(looked):
    """Whoever started it, such as a supervisor that hangs or a bare `sleep` in a container, may
    leave its process as a zombie."""
    daemon, admin = looked
    waits, _ = admin.trigger(daemon.url, "waits")
    wait_until(lambda: "begun" in said(daemon, "logs", "waits"))
    pid = daemon.process.pid
    daemon.signal(signal.SIGKILL)
    try:
        wait_until(lambda: not alive(pid))
        assert os.path.exists(f"/proc/{pid}"), "a zombie"
        head = said(daemon, "status", status=1).splitlines()[0]
        assert re.search(rf"  it ended unexpectedly at about {AT}, pid {pid} is gone$", head)
        (row,) = said(daemon, "runs").splitlines()[1:]
        assert row.split()[3:] == [str(waits), "interrupted", "-"]
        assert "\nbegun\n" in said(daemon, "logs", "waits", "-f"), "it does not go on for ever"
        assert os.path.exists(f"/proc/{pid}")
    finally:
        daemon.wait()
        daemon.start()  # it ends what is left


def test_status_says_how_it_ended(looked, executor):
    daemon, admin = looked
    never = executor({"ok": {"shell": "true"}}, start=False)
    text = said(never, "status", status=1)
    assert text.splitlines()[0].endswith(
        f"  no executor has used data_dir {never.data}: name another one with --data-dir"
    )
    run_job(daemon, admin, "ok")
    failed, _ = run_job(daemon, admin, "bad")
    pid = daemon.process.pid
    daemon.kill()
    for told in (
        rf"it ended unexpectedly at about {AT}, pid {pid} is gone",
        rf"not running, it stopped at {AT}",
    ):
        text = said(daemon, "status", status=1)
        assert re.fullmatch(rf"xxl-job-executor-sample  {told}", text.splitlines()[0]), text
        assert re.search(rf"^bad     {AT}  {failed}  exit status 3: why$", text, re.MULTILINE)
        assert re.search(r"^ok     \.             0        0$", text, re.MULTILINE), text
        assert json.loads(said(daemon, "status", "--json", status=1))["trouble"] in text
        daemon.start()
        # The last results survive, and new ones go behind them.
        wait_until(lambda: daemon.status(**TOKEN)["recent"].get("bad") == [500])
        assert [run["logId"] for run in daemon.status(**TOKEN)["failures"]] == [failed]
        assert daemon.stop() == 0
    daemon.start()
    wait_until(lambda: daemon.status(**TOKEN)["recent"].get("bad") == [500])
    run_job(daemon, admin, "bad")
    assert daemon.status(**TOKEN)["recent"] == {"ok": [200], "bad": [500, 500]}


def test_status_needs_no_good_file(looked):
    daemon, admin = looked
    assert admin.wait(lambda: admin.registry, 10)
    good = daemon.file.read_text()
    for bad in (good.replace("timeout: 0.2s", "timout: 0.2s"), good + "\n  oops: [\n", "%"):
        daemon.file.write_text(bad)
        text = said(daemon, "status", "--data-dir", str(daemon.data))
        assert text.startswith("xxl-job-executor-sample  registered\n")
        assert said(daemon, "status").startswith("xxl-job-executor-sample  registered\n")
    daemon.file.unlink()
    found = command(daemon, "status")
    assert found.returncode == 2 and "--data-dir DIR" in found.stderr
    daemon.file.write_text(good)


def test_a_file_that_is_no_yaml_still_names_the_data_dir(looked):
    """In the middle of an edit somebody looks what runs."""
    daemon, admin = looked
    ok, _ = run_job(daemon, admin, "ok")
    assert admin.wait(lambda: admin.registry, 10)
    good = daemon.file.read_text()
    assert good.count("  data_dir: ./data\n") == good.count("  drain_timeout: 5s\n") == 1
    bad = good.replace("  drain_timeout: 5s\n", "") + "jobs: [}\n"

    def names_it(line):
        daemon.file.write_text(bad.replace("data_dir: ./data", line))
        assert re.search(rf"  ok +{ok}  succeeded ", said(daemon, "runs")), line

    lines = (
        "data_dir: ./data",
        f"data_dir: {daemon.data}",
        'data_dir: "./data"',
        f"data_dir: '{daemon.data}'  # where it is",
        "data_dir:   data   # where it is",
        "data_dir: ${UNSET:-./data}",
        "drain_timeout: 5s",  # none: the default
    )
    for line in lines:
        names_it(line)
        assert said(daemon, "status").startswith("xxl-job-executor-sample  registered\n"), line
    assert "\nfine\n" in said(daemon, "logs", "ok")
    assert daemon.stop() == 0
    for line in lines[2:4]:
        names_it(line)
        assert re.fullmatch(
            rf"{re.escape(str(daemon.data))}  not running, it stopped at {AT}",
            said(daemon, "status", status=1).splitlines()[0],
        )


@pytest.mark.parametrize(
    "text",
    [
        "executor:\n  app_name: a\njobs:\n  h:\n    shell: x\n    env:\n      data_dir: OTHER\n"
        "  bad: [\n",
        "jobs:\n  h:\n    shell: x\n    env:\n      data_dir: OTHER\nexecutor:\n  app_name: a\n"
        "  bad: [\n",
        "executor:\n  data_dir: |\n    OTHER\njobs: [\n",
        "executor:\n  data_dir: " + "[" * 5000 + "\n",
    ],
    ids=["a variable of a job", "a variable before", "a block", "nested too deep"],
)
def test_a_data_dir_that_nobody_can_tell_is_asked_for(executor, tmp_path, text):
    """In a file that is no YAML only a plain line of the section `executor` says where it is."""
    daemon = executor({}, start=False)
    daemon.file.write_text(text.replace("OTHER", str(tmp_path / "other")))
    found = command(daemon, "runs")
    assert found.returncode == 2 and found.stdout == "", found
    assert "This command needs only executor.data_dir: --data-dir DIR" in found.stderr
    assert "Traceback" not in found.stderr and f"{tmp_path}/other" not in found.stderr


def test_status_without_an_app_name_names_the_directory(executor):
    daemon = executor({}, executor={"app_name": "No Name!"}, start=False)
    assert said(daemon, "status", status=1).startswith(f"{daemon.data}  no executor has used ")


def test_a_file_that_breaks_while_somebody_watches(looked):
    daemon, admin = looked
    assert admin.wait(lambda: admin.registry, 10)
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "status", "--watch"]
    with terminal(arguments) as screen:
        shown = lambda: "\n".join(screen())  # noqa: E731
        wait_until(lambda: re.search(r"^ok +- ", shown(), re.MULTILINE))
        good = daemon.file.read_text()
        daemon.file.write_text(good.replace("data_dir: ./data", "data_dir: [}"))
        run_job(daemon, admin, "ok")
        wait_until(lambda: re.search(r"^ok +\. ", shown(), re.MULTILINE))
        daemon.file.unlink()
        run_job(daemon, admin, "ok")
        wait_until(lambda: re.search(r"^ok +\.\. ", shown(), re.MULTILINE))
        daemon.file.write_text(good)


def test_two_scripts_from_the_admin_are_two(executor, loopback):
    """In `status`, as in `runs`; the metrics have one name for all, for there may be many."""
    admin = loopback(token="s3cret")
    daemon = executor({}, admin=admin, glue={"enabled": True})

    def runs(job, source):
        script = {"glueType": "GLUE_SHELL", "glueSource": source, "glueUpdatetime": len(source)}
        return run_job(daemon, admin, "", jobId=job, **script)

    runs(1, "exit 3")
    runs(2, "exit 14")

    def check(recent, failed, state):
        assert state["recent"] == recent
        assert {run["job"] for run in state["failures"]} == failed

    check({"glue-1": [500], "glue-2": [500]}, {"glue-1", "glue-2"}, daemon.status(**TOKEN))
    runs(1, "echo fine")
    after = {"glue-1": [500, 200], "glue-2": [500]}, {"glue-2"}
    check(*after, daemon.status(**TOKEN))
    text = said(daemon, "status")
    assert re.search(r"^glue-1 +F\. ", text, re.MULTILINE), text
    assert re.search(rf"^glue-2 +{AT} +\d+ +exit status 14$", text, re.MULTILINE), text
    metrics = daemon.session.get(daemon.url + "/metrics", headers=TOKEN, timeout=20).text
    assert set(re.findall(r'handler="([^"]*)"', metrics)) == {"glue"}
    assert daemon.stop() == 0
    check(*after, json.loads(said(daemon, "status", "--json", status=1)))
    daemon.start()
    wait_until(lambda: daemon.status(**TOKEN)["recent"])  # it looks back after the start
    check(*after, daemon.status(**TOKEN))


def test_the_key_of_status_opens_nothing_else(looked):
    daemon, _ = looked
    key = daemon.lock.split()[3]
    for path, headers, code in (
        ("/status", {"Authorization": f"Bearer {key}"}, None),
        ("/status", {"Authorization": f"Bearer {key[:-1]}"}, 500),
        ("/status", {}, 500),
    ):
        assert daemon.get(path, **headers).get("code") == code
    for path in ("/run", "/kill", "/log", "/beat"):
        found = daemon.post(path, {"jobId": 1}, Authorization=f"Bearer {key}")
        assert found["code"] == 500 and "access token" in found["msg"]


def test_runs_and_logs_for_a_group(executor, admin):
    """Who may read the data_dir may look, whether or not an executor runs, and leaves nothing."""
    if os.getuid():
        pytest.skip("needs root")
    python = "/usr/bin/python3"  # which every user may run
    if not os.path.exists(python):
        pytest.skip("needs the system's Python")
    with tempfile.TemporaryDirectory(prefix="looking-", dir="/tmp") as place:
        os.chmod(place, 0o755)
        program, data = shutil.copy(PROGRAM, place), Path(place, "data")
        data.mkdir(0o750)
        daemon = executor({"ok": {"shell": "echo fine"}}, admin=admin, start=False)
        daemon.data.symlink_to(data)
        daemon.start()
        run_job(daemon, admin, "ok")

        def as_member(*arguments, group=0):
            return subprocess.run(
                [python, program, *arguments, "--data-dir", str(data)],
                cwd=place,
                text=True,
                capture_output=True,
                timeout=30,
                user=65534,
                group=group,
                extra_groups=[],
            )

        def check():
            for arguments in (["runs"], ["logs", "ok"], ["status"]):
                found = as_member(*arguments)
                assert "fine" in found.stdout or "ok   ." in found.stdout, found

        check()
        daemon.kill()
        check()
        daemon.start()
        assert daemon.stop() == 0
        check()
        assert not list(data.glob("journal.db-*"))
        found = as_member("runs", group=65534)
        assert found.returncode == 1 and "this needs the executor's user or root" in found.stderr


def test_what_is_kept_of_runs(executor, admin):
    """The job of a run, and no parameter, which may be long and secret."""
    daemon = executor({"ok": {"shell": "echo fine"}}, admin=admin)
    run_job(daemon, admin, "ok", executorParams="hush" * 1000)
    assert daemon.stop() == 0
    kept = b"".join(path.read_bytes() for path in daemon.data.glob("journal.db*"))
    assert b'"handler": "ok"' in kept and len(kept) < 100_000
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db:
        (stored,) = db.execute("SELECT trigger FROM runs").fetchone()
    assert "hush" not in stored


# -- status --watch on a terminal


@contextlib.contextmanager
def terminal(arguments, rows=24, columns=80):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.set_blocking(master, False)
    got = bytearray()

    def screen():
        """The lines of the last whole drawing."""
        with contextlib.suppress(OSError):
            while True:
                got.extend(os.read(master, 65536))
        drawings = got.decode("utf-8", "replace").replace("\r\n", "\n").split("\x1b[H")[1:]
        whole = [drawing for drawing in drawings if drawing.endswith("\x1b[J")]
        return whole[-1].removesuffix("\x1b[J").replace("\x1b[K", "").splitlines() if whole else []

    env = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")}
    with subprocess.Popen(arguments, stdout=slave, env={**env, "TERM": "xterm"}) as process:
        os.close(slave)
        try:
            yield screen
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) in (0, 1)
            os.close(master)


def test_status_of_many_jobs_on_a_small_terminal(executor, admin, tmp_path):
    jobs = {f"job{number:02}": {"shell": "true"} for number in range(42)}
    jobs |= {"zz-bad": {"shell": "echo why; exit 1"}, "zz-slow": {"shell": "exec sleep 600"}}
    daemon = executor(jobs, admin=admin, executor={"drain_timeout": "0"})
    run_job(daemon, admin, "zz-bad", jobId=1)
    admin.trigger(daemon.url, "zz-slow", jobId=2)
    wait_until(lambda: daemon.status()["running"])
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "status"]
    with terminal([*arguments, "--watch"]) as screen:
        lines = wait_until(screen)
        assert len(lines) <= 23 and max(map(len, lines)) < 80 and "registered" in lines[0]
        text = "\n".join(lines)
        assert re.search(r"RUNNING +LOGID +FOR\nzz-slow ", text)
        assert re.search(
            rf"FAILED +AT +LOGID +MESSAGE\nzz-bad +{AT} +\d+ +exit status 1: why", text
        )
        assert re.search(r"\n\.\.\. and \d+ more jobs\n", text)
        assert daemon.stop() == 0  # it goes on through a restart
        wait_until(lambda: "not running, it stopped at" in "\n".join(screen()))
        daemon.start()
        wait_until(lambda: screen()[0] == "xxl-job-executor-sample  registered")


def test_status_of_many_failures_on_a_small_terminal(executor, admin):
    """The head stays, and the latest failures."""
    daemon = executor({f"job{number:02}": {"shell": "exit 3"} for number in range(30)}, admin=admin)
    for number in range(30):
        run_job(daemon, admin, f"job{number:02}", jobId=number + 1)
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "status", "--watch"]
    for rows in (24, 12):
        with terminal(arguments, rows) as screen:
            lines = wait_until(screen)
        assert len(lines) <= rows - 1 and "registered" in lines[0], lines
        if rows == 24:
            assert lines[4].startswith("job29 ") and any("more" in line for line in lines)
            assert any(line.startswith("JOB ") for line in lines)


def test_whoever_reads_only_the_beginning(executor):
    daemon = executor({f"job{number}": {"shell": "true"} for number in range(2000)})
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "status"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_many_delivered_runs_are_kept_as_far_as_they_are_young(executor, admin):
    """At most KEPT_RUNS, but none that may still be repeated; of each the beginning of its
    message."""
    daemon = executor({"ok": {"shell": "true"}}, admin=admin)
    assert daemon.stop() == 0
    long = "why " * 3000
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db:
        (now,) = db.execute("SELECT value FROM facts WHERE name = 'clock'").fetchone()
        kept = json.dumps(
            {
                "handler": "ok",
                "glue_type": "BEAN",
                "shard_index": 0,
                "shard_total": 1,
                "began": time.time() - 5 * 86_400,
                "took": 1.5,
            }
        )
        rows = [
            (number, 1, "delivered", 0.0, kept, 500, long, float(now) - age * 3600)
            for number, age in enumerate([24 * 40] * 3 + [*range(60, 50, -1)] + [1] * 10, 1)
        ]
        db.executemany(
            "INSERT INTO runs (log_id, log_date_time, state, accepted, trigger, code, message,"
            " finished) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        db.commit()
    daemon.program = LAUNCH
    daemon.env.update(launch(KEPT_RUNS=15))
    daemon.start()
    wait_until(lambda: "pruned 0 logs and 8 runs" in daemon.log)
    found = json.loads(said(daemon, "runs", "-n", "100", "--json"))
    assert [run["logId"] for run in found] == [*range(9, 24)]
    assert daemon.status()["failures"][0]["logId"] == 23


def test_of_a_delivered_run_the_beginning_of_its_message_is_kept(executor, tmp_path):
    """Without an admin a result is delivered at once."""
    daemon = executor({"ok": {"shell": "printf '%02000d' 0"}})
    body = {"jobId": 1, "logId": 7, "executorHandler": "ok"}
    assert daemon.post("/run", body)["code"] == 200
    wait_until(lambda: daemon.status()["recent"] == {"ok": [200]})

    def message():
        (run,) = json.loads(said(daemon, "runs", "--json"))
        return run["state"] == "delivered" and run["message"]

    assert wait_until(message) == "0" * 500


def test_output_for_another_encoding(executor, admin):
    daemon = executor({"日报": {"shell": "echo 完成"}}, admin=admin)
    run_job(daemon, admin, "日报")
    for arguments in (["runs"], ["status"], ["check"]):
        found = command(daemon, *arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert (found.returncode, found.stderr) == (0, ""), found
        assert "\\u65e5" in found.stdout


def test_status_after_many_scripts_of_the_admin(executor, loopback):
    """Each script from the admin is a handler of its own: a restart shows the latest thousand of
    them, as the life before did."""
    admin = loopback(token="s3cret")
    daemon = executor({}, admin=admin, glue={"enabled": True})
    assert daemon.stop() == 0
    now, count = time.time(), 3000
    with contextlib.closing(sqlite3.connect(daemon.data / "journal.db")) as db, db:
        (clock,) = db.execute("SELECT value FROM facts WHERE name = 'clock'").fetchone()
        rows = []
        for number in range(1, count + 1):
            kept = {
                "handler": f"glue-{number}",
                "glue_type": "GLUE_SHELL",
                "shard_index": 0,
                "shard_total": 1,
                "began": now - 2,
                "took": 0.5,
                "ended": now - 1,
            }
            at = float(clock) - 10 + number * 1e-3
            date = int(now * 1000)
            rows.append((number, date, "delivered", at, json.dumps(kept), 500, "why", at))
        db.executemany(
            "INSERT INTO runs (log_id, log_date_time, state, accepted, trigger, code, message,"
            " finished) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
    daemon.start()
    wait_until(lambda: daemon.status(**TOKEN)["recent"])  # it looks back after the start
    state = daemon.status(**TOKEN)
    latest = {f"glue-{number}" for number in range(count - 999, count + 1)}
    assert len(state["recent"]) <= 1000 and len(state["failures"]) <= 1000
    assert set(state["recent"]) == latest
    assert {run["job"] for run in state["failures"]} == latest
    script = {"glueType": "GLUE_SHELL", "glueSource": "exit 0", "glueUpdatetime": 1}
    run_job(daemon, admin, "", jobId=count + 1, **script)
    wait_until(lambda: f"glue-{count + 1}" in daemon.status(**TOKEN)["recent"])
    recent = daemon.status(**TOKEN)["recent"]
    assert len(recent) <= 1000 and f"glue-{count}" in recent  # the oldest one makes room
    assert f"glue-{count - 999}" not in recent


def test_nothing_on_which_a_terminal_acts_is_shown(looked):
    """Not of a job's message, nor of what was typed, in JSON neither."""
    daemon, admin = looked
    text = "\x9b31m \u202e \x7f 中文"
    run_job(daemon, admin, "ok", jobId=1, executorParams=text)
    run_job(daemon, admin, "bad", jobId=2)
    for arguments in (["runs"], ["runs", "--json"], ["status"], ["status", "--json"]):
        told = said(daemon, *arguments)
        assert told.replace("\n", "").isprintable(), (arguments, told)
    [found] = [run for run in json.loads(said(daemon, "runs", "--json")) if run["job"] == "ok"]
    assert found["message"] == f"fine {text}"
    assert fails(daemon, "runs", "\x1b[31m").strip().isprintable()
    found = command(daemon, "runs", "ok", "\x1b[31m")
    assert found.returncode == 2 and found.stderr.replace("\n", "").isprintable()


@pytest.mark.parametrize("text", ["short", "中文" * 9, "a中" * 20_000, "x" * 40_000])
@pytest.mark.parametrize("most", [3, 12, 13, 79])
def test_a_text_is_cut_to_columns(text, most):
    shown = xxl_executor.cut(text, most)
    assert xxl_executor.columns(shown) <= most
    if shown != text:
        beginning = shown[:-3]
        assert shown == beginning + "..." and text.startswith(beginning)
        more = text[: len(beginning) + 1]
        assert xxl_executor.columns(text) > most < xxl_executor.columns(more) + 3, "no less fits"
