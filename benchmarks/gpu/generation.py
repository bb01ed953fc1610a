"""The phase of answers: are they right, and how long does a token take, step by step and from a graph."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu.check import NO_CARD, SMALL, TINY, Check
from gpu.measuring import profiled, seconds_of, waits
from gpu.models import four_bit_model

if TYPE_CHECKING:
    from torch import Tensor

STEPS, CONTEXT, TEXTS = 24, 512, (1, 8)


def generation(check: Check) -> None:
    """Logits against the whole text's; from a graph or not; then the time of a token against the bytes it reads."""
    import torch

    from nybble.generation.decoding import CachedDecoder

    torch.manual_seed(1)
    module = four_bit_model(TINY if check.tiny else SMALL, check.device, torch.float32).eval()
    texts = [list(range(3, 3 + length)) for length in (11, 1, 17)]
    check_logits(check, module, texts)
    if check.on_card:
        found = [logits_of_steps(CachedDecoder(module, graphs=graphs), texts)[0] for graphs in (False, True)]
        check.test("logits from graphs differ in so many bits", int((found[0] != found[1]).sum()), 0)
    module = four_bit_model(check.model, check.device).eval()
    floor = read_bytes(module) / next((line["bytes_per_s"] for line in check.lines("copy")[-1:]), float("nan"))
    for rows in TEXTS:
        for graphs in (False, True) if check.on_card else (False,):
            decoder, capacity = CachedDecoder(module, graphs=graphs), 8 if check.tiny else CONTEXT
            decoder.start([[1] * capacity] * rows, 4 * STEPS)
            step = step_of(decoder, rows, check.device)
            found = {"seconds": seconds_of(check, step, warm_up=1 if check.tiny else 3, batches=False)}
            found |= {"waits": waits(check, step)} | (profiled(step) if check.on_card else {"idle": NO_CARD})
            check.say("token", rows=rows, context=capacity, graphs=graphs, floor=floor, **found)
            del decoder, step


def step_of(decoder: Any, rows: int, device: str) -> Callable[[], object]:
    import torch

    tokens = torch.ones(rows, dtype=torch.int64, device=device)
    return lambda: decoder.step(tokens)


def logits_of_steps(decoder: Any, texts: list[list[int]]) -> tuple["Tensor", list[list[int]]]:
    """Of a prompt's last token and of each step, `(1 + STEPS, texts, vocabulary)`; and the texts that they end."""
    import torch

    found, longer = [decoder.start(texts, STEPS)], [list(text) for text in texts]
    for step in range(STEPS):
        tokens = [(13 * text + 7 * step) % 90 for text in range(len(texts))]
        found.append(decoder.step(torch.tensor(tokens, device=found[0].device)).clone())
        for text, token in zip(longer, tokens, strict=True):
            text.append(token)
    return torch.stack(found), longer


def check_logits(check: Check, module: Any, texts: list[list[int]]) -> None:
    """Against the model's own forward over the whole text."""
    import torch

    from nybble.generation.decoding import CachedDecoder

    with torch.no_grad():
        got, longer = logits_of_steps(CachedDecoder(module), texts)
        worst = 0.0
        for text, (begun, whole) in enumerate(zip(texts, longer, strict=True)):
            ids = torch.tensor([whole], device=got.device)
            expected = module(input_ids=ids).logits[0, len(begun) - 1 :]
            worst = max(worst, float((got[:, text] - expected).norm() / expected.norm()))
    check.test("logits token by token against those of the whole text", worst, 1e-4)


def read_bytes(module: Any) -> int:
    """What each token reads of the weights: all but the embedding."""
    embedding = module.get_input_embeddings().weight
    return sum(parameter.nbytes for parameter in module.parameters() if parameter is not embedding)
