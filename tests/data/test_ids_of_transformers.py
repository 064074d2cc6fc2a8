"""Ids are those of transformers and Megatron, whichever file of a tokenizer folder says so."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
from text_files import assert_ids, line, write
from tokenizer_kinds import KINDS, write_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_infoentropy.data import tokenizer as module
from megatron_infoentropy.data.manifest import DataOptions, load_manifest
from megatron_infoentropy.data.tokenizer import hf_engine, load_tokenizer, tokenizer_digest

TEXTS = [
    "",
    "cat",
    " cat",
    "  cat",
    "\ncat",
    "the cat sat 1234 on   the mat.\n\nIt's IT'S <mask>  x. </s> the <s>mat sat</s>  \n",
    "gr\u00fc\u00df dich, \u4f60\u597d, e\u0301, \ua7cf, <end> <unk>",
]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_megatrons_tokenizer(tmp_path, kind):
    folder = write_tokenizer(tmp_path / "tokenizer", kind)
    loaded = pickle.loads(pickle.dumps(load_tokenizer(folder)))  # as a worker has it
    megatron = HuggingFaceTokenizer(str(folder))
    for special in (True, False):
        expected = [
            megatron.tokenizer(text, add_special_tokens=special).input_ids for text in TEXTS
        ]
        assert not special or expected == [megatron.text_to_ids(text) for text in TEXTS]
        assert_ids(hf_engine(loaded, special_tokens=special)(TEXTS), expected)
    assert (loaded.vocab_size, loaded.eod_id) == (megatron.vocab_size, megatron.eod)


def test_the_kinds_are_such_that_tokenizer_json_alone_would_not_do(tmp_path):
    """Else the test above would say nothing."""
    same = []
    for number, kind in enumerate(KINDS):
        folder = write_tokenizer(tmp_path / str(number), kind)
        plain, megatron = Tokenizer.from_file(str(folder / "tokenizer.json")), HuggingFaceTokenizer
        ids = [plain.encode(text).ids for text in TEXTS]
        if ids == [megatron(str(folder)).text_to_ids(text) for text in TEXTS]:
            same.append(kind)
    assert same == [
        *("no class", "GPT-2's class", "a start token asked for", "Llama 2, generic class"),
        *("rules for added tokens", "saved by version 4", "the end token elsewhere"),
        "a separator for an end token",
    ]


@pytest.mark.parametrize(("special_tokens", "start_ids"), [(True, (1,)), (False, ())])
def test_the_manifest_says_which_ids_begin_every_document(
    prepare, tmp_path, special_tokens, start_ids
):
    folder = write_tokenizer(tmp_path / "tokenizer", "Llama 2")
    text = write(tmp_path / "a.jsonl", [line("cat")])
    made = prepare(text, tokenizer=folder, options=DataOptions(special_tokens=special_tokens))
    assert made.tokenizer.start_ids == start_ids
    assert load_manifest(tmp_path / "out") == made


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer", "no class")


def changed(path: Path, **change: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | change, indent=7))


def test_ids_that_are_drawn_are_refused(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"] | {"dropout": 0.1}
    changed(folder / "tokenizer.json", model=model)
    with pytest.raises(ValueError, match=r"tokenizer\.json draws ids at random"):
        load_tokenizer(folder)
    changed(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")  # leaves it out
    assert load_tokenizer(folder).tokenizer.model.dropout is None


def test_a_class_that_changes_texts_by_itself_is_refused(folder, monkeypatch):
    used = module.load_with_transformers(folder)

    def lower_case(self: Any, text: str, **how: Any) -> Any:
        return super(type(self), self)._encode_plus(text.lower(), **how)

    used.__class__ = type("Lower", (type(used),), {"_encode_plus": lower_case})
    monkeypatch.setattr(module, "load_with_transformers", lambda _: used)
    with pytest.raises(ValueError, match="Lower gives other ids than its own fast tokenizer"):
        load_tokenizer(folder)


def test_a_tokenizer_without_fast_rules_is_refused(folder, monkeypatch):
    slow = type("Slow", (), {})()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **options: slow)
    with pytest.raises(ValueError, match=r"has only a slow tokenizer for .*, a Slow"):
        load_tokenizer(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", LFS, "is a Git LFS pointer .*: fetch it with `git lfs pull`"),
        ("special_tokens_map.json", b"", "is empty: copy or download it again"),
        ("config.json", b'{"model": {', "is no JSON in UTF-8 .*: copy or download it again"),
        ("tokenizer.json", b"\xff\xfe\x00", "begins with a byte order mark"),
        ("tokenizer_config.json", b"\xef\xbb\xbf{}", "a byte order mark.*: save it as UTF-8"),
        ("tokenizer_config.json", b'{"eos_token": "\xff"}', "is no JSON in UTF-8"),
        ("config.json", b"[]", "expected a JSON object in"),
        ("tokenizer_config.json", b"{}", "must name an eos_token.*it names None"),
        ("tokenizer.json", {"model": None}, "of a newer version of tokenizers"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "New"}}, "of a newer version of tokenizers"),
        ("tokenizer_config.json", {"eos_token": 3}, ""),
        ("tokenizer_config.json", {"eos_token": {"a": "b"}}, ""),
    ],
)
def test_a_file_that_can_not_be_used_is_named_with_what_to_do(folder, name, content, said):
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        changed(folder / name, **content)
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(folder)
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "is_another"),
    [
        ("tokenizer_config.json", {"eos_token": "a"}, True),
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}, True),
        ("tokenizer_config.json", {"add_prefix_space": True}, True),
        ("tokenizer_config.json", {"split_special_tokens": True}, True),
        ("tokenizer_config.json", {"a setting that nobody knows": 1}, True),
        ("special_tokens_map.json", {"bos_token": "<s>"}, True),
        ("added_tokens.json", {"<s>": 600}, True),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}, True),
        ("tokenizer.json", {"truncation": {"max_length": 4}}, False),
        ("tokenizer_config.json", {"chat_template": "x", "model_max_length": 9}, False),
        ("tokenizer_config.json", {"pad_token": None, "is_local": True}, False),
        # As transformers 5 calls the generic class.
        ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"}, False),
        ("chat_template.jinja", {}, False),
        ("config.json", {"model_type": "llama"}, False),
    ],
)
def test_the_digest_changes_with_the_ids_and_with_nothing_else(folder, name, change, is_another):
    before = tokenizer_digest(folder)
    changed(folder / name, **change)
    assert (tokenizer_digest(folder) != before) == is_another


def test_the_digest_is_of_the_files_that_transformers_reads(folder):
    """It reads these two only for want of the first setting, and others if the second says so."""
    decoder = {"0": {"content": "<|endoftext|>"}}
    changed(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    before = tokenizer_digest(folder)
    changed(folder / "special_tokens_map.json", bos_token="<s>")
    changed(folder / "added_tokens.json", **{"<s>": 600})
    assert tokenizer_digest(folder) == before
    changed(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])
    shutil.copy(folder / "tokenizer.json", folder / "tokenizer.4.0.0.json")
    before = tokenizer_digest(folder)
    changed(folder / "tokenizer.4.0.0.json", a=1)
    assert tokenizer_digest(folder) != before


def printed(program: str, *words: object) -> list[str]:
    """The lines that a program prints that may import none of these."""
    heavy = {"torch", "transformers", "megatron"}
    program += f"\nassert not set(sys.modules) & {heavy}\n"
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def test_a_worker_imports_no_transformers(tmp_path):
    """It would cost every worker a second and 200 MB."""
    loaded = tmp_path / "loaded"
    loaded.write_bytes(pickle.dumps(load_tokenizer(write_tokenizer(tmp_path / "t", "Llama 2"))))
    program = """
import pickle, sys
from pathlib import Path
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.workers import Encoder, WorkerSettings
loaded = pickle.loads(Path(sys.argv[1]).read_bytes())
encoder = Encoder(WorkerSettings(loaded, DataOptions(split_by=None), "hf"))
print(encoder(b'{"text": "a cat"}\\n').parts["all"].tokens.size > 0)
"""
    assert printed(program, loaded) == ["True"]


def test_transformers_is_asked_only_where_it_may_change_ids(tmp_path):
    """It takes seconds to import, and torch with it."""
    program = """
import sys
from contextlib import suppress
from pathlib import Path
from megatron_infoentropy.data import preprocess, tokenizer
def ask(folder):
    raise KeyError
tokenizer.load_with_transformers = ask
for folder in map(Path, sys.argv[1:]):
    with suppress(KeyError):
        tokenizer.load_tokenizer(folder)
        print(folder.name)
"""
    folders = [write_tokenizer(tmp_path / kind, kind) for kind in KINDS]
    assert printed(program, *folders) == [
        *("Llama 2, generic class", "rules for added tokens", "saved by version 4"),
        "texts cut short",
    ]
