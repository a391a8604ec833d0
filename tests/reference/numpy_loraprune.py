"""LoRAPrune's criterion by loops over scalars, in float64: `x[i][o]` is the weight from input i to output o."""

import numpy as np


def salience(w, a, b, da, db, scaling):
    """|G (W + s A B)|, with G summed over the rank entry by entry."""
    d_in, d_out, rank = *w.shape, a.shape[1]
    s = np.zeros((d_in, d_out))
    for i in range(d_in):
        for o in range(d_out):
            g = value = 0.0
            for r in range(rank):
                g += da[i, r] * b[r, o] + a[i, r] * db[r, o] - da[i, r] * db[r, o]
                value += a[i, r] * b[r, o]
            s[i, o] = abs(g * (w[i, o] + scaling * value))
    return s


def normalised(sums):
    return sums / (np.sqrt(sum(x * x for x in sums)) + 1e-8)


def attention_scores(q, k, v, o, kv_heads, head_dim):
    """Of KV heads, from the saliences of q, k, v ``[d, heads * head_dim]`` and o ``[heads * head_dim, d]``."""
    queries = q.shape[1] // (kv_heads * head_dim)
    scores = np.zeros(kv_heads)
    for of_heads, queries_each in ((q, queries), (k, 1), (v, 1), (o.T, queries)):
        sums = np.zeros(kv_heads)
        for head in range(kv_heads * queries_each):
            for channel in range(head * head_dim, (head + 1) * head_dim):
                sums[head // queries_each] += of_heads[:, channel].sum()
        scores += normalised(sums)
    return scores


def mlp_scores(gate, up, down):
    """Of channels, from the saliences of gate and up ``[d, d_ff]`` and down ``[d_ff, d]``."""
    return normalised(gate.sum(0)) + normalised(up.sum(0)) + normalised(down.sum(1))
