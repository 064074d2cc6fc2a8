"""Packed pieces, targets left out as the published code has them, and conversations."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_infoentropy.integration import batch
from megatron_infoentropy.integration.batch import (
    ConversationDataset,
    Conversations,
    PieceDataset,
    _leave_out,
)
from megatron_infoentropy.launch.train import SHOWN

PIECES = torch.arange(1, 8 * 6 + 1).view(6, 8)  # six pieces of eight different ids


def piece_dataset(folder, sequence_length):
    prefix = str(folder / "pieces")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for piece in PIECES:
        builder.add_document(piece, [len(piece)])
    builder.finalize(f"{prefix}.idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        split="1",
        tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=99, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
    )
    documents = np.arange(len(PIECES), dtype=np.int32)
    return PieceDataset(IndexedDataset(prefix), prefix, documents, 12, Split.train, config)


def test_every_sequence_is_one_piece_whose_last_token_has_no_target(tmp_path):
    dataset = piece_dataset(tmp_path, 8)
    samples = [dataset[i] for i in range(12)]
    for sample in samples:
        piece = PIECES[(sample["tokens"][0] - 1) // 8]
        assert sample["tokens"].tolist() == piece.tolist()
        assert sample["labels"][:-1].tolist() == piece[1:].tolist()
        assert sample["loss_mask"].tolist() == [1.0] * 7 + [0.0]
    seen = [int(sample["tokens"][0]) for sample in samples]
    assert sorted(seen) == sorted(PIECES[:, 0].tolist() * 2), "not two epochs"
    assert seen != PIECES[:, 0].tolist() * 2, "not shuffled"


def test_pieces_of_another_length_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"pieces to hold pieces of 4 tokens .* got 8 to 8; make"):
        piece_dataset(tmp_path, 4)


def test_a_target_is_left_out_where_there_are_targets():
    labels, mask = torch.tensor([[3, 0, 5]]), torch.tensor([[1.0, 1.0, 0.0]])
    batch = {"labels": labels, "loss_mask": mask}
    _leave_out(batch, 0)
    assert batch["loss_mask"].tolist() == [[1.0, 0.0, 0.0]]
    batch = {"labels": labels, "loss_mask": mask}
    _leave_out(batch, -1)
    assert batch["loss_mask"] is mask
    first_stage = {"labels": None, "loss_mask": None}
    _leave_out(first_stage, 0)
    assert first_stage["loss_mask"] is None


class Letters:
    """A tokenizer of a token a letter, and one for "aq"; a turn is its role's first letter, its
    text and a dot. Tools, if there are some, are named first.
    """

    chat_template = "a template"

    def apply_chat_template(self, messages, *, tools, add_generation_prompt, tokenize):
        assert not tokenize
        named = "".join(f"[{tool}]" for tool in tools or ())
        turns = "".join(f"{m['role'][0]}{m['content']}." for m in messages)
        return named + turns + "a" * add_generation_prompt

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [1 if x == "\1" else ord(x) for x in text.replace("aq", "\1")]}

    def decode(self, ids):
        return spelled(ids).replace("\1", "aq")


class Forgetful(Letters):
    """Drops earlier answers, as templates do with what a model thought."""

    def apply_chat_template(self, messages, **options):
        kept = [m for m in messages[:-1] if m["role"] != "assistant"] + messages[-1:]
        return super().apply_chat_template(kept, **options)


class Prefixed(Letters):
    """Begins every text with a blank, as some do: an answer by itself is another text then."""

    def __call__(self, text, *, add_special_tokens):
        return super().__call__(f" {text}", add_special_tokens=add_special_tokens)


def chat(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def conversations_of(folder, chats, split, tokenizer, length=16, **more):
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": each, **more}) + "\n\n" for each in chats))
    inner = SimpleNamespace(tokenizer=tokenizer)
    megatrons = SimpleNamespace(eod=0, vocab_size=256, unique_identifiers={}, _tokenizer=inner)
    config = GPTDatasetConfig(
        **{"random_seed": 1, "sequence_length": length, "split": "1", "tokenizer": megatrons},
        **dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False),
    )
    lines = ConversationDataset.build_low_level_dataset(str(path), config)
    indices = np.arange(ConversationDataset.numel_low_level_dataset(lines))
    return ConversationDataset(lines, str(path), indices, 3 * len(chats), split, config)


def spelled(ids):
    return "".join(chr(i) if i else "_" for i in map(int, ids))


@pytest.mark.parametrize(
    ("contents", "tokens", "targets"),
    [
        (("hi", "yo"), "uhi.ayo.________", "    yo.         "),
        (("hi", "yo", "so", "no", "bye"), "uhi.ayo.uso.ano.", "    yo.     no. "),
        (("hi", "a long answer"), "uhi.aa long answ", "    a long answe"),
        (("a long question", "yo"), "ua long question", "                "),
        (("hi", "qo", "so", "qay", "x"), "uhi.aqo.uso.aqay", "    qo.     qay."),
    ],
)
def test_only_what_the_assistant_says_has_targets(tmp_path, contents, tokens, targets):
    sample = conversations_of(tmp_path, [chat(*contents)], Split.valid, Letters())[0]
    assert spelled(sample["tokens"]) == tokens
    labels, mask = spelled(sample["labels"]), sample["loss_mask"].tolist()
    shown = "".join(x if m else " " for x, m in zip(labels, mask, strict=True))
    assert shown == targets
    assert labels[:-1] == tokens[1:]
    future = torch.ones(1, 16, 16, dtype=torch.bool).triu(1)
    assert torch.equal(sample["attention_mask"], future)
    assert sample["position_ids"].tolist() == list(range(16))


def test_tools_are_given_to_the_template(tmp_path):
    for tools in (["add"], '["add"]'):
        dataset = conversations_of(
            tmp_path, [chat("hi", "yo")], Split.valid, Letters(), tools=tools
        )
        assert spelled(dataset[0]["tokens"]) == "[add]uhi.ayo.___"


def test_the_first_conversation_that_is_cut_is_told_of(tmp_path, capsys):
    contents = ("yo", "just fits", "a long answer", "", "another long answer")
    chats = [*(chat("hi", each) for each in contents), chat("a long question", "yo")]
    dataset = conversations_of(tmp_path, chats, Split.valid, Letters(), length=14)
    for index in (*range(6), *range(6)):
        dataset[index]
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(", ")[2] for line in said] == [
        "conversation 3 has 19 tokens: it is cut, to the 15 of --seq-length 14, and so may be "
        "others",
        "conversation 6 has 21 tokens: it is cut before anything that the assistant says, to the "
        "15 of --seq-length 14, and so may be others",
    ]
    assert all(any(words in line for words in SHOWN) for line in said)


def test_training_takes_another_order_every_epoch_and_validation_that_of_the_file(tmp_path):
    chats = [chat(letter, "yes") for letter in "bcdefghi"]
    train, valid = (
        conversations_of(tmp_path, chats, split, Letters()) for split in (Split.train, Split.valid)
    )
    assert len(train) == len(valid) == 24
    seen, in_order = (
        "".join(spelled(each[i]["tokens"])[1] for i in range(24)) for each in (train, valid)
    )
    assert in_order == "bcdefghi" * 3
    epochs = [seen[:8], seen[8:16], seen[16:]]
    assert len(set(epochs)) == 3
    assert all("".join(sorted(epoch)) == "bcdefghi" for epoch in epochs)


def test_the_orders_of_blended_conversations_are_drawn_once(tmp_path):
    batch._order.cache_clear()
    blended = []
    for name, count in (("a", 3), ("b", 4)):
        (tmp_path / name).mkdir()
        chats = [chat("hi", "yo")] * count
        blended.append(conversations_of(tmp_path / name, chats, Split.train, Letters()))
    for index in range(3):
        for dataset in blended:
            dataset[index]
    assert batch._order.cache_info().misses == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no conversation"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: no message has the role assistant"),
        ('\n{"text": "hi"}\n', r"line 2: expected .* got b'{\"text\": \"hi\"}"),
        ("{\n", "line 1: expected"),
        ('{"messages": "hi"}\n', "line 1: expected"),
        ('{"messages": [{"role": "assistant"}]}\n', "line 1: begins with the assistant"),
    ],
)
def test_a_file_of_something_else_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Conversations(str(path))


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path):
    chats = [chat("hi", "yo"), chat("hi", "yo", "so", "no")]
    dataset = conversations_of(tmp_path, chats, Split.valid, Forgetful())
    assert spelled(dataset[0]["tokens"]).startswith("uhi.ayo.")
    with pytest.raises(ValueError, match="conversation 2: message 4 changes what is before it"):
        dataset[1]
    dataset = conversations_of(tmp_path, [chat("hi", "qo")], Split.valid, Prefixed())
    with pytest.raises(ValueError, match="conversation 1: message 2 changes what is before it"):
        dataset[0]
    Prefixed.chat_template = None
    with pytest.raises(ValueError, match=r"conversation 1: .* put a chat_template.jinja into its"):
        dataset[0]
