"""Structured pruning: heads, channels, experts, hidden dimensions or layers go, and the model really is smaller."""

from jprune.structured.drop_layers import DropLayers as DropLayers
from jprune.structured.experts import RemoveExperts as RemoveExperts
from jprune.structured.function import shrink_function as shrink_function
from jprune.structured.kinds import block_units as block_units
from jprune.structured.kinds import hidden_units as hidden_units
from jprune.structured.llm_pruner import LLMPruner as LLMPruner
from jprune.structured.surgery import shrink as shrink
from jprune.structured.surgery import size as size
from jprune.structured.units import Units as Units
