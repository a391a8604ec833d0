"""Compares what is found with the snapshots, and says what differs."""

import json

import collect
import pytest

KNOWN = {name: json.loads(collect.snapshot(name).read_text(encoding="utf-8")) for name in collect.SNAPSHOTS}


def differences(known, now, where=""):
    """Lines that say what differs, and where."""
    if isinstance(known, dict) and isinstance(now, dict):
        lines = [f"{where}/{key}: is gone" for key in known if key not in now]
        lines += [f"{where}/{key}: is new: {json.dumps(now[key])[:200]}" for key in now if key not in known]
        for key in known:
            if key in now:
                lines += differences(known[key], now[key], f"{where}/{key}")
        return lines
    if isinstance(known, list) and isinstance(now, list) and len(known) == len(now):
        return [line for i, (a, b) in enumerate(zip(known, now)) for line in differences(a, b, f"{where}[{i}]")]
    if isinstance(known, list) and isinstance(now, list):
        lines = [f"{where}: is gone: {json.dumps(each)}" for each in known if each not in now]
        lines += [f"{where}: is new: {json.dumps(each)}" for each in now if each not in known]
        return lines or [f"{where}: was {json.dumps(known)}, is {json.dumps(now)}"]
    return [] if known == now and type(known) is type(now) else [f"{where}: was {known!r}, is {now!r}"]


def same(known, now):
    """Fails, and says where, if anything differs."""
    lines = differences(known, now)
    assert not lines, "\n".join([f"{len(lines)} differences", *lines[:40]])


def same_keys(found, name):
    """Compares the keys of a run's JSON."""
    same(KNOWN["keys"][name], found["keys"].get(name))


def same_structure(found, name):
    """Compares what a run wrote: files, config, options in the record, and tensors by shape, dtype and zeros."""
    same(KNOWN["structure"][name], found["structure"].get(name))


def same_bits(found, name):
    """Compares digests of tensors, or numbers and text that were printed, if this environment is known."""
    here = found["environment"]
    bits = next((known["bits"] for _, known in collect.recorded_bits() if known["environment"] == here), {})
    if name not in bits:
        pytest.skip(f"no bits of it were recorded for {json.dumps(here)}")
    same(bits[name], found["bits"].get(name))
