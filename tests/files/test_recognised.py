"""What `overwrite` replaces: outputs, by their marks. Whatever else lies there is named, and stays."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from hashlib import sha1, sha256
from pathlib import Path

import pytest

from spp.errors import OutputError, OutputExistsError
from spp.files import atomic_directory, atomic_file, check_target, recognised, require_replaceable

CONFIG = '{"model_type": "llama"}'
CHECKPOINT = {"config.json": CONFIG, "model.safetensors": "w"}
ADAPTER = {"adapter_config.json": '{"peft_type": "SPP"}', "adapter_model.safetensors": "w"}
RUN = {
    "config.json": '{"format": "spp-tune-1"}',
    "log.jsonl": "",
    "eval.json": "{}",
    "checkpoints/checkpoint-20/trainer_state.json": '{"log_history": []}',
    "checkpoints/checkpoint-20/masks.safetensors": "",
    **{f"adapter/{name}": text for name, text in ADAPTER.items()},
    **{f"base/{name}": text for name, text in CHECKPOINT.items()},
}
RESULTS = '{"format_version": 1, "conditions": {}, "rows": {}, "baselines": {}, "costs": {}}'
CERTIFICATE = '{"format_version": 1, "tensors": {}, "totals": {}}'
OUTPUTS: dict[str, Mapping[str, str]] = {
    "empty": {},
    "checkpoint": CHECKPOINT,
    "shards": {
        "model.safetensors.index.json": '{"weight_map": {"a": "part-a.safetensors"}}',
        "part-a.safetensors": "w",
    },
    "pickled": {"pytorch_model-00001-of-00002.bin": "w", "pytorch_model-00002-of-00002.bin": "w"},
    "certified weights": {"model.safetensors": "w", "sparsity.json": CERTIFICATE},
    "packed": {"config.json": '{"architectures": [], "quantization_config": {"quant_method": "spp"}}'},
    "adapter": ADAPTER,
    "authors' adapter": {"adapter_config.json": '{"lora_alpha": 16, "r": 8}', "adapter_model.bin": "w"},
    "adapter of a method unheard of": {"adapter_config.json": '{"a": 1}', "adapter_model.safetensors": "w"},
    "run": RUN,
    "comparison": {"results.json": RESULTS, "results.md": "", ".lock": "", f".claims/{'0' * 32}": ""},
    "pruning": {"progress.json": '{"job": {}, "blocks": {}}', "model-00002-of-00003.safetensors": "w"},
    "checkpoint-20": {"trainer_state.json": '{"log_history": []}', "optimizer.pt": "", "named/adapter_config.json": ""},
}
BESIDE_A_MODEL = """
generation_config.json chat_template.jinja additional_chat_templates/rag.jinja chat_template.json tokenizer.json
tokenizer_config.json tokenizer.model tokenizer.model.v3 spiece.model sentencepiece.bpe.model
special_tokens_map.json added_tokens.json vocab.json qwen.tiktoken tekken.json
preprocessor_config.json processor_config.json video_preprocessor_config.json
.cache/huggingface/download/x.metadata checkpoint-20/optimizer.pt checkpoint-20/scheduler.pt
checkpoint-20/rng_state.pth checkpoint-20/rng_state_0.pth checkpoint-20/training_args.bin
checkpoint-20/spp_complete.json checkpoint-20/masks.json optimizer.pt trainer_state.json
runs/Jan01/events.out.tfevents.1 pytorch_model.bin.index.json model.fp16.safetensors
model-00001-of-00002.safetensors sparsity.json adapter_config.json adapter_model.bin
__pycache__/modeling_x.cpython-311.pyc .DS_Store .config.json.spp-tmp-0123ab
.adapter_model.safetensors.spp-tmp-0123ab/adapter_config.json
"""
FOREIGN = """
notes.txt train.jsonl data/train.jsonl main.py modeling_x.py model.gguf my-model.safetensors results.csv .env
.gitignore original/thesis.txt original/params.json original/README.md README.md LICENSE LICENSE.txt NOTICE
NOTICE.txt USE_POLICY.md .gitattributes vocab.txt dict.txt merges.txt bpe.codes latest zero_to_fp32.py
checkpoint-20/README.md checkpoint-20/plots/README.md checkpoint-20/plots/a.svg checkpoint-20/LICENSE
checkpoint-20/notes.txt checkpoint-20/data/train.jsonl
additional_chat_templates/notes.txt .cache/mine model.bin.bak merged/config.json word2vec.model results.json
log.jsonl __pycache__/notes.txt Makefile LICENSED-DATA.jsonl runs/notes.txt best-model.safetensors
"""


def make(folder: Path, files: Mapping[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def state(folder: Path) -> dict[str, str | None]:
    """Everything below a folder: the text of files, where links lead, None for folders."""
    found: dict[str, str | None] = {}
    for path in sorted(folder.rglob("*")):
        text = f"-> {os.readlink(path)}" if path.is_symlink() else path.read_text() if path.is_file() else None
        found[path.relative_to(folder).as_posix()] = text
    return found


def refuses(folder: Path, *words: str, kind: type[OutputError] = OutputExistsError) -> str:
    """Replace a folder; it is refused before any work, with these words, and nothing changes. Returns the message."""
    before = state(folder.parent)
    for attempt in (
        lambda: check_target(folder, overwrite=True),
        lambda: atomic_directory(folder, overwrite=True).__enter__(),
    ):
        with pytest.raises(kind) as caught:
            attempt()
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert state(folder.parent) == before
    return str(caught.value)


def replace(folder: Path, files: Mapping[str, str] = CHECKPOINT, **options: object) -> None:
    with atomic_directory(folder, overwrite=True, **options) as new:  # type: ignore[arg-type]
        make(new, files)


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_replaced(tmp_path: Path, name: str) -> None:
    replace(make(tmp_path / "out", OUTPUTS[name]))
    assert state(tmp_path) == {"out": None, **{f"out/{name}": text for name, text in CHECKPOINT.items()}}


@pytest.mark.parametrize("foreign", ["notes.txt", "data/train.jsonl", "train.jsonl"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_foreign_in_an_output_is_named(tmp_path: Path, name: str, foreign: str) -> None:
    refuses(make(tmp_path / "out", {**OUTPUTS[name], foreign: "mine"}), foreign)


@pytest.mark.parametrize("name", BESIDE_A_MODEL.split())
def test_what_libraries_write_beside_a_model_is_not_foreign(tmp_path: Path, name: str) -> None:
    replace(make(tmp_path / "one", {**CHECKPOINT, name: "theirs"} | {"config.json": CONFIG}))
    refuses(make(tmp_path / "other", {name: "mine", "z/y": "mine"}), "z/y" if name == ".DS_Store" else name)


@pytest.mark.parametrize("foreign", FOREIGN.split())
def test_what_nobody_but_the_user_writes_is(tmp_path: Path, foreign: str) -> None:
    for output in (CHECKPOINT, ADAPTER):
        refuses(make(tmp_path / "out", {**output, foreign: "mine"}), foreign)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"train.jsonl": "mine"}, "train.jsonl"),  # public report: --overwrite onto a folder that is no output
        ({"thesis.txt": "mine"}, "thesis.txt"),
        ({"main.py": "mine"}, "main.py"),
        ({"config.json": '{"port": 8080}'}, "config.json"),
        ({"config.json": "[1]"}, "config.json"),
        ({"config.json": "not JSON"}, "config.json"),
        ({"adapter_config.json": "{}"}, "adapter_config.json"),
        ({"adapter_model.safetensors": "w"}, "adapter_model.safetensors"),
        ({"model.safetensors": "w"}, "model.safetensors"),
        ({"progress.json": '{"job": 1, "blocks": {}}'}, "progress.json"),
        ({"results.json": '{"rows": [1]}'}, "results.json"),
        ({"sparsity.json": '{"layer": 0.5}'}, "sparsity.json"),
        ({"a": "1", "b": "2", "c": "3", "d": "4"}, "a, b, c, …"),
        ({"deep/er/train.jsonl": "mine"}, "deep/er/train.jsonl"),
        ({"config.json": CONFIG, "train.jsonl": "mine"}, "is a checkpoint, but also holds train.jsonl"),
    ],
)
def test_a_folder_without_marks_is_no_output(tmp_path: Path, files: dict[str, str], named: str) -> None:
    said = refuses(make(tmp_path / "data", files), named, str(tmp_path / "data"), "choose another path")
    assert ("is no checkpoint" in said) != ("but also holds" in said)


def test_an_empty_folder_that_is_foreign_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "home" / "project").mkdir(parents=True)
    refuses(tmp_path / "home", "project/")
    make(tmp_path / "home", CHECKPOINT)
    refuses(tmp_path / "home", "project/")


def test_code_is_known_by_nobody_s_naming_it(tmp_path: Path) -> None:
    config = json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "config_x.C"}})
    files = {"config.json": config, "config_x.py": "class C: ..."}
    out, base = make(tmp_path / "out", files), make(tmp_path / "base", files)
    refuses(out, "config_x.py")  # public report: --overwrite deletes files of a recognised name that a user wrote
    require_replaceable(out, [base])
    make(base, {"config_x.py": "class C: pass"})
    with pytest.raises(OutputExistsError, match=r"config_x\.py"):
        require_replaceable(out, [base])


@pytest.mark.parametrize(
    ("name", "beside", "other"),
    [
        ("merges.txt", {"vocab.json": "{}"}, {"tokenizer.json": "{}"}),
        ("vocab.bpe", {"encoder.json": "{}"}, {"tokenizer.json": "{}"}),
        ("vocab.txt", {"tokenizer_config.json": '{"tokenizer_class": "BertTokenizerFast"}'}, {"vocab.json": "{}"}),
        ("dict.txt", {"tokenizer_config.json": '{"tokenizer_class": "BartphoTokenizer"}'}, {"vocab.json": "{}"}),
        (
            "vocab.txt",
            {"tokenizer_config.json": '{"tokenizer_class": "EsmTokenizer"}'},
            {"tokenizer_config.json": "{}"},
        ),
        (
            "bpe.codes",
            {"tokenizer_config.json": '{"tokenizer_class": "PhobertTokenizer"}'},
            {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizerFast"}'},
        ),
        ("latest", {"global_step20/mp_rank_00_model_states.pt": ""}, {"trainer_state.json": "{}"}),
        ("zero_to_fp32.py", {"global_step20/mp_rank_00_model_states.pt": ""}, {"trainer_state.json": "{}"}),
    ],
)
def test_a_text_is_known_by_what_stands_beside_it(
    tmp_path: Path, name: str, beside: dict[str, str], other: dict[str, str]
) -> None:
    step = "checkpoint-20/" if "global_step20/mp_rank_00_model_states.pt" in beside else ""
    text = {f"{step}{name}": "text"}
    replace(make(tmp_path / "out", {**CHECKPOINT, **text, **{f"{step}{n}": t for n, t in beside.items()}}))
    refuses(make(tmp_path / "other", {**CHECKPOINT, **text, **{f"{step}{n}": t for n, t in other.items()}}), name)


BY_PEFT = (
    "---\nbase_model: base\nlibrary_name: peft\ntags:\n- lora\n---\n\n# Model Card for Model ID\n\n"
    + "\n\n".join(
        [
            "<!-- Provide a quick summary of what the model is/does. -->",
            *[f"## Part {i} [optional]\n\n- **About it:** [More Information Needed]" for i in range(40)],
            "### Framework versions\n\n- PEFT 0.21.2",
        ]
    )
)
BY_TRAINER = """---
library_name: transformers
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# out

## Model description

More information needed

## Intended uses & limitations

More information needed

## Training and evaluation data

More information needed
"""


@pytest.mark.parametrize("folder", ["", "checkpoint-20/", "checkpoint-20/named/"])
def test_a_generated_card_is_known_until_somebody_writes_into_it(tmp_path: Path, folder: str) -> None:
    files = {**CHECKPOINT, "checkpoint-20/named/adapter_config.json": ""}
    out = make(tmp_path / "out", files)
    for card in (BY_PEFT, BY_TRAINER):
        make(out, {f"{folder}README.md": card})
        require_replaceable(out)
    for edited in (
        "",
        "mine",
        BY_PEFT + "\n\nIt scores 61.2 on our own test.",
        BY_PEFT.replace("[More Information Needed]", "me", 1),
        BY_PEFT.replace("Model ID", "our best model"),
        BY_PEFT.replace("tags:", "license: mit\ntags:"),
        "\n".join(["# Model Card for Model ID", "[More Information Needed]"]),
        BY_TRAINER.replace("More information needed", "It is ours.", 1),
        BY_TRAINER[BY_TRAINER.index("# out") :],
    ):
        make(out, {f"{folder}README.md": edited})
        refuses(out, f"{folder}README.md")
    (out / f"{folder}README.md").write_bytes(b"\xff\xfe not UTF-8")
    refuses_named(out, "README.md")


def test_the_card_that_peft_writes(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(**sizes, vocab_size=16, _name_or_path="base")
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "out")
    card = tmp_path / "out/README.md"
    require_replaceable(tmp_path / "out")
    card.write_text(card.read_text() + "\nA sentence of mine.\n")
    refuses_named(tmp_path / "out", "README.md")


# public report: any subfolder of checkpoint-N that holds only a README.md goes
@pytest.mark.parametrize("files", [{"README.md": BY_PEFT}, {"README.md": "mine"}, {"notes.txt": "mine"}, {}])
def test_an_adapter_s_subfolder_holds_an_adapter(tmp_path: Path, files: dict[str, str]) -> None:
    out = make(tmp_path / "out", {**CHECKPOINT, "checkpoint-20/optimizer.pt": ""})
    (out / "checkpoint-20/named").mkdir()
    make(out / "checkpoint-20/named", files)
    refuses(out, *(f"checkpoint-20/named/{name}" for name in files or [""]))


def test_a_download_of_the_hub_is_known_until_it_is_changed(tmp_path: Path) -> None:
    """By its hash, as large files have it and as git has that of small ones: times tell nothing where clocks jump."""
    hashes = {"a.gguf": sha256(b"theirs").hexdigest(), "onnx/b.onnx": sha1(b"blob 6\0theirs").hexdigest()}
    notes = {f".cache/huggingface/download/{name}.metadata": f"c\n{told}\n9e9\n" for name, told in hashes.items()}
    out = make(tmp_path / "out", {**CHECKPOINT, **notes, "a.gguf": "theirs", "onnx/b.onnx": "theirs"})
    require_replaceable(out)
    make(out, {"a.gguf": "mine", "onnx/b.onnx": "mine"})  # long before the download, if one believes its time
    refuses(out, "a.gguf", "onnx/b.onnx")
    make(out, {"a.gguf": "theirs"})
    os.utime(out / "a.gguf", (2**33, 2**33))
    make(out, {".cache/huggingface/download/onnx/b.onnx.metadata": "broken"})
    refuses(out, "onnx/b.onnx")


def test_what_is_copied_along_is_not_lost(tmp_path: Path) -> None:
    extra = {"notes.txt": "the same", "figures/a.svg": "the same", "figures/b/c.csv": "x" * 3_000_000}
    base = make(tmp_path / "base", {**CHECKPOINT, **extra})
    out = make(tmp_path / "out", {**CHECKPOINT, **extra})
    refuses(out, "notes.txt", "figures/a.svg")
    replace(out, {**CHECKPOINT, **extra}, copies=[base])
    assert state(out) == state(base)
    replace(out, CHECKPOINT, copies=[base])  # it is where it came from
    make(out, {**extra, "figures/b/c.csv": "x" * 2_999_999 + "y"})
    with pytest.raises(OutputExistsError, match=r"holds figures/b/c\.csv, which"):
        replace(out, {**CHECKPOINT, **extra}, copies=[base])
    make(out, extra)
    (out / "figures/d").mkdir()
    with pytest.raises(OutputExistsError, match="holds figures/d/, which"):
        replace(out, {**CHECKPOINT, **extra}, copies=[base])


def test_a_copy_that_would_go_too_is_none(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {**CHECKPOINT, "notes.txt": "mine"})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "notes.txt").symlink_to(out / "notes.txt")
    for copies in (out, tmp_path / "base"):
        with pytest.raises(OutputExistsError, match=r"notes\.txt"):
            replace(out, copies=[copies])
    assert (out / "notes.txt").read_text() == "mine"


def test_what_comes_while_the_work_is_done_is_not_lost(tmp_path: Path, both_ways: None) -> None:
    out = make(tmp_path / "out", CHECKPOINT)
    with pytest.raises(OutputExistsError, match=r"late\.txt"), atomic_directory(out, overwrite=True) as new:
        make(new, CHECKPOINT | {"fine.txt": "the same"})
        make(out, {"late.txt": "mine", "fine.txt": "the same"})
    assert state(tmp_path) == {"out": None, **{f"out/{name}": text for name, text in state(out).items()}}
    assert (out / "late.txt").read_text() == "mine"
    shutil.rmtree(out)
    make(out, CHECKPOINT)
    with atomic_directory(out, overwrite=True) as new:
        make(new, CHECKPOINT | {"fine.txt": "the same"})
        make(out, {"fine.txt": "the same"})
    shutil.rmtree(out)
    make(out, CHECKPOINT)
    for folder, text in ((tmp_path / "new", "mine"), (out, "also mine")):
        with pytest.raises(OutputExistsError), atomic_directory(folder, overwrite=True):
            make(folder, {"train.jsonl": text})
        assert (folder / "train.jsonl").read_text() == text


@pytest.fixture(params=["exchange", "aside"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "aside":
        monkeypatch.setattr("spp.files.atomic._exchange", lambda one, other: False)


def test_a_link_stays_and_what_it_leads_to_is_judged(tmp_path: Path) -> None:
    data = make(tmp_path / "data", {"train.jsonl": "mine"})
    (tmp_path / "link").symlink_to(data)
    refuses(tmp_path / "link", "data holds train.jsonl")
    (data / "train.jsonl").unlink()
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and state(data) == dict(sorted(CHECKPOINT.items()))


def test_links_inside_an_output(tmp_path: Path) -> None:
    data = make(tmp_path / "data", {"train.jsonl": "mine", "weights": "mine"})
    out = make(tmp_path / "out", {"config.json": CONFIG})
    (out / "model.safetensors").symlink_to(data / "weights")  # as in the hub's cache: the link goes, not what it is to
    replace(out)
    for name, leads_to in (
        ("original", data),
        ("data", data),
        ("notes.txt", data / "train.jsonl"),
        ("gone", "nowhere"),
    ):
        (out / name).symlink_to(leads_to)
        refuses(out, name)
        (out / name).unlink()
    assert sorted(os.listdir(data)) == ["train.jsonl", "weights"]


def test_links_in_a_circle_and_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for make_one in (atomic_directory, atomic_file):
        with pytest.raises(OutputError, match="go round in a circle"), make_one(tmp_path / "a", overwrite=True):
            pass
    out = make(tmp_path / "out", CHECKPOINT)
    (out / "circle").symlink_to("circle")
    refuses(out, "circle")
    (tmp_path / "broken").symlink_to("there")
    replace(tmp_path / "broken")
    assert (tmp_path / "broken").is_symlink() and (tmp_path / "there/config.json").exists()


def test_what_is_no_file_is_foreign_whatever_its_name(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"config.json": CONFIG})
    os.mkfifo(out / "model.safetensors")
    refuses_named(out, "model.safetensors")
    (out / "model.safetensors").unlink()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(out / "tokenizer.json"))
    refuses_named(out, "tokenizer.json")
    (out / "tokenizer.json").unlink()
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")  # no mark: whoever reads it waits
    refuses_named(out, "config.json")
    for special in ("/dev/null", out / "config.json"):
        with pytest.raises(OutputExistsError, match="no regular file"), atomic_file(special, overwrite=True):
            pass


def refuses_named(folder: Path, name: str) -> None:
    with pytest.raises(OutputExistsError, match=f"holds .*{name}"):
        require_replaceable(folder)


def test_what_cannot_be_read_or_emptied_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out", {**CHECKPOINT, "checkpoint-1/optimizer.pt": "theirs"})
    real_scan, real_access = os.scandir, os.access

    def scan(path: str | Path) -> object:
        if str(path).rstrip("/").endswith("checkpoint-1"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scan(path)

    monkeypatch.setattr("spp.files.recognised.os.scandir", scan)
    refuses_locked(out, "checkpoint-1/ cannot be read")
    monkeypatch.setattr("spp.files.recognised.os.scandir", real_scan)
    monkeypatch.setattr("os.access", lambda path, mode: "checkpoint-1" not in str(path) and real_access(path, mode))
    refuses_locked(out, "permission is denied")
    monkeypatch.setattr("os.access", real_access)
    replace(out)


def refuses_locked(folder: Path, words: str) -> None:
    with pytest.raises(OutputError, match=words), atomic_directory(folder, overwrite=True):
        pytest.fail("the block must not run")
    assert (folder / "checkpoint-1/optimizer.pt").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("two\nlines.txt", r"'two\nlines.txt'"),
        ("a" * 240, f"'{'a' * 40}…{'a' * 20}'"),
        ("seed=0 dtype=None", "'seed=0 dtype=None'"),
        ("ünï.txt", "ünï.txt"),
        ("\udce4.txt", r"'\udce4.txt'"),
        ("\x1b[31m", r"'\x1b[31m'"),
    ],
)
def test_names_are_shown_on_one_line(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    with pytest.raises(OutputExistsError) as caught:
        require_replaceable(tmp_path / "out")
    assert f"holds {said} and" in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_names_of_a_message_are_no_options(tmp_path: Path) -> None:
    from spp.cli.spelling import spoken

    make(tmp_path / "out", {"seed=0": "mine"})
    with pytest.raises(OutputExistsError) as caught:
        require_replaceable(tmp_path / "out")
    assert "holds 'seed=0' and" in spoken(caught.value, {})


def test_very_many_files_are_told_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out", CHECKPOINT)
    for number in range(2000):
        (out / f"model-{number:05d}-of-02000.safetensors").touch()
    opened: list[Path] = []
    monkeypatch.setattr(recognised, "_same", lambda *arguments: opened.append(arguments[0]))
    monkeypatch.setattr(recognised, "_named", opened.append)
    require_replaceable(out, [tmp_path / "base"])
    assert opened == []


def test_a_very_deep_folder(tmp_path: Path) -> None:
    here, out = os.getcwd(), make(tmp_path / "out", CHECKPOINT)
    try:
        os.chdir(out)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(here)
        with pytest.raises(OutputExistsError, match="holds 'd/d/d/"):
            require_replaceable(out)
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-r", str(out)], check=True)  # which shutil.rmtree cannot, so deep


Places = Callable[[Path], None]
PLACES: dict[str, tuple[str, Places]] = {
    "home": ("the home folder", lambda folder: os.environ.update(HOME=str(folder))),
    "above home": ("contains, the home folder", lambda folder: os.environ.update(HOME=str(make(folder / "me", {})))),
    "caches": ("caches of XDG_CACHE_HOME", lambda folder: os.environ.update(XDG_CACHE_HOME=str(folder))),
    "hub": ("caches of HF_HOME", lambda folder: os.environ.update(HF_HOME=str(folder))),
    "hub's models": ("caches of HF_HUB_CACHE", lambda folder: os.environ.update(HF_HUB_CACHE=str(folder / "."))),
    "current": ("the current directory", os.chdir),
    "above the current": ("the current directory", lambda folder: os.chdir(make(folder / "sub", {}))),
    "repository": ("the root of a repository", lambda folder: (folder / ".git").mkdir()),
    "worktree": ("the root of a repository", lambda folder: (folder / ".git").write_text("gitdir: elsewhere")),
}


@pytest.mark.parametrize("name", PLACES)
def test_some_places_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    words, prepare = PLACES[name]
    for variable in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))  # to be put back
    monkeypatch.chdir(tmp_path)
    for files in ({}, CHECKPOINT):
        folder = make(tmp_path / f"out-{len(files)}", files)
        prepare(folder)
        (tmp_path / f"link-{len(files)}").symlink_to(folder)
        refuses(folder, words, kind=OutputError)
        refuses(tmp_path / f"link-{len(files)}", words, kind=OutputError)


def test_the_caches_below_home_and_the_root_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (".cache", ".cache/huggingface", ".cache/huggingface/hub"):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        refuses(folder, "caches", kind=OutputError)
    with pytest.raises(OutputError, match="the root of a disk"):
        require_replaceable("/")


def test_a_snapshot_of_the_hub_is_never_replaced(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name/snapshots/0123"
    snapshot.mkdir(parents=True)
    blob = make(tmp_path / "models--owner--name/blobs", {"1": CONFIG}) / "1"
    (snapshot / "config.json").symlink_to(os.path.relpath(blob, snapshot))
    refuses(snapshot, "cache of the hub", kind=OutputError)
    (tmp_path / "models--mine").mkdir()  # a name alone makes no cache
    replace(make(tmp_path / "models--mine/out", CHECKPOINT))


def test_a_current_directory_that_is_gone_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(tmp_path / "gone", {}))
    (tmp_path / "gone").rmdir()
    replace(make(tmp_path / "out", CHECKPOINT))


PNG = b"\x89PNG\r\n\x1a\n chunk tEXtSoftware\0spp chart rest"
PDF = b"%PDF-1.4 pages " + b"\0" * 100_000 + b"<< /Creator (spp chart) >> xref"
SVG = b'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x">\n<svg xmlns="x"><dc:title>spp chart</dc:title></svg>'
REPORT = json.dumps({"layers": {}, "method": "wanda", "pattern": "2:4", "sparsity": 0.5, "windows": 1}).encode()
ROWS = b'{"rows": [{"device": "cpu", "versions": {}}]}'
TEXT = b"# Comparison\n\n## Learning rates\n"
FILES: dict[str, tuple[recognised.FileKind, tuple[bytes, ...]]] = {
    "picture": (recognised.PICTURE, (PNG, PDF, SVG)),
    "report": (recognised.PRUNE_REPORT, (REPORT,)),
    "rows": (recognised.MEASUREMENTS, (ROWS, b'{"rows": []}')),
    "certificate": (recognised.CERTIFICATE, (CERTIFICATE.encode(),)),
    "comparison": (recognised.COMPARISON, (RESULTS.encode(),)),
    "comparison's text": (recognised.COMPARISON_TEXT, (TEXT,)),
}
NO_OUTPUT = (
    b"\\documentclass{article}",
    b'{"text": "a"}\n{"text": "b"}\n',
    b'{"text": "a"}',
    b'{"rows": [{"text": "mine"}]}',
    b'{"rows": [], "mine": 1}',
    *(picture.replace(b"spp chart", b"Matplotlib") for picture in (PNG, PDF, SVG)),  # anybody's
    b"<svg></svg>",
    b"<html><dc:title>spp chart</dc:title></html>",
    b"tEXtSoftware\0spp chart /Creator (spp chart)",
    b"# Notes\n",
    b"\xff\xd8\xff\xe0 a photograph",
    b"[]",
    b" ",
    b"\x00" * 100,
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_replaced_by_one_of_its_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    kind, good = FILES[name]
    others = [content for other, (_, contents) in FILES.items() for content in contents if other != name]
    for content in (b"", *good):
        path.write_bytes(content)
        with atomic_file(path, overwrite=True, kind=kind) as new:
            new.write_text("new")
        assert path.read_text() == "new"
    for content in (*NO_OUTPUT, *others):
        path.write_bytes(content)
        for attempt in (
            lambda: atomic_file(path, overwrite=True, kind=kind).__enter__(),
            lambda: check_target(path, overwrite=True, kind=kind),
        ):
            with pytest.raises(OutputExistsError, match="is not replaced: choose another path"):
                attempt()
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["file"]


def test_a_command_that_says_no_kind_replaces_outputs_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", *(content for _, contents in FILES.values() for content in contents)):
        path.write_bytes(content)
        with atomic_file(path, overwrite=True) as new:
            new.write_text("new")
    for content in NO_OUTPUT:
        path.write_bytes(content)
        with pytest.raises(OutputExistsError, match="no output of spp"), atomic_file(path, overwrite=True):
            pass
        assert path.read_bytes() == content


def test_a_file_that_becomes_another_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    path.write_bytes(PNG)
    (tmp_path / "link").symlink_to(path)
    with atomic_file(tmp_path / "link", overwrite=True, kind=recognised.PICTURE) as new:
        new.write_bytes(PDF)
    assert (tmp_path / "link").is_symlink() and path.read_bytes() == PDF
    made = atomic_file(path, overwrite=True, kind=recognised.PICTURE)
    with pytest.raises(OutputExistsError, match="no chart"), made:
        path.write_text("mine")
    assert path.read_text() == "mine"


def test_a_folder_that_keeps_changing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out", CHECKPOINT)

    def gone(*arguments: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(recognised, "_problem", gone)
    with pytest.raises(OutputError, match="let only one write there"):
        require_replaceable(out)
