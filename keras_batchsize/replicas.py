"""Who shares an update: the replicas of a `tf.distribute` strategy.

Example i of a superbatch belongs to replica i mod R. Whatever size the updates
then have, an update of the examples [start, stop) is the same set of examples
as on one device, and no share is larger than another by more than one example.
Cutting a superbatch into R runs, as Keras does, would put examples together
that one device never sees in one update.
"""

import time

import tensorflow as tf

from keras_batchsize import slicing
from keras_batchsize._replicas_parts import Shares
from keras_batchsize._replicas_parts import Whole

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


def batch_size_of(strategy, dataset):
    """Returns the examples in an element of a distributed dataset.

    Args:
        strategy: The strategy that it was distributed by.
        dataset: A `tf.distribute.DistributedDataset`.

    Returns:
        Integer, over all replicas; each worker is taken to have as many.
    """
    counts = Shares(strategy).counts(next(iter(dataset)))
    return sum(counts) * strategy.num_replicas_in_sync // len(counts)


def parts_of(strategy, iterator, examples):
    """Returns how replicas find their examples in what an iterator returns.

    Args:
        strategy: A `tf.distribute.Strategy`.
        iterator: Iterator over superbatches.
        examples: Function (superbatch, start, size) that returns a batch.

    Returns:
        A `Shares` or a `Whole`.
    """
    is_dealt_out = isinstance(iterator, tf.distribute.DistributedIterator)
    return (Shares if is_dealt_out else Whole)(strategy, examples)


def leaves_one_out(examples, piece, replicas):
    """Whether pieces that examples are cut into may have fewer than R."""
    return piece < replicas or 0 < examples % piece < replicas


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
        # To read all of it would count the way to the host, too.
        return context.all_reduce(tf.distribute.ReduceOp.SUM, own)[:1]

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


def share_memory(strategy):
    """Whether replicas can take their examples from the host's memory.

    An accelerator could, too, but each update would wait for its examples to
    be copied, which a distributed iterator does ahead of time.

    Args:
        strategy: A `tf.distribute.Strategy`.

    Returns:
        Bool; False for several workers, which must find out together whether
        there are data left.
    """
    devices = strategy.extended.worker_devices
    is_alone = len(devices) == strategy.num_replicas_in_sync
    return is_alone and all(
        tf.DeviceSpec.from_string(one).device_type == "CPU" for one in devices
    )


class Undealt(tf.distribute.DistributedDataset):
    """A dataset of superbatches that every replica sees the whole of.

    Keras leaves alone what says that it is distributed.

    Args:
        dataset: A `tf.data.Dataset`.
    """

    def __init__(self, dataset):
        self._dataset = dataset

    def __iter__(self):
        return iter(self._dataset)

    @property
    def element_spec(self):
        """Types of the elements."""
        return self._dataset.element_spec


def dealt_out(dataset, strategy, ahead=True):
    """Deals the examples of each element out to the replicas, in turn.

    Every worker runs the whole pipeline and keeps what belongs to its own
    replicas, as under the policy DATA of `tf.data`.

    Args:
        dataset: A `tf.data.Dataset` of superbatches, the same on all workers.
        strategy: A `tf.distribute.Strategy`.
        ahead: Whether data may be read before they are asked for.

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
                lambda index: slicing.every_nth(
                    whole, index, slicing.count_examples(whole), replicas
                )
            )

        dealt = dataset.flat_map(shares)
        return dealt.prefetch(tf.data.AUTOTUNE) if ahead else dealt

    options = tf.distribute.InputOptions(
        # By itself a strategy reads one element ahead for each replica.
        experimental_per_replica_buffer_size=1 if ahead else 0
    )
    return strategy.distribute_datasets_from_function(shares_of_worker, options)


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
