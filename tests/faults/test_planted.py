"""What another user has prepared where an executor that is root reads, runs and writes."""

import os
import pwd
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import PROGRAM, run_job
from tools import need_root

NOBODY = "nobody"
program = PROGRAM


def give(place):
    """Have nobody own it."""
    os.chown(place, pwd.getpwnam(NOBODY).pw_uid, -1, follow_symlinks=False)


@pytest.fixture
def place():
    """A directory that every user may enter, with `own` for root and `shared` for nobody."""
    need_root()
    with tempfile.TemporaryDirectory(prefix="xxl-executor-test-") as directory:
        os.chmod(directory, 0o755)
        for name in ("own", "shared"):
            Path(directory, name).mkdir()
        give(Path(directory, "shared"))
        yield Path(directory)


def check(place, text):
    """What `check` says of a configuration."""
    file = place / "own" / "config.yaml"
    file.write_text(text)
    command = [sys.executable, str(PROGRAM), "-c", str(file), "check"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return found.returncode, found.stderr


def access_list(file):
    """Let nobody write it by an access list, which shows in the bits of root's group."""
    user = pwd.getpwnam(NOBODY).pw_uid
    entries = ((1, 6, -1), (2, 7, user), (4, 5, -1), (0x10, 7, -1), (0x20, 5, -1))
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(file, "system.posix_acl_access", data)
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")


@pytest.mark.parametrize(
    "through",
    [
        "itself",
        "a link to it",
        "a link on the way",
        "its library",
        "its base",
        "an access list",
        "not there yet",
    ],
)
def test_an_interpreter_that_another_user_can_change_is_not_started(place, through):
    """It would be root that starts it, for `check` and for a run, before it becomes the user."""
    shared, own = place / "shared", place / "own"
    script = f"#!/bin/sh\necho >> {place}/ran\n"
    program, changeable = shared / "python", shared
    if through in ("its library", "its base"):
        base = own / "base" if through == "its base" else own
        program, changeable = own / "bin" / "python", base / "lib" / "python3.1"
        changeable.mkdir(parents=True)
        program.parent.mkdir()
        (own / "pyvenv.cfg").write_text(f"home = {own}/base/bin\n")
        give(changeable)
    if through == "an access list":
        program = changeable = own / "python"
    program.write_text(script)
    program.chmod(0o755)
    if through == "an access list":
        access_list(program)
    if through == "not there yet":
        program.unlink()
        changeable.chmod(0o1777)
        os.chown(changeable, 0, 0)
    if through == "a link to it":
        (own / "python").symlink_to(program)
        program = own / "python"
    if through == "a link on the way":
        (shared / "link").symlink_to(own / "python")
        os.rename(program, own / "python")
        (own / "other").symlink_to(shared / "link")
        program = own / "other"
    job = f'{{python: "m:f", user: {NOBODY}, interpreter: {program}}}'
    status, told = check(place, f'executor: {{bind: "127.0.0.1:0"}}\njobs: {{a: {job}}}\n')
    assert (status, told) == (
        2,
        f"{own}/config.yaml:2: jobs.a.interpreter: root starts it before it becomes the user"
        f" {NOBODY}, and others than root can change {changeable}: chown root, chmod go-w, or use"
        " command: [interpreter, script]\n",
    )
    assert not (place / "ran").exists()


def test_what_an_interpreter_has_installed_runs_as_the_user(executor, admin, place):
    """Modules that are installed beside it are found, and what they start with is not root's."""
    if not os.path.exists("/usr/bin/python3"):
        pytest.skip("needs a Python that every user can read")
    nobody = str(pwd.getpwnam(NOBODY).pw_uid)
    venv, ran = place / "own" / "venv", place / "shared" / "ran"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(venv)], check=True)
    [packages] = venv.glob("lib/python3*/site-packages")
    (packages / "installed.py").write_text("import os\ndef main():\n    return str(os.getuid())\n")
    (packages / "x.pth").write_text(f"import os; open('{ran}', 'a').write(f'{{os.getuid()}} ')\n")
    job = {"python": "installed:main", "user": NOBODY, "interpreter": f"{venv}/bin/python"}
    daemon = executor({"job": {**job, "cwd": "/"}}, admin=admin)
    assert run_job(daemon, admin, "job")[1]["handleMsg"] == nobody
    assert daemon.stop() == 0
    assert set(ran.read_text().split()) == {nobody}
    assert "WARNING" not in daemon.log


FILES = ("lock", "reserve", "journal.db", "journal.db-wal", "journal.db-journal")


@pytest.mark.parametrize("name", [*FILES, "run", "logs", "gluesource"])
def test_what_another_user_has_put_into_data_dir_is_not_used(executor, place, name):
    daemon = executor({"hello": {"shell": "echo hello"}}, start=False)
    victim, planted = place / "own" / "victim", daemon.data / name
    daemon.data.mkdir()
    if name in FILES:
        victim.write_text("precious\n")
    else:
        victim.mkdir()
        (victim / "1.result").write_text("precious\n")
    planted.symlink_to(victim)
    give(planted)
    before = victim.stat()
    daemon.start(wait=False)
    assert daemon.process.wait(20) == 1
    assert daemon.log.endswith(
        f"executor.data_dir: {planted} belongs to user {pwd.getpwnam(NOBODY).pw_uid}, who could"
        " have this executor write where he wants: remove it, or give it to the executor's user"
        " with chown -h\n"
    )
    after = victim.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_size) == (
        before.st_mtime_ns,
        before.st_mode,
        before.st_size,
    )


def test_links_of_ones_own_are_followed(executor, admin, place):
    """Logs on another disk."""
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin, start=False)
    daemon.data.mkdir()
    (daemon.data / "logs").symlink_to(place / "own")
    daemon.start()
    assert run_job(daemon, admin, "hello")[1]["handleMsg"] == "hello"
    assert list((place / "own").glob("*/*.log"))


def test_a_data_dir_that_others_can_change_is_told(place):
    data = place / "own" / "data"
    data.mkdir()
    data.chmod(0o777)
    text = f'executor: {{bind: "127.0.0.1:0", data_dir: {data}}}\njobs: {{a: {{shell: x}}}}\n'
    status, told = check(place, text)
    assert status == 0 and told.endswith(
        f"executor.data_dir: others can change {data}, and so results, logs and scripts of the"
        " admin: chown, chmod go-w\n"
    )
    data.chmod(0o750)
    assert check(place, text) == (0, "")


def test_a_directory_in_place_of_that_for_results_is_not_used(executor, admin, place):
    """It may be tidied away while the executor runs, and whoever comes then has its name."""
    temporary = place / "temporary"
    temporary.mkdir()
    temporary.chmod(0o1777)
    job = {"shell": "echo told > $XXL_JOB_RESULT_FILE; echo $XXL_JOB_RESULT_FILE", "user": NOBODY}
    daemon = executor({"job": job}, admin=admin, env={"TMPDIR": str(temporary)})
    assert run_job(daemon, admin, "job")[1]["handleMsg"] == "told"
    [first] = temporary.iterdir()
    first.rmdir()
    first.mkdir()
    give(first)
    log_id, result = run_job(daemon, admin, "job")
    assert result["handleMsg"] == "told"
    [log] = daemon.data.glob(f"logs/*/{log_id}.log")
    assert str(first) not in log.read_text() and str(temporary) in log.read_text()


def test_a_lock_that_is_a_fifo_holds_no_command_up(place):
    data = place / "own" / "data"
    data.mkdir()
    os.mkfifo(data / "lock")
    command = [sys.executable, str(PROGRAM), "status", "--data-dir", str(data)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (1, "")
    assert "no executor has used data_dir" in found.stdout
