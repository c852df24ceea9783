"""The stacks that published rows were measured with: what a row leaves out is taken from here, and never row by row.

Each assumption names where it was read; none was chosen by the error it makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_core.recipe import Dtype
from qlora_core.strategy import Loss


@dataclass(frozen=True, slots=True)
class Stack:
    """How one project trains where its rows do not say.

    Attributes:
        name: the project.
        prefixes: what the ids of its rows begin with.
        lora_dtype: dtype of the adapters.
        dropout: of the adapters, where a row's notes state none.
        double_quantization: where a row states none.
        upcast: "quantized": peft.prepare_model_for_kbit_training casts to float32 what it does not quantize.
        autocast: the forward pass runs under torch.autocast.
        loss: the nearer of the two that a Strategy has.
        output_held: the model's output is kept to the end of the step.
        paged_when_quantized: a quantized model's optimizer is one of bitsandbytes' paged ones.
        accumulation: micro-batches of a step.
        quantizes: which linear layers are quantized: those that bitsandbytes replaces in transformers' models, all of
            them, or those that have an adapter.
        own_models: its models are code of its own, in which GELU is one kernel, and not transformers'.
        ties: the output head is the token embedding where the model's config says so.
        divides_while_loading: under ZeRO-3 no rank ever holds the whole model.
        assumptions: the above in words, each with its source.
    """

    name: str
    prefixes: tuple[str, ...]
    lora_dtype: Dtype
    dropout: float
    double_quantization: bool
    upcast: Literal["never", "quantized"]
    autocast: bool
    loss: Loss
    output_held: bool
    paged_when_quantized: bool
    accumulation: int
    quantizes: Literal["replaced", "all", "adapted"]
    own_models: bool
    ties: bool
    divides_while_loading: bool
    assumptions: tuple[str, ...]


STACKS = (
    Stack(
        name="canifinetune",
        prefixes=("canift-",),
        lora_dtype="float32",
        dropout=0.0,
        double_quantization=True,
        upcast="quantized",
        autocast=False,
        loss="full",
        output_held=True,
        paged_when_quantized=True,
        accumulation=1,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "the model's output is a local variable of the loop, so it lives through the step; no autocast; "
            "prepare_model_for_kbit_training for quantized models only, whatever the row's notes say of 16-bit LoRA "
            "(src/canifinetune/bench/runner.py at 053ce9e)",
            "adapters in float32 and no emptying of the allocator's cache after loading (peft 0.19.1, stated)",
        ),
    ),
    Stack(
        name="LitGPT",
        prefixes=("litgpt-", "raschka-"),
        lora_dtype="bfloat16",
        dropout=0.05,
        double_quantization=False,
        upcast="never",
        autocast=False,
        loss="full",
        output_held=True,
        paged_when_quantized=True,
        accumulation=2,
        quantizes="all",
        own_models=True,
        ties=False,
        divides_while_loading=False,
        assumptions=(
            "bf16-true: adapters, gradients and torch's AdamW state in bfloat16; bitsandbytes' PagedAdamW where the "
            "base is quantized (finetune/lora.py at 8641822, litgpt/finetune/lora.py at 5895df10)",
            "several micro-batches a step (batch_size 128; global_batch_size 6 to 8 in config_hub), no checkpointing "
            "on one GPU",
            "the logits, made 128 tokens at a time (chunked_cross_entropy) and cast to float32 by Lightning (its "
            "precision plugins' convert_output), all stay until the backward pass is done: the full loss is nearer",
            "output head and token embedding are two weights in all models (model.py; tie_embeddings is refused)",
            "every sample counts as long as the row's longest",
            "all linear layers are plain nn.Linear, and quantized, Falcon's too; that Lightning's plugin quantizes "
            "the output head as well is left out: a Recipe cannot say so (counted above, an older quantizer)",
        ),
    ),
    Stack(
        name="torchtune",
        prefixes=("torchtune-",),
        lora_dtype="bfloat16",
        dropout=0.0,
        double_quantization=True,
        upcast="never",
        autocast=False,
        loss="chunked",
        output_held=False,
        paged_when_quantized=False,
        accumulation=1,
        quantizes="adapted",
        own_models=True,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "adapters in the model's bfloat16, dropout 0, no gradient accumulation (stated), cross-entropy by chunks "
            "(recipes/configs/llama3_1/8B_*_single_device.yaml at 30b8519e, which brought the README's first table); "
            "the second table adds one technique a row, so what stands before chunks has the full loss",
            "its chunks of logits are all kept, and float32 one by one; the chunked loss, which keeps none, is nearer",
            "targets of the first table's rows: those of these recipes then, q and v for LoRA, all linear layers for "
            "QLoRA",
            "only linear layers with an adapter are quantized (issue 1398); torchao's NF4 is counted as bitsandbytes'",
            "its AdamW is the fused one, ours the foreach one: no field of a Strategy says which",
        ),
    ),
    Stack(
        name="LLaMA-Factory",
        prefixes=("llamafactory-",),
        lora_dtype="float32",
        dropout=0.0,
        double_quantization=True,
        upcast="never",
        autocast=True,
        loss="full",
        output_held=False,
        paged_when_quantized=False,
        accumulation=4,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "double quantization by default, layer norms not upcast, adapters cast to float32 unless pure_bf16, "
            "dropout 0 (hparams/model_args.py, model/adapter.py, hparams/finetuning_args.py)",
            "transformers' Trainer: autocast in 16 bits, the stock loss, AdamW of torch",
        ),
    ),
    Stack(
        name="axolotl",
        prefixes=("axolotl-",),
        lora_dtype="float32",
        dropout=0.0,
        double_quantization=True,
        upcast="never",
        autocast=True,
        loss="chunked",
        output_held=False,
        paged_when_quantized=False,
        accumulation=4,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "what prepare_model_for_kbit_training casts to float32 is cast back to bfloat16 (loaders/model.py, "
            "_configure_embedding_dtypes, at 067b021c); adapters in float32, bf16: auto is autocast",
            "4 micro-batches a step (the examples' gradient_accumulation_steps; 2 for Olmo 3, which is the same to us)",
            "Cut Cross Entropy never holds the logits: the chunked loss, which holds 1,024 tokens' in 16 bits, is the "
            "nearer one",
            "its log begins with the peak of active bytes (core/trainers/base.py): taken as allocated",
        ),
    ),
    Stack(
        name="peft's method comparison",
        prefixes=("peft-mmqa-", "peft-lora-", "peft-full-"),
        lora_dtype="float32",
        dropout=0.0,
        double_quantization=True,
        upcast="never",
        autocast=False,
        loss="full",
        output_held=True,
        paged_when_quantized=False,
        accumulation=1,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "no autocast (use_amp false), adapters in float32, no checkpointing (use_gc false), batch of 4, the "
            "output a local variable of the loop (method_comparison/MetaMathQA/default_training_params.json and "
            "run.py at 5d602fdb)",
            "the figure is max_memory_reserved over the run (utils.py), which evaluates with batches of 50 as well: "
            "the prediction is of a training batch of 4 x 768",
            "LoRA-FA is counted as LoRA",
        ),
    ),
    Stack(
        name="peft's documents",
        prefixes=("peft-dsz3-",),
        lora_dtype="float32",
        dropout=0.1,
        double_quantization=True,
        upcast="never",
        autocast=True,
        loss="full",
        output_held=False,
        paged_when_quantized=False,
        accumulation=4,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=True,
        assumptions=(
            "TRL's SFTTrainer with bf16, gradient_accumulation_steps 4, zero3_init_flag true: no rank loads the "
            "whole model, so the highest phase of a step counts (docs/source/accelerate/deepspeed.md)",
            "DeepSpeed's buckets are counted as this project sets them",
        ),
    ),
    Stack(
        name="LongLoRA",
        prefixes=("longlora-",),
        lora_dtype="float32",
        dropout=0.0,
        double_quantization=True,
        upcast="never",
        autocast=True,
        loss="full",
        output_held=False,
        paged_when_quantized=False,
        accumulation=8,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "rank 8 on q, k, v and o, no dropout, 8 micro-batches a step, transformers' Trainer with bf16 "
            "(fine-tune.py and README.md of dvlab-research/LongLoRA); DeepSpeed's buckets are counted as this "
            "project sets them",
        ),
    ),
    Stack(
        name="Hugging Face's 4-bit article",
        prefixes=("hf4bit-",),
        lora_dtype="float32",
        dropout=0.0,
        double_quantization=False,
        upcast="quantized",
        autocast=False,
        loss="full",
        output_held=False,
        paged_when_quantized=False,
        accumulation=4,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "TRL of May 2023 prepares the model with peft, which casts what is not quantized to float32 "
            "(trl/trainer/sft_trainer.py at v0.4.2)",
            "peft's defaults: rank 8, no dropout, q_proj and v_proj of Llama (LoraConfig)",
        ),
    ),
    Stack(
        name="fsdp_qlora",
        prefixes=("answerai-",),
        lora_dtype="bfloat16",
        dropout=0.1,
        double_quantization=True,
        upcast="never",
        autocast=False,
        loss="full",
        output_held=True,
        paged_when_quantized=False,
        accumulation=1,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "everything in bfloat16, without autocast (precision bf16); dropout 0.1 of the adapters; transformers' "
            "models and loss; bitsandbytes' Linear4bit with its default of double quantization (train.py at 05ed9f2)",
            "its DDP is FSDP that divides nothing (ShardingStrategy.NO_SHARD): an all-reduce a step",
        ),
    ),
    Stack(
        name="Qwen",
        prefixes=("qwen-",),
        lora_dtype="bfloat16",
        dropout=0.05,
        double_quantization=True,
        upcast="never",
        autocast=True,
        loss="full",
        output_held=False,
        paged_when_quantized=False,
        accumulation=8,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=True,
        assumptions=(
            "transformers' Trainer with bf16 and gradient checkpointing, dropout 0.05 of the adapters (finetune.py and "
            "finetune/*.sh at 2df8e8a)",
            "Qwen loads in bfloat16, and peft before 0.8, which its README asks for, gives adapters their base's dtype "
            "(tuners/lora/layer.py at v0.7.0)",
            "full fine-tuning is finetune/finetune_ds.sh, DeepSpeed with ZeRO-3, on one GPU too",
            "the first Qwen's shapes, with its query, key and value in one layer; its own fused norms and rotary "
            "embedding, used where flash-attn has them, are not counted",
        ),
    ),
    Stack(
        name="ml-engineering",
        prefixes=("mlengineering-",),
        lora_dtype="bfloat16",
        dropout=0.0,
        double_quantization=True,
        upcast="never",
        autocast=False,
        loss="full",
        output_held=False,
        paged_when_quantized=False,
        accumulation=1,
        quantizes="replaced",
        own_models=False,
        ties=True,
        divides_while_loading=False,
        assumptions=(
            "weights, gradients and torch's AdamW in bfloat16, gradients not clipped (training/performance/benchmarks/"
            "torch-compile-bench.py at 744d01e)",
        ),
    ),
)


def stack_of(row_id: str) -> Stack | None:
    """The stack a row was measured with, by its id; None where it is not described here."""
    return next((stack for stack in STACKS if row_id.startswith(stack.prefixes)), None)
