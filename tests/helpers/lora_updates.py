"""The optimizers made for LoRA as their papers have them, in numpy's float64: of one matrix x (m, r), y (n, r), whose
x y^T is what they change. Each takes the factors and the gradients of every step, and returns the last factors."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Matrix = np.ndarray
Gradients = Iterable[tuple[Matrix, Matrix]]


def adam(p: Matrix, gradients: Sequence[Matrix], rate: float, b1: float, b2: float, eps: float) -> Matrix:
    """The moves of Adam, as a sum, of gradients that do not depend on p."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def scaled_adamw(x: Matrix, y: Matrix, gradients: Gradients, **options: Any) -> tuple[Matrix, Matrix]:
    """Algorithm 1 of Zhang & Pilanci 2024, both factors at once; with `factors="y"` LoRA-FA, x staying as it is."""
    rate, decay, b1, b2, eps, damping = (options[name] for name in ("rate", "decay", "b1", "b2", "eps", "damping"))
    moments = [np.zeros_like(z) for z in (x, x, y, y)]
    for t, (gx, gy) in enumerate(gradients, 1):
        eye = damping * np.eye(x.shape[1])
        scaled = gx @ np.linalg.inv(y.T @ y + eye), gy @ np.linalg.inv(x.T @ x + eye)
        new = []
        for n, (z, g) in enumerate(zip((x, y), scaled, strict=True)):
            m, v = moments[2 * n : 2 * n + 2]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            moments[2 * n : 2 * n + 2] = m, v
            step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            new.append(z - rate * (step + decay * z))
        x, y = (x, new[1]) if options.get("factors") == "y" else new
    return x, y


def rite(x: Matrix, y: Matrix, gradients: Gradients, **options: Any) -> tuple[Matrix, Matrix]:
    """Algorithm 1 of Yen et al. 2025 as in the authors' lora_rite.py with `apply_escape`, without skips."""
    rate, decay, b1, b2, eps, clip = (options[name] for name in ("rate", "decay", "b1", "b2", "eps", "clip"))
    r = x.shape[1]
    state = [{"m": np.zeros_like(z), "v": np.zeros((r, r)), "rho": 0.0} for z in (x, y)]
    old_bases = [np.zeros_like(y), np.zeros_like(x)]  # of the other factor
    for t, grads in enumerate(gradients, 1):
        d1, d2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        bases, inverses = zip(*((q, np.linalg.pinv(s)) for q, s in map(np.linalg.qr, (y, x))), strict=True)
        plain = [g @ inverse for g, inverse in zip(grads, inverses, strict=True)]
        norm = np.sqrt(sum((g**2).sum() for g in plain))
        new = []
        for z, g, q, old, inverse, s in zip((x, y), plain, bases, old_bases, inverses, state, strict=True):
            g = g * min(1, clip / norm)
            turn = q.T @ old
            moved = turn @ s["v"] @ turn.T
            lost = (np.linalg.eigvalsh(s["v"]) - np.linalg.eigvalsh(moved)).max(), np.trace(s["v"]) - np.trace(moved)
            s["rho"] = d2 * (s["rho"] + min(max(x, 0.0) for x in lost))
            s["v"] = (1 - d2) * g.T @ g / len(g) + d2 * moved
            values, u = np.linalg.eigh(s["v"])
            root = u @ np.diag(1 / (np.sqrt(values.clip(0) + s["rho"]) + eps)) @ u.T
            s["m"] = (1 - d1) * g @ root + d1 * s["m"] @ turn.T
            new.append(z - rate * (s["m"] @ inverse.T + decay * z))
        old_bases, (x, y) = list(bases), new
    return x, y


SIGN_STEPS = (
    (7.2086, -15.5131, 9.0178),
    (3.9623, -2.5813, 0.4542),
    (3.9466, -2.5765, 0.4544),
    (3.8991, -2.5671, 0.4566),
    (3.7186, -2.5308, 0.4653),
    (3.1390, -2.3073, 0.4733),
    (2.1715, -1.5246, 0.3885),
    (1.8648, -1.2224, 0.3577),
)


def sign(x: Matrix) -> Matrix:
    """The paper's iteration (Appendix B.3) for the U V of U S V."""
    x = x / np.linalg.norm(x)
    for a, b, c in SIGN_STEPS:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def inverse_root(z: Matrix) -> Matrix:
    """(z^T z)^-1/2, from the singular values of z."""
    _, values, vt = np.linalg.svd(z, full_matrices=False)
    return vt.T @ np.diag(1 / values) @ vt


def muon(x: Matrix, y: Matrix, gradients: Gradients, **options: Any) -> tuple[Matrix, Matrix]:
    """Algorithm 1 of Cesista et al. 2026, with its split decay."""
    rate, decay, b1 = (options[name] for name in ("rate", "decay", "b1"))
    mx, my = np.zeros_like(x), np.zeros_like(y)
    s = np.sqrt(1 - rate * decay)
    for gx, gy in gradients:
        mx, my = b1 * mx + (1 - b1) * gx, b1 * my + (1 - b1) * gy
        rx, ry = inverse_root(y), inverse_root(x)
        dx, dy = -rate / 2 * sign(mx @ rx) @ rx, -rate / 2 * sign(my @ ry) @ ry
        x, y = s * x + dx / s, s * y + dy / s
    return x, y
