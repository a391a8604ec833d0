"""Slow NumPy truth of LLM-Pruner on one decoder block in our layout (float64), loop by loop.

Written from the paper's and its program's description, not from jprune: kernels q [d_model, heads, head_dim],
k, v [d_model, kv_heads, head_dim], o [heads, head_dim, d_model], gate, up [d_model, d_ff], down [d_ff, d_model].
"""

import math

import numpy as np


def salience(criterion, w, g, a):
    """One weight's contribution to the loss, with its sign."""
    return {
        "param_first": w * g,
        "vectorize": w * g,
        "param_second": w * a * w,
        "param_mix": w * g - 0.5 * w * a * w,
        "l1": abs(w),
        "l2": abs(w) ** 2,
    }[criterion]


def channel(criterion, weights):
    """One channel's number from the (w, g, a) of its weights."""
    total = 0.0
    for w, g, a in weights:
        s = salience(criterion, w, g, a)
        total += s if criterion == "vectorize" else abs(s)
    return abs(total)


def reduce(kernels, reduction):
    """One number for a channel from those of the kernels."""
    return {
        "sum": sum(kernels),
        "mean": sum(kernels) / len(kernels),
        "max": max(kernels),
        "prod": math.prod(kernels),
        "first": kernels[0],
        "last": kernels[-1],
    }[reduction]


def column(arrays, *index):
    """(w, g, a) of all weights at an index, one slice of which is free."""
    return list(zip(*(np.asarray(x, np.float64)[index].tolist() for x in arrays)))


def attention(kernels, criterion, reduction):
    """The importance of each KV head with its query heads. `kernels`: {"q": (w, g, a), "k": ..., "v": ..., "o": ...}"""
    heads, head_dim = kernels["q"][0].shape[1:]
    kv_heads = kernels["k"][0].shape[1]
    rest = slice(None)
    found = []
    for kv in range(kv_heads):
        total = 0.0
        for d in range(head_dim):
            numbers = {name: 0.0 for name in "qkvo"}
            for head in range(heads):
                if head // (heads // kv_heads) == kv:
                    numbers["q"] += channel(criterion, column(kernels["q"], rest, head, d))
                    numbers["o"] += channel(criterion, column(kernels["o"], head, d, rest))
            for name in "kv":
                numbers[name] = channel(criterion, column(kernels[name], rest, kv, d))
            total += reduce([numbers[name] for name in "qkvo"], reduction)
        found.append(total)
    return np.array(found)


def query(kernels, criterion, reduction):
    """The importance of each query head."""
    heads, head_dim = kernels["q"][0].shape[1:]
    rest = slice(None)
    return np.array(
        [
            sum(
                reduce(
                    [
                        channel(criterion, column(kernels["q"], rest, head, d)),
                        channel(criterion, column(kernels["o"], head, d, rest)),
                    ],
                    reduction,
                )
                for d in range(head_dim)
            )
            for head in range(heads)
        ]
    )


def mlp(kernels, criterion, reduction):
    """The importance of each feed-forward channel. `kernels`: {"gate": (w, g, a), "up": ..., "down": ...}"""
    rest = slice(None)
    return np.array(
        [
            reduce(
                [
                    channel(criterion, column(kernels["gate"], rest, f)),
                    channel(criterion, column(kernels["up"], rest, f)),
                    channel(criterion, column(kernels["down"], f, rest)),
                ],
                reduction,
            )
            for f in range(kernels["gate"][0].shape[1])
        ]
    )


def pruned_per_group(current, initial, ratio, channels_per_unit):
    """How many units of a group go, as the program counts."""
    channels = current * channels_per_unit - int(initial * channels_per_unit * (1 - ratio))
    return max(channels, 0) // channels_per_unit
