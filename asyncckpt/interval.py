"""How often to save: the analysis of the checkpoint interval. Pure.

All formulas weigh the time that saves take from training against the work that failures throw away. They assume that
failures come independently, at a constant rate (a Poisson process). The mean time between them is that of the whole
job: for N machines, each of which fails every M, it is M/N.

`save_secs` is what one save takes from training. For asynchronous saves that is what training waits; what a write takes
besides delays every checkpoint alike, so it adds to the work lost in a failure, but does not move the optimum.
"""

from __future__ import annotations

import math


def optimal_interval(save_secs: float, total_secs: float, failure_probability: float) -> float:
    """Δ* = √(2cT/p), in seconds: c to save, T for the whole training, p failures expected during it.

    The reference minimises (T/Δ)·c + p·Δ/2, the time spent saving plus the time lost to failures. It calls p the
    probability of a failure "per interval", but p·Δ/2 is the loss when p failures are expected in all of T, each of
    which throws away half an interval; per interval there would be pT/Δ failures, which lose pT/2 whatever Δ. Read
    so, p may exceed 1, T/p is the mean time between failures, and the formula is `young_interval(c, T/p)`.

    Raises TypeError for what is no number, ValueError unless all are positive and finite.
    """
    _check_positive(save_secs=save_secs, total_secs=total_secs, failure_probability=failure_probability)
    return math.sqrt(2 * save_secs * total_secs / failure_probability)


def young_interval(save_secs: float, mtbf_secs: float) -> float:
    """√(2δM), in seconds: δ to save, M the mean time between failures. Good while δ is much smaller than M.

    It assumes that a failure throws away half an interval on average, and that none strikes during a save or a restart.

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM
    17(9), 1974, pp. 530–531.

    Raises TypeError for what is no number, ValueError unless both are positive and finite.
    """
    _check_positive(save_secs=save_secs, mtbf_secs=mtbf_secs)
    return math.sqrt(2 * save_secs * mtbf_secs)


def daly_interval(save_secs: float, mtbf_secs: float) -> float:
    """√(2δM)·[1 + ⅓√(δ/2M) + (1/9)(δ/2M)] − δ for δ < 2M, else M, in seconds: δ to save, M between failures.

    The training time between the end of a save and the beginning of the next that minimises the whole run's expected
    time, failures during saves and restarts included. What a restart takes does not matter to it.

    Source: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
    Generation Computer Systems 22(3), 2006, pp. 303–312.

    Raises TypeError for what is no number, ValueError unless both are positive and finite.
    """
    _check_positive(save_secs=save_secs, mtbf_secs=mtbf_secs)
    if save_secs >= 2 * mtbf_secs:
        return mtbf_secs
    ratio = save_secs / (2 * mtbf_secs)
    return young_interval(save_secs, mtbf_secs) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_secs


def expected_overhead(interval_secs: float, save_secs: float, mtbf_secs: float, restart_secs: float = 0.0) -> float:
    """The fraction of time lost, to first order: δ/Δ for saving, Δ/2M for lost work, R/M for restarting.

    It holds while δ, Δ and R are much smaller than M; beyond that it is no fraction any more and may exceed 1.
    `young_interval` minimises it. Source: the model of Young's article, see there, with a restart's cost added.

    Raises TypeError for what is no number, ValueError unless all are positive (`restart_secs`: or zero) and finite.
    """
    _check_positive(interval_secs=interval_secs, save_secs=save_secs, mtbf_secs=mtbf_secs)
    if restart_secs != 0:
        _check_positive(restart_secs=restart_secs)
    return save_secs / interval_secs + interval_secs / (2 * mtbf_secs) + restart_secs / mtbf_secs


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, not {value!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value!r}")
