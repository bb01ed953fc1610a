"""Makes preference pairs of GSM8K: its own solution against a wrong one that the base samples.

    python benchmarks/make_pairs.py --data gsm8k/train.jsonl --out pairs.jsonl [--pairs 128] [--model NAME]

Each line is {"prompt", "chosen", "rejected"}. A sample whose last number is the solution's is no wrong one, and left
out; one that does not end within the limit is cut behind its last whole sentence.
"""

import argparse
import json
from pathlib import Path

import nybble
from nybble.data.examples import Message
from nybble.data.template import ChatTemplate
from nybble.evaluation.scores import number_match
from nybble.generation.generate import Sampling, generate

SENTENCE_ENDS = ".!?\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=128, help="pairs to make (128)")
    parser.add_argument("--rows", type=int, default=16, help="questions answered at once (16)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()

    source = nybble.open_model(options.model)
    template = ChatTemplate(source.load_tokenizer())
    model = nybble.load(source, format="nf4").module
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    made, asked = 0, 0
    with options.out.open("w", encoding="utf-8") as file:
        for start in range(0, len(rows), options.rows):
            part = rows[start : start + options.rows]
            prompts = [template.encode_prompt([Message("user", row["question"])]) for row in part]
            sampling = Sampling(temperature=0.7, top_p=0.95, seed=start)
            answers = generate(
                model, prompts, stop_ids=template.stop_ids, max_new_tokens=options.max_new_tokens, sampling=sampling
            )
            asked += len(part)
            for row, ids in zip(part, answers, strict=True):
                sample = template.tokenizer.decode(ids, skip_special_tokens=True).strip()
                if len(ids) == options.max_new_tokens:
                    sample = sample[: 1 + max(sample.rfind(end) for end in SENTENCE_ENDS)]
                if made < options.pairs and sample and not number_match(sample, row["answer"]):
                    pair = {"prompt": row["question"], "chosen": row["answer"], "rejected": sample}
                    file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                    made += 1
            print(f"{made} pairs of {asked} questions", flush=True)
            if made == options.pairs:
                return


if __name__ == "__main__":
    main()
