"""What examples/ and the migration pages name exists in the program, and what they configure is
valid."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, Executor, run_job

import xxl_executor

EXAMPLES = ROOT / "examples"
MANIFESTS = {
    (found["kind"], found["metadata"]["name"]): found
    for found in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8"))
}
SETTINGS = MANIFESTS["ConfigMap", "xxl-executor"]["data"]["config.yaml"]
TOKEN = MANIFESTS["Secret", "xxl-executor"]["stringData"]["token"]
POD = MANIFESTS["Deployment", "my-app"]["spec"]["template"]["spec"]
SIDECAR = next(container for container in POD["containers"] if container["name"] == "xxl-executor")
MOUNTS = {mount["name"]: mount["mountPath"] for mount in SIDECAR["volumeMounts"]}
DOCKERFILE = re.sub(
    r"\\\n", "", (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
)  # continued lines joined
RULES = [
    rule
    for group in yaml.safe_load((EXAMPLES / "prometheus-alerts.yaml").read_text(encoding="utf-8"))[
        "groups"
    ]
    for rule in group["rules"]
]
SECTIONS = {
    "admin": xxl_executor.AdminConfig,
    "executor": xxl_executor.ExecutorConfig,
    "glue": xxl_executor.GlueConfig,
    "jobs.NAME": xxl_executor.JobConfig,
}
PAGES = ["MIGRATION.md", "MIGRATION.zh-CN.md"]


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


# -- Dockerfile


def instructions(name):
    return re.findall(rf"^{name} +(.+)$", DOCKERFILE, re.M)


def test_the_image_copies_only_what_exists():
    sources = [
        word
        for line in instructions("COPY")
        for word in line.split()[:-1]
        if not word.startswith("--")
    ]
    assert (
        sources == ["xxl_executor.py"]
        and [name for name in sources if not (ROOT / name).is_file()] == []
    )


def test_the_executor_is_the_first_process_of_the_image():
    """The exec form; with the shell form /bin/sh would be PID 1, and SIGTERM would not arrive."""
    [entry], [copied] = instructions("ENTRYPOINT"), instructions("COPY")
    assert json.loads(entry) == ["python3", copied.split()[-1]]
    [command] = instructions("CMD")
    xxl_executor.parser().parse_args(json.loads(command))


def test_the_image_has_a_user_and_is_asked_for_its_health():
    assert instructions("USER") == ["10001:10001"] and instructions("VOLUME") == ["/data"]
    [health] = instructions("HEALTHCHECK")
    command = json.loads(health.partition("CMD ")[2])
    assert command[:2] == ["python3", "-c"] and "'/health'" in command[2]
    compile(command[2], "HEALTHCHECK", "exec")


def test_the_health_check_of_the_image_tells_up_from_down(tmp_path):
    """It is run as it is written, but for the port."""
    command = json.loads(instructions("HEALTHCHECK")[0].partition("CMD ")[2])[2]
    executor = Executor(tmp_path, {"executor": {"bind": "127.0.0.1:0", "data_dir": "data"}}).start()
    try:
        code = command.replace("9999", str(executor.port))
        assert code != command
        assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 0
    finally:
        executor.process.terminate()
        executor.process.wait(30)
    assert (
        subprocess.run(
            [sys.executable, "-c", code], timeout=20, stderr=subprocess.DEVNULL
        ).returncode
        == 1
    )


# -- Kubernetes


def environment():
    """{name: value} as the container has it; what a field of the pod gives is made up."""
    fields = {"status.podIP": "10.1.2.3", "metadata.name": "my-app-7d4b9c6f5-x2x7q"}
    return {
        entry["name"]: (
            entry["value"]
            if "value" in entry
            else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        )
        for entry in SIDECAR["env"]
    }


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load_config(text) as in the pod; the mounted token lies in `tmp_path`."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "token").write_text(TOKEN, encoding="utf-8")

    def load(text):
        file = tmp_path / "config.yaml"
        file.write_text(
            text.replace(MOUNTS["token"] + "/token", str(tmp_path / "token")), encoding="utf-8"
        )
        return xxl_executor.load_config(str(file))

    return load


def test_the_config_map_is_a_valid_configuration(load):
    config = load(SETTINGS)
    assert not config.glue.enabled
    assert config.admin.access_token == TOKEN and config.admin.addresses
    assert config.executor.address == "http://10.1.2.3:9999/"
    assert config.executor.watch_config and config.executor.log_to_stdout
    assert sorted(config.jobs) == ["app-request", "hello"]
    xxl_executor.refuse_unsafe(config)


def test_the_config_map_is_valid_with_scripts_from_the_admin_too(load):
    """The commented section works when somebody removes the `#`."""
    opened = re.sub(r"^# (glue: .*)$", r"\1", SETTINGS, flags=re.M)
    assert opened != SETTINGS
    config = load(opened)
    assert config.glue.enabled


def test_the_files_of_the_pod_are_where_the_configuration_says():
    settings = yaml.safe_load(SETTINGS)
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert settings["admin"]["access_token_file"] == MOUNTS["token"] + "/token"
    assert volumes["token"]["secret"]["secretName"] == "xxl-executor"
    assert volumes["config"]["configMap"]["name"] == "xxl-executor"
    assert environment()["XXL_EXECUTOR_CONFIG"] == MOUNTS["config"] + "/config.yaml"
    # The only writable place; the configuration and the token arrive as whole directories, so that
    # edits do too.
    assert [name for name, volume in volumes.items() if "emptyDir" in volume] == ["data"]
    assert settings["executor"]["data_dir"].startswith(MOUNTS["data"] + "/")
    assert environment()["TMPDIR"] == MOUNTS["data"]
    assert SIDECAR["securityContext"]["readOnlyRootFilesystem"] is True
    assert not any("subPath" in mount for mount in SIDECAR["volumeMounts"])


def test_the_pod_may_end_later_than_the_executor(load):
    config = load(SETTINGS)
    needed = config.executor.drain_timeout + max(job.kill_grace for job in config.jobs.values()) + 5
    assert POD["terminationGracePeriodSeconds"] > needed


def test_the_probes_ask_for_the_health_at_the_port_of_the_executor(load):
    [port] = SIDECAR["ports"]
    assert port["containerPort"] == load(SETTINGS).executor.bind[1]
    for probe in ("readinessProbe", "livenessProbe"):
        assert SIDECAR[probe]["httpGet"] == {"path": "/health", "port": port["name"]}


def test_the_pod_and_the_image_agree():
    image = dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))
    assert image.items() <= environment().items()
    security = SIDECAR["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == instructions("USER")[0]


# -- alerts


def metrics(expression):
    return set(re.findall(r"\bxxl_executor_(\w+)", expression))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_metric_of_an_alert_exists(rule):
    kinds = {
        **{name: kind for name, (kind, *_) in xxl_executor._METRICS.items()},
        "build_info": "gauge",
    }
    series = {
        name + suffix
        for name, kind in kinds.items()
        for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }
    assert metrics(rule["expr"]) - series == set()
    assert [
        name for name, kind in kinds.items() if kind == "counter" and not name.endswith("_total")
    ] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_happened_and_what_to_do(rule):
    summary = rule["annotations"]["summary"]
    assert "{{ $labels." in summary and re.search(r"[:,] ", summary) and rule["labels"]["severity"]


@pytest.fixture
def promtool():
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("needs promtool (Debian: prometheus)")

    def check(what, *arguments, **options):
        found = subprocess.run(
            [program, "check", what, *arguments], text=True, capture_output=True, **options
        )
        assert found.returncode == 0, found.stdout + found.stderr

    return check


def test_prometheus_takes_the_rules(promtool):
    promtool("rules", str(ROOT / "examples" / "prometheus-alerts.yaml"))


def test_prometheus_takes_the_metrics(promtool, executor, admin):
    daemon = executor({"ok": {"shell": "true"}, "bad": {"shell": "false"}}, admin=admin)
    for handler in ("ok", "bad"):
        run_job(daemon, admin, handler)
    text = daemon.session.get(daemon.url + "/metrics", timeout=20).text
    promtool("metrics", input=text)


def test_the_alerts_cover_what_goes_wrong():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    assert any(rule["expr"].startswith("up{") for rule in RULES)
    named = set().union(*(metrics(rule["expr"]) for rule in RULES))
    assert {
        "last_heartbeat_timestamp_seconds",
        "oldest_undelivered_seconds",
        "dead_results",
        "runs_total",
        "stuck_threads",
        "refused_triggers_total",
        "log_dropped_bytes_total",
        "last_success_timestamp_seconds",
        "config_last_reload_successful",
    } <= named


# -- migration


def options():
    """Every key of a configuration, as test_docs.py finds them."""
    return {"include"} | {
        f"{section}.{field.name}"
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
        if field.metadata
    }


def named(text):
    """The keys in backticks right of the first column of a table; `xxl.job...`, files and the like
    are none."""
    for row in re.findall(r"^\|[^|]+\|(.+)\|$", text, re.M):
        yield from re.findall(r"`((?:admin|executor|glue|jobs)\.[\w.]+)", row)


@pytest.mark.parametrize("file", PAGES)
def test_every_option_of_a_migration_page_exists(file):
    found = set(named(page(file)))
    assert {
        "admin.addresses",
        "executor.app_name",
        "jobs.NAME.timeout",
    } <= found and found - options() == set()


def test_both_migration_pages_name_the_same_options():
    first, second = (list(named(page(file))) for file in PAGES)
    assert first == second


def test_both_migration_pages_have_the_same_code():
    def blocks(file):
        return re.findall(r"^ *```\w*\n(.*?)^ *```", page(file), re.M | re.S)

    first, second = (blocks(file) for file in PAGES)
    assert first == second and len(first) >= 4


@pytest.mark.parametrize("file", PAGES)
def test_the_jobs_of_a_migration_page_are_valid(file, tmp_path):
    blocks = re.findall(r"^```yaml\n(.*?)^```", page(file), re.M | re.S)
    assert blocks
    for number, block in enumerate(blocks):
        target = tmp_path / f"config{number}.yaml"
        target.write_text(block, encoding="utf-8")
        assert xxl_executor.load_config(str(target)).jobs


@pytest.mark.parametrize("file", PAGES)
def test_the_python_of_a_migration_page_compiles(file):
    blocks = re.findall(r"^```python\n(.*?)^```", page(file), re.M | re.S)
    assert blocks
    for block in blocks:
        compile(block, file, "exec")
