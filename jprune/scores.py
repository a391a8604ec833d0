"""Scores: how much each element of a kernel matters. Same shape as the kernel, higher = keep.

Each stands in the file of its method, with its source.
"""

from jprune.methods.magnitude import magnitude as magnitude
from jprune.methods.wanda import wanda as wanda
