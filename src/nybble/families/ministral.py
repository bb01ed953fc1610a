"""Ministral (mistral.ai/news/ministraux): Mistral with windows in some layers only."""

from nybble.families.family import Family

MINISTRAL = Family("ministral", windows="by kind")
