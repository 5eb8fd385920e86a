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
    """

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.steps = 0
        self.examples = 0

    def advance(self, examples):
        """Lets examples of the present epoch pass."""
        self.examples += examples

    def start_epoch(self):
        """Rounds the last epoch up to whole steps."""
        self.steps += math.ceil(self.examples / self.batch_size)
        self.examples = 0

    @property
    def step(self):
        """The step of the next example."""
        return self.steps + self.examples // self.batch_size

    def get_state(self):
        """Returns the clock as plain JSON types."""
        return {"steps": self.steps, "examples": self.examples}

    def set_state(self, state):
        """Takes over what `get_state` returned."""
        self.steps = state["steps"]
        self.examples = state["examples"]
