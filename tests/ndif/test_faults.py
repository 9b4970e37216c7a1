"""What a user sees when the network or the service fails, and that no row is computed twice."""

import json
import signal
import threading
import time
from contextlib import contextmanager

import pytest
from records import PASSAGES, TEXT, compare, record
from server import KEY, MODEL

QUICK = (*TEXT, *PASSAGES, "--sets", "top256", "--remote", "-v")


@pytest.fixture(scope="session")
def common(adapter, probe):
    return ("--model", MODEL, "--probe", probe, "--post", f"lora:{adapter}", *QUICK)


@pytest.fixture(scope="session")
def whole(client, common, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    for name in ("first", "second"):  # the first makes what the cache keeps; the second sends what every other does
        done = client("patch_four_groups", *common, "--out", out / name)
        assert done.returncode == 0, done.stderr[-3000:]
    return record(out / "second")


def sent(run: dict) -> int:
    return len(run["provenance"]["remote"]["requests"])


def until_there(out, pattern: str) -> None:
    """Wait for a condition's file: `*.request` of one in flight, `*.json` of one that is finished."""
    end = time.monotonic() + 120
    while time.monotonic() < end and not list((out.parent / "out.partial" / "conditions").glob(pattern)):
        time.sleep(0.01)


@contextmanager
def standing_still(ndif):
    """Inside, the service takes requests and works on none."""
    stopped = ndif.actors()
    assert stopped
    for actor in stopped:
        actor.suspend()
    try:
        yield
    finally:
        for actor in stopped:
            actor.resume()


def one_line(done, *words) -> None:
    """Exit code 2 and one line that says these words, after the progress."""
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error:") and all(word in last for word in words), last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "what, path, times",
    [
        ("status:503", "/request", 2),
        ("status:429", "/request", 2),
        ("status:502", "/response", 3),
        ("refuse", "/response", 3),
        ("refuse", "/request", 1),
        ("lose", "/request", 2),
    ],
)
def test_what_passes_is_tried_again(client, ndif, common, whole, out, what, path, times):
    """The rows are those of an undisturbed run, and the service ran each request once."""
    ndif.front.forwarded.clear()
    ndif.front.fault(what, path, times)
    done = client("patch_four_groups", *common, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not ndif.front.faults
    found = record(out)
    compare(found, whole)
    assert ndif.front.forwarded.count("/request") == sent(found), "a request went out twice"
    assert "next try in" in done.stderr or what == "lose"


def test_garbled_results_are_fetched_again(client, ndif, common, whole, out):
    ndif.results.fault("garble", "/ndif-results/", 2)
    done = client("patch_four_groups", *common, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not ndif.results.faults and "while reading" in done.stderr
    compare(record(out), whole)


def test_a_result_that_expired(client, ndif, common, whole, out):
    """It cannot be had: one line, what was finished is kept, and the next run computes what is missing alone."""
    conditions = sum(len(row["runs"]) for row in whole["rows"] if row["kind"] != "none")
    of_last = sent(whole) - 1  # the last condition's result
    ndif.results.fault("status:403", "/ndif-results/", after=of_last)
    broken = client("patch_four_groups", *common, "--out", out)
    one_line(broken, "cannot be had", "run the command again")
    kept = list((out.parent / "out.partial" / "conditions").glob("*.json"))
    assert len(kept) == conditions - 1
    done = client("patch_four_groups", *common, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    compare(record(out), whole)
    assert sent(record(out)) == sent(whole) - len(kept)


def test_a_refused_key(client, ndif, common, out):
    ndif.front.fault("status:401", "/request")
    done = client("patch_four_groups", *common, "--out", out)
    one_line(done, "401", "NDIF_API_KEY")
    assert KEY not in done.stderr and not out.exists()


def test_nobody_answers(client, common, out):
    started = time.monotonic()
    done = client("patch_four_groups", *common, "--out", out, NDIF_HOST="http://127.0.0.1:9")
    one_line(done, "cannot be reached", "NDIF_HOST")
    assert time.monotonic() - started < 90 and not out.exists()
    strange = client("patch_four_groups", *common, "--out", out, NDIF_HOST="127.0.0.1:9")
    one_line(strange, "https://")


def test_a_model_that_is_not_there(client, common, out):
    options = [MODEL.replace("tiny", "absent") if option == MODEL else option for option in common]
    one_line(client("patch_four_groups", *options, "--out", out), "no such repository")
    local = [str(out.parent) if option == MODEL else option for option in common]
    one_line(client("patch_four_groups", *local, "--out", out), "Hub id")
    named = ["gemma-270m" if option == MODEL else option for option in common]
    one_line(client("patch_four_groups", *named, "--out", out), "Hub id")


def test_a_model_that_the_service_does_not_host(client, common, out):
    """NDIF's own reason, and what it runs instead."""
    options = [MODEL.replace("tiny-llama", "huge") if option == MODEL else option for option in common]
    done = client("patch_four_groups", *options, "--out", out)
    one_line(done, "Could not deploy this model", "It runs:", MODEL)
    assert "is not deployed" in done.stderr and not out.exists()


def test_dpo_does_not_train_on_a_server(client, common, out):
    post = common.index("--post")
    done = client("patch_four_groups", *common[:post], *common[post + 2 :], "--out", out)
    one_line(done, "--post lora:FOLDER")


def test_a_killed_run_finds_its_request_again(client, ndif, common, whole, out):
    """SIGKILL while a condition is on the service: the next run fetches that request's result, and sends it no more."""
    process = client("patch_four_groups", *common, "--out", out, wait=False)
    until_there(out, "*.request")
    with standing_still(ndif):
        waiting, end, taken = out.parent / "out.partial" / "conditions", time.monotonic() + 60, []
        while not taken and time.monotonic() < end:
            names = [json.loads(file.read_text())["id"] for file in waiting.glob("*.request")]
            taken = [name for name in names if f"/response/{name}" in ndif.front.forwarded]  # asked after: it is sent
            time.sleep(0.05)
        process.kill()
        process.communicate()
        ndif.front.forwarded.clear()
    done = client("patch_four_groups", *common, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    compare(record(out), whole)
    (name,) = taken
    assert f"/response/{name}" in ndif.front.forwarded
    assert ndif.front.forwarded.count("/request") == sent(record(out)) - 1, "one result was there already"


def test_an_actor_that_is_killed_at_work(client, ndif, common, whole, out):
    """NDIF gives the request to a new actor; the rows are the same."""
    process = client("patch_four_groups", *common, "--out", out, wait=False)
    until_there(out, "*.request")
    actors = ndif.actors()
    for actor in actors:
        actor.kill()
    _, error = process.communicate(timeout=300)
    assert actors and process.returncode == 0, error[-3000:]
    compare(record(out), whole)


def test_a_service_that_restarts_between_conditions(client, ndif, common, whole, out):
    process = client("patch_four_groups", *common, "--remote-timeout", 60, "--out", out, wait=False)
    until_there(out, "*.json")
    ndif.stop_one("api", signal.SIGTERM)
    time.sleep(2)
    ndif.start_api()
    _, error = process.communicate(timeout=300)
    if process.returncode:  # the request in flight went down with the queue: told, and the next run goes on
        assert "no news of request" in error and "Traceback" not in error
        again = client("patch_four_groups", *common, "--out", out)
        assert again.returncode == 0, again.stderr[-3000:]
    compare(record(out), whole)


def test_a_queue_that_stands_still(client, ndif, common, whole, out):
    """--remote-timeout gives up, in one line; what was finished stays, and the next run goes on."""
    process = client("patch_four_groups", *common, "--remote-timeout", 15, "--out", out, wait=False)
    until_there(out, "*.request")
    with standing_still(ndif):
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "no news of request" in error.splitlines()[-1], error[-3000:]
    assert "--remote-timeout" in error and "Traceback" not in error
    done = client("patch_four_groups", *common, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    compare(record(out), whole)


def test_two_clients_at_once(client, common, whole, out):
    """Both get the rows of one alone."""
    found = {}

    def run(name):
        found[name] = client("patch_four_groups", *common, "--out", out / name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, done in found.items():
        assert done.returncode == 0, done.stderr[-3000:]
        compare(record(out / name), whole)
