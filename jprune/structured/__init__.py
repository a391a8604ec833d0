"""Structured pruning: heads, channels, hidden dimensions and layers are removed, and the model really is smaller."""

from jprune.structured.surgery import indices as indices
from jprune.structured.surgery import shrink as shrink
