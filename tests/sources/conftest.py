"""Tiny real models for the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_families import make_folder as make_folder
from tiny_families import tokens as tokens
