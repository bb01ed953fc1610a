"""From token ids to the hidden states that the loss head reads, through a transformers decoder.

Packed batches (several documents side by side in one row, positions restarting) rely on the model's
attention keeping documents apart. transformers does so from the restarting positions for the models that
build their mask with its shared helpers; `keeps_documents_apart` checks it on the model at hand.
"""

import torch
from torch import Tensor, nn

_DOCUMENTS = ((3, 1, 4, 1, 5), (9, 2, 6))  # arbitrary small token ids
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative to the largest state


def hidden_states(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """The final hidden states of a causal language model.

    Args:
        input_ids, position_ids: `(B, T)` int64.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding; None when there is no padding.

    Returns:
        `(B, T, hidden)` in the compute dtype.
    """
    output = model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
    )
    return output.last_hidden_state


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether two documents packed into one row give the states that each gives alone."""
    device = next(model.parameters()).device

    def states(*documents: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([[token for document in documents for token in document]], device=device)
        positions = torch.tensor([[i for document in documents for i in range(len(document))]], device=device)
        return hidden_states(model, ids, positions)[0]  # (T, hidden)

    was_training = model.training
    model.eval()
    packed = states(*_DOCUMENTS).float()
    alone = torch.cat([states(document) for document in _DOCUMENTS]).float()
    tolerance = _TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point())]
    model.train(was_training)
    return bool((packed - alone).abs().max() <= tolerance * alone.abs().max())
