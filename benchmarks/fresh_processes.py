"""Runs functions in fresh processes with an allocator that has a limit.

Fresh for the allocator: TensorFlow is imported once, by a server that runs no
operation of it and forks a process for each call.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import time


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a process said, and how it ended.

    Attributes:
        said: What it said last, None if nothing.
        seconds: Seconds from when it was ready to its end.
        died: Whether it ended without having returned.
    """

    said: object
    seconds: float
    died: bool


def context():
    """Returns the server of processes, with TensorFlow imported."""
    # Out of memory TensorFlow lists all that it holds.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tensorflow", "keras"])
    return server


def _child(connection, limit, prepare, run, arguments):
    os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "true"
    os.environ["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = str(limit)
    prepared = prepare()
    connection.send(("ready", None))
    found = run(*prepared, *arguments)
    connection.send(("returned", found))


def call(limit, prepare, run, *arguments, timeout=600.0):
    """Calls a function in a fresh process.

    Args:
        limit: Megabytes that the allocator may hand out.
        prepare: Function whose results `run` takes first; not timed.
        run: Function to call.
        *arguments: Further arguments of `run`.
        timeout: Seconds after which the process is ended.

    Returns:
        An `Outcome`.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    process = context().Process(
        target=_child, args=(there, limit, prepare, run, arguments)
    )
    process.start()
    there.close()
    started = ended = time.perf_counter()
    said, returned = None, False
    try:
        while here.poll(timeout):
            kind, value = here.recv()
            ended = time.perf_counter()
            if kind == "ready":
                started = ended
            said, returned = value, kind == "returned"
    except EOFError:
        if not returned:
            ended = time.perf_counter()
    process.kill()
    process.join()
    return Outcome(said, ended - started, not returned)


def call_all(processes, *arguments):
    """Makes the same call in several fresh processes, two at a time.

    Args:
        processes: Integer, how many.
        *arguments: As in `call`.

    Returns:
        List of `Outcome`.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(call, *arguments) for _ in range(processes)]
        return [one.result() for one in calls]
