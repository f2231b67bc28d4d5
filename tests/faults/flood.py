"""Sends triggers at a pace, whatever is answered; a program of its own, see `clients`."""

import collections
import json
import random
import re
import threading
import time

from client import Client, post, run_as_program

# By jobId; "slow" keeps the slots busy and the queues full.
FLOODED = [None, "noop", "noop", "job", "job", "slow", "slow", "slow", "slow"]
REFUSALS = {
    r"\d+ triggers of this job wait already: queue_limit is 40": "queue_limit",
    r"\d+ triggers wait already: executor\.max_queued is 150": "max_queued",
    r"block strategy effect: DISCARD_LATER, the job is running or waiting": "DISCARD_LATER",
}


def reason(message):
    """Which of the known refusals it is; the message itself when none."""
    return next(
        (name for pattern, name in REFUSALS.items() if re.fullmatch(pattern, message)), message
    )


def flood(port, first, count, seconds, callers):
    """`count` triggers spread over `seconds`, on `callers` connections; returns what came of
    them."""
    accepted, times, refused, errors = (
        [],
        {"accepted": [], "refused": []},
        collections.Counter(),
        [],
    )
    start, pause = time.perf_counter() + 0.2, threading.Event()

    def call(number):
        try:
            rand = random.Random(number)
            with Client(port) as client:
                for i in range(number, count, callers):
                    pause.wait(max(0.0, start + i * seconds / count - time.perf_counter()))
                    job_id = rand.randrange(1, len(FLOODED))
                    strategy = rand.choices(
                        ("SERIAL_EXECUTION", "DISCARD_LATER", "COVER_EARLY"), (85, 10, 5)
                    )[0]
                    body = {
                        "jobId": job_id,
                        "logId": first + i,
                        "executorHandler": FLOODED[job_id],
                        "executorBlockStrategy": strategy,
                        "logDateTime": int(time.time() * 1000),
                    }
                    request = post("/run", json.dumps(body).encode())
                    began = time.perf_counter()
                    client.sock.sendall(request)
                    status, _, answer = client.answer()
                    took, answer = time.perf_counter() - began, json.loads(answer)
                    if status == 200 and answer["code"] == 200:
                        accepted.append(first + i)
                    else:
                        refused[reason(answer["msg"])] += 1
                    times["accepted" if answer["code"] == 200 else "refused"].append(took)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "accepted": accepted,
        "times": times,
        "refused": refused,
        "errors": errors,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    run_as_program(flood)
