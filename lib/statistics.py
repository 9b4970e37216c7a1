"""95 % intervals: over prompts (or passages) by the bootstrap, and over runs as well where there are several.

Conditions share their resamples, so differences pair. Values are float64 `[n]`, or `[n_runs, n]` with one row for each
run (a seed's probe and DPO model, or a control's draw). Then `low` and `high` hold for other runs and other prompts,
and `these_runs` for other prompts alone; with one run they hold for that run.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from scipy.optimize import toms748

RESAMPLES = 10_000
LEVEL = 95.0  # %
FEWEST = 10  # units that a percentile interval needs: with fewer it covers far less than it says


class Bootstrap:
    """One set of resamples of n units (prompts, passages, layers), used for every statistic of a run."""

    def __init__(self, n: int, seed: int):
        self.rows = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))  # [RESAMPLES, n]

    def mean(self, values) -> dict:
        """Mean of `values` with its interval."""
        values = np.atleast_2d(np.asarray(values, dtype=np.float64))
        mean = values.mean(0)
        return self._interval(mean.mean(), mean[self.rows].mean(1), values)

    def difference(self, values, baseline) -> dict:
        """Mean of the paired difference `values - baseline`; see `paired`."""
        values, baseline = paired(values, baseline)
        return self.mean(values - baseline)

    def percent_of(self, values, none, dpo) -> dict:
        """How much of DPO's change a condition makes: 100 (none - values) / (none - dpo), in %.

        The interval is None where DPO's own effect is not above 0 in some resamples: a share of nothing has none.
        """
        values, dpo = paired(values, dpo)
        change, full = np.asarray(none, np.float64) - values, np.asarray(none, np.float64) - dpo
        if full.mean() <= 0:
            return {"mean": None, "low": None, "high": None}
        share, below = change.mean() / full.mean(), full.mean(0)[self.rows].mean(1)
        if (below <= 0).any():
            return {"mean": float(100 * share), "low": None, "high": None}
        resampled = 100 * change.mean(0)[self.rows].mean(1) / below
        return self._interval(100 * share, resampled, 100 * (change - share * full) / full.mean())

    def ratio(self, numerator, denominator) -> dict:
        """Ratio of sums, such as nats per token over passages of different length; `denominator` [n] or [n_runs, n].

        Without an interval where the denominator is 0 in some resamples; no value where it is 0 altogether.
        """
        top, bottom = (np.atleast_2d(np.asarray(part, np.float64)) for part in (numerator, denominator))
        below = bottom.mean(0)[self.rows].sum(1)
        value = top.mean() / bottom.mean() if bottom.any() else None
        if not below.all():
            return {"mean": value, "low": None, "high": None}
        resampled = top.mean(0)[self.rows].sum(1) / below
        return self._interval(value, resampled, (top - value * bottom) / bottom.mean())

    def _interval(self, point: float, resampled: np.ndarray, influence: np.ndarray) -> dict:
        """influence: what each run's each unit adds to the statistic, `[n_runs, n]`, up to a constant."""
        if self.rows.shape[1] < FEWEST:
            return {"mean": float(point), "low": None, "high": None}
        over_units = interval(point, resampled)
        if len(influence) < 2:
            return over_units
        half = half_width(influence)
        these_runs = [over_units["low"], over_units["high"]]
        return {"mean": float(point), "low": float(point - half), "high": float(point + half), "these_runs": these_runs}


def paired(values, baseline) -> tuple[np.ndarray, np.ndarray]:
    """Both `[n_runs, n]`, float64. A baseline of one run, such as the base model's, stands beside every run.

    Other numbers of runs cannot be paired: both are averaged, and what is said holds for these runs.
    """
    values, baseline = (np.atleast_2d(np.asarray(rows, np.float64)) for rows in (values, baseline))
    if len(baseline) in (1, len(values)):
        return values, baseline
    return values.mean(0, keepdims=True), baseline.mean(0, keepdims=True)


def half_width(values: np.ndarray) -> float:
    """Half of the interval of a mean over runs and units, both of which would be others another time.

    Two-way random effects, by the analysis of variance: Var(mean) = MS_runs / RN + MS_units / RN - MS_rest / RN, at
    least what either alone gives, with Satterthwaite's degrees of freedom; values `[R, N]`. With few runs that differ
    it is wide, as it has to be.
    """
    n_runs, n_units = values.shape
    by_run, by_unit = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = np.square(values - by_run - by_unit + values.mean()).sum() / ((n_runs - 1) * (n_units - 1))
    runs, units = by_run.var(ddof=1) / n_runs, by_unit.var(ddof=1) / n_units
    variance = max(runs + units - rest / values.size, runs, units)
    if variance == 0:
        return 0.0
    freedom = variance**2 / (runs**2 / (n_runs - 1) + units**2 / (n_units - 1))
    return float(stats.t.ppf(0.5 + LEVEL / 200, freedom) * math.sqrt(variance))


def interval(point: float, resampled: np.ndarray) -> dict[str, float]:
    """The point and the percentiles that leave (100 - LEVEL) / 2 % on each side."""
    low, high = np.percentile(resampled, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return {"mean": float(point), "low": float(low), "high": float(high)}


def rank_p(real: float, draws: list[float]) -> float:
    """Of a value that should lie low among draws: the share of all of them, itself counted, that lie no higher."""
    return (1 + sum(draw <= real for draw in draws)) / (1 + len(draws))


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
