"""Start, stop, reload and what the daemon says meanwhile: signals, draining, the lock, systemd, the
log."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from conftest import LAUNCH, PROGRAM, alive, launch, result_of, run_job, wait_until

program = PROGRAM  # a life begins as a user begins it
STOPPING = {"code": 500, "msg": "the executor is stopping", "content": None, "data": None}


def waits(go):
    """A shell command that stays until the file `go` exists."""
    return f"while [ ! -e {go} ]; do sleep 0.02; done; echo done"


def running(daemon, count=1):
    wait_until(lambda: len(daemon.status()["running"]) == count, 10, f"{count} running jobs")


def draining(daemon):
    wait_until(lambda: daemon.status()["draining"], 10, "the draining")


# -- the beginning


@pytest.mark.parametrize("flags", [(), ("-P",)], ids=["", "safe path"])
def test_no_module_of_the_current_directory_is_taken(executor, admin, flags):
    """It may be anybody's, and the executor may be root's."""
    if flags and sys.version_info < (3, 11):
        pytest.skip("python -P came with 3.11")
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin, start=False)
    (daemon.directory / "seen").mkdir()
    for name in ("requests", "queue", "json", "yaml", "charset_normalizer"):
        text = f"import pathlib; pathlib.Path({str(daemon.directory)!r}, 'seen', '{name}').touch()"
        (daemon.directory / f"{name}.py").write_text(text)
    daemon.flags = (*daemon.flags, *flags)
    daemon.start()
    assert run_job(daemon, admin, "hello")[1]["handleMsg"] == "hello"
    assert admin.wait(lambda: admin.registry, 10)
    assert os.listdir(daemon.directory / "seen") == []


# -- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_drains(executor, admin, tmp_path, number):
    """What runs may finish, what waits starts after the restart, and nothing new is taken."""
    go = tmp_path / "go"
    daemon = executor(
        {"slow": {"shell": waits(go)}, "hello": {"shell": "echo hello $1"}},
        admin=admin,
        executor={"drain_timeout": "60s"},
    )
    assert admin.wait(lambda: admin.registry, 10)
    slow, _ = admin.trigger(daemon.url, "slow")
    behind = [admin.trigger(daemon.url, "hello", executorParams=str(i))[0] for i in range(3)]
    running(daemon)
    daemon.signal(number)
    draining(daemon)
    assert admin.wait(lambda: not admin.registry, 10) is True, (
        "the registration is taken back at once"
    )
    assert daemon.post("/beat") == STOPPING and daemon.post("/idleBeat", {"jobId": 9}) == STOPPING
    refused, reply = admin.trigger(daemon.url, "hello", jobId=9)
    assert reply == STOPPING
    assert admin.trigger(daemon.url, "slow", logId=slow)[1]["code"] == 200, (
        "one that is known already is not refused"
    )
    health = requests.get(daemon.url + "/health", timeout=10)
    assert (health.status_code, health.json()["msg"]) == (503, "stopping")
    health.close()
    assert daemon.process.poll() is None and not admin.results
    go.touch()
    assert daemon.wait() == 0
    assert {log_id: items[0]["handleMsg"] for log_id, items in admin.results.items()} == {
        slow: "done"
    }
    assert " stopping: no new runs, up to 60 s for those that run\n" in daemon.log
    assert daemon.log.endswith(" stopped, every result is delivered\n")
    daemon.start()
    for i, log_id in enumerate(behind):
        item = result_of(admin, log_id)
        assert (item["handleCode"], item["handleMsg"]) == (200, f"hello {i}")
    assert [len(re.findall(f"started hello logId={log_id} ", daemon.log)) for log_id in behind] == [
        1,
        1,
        1,
    ]
    assert refused not in admin.results and len(admin.results) == 4


STUBBORN = "trap '' TERM; echo $$ > {0}.tmp; mv {0}.tmp {0}; while :; do sleep 0.05; done"


def test_the_drain_timeout_ends_what_runs(executor, admin, tmp_path):
    pids = [tmp_path / "a", tmp_path / "b"]
    jobs = {
        "polite": {"shell": f"echo $$ > {pids[0]}.tmp; mv {pids[0]}.tmp {pids[0]}; exec sleep 600"},
        "stubborn": {"shell": STUBBORN.format(pids[1]), "kill_grace": "0.3s"},
    }
    daemon = executor(jobs, admin=admin, executor={"drain_timeout": "0.3s"})
    runs = [admin.trigger(daemon.url, name, jobId=job_id)[0] for job_id, name in enumerate(jobs)]
    waiting, _ = admin.trigger(daemon.url, "polite", jobId=1)
    wait_until(lambda: all(file.exists() for file in pids))
    assert daemon.stop() == 0
    # Nothing is left, and the admin knows it all by now.
    assert not any(alive(int(file.read_text())) for file in pids)
    assert {
        log_id: [(item["handleCode"], item["handleMsg"]) for item in items]
        for log_id, items in admin.results.items()
    } == {log_id: [(500, "killed: the executor stopped")] for log_id in runs}
    for log_id in runs:
        assert re.search(
            r"\n----- .* failed after .*: code 500, killed: the executor stopped -----\n$",
            daemon.log_text(log_id),
        )
    assert waiting not in admin.results


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_shortens_the_draining(executor, admin, tmp_path, second):
    ready = tmp_path / "ready"
    daemon = executor(
        {"stubborn": {"shell": STUBBORN.format(ready), "kill_grace": "0.2s"}},
        admin=admin,
        executor={"drain_timeout": "1h"},
    )
    log_id, _ = admin.trigger(daemon.url, "stubborn")
    wait_until(ready.exists)
    daemon.signal(signal.SIGTERM)
    draining(daemon)
    daemon.signal(signal.SIGHUP)  # neither ends nor shortens it, nor is anything reloaded
    daemon.signal(second)
    assert daemon.wait(20) == 0
    if log_id not in admin.results:  # on a loaded machine it may have been kept for the next start
        daemon.start()
    assert result_of(admin, log_id)["handleMsg"] == "killed: the executor stopped"
    assert not alive(int(ready.read_text()))
    assert "reload" not in daemon.log


def test_stop_without_anything_to_do(executor):
    daemon = executor()
    assert daemon.stop() == 0
    assert daemon.log.endswith(" stopped, every result is delivered\n")
    assert daemon.lock.splitlines()[0].split()[2] == "-", "it no longer says where it listens"


def test_stop_has_an_end_when_the_admin_hangs(executor, tmp_path):
    """Connections are accepted by the kernel, and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        daemon = executor(
            {"hello": {"shell": "echo hello"}},
            admin_options={"addresses": [url], "timeout": "1s", "connect_timeout": "1s"},
        )
        assert (
            daemon.post("/run", {"jobId": 1, "logId": 1, "executorHandler": "hello"})["code"] == 200
        )
        wait_until(lambda: "finished hello logId=1 " in daemon.log)
        assert daemon.stop(25) == 0
        assert " stopped, 1 result kept for the next start\n" in daemon.log


# -- reload


def lines_since(daemon, before):
    """The lines about other things than a result, which goes its way at any time."""
    return [
        line[24:] for line in daemon.log[len(before) :].splitlines() if " delivered " not in line
    ]


def reload(daemon, config):
    """SIGHUP with a new file (a dict, or text as it is); returns the log lines it made."""
    wait_until(lambda: daemon.log.count(" registered ") == 1)  # its line must not come in between
    before = daemon.log
    if isinstance(config, dict):
        daemon.write(config)
    elif config is not None:
        daemon.file.write_text(config)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: re.search("reloaded |reload failed", daemon.log[len(before) :]))
    return lines_since(daemon, before)


def config_of(admin, jobs, **executor):
    return {
        "admin": {"addresses": [admin.url], "access_token": ""},
        "jobs": jobs,
        "executor": {
            "bind": "127.0.0.1:0",
            "data_dir": "./data",
            "drain_timeout": "5s",
            **executor,
        },
    }


def test_reload_takes_over_jobs(executor, admin, tmp_path):
    go = tmp_path / "go"
    daemon = executor(
        {
            "kept": {"shell": "echo kept"},
            "altered": {"shell": "echo old"},
            "zzz": {"shell": waits(go)},
        },
        admin=admin,
    )
    log_id, _ = admin.trigger(daemon.url, "zzz")
    behind, _ = admin.trigger(daemon.url, "zzz")
    running(daemon)
    jobs = {
        "kept": {"shell": "echo kept"},
        "altered": {"shell": "echo new"},
        "python": {"python": "calendar:month"},
        "another": {"shell": "echo another"},
    }
    pid = daemon.process.pid
    assert reload(daemon, config_of(admin, jobs)) == [
        f"INFO    reloaded {daemon.file}: 4 jobs, added another, python, changed altered,"
        " removed zzz"
    ]
    for handler, message in (("kept", "kept"), ("altered", "new"), ("another", "another")):
        assert run_job(daemon, admin, handler, jobId=2)[1]["handleMsg"] == message
    assert (
        admin.trigger(daemon.url, "zzz", jobId=2)[1]["msg"]
        == f'job handler "zzz" not found: add it under jobs in {daemon.file}'
    )
    # What was accepted under the old file runs as it was then.
    go.touch()
    assert [result_of(admin, i)["handleMsg"] for i in (log_id, behind)] == ["done", "done"]
    assert reload(daemon, config_of(admin, jobs)) == [
        f"INFO    reloaded {daemon.file}: 4 jobs, added none, changed none, removed none"
    ]
    assert daemon.process.pid == pid and daemon.status()["jobs"] == sorted(jobs)


def test_reload_of_a_broken_file_keeps_the_old_jobs(executor, admin):
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin)
    file = daemon.file
    keep = "ERROR   reload failed, the old jobs stay: "
    assert reload(daemon, "jobs:\n  hello:\n    shel: echo\n") == [
        f'{keep}{file}:3: jobs.hello.shel: unknown key, did you mean "shell"?'
    ]
    (two,) = reload(daemon, "jobs:\n  hello:\n    shell: echo\n    timout: 3\nx: 1\n")
    assert (
        two
        == f'{keep}{file}:4: jobs.hello.timout: unknown key, did you mean "timeout"? (and 1 more,'
        " see check)"
    )
    (syntax,) = reload(daemon, "jobs:\n  hello: [\n")
    assert re.fullmatch(rf"{re.escape(keep + str(file))}:\d+: not YAML: .+", syntax)
    file.unlink()
    assert reload(daemon, None) == [
        f"{keep}{file}: cannot be read: No such file or directory: give a readable file with -c"
        " FILE"
    ]
    assert (
        daemon.status()["jobs"] == ["hello"]
        and run_job(daemon, admin, "hello")[1]["handleMsg"] == "hello"
    )
    assert reload(daemon, config_of(admin, {"fresh": {"shell": "echo fresh"}})) == [
        f"INFO    reloaded {file}: 1 job, added fresh, changed none, removed hello"
    ]
    assert run_job(daemon, admin, "fresh")[1]["handleMsg"] == "fresh"


def test_reload_warns_of_what_needs_a_restart(executor, admin):
    jobs = {"hello": {"shell": "echo hello"}}
    admin.token = "t"
    daemon = executor(jobs, admin=admin)
    config = config_of(admin, jobs, max_running=3)
    config["admin"].update(access_token="t", addresses=[])
    warning = (
        f"has changed in {daemon.file}: that takes effect at a restart, a reload takes over only"
        " jobs and the token"
    )
    done = f"INFO    reloaded {daemon.file}: 1 job, added none, changed none, removed none"
    assert reload(daemon, config) == [
        f"WARNING admin {warning}",
        f"WARNING executor {warning}",
        done,
    ]
    # Indeed it does not take effect: the old admin still gets the results.
    run_job(daemon, admin, "hello")


# -- orphans


def test_orphans_are_reaped_while_a_job_runs(executor, admin, tmp_path):
    """A job forks short-lived processes into the background, twice; the daemon becomes their parent
    and reaps them."""
    pids, again, go = tmp_path / "pids", tmp_path / "again", tmp_path / "go"
    wave = f"for i in 1 2 3 4 5 6 7 8; do sh -c 'sleep 0.1 & echo $! >> {pids}'; done; "
    daemon = executor(
        {
            "forks": {
                "shell": f"{wave} while [ ! -e {again} ]; do sleep 0.02; done; {wave} {waits(go)}"
            }
        },
        admin=admin,
    )
    log_id, _ = admin.trigger(daemon.url, "forks")
    for count, gate in ((8, again), (16, go)):
        wait_until(lambda: pids.exists() and pids.read_text().count("\n") == count)
        orphans = pids.read_text().split()
        wait_until(
            lambda: not any(os.path.exists(f"/proc/{pid}") for pid in orphans),
            10,
            "the end of every orphan, zombies too",
        )
        assert [run["logId"] for run in daemon.status()["running"]] == [log_id]
        gate.touch()
    assert result_of(admin, log_id)["handleMsg"] == "done"


MANY_SIGNALS = """
import os, signal
import xxl_executor

signals = xxl_executor.Signals(signal.SIGCHLD, signal.SIGTERM)
for _ in range(70_000):  # more than a pipe holds
    os.kill(os.getpid(), signal.SIGCHLD)
os.kill(os.getpid(), signal.SIGTERM)
assert signals.wait() == {signal.SIGCHLD, signal.SIGTERM}
signals.wake()
os.kill(os.getpid(), signal.SIGTERM)
found = signals.wait()
while signal.SIGTERM not in found or 0 not in found:
    found |= signals.wait()
signals.close()
"""


def test_no_signal_is_lost_behind_many_others():
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", MANY_SIGNALS],
        cwd=PROGRAM.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


# -- the lock


def test_one_daemon_at_a_time(executor, admin):
    first = executor({"hello": {"shell": "echo hello"}}, admin=admin)
    second = executor(
        {"hello": {"shell": "echo hello"}}, admin=admin, directory=first.directory, start=False
    )
    lock = (first.data / "lock").read_text()
    second.start(wait=False)
    assert second.wait(20) == 1
    assert (
        f"xxl-executor: executor.data_dir: {first.data} is in use by another executor (pid"
        f" {first.process.pid}): stop it, or give this one a data_dir of its own\n" in second.log
    )
    assert (first.data / "lock").read_text() == lock, "the one that was refused changed nothing"
    run_job(first, admin, "hello")
    first.kill()
    second.start()
    run_job(second, admin, "hello")
    assert second.identity == lock.split()[0], (
        "by it the processes of the first would have been found"
    )


def test_the_lock_is_not_inherited_by_jobs(executor, admin, tmp_path):
    """A background process that may stay must not keep the next daemon from starting, nor hold its
    port."""
    pid_file = tmp_path / "pid"
    daemon = executor(
        {
            "leaves": {
                "shell": f"setsid sleep 600 > /dev/null 2>&1 & echo $! > {pid_file}",
                "background": "keep",
            }
        },
        admin=admin,
    )
    run_job(daemon, admin, "leaves")
    pid = int(pid_file.read_text())
    try:
        port = daemon.port
        assert alive(pid)
        daemon.kill()
        again = executor(
            {}, admin=admin, directory=daemon.directory, executor={"bind": f"127.0.0.1:{port}"}
        )
        assert again.port == port and alive(pid)
        assert again.stop() == 0
        assert alive(pid), "it was allowed to stay"
    finally:
        os.kill(pid, signal.SIGKILL)


# -- systemd


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_systemd_is_told(executor, admin, tmp_path, abstract):
    name = f"@xxl-executor-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    if len(name) > 100:
        pytest.skip("the temporary directory is too deep for a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if abstract else name)
        sock.settimeout(20)

        def told():
            """The next message that is not only about what runs."""
            return next(
                text
                for text in iter(lambda: sock.recv(4096).decode(), None)
                if not text.startswith("STATUS=")
            )

        daemon = executor(
            {"env": {"shell": 'echo "[$NOTIFY_SOCKET]"'}}, admin=admin, env={"NOTIFY_SOCKET": name}
        )
        assert told() == f"READY=1\nSTATUS=listening on {daemon.url}/, 1 job"
        assert run_job(daemon, admin, "env")[1]["handleMsg"] == "[]", (
            "a job that sent READY=1 would confuse systemd"
        )
        before = time.monotonic_ns() // 1000
        daemon.signal(signal.SIGHUP)
        reloading = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", told())
        assert before <= int(reloading[1]) <= time.monotonic_ns() // 1000
        assert told().split("\n")[0] == "READY=1"
        daemon.file.write_text("jobs: [")
        daemon.signal(signal.SIGHUP)
        assert told().startswith("RELOADING=1\n") and told().startswith("READY=1"), (
            "after a failure too"
        )
        daemon.signal(signal.SIGTERM)
        assert told().split("\n")[0] == "STOPPING=1"
        assert daemon.wait() == 0
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(4096)


def test_a_notify_socket_that_nobody_reads_is_no_failure(executor, admin, tmp_path):
    daemon = executor(
        {"hello": {"shell": "echo hello"}},
        admin=admin,
        env={"NOTIFY_SOCKET": str(tmp_path / "none")},
    )
    run_job(daemon, admin, "hello")
    assert daemon.stop() == 0


# -- the log


def test_one_line_for_each_step_of_a_run(executor, admin, tmp_path):
    ready = tmp_path / "ready"
    jobs = {
        "good": {"shell": "echo fine"},
        "bad": {"shell": "echo why; exit 3"},
        "python": {"python": "platform:machine"},
        "thread": {"python": "platform:machine", "isolation": "thread"},
        "slow": {"shell": f"touch {ready}; exec sleep 600"},
    }
    daemon = executor(jobs, admin=admin)
    runs = {}
    for job_id, name in enumerate(("good", "bad", "python", "thread"), 10):
        log_id, result = run_job(daemon, admin, name, jobId=job_id, executorParams="p")
        runs[f"{name} logId={log_id} jobId={job_id}"] = result["handleCode"]
    killed, _ = admin.trigger(daemon.url, "slow", jobId=1)
    wait_until(ready.exists)
    dropped, _ = admin.trigger(daemon.url, "slow", jobId=1)
    assert (
        admin.trigger(daemon.url, "slow", jobId=1, logId=dropped)[1]["code"] == 200
    )  # a repeated one is no event
    assert daemon.post("/kill", {"jobId": 1})["msg"] == "killed 1 running, dropped 1 waiting"
    assert result_of(admin, killed)["handleMsg"] == "killed by the admin"
    assert result_of(admin, dropped)["handleMsg"] == "killed by the admin before it started"
    runs.update({f"slow logId={killed} jobId=1": 500, f"slow logId={dropped} jobId=1": 500})
    assert daemon.stop() == 0
    lines = daemon.log.splitlines()
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (INFO   |WARNING|ERROR  ) \S", line)
        for line in lines
    ), daemon.log
    for run, code in runs.items():
        log_id = run.split()[1]
        of_run = [line[32:] for line in lines if re.search(rf"\b{log_id}\b", line)]
        assert [line.split()[0] for line in of_run if not line.startswith("delivered")] == (
            ["accepted", "started", "finished"]
            if str(dropped) not in run
            else ["accepted", "finished"]
        ), of_run
        for line in of_run:
            assert line.startswith("delivered ") or re.search(rf" {run}\b", line)
        assert sum(f"finished {run} code={code} in " in line for line in of_run) == 1
        assert sum(line.startswith("delivered ") for line in of_run) == 1
    assert "refused a trigger" not in daemon.log


def test_lines_under_systemd_have_a_priority(executor, admin, tmp_path):
    directory = tmp_path / "place"
    directory.mkdir()
    (directory / "stderr.txt").touch()
    found = os.stat(directory / "stderr.txt")
    daemon = executor(
        {"hello": {"shell": "echo hello"}},
        admin=admin,
        directory=directory,
        env={"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"},
    )
    log_id, _ = run_job(daemon, admin, "hello")
    before = daemon.log
    daemon.file.write_text("jobs: [")
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reload failed" in daemon.log)
    admin.trigger(daemon.url, "none")
    wait_until(lambda: "refused a trigger" in daemon.log)
    assert all(re.match(r"<6>[a-z]", line) for line in before.splitlines()), (
        "no time: the journal has it"
    )
    assert f"<6>finished hello logId={log_id} jobId=1 code=200 in " in before
    assert re.search("^<3>reload failed", daemon.log, re.M) and re.search(
        "^<4>refused a trigger: ", daemon.log, re.M
    )
    assert daemon.stop() == 0
    assert all(re.match("<[346]>", line) for line in daemon.log.splitlines())


# -- what is left


def test_nothing_is_left_after_runs(executor, admin, tmp_path):
    """No scratch file, no descriptor, no thread and no process stays from a run, however it
    ended."""
    result = 'echo message > "$XXL_JOB_RESULT_FILE"; '
    jobs = {
        "good": {"shell": result},
        "bad": {"shell": result + "exit 3"},
        "late": {"shell": result + "exec sleep 600", "timeout": "0.2s"},
        "none": {"command": ["/nonexistent"]},
        "link": {"shell": 'ln -s /etc/hostname "$XXL_JOB_RESULT_FILE"; echo no link'},
        "directory": {
            "shell": 'mkdir "$XXL_JOB_RESULT_FILE"; rmdir "$XXL_JOB_RESULT_FILE"; echo done'
        },
        "thread": {"python": "platform:machine", "isolation": "thread"},
        "python": {"python": "platform:machine"},
    }
    daemon = executor(
        jobs, admin=admin, executor={"max_running": 1}
    )  # one slot: others would be started when they are needed
    scratch = daemon.data / "run"

    def descriptors():
        return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))

    def everything():
        runs = {}
        for job_id, name in enumerate(jobs, 1):
            runs[name] = admin.trigger(daemon.url, name, jobId=job_id)[0]
        found = {name: result_of(admin, log_id) for name, log_id in runs.items()}
        wait_until(lambda: daemon.status()["undelivered"] == 0 and not daemon.status()["running"])
        return {name: (item["handleCode"], item["handleMsg"]) for name, item in found.items()}

    found = everything()
    assert (found["good"], found["bad"], found["late"][0]) == (
        (200, "message"),
        (500, "message"),
        502,
    )
    assert found["none"] == (500, "cannot start /nonexistent: No such file or directory")
    assert found["link"] == (200, "no link"), "a link is not followed"
    assert os.listdir(scratch) == []
    for _ in range(2):  # connections and threads are all there now
        everything()
    before, threads = descriptors(), len(os.listdir(f"/proc/{daemon.process.pid}/task"))
    for _ in range(3):
        everything()
    wait_until(lambda: descriptors() <= before, 10, "the closing of what runs opened")
    wait_until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/task")) <= threads)
    assert os.listdir(scratch) == []
    assert sorted(
        entry.name for entry in daemon.data.iterdir() if not entry.name.startswith("journal.db")
    ) == ["lock", "logs", "reserve", "run"]


def test_many_reloads_and_requests_at_once(executor, admin):
    """Reloads while triggers come: each trigger is accepted and has its result."""
    jobs = {"hello": {"command": ["echo", "hello"]}}
    daemon = executor(jobs, admin=admin)
    stop, accepted = threading.Event(), []

    def triggers(job_id):
        while not stop.is_set():
            log_id, reply = admin.trigger(daemon.url, "hello", jobId=job_id)
            assert reply["code"] == 200
            accepted.append(log_id)

    threads = [threading.Thread(target=triggers, args=(job_id,)) for job_id in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(5):
            lines = reload(daemon, config_of(admin, {**jobs, f"extra{number}": {"shell": "true"}}))
            assert any("reloaded" in line for line in lines)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert accepted
    assert admin.wait(lambda: all(log_id in admin.results for log_id in accepted), 30)
    assert all(len(admin.results[log_id]) == 1 for log_id in accepted)


# -- executor.log_to_stdout and executor.watch_config


def test_output_also_goes_to_stdout(executor, admin):
    daemon = executor(
        {"two": {"shell": "echo one; printf two"}, "quiet": {"shell": "true"}},
        admin=admin,
        executor={"log_to_stdout": True},
    )
    log_id, _ = run_job(daemon, admin, "two")
    quiet, _ = run_job(daemon, admin, "quiet")
    for word in ("one", "two"):
        assert f"\ntwo logId={log_id} {word}\n" in daemon.log
    assert f"\nquiet logId={quiet} \n" not in daemon.log


@pytest.fixture
def watching(executor, admin):
    """A factory of daemons with `executor.watch_config` that look ten times a second."""
    return lambda jobs, **options: executor(
        jobs,
        admin=admin,
        executor={"watch_config": True},
        program=LAUNCH,
        env=launch(WATCH_INTERVAL=0.1),
        **options,
    )


def reloads(daemon):
    """What each reload said of the jobs."""
    return re.findall(r"reloaded \S+: \d+ jobs?, (.*)", daemon.log)


def test_a_changed_file_is_taken_over_by_itself(watching, admin):
    """As editors change it: rewritten, replaced; an include too, and one that is new."""
    daemon = watching({"old": {"shell": "true"}}, include=["jobs.d/*.yaml"])
    replaced = daemon.file.with_suffix(".new")
    replaced.write_text(daemon.file.read_text().replace("old", "new"))
    replaced.replace(daemon.file)
    wait_until(lambda: reloads(daemon) == ["added new, changed none, removed old"])
    more = daemon.directory / "jobs.d/more.yaml"
    more.parent.mkdir()
    more.write_text("jobs: {more: {shell: echo more}}")
    wait_until(lambda: reloads(daemon)[1:] == ["added more, changed none, removed none"])
    more.write_text("jobs: {more: {shell: echo changed}}")
    wait_until(lambda: reloads(daemon)[2:] == ["added none, changed more, removed none"])
    assert run_job(daemon, admin, "more")[1]["handleMsg"] == "changed"
    (daemon.directory / "note.txt").write_text("a file that is none of ours")
    more.unlink()
    wait_until(lambda: reloads(daemon)[3:] == ["added none, changed none, removed more"])


def test_a_mistake_is_told_once_and_its_correction_taken_over(watching, admin):
    """Also when it is in a file that the old configuration did not have."""
    daemon = watching({"old": {"shell": "echo old"}}, include=["jobs.d/*.yaml"])
    good = daemon.file.read_text()
    daemon.file.write_text(good + "broken: [\n")
    wait_until(lambda: "reload failed, the old jobs stay: " in daemon.log)
    daemon.file.write_text(good)
    wait_until(lambda: reloads(daemon) == ["added none, changed none, removed none"])
    more = daemon.directory / "jobs.d/more.yaml"
    more.parent.mkdir()
    more.write_text("jobs: {more: {shel: echo more}}")
    mistake = (
        f"reload failed, the old jobs stay: {more}:1: jobs.more.shel: unknown key, did you mean"
        ' "shell"?'
    )
    wait_until(lambda: mistake in daemon.log)
    assert run_job(daemon, admin, "old")[1]["handleMsg"] == "old"
    more.write_text("jobs: {more: {shell: echo more}}")
    wait_until(lambda: reloads(daemon)[1:] == ["added more, changed none, removed none"])
    assert daemon.log.count("reload failed") == 2


def test_a_moved_symlink_is_a_change(watching, admin, tmp_path):
    """As Kubernetes renews a ConfigMap and a Secret: the file leads through ..data, which is
    replaced by one that leads elsewhere."""
    daemon = watching({"old": {"shell": "true"}}, start=False)
    volume, settings = (
        tmp_path / "volume",
        daemon.file.read_text().replace("access_token: ''", "access_token_file: token"),
    )

    def publish(name, text, token):
        (volume / name).mkdir(parents=True)
        (volume / name / "config.yaml").write_text(text)
        (volume / name / "token").write_text(token)
        (volume / "..new").symlink_to(name)
        (volume / "..new").rename(volume / "..data")

    publish("..1", settings, "first")
    daemon.file.unlink()
    for name in ("config.yaml", "token"):
        (daemon.directory / name).symlink_to(volume / "..data" / name)
    daemon.start()
    publish("..2", settings.replace("old", "new"), "first")
    wait_until(lambda: reloads(daemon) == ["added new, changed none, removed old"])
    publish("..3", settings.replace("old", "new"), "second")
    wait_until(lambda: "the access token has changed" in daemon.log)
    assert daemon.status(**{"XXL-JOB-ACCESS-TOKEN": "second"})["jobs"] == ["new"]


def test_a_token_alone_that_has_changed_is_taken_over(watching, tmp_path):
    daemon = watching({"old": {"shell": "true"}}, start=False)
    token = tmp_path / "token"
    token.write_text("first")
    daemon.file.write_text(
        daemon.file.read_text().replace("access_token: ''", f"access_token_file: {token}")
    )
    daemon.start()
    token.write_text("second")
    wait_until(lambda: "the access token has changed" in daemon.log)


def test_a_removed_job_finishes(watching, admin, tmp_path):
    go = tmp_path / "go"
    daemon = watching({"old": {"shell": waits(go)}})
    log_id, _ = admin.trigger(daemon.url, "old")
    running(daemon)
    daemon.file.write_text(daemon.file.read_text().replace("old", "new"))
    wait_until(lambda: reloads(daemon) == ["added new, changed none, removed old"])
    assert admin.trigger(daemon.url, "old")[1]["code"] == 500
    assert [run["logId"] for run in daemon.status()["running"]] == [log_id]
    go.touch()
    assert result_of(admin, log_id)["handleMsg"] == "done"


def test_draining_with_watch_config_waits_quietly(watching, admin, tmp_path):
    """A look that was due and never taken had the main thread turn round a thousand times a second
    until the end."""
    go = tmp_path / "go"
    daemon = watching({"job": {"shell": waits(go)}})
    admin.trigger(daemon.url, "job")
    running(daemon)
    daemon.signal(signal.SIGTERM)
    draining(daemon)

    def turns():
        return int(
            re.search(
                r"^voluntary_ctxt_switches:\s+(\d+)",
                Path(f"/proc/{daemon.process.pid}/status").read_text(),
                re.M,
            )[1]
        )

    before, began = turns(), time.monotonic()
    wait_until(lambda: time.monotonic() > began + 1)
    turned = turns() - before
    go.touch()
    assert daemon.wait() == 0
    assert turned < 100  # ten looks, and what interrupts them
