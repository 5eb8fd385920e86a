"""The clock that learning-rate schedules run on."""

import math


class ExamplesClock:
    """Counts the steps that plain `fit` would make at a batch size.

    A ragged last batch is a step of its own, so every epoch begins at the step
    at which it begins under plain `fit`, whatever sizes the updates have.

    Args:
        batch_size: Examples per step, the size the rate was meant for.

    Attributes:
        batch_size: Examples per step.
        steps: Steps before the present epoch.
        examples: Examples seen in the present epoch.
        epoch_length: Examples of the last epoch that has ended, 0 if none. One
            in which training was interrupted has not.
    """

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.steps = 0
        self.examples = 0
        self.epoch_length = 0

    def advance(self, examples):
        """Lets examples of the present epoch pass."""
        self.examples += examples

    def start_epoch(self):
        """Rounds the last epoch up to whole steps."""
        self.steps += math.ceil(self.examples / self.batch_size)
        self.examples = 0

    def end_epoch(self):
        """Notes how long the present epoch is."""
        self.epoch_length = self.examples or self.epoch_length

    def length_of_epoch(self, steps, most):
        """Returns the examples of an epoch, infinity if nothing tells.

        Args:
            steps: Keras steps in it, or None.
            most: Examples in each of these, or fewer in the last.
        """
        if steps is None:
            return self.epoch_length or math.inf
        # The last epoch may have been cut short, or have been of other data.
        if (steps - 1) * most < self.epoch_length <= steps * most:
            return self.epoch_length
        return steps * most

    @property
    def step(self):
        """The step of the next example."""
        return self.steps + self.examples // self.batch_size

    def get_state(self):
        """Returns the clock as plain JSON types."""
        return {
            "steps": self.steps,
            "examples": self.examples,
            "epoch_length": self.epoch_length,
        }

    def set_state(self, state):
        """Takes over what `get_state` returned."""
        self.steps = state["steps"]
        self.examples = state["examples"]
        self.epoch_length = state["epoch_length"]
