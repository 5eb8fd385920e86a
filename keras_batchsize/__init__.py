"""One Keras `fit` whose batch size follows the gradient noise.

```python
import keras_batchsize as kb

trainer = kb.AdaptiveTrainer(model)
history = trainer.fit(x, y, batch_size=32, epochs=20)
trainer.report.summary()
```
"""

from keras_batchsize import noise
from keras_batchsize import policies
from keras_batchsize import report
from keras_batchsize import scaling
from keras_batchsize import throughput
from keras_batchsize._version import __version__
from keras_batchsize.callbacks import BackupAndRestore
from keras_batchsize.callbacks import DynamicBatchSize
from keras_batchsize.callbacks import ExamplesProgbarLogger
from keras_batchsize.callbacks import LearningRateScaling
from keras_batchsize.plan import BatchPlan
from keras_batchsize.report import Report
from keras_batchsize.trainer import AdaptiveTrainer
from keras_batchsize.trainer import fit

__all__ = [
    "AdaptiveTrainer",
    "BackupAndRestore",
    "BatchPlan",
    "DynamicBatchSize",
    "ExamplesProgbarLogger",
    "LearningRateScaling",
    "Report",
    "__version__",
    "fit",
    "noise",
    "policies",
    "report",
    "scaling",
    "throughput",
]
