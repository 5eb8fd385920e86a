"""Trains on several workers, each a process of its own.

    python examples/multi_worker.py              # two workers on this machine
    python examples/multi_worker.py --workers 4

Without TF_CONFIG it starts the workers itself, on loopback. With TF_CONFIG, as
a cluster sets it, it *is* one of them: the same script runs there unchanged.
Every worker prints the same report, for each takes the same decisions.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile


def free_ports(number):
    """Returns as many ports that nobody listens on."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(options):
    """Starts the workers and waits for them; returns the exit code."""
    cluster = {
        "worker": [f"localhost:{port}" for port in free_ports(options.workers)]
    }
    # A folder that all workers see; on a cluster, one of a shared file system.
    backup_dir = options.backup_dir or tempfile.mkdtemp()
    workers = []
    try:
        for index in range(options.workers):
            task = {"type": "worker", "index": index}
            config = json.dumps({"cluster": cluster, "task": task})
            command = [sys.executable, __file__, "--backup-dir", backup_dir]
            command += ["--epochs", str(options.epochs)]
            workers.append(
                subprocess.Popen(
                    command, env={**os.environ, "TF_CONFIG": config}
                )
            )
        return max(abs(worker.wait()) for worker in workers)
    finally:
        for worker in workers:
            worker.kill()


def train(options):
    """Trains as one of the workers."""
    # Not before it is known that this process is a worker.
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    import keras_batchsize as kb
    from keras_batchsize.workers import check_tf_config

    # Without a proper TF_CONFIG each worker would train alone.
    check_tf_config()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)

    digits = load_digits()
    x = (digits.images / 16.0).astype("float32")
    y = digits.target.astype("int32")
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((8, 8)),
                keras.layers.Flatten(),
                keras.layers.Dense(128, activation="relu"),
                keras.layers.Dense(10),
            ]
        )
        model.compile(
            keras.optimizers.SGD(0.05, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )

    trainer = kb.AdaptiveTrainer(
        model, backup_dir=options.backup_dir, verbose=0
    )
    trainer.fit(
        x[:1437],
        y[:1437],
        batch_size=16,
        epochs=options.epochs,
        validation_data=(x[1437:], y[1437:]),
        verbose=0,
    )
    loss, accuracy = trainer.evaluate(x[1437:], y[1437:], verbose=0)

    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    lines = [f"worker {index}: test accuracy {accuracy:.3f}"]
    trainer.report.summary(print_fn=lines.append)
    print("\n".join(lines), flush=True)


def main():
    """Starts workers, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--backup-dir")
    options = parser.parse_args()
    if "TF_CONFIG" in os.environ:
        train(options)
    else:
        sys.exit(start(options))


if __name__ == "__main__":
    main()
