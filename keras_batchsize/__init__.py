"""One Keras `fit` whose batch size follows the gradient noise.

```python
import keras_batchsize as kb

trainer = kb.AdaptiveTrainer(model)
history = trainer.fit(x, y, batch_size=32, epochs=20)
trainer.report.summary()
```

What it offers is imported when it is first asked for, so that TensorBoard can
load our page and NumPy code our formulas without waiting for TensorFlow.
"""

import importlib
import typing

from keras_batchsize._version import __version__

if typing.TYPE_CHECKING:
    from keras_batchsize import noise
    from keras_batchsize import policies
    from keras_batchsize import report
    from keras_batchsize import scaling
    from keras_batchsize import throughput
    from keras_batchsize._trainer_fit import fit
    from keras_batchsize.batch_profile import BatchProfile
    from keras_batchsize.callbacks import BackupAndRestore
    from keras_batchsize.callbacks import BatchSizeTensorBoard
    from keras_batchsize.callbacks import DynamicBatchSize
    from keras_batchsize.callbacks import ExamplesProgbarLogger
    from keras_batchsize.callbacks import LearningRateScaling
    from keras_batchsize.callbacks import MemoryProbe
    from keras_batchsize.callbacks import TimeToTarget
    from keras_batchsize.memory import compare_dtype_policies
    from keras_batchsize.memory import find_max_batch_size
    from keras_batchsize.plan import BatchPlan
    from keras_batchsize.report import Report
    from keras_batchsize.trainer import AdaptiveTrainer

__all__ = [
    "AdaptiveTrainer",
    "BackupAndRestore",
    "BatchPlan",
    "BatchProfile",
    "BatchSizeTensorBoard",
    "DynamicBatchSize",
    "ExamplesProgbarLogger",
    "LearningRateScaling",
    "MemoryProbe",
    "Report",
    "TimeToTarget",
    "__version__",
    "compare_dtype_policies",
    "find_max_batch_size",
    "fit",
    "noise",
    "policies",
    "report",
    "scaling",
    "throughput",
]

# The module that each name is in; a test compares them with the imports above,
# which type checkers read. What is not here is a module itself.
_HOMES = {
    "AdaptiveTrainer": "trainer",
    "BackupAndRestore": "callbacks",
    "BatchPlan": "plan",
    "BatchProfile": "batch_profile",
    "BatchSizeTensorBoard": "callbacks",
    "DynamicBatchSize": "callbacks",
    "ExamplesProgbarLogger": "callbacks",
    "LearningRateScaling": "callbacks",
    "MemoryProbe": "callbacks",
    "Report": "report",
    "TimeToTarget": "callbacks",
    "compare_dtype_policies": "memory",
    "find_max_batch_size": "memory",
    "fit": "_trainer_fit",
}


def __getattr__(name):
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    value = getattr(home, name) if name in _HOMES else home
    globals()[name] = value
    return value


def __dir__():
    """Returns all public names, imported or not."""
    return sorted({*globals(), *__all__})
