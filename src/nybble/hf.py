"""`import nybble.hf`: transformers knows nybble's formats from here on.

    import nybble.hf

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=nybble.NybbleConfig(format="nf4"))

Importing registers the quantizer "nybble" with transformers; nothing of it is changed.
"""

from nybble.bridge.accelerate import Acceleration as Acceleration
from nybble.bridge.accelerate import accelerate as accelerate
from nybble.bridge.config import NybbleConfig as NybbleConfig
from nybble.bridge.config import read_config as read_config
from nybble.bridge.in_hand import quantize_ as quantize_
from nybble.bridge.quantizer import NybbleQuantizer as NybbleQuantizer
