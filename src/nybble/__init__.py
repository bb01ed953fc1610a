"""nybble: fine-tune large language models whose frozen weights are four bits wide."""

from nybble import openmp as openmp  # first: what it sets counts only until torch is loaded

__version__ = "0.1.0"
