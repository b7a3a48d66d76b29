"""exp and log in float32 from single IEEE operations, so that NumPy and every GPU compute the same bits.

Library functions differ in their last bit from machine to machine, and one bit can change which token is drawn. These
two use only rounded additions, multiplications and exact scalings by powers of two, in the order written. A kernel
must keep that order and must not fuse a multiplication with an addition (`__fmul_rn`, `__fadd_rn`).
Polynomials: S. Moshier's Cephes library, `expf` and `logf`. Accurate to 2 units in the last place.
"""

from __future__ import annotations

import numpy as np

# ln 2 in two parts: the first has few bits, so that its product with a small integer is exact.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
LOG2_E = np.float32(1.44269504088896341)
SQRT_HALF = np.float32(0.707106781186547524)
EXP_TERMS = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
LOG_TERMS = tuple(
    np.float32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
SMALLEST_EXPONENT = np.float32(-87)  # exp(-87) is the last normal number with some room; below it exp returns 0


def exp(x: np.ndarray) -> np.ndarray:
    """e^x for float32 `x` in [-inf, 88]; 0 below -87."""
    small = x < SMALLEST_EXPONENT
    x = np.where(small, np.float32(0), x)
    n = np.rint(x * LOG2_E)  # halves to even
    x = x - n * LN2_HIGH
    x = x - n * LN2_LOW
    result = _polynomial(EXP_TERMS, x)
    result = result * (x * x)
    result = result + x
    result = result + np.float32(1)
    return np.where(small, np.float32(0), np.ldexp(result, n.astype(np.int32)))


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive, normal, finite float32 `x`."""
    fraction, exponent = np.frexp(x)  # x = fraction · 2^exponent, fraction in [0.5, 1)
    low = fraction < SQRT_HALF
    exponent = (exponent - low).astype(np.float32)
    fraction = np.where(low, fraction + fraction, fraction) - np.float32(1)  # both exact
    square = fraction * fraction
    result = _polynomial(LOG_TERMS, fraction)
    result = result * fraction
    result = result * square
    result = result + exponent * LN2_LOW
    result = result - square * np.float32(0.5)
    result = fraction + result
    return result + exponent * LN2_HIGH


def _polynomial(terms: tuple[np.float32, ...], x: np.ndarray) -> np.ndarray:
    """Horner's scheme, highest power first."""
    result = np.full_like(x, terms[0])
    for term in terms[1:]:
        result = result * x
        result = result + term
    return result
