"""OLMo 3 (allenai.org/olmo3): OLMo 2 with windows in three layers of four, and rotary angles of each kind of layer."""

from dataclasses import replace

from nybble.families.olmo2 import OLMO2

OLMO3 = replace(OLMO2, model_type="olmo3", windows="by kind", rope_by_kind=True)
