"""Why a prediction is more than 15 % off: what the row's software did that a Recipe and a Strategy do not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from benchmarks.accuracy.published import TOLERANCE, Request, Scored, predicted_bytes, request_of, scored
from qlora_core.memory.bytes import constant_tensors
from qlora_core.memory.formula import course, estimate


class Explanation(NamedTuple):
    """Why a row is far off.

    Attributes:
        kind: in two or three words.
        text: what happened, with its source or the figure that shows it.
        left: per cent by which the prediction is still above the figure where that is counted.
        impossible: what the row's own recipe allocates for certain is beyond the tolerance above its figure.
    """

    kind: str
    text: str
    left: float
    impossible: bool = False

    @property
    def suffices(self) -> bool:
        """Whether what is left is within what needs no reason."""
        return abs(self.left) <= TOLERANCE


OLDER_QUANTIZER = "an older quantizer"


class Far(NamedTuple):
    """A row beyond the tolerance, and why; None where nobody has said."""

    scored: Scored
    explanation: Explanation | None

    @property
    def is_explained(self) -> bool:
        """Whether there is a reason that suffices."""
        return self.explanation is not None and self.explanation.suffices


def older_quantizer_is() -> str:
    """What rows with that reason have in common."""
    rows = [one for one in scored() if keeps_inputs(one)]
    left = [left_of_old(one, follows_another(one)) for one in rows]
    alone = [left_of_old(one, False) for one in rows]
    return (
        "LitGPT's rows were made with bitsandbytes 0.41.1 (stated) and 0.42.0 (pinned), whose 4-bit layers keep their\n"
        "input (MatMul4Bit); 0.43.2 stopped that (bitsandbytes pull request 1270). It is not among the saved tensors,\n"
        "which a backward pass frees: it stays as long as the graph. LitGPT's loop holds that by its logits and its\n"
        "loss until the next forward pass has made new ones, so that by then those of two micro-batches are kept.\n"
        "Where samples are cut at a length, two in a row are taken to have it; where one sample is the longest, it\n"
        "comes first (get_batch), and what others keep beside it is not counted. Lightning's plugin\n"
        "(BitsandbytesPrecision) quantizes the output head too, and stores float16 as the dtype of dequantized\n"
        "weights, of which a second copy in bfloat16 is made: the head at work takes 4 bytes a weight beside the\n"
        "quantized one, where the prediction has 2. That is the moment which is counted. So counted, all\n"
        f"{len(left)} rows of the stack in 4 bit, those that need no reason too, are off by {min(left):+.1f} to "
        f"{max(left):+.1f} %;\nwith the inputs of one micro-batch only, by {min(alone):+.1f} to {max(alone):+.1f} %."
    )


def far_rows() -> tuple[Far, ...]:
    """All scored rows beyond the tolerance, in the order of the file."""
    return tuple(Far(one, explanation_of(one)) for one in scored() if abs(one.error) > TOLERANCE)


def explanation_of(one: Scored) -> Explanation | None:
    """What explains this row, if it is known."""
    return next((explain(one) for applies, explain in _RULES if applies(one)), None)


def left_by(one: Scored, added: int) -> float:
    """Per cent by which the prediction is above the figure where a reason adds so many bytes to it."""
    return 100 * ((one.predicted + added) / one.row.measured_bytes - 1)


def keeps_inputs(one: Scored) -> bool:
    """Whether the row was measured with a bitsandbytes that `inputs_kept` is about, without checkpointing."""
    return one.stack.name == "LitGPT" and one.row.quantization.startswith(("nf4", "fp4"))


def inputs_kept(asked: Request) -> int:
    """Bytes of the inputs of 4-bit layers that bitsandbytes before 0.43.2 kept for the backward pass of a whole step.

    Its MatMul4Bit put them in `ctx.tensors`; version 0.43.2 stopped that (pull request 1270). Of each layer the input
    of the attention's projections, of the output projection, of the feed-forward's first ones and of its last; where
    both begin with one norm (Falcon, Phi-2), they share an input. LitGPT makes queries head by head, and so does flash
    attention its output, of which the output projection's input is then a copy (model.py, CausalSelfAttention).
    """
    architecture = asked.architecture
    first, *_, output = (linear for linear in architecture.linears if linear.part == "attention")
    up, *_, down = (linear for linear in architecture.linears if linear.part == "mlp")
    inputs = [first, output, down] if architecture.norms_per_layer == 1 else [first, output, up, down]
    tokens = asked.strategy.micro_batch * asked.recipe.seq_len
    return 2 * sum(linear.in_features for linear in inputs) * tokens * architecture.num_layers


def head_at_work(asked: Request) -> int:
    """Bytes of the quantized output head while it is used, as `older_quantizer_is` says."""
    weights = asked.architecture.vocab_size * asked.architecture.hidden_size
    constants = constant_tensors(weights, asked.recipe.block_size, asked.recipe.double_quantization)
    return weights // 2 + sum(constants) + (2 + 2) * weights


def follows_another(one: Scored) -> bool:
    """Whether a micro-batch of the row's length may follow another: the row states where samples are cut."""
    return "seq_len is the max" in one.row.notes


def at_the_head(one: Scored, follows: bool) -> int:
    """Bytes allocated while LitGPT's quantized output head is used, when there are the most.

    Where a micro-batch `follows` another as long, that is in its forward pass: of the other one, logits in float32 are
    left, beside its own in bfloat16. Else it is in the backward pass, with logits and their gradients in float32.
    """
    asked = request_of(one.row, one.stack)
    moments = course(asked.architecture, asked.recipe, asked.strategy, asked.device)
    before = next(sum(there) for part, phase, there in moments if (part, phase) == ("final norm", "forward"))
    logits = asked.strategy.micro_batch * asked.recipe.seq_len * asked.architecture.vocab_size
    kept, of_logits = (2, 4 + 2) if follows else (1, 4 + 4)
    plain_head = 2 * asked.architecture.head_parameters
    return before - plain_head + kept * inputs_kept(asked) + head_at_work(asked) + of_logits * logits


def left_of_old(one: Scored, follows: bool) -> float:
    """Per cent by which the prediction is above the figure where the above is counted."""
    return left_by(one, at_the_head(one, follows) - predicted_bytes(request_of(one.row, one.stack), one.stack))


def _litgpt_quantized(one: Scored) -> Explanation:
    asked, follows = request_of(one.row, one.stack), follows_another(one)
    left = left_of_old(one, follows)
    text = (
        f"inputs of 4-bit layers, kept: {inputs_kept(asked) / 1e9:.2f} GB{', twice' if follows else ''}; the output "
        f"head at work: {head_at_work(asked) / 1e9:.2f} GB. The moment then comes to "
        f"{at_the_head(one, follows) / 1e9:.2f} GB, {left:+.1f} %"
    )
    return Explanation(OLDER_QUANTIZER, text, left)


def _without_cut_cross_entropy(one: Scored) -> Explanation:
    asked = request_of(one.row, one.stack)
    stock = replace(asked, strategy=replace(asked.strategy, loss="full"))
    left = left_by(one, predicted_bytes(stock, one.stack) - predicted_bytes(asked, one.stack))
    return Explanation(
        "another loss",
        "Cut Cross Entropy is a plugin to be installed; with the stock loss, all logits at once, the same request "
        f"comes to {left:+.1f} %, so the figure was most likely taken without it. Its neighbours' figures were not",
        left,
    )


def _less_than_its_parts(one: Scored) -> Explanation:
    parameters = request_of(one.row, one.stack).architecture.parameters
    certain = 4 * 2 * parameters
    above = 100 * (certain / one.row.measured_bytes - 1)
    return Explanation(
        "a figure too small",
        "its recipe (config_hub/finetune/llama-3.2-1B/full.yaml at 00af8b0d: one device, bf16-true, torch.optim.AdamW) "
        f"trains {parameters / 1e9:.2f} billion parameters, whose weights, gradients and two moments are "
        f"{certain / 1e9:.1f} GB in bfloat16, {above:+.1f} %, before the first activation: no prediction for it can be "
        "near the figure. The same change gives 16.51 GB for Llama 3.2 3B on a GPU of 24 GB, where by the same count "
        "there are 28.9",
        100 * (one.predicted / one.row.measured_bytes - 1),
        impossible=above > TOLERANCE,
    )


def _fused_optimizer(one: Scored) -> Explanation:
    asked = request_of(one.row, one.stack)
    phases = estimate(asked.architecture, asked.recipe, asked.strategy, asked.device).gpu.phases
    left = left_by(one, phases.backward - predicted_bytes(asked, one.stack))
    return Explanation(
        "another optimizer kernel",
        "torchtune's AdamW is the fused one, which does not make the square roots of all moments at once as the "
        f"foreach one does, and the peak is then the backward pass: predicted at {phases.backward / 1e9:.1f} GB, "
        f"{left:+.1f} %",
        left,
    )


def _contradicted(one: Scored) -> Explanation:
    twin = next(other for other in scored() if other.row.id == "llamafactory-t1-hf16")
    left = 100 * (one.predicted / twin.row.measured_bytes - 1)
    return Explanation(
        "two figures for one run",
        f"the same document gives {twin.row.stated} GB for the same model, method, batch and length on another GPU, "
        f"which is predicted to {left:+.1f} %; flash attention instead of sdpa cannot add 10 GB",
        left,
    )


def _larger_buckets(one: Scored) -> Explanation:
    left = left_by(one, 2 * 2 * 10**9)
    return Explanation(
        "other ZeRO settings",
        "its stage2.json sets gradient buckets of 1e9 elements and overlap_comm, which is two buffers of 2 GB in "
        f"bfloat16, and they leave {left:+.1f} %; ours are of 20 MB. Its code also trains the embedding. The figure is "
        "transcribed from a paper's table",
        left,
    )


_RULES: tuple[tuple[Callable[[Scored], bool], Callable[[Scored], Explanation]], ...] = (
    (lambda one: keeps_inputs(one) and one.error < 0, _litgpt_quantized),
    (lambda one: one.stack.name == "LitGPT" and one.row.method == "full" and one.error > 0, _less_than_its_parts),
    (lambda one: one.stack.name == "torchtune" and one.row.method == "full", _fused_optimizer),
    (lambda one: one.row.id == "llamafactory-t2-fa2", _contradicted),
    (lambda one: one.stack.name == "axolotl" and one.error < 0, _without_cut_cross_entropy),
    (lambda one: one.stack.name == "LongLoRA", _larger_buckets),
)
"""The first that applies says why a row is far off."""
