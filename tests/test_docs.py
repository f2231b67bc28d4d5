"""What the documents say of options, commands and examples is what the program has."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import PROGRAM, ROOT

import xxl_executor

SECTIONS = {
    "admin": xxl_executor.AdminConfig,
    "executor": xxl_executor.ExecutorConfig,
    "glue": xxl_executor.GlueConfig,
    "scripts": xxl_executor.ScriptsConfig,
    "jobs.NAME": xxl_executor.JobConfig,
}


def options():
    """{key: default as it is written} of everything that a configuration may hold."""
    found = {
        f"{section}.{field.name}": field.metadata["default"]
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
        if field.metadata
    }
    return {**found, "include": "[]", "scripts.directories": "[]"}


def test_no_section_is_left_out():
    """What follows is about every section that a configuration has."""
    kinds = {
        field.name: vars(xxl_executor).get(field.type)
        for field in dataclasses.fields(xxl_executor.Config)
    }
    sections = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    assert {**sections, "jobs.NAME": xxl_executor.JobConfig} == SECTIONS


EXAMPLES = ["config.example.yaml", "config.example.zh-CN.yaml"]
# what the example has otherwise, or as several lines
OTHERS = {
    "admin.addresses",
    "admin.access_token",
    "executor.bind",
    "glue.languages",
    "include",
    "scripts.directories",
}


@pytest.mark.parametrize("file", EXAMPLES)
def test_the_example_has_every_option_with_its_default(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for key, default in options().items():
        name = key.rpartition(".")[2]
        written = default.replace("${STATE_DIRECTORY:-./data}", "./data")
        if key in OTHERS or not written:
            assert re.search(rf"\b{name}:", text), key
        else:
            assert re.search(rf"\b{name}: +{re.escape(written)}(?![\w.])", text), key


def test_both_examples_are_the_same_but_for_words():
    found = []
    for file in EXAMPLES:
        config = xxl_executor.load_config(str(ROOT / file))
        jobs = [dataclasses.replace(job, description="") for job in config.jobs.values()]
        found.append((config.admin, config.executor, jobs))
    assert found[0] == found[1]


@pytest.mark.parametrize("file", ["README.md", "README.zh-CN.md"])
def test_every_command_is_named(file):
    commands = next(
        action for action in xxl_executor.parser()._actions if action.dest == "command"
    ).choices
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [name for name in commands if f"`{name}" not in text] == []


def test_both_readmes_have_the_same_code():
    """Commands and examples; comments in them are in the reader's language."""

    def blocks(file):
        text = (ROOT / file).read_text(encoding="utf-8")
        return [
            re.sub(r" +#.*", "", block)
            for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        ]

    assert blocks("README.md") == blocks("README.zh-CN.md")


def test_the_example_with_every_comment_taken_off_is_valid(tmp_path, monkeypatch):
    """A commented option must work as it is written when somebody removes the `#`."""
    text = (ROOT / "config.example.yaml").read_text(encoding="utf-8")
    opened = re.sub(r"^( *)# (\w+: .*)$", r"\1\2", text, flags=re.M)
    assert opened != text
    file = tmp_path / "config.yaml"
    file.write_text(opened, encoding="utf-8")
    (tmp_path / "jobs.d").mkdir()
    (tmp_path / "jobs.d" / "more.yaml").write_text("jobs: {}")
    config = xxl_executor.load_config(str(file))
    assert sorted(config.jobs) == sorted(yaml.safe_load(text)["jobs"])


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md"])
def test_the_test_command_is_what_ci_calls(document):
    """.ci/run takes the first line with `-m pytest` of the README."""
    lines = [
        line
        for line in (ROOT / document).read_text(encoding="utf-8").splitlines()
        if "-m pytest" in line
    ]
    assert lines == [
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m"
        " pytest"
    ]


def test_the_first_job_of_the_readme_does_what_the_page_shows(tmp_path):
    """Its configuration, typed off, and each command of the block that follows; process ids and
    times differ."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    config, console = re.findall(
        r"^```(?:yaml)?\n(.*?)^```", text[text.index("## Your first job") :], re.M | re.S
    )[:2]
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")

    def masked(shown):
        return re.sub(r"pid=\d+|[\d.]+ s:", "N", shown)

    commands = re.findall(r"^\$ python3 xxl_executor.py (.*)\n((?:(?!\$ ).*\n)+)", console, re.M)
    assert [arguments.split()[0] for arguments, _ in commands] == ["check", "exec"]
    for arguments, shown in commands:
        ran = subprocess.run(
            [sys.executable, str(PROGRAM), *arguments.split()],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            env={**os.environ, "XXL_JOB_ACCESS_TOKEN": "t"},
        )
        assert (ran.returncode, masked(ran.stdout)) == (0, masked(shown))
    mistake = re.search(r"`(\./config\.yaml:\d+: .*)`", text)[1]
    (tmp_path / "config.yaml").write_text(config.replace("timeout", "timout"), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "check"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "XXL_JOB_ACCESS_TOKEN": "t"},
    )
    assert (ran.returncode, ran.stderr) == (2, mistake + "\n")


def test_the_table_for_contributors_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!change|---)(.+?) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) >= 12
    for change, place in rows:
        names = [name for name in re.findall(r"`([^`]+)`", place) if "/" not in name]
        assert names, change
        for name in names:
            found = xxl_executor
            for part in name.split("."):
                assert hasattr(found, part), f"{change}: there is no {name}"
                found = getattr(found, part)


def test_the_picture_is_the_same_in_both_places():
    pictures = [
        re.search(r"^ sockets  .+?^ pool: what may read[^\n(]+", text, re.MULTILINE | re.DOTALL)[0]
        for text in ((ROOT / "CONTRIBUTING.md").read_text(), PROGRAM.read_text())
    ]
    assert pictures[0].replace(" ", "") == pictures[1].replace(" ", "")
