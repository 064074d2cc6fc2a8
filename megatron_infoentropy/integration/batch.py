"""Batches and datasets for Megatron's trainer, from its own readers of indexed datasets."""

import json
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from numpy.typing import NDArray

from megatron_infoentropy.integration.checkpoints import is_first_rank, say

FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def get_batch(
    data_iterator: Any, vp_stage: int | None, config: Any, *, training: bool
) -> dict[str, Any]:
    """This rank's part of the next micro-batch; None for fields its pipeline stage does not need.

    tokens, labels, position_ids: int64 [batch, sequence]; loss_mask: fp32 [batch, sequence].
    """
    has_mtp = _has_mtp(config, vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not has_mtp:
        return dict.fromkeys(FIELDS)
    args = get_args()
    batch: dict[str, Any] = dict.fromkeys(FIELDS)
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch |= {
            name: value.cuda(non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in next(data_iterator).items()
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=True),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=True),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    _leave_out(batch, args.infoentropy_ignore_target)
    return {name: batch.get(name) for name in FIELDS}


def _leave_out(batch: dict[str, Any], target: int) -> None:
    """Mask the tokens that have this target, on stages that have targets; -1 is none."""
    if target >= 0 and batch.get("labels") is not None:
        batch["loss_mask"] = batch["loss_mask"] * (batch["labels"] != target)


def _has_mtp(config: Any, vp_stage: int | None) -> bool:
    """Return whether multi-token-prediction heads, which read tokens, are on this stage."""
    has_heads: bool = mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )
    return has_heads


def embedding_ranks(model_config: Any, pipeline_ranks: list[int]) -> list[int]:
    """Return the ranks of a pipeline that share the word embeddings; for Megatron's `pretrain`.

    They are the first, the one of the multi-token-prediction heads and, if the output layer is the
    same tensor, the last. Megatron's default is the first and the last: it would then make one
    tensor of an embedding and of an output layer that are two.
    """
    config = model_config.transformer
    heads = get_mtp_ranks(pipeline_ranks, config)
    if len(pipeline_ranks) > 1 and pipeline_ranks[0] in heads:
        raise ValueError(
            "--pipeline-model-parallel-layout puts the multi-token-prediction heads (m) on the "
            "first pipeline rank, where Megatron never joins their embedding with the one that is "
            f"there; put m on another of the {len(pipeline_ranks)} ranks, of which each has every "
            f"{len(pipeline_ranks)}th stage"
        )
    shared = {pipeline_ranks[0], *heads}
    if model_config.share_embeddings_and_output_weights or not config.mtp_num_layers:
        shared.add(pipeline_ranks[-1])
    return sorted(shared)


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """(train, validation, test) datasets from Megatron's data flags; its `datasets_provider`."""
    args = get_args()
    kind = PieceDataset if args.infoentropy_whole_pieces else GPTDataset
    kind = ConversationDataset if args.infoentropy_conversations else kind
    builder = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else kind,
        num_samples,
        partial(_is_built_on_this_rank, vp_stage),
        _dataset_config(args),
    )
    return builder.build()


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron then calls it on all


class PieceDataset(GPTDataset):  # type: ignore[misc]
    """Sequences that are the documents themselves, all of `sequence_length`, in shuffled order."""

    def __init__(self, indexed_dataset: Any, dataset_path: str | None, *others: Any) -> None:
        config: GPTDatasetConfig = others[-1]
        lengths = indexed_dataset.sequence_lengths
        if lengths.min() != config.sequence_length or lengths.max() != config.sequence_length:
            raise ValueError(
                f"--infoentropy-whole-pieces: expected {dataset_path} to hold pieces of "
                f"{config.sequence_length} tokens (--seq-length), got {lengths.min()} to "
                f"{lengths.max()}; make them with `infoentropy pack`"
            )
        super().__init__(indexed_dataset, dataset_path, *others)


class Conversations:
    """The lines of a .jsonl file, {"messages": [{"role": ..., "content": ...}, ...]} each.

    Beside them there may be "tools", which the chat template is given too.

    They are all looked at once; what stays in memory is where each begins.

    Raises:
        ValueError: a line that is no conversation, or none that is one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        starts: list[int] = []
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._conversation(line, f"{path}, line {number}")
                    starts.append(file.tell() - len(line))
        if not starts:
            raise ValueError(f"{path} holds no conversation")
        self.starts = np.array(starts)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[list[dict[str, Any]], Any]:
        """Return the messages, and the tools that they may call."""
        with Path(self.path).open("rb") as file:
            file.seek(self.starts[index])
            return self._conversation(file.readline(), self.path)

    @staticmethod
    def _conversation(line: bytes, where: str) -> tuple[list[dict[str, Any]], Any]:
        try:
            content = json.loads(line)
            messages: list[dict[str, Any]] = content["messages"]
            roles, tools = [message["role"] for message in messages], content.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f'{where}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}, got '
                f"{line[:80]!r} ({type(error).__name__}: {error})"
            ) from error
        if "assistant" not in roles:
            raise ValueError(f"{where}: no message has the role assistant: nothing to learn there")
        if roles[0] == "assistant":
            raise ValueError(
                f"{where}: begins with the assistant, whose message answers nothing: put a message "
                "of the user or the system before it, or leave it out"
            )
        return messages, tools or None


class ConversationDataset(MegatronDataset):  # type: ignore[misc]
    """Sequences that are a conversation each, of which the assistant's messages alone are targets.

    The text is what the tokenizer's own chat template makes of the messages. A longer conversation
    is cut at its end, which the first one says, a shorter one filled up, without targets. Training
    takes another order in every epoch, validation that of the file.
    """

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self._told: set[str] = set()

    @staticmethod
    def build_low_level_dataset(path: str, _: GPTDatasetConfig) -> Conversations:
        return Conversations(path)

    @staticmethod
    def numel_low_level_dataset(conversations: Conversations) -> int:
        return len(conversations)

    def __len__(self) -> int:
        return self.num_samples or len(self.indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(int(index), len(self.indices))
        if self.index_split is Split.train:
            place = _order(self.config.random_seed, epoch, len(self.indices))[place]
        number = int(self.indices[place])
        chat_tokenizer = self.config.tokenizer._tokenizer.tokenizer  # Megatron's passes on no tools
        try:
            ids, is_target = conversation_tokens(chat_tokenizer, *self.dataset[number])
        except Exception as error:  # a chat template is a program
            where = f"{self.dataset_path}, conversation {number + 1}"
            raise ValueError(f"{where}: {error} ({type(error).__name__})") from error
        length = self.config.sequence_length
        if len(ids) > length + 1:
            self._tell_of_cut(number, len(ids), has_target=any(is_target[: length + 1]))
        missing = max(0, length + 1 - len(ids))
        text = torch.tensor(ids + [self.config.tokenizer.eod] * missing)
        mask = torch.tensor(is_target + [False] * missing, dtype=torch.float32)
        sample = {
            "tokens": text[:length].contiguous(),
            "labels": text[1 : length + 1].contiguous(),
            "loss_mask": mask[1 : length + 1].contiguous(),
            "position_ids": torch.arange(length),
        }
        if self.config.create_attention_mask:
            sample["attention_mask"] = torch.ones(1, length, length, dtype=torch.bool).triu(1)
        return sample

    def _tell_of_cut(self, number: int, tokens: int, *, has_target: bool) -> None:
        """Warn of the first conversation that is cut, and of the first that has no target left."""
        what = "cut" if has_target else "cut before anything that the assistant says"
        if what in self._told or not is_first_rank():
            return
        self._told.add(what)
        length = self.config.sequence_length
        say(
            f"WARNING: {self.dataset_path}, conversation {number + 1} has {tokens} tokens: it is "
            f"{what}, to the {length + 1} of --seq-length {length}, and so may be others"
        )


# It takes time in proportion to the dataset, and every sample asks; in a blend they take turns.
@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def conversation_tokens(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None
) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids, and which of them are the assistant's to say.

    An answer is what its message adds to the prompt that a chat would have given the model, the
    end of the turn included. What follows the last answer is left out. A token that would join the
    end of a prompt and the beginning of its answer is split there, as it is in a chat.

    tokenizer: transformers' own.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: put a chat_template.jinja into its folder"
        )

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids, is_target, text = list[int](), list[bool](), ""
    for count, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for is_answer in (False, True):
            before, text = (
                text,
                tokenizer.apply_chat_template(
                    messages[: count + is_answer],
                    tools=tools,
                    add_generation_prompt=not is_answer,
                    tokenize=False,
                ),
            )
            whole = encoded(text)
            more = whole[len(ids) :]
            if whole[: len(ids)] != ids:
                more = encoded(text.removeprefix(before))
            if not text.startswith(before) or (
                ids + more != whole and tokenizer.decode(ids + more) != tokenizer.decode(whole)
            ):
                raise ValueError(
                    f"message {count + 1} changes what is before it, so that a chat would have "
                    "been another: give conversations of one answer, or a chat template that only "
                    "adds"
                )
            ids += more
            is_target += [is_answer] * len(more)
    return ids, is_target


def _is_built_on_this_rank(vp_stage: int | None) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    args = get_args()
    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout(layout, args.pipeline_model_parallel_size)
    config = SimpleNamespace(
        pipeline_model_parallel_layout=layout, mtp_num_layers=args.mtp_num_layers
    )
    return is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(config, vp_stage)


# Arguments that the configuration of a dataset calls as the command line does.
_NAMED_ALIKE = (
    *("split", "multiple_validation_sets", "full_validation", "num_dataset_builder_threads"),
    *("mmap_bin_files", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("object_storage_cache_path", "mid_level_dataset_surplus", "allow_ambiguous_pad_tokens"),
    "context_parallel_size",
)


def _dataset_config(args: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    sequences = json.loads(Path(sequences).read_text(encoding="utf-8")) if sequences else None
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        sequences_per_dataset=sequences,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        add_extra_token_to_sequence=not args.infoentropy_whole_pieces,
        **{name: getattr(args, name) for name in _NAMED_ALIKE},
    )
