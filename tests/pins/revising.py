"""How a snapshot changes where what it says has changed: nowhere else, so that the diff is what there is to review."""

from typing import Any

CHOSEN = ("names", "python")
"""Snapshots of which somebody chooses what is pinned: what is new does no harm, and is added by hand."""


def revised(name: str, known: Any, now: Any) -> Any:
    """What is found now, as the snapshot of that name is to say it."""
    return in_order(known, without_new(known, now) if name in CHOSEN else now)


def without_new(known: Any, now: Any) -> Any:
    """What is there now, less names that were not: those do no harm."""
    if isinstance(known, dict) and isinstance(now, dict):
        return {key: without_new(known[key], now[key]) for key in known if key in now}
    return now


def in_order(known: Any, now: Any) -> Any:
    """What is there now, with the keys of objects in the order that they had; a new one comes after its neighbour."""
    if isinstance(known, dict) and isinstance(now, dict):
        keys = [key for key in known if key in now]
        before = None
        for key in now:
            if key not in known:
                keys.insert(0 if before is None else keys.index(before) + 1, key)
            before = key
        return {key: in_order(known.get(key), now[key]) for key in keys}
    if isinstance(known, list) and isinstance(now, list) and len(known) == len(now):
        return [in_order(old, new) for old, new in zip(known, now)]
    return now
