"""Scripts from the admin (GLUE): how they are run, stored, refused, audited and pruned."""

import hashlib
import os
import re
import shutil
import stat
import time

import pytest
from conftest import result_of, wait_until

import xxl_executor

TOKEN = "a-token-of-this-test"


@pytest.fixture
def admin(loopback):
    return loopback(token=TOKEN)


@pytest.fixture
def glue(executor, admin):
    """A factory of daemons with glue.enabled: glue(languages=[...], ...)."""

    def make(jobs=None, *, start=True, **options):
        return executor(jobs, admin=admin, start=start, glue={"enabled": True, **options})

    return make


def send(daemon, admin, source, kind="GLUE_SHELL", **fields):
    """Trigger a script; returns (logId, the executor's envelope)."""
    return admin.trigger(
        daemon.url,
        "",
        glueType=kind,
        glueSource=source,
        **{"glueUpdatetime": 1_700_000_000_000, **fields},
    )


def run(daemon, admin, source, kind="GLUE_SHELL", **fields):
    log_id, reply = send(daemon, admin, source, kind, **fields)
    assert reply["code"] == 200, reply
    result = result_of(admin, log_id)
    return result["handleCode"], result["handleMsg"]


SOURCES = {
    "GLUE_SHELL": 'echo "$1|$2|$3"',
    "GLUE_PYTHON": 'import sys; print("|".join(sys.argv[1:]))',
    "GLUE_PYTHON2": 'import sys; print("|".join(sys.argv[1:]))',
    "GLUE_NODEJS": 'console.log(process.argv.slice(2).join("|"))',
    "GLUE_PHP": '<?php echo implode("|", array_slice($argv, 1)), "\\n";',
    "GLUE_POWERSHELL": '$args -join "|"',
}


@pytest.mark.parametrize("kind", list(xxl_executor.GLUE))
def test_every_language_gets_its_arguments(glue, admin, kind):
    """Parameter, shard index and total, as the Java executor passes them; a missing interpreter is
    named."""
    daemon, interpreter = glue(), xxl_executor.GLUE[kind][0]
    found = run(
        daemon,
        admin,
        SOURCES[kind],
        kind,
        executorParams="a 'b' $c",
        broadcastIndex=1,
        broadcastTotal=3,
    )
    if shutil.which(interpreter):
        assert found == (200, "a 'b' $c|1|3")
    else:
        assert found == (500, f"cannot start {interpreter}: No such file or directory")


def test_a_script_is_stored_once_for_each_update(glue, admin):
    """0700 in a directory of 0700, under the name that the Java executor uses; a line in the log
    tells of each new one."""
    daemon = glue()
    old, new = "echo old", "echo new 报表"
    assert run(daemon, admin, old, jobId=7, glueUpdatetime=1) == (200, "old")
    assert run(daemon, admin, old, jobId=7, glueUpdatetime=1) == (200, "old")
    assert run(daemon, admin, new, jobId=7, glueUpdatetime=2) == (200, "new 报表")
    directory = daemon.data / "gluesource"
    assert sorted(file.name for file in directory.iterdir()) == ["7_1.sh", "7_2.sh"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in [directory, *directory.iterdir()]} == {
        0o700
    }
    assert re.findall(r"WARNING (new script .*)", daemon.log) == [
        f"new script {directory}/7_{number}.sh of jobId=7 from 127.0.0.1: {len(source.encode())}"
        f" bytes, sha256 {hashlib.sha256(source.encode()).hexdigest()}"
        for number, source in ((1, old), (2, new))
    ]


def test_another_source_under_the_same_time_is_taken_and_told(glue, admin):
    daemon = glue()
    assert run(daemon, admin, "echo one") == (200, "one")
    assert run(daemon, admin, "echo two") == (200, "two")
    assert daemon.log.count("new script ") == 2


def test_the_timeout_of_scripts(glue, admin):
    daemon = glue(timeout="0.5s")
    assert run(daemon, admin, "sleep 600") == (502, "timed out after 0.5 s")


def test_scripts_are_killed_queued_and_covered_like_jobs(glue, admin):
    daemon = glue()
    first, _ = send(daemon, admin, "sleep 600", jobId=3)
    second, _ = send(
        daemon, admin, "echo second", jobId=3, glueUpdatetime=2, executorBlockStrategy="COVER_EARLY"
    )
    assert result_of(admin, first)["handleMsg"] == f"covered by run {second}"
    assert result_of(admin, second)["handleMsg"] == "second"
    third, _ = send(daemon, admin, "sleep 600", jobId=3, glueUpdatetime=3)
    wait_until(lambda: daemon.status(**{"XXL-JOB-ACCESS-TOKEN": TOKEN})["running"])
    admin.call(daemon.url, "/kill", {"jobId": 3})
    assert result_of(admin, third)["handleMsg"] == "killed by the admin"


@pytest.mark.parametrize(
    "kind, reason",
    [
        (
            "GLUE_GROOVY",
            (
                "GLUE_GROOVY: Groovy runs inside the Java executor only: choose another language,"
                " or a script of this host"
            ),
        ),
        ("GLUE_NODEJS", "GLUE_NODEJS: is not among glue.languages: GLUE_SHELL, GLUE_PYTHON"),
        (
            "GLUE_" + "X" * 200,
            "GLUE_"
            + "X" * 95
            + ": no such kind of script: known are "
            + ", ".join(xxl_executor.GLUE),
        ),
    ],
    ids=lambda text: text[:11],
)
def test_what_is_refused(glue, admin, kind, reason):
    daemon = glue(languages=["GLUE_SHELL", "GLUE_PYTHON"])
    _, reply = send(daemon, admin, "touch never", kind)
    assert (reply["code"], reply["msg"]) == (500, reason)
    assert list((daemon.data / "gluesource").iterdir()) == []


@pytest.mark.parametrize(
    "token, shown", [("", "empty"), ("default_token", "the one that every attacker tries first")]
)
def test_without_a_token_of_its_own_it_does_not_start(executor, token, shown):
    daemon = executor(
        start=False, glue={"enabled": True}, admin_options={"access_token": token}
    ).start(wait=False)
    assert daemon.wait() == 2
    assert (
        "glue.enabled: whoever knows the token can run any script here, and"
        f" admin.access_token is {shown}: set another one there and in the admin, or set"
        " glue.enabled: false" in daemon.log
    )


def test_an_accepted_script_runs_after_a_crash(glue, admin, tmp_path):
    go = tmp_path / "go"
    daemon = glue()
    running, _ = send(daemon, admin, f"while [ ! -e {go} ]; do sleep 0.05; done", jobId=5)
    waiting, _ = send(daemon, admin, "echo later", jobId=5, glueUpdatetime=2)
    wait_until(lambda: daemon.status(**{"XXL-JOB-ACCESS-TOKEN": TOKEN})["running"])
    daemon.kill()
    go.touch()
    daemon.start()
    assert (
        result_of(admin, running)["handleMsg"]
        == "executor restarted while the job ran, its outcome is unknown"
    )
    assert result_of(admin, waiting)["handleMsg"] == "later"


def test_what_was_not_used_for_long_is_pruned(glue, admin):
    daemon = glue()
    run(daemon, admin, "echo old", glueUpdatetime=1)
    run(daemon, admin, "echo new", glueUpdatetime=2)
    old, new = (daemon.data / "gluesource" / f"1_{number}.sh" for number in (1, 2))
    long_ago = time.time() - 31 * 86_400
    os.utime(old, (long_ago, long_ago))
    assert daemon.stop() == 0
    daemon.start()
    wait_until(lambda: not old.exists())
    assert new.exists()


def test_a_script_that_cannot_be_stored_is_refused(glue, admin):
    daemon = glue()
    file = daemon.data / "gluesource" / "1_1700000000000.sh"
    file.mkdir()
    _, reply = send(daemon, admin, "echo x")
    assert (reply["code"], reply["msg"]) == (
        500,
        f"the executor cannot store the script: {file}: Is a directory",
    )


def test_the_token_is_never_passed_on(glue, admin):
    daemon = glue()
    log_id, _ = send(daemon, admin, "env; cat /proc/$PPID/cmdline | tr '\\0' ' '")
    result_of(admin, log_id)
    metrics = daemon.session.get(daemon.url + "/metrics", timeout=20).text
    for text in (daemon.log_text(log_id), daemon.log, metrics):
        assert TOKEN not in text


# -- a token in a file


def test_a_token_file_is_read_again_at_a_reload(executor, loopback, tmp_path):
    """The new token holds for callers and for the admin; a bad one changes nothing."""
    file = tmp_path / "token"
    file.write_text("first\n")
    admin = loopback(token="first")
    daemon = executor(
        {"hello": {"shell": "echo hello"}},
        admin=admin,
        admin_options={"access_token": "", "access_token_file": str(file)},
        start=False,
    )
    config = daemon.file.read_text().replace("  access_token: ''\n", "")
    daemon.file.write_text(config)
    daemon.start()
    log_id, _ = admin.trigger(daemon.url, "hello")
    result_of(admin, log_id)

    file.write_text("")
    daemon.signal(1)
    wait_until(lambda: "reload failed, the old jobs stay" in daemon.log)
    assert daemon.post("/beat", **{"XXL-JOB-ACCESS-TOKEN": "first"})["code"] == 200

    file.write_text("second\n")
    admin.token = "second"
    daemon.signal(1)
    wait_until(lambda: "the access token has changed" in daemon.log)
    assert daemon.post("/beat", **{"XXL-JOB-ACCESS-TOKEN": "first"})["code"] == 500
    log_id, reply = admin.trigger(daemon.url, "hello")
    assert reply["code"] == 200
    assert result_of(admin, log_id)["handleMsg"] == "hello"
    assert "second" not in daemon.log and "takes effect at a restart" not in daemon.log
