"""Groups of coupled axes written down by hand, for tests of what is built on them."""

from jprune.trace.coupling.group import Group, Member


def group(name, size, *places, frozen=None, renormalised=False):
    """A place is (path, axis, length, stride = 1, offset = 0); an axis ends where the last place of the group does."""
    members = []
    ends = {}
    for path, axis, length, *more in places:
        ends[path, axis] = max(ends.get((path, axis), 0), length + (more[1] if len(more) > 1 else 0))
    for path, axis, length, *more in places:
        stride, offset = (*more, *(1, 0)[len(more) :])
        whole = ends[path, axis]
        members.append(Member(path=path, axis=axis, length=length, stride=stride, offset=offset, whole=whole))
    state = {"frozen": frozen, "proven": frozen is None, "evidence": frozen or "by hand"}
    return Group(name=name, size=size, members=tuple(members), renormalised=renormalised, **state)


def block(heads, kv, head_dim, d_model, d_ff):
    """(groups, shapes, in_axes) of a decoder block of ours, with biases and QK-norm."""
    shapes = {
        "attn_norm/scale": (d_model,),
        "attn/q/kernel": (d_model, heads, head_dim),
        "attn/q/bias": (heads, head_dim),
        "attn/k/kernel": (d_model, kv, head_dim),
        "attn/v/kernel": (d_model, kv, head_dim),
        "attn/o/kernel": (heads, head_dim, d_model),
        "attn/q_norm/scale": (head_dim,),
        "attn/k_norm/scale": (head_dim,),
        "mlp/gate/kernel": (d_model, d_ff),
        "mlp/up/kernel": (d_model, d_ff),
        "mlp/up/bias": (d_ff,),
        "mlp/down/kernel": (d_ff, d_model),
    }
    in_axes = {path: (0, 1) if "/o/" in path else (0,) for path in shapes if path.endswith("kernel")}
    ranks = heads // kv
    groups = [
        group(
            "attn/k/kernel:1",
            kv,
            ("attn/k/kernel", 1, kv),
            ("attn/o/kernel", 0, heads, ranks),
            ("attn/q/bias", 0, heads, ranks),
            ("attn/q/kernel", 1, heads, ranks),
            ("attn/v/kernel", 1, kv),
        ),
        group(
            "attn/o/kernel:0",
            ranks,
            ("attn/o/kernel", 0, heads),
            ("attn/q/bias", 0, heads),
            ("attn/q/kernel", 1, heads),
        ),
        group(
            "attn/k/kernel:2",
            head_dim,
            ("attn/k/kernel", 2, head_dim),
            ("attn/q/bias", 1, head_dim),
            ("attn/q/kernel", 2, head_dim),
            ("attn/q_norm/scale", 0, head_dim),
            ("attn/k_norm/scale", 0, head_dim),
            frozen="its halves are turned into each other",
        ),
        group("attn/o/kernel:1", head_dim, ("attn/o/kernel", 1, head_dim), ("attn/v/kernel", 2, head_dim)),
        group(
            "mlp/down/kernel:0",
            d_ff,
            ("mlp/down/kernel", 0, d_ff),
            ("mlp/gate/kernel", 1, d_ff),
            ("mlp/up/bias", 0, d_ff),
            ("mlp/up/kernel", 1, d_ff),
        ),
        group(
            "attn/o/kernel:2",
            d_model,
            ("attn_norm/scale", 0, d_model),
            *((path, shapes[path].index(d_model), d_model) for path in in_axes),
            frozen="it is an axis of an argument",
        ),
    ]
    return [g for g in groups if g.size > 1], shapes, in_axes
