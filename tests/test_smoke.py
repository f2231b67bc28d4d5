from conftest import run_job


def test_hello(executor, admin):
    daemon = executor({"hello": {"shell": 'echo "hello $1"'}}, admin=admin)
    _, result = run_job(daemon, admin, "hello", executorParams="you")
    assert (result["handleCode"], result["handleMsg"]) == (200, "hello you")
    assert daemon.stop() == 0
