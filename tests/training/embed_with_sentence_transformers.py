"""What sentence-transformers makes of folders, for test_embed.py; runs in the oracles' environment.

Standard input: JSON {folders, texts, rows (of one anchor, its positive, its negative), pairs (of two texts), scores}.
Standard output: JSON {folder: {embeddings, contrast, cosent}}.
"""

import json
import os
import sys
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss


def measure(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32}).eval()

    def features(columns: list[list[str]]) -> list[Any]:
        return [model.tokenize(list(column)) for column in zip(*columns, strict=True)]

    scores = torch.tensor(asked["scores"])
    with torch.no_grad():
        return {
            "embeddings": model.encode(asked["texts"], convert_to_numpy=True).tolist(),
            "contrast": MultipleNegativesRankingLoss(model)(features(asked["rows"]), None).item(),
            "cosent": CoSENTLoss(model)(features(asked["pairs"]), scores).item(),
        }


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    request = json.load(sys.stdin)
    json.dump({folder: measure(folder, request) for folder in request["folders"]}, answers)
    answers.flush()
