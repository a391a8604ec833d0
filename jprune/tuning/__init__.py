"""Ways to train a checkpoint, and the methods that prune while they train."""

from jprune.tuning.base import TrainedMethod as TrainedMethod
from jprune.tuning.full import Full as Full
from jprune.tuning.lora import Lora as Lora
from jprune.tuning.loraprune import LoRAPrune as LoRAPrune
from jprune.tuning.shearing import Shearing as Shearing
