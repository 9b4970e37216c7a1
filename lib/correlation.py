"""Correlations of two numbers over all neurons, with intervals over whole layers."""

import numpy as np
from scipy import stats

from lib.statistics import Bootstrap, interval


def correlation(first, second, over_layers: Bootstrap) -> dict:
    """Pearson's r of two `[n_layers, d_mlp]` tensors over all neurons (Yang table 17) and Spearman's rho.

    `mean` is r, `low` and `high` its 95 % interval over resampled layers; `p` takes neurons as independent, as in the
    paper. `within`: the mean of every layer's own r; the r over all neurons is that of the layer with the largest
    values, where layers differ much in scale.
    """
    x, y = ((tensor - tensor.mean()).numpy() for tensor in (first, second))  # centred: sums of squares stay exact
    r, p = stats.pearsonr(x.ravel(), y.ravel())
    by_layer = np.stack([x, y, x * x, y * y, x * y]).mean(-1)  # [5, n_layers]
    mx, my, xx, yy, xy = by_layer[:, over_layers.rows].mean(-1)  # over resampled layers, [RESAMPLES] each
    resampled = (xy - mx * my) / np.sqrt((xx - mx**2) * (yy - my**2))
    u, v = ((tensor - tensor.mean(-1, keepdim=True)).numpy() for tensor in (first, second))
    scale = np.sqrt((u * u).sum(-1) * (v * v).sum(-1))
    own = (u * v).sum(-1) / np.where(scale > 0, scale, 1)  # [n_layers], 0 where nothing shifts
    return interval(r, resampled) | {
        "within": interval(own.mean(), own[over_layers.rows].mean(-1)),
        "p": float(p),
        "rho": float(stats.spearmanr(x.ravel(), y.ravel()).statistic),
    }
