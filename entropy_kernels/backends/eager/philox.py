"""Philox4x32-10 in int64 arithmetic (torch has no unsigned 32 × 32 → 64 multiplication)."""

from __future__ import annotations

from torch import Tensor

_WORD = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

_Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32_10(counter: _Words, key: tuple[Tensor, Tensor]) -> _Words:
    """Four output words (Salmon et al., SC 2011); words are int64 tensors with values in [0, 2³²)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps modulo 2⁶⁴; the mask undoes the sign that the shift drags along.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def token_key(index: Tensor, seed: Tensor) -> Tensor:
    """Random key of a token: first output word for counter (index low, index high, 0, 0), key (seed low, seed high)."""
    zero = index.new_zeros(())
    counter = (index & _WORD, (index >> 32) & _WORD, zero, zero)
    return philox4x32_10(counter, (seed & _WORD, (seed >> 32) & _WORD))[0]
