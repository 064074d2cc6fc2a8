"""The loss in a Hugging Face Trainer, without Megatron: a function and one argument.

Run it: `python examples/hf_trainer.py` (seconds on a CPU). The model is a toy that reads the
language topics of Python's own help, byte by byte.

What is exact, with n_k the valid tokens of micro-batch k, N those of all micro-batches of a step on
all ranks (`num_items_in_batch`), w the weights and l the cross entropies:

    a step's objective = sum over k of alpha_k sum(w l) / N,   alpha_k = n_k / sum(w)   ("paper")

so every valid token counts alike however a step is cut, and alpha belongs to the micro-batch, as
published. normalization="none" (alpha = 1) does not depend on the cut at all; "global" would need
the sum of the weights of micro-batches still to come, so use it without accumulation only. With
several GPUs start one process for each (torchrun, accelerate launch).
"""

import tempfile
from functools import partial
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss

IGNORED, SEQUENCE = -100, 128
CROSS_ENTROPY = InfoEntropyConfig(objective="cross_entropy")


def causal_loss(outputs, labels, num_items_in_batch=None, *, config):
    """`compute_loss_func`: labels [batch, sequence] as the tokens are, -100 where masked."""
    # Position i predicts token i + 1. Shifting the labels leaves the logits where they are.
    target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    is_training = torch.is_grad_enabled()
    mean = infoentropy_loss(outputs.logits, target, config if is_training else CROSS_ENTROPY)
    if num_items_in_batch is None:
        return mean
    return mean * (target != IGNORED).sum() / num_items_in_batch


class Bytes(torch.utils.data.Dataset):
    """Pieces of a text, one token a byte."""

    def __init__(self, text: str) -> None:
        tokens = torch.tensor(list(text.encode()))
        self.pieces = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def tiny_llama() -> LlamaForCausalLM:
    """Yours: any model with logits [batch, sequence, vocabulary]."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=SEQUENCE,
    )
    return LlamaForCausalLM(config)


def main(steps: int = 60) -> dict[str, float]:
    """Train, and return what the evaluation says."""
    text = Bytes("\n".join(topics.values()))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            tiny_llama(),
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                logging_steps=max(1, steps // 4),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=torch.utils.data.Subset(text, range(16, len(text))),
            eval_dataset=torch.utils.data.Subset(text, range(16)),
            compute_loss_func=partial(causal_loss, config=InfoEntropyConfig(gamma=1.0)),  # ours
        )
        trainer.train()
        return trainer.evaluate()


if __name__ == "__main__":
    print(f"validation cross entropy: {main()['eval_loss']:.4f} nats a byte")  # noqa: T201
