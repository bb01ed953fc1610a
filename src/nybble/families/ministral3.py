"""Ministral 3 (mistral.ai/news/mistral-3): Mistral whose queries grow with their position."""

from dataclasses import replace

from nybble.families.mistral import MISTRAL

MINISTRAL3 = replace(MISTRAL, model_type="ministral3", growing_queries=True, gguf="MISTRAL3")
