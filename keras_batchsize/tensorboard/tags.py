"""Names that writer and page agree on; the standard library is enough here."""

# Sub-folder of the log folder. A second, unrelated training in the same log
# folder gets `batch_size_2` and so on.
RUN = "batch_size"

# Name of the plugin, in its URL and in the metadata of its own tensors.
PLUGIN = "batch_size"

# Own tensors, JSON each: the settings of the run, and one per change. Each
# change has its own tag, after the examples seen by then, since TensorBoard
# keeps a sample of 10 tensors per tag.
INFO = "batch_size/info"
CHANGE = "batch_size/change_{}"

# Scalars, all against examples seen, with what TensorBoard shows about them.
SCALARS = {
    "batch_size/global": "Examples per optimizer update.",
    "batch_size/micro": (
        "Examples that one replica holds in memory in one forward and "
        "backward pass."
    ),
    "batch_size/accumulation_steps": "Micro-batches per replica and update.",
    "batch_size/maximum": "Largest batch size allowed, in examples.",
    "noise_scale/value": (
        "Gradient noise scale tr(Σ)/‖G‖² (McCandlish et al. 2018), in "
        "examples. NaN while it cannot be told from infinity."
    ),
    "noise_scale/lower": "Lower end of its 95 % interval, in examples.",
    "noise_scale/upper": "Upper end of its 95 % interval, in examples.",
    "gradient/squared_norm": "‖G‖² of the expected gradient, unbiased.",
    "gradient/variance": "tr(Σ), variance of one example's gradient.",
    "learning_rate/effective": "The rate of the update: base times factor.",
    "learning_rate/base": "The rate as the user's optimizer shows it.",
    "learning_rate/factor": "What the batch size multiplies it by.",
    "throughput/examples_per_second": "Examples trained on, per second.",
    "throughput/goodput": (
        "Useful examples per second (Pollux, OSDI 2021): speed times progress "
        "per example, compared with the size that the rate was meant for. "
        "Under the linear rule progress has a formula of our own."
    ),
    "memory/peak_bytes": (
        "Peak memory at this micro-batch size, as the probe measured it, or "
        "in between two sizes that it measured."
    ),
    "memory/limit_bytes": (
        "Memory of the device, or the limit that the probe was given."
    ),
    "progress/updates": "Optimizer updates made.",
    "progress/epoch": "Epochs done, with the part of the present one.",
    "progress/loss": "Mean training loss of the epoch so far, as Keras has it.",
    "progress/seconds": "Seconds of training, validation and pauses excluded.",
}

# Text and pictures of the stock tabs.
TEXT_SETTINGS = "settings"
TEXT_CHANGE = "change"
TEXT_CHANGES = "changes"
TEXT_PROBE = "probe"
IMAGE_PROBE = "probe/memory_and_speed"
IMAGE_GOODPUT = "goodput/by_batch_size"
