#!/usr/bin/env python3
"""An independent twin of Wanda and SparseGPT, after their published codes, and the numbers it gives on one seeded layer.

    weights_reference.py > crates/methods/tests/weights_reference.txt

The formulas are those of locuslab/wanda (`lib/prune.py`) and IST-DASLab/sparsegpt (`sparsegpt.py`): the inverse of the damped
Gram matrix, its upper Cholesky factor, blocks of 128 columns, scores `w^2 / diag^2`, errors pushed to the right. It inverts
and factors as they do, in double precision, while Lacuna uses one factorisation in reverse order. Counts are exact
(`floor`) in both, where SparseGPT's code drops one more. Only numpy is needed.
"""

import numpy as np

ROWS, COLUMNS, TOKENS, BLOCK = 6, 160, 400, 128


def stream(seed, n):
    """Numbers from a linear congruential generator that the test repeats: (-1, 1), sums of three."""
    out, state = [], seed
    for _ in range(n):
        total = 0
        for _ in range(3):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            total += (state >> 40) / 2**24 - 0.5
        out.append(np.float32(total))
    return np.array(out, dtype=np.float32)


def wanda(w, squares, share=None, keep=None, of=None):
    score = np.abs(w.astype(np.float64)) * np.sqrt(squares)
    mask = np.ones_like(w, dtype=bool)
    for r in range(w.shape[0]):
        runs = [range(w.shape[1])] if of is None else [range(c, c + of) for c in range(0, w.shape[1], of)]
        for run in runs:
            drop = int(share * w.shape[1]) if of is None else of - keep
            for c in sorted(run, key=lambda c: score[r, c])[:drop]:
                mask[r, c] = False
    return mask


def upper_factor(gram):
    h = gram.copy()
    h[np.diag_indices_from(h)] += 0.01 * np.mean(np.diag(h))
    return np.linalg.cholesky(np.linalg.inv(h)).T


def sparsegpt(w, gram, share=None, keep=None, of=None):
    w, u = w.astype(np.float64), upper_factor(gram)
    mask, dropped = np.ones_like(w, dtype=bool), 0
    for i1 in range(0, w.shape[1], BLOCK):
        i2 = min(i1 + BLOCK, w.shape[1])
        diag = np.diag(u)
        if of is None:
            score = (w[:, i1:i2] / diag[i1:i2]) ** 2
            drop = int(share * w.shape[0] * i2) - dropped
            for flat in np.argsort(score, axis=None, kind="stable")[:drop]:
                r, c = np.unravel_index(flat, score.shape)
                mask[r, i1 + c] = False
            dropped += drop
        errors = np.zeros((w.shape[0], i2 - i1))
        for i in range(i1, i2):
            if of is not None and i % of == 0:
                score = (w[:, i : i + of] / diag[i : i + of]) ** 2
                for r in range(w.shape[0]):
                    mask[r, i + np.argsort(score[r], kind="stable")[: of - keep]] = False
            q = np.where(mask[:, i], w[:, i], 0.0)
            errors[:, i - i1] = (w[:, i] - q) / u[i, i]
            w[:, i:i2] -= np.outer(errors[:, i - i1], u[i, i:i2])
            w[:, i] = q
        w[:, i2:] -= errors @ u[i1:i2, i2:]
    return mask, w


def rows(mask):
    return ["".join("1" if k else "0" for k in row) for row in mask]


def main():
    w = stream(1, ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    x = stream(2, TOKENS * COLUMNS).reshape(TOKENS, COLUMNS).astype(np.float64)
    x = x + 0.7 * np.roll(x, -1, axis=1)
    x *= 0.3 + (np.arange(COLUMNS) * 7 % 11) / 5.0
    gram = x.T @ x
    squares = np.diag(gram)
    for name, given in {"half": {"share": 0.5}, "two-of-four": {"keep": 2, "of": 4}}.items():
        mask, values = sparsegpt(w, gram, **given)
        print(name, "wanda", *rows(wanda(w, squares, **given)))
        print(name, "sparsegpt", *rows(mask))
        print(name, "sums", *(f"{v:.7f}" for v in values.sum(axis=1)))
        print(name, "last", *(f"{v:.7f}" for v in values[0, -24:]))


if __name__ == "__main__":
    main()
