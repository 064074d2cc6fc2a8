"""Ids are those of transformers and Megatron, whichever file of a tokenizer folder says so."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
from text_files import line, write
from tokenizer_kinds import KINDS, write_tokenizer
from tokenizers import Tokenizer

from megatron_infoentropy.data import tokenizer as module
from megatron_infoentropy.data.manifest import DataOptions, load_manifest
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import hf_engine, load_tokenizer

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
        ids, lengths = hf_engine(loaded, special_tokens=special)(TEXTS)
        assert lengths.tolist() == [len(text) for text in expected]
        assert ids.tolist() == [token for text in expected for token in text]
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
def test_the_manifest_says_which_ids_begin_every_document(tmp_path, special_tokens, start_ids):
    folder = write_tokenizer(tmp_path / "tokenizer", "Llama 2")
    text = write(tmp_path / "a.jsonl", [line("cat")])
    options = DataOptions(split_by=None, special_tokens=special_tokens)
    made = preprocess([text], folder, tmp_path / "out", options=options)
    assert made.tokenizer.start_ids == start_ids
    assert load_manifest(tmp_path / "out") == made


def changed(folder: Path, name: str, **change: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | change))


def test_ids_that_are_drawn_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", "no class")
    model = json.loads((folder / "tokenizer.json").read_text())["model"] | {"dropout": 0.1}
    changed(folder, "tokenizer.json", model=model)
    with pytest.raises(ValueError, match=r"tokenizer\.json draws ids at random"):
        load_tokenizer(folder)
    changed(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")  # leaves it out
    assert load_tokenizer(folder).tokenizer.model.dropout is None


def test_a_class_that_changes_texts_by_itself_is_refused(tmp_path, monkeypatch):
    folder = write_tokenizer(tmp_path / "tokenizer", "no class")
    load = module.load_with_transformers

    def lower_case(folder: Path) -> Any:
        used = load(folder)
        used.__class__ = type("Lower", (type(used),), {
            "_encode_plus": lambda self, text, **how: super(type(self), self)._encode_plus(
                text.lower(), **how
            )
        })  # fmt: skip
        return used

    monkeypatch.setattr(module, "load_with_transformers", lower_case)
    with pytest.raises(ValueError, match="Lower gives other ids than its own fast tokenizer"):
        load_tokenizer(folder)


def test_a_folder_without_an_end_token_is_asked_for_one(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer", "no class")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json must name an eos_token.*it names None"):
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
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, name, content, said):
    folder = write_tokenizer(tmp_path / "tokenizer", "no class")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(folder)
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("tokenizer.json", {"model": None}, "of a newer version of tokenizers"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "New"}}, "of a newer version of tokenizers"),
        ("tokenizer_config.json", {"eos_token": 3}, ""),
        ("tokenizer_config.json", {"eos_token": {"a": "b"}}, ""),
    ],
)
def test_a_file_of_no_known_format_is_named(tmp_path, name, change, said):
    folder = write_tokenizer(tmp_path / "tokenizer", "no class")
    changed(folder, name, **change)
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(folder)
    assert str(folder / name) in str(error.value)


def test_a_tokenizer_without_fast_rules_is_refused(tmp_path, monkeypatch):
    import transformers

    folder = write_tokenizer(tmp_path / "tokenizer", "no class")
    slow = type("Slow", (), {})
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *words, **options: slow()
    )
    with pytest.raises(ValueError, match=r"has only a slow tokenizer for .*, a Slow"):
        load_tokenizer(folder)


def test_a_worker_imports_no_transformers(tmp_path):
    """It would cost every worker a second and 200 MB."""
    loaded = tmp_path / "loaded"
    loaded.write_bytes(pickle.dumps(load_tokenizer(write_tokenizer(tmp_path / "t", "Llama 2"))))
    program = f"""
import pickle, sys
from pathlib import Path
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.workers import Encoder, WorkerSettings
loaded = pickle.loads(Path({str(loaded)!r}).read_bytes())
encoder = Encoder(WorkerSettings(loaded, DataOptions(split_by=None), "hf"))
assert encoder(b'{{"text": "a cat"}}\\n').parts["all"].tokens.size
heavy = {{"torch", "transformers", "megatron"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_transformers_is_asked_only_where_it_may_change_ids(tmp_path):
    """It takes seconds to import, and torch with it."""
    folders = {kind: str(write_tokenizer(tmp_path / kind, kind)) for kind in KINDS}
    program = f"""
import sys
from pathlib import Path
from megatron_infoentropy.data import preprocess, tokenizer
def ask(folder):
    raise KeyError
tokenizer.load_with_transformers = ask
for kind, folder in {folders!r}.items():
    try:
        tokenizer.load_tokenizer(Path(folder))
        print(kind)
    except KeyError:
        pass
heavy = {{"torch", "transformers", "megatron"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
    assert done.stdout.decode().splitlines() == [
        *("Llama 2, generic class", "rules for added tokens", "saved by version 4"),
    ]
