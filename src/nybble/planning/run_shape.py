"""What costs depend on: the widths of a model, the sizes of micro-batches, and how a run is done. Plain numbers."""

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from nybble.formats.quant_spec import QuantSpec
from nybble.sizes import GRAPH_MULTIPLE, PRODUCT_BYTES, RANK_MULTIPLE, ShapeRules
from nybble.sources.parts import Inventory

if TYPE_CHECKING:
    from nybble.layers.batch_model import Path
    from nybble.layers.decoder_block import Keep

DENSE_BYTES = 2  # embeddings and head stay in 16 bits
MASTER_BYTES = 4  # fp32 adapters and their gradients
ADAM_BYTES = 8  # of a parameter: two fp32 moments


@dataclass(frozen=True)
class ModelShape:
    """The widths of a decoder that decide what it costs (`planning/shape.py` reads them off a model).

    Args:
        parts: its parameters, as they are.
        hidden_size: h, of the states between blocks.
        num_heads: of attention; it matters to decoder blocks, whose families all have them.
        query_width, key_value_width: of all heads together; h where no layer is called so.
        intermediate_size: of the widest MLP that a token passes, with all of its experts.
        expert_width: of one of them; 0 without experts.
        dense_width: of the widest MLP, or part of one, that has none; 0 where there are experts alone.
        narrow_ends: embedding and head stay in 16 bits whatever is computed in.
        dropped_states, dropped_attention: the model itself drops parts of these while it is trained.
        crossed: an encoder-decoder: blocks of its decoder have a second attention, over the encoder's states.
        biased_attention: what a token gives to another gets a bias by how far apart they are, of each head.
        inner_values: how many times a block's MLP holds as much as its inner width, where that is counted: of
            encoder-decoders.
        widened_norms: there, norms compute in fp32 in modules of the model's own.
        input_norms, added_norms: norms in a block of what attention and the MLP read, and of what they add to the
            states.
        normed_heads: queries and keys are normed.
        heads_together: all of a token as one row, not head by head.
        scaled_residual: what is added to the states has a factor.
        norm_values: numbers that a norm keeps of each row.
        qkv_layers, gate_up_layers: linear layers that these are.
        gated: the MLP's activation is that of a gate.
        parallel: the MLP reads what comes into the block.
        last_layers: what the linears are called whose products are never computed again but for a norm.
        values_normed: values are, too.
        reads_keys: keys and values are those of another block.
        layer_input_width: of what each layer is given of a token beside the states.
        beside_width: elements a token that layers read beside the states, of all layers together.
        kinds: where blocks differ in such widths, what a model of each of them alone would be, and how many there are.
        given_all: experts that are given a state for every token, sent to them or not.
        wide_logits: something is done to logits after the product, in fp32 (a factor, a bias, a cap).
        capped_logits: it is a cap, whose slope their gradient is multiplied with.
        mixer_values, mixer_chunk: fp32 numbers that a mixer with a state holds for its backward pass, for each token
            and beside them.
    """

    parts: Inventory
    hidden_size: int
    num_heads: int
    query_width: int
    key_value_width: int
    intermediate_size: int
    expert_width: int
    dense_width: int
    narrow_ends: bool
    dropped_states: bool = False
    dropped_attention: bool = False
    crossed: bool = False
    biased_attention: bool = False
    inner_values: int = 0
    widened_norms: bool = False
    input_norms: int = 2
    added_norms: int = 0
    normed_heads: bool = False
    heads_together: bool = False
    scaled_residual: bool = False
    norm_values: int = 1
    qkv_layers: int = 3
    gate_up_layers: int = 2
    gated: bool = True
    parallel: bool = False
    last_layers: tuple[str, ...] = ("down_proj",)
    values_normed: bool = False
    reads_keys: bool = False
    layer_input_width: int = 0
    beside_width: int = 0
    kinds: "tuple[tuple[ModelShape, int], ...]" = ()
    mixer_values: int = 0
    mixer_chunk: int = 0
    given_all: int = 0
    wide_logits: bool = False
    capped_logits: bool = False

    def of_side(self, *, encodes: bool) -> "ModelShape":
        """An encoder-decoder's blocks of the encoder, or of the decoder."""
        blocks = tuple((block, count) for block, count in self.parts.blocks if block.encodes == encodes)
        return replace(self, parts=replace(self.parts, blocks=blocks), crossed=self.crossed and not encodes)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """h, the widths of queries and of keys or values, and that of the MLP."""
        return self.hidden_size, self.query_width, self.key_value_width, self.intermediate_size

    @property
    def gate_up_width(self) -> int:
        """Of what the activation of an MLP without experts reads."""
        return (1 + self.gated) * self.dense_width

    @property
    def normed_width(self) -> int:
        """Elements a token that the norms of a block keep beside its input and x2: each what it was given."""
        keys = 0 if self.reads_keys else (1 + self.values_normed) * self.key_value_width
        heads = self.query_width + keys if self.normed_heads else 0
        return self.added_norms * self.hidden_size + heads

    @property
    def normed_rows(self) -> int:
        """Rows a token that norms see, each of which has a root of its own."""
        keys = 0 if self.reads_keys else (1 + self.values_normed) * self.key_value_width
        heads = self.num_heads * (self.query_width + keys) // self.query_width
        rows = 2 if self.heads_together else heads
        return self.input_norms + self.added_norms + (rows if self.normed_heads else 0)

    @property
    def norm_bytes(self) -> int:
        """What norms keep of a token's rows beside them, in fp32."""
        return 4 * self.norm_values * self.normed_rows

    @property
    def products(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """What each projection of a block but its experts reads, and what its linear layers give side by side."""
        h, q, kv, _ = self.widths
        f, own = self.dense_width, self.layer_input_width
        qkv = (q,) if self.reads_keys else {3: (q, kv, kv), 2: (q, kv), 1: (q + 2 * kv,)}[self.qkv_layers]
        gate_up = (f, f) if self.gate_up_layers == 2 else (self.gate_up_width,)
        attention: tuple[tuple[int, tuple[int, ...]], ...] = ((h, qkv), (q, (h,)))
        mlp = ((h, gate_up), (f, (h,))) if f else ()
        return (*attention, *mlp, *(((h, (own,)), (own, (h,))) if own else ()))

    @property
    def alone(self) -> "tuple[tuple[ModelShape, int], ...]":
        """What models of one kind of blocks each would be, and how many blocks it has of them."""
        return self.kinds or ((self, self.num_layers),)

    @property
    def num_experts(self) -> int:
        """Of a block, at most."""
        return max((shape[0] for block, _ in self.parts.blocks for shape in block.experts), default=0)

    @property
    def last_expert_products(self) -> int:
        """Elements of the experts' last projections that a token passes."""
        return sum(
            count * block.passed_experts * rows * columns
            for block, count in self.parts.blocks
            for name, _, rows, columns in block.stacks
            if name.rpartition(".")[2] in self.last_layers
        )

    @property
    def num_layers(self) -> int:
        return self.parts.num_blocks

    @property
    def vocab_size(self) -> int:
        return self.parts.head[0]

    @property
    def parameters(self) -> int:
        """Number of all parameters of the model."""
        return self.parts.elements

    @property
    def largest_linear(self) -> int:
        """Elements of the largest linear layer, or expert's matrix, of a block."""
        return max((each for block, _ in self.parts.blocks for _, each in block.few_bit_matrices), default=0)

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest parameter."""
        stacked = (
            prod(shape) for block, _ in self.parts.blocks for shape in (*block.experts, *dict(block.matrices).values())
        )
        return max(self.largest_linear, self.parts.head[0] * self.parts.head[1], *stacked)

    @property
    def passed_experts(self) -> int:
        """Experts of a block that a token passes, at most; 0 without experts."""
        return max((block.passed_experts for block, _ in self.parts.blocks), default=0)

    @property
    def routed_states(self) -> int:
        """States that a token's becomes where there are experts."""
        return max(self.passed_experts, self.given_all)

    def touched_elements(self, tokens: int) -> int:
        """Elements of the blocks' matrices in few bits that so many tokens meet: of experts, as many as they can."""
        return sum(count * block.touched_elements(tokens) for block, count in self.parts.blocks)

    @property
    def multiplied_elements(self) -> int:
        """Elements of the blocks' matrices that one token is multiplied with."""
        return sum(count * block.multiplied_elements for block, count in self.parts.blocks)

    @property
    def last_products(self) -> int:
        """Elements of the linears that a block ends with, whose products are never computed again but for a norm."""
        if self.added_norms:
            return 0
        return sum(
            count * rows * columns
            for block, count in self.parts.blocks
            for name, rows, columns in block.linears
            if name.rpartition(".")[2] in self.last_layers
        )


@dataclass(frozen=True)
class TowerShape:
    """The widths of what makes states of pictures.

    Args:
        patch_values: numbers that a patch is.
        width, intermediate_size: of its states, and of the widest that a block makes of them.
        num_layers: of its blocks.
        patches: of a picture of the size that it was made for, which its attention masks one by one; 0 of any size.
        adapted: its blocks are in four bits and have adapters.
        inner_values, widened_norms: as of a `ModelShape`.
    """

    patch_values: int
    width: int
    intermediate_size: int
    num_layers: int
    patches: int = 0
    adapted: bool = False
    inner_values: int = 0
    widened_norms: bool = False

    def over(self, blocks: ModelShape) -> ModelShape:
        """The shape of a model that is the tower's blocks."""
        return replace(
            blocks,
            hidden_size=self.width,
            query_width=self.width,
            key_value_width=self.width,
            intermediate_size=self.intermediate_size,
            inner_values=self.inner_values,
            widened_norms=self.widened_norms,
            dropped_states=False,
            dropped_attention=False,
            mixer_values=0,
            mixer_chunk=0,
        )


@dataclass(frozen=True)
class Side:
    """What the prompts of micro-batches come to, or their answers, each padded by themselves.

    Args:
        tokens: of those of the largest, padding included.
        longest: tokens of the longest.
        validation_tokens: as `tokens`, of evaluations.
    """

    tokens: int
    longest: int
    validation_tokens: int

    def halved(self) -> "Side":
        """Of half the length."""
        return Side(*(-(-each // 2) for each in (self.tokens, self.longest, self.validation_tokens)))


@dataclass(frozen=True)
class MicroBatches:
    """What the micro-batches of one size come to, over a run.

    Args:
        tokens: of the largest, padding included.
        supervised: of those, how many are projected by the head at most.
        longest_row: tokens of the longest row.
        token_counts: different numbers of tokens that training meets.
        validation_tokens, validation_supervised: the same of evaluations.
        validation_counts: different numbers of tokens that only evaluations meet.
        documents: of a row, at most.
        heaviest: the rows of the largest micro-batch of training, by number; empty where there is no data.
        picture_values, step_picture_values: numbers that the pictures of one are made into, at most, and of a step.
        decoded_bytes: of the pictures of one before that.
        share: the most that the micro-batches of one step have of what as many of the largest would: less than 1 where
            rows are padded, and each to the longest of its own few.
        prompts, answers: of an encoder-decoder, what its encoder and its decoder are given; `tokens` are of both.
    """

    tokens: int
    supervised: int
    longest_row: int
    token_counts: int
    validation_tokens: int
    validation_supervised: int
    validation_counts: int
    documents: int = 1
    heaviest: tuple[int, ...] = ()
    picture_values: int = 0
    step_picture_values: int = 0
    decoded_bytes: int = 0
    share: float = 1.0
    prompts: Side | None = None
    answers: Side | None = None

    def of_side(self, side: Side) -> "MicroBatches":
        """What one half of an encoder-decoder is given of them."""
        return replace(
            self, tokens=side.tokens, longest_row=side.longest, validation_tokens=side.validation_tokens, answers=None
        )

    def filled_up(self) -> "MicroBatches":
        """In the shapes that graphs are captured for; evaluations stay."""
        filled = {name: -(-getattr(self, name) // GRAPH_MULTIPLE) * GRAPH_MULTIPLE for name in ("tokens", "supervised")}
        return replace(self, **filled)

    def halved(self) -> "MicroBatches":
        """With rows of half the length."""
        half = {name: -(-getattr(self, name) // 2) for name in ("tokens", "supervised", "longest_row")}
        half |= {name: -(-getattr(self, name) // 2) for name in ("validation_tokens", "validation_supervised")}
        sides = {name: side and side.halved() for name in ("prompts", "answers") for side in [getattr(self, name)]}
        return replace(self, **half, **sides)


@dataclass(frozen=True)
class RunShape:
    """What decides the cost of a run: what it is, and how it is done.

    Args:
        model: the widths of the model.
        batches: T and the other sizes of micro-batches.
        expert_parameters, idle_parameters: of P, those beside experts, and of these those that a token does not pass.
        adapter_parameters, rank: P and r; where layers' ranks differ, the mean of the block that has most.
        compute_bytes: c.
        spec: format of the base, or None for 16 bits.
        path: "blocks" for nybble's decoder blocks, "generic" for transformers' modules.
        keep: what each block keeps: "nothing" (its input), "attention" or "everything".
        whole_blocks: the last so many keep everything, whatever the others do; on GPUs alone.
        rules: how rows and matrices are cut.
        average_bits, most_bits: bits a weight where the layers of the base have several formats, of all and of the
            block that has most.
        micro_batches: of one optimizer step.
        resident_blocks: of a streamed base; None where the whole base is resident.
        from_ram: the others are read from memory beside the budget, else from a disk.
        stream_ends: the embedding's rows and the head's panels are read where they are used.
        adam_bytes: of optimizer state a parameter.
        page_bytes: None where optimizer state is resident, else what the buffers of its pages take.
        offload: what blocks keep goes to a file, or beside a GPU.
        dropout: on the adapters' inputs, on the generic path.
        dora: rows' lengths are trained.
        product_bytes: as `Machine` has them.
        on_cpu: where oneDNN's products and gaps in the C library's heap come on top.
        trained_parameters, largest_trained: of modules that are trained whole, all of them and their largest weight.
        scored: the model gives scores or states of texts: there is no head over a vocabulary.
        trained_head: the head is one of them: the model's own forward makes its logits.
        other_ranks: that some layers have instead of r.
        full: every weight is trained, of fp32 masters; then rank and adapters are 0.
        graphs: micro-batches come from graphs, which have memory of their own.
        tower: of a model that reads pictures; None of others.
        asks_reference: training's micro-batches go through without a gradient too.
        more_forwards: passes without a gradient beside each micro-batch's own, as a reference's in the step.
        distilled: the logits are compared with a teacher's.
        asked: nothing is trained: the model is asked about the micro-batches of training and of evaluations, as a
            teacher.
    """

    model: ModelShape
    batches: MicroBatches
    adapter_parameters: int
    rank: int
    compute_bytes: int
    spec: QuantSpec | None
    path: "Path"
    keep: "Keep"
    rules: ShapeRules
    average_bits: float | None = None
    most_bits: float | None = None
    whole_blocks: int = 0
    micro_batches: int = 2
    resident_blocks: int | None = None
    from_ram: bool = False
    stream_ends: bool = False
    adam_bytes: float = ADAM_BYTES
    page_bytes: int | None = None
    offload: bool = False
    dropout: bool = False
    dora: bool = False
    product_bytes: int = PRODUCT_BYTES
    on_cpu: bool = True
    trained_parameters: int = 0
    expert_parameters: int = 0
    idle_parameters: int = 0
    largest_trained: int = 0
    trained_head: bool = False
    scored: bool = False
    other_ranks: tuple[int, ...] = ()
    full: bool = False
    asks_reference: bool = False
    more_forwards: int = 0
    distilled: bool = False
    asked: bool = False
    graphs: bool = False
    tower: TowerShape | None = None

    @property
    def sides(self) -> "tuple[RunShape, ...]":
        """Of an encoder-decoder its encoder over prompts, and its decoder over answers; of a model whose vision tower
        is adapted too that over patches, and its language model; of others itself.
        """
        prompts, answers = self.batches.prompts, self.batches.answers
        encoder, decoder = self.model.of_side(encodes=True), self.model.of_side(encodes=False)
        if self.tower is not None and self.tower.adapted:
            patches = -(-self.batches.picture_values // self.tower.patch_values)
            read = replace(self.batches, tokens=patches, validation_tokens=patches, longest_row=1)
            return replace(self, model=self.tower.over(encoder), batches=read), replace(self, model=decoder)
        if prompts is None or answers is None:
            return (self,)
        return (
            replace(self, model=encoder, batches=self.batches.of_side(prompts)),
            replace(self, model=decoder, batches=self.batches.of_side(answers)),
        )

    @property
    def learnt_parameters(self) -> int:
        """Of adapters, and of what is trained whole beside them; or of the whole model."""
        return self.model.parameters if self.full else self.adapter_parameters + self.trained_parameters

    @property
    def block_bits(self) -> float | None:
        """Bits a weight of the block that has most, where the layers of the base have several formats."""
        return self.average_bits if self.most_bits is None else self.most_bits

    @property
    def filled_up(self) -> bool:
        """Whether micro-batches have the shapes that graphs are captured for (`training/accumulation.py`)."""
        elsewhere = self.resident_blocks is not None or self.stream_ends or self.offload
        if self.path != "blocks" or self.full or elsewhere or self.model.expert_width:
            return False
        elements = max((block.linear_elements for block, _ in self.model.parts.blocks), default=0)
        return self.rules.in_graphs(self.batches.filled_up().tokens, elements)

    @property
    def wide(self) -> bool:
        """Whether projections are one product each way over wide rows (`layers/augmented.py`)."""
        return self.path == "blocks" and not self.on_cpu

    @property
    def beside(self) -> int:
        """The most columns of wide rows beside an input: of three adapters."""
        return -(-3 * self.rank // RANK_MULTIPLE) * RANK_MULTIPLE


ADAM_8BIT_BYTES = 2 + 8 / 256  # two codes, two fp32 scales for each 256
