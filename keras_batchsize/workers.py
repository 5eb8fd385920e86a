"""Several workers that must decide alike.

Each worker runs the same program with a controller of its own. They stay in
step because each controller sees the same numbers: what is summed in the graph
is the same everywhere, and the rest, times above all, is exchanged here, twice
per superbatch.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re

import numpy as np
import tensorflow as tf

from keras_batchsize import keras_private

# Seconds to wait for all workers to come to `fit`.
PATIENCE = 600

# Numbers exchanged at once: a graph has one shape.
_WIDTH = 4

# host:port, or [IPv6]:port.
_ADDRESS = re.compile(r"([^\s:]+|\[[\da-fA-F:.]+\]):\d{1,5}")

# Letters shown of two texts that differ.
_SHOWN = 100

_REMEDY = (
    "Start the same program everywhere; only the task in TF_CONFIG may differ."
)

# Name of the fact that Keras orders data by Python's own generator.
ORDERED_BY_PYTHON = "PyDataset that is shuffled"

# Each exchange of texts has keys of its own; all workers count alike.
_EXCHANGES = itertools.count()


class Workers:
    """The processes that a strategy spans; one, most of the time.

    Args:
        strategy: A `tf.distribute.Strategy`.

    Attributes:
        number: How many workers there are.
        replicas: How many replicas this one has.
    """

    def __init__(self, strategy):
        self._strategy = strategy
        self.replicas = len(strategy.extended.worker_devices)
        self.number = strategy.num_replicas_in_sync // self.replicas
        self._gather = tf.function(
            lambda values: strategy.gather(values, axis=0), autograph=False
        )

    def gathered(self, values):
        """Returns a number of each replica, in the order of the replicas.

        Args:
            values: An integer of each replica of this worker.

        Returns:
            List of as many integers as there are replicas.
        """
        if self.number == 1:
            return list(values)
        rows = self._exchanged([[float(value)] for value in values])
        return [int(row[0]) for row in rows]

    def largest(self, values):
        """Returns the largest of each worker's numbers.

        Args:
            values: Sequence of at most four numbers of this worker. What is
                not a positive number counts as zero.

        Returns:
            List of as many floats, the same on every worker.
        """
        known = [
            float(one) if math.isfinite(one) and one > 0.0 else 0.0
            for one in values
        ]
        if self.number == 1:
            return known
        rows = self._exchanged([known] * self.replicas)
        return [float(one) for one in rows.max(axis=0)[: len(known)]]

    def _exchanged(self, rows):
        """Returns an array with a row of each replica of all workers."""
        values = self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                [
                    rows[context.replica_id_in_sync_group % self.replicas]
                    + [0.0] * (_WIDTH - len(rows[0]))
                ],
                tf.float64,
            )
        )
        return np.asarray(self._gather(values))

    # At the start.

    def check_alike(self, description, remedy=_REMEDY):
        """Raises on every worker if they are about to do different things.

        The texts go through TensorFlow's coordination service: an all-reduce
        would wait for ever for a worker that makes another model.

        Args:
            description: Dict from names to texts.
            remedy: What to do if workers differ.

        Raises:
            ValueError: If workers differ.
            RuntimeError: If a worker does not come.
        """
        if self.number == 1:
            return
        own = json.dumps(description)
        others = [json.loads(text) for text in self._told(own)]
        for name in dict.fromkeys(name for one in others for name in one):
            expected = others[0].get(name)
            for index, other in enumerate(others):
                if other.get(name) != expected:
                    raise ValueError(
                        "All workers must run the same training: they make "
                        "each update together. Received: "
                        + _difference(name, expected, other.get(name), index)
                        + f" {remedy}"
                    )

    def shuffle_alike(self, by_python=False):
        """Seeds TensorFlow, or Python too, if workers are not seeded alike.

        Each worker shuffles all the data and keeps its own part. With orders
        of their own some examples would be seen twice and others never.

        Args:
            by_python: Whether Keras shuffles by Python's own generator. Else
                that is the user's: where each worker reads all it trains on, it
                may have to differ.
        """
        if self.number == 1:
            return
        draw = tf.random.uniform((), maxval=2**31 - 1, dtype=tf.int32)
        state = hashlib.sha256(repr(random.getstate()).encode()).hexdigest()
        told = [one.split() for one in self._told(f"{int(draw)} {state}")]
        seeds, states = zip(*told)
        if len(set(seeds)) > 1:
            tf.random.set_seed(int(seeds[0]))
        if by_python and len(set(states)) > 1:
            random.seed(int(seeds[0]))

    def _told(self, text):
        """Returns the texts of all workers."""
        call = next(_EXCHANGES)
        resolver = self._strategy.cluster_resolver
        tasks = _tasks_of(resolver.cluster_spec().as_dict())
        own = tasks.index((resolver.task_type, resolver.task_id))
        keras_private.tell_workers(f"keras_batchsize/{call}/{own}", text)
        texts = []
        for index, (job, task) in enumerate(tasks):
            try:
                texts.append(
                    keras_private.told_by_worker(
                        f"keras_batchsize/{call}/{index}", PATIENCE
                    )
                )
            except tf.errors.DeadlineExceededError as error:
                raise RuntimeError(
                    "All workers must come to `fit`, or to the probe: they "
                    "train together. "
                    f"Received: nothing from /job:{job}/task:{task} for "
                    f"{PATIENCE} seconds. Look at its output: it may be making "
                    "another model, or another number of them."
                ) from error
        return texts


def _difference(name, first, second, index):
    """Shows two texts where they begin to differ."""
    first, second = str(first), str(second)
    start = len(os.path.commonprefix([first, second]))
    start = max(start - _SHOWN // 2, 0)
    first, second = (
        ("..." if start else "")
        + one[start : start + _SHOWN]
        + ("..." if len(one) > start + _SHOWN else "")
        for one in (first, second)
    )
    return f"{name}={first} on worker 0, {name}={second} on worker {index}."


@contextlib.contextmanager
def explained(strategy):
    """Says which worker is gone where TensorFlow only says that one is.

    TensorFlow's workers send each other heartbeats. One that is silent for ten
    seconds counts as crashed, and what the others wait for fails.

    Args:
        strategy: A `tf.distribute.Strategy` of several workers.

    Yields:
        None.
    """
    try:
        yield
    except tf.errors.OpError as error:
        resolver = strategy.cluster_resolver
        cluster = resolver.cluster_spec().as_dict()
        gone = _named_tasks(str(error), cluster)
        gone.discard((resolver.task_type, resolver.task_id))
        if not gone:
            raise
        named = ", ".join(
            f"/job:{job}/task:{task} ({cluster[job][task]})"
            for job, task in sorted(gone)
        )
        raise RuntimeError(
            "All workers must stay until training has ended: each update is "
            f"made by all of them. Received: lost {named}. Look for its error "
            "in its own output. Start all workers again: with backup_dir=..., "
            "a folder that all of them see, training resumes at the last "
            "complete epoch."
        ) from error


def _named_tasks(text, cluster):
    named = re.findall(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)", text)
    return {
        (job, int(task))
        for job, task in named
        if job in cluster and int(task) < len(cluster[job])
    }


def _tasks_of(cluster):
    """Returns the (job, index) of all that train, the chief first."""
    return [
        (job, index)
        for job in ("chief", "worker")
        for index in range(len(cluster.get(job, ())))
    ]


def check_tf_config(environment=None):
    """Raises if TF_CONFIG does not describe a worker of a cluster.

    `MultiWorkerMirroredStrategy` without TF_CONFIG trains alone, and so does
    each of several workers, without a word.

    Args:
        environment: Dict of environment variables; None for those of the
            process.

    Raises:
        ValueError: If it is missing, not JSON, or does not fit together. The
            text says what is wrong.
    """
    text = (os.environ if environment is None else environment).get("TF_CONFIG")
    if not text:
        _refuse("it is not set", repr(text))
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        _refuse(f"it is not JSON: {error}", text)
    cluster = config.get("cluster") if isinstance(config, dict) else None
    task = config.get("task") if isinstance(config, dict) else None
    if not isinstance(cluster, dict) or not isinstance(task, dict):
        _refuse('it needs a "cluster" and a "task"', text)
    if not all(isinstance(one, list) for one in cluster.values()):
        _refuse('each job of a "cluster" is a list of addresses', text)
    if set(cluster) - {"chief", "worker"} or not _tasks_of(cluster):
        _refuse('the jobs of a cluster are "worker", and perhaps "chief"', text)
    addresses = [one for job in cluster.values() for one in job]
    for one in addresses:
        if not _ADDRESS.fullmatch(str(one)):
            _refuse(f'an address is "host:port", not {one!r}', text)
    if len(set(addresses)) < len(addresses):
        _refuse("two workers have the same address", text)
    job, index = task.get("type"), task.get("index")
    if job not in [*cluster]:
        _refuse(f'the job of its "task", {job!r}, is not in the cluster', text)
    is_number = isinstance(index, int) or str(index).isdecimal()
    if not is_number or not 0 <= int(index) < len(cluster[job]):
        _refuse(
            f'the "index" of its "task" is {index!r}, of '
            f"{len(cluster[job])} {job}s",
            text,
        )


def _refuse(why, text):
    raise ValueError(
        "TF_CONFIG must tell each worker the addresses of all and which of "
        f"them it is: {why}. Received: TF_CONFIG={text}. Set it before "
        "TensorFlow is imported, for the first of two workers to "
        """'{"cluster": {"worker": ["a:12345", "b:12345"]}, "task": """
        """{"type": "worker", "index": 0}}'."""
    )
