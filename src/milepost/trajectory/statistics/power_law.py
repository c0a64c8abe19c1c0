"""Loss as a power law of the tokens seen, with intervals.

It describes the curve that is there. Where the learning rate falls, the loss falls with it, and
what the curve says of more tokens is no forecast of a longer run, whose schedule is another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from milepost.trajectory.statistics.bootstrap import SEED, Interval

MIN_POINTS = 5
MIN_POINTS_FOR_INTERVALS = 8
MIN_SPAN = 4.0
MAX_POINTS = 400
"""More are thinned out, evenly in log(tokens)."""

USED_SPAN = 50.0
"""Points before the last one's tokens over this are left out: warm-up, and a model that still
learns how often each token occurs, follow another law."""

EXPONENTS = (0.01, 3.0)
_NUM_EXPONENTS = 320
_NUM_RESAMPLES = 999
_MOST_KEPT = 0.95
_NUM_GOLDEN = 60
_GOLDEN = (5**0.5 - 1) / 2
_MAX_AT_EDGE = 0.025  # of the resamples: beyond, the interval would end where the search does


@dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale * tokens**-exponent, with floor and scale of at least 0.

    Attributes:
        floor: nats per token; 0 where the curve does not show that it levels off.
        floor_interval: 95 %; None for few points, a floor of 0, or where the exponents of too many
            resamples end where the search does.
        exponent_interval: likewise.
        n: points that were fitted.
        rmse: of the points about the curve, nats.
        first_tokens: of the first point that was fitted.
        num_left_out: points that were not: too early, or thinned out.
    """

    floor: float
    scale: float
    exponent: float
    floor_interval: Interval | None
    exponent_interval: Interval | None
    n: int
    rmse: float
    first_tokens: float
    num_left_out: int
    _draws: _Draws | None = field(repr=False, compare=False, default=None)

    def predict(self, tokens: float) -> tuple[float, Interval | None]:
        """The loss at so many tokens, and where a measured one would lie if the law held."""
        loss = self.floor + self.scale * tokens**-self.exponent
        return loss, None if self._draws is None else _interval(self._draws.losses_at(tokens))


@dataclass(frozen=True)
class _Fits:
    """Fits of K curves to the same tokens, as ratios to `middle`; arrays are float64[K]."""

    middle: float
    floors: np.ndarray
    heights: np.ndarray
    exponents: np.ndarray
    is_at_edge: np.ndarray

    def at(self, tokens: np.ndarray | float) -> np.ndarray:
        """The curves at one number of tokens, or the only curve at many."""
        return self.floors + self.heights * (tokens / self.middle) ** -self.exponents


@dataclass(frozen=True)
class _Draws:
    """What resampling gave: the fits, and the scatter that a measured loss adds to each."""

    fits: _Fits
    scatter: np.ndarray

    def losses_at(self, tokens: float) -> np.ndarray:
        return self.fits.at(tokens) + self.scatter


def fit_power_law(tokens: np.ndarray, losses: np.ndarray) -> PowerLaw | str:
    """The least-squares fit, or why there is none.

    Args:
        tokens: [N], in any order; points at 0 tokens are left out.
        losses: nats per token, [N].
    """
    every_token, every_loss = (np.asarray(values, dtype=float) for values in (tokens, losses))
    assert every_token.shape == every_loss.shape and every_token.ndim == 1
    if not (np.isfinite(every_token).all() and np.isfinite(every_loss).all()):
        return "a value is not finite"
    places = _used(every_token)
    tokens, losses = every_token[places], every_loss[places]
    absence = _absence(tokens, losses)
    if absence is not None:
        return absence
    fit = _refined(_fits(tokens, losses[None]), tokens, losses)
    if fit.is_at_edge[0]:
        return _edge_words(float(fit.exponents[0]))
    residuals = losses - fit.at(tokens)
    draws = _draws(fit, tokens, residuals)
    floor_interval, exponent_interval = _parameter_intervals(draws)
    exponent = float(fit.exponents[0])
    return PowerLaw(
        floor=float(fit.floors[0]),
        scale=float(fit.heights[0]) * fit.middle**exponent,
        exponent=exponent,
        floor_interval=floor_interval,
        exponent_interval=exponent_interval,
        n=len(losses),
        rmse=float(np.sqrt(np.mean(residuals**2))),
        first_tokens=float(tokens[0]),
        num_left_out=len(every_token) - len(tokens),
        _draws=draws,
    )


def _used(tokens: np.ndarray) -> np.ndarray:
    """Places of the points that are fitted, by tokens: the later ones, up to `MAX_POINTS`."""
    last = float(np.max(tokens, initial=0.0))
    order = np.argsort(tokens, kind="stable")
    places = order[(tokens[order] > 0) & (tokens[order] >= last / USED_SPAN)]
    if len(places) <= MAX_POINTS:
        return places
    logs = np.log(tokens[places])
    nearest = np.searchsorted(logs, np.linspace(logs[0], logs[-1], MAX_POINTS))
    return places[np.unique(np.minimum(nearest, len(places) - 1))]


def _absence(tokens: np.ndarray, losses: np.ndarray) -> str | None:
    if len(tokens) < MIN_POINTS:
        points = "is 1 point" if len(tokens) == 1 else f"are {len(tokens)} points"
        return f"there {points} to fit, and {MIN_POINTS} are needed"
    span = float(tokens[-1] / tokens[0])
    if span < MIN_SPAN:
        return f"the tokens grow by a factor of {span:.1f} only, and {MIN_SPAN:g} is needed"
    logs = np.log(tokens)
    if float(np.dot(logs - logs.mean(), losses - losses.mean())) >= 0:
        return "the loss does not fall"
    return None


def _edge_words(exponent: float) -> str:
    if exponent < 1:
        return "the loss falls so slowly, along log(tokens), that no exponent can be told"
    return "the loss falls at the beginning only, and its exponent cannot be told"


def _fits(tokens: np.ndarray, losses_KN: np.ndarray) -> _Fits:
    """The best of a grid of exponents for each curve, sharpened by a parabola."""
    grid = np.geomspace(*EXPONENTS, _NUM_EXPONENTS)
    middle = float(np.exp(np.mean(np.log(tokens))))
    powers_GN = (tokens / middle) ** -grid[:, None]
    errors_GK = _squared_errors(powers_GN, losses_KN)
    best = np.argmin(errors_GK, axis=0)
    is_at_edge = (best == 0) | (best == len(grid) - 1)
    inner, curves = np.clip(best, 1, len(grid) - 2), np.arange(len(losses_KN))
    before, here, after = (errors_GK[inner + shift, curves] for shift in (-1, 0, 1))
    bend = before - 2 * here + after
    shift = np.where(bend > 0, (before - after) / np.where(bend > 0, 2 * bend, 1.0), 0.0)
    ratio = np.log(grid[1] / grid[0])
    sharpened = grid[inner] * np.exp(ratio * np.clip(shift, -1, 1))
    exponents = np.where(is_at_edge, grid[best], sharpened)
    return _fits_of(tokens, losses_KN, exponents, middle=middle, is_at_edge=is_at_edge)


def _fits_of(
    tokens: np.ndarray,
    losses_KN: np.ndarray,
    exponents: np.ndarray,
    *,
    middle: float,
    is_at_edge: np.ndarray,
) -> _Fits:
    """Floors and heights for given exponents, float64[K]."""
    powers_KN = (tokens / middle) ** -exponents[:, None]
    means = powers_KN.mean(axis=1)
    centered = powers_KN - means[:, None]
    heights = np.sum(centered * losses_KN, axis=1) / np.sum(centered**2, axis=1)
    floors = losses_KN.mean(axis=1) - heights * means
    bare = np.sum(powers_KN * losses_KN, axis=1) / np.sum(powers_KN**2, axis=1)
    is_below = floors < 0
    heights = np.where(is_below, bare, np.maximum(heights, 0.0))
    return _Fits(middle, np.where(is_below, 0.0, floors), heights, exponents, is_at_edge)


def _squared_errors(powers_GN: np.ndarray, losses_KN: np.ndarray) -> np.ndarray:
    """Of each exponent and curve with its best floor and height, float64[G, K]."""
    means = losses_KN.mean(axis=1)
    losses = losses_KN - means[:, None]
    power_means = powers_GN.mean(axis=1)[:, None]
    centered = powers_GN - power_means
    shared = centered @ losses.T
    spread = np.sum(centered**2, axis=1)[:, None]
    whole = np.sum(losses**2, axis=1)
    # A height below 0 is no fall: the best is then a flat line.
    free = whole - np.maximum(shared, 0.0) ** 2 / spread
    is_below = means - np.maximum(shared, 0.0) / spread * power_means < 0
    if not is_below.any():
        return free
    bare = np.sum(losses_KN**2, axis=1) - (powers_GN @ losses_KN.T) ** 2 / np.sum(
        powers_GN**2, axis=1, keepdims=True
    )
    return np.where(is_below, bare, free)


def _refined(fits: _Fits, tokens: np.ndarray, losses: np.ndarray) -> _Fits:
    """The one fit with its exponent sharpened by golden section between its neighbors."""
    if fits.is_at_edge[0]:
        return fits
    step = (EXPONENTS[1] / EXPONENTS[0]) ** (1 / (_NUM_EXPONENTS - 1))
    low, high = np.log(fits.exponents[0] / step), np.log(fits.exponents[0] * step)

    def fit(log_exponent: float) -> _Fits:
        exponents = np.exp([log_exponent])
        return _fits_of(
            tokens, losses[None], exponents, middle=fits.middle, is_at_edge=fits.is_at_edge
        )

    def error(log_exponent: float) -> float:
        return float(np.sum((losses - fit(log_exponent).at(tokens)) ** 2))

    for _ in range(_NUM_GOLDEN):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if error(left) <= error(right) else (left, high)
    return fit((low + high) / 2)


def _draws(fit: _Fits, tokens: np.ndarray, residuals: np.ndarray) -> _Draws | None:
    """Refits to the curve plus residuals that are each multiplied by a normal draw of their own.

    So a residual keeps its place: those at the beginning of a run are the largest (the wild
    bootstrap; Wu 1986, Ann. Statist. 14, 1261-1295). None for few points, and for a floor of 0: at
    the end of what is allowed, resampling says nothing of the error.
    """
    num = len(residuals)
    residuals = _without_pull(fit, tokens, residuals)
    if num < MIN_POINTS_FOR_INTERVALS or fit.floors[0] == 0:
        return None
    rng = np.random.default_rng(SEED)
    multiplied = residuals * _inflation(residuals) * rng.standard_normal((_NUM_RESAMPLES, num))
    return _Draws(
        _fits(tokens, fit.at(tokens) + multiplied),
        scatter=rng.choice(residuals[num // 2 :], _NUM_RESAMPLES),
    )


def _inflation(residuals: np.ndarray) -> float:
    """How much wider slow waves make the error of a curve than as many independent points would.

    Of residuals in which each keeps a share r of the one before, n count as n (1 - r) / (1 + r):
    Bayley and Hammersley 1946, Suppl. J. Roy. Statist. Soc. 8, 184-197. The share is corrected for
    its bias (Kendall 1954, Biometrika 41, 403-404).
    """
    before, after = residuals[:-1], residuals[1:]
    kept = float(np.dot(before, after) / max(np.dot(residuals, residuals), np.finfo(float).tiny))
    num = len(residuals)
    kept = min(max(kept + (1 + 4 * kept) / num, 0.0), _MOST_KEPT)
    return float(((1 + kept) / (1 - kept)) ** 0.5)


def _without_pull(fit: _Fits, tokens: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Residuals as they would be about a curve that their own point had not pulled towards it.

    Over 1 - leverage, as HC3 has it (MacKinnon and White 1985, J. Econometrics 29, 305-325).
    """
    ratios = tokens / fit.middle
    powers = ratios**-fit.exponents
    slopes = np.stack([np.ones_like(ratios), powers, powers * np.log(ratios)], axis=1)
    basis, _ = np.linalg.qr(slopes)
    return residuals / np.maximum(1 - np.sum(basis**2, axis=1), 0.1)


def _parameter_intervals(draws: _Draws | None) -> tuple[Interval | None, Interval | None]:
    """Of floor and exponent."""
    if draws is None or np.mean(draws.fits.is_at_edge) > _MAX_AT_EDGE:
        return None, None
    return _interval(draws.fits.floors), _interval(draws.fits.exponents)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))
