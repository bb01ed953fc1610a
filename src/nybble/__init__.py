"""nybble: fine-tune large language models whose frozen weights are four bits wide."""

__version__ = "0.1.0"
