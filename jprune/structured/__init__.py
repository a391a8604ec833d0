"""Structured pruning: heads, channels, hidden dimensions and layers are removed, and the model really is smaller."""

from jprune.structured.groups import Units as Units
from jprune.structured.groups import block_units as block_units
from jprune.structured.groups import hidden_units as hidden_units
from jprune.structured.methods import DropLayers as DropLayers
from jprune.structured.methods import LLMPruner as LLMPruner
from jprune.structured.surgery import indices as indices
from jprune.structured.surgery import shrink as shrink
from jprune.structured.surgery import size as size
