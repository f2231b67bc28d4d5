"""What `check` and the start say of what is missing on this host, before a run fails for it."""

import os
import signal
import stat
import subprocess
import sys

import pytest
from conftest import PROGRAM, wait_until

program = PROGRAM
MODULES = {
    "good.py": "def main(): open('ran', 'w')\nopen('ran', 'w')\n",
    "broken.py": "def main(:\n",
    "package/__init__.py": "raise SystemExit('imported')\n",
    "package/inner.py": "try:\n    from json import loads as main\nexcept ImportError: pass\n",
    "open.py": "from os import *\n",
}
CONFIG = """\
executor: {bind: "127.0.0.1:0"}
jobs:
  cwd: {shell: x, cwd: /nowhere}
  user: {shell: x, user: nobody-here}
  program: {command: [no-such-program, x]}
  own-path: {command: [tool], env: {PATH: bin}, cwd: /}
  file: {command: [./missing]}
  plain: {command: [./plain.sh]}
  shell: {shell: 'if true; then echo'}
  braces: {command: [echo, "{params}", "{param}", "{print}", "a{shard_idx}"]}
  interpreter: {python: "good:main", interpreter: /opt/none/python}
  no-python: {python: "good:main", interpreter: /bin/true}
  pythonpath: {python: "good:main", pythonpath: [lib, .]}
  module: {python: "missing:main"}
  inner: {python: "package.other:main"}
  function: {python: "good:mian"}
  syntax: {python: "broken:main", isolation: thread}
  fine: {python: "good:main"}
  deep: {python: "package.inner:main"}
  star: {python: "open:getcwd"}
  builtin: {python: "time:time"}
  other: {python: "good:main", interpreter: PYTHON}
  " ": {shell: x}
"""


def check(directory, *arguments, **env):
    return subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM), *arguments],
        cwd=directory,
        text=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, **env},
    )


@pytest.fixture
def host(tmp_path):
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "plain.sh").write_text("true\n")
    text = CONFIG.replace("PYTHON", sys.executable)
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path


def test_what_is_missing_is_told_with_its_line(host):
    before = sorted(os.listdir(host))
    found = check(host, "check")
    assert found.returncode == 0
    assert "./config.yaml has no mistakes, but 17 warnings: 21 jobs" in found.stdout
    elsewhere = "in pythonpath, cwd or the interpreter's own path"
    wanted = {
        3: ("cwd.cwd", "the directory /nowhere does not exist"),
        4: ("user.user", "there is no user nobody-here on this host"),
        5: ("program.command", f"no-such-program is not found in {os.environ['PATH']}"),
        6: ("own-path.command", "tool is not found in bin"),
        7: ("file.command", f"the program {host}/missing does not exist"),
        8: ("plain.command", f"{host}/plain.sh is not executable: chmod +x"),
        11: ("interpreter.interpreter", "the program /opt/none/python does not exist"),
        12: ("no-python.interpreter", "/bin/true is no Python that runs"),
        13: ("pythonpath.pythonpath", f"{host}/lib does not exist"),
        14: ("module.python", f"there is no module missing {elsewhere}"),
        15: ("inner.python", f"there is no module package.other {elsewhere}"),
        16: ("function.python", f'{host}/good.py has no function mian, did you mean "main"?'),
        17: ("syntax.python", None),
        23: (" ", "a job without a name: no trigger can call it"),
    }
    lines = found.stderr.splitlines()
    for number, (key, text) in wanted.items():
        told = f"warning: ./config.yaml:{number}: jobs.{key}: "
        (line,) = [line for line in lines if f":{number}: " in line]
        assert line.startswith(told) and (text is None or line == told + text), line
    (shell,) = [
        line for line in lines if ":9: jobs.shell.shell: the shell cannot read it: " in line
    ]
    assert "yntax error" in shell
    braces = [line.partition(": jobs.braces.command: ")[2] for line in lines if ":10: " in line]
    assert braces == [
        "{params} stays as it is, did you mean {param}?",
        "{shard_idx} stays as it is, did you mean {shard_index}?",
    ]
    assert len(lines) == len(wanted) + 3, found.stderr
    assert sorted(os.listdir(host)) == before, "nothing of a job was run or imported"


def test_no_jobs(host):
    (host / "config.yaml").write_text('executor: {bind: "127.0.0.1:0"}\njobs: {}\n')
    found = check(host, "check")
    assert (found.returncode, found.stderr) == (
        0,
        "warning: ./config.yaml:2: jobs: there are none: every trigger will be refused\n",
    )


def test_an_old_python(host):
    old = host / "old-python"
    old.write_text("#!/bin/sh\nprintf '[3, 6]\\n[]\\n'\n")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    text = f'executor: {{bind: "127.0.0.1:0"}}\njobs: {{a: {{python: "good:main", interpreter: {old}}}}}\n'
    (host / "config.yaml").write_text(text)
    told = (
        f"{old} is too old a Python, a python job needs 3.9: use command: [python, script] for it"
    )
    assert check(host, "check").stderr == f"warning: ./config.yaml:2: jobs.a.interpreter: {told}\n"


def test_a_module_that_only_the_current_directory_has(host):
    """A job does not find it there, whatever its interpreter."""
    other, link = host / "elsewhere", host / "python"
    other.mkdir()
    link.symlink_to(sys.executable)
    job = f'{{python: "good:main", cwd: elsewhere, interpreter: {link}}}'
    (host / "config.yaml").write_text(f'executor: {{bind: "127.0.0.1:0"}}\njobs: {{a: {job}}}\n')
    told = "there is no module good in pythonpath, cwd or the interpreter's own path"
    assert check(host, "check").stderr == f"warning: ./config.yaml:2: jobs.a.python: {told}\n"


def test_an_interpreter_that_only_one_of_two_jobs_finds(host):
    job = f'python: "good:main", interpreter: {os.path.basename(sys.executable)}'
    path = os.path.dirname(sys.executable)
    (host / "config.yaml").write_text(
        f'executor: {{bind: "127.0.0.1:0"}}\njobs:\n  a: {{{job}, env: {{PATH: "{path}"}}}}\n'
        f"  b: {{{job}, env: {{PATH: /nowhere}}}}\n"
    )
    assert "warning: ./config.yaml:4: jobs.b.interpreter: " in check(host, "check").stderr


@pytest.fixture
def another_python(host):
    """An interpreter that is not the one of the program, for this only begins it."""
    wrapper = host / "another-python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


FINDER = """\
import importlib.util, sys
class {name}:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {file!r}) if name == "edited" else None
sys.meta_path.append({name}())
"""


def test_a_module_that_a_finder_finds(host, another_python):
    """`pip install --editable` puts a finder into sys.meta_path; another interpreter's can only be
    asked by itself, so nothing is said then."""
    (host / "elsewhere").mkdir()
    source = host / "elsewhere/edited.py"
    source.write_text("def main(): open('ran', 'w')\nopen('ran', 'w')\n")
    (host / "hook").mkdir()
    finder = FINDER.format(name="EditableFinder", file=str(source))
    (host / "hook/sitecustomize.py").write_text(finder)
    (host / "config.yaml").write_text(f"""\
executor: {{bind: "127.0.0.1:0"}}
jobs:
  own: {{python: "edited:main", preload: [edited]}}
  thread: {{python: "edited:main", isolation: thread}}
  other: {{python: "edited:main", preload: [edited], interpreter: {another_python}}}
  wrong: {{python: "edited:mian"}}
  none: {{python: "missing:main"}}
""")
    found = check(host, "check", PYTHONPATH=str(host / "hook"))
    assert found.returncode == 0
    assert found.stderr.splitlines() == [
        f"warning: ./config.yaml:6: jobs.wrong.python: {source} has no function mian, did you mean"
        ' "main"?',
        "warning: ./config.yaml:7: jobs.none.python: there is no module missing in pythonpath, cwd"
        " or the interpreter's own path",
    ]
    assert not (host / "ran").exists()


def test_what_another_interpreter_does_not_find(host, another_python):
    (host / "config.yaml").write_text(f"""\
executor: {{bind: "127.0.0.1:0"}}
jobs:
  a: {{python: "good:main", interpreter: {another_python}, preload: [json, missing]}}
  b: {{python: "package.other:main", interpreter: {another_python}}}
""")
    elsewhere = "in pythonpath, cwd or the interpreter's own path"
    found = check(host, "check")
    assert (found.returncode, found.stderr.splitlines()) == (
        0,
        [
            f"warning: ./config.yaml:3: jobs.a.preload: there is no module missing {elsewhere}",
            f"warning: ./config.yaml:4: jobs.b.python: there is no module package.other {elsewhere}",
        ],
    )


def test_a_module_that_is_no_file_of_its_name(host, another_python):
    """os.path is posixpath."""
    (host / "config.yaml").write_text(f"""\
executor: {{bind: "127.0.0.1:0"}}
jobs:
  own: {{python: "os.path:join", preload: [os.path]}}
  other: {{python: "os.path:join", preload: [os.path], interpreter: {another_python}}}
""")
    found = check(host, "check")
    assert (found.returncode, found.stderr) == (0, "")


def test_a_shell_that_does_not_get_to_an_answer(host):
    """Nothing is known to be wrong with the job when a signal ended `sh -n`, which may have run out
    of stack or memory."""
    deep = "( " * 60_000
    ran = subprocess.run(["/bin/sh", "-n", "-c", deep], capture_output=True)
    if ran.returncode >= 0:
        pytest.skip("this shell is not ended by what is nested deeply")
    (host / "config.yaml").write_text(
        f'executor: {{bind: "127.0.0.1:0"}}\njobs: {{a: {{shell: "{deep}"}}, b: {{shell: if}}}}\n'
    )
    found = check(host, "check")
    assert found.returncode == 0 and "jobs.b.shell: the shell cannot read it: " in found.stderr
    assert "jobs.a" not in found.stderr


def test_the_start_and_a_reload_tell_it_too(executor):
    daemon = executor({"a": {"shell": "x", "cwd": "/nowhere"}})
    told = "jobs.a.cwd: the directory /nowhere does not exist"
    wait_until(lambda: f"config.yaml:{1 + line(daemon, 'cwd')}: {told}" in daemon.log)
    text = (
        daemon.file.read_text().replace("cwd: /nowhere", "cwd: /").replace("shell: x", "shell: if")
    )
    daemon.file.write_text(text)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "jobs.a.shell: the shell cannot read it: " in daemon.log)


def line(daemon, word):
    lines = daemon.file.read_text().splitlines()
    return next(number for number, text in enumerate(lines) if word in text)


@pytest.mark.parametrize("arguments", [["run"], ["check"], [], ["demo"]], ids=" ".join)
def test_without_requests(host, arguments):
    (host / "config.yaml").write_text('executor: {bind: "127.0.0.1:0"}\njobs: {a: {shell: x}}\n')
    (host / "hook").mkdir()
    (host / "hook/sitecustomize.py").write_text(
        "import importlib.util, sys\nfound = importlib.util.find_spec\n"
        "sys.modules['requests'] = None\n"
        "importlib.util.find_spec = lambda name: None if name == 'requests' else found(name)\n"
    )
    found = check(host, *arguments, PYTHONPATH="hook")
    assert (found.returncode, found.stderr) == (
        1,
        "xxl-executor: No module named 'requests': apt install python3-requests python3-yaml, or"
        " pip install requests PyYAML\n",
    )


def test_an_interpreter_does_not_see_the_token(executor, tmp_path):
    """It belongs to the job, which gets no secret of the executor either."""
    seen, wrapper = tmp_path / "seen", tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nenv >> {seen}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    jobs = {"a": {"python": "json:loads", "interpreter": str(wrapper)}, "b": {"shell": "true"}}
    executor(jobs, env={"XXL_JOB_ACCESS_TOKEN": "s3cret"})
    wait_until(lambda: seen.exists() and seen.read_text().count("PATH=") >= 2)
    assert "s3cret" not in seen.read_text()


@pytest.mark.parametrize(
    "source", ["'-' * 200000 + '1'", "'x = 1\\n' * 400000"], ids=["deep", "long"]
)
def test_a_module_that_is_no_pleasure_to_parse(host, source):
    (host / "good.py").write_text(eval(source))
    (host / "config.yaml").write_text(
        'executor: {bind: "127.0.0.1:0"}\njobs: {a: {python: "good:main"}, b: {shell: if}}\n'
    )
    found = check(host, "check")
    assert found.returncode == 0 and "jobs.b.shell" in found.stderr
    assert "Traceback" not in found.stderr


def test_names_are_shown_escaped(host):
    (host / "config.yaml").write_text(
        'executor: {bind: "127.0.0.1:0"}\njobs: {"\\e[2J": {shell: x, cwd: /nowhere}}\n'
    )
    found = check(host, "check")
    assert found.returncode == 0 and "\x1b" not in found.stdout + found.stderr
    assert "\\x1b[2J" in found.stdout and "\\x1b[2J" in found.stderr
