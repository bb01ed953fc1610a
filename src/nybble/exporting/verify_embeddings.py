"""Is the artefact the tuned model that embeds texts? Asked as `verify.py` asks language models.

Held-out texts are embedded by the run, and each text alone by the artefact in its consumer: PEFT on the run's base, or
transformers on the folder, whose states are pooled as the files for sentence-transformers beside it say.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data.examples import EncodedExample
from nybble.data.text_rows import TextRow, texts_of
from nybble.evaluation.embeddings import embed_texts
from nybble.events import Listener, silent
from nybble.exporting.consumers import CPU, base_of_adapters, widen
from nybble.exporting.verify import Check, Verification, not_loaded
from nybble.exporting.verify_scores import same_tokens
from nybble.layers.embedded import EmbeddedModel, pooled
from nybble.layers.whole_texts import own_output
from nybble.options.objective_groups import Pooling
from nybble.options.use_groups import ArtefactKind
from nybble.runs.open_run import OpenRun, load_tuned
from nybble.sources.sentences import read_pooling
from nybble.sources.tokenizer import load_tokenizer

MOST_ROWS = 100
DISTANCE = 0.05  # of embeddings from the run's, relative: what rounding to 16 bits may come to


def verify_embeddings(
    opened: OpenRun, kind: ArtefactKind, folder: Path, rows: Sequence[EncodedExample], report: Listener = silent
) -> Verification:
    """Embed held-out texts with the run and with the artefact, and compare."""
    texts, own = texts_of(rows[:MOST_ROWS]), opened.source.task.pooling
    assert own is not None
    model = load_tuned(opened, torch.float32, CPU, report)
    wanted = embed_texts(EmbeddedModel.of(model), texts, own)
    del model
    gc.collect()  # modules refer to each other, and the next model needs the room
    try:
        name, artefact, tokenizer, pooling = _load(opened, kind, folder, report)
        with torch.no_grad():
            found = torch.cat([_embedded_alone(artefact, text, pooling or own) for text in texts])
    except Exception as error:  # whatever the consumer raises, the artefact is then not verified
        return not_loaded(kind, error)
    distance = float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
    checks = [
        Check("embeddings", f"{distance:.2g} from the run's", f"at most {DISTANCE}, relative", distance <= DISTANCE),
        same_tokens(opened, tokenizer),
    ]
    if kind is ArtefactKind.DENSE:
        checks.append(Check("pooling", str(pooling), f"the run's, {own}", pooling == own))
    return Verification(name, {"texts": len(texts), "embedding_distance": distance}, checks)


def _load(opened: OpenRun, kind: ArtefactKind, folder: Path, report: Listener) -> tuple[str, Any, Any, Pooling | None]:
    tokenizer = load_tokenizer(str(folder))
    if kind is ArtefactKind.DENSE:
        from transformers import AutoModel

        loaded = AutoModel.from_pretrained(folder, dtype=torch.float32)
        return "transformers", loaded.eval(), tokenizer, read_pooling(folder)
    from peft import PeftModel

    base = base_of_adapters(opened, torch.float32, report)
    widen(base)
    return "PEFT on the run's base, widened", PeftModel.from_pretrained(base.float(), folder).eval(), tokenizer, None


def _embedded_alone(model: Any, text: TextRow, pooling: Pooling) -> Tensor:
    """`(1, hidden)`."""
    ids = text.input_ids.long()[None]
    states = own_output(model, ids, torch.ones_like(ids)).last_hidden_state[0].float()  # (T, hidden)
    match pooling:
        case "cls":
            found = states[:1]
        case "last":
            found = states[-1:]
        case _:
            found = pooled(states, (len(states),), pooling)
    return F.normalize(found, dim=1)
