"""Who shares an update: the replicas of a `tf.distribute` strategy.

Example i of a superbatch belongs to replica i mod R. Whatever size the updates
then have, an update of the examples [start, stop) is the same set of examples
as on one device, and no share is larger than another by more than one example.
Cutting a superbatch into R runs, as Keras does, would put examples together
that one device never sees in one update.
"""

import time

import keras
import tensorflow as tf

from keras_batchsize import slicing

# All-reduces that are timed at the start.
_TIMED = 5

SUPPORTED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
)


def strategy_of(model):
    """Returns the strategy that a model was made under, or None.

    Args:
        model: A Keras model.

    Returns:
        A `tf.distribute.Strategy`; None for TensorFlow's default.
    """
    strategy = model.distribute_strategy
    with strategy.scope():
        return strategy if tf.distribute.has_strategy() else None


def count(model):
    """Returns the number of replicas that share an update of a model."""
    return model.distribute_strategy.num_replicas_in_sync


def workers(model):
    """Returns the number of processes that train a model together."""
    strategy = strategy_of(model)
    if strategy is None:
        return 1
    return count(model) // len(strategy.extended.worker_devices)


def local_values(strategy, value):
    """Returns the values on the replicas of this worker.

    Args:
        strategy: A `tf.distribute.Strategy`.
        value: A tensor or a `tf.distribute.DistributedValues`.

    Returns:
        List of tensors.
    """
    return list(strategy.experimental_local_results(value))


def local_shares(strategy, data):
    """Takes apart what a distributed iterator hands over.

    Args:
        strategy: A `tf.distribute.Strategy`.
        data: Nested structure of distributed values.

    Returns:
        List of nested structures of tensors, one per replica of this worker.
    """
    replicas = len(strategy.extended.worker_devices)
    return [
        keras.tree.map_structure(
            lambda leaf: (
                None if leaf is None else local_values(strategy, leaf)[index]
            ),
            data,
        )
        for index in range(replicas)
    ]


def local_counts(strategy, data):
    """Returns how many examples each replica of this worker holds.

    Args:
        strategy: A `tf.distribute.Strategy`.
        data: Nested structure of distributed values.

    Returns:
        List of integers.
    """
    first = next(one for one in keras.tree.flatten(data) if one is not None)
    return [
        slicing.number_of_examples(leaf)
        for leaf in local_values(strategy, first)
    ]


def batch_size_of(strategy, dataset):
    """Returns the examples in an element of a distributed dataset.

    Args:
        strategy: The strategy that it was distributed by.
        dataset: A `tf.distribute.DistributedDataset`.

    Returns:
        Integer, over all replicas; each worker is taken to have as many.
    """
    counts = local_counts(strategy, next(iter(dataset)))
    return sum(counts) * strategy.num_replicas_in_sync // len(counts)


def end_of(counts):
    """Returns the position behind the last example of any share.

    Args:
        counts: Examples in the share of each replica.

    Returns:
        Integer: the number of examples, if they are dealt out evenly.
    """
    replicas = len(counts)
    ends = [
        (held - 1) * replicas + index + 1
        for index, held in enumerate(counts)
        if held
    ]
    return max(ends, default=0)


def leaves_one_out(examples, piece, replicas):
    """Whether pieces that examples are cut into may have fewer than R."""
    return piece < replicas or 0 < examples % piece < replicas


def own_part(data, start, stop, replicas):
    """Returns what this replica holds of the examples [start, stop).

    To be called in a replica context.

    Args:
        data: This replica's share of the superbatch.
        start: Scalar int32 tensor, position in the whole superbatch.
        stop: Likewise.
        replicas: Number of replicas.

    Returns:
        Tuple of first example in the share and number of examples; the latter
        may be zero.
    """
    index = tf.cast(
        tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32
    )
    held = slicing.count_examples(data)
    first, last = (
        tf.minimum((position - index + replicas - 1) // replicas, held)
        for position in (start, stop)
    )
    return first, last - first


def all_reduce_seconds(strategy, size):
    """Times the all-reduce of a vector, the fastest of a few.

    Args:
        strategy: A `tf.distribute.Strategy`.
        size: Numbers in the vector, of float32.

    Returns:
        Float; 0 for one replica.
    """
    if strategy.num_replicas_in_sync == 1:
        return 0.0

    def on_replica(vector):
        context = tf.distribute.get_replica_context()
        # A copy on the replica's own device: there the sum is wanted.
        own = tf.identity(vector)
        return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

    function = tf.function(
        lambda vector: strategy.run(on_replica, (vector,)), autograph=False
    )
    vector, seconds = tf.zeros((size,)), []
    for _ in range(_TIMED + 1):
        began = time.perf_counter()
        for value in local_values(strategy, function(vector)):
            value.numpy()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])  # The first one was traced.


def own_rows(rows, start, stop, replicas):
    """Returns which of the rows [start, stop) belong to this replica.

    To be called in a replica context.

    Args:
        rows: Integer tensor of shape (examples,) of the whole superbatch.
        start: Scalar int32 tensor, position in it.
        stop: Likewise.
        replicas: Number of replicas.

    Returns:
        Integer tensor of shape (own examples,).
    """
    index = tf.cast(
        tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32
    )
    first = tf.minimum(start + (index - start) % replicas, stop)
    return rows[first:stop:replicas]


def dealt_out(dataset, strategy):
    """Deals the examples of each element out to the replicas, in turn.

    Every worker runs the whole pipeline and keeps what belongs to its own
    replicas, as under the policy DATA of `tf.data`.

    Args:
        dataset: A `tf.data.Dataset` of superbatches, the same on all workers.
        strategy: A `tf.distribute.Strategy`.

    Returns:
        A `tf.distribute.DistributedDataset`.
    """
    is_tuple = isinstance(dataset.element_spec, tuple)

    def shares_of_worker(context):
        replicas = context.num_replicas_in_sync
        local = replicas // context.num_input_pipelines
        first = context.input_pipeline_id * local

        def shares(*data):
            whole = data if is_tuple else data[0]
            return tf.data.Dataset.range(first, first + local).map(
                lambda index: every_nth(whole, index, replicas)
            )

        return dataset.flat_map(shares).prefetch(tf.data.AUTOTUNE)

    return strategy.distribute_datasets_from_function(shares_of_worker)


def copies_read(model, dataset):
    """Says what several workers train on, by the sharding policy of a dataset.

    Under FILE, and under AUTO where there are files enough, a worker reads
    files of its own; under OFF it reads all of its pipeline; under DATA and
    under AUTO without files too, but examples are dealt out.

    Args:
        model: A Keras model.
        dataset: A `tf.data.Dataset` of batches.

    Returns:
        How often each example is trained on in an epoch, where every worker
        trains on all it reads; None where examples are dealt out.
    """
    number = workers(model)
    if number == 1:
        return None
    policies = tf.data.experimental.AutoShardPolicy
    policy = dataset.options().experimental_distribute.auto_shard_policy
    if policy == policies.OFF:
        return number
    if policy == policies.AUTO:
        strategy = model.distribute_strategy
        return 1 if _is_read_by_file(dataset, strategy) else None
    return None if policy == policies.DATA else 1


def _is_read_by_file(dataset, strategy):
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.FILE
    )
    by_file = dataset.with_options(options)
    try:
        iter(strategy.experimental_distribute_dataset(by_file))
    except tf.errors.OpError:
        return False  # No files, or fewer than workers.
    return True


def every_nth(data, first, step):
    """Returns the examples first, first + step, first + 2·step, ...

    Args:
        data: Nested structure of dense, ragged or sparse tensors.
        first: Scalar integer tensor.
        step: Integer.

    Returns:
        The same structure.
    """
    first = tf.cast(first, tf.int32)

    def take(leaf):
        if isinstance(leaf, tf.SparseTensor):
            return _every_nth_sparse(leaf, tf.cast(first, tf.int64), step)
        end = slicing.count_examples(leaf)
        return tf.gather(leaf, tf.range(tf.minimum(first, end), end, step))

    return keras.tree.map_structure(take, data)


def _every_nth_sparse(leaf, first, step):
    kept = tf.sparse.retain(leaf, leaf.indices[:, 0] % step == first)
    rows = (kept.indices[:, :1] - first) // step
    shape = leaf.dense_shape
    return tf.SparseTensor(
        tf.concat([rows, kept.indices[:, 1:]], axis=1),
        kept.values,
        tf.concat([(shape[:1] - first + step - 1) // step, shape[1:]], axis=0),
    )
