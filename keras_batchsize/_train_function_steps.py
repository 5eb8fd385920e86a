"""Which step of an epoch it is. Part of `train_function.py`."""

import math


class EpochSteps:
    """Counts the Keras steps of an epoch.

    Args:
        number: How many Keras makes of an epoch, or None if it does not know.

    Attributes:
        number: The same.
        done: How many of them are done.
        takes_the_rest: Whether the last one takes all that is left, as the
            number is a guess: Keras would leave the rest of the data out.
        examples: Examples in all of them, None if not known.
        fewer: By how many examples there may be less.
    """

    def __init__(self, number):
        self.number = number
        self.done = 0
        self.takes_the_rest = False
        self.examples = None
        self.fewer = 0

    def end_of_call(self, at_once):
        """Returns how many are done when Keras's next call ends.

        Args:
            at_once: Integer, the model's `steps_per_execution`.

        Returns:
            Integer, or infinity for when there are no more data.
        """
        end = self.done + at_once
        if self.number is None or end < self.number:
            return end
        # Keras rounds up: 10 steps in calls of 4 would become 12.
        return math.inf if self.takes_the_rest else self.number

    @property
    def next_is_last(self):
        """Whether the epoch surely ends with the next one."""
        if self.number is None or self.takes_the_rest:
            return False
        return self.done + 1 >= self.number
