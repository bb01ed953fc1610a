"""What was trained on, as digests: one for each sequence, one for all, so that a changed data set is seen and named."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from nybble.data.examples import EncodedExample


def row_digests(rows: Sequence[EncodedExample]) -> Tensor:
    """int64 `(len(rows),)`: 8 bytes of BLAKE2b over each sequence's content."""
    digests = bytearray()
    for row in rows:
        digests += hashlib.blake2b(row.content, digest_size=8).digest()
    return torch.frombuffer(digests, dtype=torch.int64) if digests else torch.empty(0, dtype=torch.int64)


def data_fingerprint(train: Tensor, validation: Tensor, mixture: str = "") -> str:
    """SHA-256 over the digests of both parts, and over the weights that they are drawn by."""
    digest = hashlib.sha256(f"{mixture}{len(train)} {len(validation)} ".encode())
    digest.update(train.numpy().tobytes() + validation.numpy().tobytes())
    return digest.hexdigest()
