"""Mutants of model folders and of evaluation records: each is loaded or refused in a sentence, and leaves no file.

Purification is replaced by a look at the models: a folder that loads must hold finite weights of the expected modules.
"""

import json
import os
import random
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import build_purifier
from isolated import run_isolated

from videopure_fast import Purifier
from videopure_fast.evaluation.plan import Plan, standard_threat
from videopure_fast.evaluation.record import Record
from videopure_fast.evaluation.tables import table

FOLDERS, RECORDS = 200, 100
SECONDS = 10
MEMORY = 4 << 30
REFUSALS = (ValueError, ImportError)  # the last: of a flow that is not installed
INTERNAL = ("NoneType", "Traceback", "unsafe")  # what no sentence about a folder says
PLAN = Plan(
    "source", (standard_threat("none", 4), standard_threat("bpda", 4)), ("none", "videopure"), seeds=(0,), batch=2
)

NUMBERS = (0, -1, 1, 2, 3, 2**31, 10**9, 10**400, 1e300, -1e300, 1e-300, float("nan"), float("inf"), True, 0.5)
TEXTS = ("", "x" * 5000, "../../etc/passwd", "\ud800", "silu", "AutoencoderKL", "UNet2DConditionModel", "fp16", "\n\n")
NESTS = ([], {}, [[]], [10**9] * 4, [None], ["DownBlock3D"] * 1000, {"a": {"b": 1}}, [[[[[[1]]]]]], None)
FIELDS = ("quantization_config", "time_cond_proj_dim", "_class_name", "auto_map", "attn_implementation", "shift_factor")
FIELDS += ("latents_mean", "layers_per_block", "sample_size", "torch_dtype", "num_hidden_layers", "model_max_length")


def pick_node(rng, tree):
    """A container inside a JSON tree and one of its keys; the root is never empty."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.6:
            tree = tree[key]
        else:
            return tree, key


def mutate_json(rng, path):
    tree = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not tree:
            break
        place, key = pick_node(rng, tree)
        how = rng.randrange(5)
        if how == 0:
            del place[key]
        elif how == 1:
            tree[rng.choice(FIELDS)] = rng.choice((*NUMBERS, *TEXTS, *NESTS))
        elif how == 2:
            place[key] = [place[key]] * rng.choice((0, 1, 2, 100))
        else:
            place[key] = rng.choice(rng.choice((NUMBERS, TEXTS, NESTS)))
    path.write_text(json.dumps(tree))


def mutate_bytes(rng, path):
    content = bytearray(path.read_bytes() or b"0")
    how = rng.randrange(5)
    if how == 0:
        content = content[: rng.randrange(len(content))]
    elif how == 1:
        content += rng.randbytes(rng.choice((1, 8, 1000)))
    elif how == 2:
        content = bytearray(
            rng.choice((b"", b"[" * 200_000, b"{" * 10, b"null", b"\xff\xfe{\0}\0", b"\x80\x04N.", b"version"))
        )
    else:
        for _ in range(rng.choice((1, 4, 100))):
            content[rng.randrange(min(len(content), rng.choice((16, 4000, len(content)))))] = rng.randrange(256)
    path.write_bytes(bytes(content))


def mutate_header(rng, path):
    """Another header of a safetensors file: names, types, shapes or places of its tensors."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice([name for name in header if name != "__metadata__"])
        tensor, how = header[name], rng.randrange(6)
        if how == 0:
            header[rng.choice(("", "x" * 3000, "\ud800", "conv_in.weight", "../x"))] = header.pop(name)
        elif how == 1:
            tensor["dtype"] = rng.choice(("I64", "BOOL", "F8_E4M3", "C64", "F64", "F4", "magic", 5))
        elif how == 2:
            tensor["shape"] = rng.choice(([], [0], [10**9], [2**63], [-1], [1] * 100, tensor["shape"][::-1], "x"))
        elif how == 3:
            tensor["data_offsets"] = rng.choice(([0, 0], [0, 4], [2**63, 2**63 + 4], [-4, 0], [4, 0], []))
        elif how == 4:
            del header[name]
        else:
            value = rng.choice((float("nan"), float("inf"), 1e38))
            start = tensor["data_offsets"][0] if tensor.get("data_offsets") else 0
            data = data[: max(start, 0)] + struct.pack("<f", value) + data[max(start, 0) + 4 :]
        if len(header) < 2:
            break
    packed = json.dumps(header).encode()
    length = rng.choice((len(packed), len(packed), len(packed), len(packed) + 1, 2**40, 0))
    path.write_bytes(struct.pack("<Q", length) + packed + data)


def mutate_place(rng, path, files):
    """The file is missing, or something else."""
    how, other = rng.randrange(6), rng.choice(files)
    if how == 0:
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return
    path.unlink()
    if how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(path.name)
    elif how == 3:
        path.with_name(f"{path.name}.index.json").write_text(
            rng.choice(('{"weight_map": {}}', "{}", '{"metadata": 5}'))
        )
    elif how == 4:
        os.mkfifo(path)


def mutate_folder(rng, folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    how = rng.random()
    if how < 0.15:
        return mutate_place(rng, path, files)
    try:
        if how > 0.3 and path.suffix == ".safetensors":
            return mutate_header(rng, path)
        if how > 0.3 and path.suffix == ".json":
            return mutate_json(rng, path)
    except (ValueError, LookupError, TypeError, struct.error, RecursionError):
        pass  # broken already
    return mutate_bytes(rng, path)


class Refused(Exception):
    """What a read raised is of a kind that says what is wrong with the folder."""


def look(folder):
    return sorted((str(path), path.lstat().st_mode, path.lstat().st_size) for path in Path(folder).rglob("*"))


def isolated_in(folder, read):
    """read(), in a worker's own empty folder, in which it must leave nothing, nor anywhere in `folder`."""
    before = look(folder)
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        os.chdir(scratch)
        tempfile.tempdir = scratch
        try:
            return read()
        except REFUSALS as error:
            raise Refused(str(error)) from error
        finally:
            left = look(scratch) + [entry for entry in look(folder) if entry not in before]
            os.chdir("/")
            assert not left, left


def load_folder(folder):
    """What stands for a purification: the models of a folder are whole and finite."""

    def read():
        purifier = Purifier.from_pretrained(folder, device="cpu")
        assert all(tensor.isfinite().all() for tensor in purifier.state_dict().values())
        return type(purifier.unet).__name__

    return isolated_in(folder, read)


def read_record(folder):
    def read():
        record = Record(Path(folder) / "record.json", PLAN)
        return len(table(record)), [record.clips(batch) for batch in PLAN.batches()]

    return isolated_in(folder, read)


def is_sentence(message):
    """One line that is not too long, and not an error from within; after its own words it may quote a library's."""
    own = message.partition(" cannot be read: ")[0]
    internal = "object has no attribute" in own or any(words in message for words in INTERNAL)
    return own.strip() and "\n" not in message and len(message) < 2000 and not internal


def judge(outcomes, known):
    """Every outcome is a result or a refusal in a sentence, and there are some of both."""
    faults, results = [], 0
    for seed, outcome in enumerate(outcomes):
        results += outcome.kind == "result"
        if outcome.kind != "result" and not (outcome.kind == "Refused" and is_sentence(outcome.value)):
            faults.append(f"mutant {seed}: {outcome.kind}: {str(outcome.value)[:500]}")
    assert not faults, "\n".join(faults)
    assert 0 < results < known


@pytest.mark.fuzz
@pytest.mark.parametrize(
    "message", ["'NoneType' object is not iterable", "'list' object has no attribute 'lower'", "Traceback", "a\nb", " "]
)
def test_an_error_from_within_is_no_refusal(message):
    assert is_sentence("prior/vae cannot be read: it has no config.json") and not is_sentence(message)


def with_text_encoder(folder):
    """Add what released models have beside a UNet and a VAE; the tokenizer knows two words."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    (folder / "prompt_embeds.safetensors").unlink()
    (folder / "scheduler").mkdir()
    schedule = {"_class_name": "DDIMScheduler", "beta_start": 1e-3, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule | {"steps_offset": 1}))
    vocabulary = folder.parent / "vocabulary"
    vocabulary.mkdir()
    (vocabulary / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    files = [str(vocabulary / name) for name in ("vocab.json", "merges.txt")]
    CLIPTokenizer(*files, model_max_length=7).save_pretrained(folder / "tokenizer")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=2, max_position_embeddings=7, **small))
    encoder.save_pretrained(folder / "text_encoder")


@pytest.mark.fuzz
def test_mutated_folders_are_loaded_or_refused(tmp_path):
    plain, encoding = tmp_path / "plain", tmp_path / "encoding"
    build_purifier(flow="none").save_pretrained(plain)
    shutil.copytree(plain, encoding)
    with_text_encoder(encoding)
    folders = []
    for seed in range(FOLDERS):
        rng = random.Random(seed)
        folder = shutil.copytree(encoding if seed % 4 == 0 else plain, tmp_path / "mutants" / str(seed) / "prior")
        for _ in range(rng.choice((1, 1, 1, 2))):
            mutate_folder(rng, folder)
        folders.append(str(folder))
    judge(run_isolated(load_folder, folders, seconds=SECONDS, memory=MEMORY), FOLDERS)


@pytest.mark.fuzz
def test_mutated_records_are_read_or_refused(tmp_path):
    record = Record(tmp_path / "record.json", PLAN)
    for batch in PLAN.batches():
        for name in PLAN.defenses:
            entry = {"right": [1] * batch.clips, "repeats": 2, "seconds": 1.0, "peak_bytes": None}
            record.add(batch.name(name), entry, {"device": "cpu"})
    folders = []
    for seed in range(RECORDS):
        rng, folder = random.Random(seed), tmp_path / "mutants" / str(seed) / "record"
        folder.mkdir(parents=True)
        path = Path(shutil.copy(tmp_path / "record.json", folder))
        rng.choice((mutate_json, mutate_json, mutate_json, mutate_bytes))(rng, path)
        folders.append(str(folder))
    judge(run_isolated(read_record, folders, seconds=SECONDS, memory=MEMORY), RECORDS)
