"""What users see of events. Importing this package gives every event its way of being shown."""

from nybble.cli.render import answers, artefacts, audit, plans, training, weights
from nybble.cli.render.terminal import Terminal

__all__ = ["Terminal", "answers", "artefacts", "audit", "plans", "training", "weights"]
