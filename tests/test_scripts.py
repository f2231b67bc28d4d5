"""Directories of scripts: each executable file is a job by its name, looked up at the trigger."""

import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import PROGRAM, result_of, run_job, wait_until


@pytest.fixture
def scripts(tmp_path):
    directory = tmp_path / "scripts"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    return directory


def write(directory, name, text, mode=0o755):
    file = directory / name
    file.write_text(text)
    file.chmod(mode)
    return file


def refused(daemon, admin, name, **fields):
    _, reply = admin.trigger(daemon.url, name, **fields)
    assert reply["code"] == 500
    return reply["msg"]


def test_a_script_is_a_job_without_a_reload(executor, admin, scripts):
    daemon = executor(
        {"listed": {"shell": "echo listed"}},
        admin=admin,
        scripts={"directories": [str(scripts)], "env": {"A": "b"}, "timeout": "1s"},
    )
    assert "not found" in refused(daemon, admin, "report.sh")
    write(scripts, "report.sh", '#!/bin/sh\necho "[$1] $2 of $3, $A, $XXL_JOB_HANDLER"\n')
    fields = {"executorParams": "a {param} b", "broadcastIndex": 1, "broadcastTotal": 3}
    log_id, found = run_job(daemon, admin, "report.sh", jobId=1, **fields)
    assert found["handleMsg"] == "[a {param} b] 1 of 3, b, report.sh"
    write(scripts, "report.sh", "#!/bin/sh\nsleep 60\n")
    assert run_job(daemon, admin, "report.sh")[1]["handleMsg"] == "timed out after 1 s"
    write(scripts, "listed", "#!/bin/sh\necho of the directory\n")
    assert run_job(daemon, admin, "listed")[1]["handleMsg"] == "listed", "an entry of jobs wins"
    assert daemon.status()["recent"]["report.sh"] == [200, 502]
    (scripts / "report.sh").unlink()
    assert "not found" in refused(daemon, admin, "report.sh")


def test_what_is_no_job(executor, admin, scripts, tmp_path):
    daemon = executor({}, admin=admin, scripts={"directories": [str(scripts)]})
    write(scripts, "plain", "x", 0o644)
    write(scripts, "open", "x", 0o757)
    write(scripts, "of-a-group", "x", 0o775)
    write(scripts, ".hidden", "#!/bin/sh\n")
    write(scripts, "bare", "echo\n")
    (scripts / "windows").write_bytes(b"#!/bin/sh\r\necho\r\n")
    (scripts / "windows").chmod(0o755)
    write(scripts, "none", "#!/no/such -x\n")
    write(scripts, "{param}", "#!/bin/sh\n")
    (scripts / "below").mkdir()
    write(scripts / "below", "deep", "#!/bin/sh\n")
    outside = write(tmp_path, "outside", "#!/bin/sh\n")
    (scripts / "link").symlink_to(outside)
    os.mkfifo(scripts / "pipe", 0o755)
    for name, why in (
        ("bare", f'{scripts}/bare has no "#!" line: let it begin with #!/bin/sh or the like'),
        ("windows", f"{scripts}/windows has the line ends of Windows: dos2unix {scripts}/windows"),
        ("none", f"{scripts}/none begins with #!/no/such: there is none"),
        ("plain", f"{scripts}/plain is not executable: chmod +x {scripts}/plain"),
        ("open", f"others may write {scripts}/open: chmod go-w {scripts}/open"),
        ("of-a-group", f"others may write {scripts}/of-a-group: chmod go-w {scripts}/of-a-group"),
        ("below", f"{scripts}/below is no regular file"),
        ("link", f"{scripts}/link is no regular file"),
        ("pipe", f"{scripts}/pipe is no regular file"),
    ):
        assert refused(daemon, admin, name) == f'script "{name}" is not run: {why}'
    for name in (".hidden", "below/deep", "../outside", "{param}", "", "."):
        assert "not found" in refused(daemon, admin, name)
    write(scripts, "fine", "#!/bin/sh\necho fine\n")
    assert run_job(daemon, admin, "fine")[1]["handleMsg"] == "fine"
    scripts.chmod(0o777)  # now anybody could put another one in its place
    assert "others may write" in refused(daemon, admin, "fine")


def test_a_name_that_is_not_utf8(executor, admin, scripts):
    """No JobHandler has such a name: who asks for it nevertheless is refused, `check` names the
    script, and everything else goes on."""
    name = os.fsdecode("caf\xe9.sh".encode("latin-1"))
    write(scripts, name, "#!/bin/sh\necho hello\n")
    write(scripts, "café.sh", "#!/bin/sh\necho fine\n")
    daemon = executor({}, admin=admin, scripts={"directories": [str(scripts)]})
    reason = "its name is not UTF-8, and that of a JobHandler is"
    assert refused(daemon, admin, name) == f'script "caf?.sh" is not run: {reason}'
    assert run_job(daemon, admin, "café.sh")[1]["handleMsg"] == "fine"
    assert daemon.session.get(daemon.url + "/metrics", timeout=20).status_code == 200
    found = subprocess.run(
        [sys.executable, str(PROGRAM), "-c", str(daemon.file), "check"], capture_output=True
    )
    assert found.returncode == 0
    [line] = [line for line in found.stderr.decode().splitlines() if "script" in line]
    assert re.search(rf'script "caf.+\.sh" is not run: {reason}$', line), line


def test_a_script_of_another_user_under_root(executor, admin, scripts):
    if os.getuid():
        pytest.skip("needs root")
    daemon = executor({}, admin=admin, scripts={"directories": [str(scripts)]})
    os.chown(write(scripts, "theirs", "#!/bin/sh\n"), 65534, 65534)
    assert "belongs to another user" in refused(daemon, admin, "theirs")


def test_check_lists_them(executor, scripts, tmp_path):
    write(scripts, "report.sh", "#!/bin/sh\n")
    write(scripts, "plain", "x", 0o644)
    (tmp_path / "config.yaml").write_text(
        f"executor: {{bind: '127.0.0.1:0'}}\nscripts:\n  directories: [{scripts}, /nowhere]\n"
        "  timeout: 5m\n"
    )
    found = subprocess.run(
        [sys.executable, str(PROGRAM), "check"], cwd=tmp_path, text=True, capture_output=True
    )
    assert found.returncode == 0
    assert "./config.yaml has no mistakes, but 2 warnings: 1 job" in found.stdout
    assert "\nreport.sh  command  5m " in found.stdout
    told = [line.partition("scripts.directories: ")[::2] for line in found.stderr.splitlines()]
    assert told == [
        (
            "warning: ./config.yaml:3: ",
            f'script "plain" is not run: {scripts}/plain is not executable: chmod +x'
            f" {scripts}/plain",
        ),
        ("warning: ./config.yaml:3: ", "/nowhere: No such file or directory"),
    ]


@pytest.mark.parametrize(
    "text, told",
    [
        ("scripts: {directories: [a], shell: x}", "scripts.shell: not for scripts: remove it"),
        ("scripts: {timeout: 1s}", "scripts.directories: expected a list such as [/opt/scripts]"),
        (
            "scripts: {directories: [a], timout: 1s}",
            'scripts.timout: unknown key, did you mean "timeout"?',
        ),
        ("scripts: [a]", "scripts: expected a mapping, got a list"),
    ],
)
def test_mistakes(tmp_path, text, told):
    (tmp_path / "config.yaml").write_text(f"executor: {{bind: '127.0.0.1:0'}}\n{text}\n")
    found = subprocess.run(
        [sys.executable, str(PROGRAM), "check"], cwd=tmp_path, text=True, capture_output=True
    )
    assert (found.returncode, found.stderr) == (2, f"./config.yaml:2: {told}\n")


def test_an_accepted_script_runs_after_a_crash(executor, admin, scripts):
    write(scripts, "report.sh", "#!/bin/sh\necho done\n")
    daemon = executor(
        {"first": {"shell": "exec sleep 600"}},
        admin=admin,
        executor={"max_running": 1},
        scripts={"directories": [str(scripts)]},
    )
    admin.trigger(daemon.url, "first", jobId=1)
    wait_until(lambda: daemon.status()["running"])
    log_id, reply = admin.trigger(daemon.url, "report.sh", jobId=2)
    assert reply["code"] == 200
    daemon.kill()
    daemon.start()
    assert result_of(admin, log_id)["handleMsg"] == "done"


def test_a_reload_takes_over_other_directories(executor, admin, scripts, tmp_path):
    write(scripts, "report.sh", "#!/bin/sh\necho done\n")
    daemon = executor({}, admin=admin)
    assert "not found" in refused(daemon, admin, "report.sh")
    with open(daemon.file, "a") as stream:
        stream.write(f"\nscripts: {{directories: [{scripts}]}}\n")
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reloaded" in daemon.log)
    assert run_job(daemon, admin, "report.sh")[1]["handleMsg"] == "done"


def test_a_disabled_job(executor, admin):
    daemon = executor({"off": {"shell": "x", "enabled": False}, "on": {"shell": "x"}}, admin=admin)
    told = f'job handler "off" is disabled: jobs.off.enabled is false in {daemon.file}'
    assert refused(daemon, admin, "off") == told


def test_a_directory_that_others_can_put_another_in_place_of(executor, admin, tmp_path):
    above = tmp_path / "above"
    (above / "scripts").mkdir(parents=True)
    for place in (above, above / "scripts"):
        place.chmod(0o755)
    write(above / "scripts", "fine", "#!/bin/sh\necho fine\n")
    daemon = executor({}, admin=admin, scripts={"directories": [str(above / "scripts")]})
    assert run_job(daemon, admin, "fine")[1]["handleMsg"] == "fine"
    above.chmod(0o777)
    assert f"others may write {above} and so put another" in refused(daemon, admin, "fine")
