"""Times quantising and dequantising against bitsandbytes and a copy: the four-bit cases of bench_kernels.py, kept.

    python benchmarks/bench_four_bit.py [--quick]

One matrix of 4096 x 11008, NF4 with double quantisation. Contenders take turns in one process and ratios are of pairs;
a slow one runs three rounds only. bitsandbytes must be installed beside nybble (its extra `test`).
"""

import torch
from bench_kernels import check, copy_bytes_per_second, four_bit_cases, measure
from common import Spread, Table, about_machine, options, report, versions, wait_for_quiet

from nybble.kernels.backends.cpp import library


def main() -> None:
    arguments = options(__doc__, rounds=25).parse_args()
    rounds = 4 if arguments.quick else arguments.rounds
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases = four_bit_cases()
    others = wait_for_quiet(arguments.wait)
    about = about_machine(arguments.threads) | {
        "others_share_of_a_core_before": others,
        "torch threads": torch.get_num_threads(),
        "kernels": library.describe()["isa"],
        "versions": versions("nybble", "torch", "bitsandbytes"),
        "copy_bytes_per_s": copy_bytes_per_second(rounds),
    }
    rows, samples = [], {}
    for case in cases:
        check(case)
        times = samples[case.name] = measure(case, rounds)
        for name, seconds in times.items():
            ratio = Spread.of([other / own for own, other in zip(times["cpp"], seconds, strict=False)])
            own = name == "cpp"
            rows.append([f"{case.name}: {'nybble' if own else name}", Spread.of([1e3 * s for s in seconds]).show(),
                         "1" if own else ratio.show()])  # fmt: skip
    table = Table("4096 x 11008, NF4, double quantisation.", ["contender", "ms", "times nybble's"], rows)
    report(arguments, "four-bit", "Quantising and dequantising", about, [table], samples)


if __name__ == "__main__":
    main()
