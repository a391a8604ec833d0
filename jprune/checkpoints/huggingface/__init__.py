"""Hugging Face folders: safetensors (single or sharded), config.json and the files that travel with them."""

from jprune.checkpoints.huggingface import adapters as adapters
from jprune.checkpoints.huggingface.files import weight_files as weight_files
from jprune.checkpoints.huggingface.hub import download as download
from jprune.checkpoints.huggingface.locate import holds_weights as holds_weights
from jprune.checkpoints.huggingface.read import open_config as open_config
from jprune.checkpoints.huggingface.read import open_source as open_source
from jprune.checkpoints.huggingface.write import Writer as Writer
