"""GPUs that a plan can be made for without one: plain numbers of vendors, and what share of them is taken to last.

Dense rates, without sparsity: of a product of bf16 matrices added up in fp32, which GeForce cards do at half the rate
that their vendor's larger figure, added up in fp16, has. Memory is read as 10^9 bytes a GB: cards have up to 7 % more,
which error correction, a display and the driver take a part of.

Sources, by the name in a card's comment:
    GA102: NVIDIA Ampere GA102 GPU Architecture, whitepaper 2.1     Ada: NVIDIA Ada GPU Architecture, whitepaper 2.02
    Blackwell: NVIDIA RTX Blackwell GPU Architecture, whitepaper     SMs: its SMs, 512 FLOP a clock and SM, boost clock
    others: the vendor's data sheet of that card

Read again in November 2026, in copies that can be searched: L40S 362.05 without and 733 with sparsity, 864 GB/s; H100
and H200 989.4, 3.35 and 4.8 TB/s; B200 2,250, and a DGX B200's eight have 1,440 GB and 64 TB/s; RTX 4090 165.15 and
1,008 GB/s; RTX 5090 170 SMs, 2.407 GHz, 1,792 GB/s; MI300X 5.3 TB/s, and half of 2,615 with sparsity. What GA102's
professional cards do is four times their fp32 rate, its GeForce cards twice, by the A40's 149.7 of 37.4.
"""

from dataclasses import dataclass

PCIE4_X16, PCIE5_X16 = 24e9, 50e9  # bytes a second from pinned memory, of 31.5 and 63 on the wire; assumed


@dataclass(frozen=True)
class Card:
    """A GPU as its vendor describes it.

    Args:
        memory_gb: of 10^9 bytes.
        tflops: of dense products of bf16 matrices with sums in fp32.
        memory_gb_per_s: read and written together.
        link_bytes_per_s: from its host's pinned memory.
        sustained: share of `tflops` that large products reach, and of the bandwidth that kernels of one pass reach.
        attention: share of the former that attention's forward and backward kernels reach: FlashAttention-2's on
            mma.sync (Ampere, Ada), or on GPUs whose products take other instructions, which it does not use.
    """

    memory_gb: int
    tflops: float
    memory_gb_per_s: float
    link_bytes_per_s: float = PCIE4_X16
    sustained: tuple[float, float] = (0.8, 0.9)  # as measured on an H100: 798 of 989 TFLOP/s, 3.0 of 3.35 TB/s
    attention: tuple[float, float] = (0.78, 0.64)  # assumed: 129 and 106 TFLOP/s on an RTX 4090

    @property
    def flops(self) -> float:
        """Sustained by large products, a second."""
        return self.tflops * 1e12 * self.sustained[0]

    @property
    def ram_bytes_per_s(self) -> float:
        """Sustained by a copy on the card, each byte counted once."""
        return self.memory_gb_per_s * 1e9 * self.sustained[1] / 2


OTHER_ATTENTION = (0.38, 0.33)  # assumed: 300 and 260 TFLOP/s, causal, on an H100
_GEFORCE = (1.0, 0.92)  # an RTX 4090: 165 TFLOP/s, since it clocks above its boost clock; 0.92 of 1.0 TB/s measured
CARDS = {
    "rtx-3060-12gb": Card(12, 25.5, 360),  # SMs: 28, 1.78 GHz; bandwidth: data sheet
    "rtx-4060-ti-16gb": Card(16, 44.1, 288, PCIE4_X16 / 2),  # SMs: 34, 2.54 GHz; bandwidth, PCIe 4 x8: data sheet
    "rtx-4080": Card(16, 97.5, 717),  # Ada
    "rtx-3090": Card(24, 71.2, 936),  # GA102
    "rtx-4090": Card(24, 165.2, 1008, sustained=_GEFORCE),  # Ada
    "l4": Card(24, 121, 300, sustained=(0.5, 0.9)),  # data sheet; 72 W hold no boost clock, half is assumed
    "a10": Card(24, 125, 600, sustained=(0.6, 0.9)),  # data sheet; 150 W, 0.6 is assumed
    "rtx-5090": Card(32, 209.5, 1792, PCIE5_X16),  # Blackwell
    "a100-40gb": Card(40, 312, 1555),  # data sheet, as all below but where another is named
    "a6000": Card(48, 154.8, 768),  # GA102
    "rtx-6000-ada": Card(48, 364.2, 960),  # Ada, its professional cards
    "l40s": Card(48, 362, 864),
    "a100-80gb": Card(80, 312, 2039),  # SXM; over PCIe 1,935 GB/s
    "h100": Card(80, 989, 3350, PCIE5_X16, attention=OTHER_ATTENTION),  # SXM; over PCIe 756 TFLOP/s, 2,000 GB/s
    "h200": Card(141, 989, 4800, PCIE5_X16, attention=OTHER_ATTENTION),  # SXM
    "b200": Card(180, 2250, 8000, PCIE5_X16, attention=OTHER_ATTENTION),  # an eighth of a DGX B200
    # Products reach about half in practice, assumed; no kernel of attention runs there yet, its share is a guess.
    "mi300x": Card(192, 1307, 5300, PCIE5_X16, sustained=(0.5, 0.8), attention=(0.2, 0.15)),
}
