"""Rows of a base model's input embedding, read before it is loaded."""

import torch
from torch import Tensor

from nybble.sources.folder import FolderSource
from nybble.sources.interface import ModelSource
from nybble.sources.placement import place_tensors
from nybble.sources.skeleton import build_skeleton


def embedding_rows(source: ModelSource, ids: list[int]) -> Tensor | None:
    """fp32 (len(ids), hidden): what the model has stored for these tokens; None where single rows cannot be read.

    Raises:
        ModelError: the files cannot be read.
    """
    if not isinstance(source, FolderSource):
        return None
    skeleton = build_skeleton(source.config)
    wanted = skeleton.get_input_embeddings().weight
    target = next(name for name, parameter in skeleton.named_parameters() if parameter is wanted)
    stored = next(place.name for place in place_tensors(source, skeleton) if place.target == target)
    if source.is_quantized(stored):
        return None
    return source.matrix(stored).gather(torch.tensor(ids)).float()
