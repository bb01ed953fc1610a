"""Tiny real models for the tests of this folder."""

from tiny_families import make_folder as make_folder
from tiny_families import tokens as tokens
