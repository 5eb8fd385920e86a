"""What was seen at one batch size: part of the course of a probe."""

import statistics

# The mean of so few peaks may be too low, and the next size then too large.
_FEW = 3


class Peaks:
    """The peaks at one batch size, in bytes.

    Attributes:
        usual: Mean of those of equal updates; of few, the largest.
        other: Largest of whatever else ran, 0 if nothing did.
        most: Largest of all.
    """

    def __init__(self):
        self._peaks = []
        self.usual = self.other = self.most = 0.0

    def add(self, peaks, other, rare):
        """Takes note of more.

        Args:
            peaks: List of the peaks of equal updates.
            other: Peak of whatever else ran, or None.
            rare: Further peaks, which count in the largest only.
        """
        self.other = max(self.other, other or 0.0)
        self.most = max(self.most, self.other, *peaks, *rare)
        self._peaks += peaks
        self.usual = max(self._peaks)
        if len(self._peaks) > _FEW:
            # The very first update still finds memory in large pieces.
            self.usual = statistics.fmean(self._peaks[1:])
