"""Shell and command jobs: what they are given, what becomes of their end, and that nothing of them
is left."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import alive, children_of, result_of, run_job, wait_until

import xxl_executor

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start jobs as another user")


def ending(daemon, admin, handler, **fields):
    """Run a job; returns (code, message)."""
    _, result = run_job(daemon, admin, handler, **fields)
    return result["code"], result["handleMsg"]


# -- what a job is given

# Each would make a file `hacked`, lose its quotes or become an option if a shell or a second
# replacement saw it.
PARAMETERS = [
    "plain",
    "",
    "; touch hacked",
    "$(touch hacked)",
    "`touch hacked`",
    "'; touch hacked; '",
    '"; touch hacked; "',
    "& touch hacked",
    "one\ntouch hacked",
    "-rf --version",
    "a  b\t*",
    "%s\\n$HOME ${HOME}",
    "{shard_index}{param}",
    "é 漢字 😀",
    "trailing\n",
]


def test_parameters_reach_the_job_unchanged(executor, admin, tmp_path):
    show = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    daemon = executor(
        {
            "shell": {"shell": 'printf "%s" "$1" > got; echo "$0 $# $2 $3"', "cwd": str(tmp_path)},
            "command": {
                "command": [
                    *show,
                    "{param}",
                    "<{param}|{shard_index}>",
                    "{shard_index}/{shard_total}",
                    "{other}",
                    "{",
                    7,
                ],
                "cwd": str(tmp_path),
            },
        },
        admin=admin,
    )
    for param in PARAMETERS:
        shard = {"executorParams": param, "broadcastIndex": 4, "broadcastTotal": 9}
        assert ending(daemon, admin, "shell", **shard) == (200, "shell 3 4 9"), param
        assert (tmp_path / "got").read_text() == param
        code, message = ending(daemon, admin, "command", **shard)
        assert (code, json.loads(message)) == (
            200,
            [param, f"<{param}|4>", "4/9", "{other}", "{", "7"],
        )
    assert not list(tmp_path.glob("**/hacked"))


def test_environment(executor, admin, tmp_path):
    given = {
        "XXL_JOB_ACCESS_TOKEN": "secret-a",
        "NOTIFY_SOCKET": "@xxl-executor-test-nobody",
        "WATCHDOG_PID": "1",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "secret-b",
        "CREDENTIALS_DIRECTORY": "/nonexistent/secret-c",
        "FROM_DAEMON": "yes",
        "BOTH": "daemon",
    }
    secrets = given.keys() - {"FROM_DAEMON", "BOTH"} | {"WATCHDOG_USEC"}
    python = "import json, os; print(json.dumps(dict(os.environ)))"
    (tmp_path / "env_job.py").write_text(
        "import json, os\ndef main(): return json.dumps(dict(os.environ))\n"
    )
    common = {
        "cwd": str(tmp_path),
        "env": {"OWN": "a b", "BOTH": "job", "NUMBER": 5},
        "timeout": "1m",
    }
    daemon = executor(
        {
            "shell": {"shell": f"'{sys.executable}' -c '{python}'", **common},
            "command": {"command": [sys.executable, "-c", python], **common},
            "python": {"python": "env_job:main", **common},
        },
        admin=admin,
        env=given,
    )
    for handler in ("shell", "command", "python"):
        log_id, result = run_job(
            daemon,
            admin,
            handler,
            jobId=31,
            executorParams="p q",
            broadcastIndex=2,
            broadcastTotal=3,
            executorTimeout=90,
            logDateTime=1_700_000_000_123,
        )
        seen = json.loads(result["handleMsg"])
        assert {name: value for name, value in seen.items() if name.startswith("XXL_JOB_")} == {
            "XXL_JOB_ID": "31",
            "XXL_JOB_LOG_ID": str(log_id),
            "XXL_JOB_HANDLER": handler,
            "XXL_JOB_PARAM": "p q",
            "XXL_JOB_SHARD_INDEX": "2",
            "XXL_JOB_SHARD_TOTAL": "3",
            "XXL_JOB_TRIGGER_TIME": "1700000000123",
            "XXL_JOB_TIMEOUT": "60",
            "XXL_JOB_RESULT_FILE": seen["XXL_JOB_RESULT_FILE"],
        }
        assert (seen["OWN"], seen["BOTH"], seen["NUMBER"], seen["FROM_DAEMON"]) == (
            "a b",
            "job",
            "5",
            "yes",
        )
        assert not secrets & seen.keys()
        assert "secret-" not in result["handleMsg"]


def test_stdin_directory_and_descriptors(executor, admin, tmp_path):
    inside = tmp_path / "executor" / "inside"
    inside.mkdir(parents=True)
    daemon = executor(
        {
            "stdin": {"shell": "readlink /proc/self/fd/0; cat"},
            "default_directory": {"shell": "pwd"},
            "relative": {"shell": "pwd", "cwd": "inside"},
            "descriptors": {"shell": "exec ls /proc/self/fd | tr '\\n' ' '"},
        },
        admin=admin,
    )
    assert ending(daemon, admin, "stdin") == (200, "/dev/null")
    # Relative directories count from the file that names them.
    assert ending(daemon, admin, "default_directory") == (200, str(tmp_path / "executor"))
    assert ending(daemon, admin, "relative") == (200, str(inside))
    # 3 is the directory that ls reads: nothing of the daemon (sockets, journal, lock) is passed on.
    assert ending(daemon, admin, "descriptors") == (200, "0 1 2 3")


# -- what becomes of its end


@pytest.fixture
def endings(executor, admin, tmp_path):
    """A daemon with one job, whose script is the parameter."""
    outside = tmp_path / "outside"
    outside.write_text("not yours")
    return executor(
        {"sh": {"shell": 'eval "$1"', "env": {"OUTSIDE": str(outside)}, "kill_grace": "0.3s"}},
        admin=admin,
    )


def test_result_messages(endings, admin):
    file = '"$XXL_JOB_RESULT_FILE"'
    for script, expected in {
        "echo one; echo two; echo": (200, "two"),
        "printf 'no newline'": (200, "no newline"),
        "echo error >&2": (200, "error"),
        "true": (200, ""),
        "echo broken; exit 3": (500, "exit status 3: broken"),
        "exit 3": (500, "exit status 3"),
        "no-such-program-anywhere": (500, "exit status 127: shell"),
        "kill -9 $$": (500, "killed by signal 9"),
        "echo last words; kill -15 $$": (500, "killed by signal 15"),
        f"echo output; printf 'from the file\\n\\n' > {file}": (200, "from the file"),
        f"echo output; printf 'of 2\\nlines' > {file}": (200, "of 2\nlines"),
        f"echo output; printf 'why it failed' > {file}; exit 4": (500, "why it failed"),
        f"echo output; : > {file}": (200, "output"),
        f"echo output; printf '\\377bytes\\000' > {file}": (200, "\ufffdbytes\ufffd"),
        f"echo output; mkfifo {file}": (200, "output"),
        f"echo output; mkdir {file} && rmdir {file}": (200, "output"),
        f'echo output; ln -s "$OUTSIDE" {file}': (200, "output"),
    }.items():
        code, message = ending(endings, admin, "sh", executorParams=script)
        if expected[1].endswith("shell"):  # in the words of this shell
            assert (code, message.startswith("exit status 127: ")) == (500, True)
        else:
            assert (code, message) == expected, script
    assert list((endings.data / "run").iterdir()) == [], "result files do not pile up"


def test_long_messages_keep_their_tail(endings, admin):
    script = "head -c %d /dev/zero | tr '\\0' x%s; printf 'the end'%s"
    to_file = ' > "$XXL_JOB_RESULT_FILE"', ' >> "$XXL_JOB_RESULT_FILE"'
    code, message = ending(endings, admin, "sh", executorParams=script % (15_001, *to_file))
    assert (code, message) == (200, "..." + "x" * (15_000 - 10) + "the end")
    code, message = ending(endings, admin, "sh", executorParams=script % (14_993, *to_file))
    assert (code, message) == (200, "x" * 14_993 + "the end")
    code, message = ending(endings, admin, "sh", executorParams=script % (30_000_000, *to_file))
    assert (code, len(message), message[:4], message[-8:]) == (200, 15_000, "...x", "xthe end")
    code, message = ending(endings, admin, "sh", executorParams=script % (300_000, "", ""))
    assert (code, message[-8:]) == (200, "xthe end")
    assert len(message) <= 15_000


def test_exit_statuses_are_exact_and_nobody_stays_a_zombie(executor, admin):
    daemon = executor(
        {
            "exit": {"shell": "exit $1"},
            "orphan": {"shell": "sleep 0.05 & exit 0", "background": "keep"},
        },
        admin=admin,
        executor={"max_running": 8},
    )
    ids = {}
    for status in range(256):
        ids[admin.trigger(daemon.url, "exit", jobId=status % 16, executorParams=str(status))[0]] = (
            status
        )
        if status % 32 == 0:
            ids[admin.trigger(daemon.url, "orphan", jobId=100 + status)[0]] = 0
    assert admin.wait(lambda: set(ids) <= set(admin.results), 60)
    for log_id, status in ids.items():
        result = admin.results[log_id][0]
        assert (result["code"], result["handleMsg"]) == (
            (500, f"exit status {status}") if status else (200, "")
        )
    wait_until(lambda: not children_of(daemon.process.pid, "Z"), 5, "the reaping of every child")


def test_a_kept_process_may_be_reaped_by_another_thread_meanwhile(monkeypatch):
    """It took the result of an unrelated run away: that run failed with a KeyError."""
    kept, stat = {}, xxl_executor.process_stat
    monkeypatch.setattr(xxl_executor, "_KEPT", kept)
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            kept[process.pid] = stat(process.pid)[3]
            assert xxl_executor._reap() == (False, False)

            def faster(pid):
                kept.clear()
                return stat(pid)

            monkeypatch.setattr(xxl_executor, "process_stat", faster)
            assert xxl_executor._reap() == (False, True)
        finally:
            process.kill()


def test_a_burst_of_output_does_not_block(executor, admin):
    daemon = executor(
        {"burst": {"shell": "head -c 52428800 /dev/zero | tr '\\0' x; echo; echo the end"}},
        admin=admin,
        executor={"log_limit": "1MiB"},
    )
    assert ending(daemon, admin, "burst", seconds=60) == (200, "the end")


# -- timeouts


def test_timeouts(executor, admin, tmp_path):
    gate = tmp_path / "go"
    daemon = executor(
        {
            "short": {
                "shell": "echo started; exec sleep 60",
                "timeout": "1s",
                "kill_grace": "0.3s",
            },
            "long": {"shell": "echo started; exec sleep 60", "timeout": "1m", "kill_grace": "0.3s"},
            "none": {"shell": f"echo $XXL_JOB_TIMEOUT; until [ -e '{gate}' ]; do sleep 0.02; done"},
            "stopped": {"shell": "kill -STOP $$", "timeout": "1s", "kill_grace": "0.3s"},
            "stubborn": {
                "shell": 'trap "" TERM; kill -STOP $$; while :; do sleep 0.05; done',
                "timeout": "1s",
                "kill_grace": "0.3s",
            },
            "polite": {
                "shell": 'trap "echo bye; exit 0" TERM; sleep 60 & wait',
                "timeout": "1s",
                "kill_grace": "1m",
            },
        },
        admin=admin,
    )
    limits = {"short": 60, "long": 1, "none": 0, "stopped": 0, "stubborn": 0, "polite": 30}
    ids = {
        name: admin.trigger(daemon.url, name, jobId=number, executorTimeout=seconds)[0]
        for number, (name, seconds) in enumerate(limits.items())
    }
    for name in ("short", "long", "stopped", "stubborn", "polite"):
        result = result_of(admin, ids[name])
        assert (name, result["code"], result["handleMsg"]) == (name, 502, "timed out after 1 s")
    assert "\nbye\n" in daemon.log_text(ids["polite"]), "it had its grace"
    assert "timeout=1 s" in daemon.log_text(ids["long"])
    assert ids["none"] not in admin.results
    gate.touch()
    assert result_of(admin, ids["none"])["handleMsg"] == "0"


# -- nothing is left

TREE = '''
"""Starts descendants that ignore SIGTERM, in every way to get away; notes their pids; "stay" waits, "leave" ends."""
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
read, write = os.pipe()

def descend(*, orphan=False, session=False, environment=os.environ):
    if os.fork() == 0:
        if session:
            os.setsid()
        if orphan and os.fork():
            os._exit(0)
        with open("pids", "a") as file:
            file.write(f"{os.getpid()}\\n")
        os.execvpe("sleep", ["sleep", "600"], environment)  # closes the pipe: the parent knows that it is so far

descend()
descend(session=True)
descend(orphan=True)
descend(orphan=True, session=True)
descend(orphan=True, environment={"PATH": os.environ["PATH"]})
os.close(write)
os.read(read, 1)
with open("pids", "a") as file:
    file.write(f"{os.getpid()}\\n")
open("ready", "w").close()
while sys.argv[1] == "stay":
    signal.pause()
'''


@pytest.mark.parametrize("how", ["timeout", "kill", "cover", "end", "failure", "shutdown"])
def test_nothing_survives(executor, admin, tmp_path, how):
    (tmp_path / "tree.py").write_text(TREE)
    stay = "leave" if how in ("end", "failure") else "stay"
    job = {
        "shell": f"'{sys.executable}' tree.py {stay}; exit $1",
        "cwd": str(tmp_path),
        "kill_grace": "0.2s",
    }
    if how in (
        "timeout",
        "kill",
    ):  # without a shell between; what timed out is ended even with background: keep
        job = {
            "command": [sys.executable, "tree.py", stay],
            "cwd": str(tmp_path),
            "kill_grace": "0.2s",
            "background": "keep",
        }
    # The timeout must be long enough for two starts of Python on a busy machine.
    daemon = executor(
        {
            "tree": {**job, "timeout": "3s" if how == "timeout" else 0},
            "next": {"shell": "echo next"},
        },
        admin=admin,
        executor={"drain_timeout": "0.2s"},
    )
    log_id, _ = admin.trigger(daemon.url, "tree", executorParams="3" if how == "failure" else "0")
    wait_until((tmp_path / "ready").exists, 15)
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    assert len(pids) == 6
    expected = {
        "timeout": (502, "timed out after 3 s"),
        "kill": (500, "killed by the admin"),
        "end": (200, ""),
        "failure": (500, "exit status 3"),
        "shutdown": (500, "killed: the executor stopped"),
    }
    if stay == "stay":
        assert all(map(alive, pids))
    if how == "kill":
        admin.call(daemon.url, "/kill", {"jobId": 1})
    elif how == "shutdown":
        assert daemon.stop() == 0
    elif how == "cover":
        cover, _ = admin.trigger(daemon.url, "next", executorBlockStrategy="COVER_EARLY")
        expected["cover"] = 500, f"covered by run {cover}"
    result = result_of(admin, log_id)
    assert [pid for pid in pids if alive(pid)] == [], "its result says that it is over"
    assert (result["code"], result["handleMsg"]) == expected[how]


def test_strangers_survive(executor, admin, tmp_path):
    """Only what belongs to the run is ended: no other run of this daemon, no run of another daemon,
    nobody else."""
    marker = xxl_executor.MARKER
    with contextlib.ExitStack() as stack:
        strangers = []
        for environment in (
            {},
            {marker: "0123456789abcdef-00000000000000000001"},
            {"NOT_" + marker: "x"},
        ):
            process = subprocess.Popen(
                ["sleep", "600"], env={**os.environ, **environment}, start_new_session=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            strangers.append(process)
        job = {"shell": 'echo $$ > "$1"; sleep 600', "cwd": str(tmp_path), "kill_grace": "0.2s"}
        daemon = executor({"job": job}, admin=admin, executor={"drain_timeout": 0})
        # 11 and 110: the marker of one begins like the other if its number were not written at full
        # length.
        ids = [
            admin.trigger(
                daemon.url, "job", jobId=log_id, logId=log_id, executorParams=f"pid{log_id}"
            )[0]
            for log_id in (11, 110)
        ]
        files = [tmp_path / f"pid{log_id}" for log_id in ids]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        identity = daemon.identity
        process = subprocess.Popen(
            ["sleep", "600"], env={**os.environ, marker: f"{identity}x"}, start_new_session=True
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        strangers.append(process)
        admin.call(daemon.url, "/kill", {"jobId": 11})
        assert result_of(admin, 11)["handleMsg"] == "killed by the admin"
        assert list(map(alive, pids)) == [False, True]
        assert daemon.stop() == 0
        assert result_of(admin, 110)["handleMsg"] == "killed: the executor stopped"
        assert not alive(pids[1])
        assert [process.poll() for process in strangers] == [None] * 4


def test_family_of_nobody():
    """Session 0 is where all that came from outside a PID namespace is; it and an unknown marker
    match nothing."""
    assert xxl_executor.family("nosuchmarker") == {}
    assert xxl_executor.family("nosuchmarker", 0) == {}
    assert xxl_executor.kill_family("nosuchmarker", 0) == []


def test_family_finds_marked_and_descendants():
    with contextlib.ExitStack() as stack:
        environment = {**os.environ, xxl_executor.MARKER: "feedfacefeedface-1"}
        script = "env -i sleep 600 & echo $!; wait"
        parent = subprocess.Popen(
            ["sh", "-c", script], env=environment, stdout=subprocess.PIPE, start_new_session=True
        )
        stack.callback(parent.stdout.close)
        stack.callback(parent.wait)
        stack.callback(parent.kill)
        child = int(parent.stdout.readline())
        assert set(xxl_executor.family("feedfacefeedface-1")) == {parent.pid, child}
        assert set(xxl_executor.family("feedfacefeedface-")) == {
            parent.pid,
            child,
        }, "the beginning of a marker"
        assert set(xxl_executor.family("nosuchmarker", parent.pid)) == {
            parent.pid,
            child,
        }, "by the session"
        assert xxl_executor.family("eedfacefeedface-1") == {}, "not the middle of a marker"
        started = xxl_executor.family("feedfacefeedface-1")[child]
        assert xxl_executor.send_signal({child: started + 1}, signal.SIGKILL) == [], (
            "another process with this pid"
        )
        assert alive(child)
        assert xxl_executor.kill_family("feedfacefeedface-1") == []
        assert not alive(child) and not alive(parent.pid)


def test_background_keep(executor, admin, tmp_path):
    """What a finished job left may stay; its hold on stdout does not hold back the result; a
    timeout ends it too."""
    script = 'setsid sleep 600 & echo $! > "$1"; echo done; [ "$1" = kept ] || sleep 600'
    job = {
        "shell": script,
        "cwd": str(tmp_path),
        "background": "keep",
        "timeout": "2s",
        "kill_grace": "0.2s",
    }
    daemon = executor({"job": job, "other": {"shell": "echo fine"}}, admin=admin)
    assert ending(daemon, admin, "job", executorParams="kept") == (200, "done")
    kept = int((tmp_path / "kept").read_text())
    try:
        assert ending(daemon, admin, "job", executorParams="ended") == (502, "timed out after 2 s")
        assert not alive(int((tmp_path / "ended").read_text()))
        assert ending(daemon, admin, "other") == (200, "fine")
        assert alive(kept)
        assert daemon.stop() == 0
        assert alive(kept), "it may outlive the daemon"
    finally:
        os.kill(kept, signal.SIGKILL)


def test_background_kill_with_a_leaked_stdout(executor, admin, tmp_path):
    """Both polite and stubborn remains are gone when the result arrives."""
    script = (
        'sleep 600 & echo $! > pids; (trap "" TERM; exec setsid sleep 600) & echo $! >> pids; echo'
        " done"
    )
    daemon = executor(
        {"job": {"shell": script, "cwd": str(tmp_path), "kill_grace": "0.2s"}}, admin=admin
    )
    assert ending(daemon, admin, "job") == (200, "done")
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())


# -- what cannot be started


def test_what_cannot_be_started_says_why(executor, admin, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("no program")
    daemon = executor(
        {
            "no_cwd": {"shell": "true", "cwd": str(tmp_path / "nowhere")},
            "no_program": {"command": ["/nonexistent/program", "{param}"]},
            "no_name": {"command": ["no-such-program-anywhere"]},
            "not_executable": {"command": [str(plain)]},
            "no_interpreter": {"python": "module:main", "interpreter": "/nonexistent/python"},
            "no_user": {"shell": "true", "user": "no-such-user"},
            "shell": {"shell": "true"},
            "command": {"command": ["true", "{param}"]},
        },
        admin=admin,
    )
    long = (
        "cannot start: the parameter of 200000 bytes is longer than the kernel passes to a program"
    )
    nul = "cannot start: the parameter holds a NUL or a character that no command line can carry"
    for handler, param, expected in [
        (
            "no_cwd",
            "",
            f"cannot start: the directory {tmp_path}/nowhere does not exist (jobs.no_cwd.cwd)",
        ),
        ("no_program", "", "cannot start /nonexistent/program: No such file or directory"),
        ("no_name", "", "cannot start no-such-program-anywhere: No such file or directory"),
        ("not_executable", "", f"cannot start {plain}: Permission denied"),
        ("no_interpreter", "", "cannot start /nonexistent/python: No such file or directory"),
        (
            "no_user",
            "",
            "cannot start: there is no user no-such-user on this host (jobs.no_user.user)",
        ),
        ("shell", "a\0b", nul),
        ("command", "a\0b", nul),
        ("shell", "a\ud800b", nul),
        ("shell", "é" * 100_000, long),
        ("command", "x" * 200_000, long),
    ]:
        log_id, result = run_job(daemon, admin, handler, executorParams=param)
        assert (result["code"], result["handleMsg"]) == (500, expected), handler
        assert expected in daemon.log_text(log_id)
    assert ending(daemon, admin, "shell") == (200, "")
    warning = (
        "jobs.no_interpreter.interpreter: /nonexistent/python cannot be started: No such file or"
        " directory"
    )
    assert warning in daemon.log
    assert children_of(daemon.process.pid, "Z") == []


# -- as another user


@pytest.fixture
def public_directory():
    """A directory that every user may enter; pytest's own is closed to others."""
    directory = Path(tempfile.mkdtemp(prefix="xxl-executor-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@ROOT_ONLY
def test_as_another_user(public_directory, executor, admin):
    daemon = executor(
        {
            "who": {"shell": "id -un; id -G; echo $HOME $USER $LOGNAME", "user": "nobody"},
            "result": {
                "shell": 'echo output; echo "by $(id -un)" > "$XXL_JOB_RESULT_FILE"',
                "user": "nobody",
            },
            "command": {"command": ["id", "-un"], "user": "nobody"},
            "stubborn": {
                "shell": 'trap "" TERM; setsid sleep 600 & echo started; wait',
                "user": "nobody",
                "timeout": "1s",
                "kill_grace": "0.2s",
            },
            "journal": {"shell": 'cat "$1"', "user": "nobody"},
        },
        admin=admin,
        directory=public_directory,
    )
    log_id, result = run_job(daemon, admin, "who")
    assert result["handleMsg"] == "/nonexistent nobody nobody"
    groups = subprocess.run(
        ["id", "-G", "nobody"], capture_output=True, text=True, check=True
    ).stdout
    assert f"\nnobody\n{groups}" in daemon.log_text(log_id), "not in the groups of root"
    assert ending(daemon, admin, "result") == (200, "by nobody")
    assert ending(daemon, admin, "command") == (200, "nobody")
    assert ending(daemon, admin, "stubborn") == (502, "timed out after 1 s")
    code, message = ending(daemon, admin, "journal", executorParams=str(daemon.data / "journal.db"))
    assert (code, message.endswith("Permission denied")) == (
        500,
        True,
    ), "the journal holds parameters"


@pytest.mark.parametrize("user", [None, pytest.param("nobody", marks=ROOT_ONLY)])
def test_the_result_file_of_an_interrupted_start_is_forgotten(
    public_directory, executor, admin, user
):
    """After a crash the run starts again under its logId: what its first start wrote is not in the
    way."""
    public_directory.chmod(0o777)
    script = (
        "[ -e started ] && { echo fresh; exit 0; }; "
        'echo stale > "$XXL_JOB_RESULT_FILE"; echo > started; sleep 600'
    )
    job = {"shell": script, "on_crash": "rerun", **({"user": user} if user else {})}
    daemon = executor({"job": job}, admin=admin, directory=public_directory)
    log_id, _ = admin.trigger(daemon.url, "job")
    wait_until((public_directory / "started").exists)
    daemon.kill()
    daemon.start()
    result = result_of(admin, log_id)
    assert (result["code"], result["handleMsg"]) == (200, "fresh")
    assert list((daemon.data / "run").iterdir()) == []


# -- the tree, when it hides or when the daemon is short of something


def test_a_process_that_clears_its_environment_and_session_is_ended_with_the_run(
    executor, admin, tmp_path
):
    """Found as a descendant while its parent lives, and remembered when that has gone."""
    pid = tmp_path / "pid"
    daemon = executor(
        {
            "hides": {
                "shell": (
                    f'env -i setsid sh -c \'trap "" TERM; echo $$ >{pid}; while :; do sleep 1;'
                    " done' & wait"
                ),
                "timeout": "1s",
                "kill_grace": "0.3s",
            }
        },
        admin=admin,
    )
    _, result = run_job(daemon, admin, "hides")
    assert result["handleMsg"] == "timed out after 1 s"
    assert not alive(int(pid.read_text()))


def test_the_first_logid_is_one_like_others(executor, admin, tmp_path):
    """Nothing of run 0 is taken for the Python server or the other way round."""
    (tmp_path / "waits.py").write_text(
        "import os, time\ndef main():\n    while not os.path.exists('go'):\n       "
        " time.sleep(0.01)\n"
    )
    daemon = executor(
        {
            "leaves": {"shell": "sleep 60 &"},
            "waits": {"python": "waits:main", "cwd": str(tmp_path)},
        },
        admin=admin,
    )
    waiting, _ = admin.trigger(daemon.url, "waits", jobId=2)
    wait_until(lambda: [run["job"] for run in daemon.status()["running"]] == ["waits"])
    _, result = run_job(daemon, admin, "leaves", logId=0)
    assert result["handleCode"] == 200
    (tmp_path / "go").touch()
    assert result_of(admin, waiting)["handleCode"] == 200


def test_a_kept_process_is_not_looked_for_again(executor, admin, tmp_path):
    """It is an orphan of the daemon for as long as it lives; later runs must not search the whole
    host for theirs because of it."""
    daemon = executor(
        {
            "keeps": {"shell": f"setsid sleep 60 & echo $! >{tmp_path}/pid", "background": "keep"},
            "after": {"shell": "true"},
        },
        admin=admin,
    )
    run_job(daemon, admin, "keeps")
    kept = int((tmp_path / "pid").read_text())
    try:
        # its client of the admin is imported then, which reads many files
        wait_until(lambda: daemon.status()["registered"])
        before = scans(daemon)
        run_job(daemon, admin, "after", jobId=2)
        assert alive(kept) and scans(daemon) - before < 50
    finally:
        os.kill(kept, signal.SIGKILL)


def scans(daemon):
    """How many directories and files the daemon has read, as far as the kernel tells."""
    return int(re.search(r"syscr: (\d+)", Path(f"/proc/{daemon.process.pid}/io").read_text())[1])


def test_many_connections_take_nothing_from_jobs(executor, admin, tmp_path):
    """Descriptors beyond 1024, where select(2) ends."""
    (tmp_path / "quick.py").write_text("def main():\n    return 'fine'\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4000:
        pytest.skip("needs 4,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4000, hard))
    idle = []
    try:
        daemon = executor(
            {"quick": {"python": "quick:main", "cwd": str(tmp_path)}},
            admin=admin,
            executor={"max_connections": 2000},
        )
        for _ in range(1100):
            idle.append(socket.create_connection(("127.0.0.1", daemon.port)))
        wait_until(lambda: daemon.status()["connections"] > 1100)
        assert [run_job(daemon, admin, "quick")[1]["handleMsg"] for _ in range(3)] == ["fine"] * 3
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_files_are_told_at_the_start(executor, admin):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is no limit")
    daemon = executor({}, admin=admin, executor={"max_connections": 100000, "max_running": 10})
    assert (
        f"at most {hard} files may be open; max_connections 100000 and max_running 10 may need"
        " 100144: raise the limit (systemd: LimitNOFILE=100144) or lower them; until then"
        f" {hard - 144} connections are served at once" in daemon.log
    )
