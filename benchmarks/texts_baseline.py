"""What words alone say of texts: TF-IDF and logistic regression, to compare `nybble train --objective classify` with.

    python benchmarks/texts_baseline.py texts/

Words and pairs of words, sublinear counts, inverse document frequencies, as scikit-learn's TfidfVectorizer weighs them;
rows of length 1; softmax regression by L-BFGS, of several strengths of regularisation the best on the held-out texts,
which flatters it.
"""

import argparse
import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

STRENGTHS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


def terms(text: str) -> Counter[str]:
    words = re.findall(r"\b\w\w+\b", text.lower())
    return Counter(words + [f"{a} {b}" for a, b in pairwise(words)])


def fitted(x: torch.Tensor, y: torch.Tensor, classes: int, strength: float) -> torch.Tensor:
    """Weights (columns, classes)."""
    w = torch.zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(torch.sparse.mm(x, w), y) + strength * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    parts = {}
    for name in ("train", "held_out"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        parts[name] = [(terms(row["text"]), row["label"]) for row in rows]
    labels = sorted({label for _, label in parts["train"]})
    documents = Counter(term for found, _ in parts["train"] for term in found)
    columns = {term: number for number, term in enumerate(documents)}
    weights = {t: math.log((1 + len(parts["train"])) / (1 + count)) + 1 for t, count in documents.items()}

    def matrix(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        places, values = [], []
        for row, (found, _) in enumerate(parts[name]):
            own = {t: (1 + math.log(count)) * weights[t] for t, count in found.items() if t in columns}
            length = math.sqrt(sum(value**2 for value in own.values())) or 1.0
            places += [(row, columns[t]) for t in own]
            values += [value / length for value in own.values()]
        size = (len(parts[name]), len(columns))
        x = torch.sparse_coo_tensor(torch.tensor(places).T, torch.tensor(values), size).coalesce()
        return x, torch.tensor([labels.index(label) for _, label in parts[name]])

    (x, y), (held_x, held_y) = matrix("train"), matrix("held_out")
    for strength in STRENGTHS:
        w = fitted(x, y, len(labels), strength)
        accuracy = (torch.sparse.mm(held_x, w).argmax(1) == held_y).double().mean().item()
        print(f"strength {strength:g}: accuracy {accuracy:.4f} on {len(held_y)} texts of {len(labels)} classes")


if __name__ == "__main__":
    main()
