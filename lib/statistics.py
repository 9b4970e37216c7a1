"""Percentile bootstrap intervals over prompts (or passages); conditions share their resamples, so differences pair."""

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import toms748

RESAMPLES = 10_000
LEVEL = 95.0  # %


class Bootstrap:
    """One set of resamples of n units, used for every statistic of a run."""

    def __init__(self, n: int, seed: int):
        self.rows = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))  # [RESAMPLES, n]

    def mean(self, values) -> dict[str, float]:
        """Mean of `values` [n] with its interval."""
        values = np.asarray(values, dtype=np.float64)
        return interval(values.mean(), values[self.rows].mean(1))

    def difference(self, values, baseline) -> dict[str, float]:
        """Mean of the paired difference `values - baseline` [n each]."""
        return self.mean(np.subtract(values, baseline, dtype=np.float64))

    def percent_of(self, values, none, dpo) -> dict[str, float | None]:
        """How much of DPO's change a condition makes: 100 (none - values) / (none - dpo), in %; all [n].

        The interval is None where DPO's own effect is not above 0 in some resamples: a share of nothing has none.
        """
        change, full = (np.subtract(none, other, dtype=np.float64) for other in (values, dpo))
        if full.mean() <= 0:
            return {"mean": None, "low": None, "high": None}
        point = 100 * change.mean() / full.mean()
        below = full[self.rows].mean(1)
        if (below <= 0).any():
            return {"mean": float(point), "low": None, "high": None}
        return interval(point, 100 * change[self.rows].mean(1) / below)

    def ratio(self, numerator, denominator) -> dict[str, float]:
        """Ratio of sums, such as nats per token over passages of different length; both [n]."""
        top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
        return interval(top.sum() / bottom.sum(), top[self.rows].sum(1) / bottom[self.rows].sum(1))


def interval(point: float, resampled: np.ndarray) -> dict[str, float]:
    """The point and the percentiles that leave (100 - LEVEL) / 2 % on each side."""
    low, high = np.percentile(resampled, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return {"mean": float(point), "low": float(low), "high": float(high)}


def largest_within(cost: Callable[[float], float], limit: float, start: float, precision: float) -> float:
    """The largest x whose `cost` does not pass the limit, for a cost that grows with x, to a relative precision.

    From `start`, factors of 2 bracket log x and scipy's TOMS 748 narrows it. A cost that stays below the limit up to a
    million times `start` gives that x.
    """
    known = {}

    def above(log_x: float) -> float:
        if log_x not in known:
            value = cost(math.exp(log_x))
            known[log_x] = value - limit if math.isfinite(value) else 1e9  # a ruined text's may overflow
        return known[log_x]

    low = high = math.log(start)
    while above(high) <= 0:
        if high > math.log(1e6 * start):  # nothing notices it
            return math.exp(high)
        low, high = high, high + math.log(2)
    while above(low) > 0:
        low, high = low - math.log(2), low
    toms748(above, low, high, xtol=math.log1p(precision))  # ends with a bracket as narrow as that
    return math.exp(max(x for x, over in known.items() if over <= 0))
