"""The work on one file: decode, purify, write, and say what became of it. Any process may run it, of Ray or not.

An output appears when it is complete, and beside it a hidden file with its digest: whoever finds both adopts the output
in place of making it again. A worker that dies leaves a note of the file it was at, so that a file that ends every
worker is given up.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from ..data.video import probe, working_size
from ..data.video_writer import Quality
from ..evaluation.record import weights_digest
from ..models.flow import flow_name
from ..purifier import Purifier
from ..streaming import purified_frames, purify_file
from .rows import Job, Row, printable

MOST_DEATHS = 3  # of workers at one file, until it is given up
_BEGUN = "begun"
_TIMED_OUT = "Timeout ("  # what `faulthandler` writes first
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CHUNK = 2**20  # bytes
_DIGITS = 16  # of a digest of settings
_STEM = 50  # characters of an output's name that its digest's name repeats


@dataclass(frozen=True)
class Recipe:
    """How files are purified.

    Attributes:
        out: folder of the outputs.
        work: folder of what is being written, on the file system of `out`.
        model, device, dtype, flow, overrides: as for `Purifier.from_pretrained`; dtype is a name.
        size: short side of the outputs, in pixels.
        suffix: ".mp4" or ".webm"; ".safetensors" for tensors "clip" (3, F, H, W) uint8 and "seconds" (F,), the times of
            its frames.
        quality: as for a `VideoWriter`.
        seed: of methods that draw noise; every file draws the same.
        timeout: seconds after which a file ends its worker.
        threads: of a worker; None leaves them as they are.
        settings, weights: digests that the worker's own must equal.
    """

    out: Path
    work: Path
    model: str = "tiny"
    device: str | None = None
    dtype: str = "float32"
    flow: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    size: int = 64
    suffix: str = ".mp4"
    quality: Quality | None = None
    seed: int = 0
    timeout: float | None = None
    threads: int | None = None
    settings: str | None = None
    weights: str | None = None

    def load(self, device: str | None) -> Purifier:
        """The purifier, on a device."""
        dtype = getattr(torch, self.dtype)
        return Purifier.from_pretrained(self.model, device=device, dtype=dtype, flow=self.flow, **self.overrides)

    def identity(self, purifier: Purifier) -> dict[str, Any]:
        """All that outputs depend on, as JSON has it. purifier: this recipe's, on any device."""
        own = {name: getattr(self, name) for name in ("size", "suffix", "quality", "seed", "dtype")}
        place = "cpu" if self.device == "cpu" else "accelerator"
        made = {"max_frames": purifier.max_frames, "flow": flow_name(purifier.flow), **asdict(purifier.config)}
        models = nn.ModuleList(one for one in (purifier.unet, purifier.vae, purifier.decoder) if one is not None)
        made |= {"configs": _configs_digest(models), "prompts": self._prompts_digest()}
        return {**own, "device": place, **made, "weights": weights_digest(models)}

    def _prompts_digest(self) -> str | None:
        """The digest of prompts that a folder stores; None for others: an encoder's last bits vary by processor."""
        stored = Path(self.model, "prompt_embeds.safetensors")
        return file_digest(stored)[:_DIGITS] if self.model != "tiny" and stored.is_file() else None


def settings_digest(identity: Mapping[str, Any]) -> str:
    """The digest of an identity without its weights, 16 hex digits."""
    return _json_digest({name: value for name, value in identity.items() if name != "weights"})


def _configs_digest(models: Iterable[Any]) -> str:
    """The digest of what the models' config.json say of them, such as the scaling factor of latents.

    Left out is what begins with "_", as paths and versions, and the defaults that a version of diffusers fills in.
    """
    configs = []
    for config in (model.config for model in models):
        filled = config.get("_use_default_values", ())
        configs.append({key: value for key, value in config.items() if key[0] != "_" and key not in filled})
    return _json_digest(configs)


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_DIGITS]


class FileWorker:
    """Turns jobs into rows. What is wrong with a file is in its row; what is wrong with a worker ends its process."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._own = recipe, secrets.token_hex(4)
        recipe.work.mkdir(parents=True, exist_ok=True)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self._purifier = recipe.load(recipe.device)
        if recipe.device != "cpu" and self._purifier.unet.device.type == "cpu":
            raise ValueError("a worker was given a GPU that its torch cannot use: ask for --num-gpus 0")
        found = recipe.identity(self._purifier)
        self._settings, self._weights = settings_digest(found), found["weights"]
        for name, own, wanted in (
            ("settings", self._settings, recipe.settings),
            ("weights", self._weights, recipe.weights),
        ):
            if own != (wanted or own):
                raise ValueError(f"{recipe.model} has other {name} here than where the run began: {own}, not {wanted}")

    def __call__(self, job: Job) -> Row:
        log = self._recipe.work / f"{job.key}.log"
        row = Row(job.name, job.output, "failed", settings=self._settings, weights=self._weights)
        try:
            if log.exists():  # of workers that died: what they had written is deleted
                for place in self._recipe.work.glob(f"{job.key}-*"):
                    shutil.rmtree(place, ignore_errors=True)
            if reason := self._given_up(log):
                return row._replace(error=reason)  # the log stays, for those who ask again
            with log.open("a") as file, self._timed(file):
                print(_BEGUN, file=file, flush=True)
                row = self._finish(job, row)
        except getattr(torch, "AcceleratorError", ()):
            os._exit(1)  # its context is lost: nothing can be computed in this process any more
        except Exception as error:
            row = row._replace(state="full" if is_full(error) else "failed", error=self._sentence(error, job))
        log.unlink(missing_ok=True)
        return row

    def purify(self, source: Path, target: Path) -> int:
        """Purify a video into a new file. Returns the number of its frames."""
        recipe = self._recipe
        if target.suffix == ".safetensors":
            return _write_tensors(self._purifier, source, target, recipe)
        options: dict[str, Any] = {"size": recipe.size, "seed": recipe.seed, "quality": recipe.quality}
        return purify_file(self._purifier, source, target, **options).frames

    def _given_up(self, log: Path) -> str | None:
        """Why the work on a file, which workers began and did not end, is not begun again; None if it is."""
        try:
            lines = log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return None
        if any(line.startswith(_TIMED_OUT) for line in lines):
            return f"it took more than {self._recipe.timeout:g} s"
        return f"{MOST_DEATHS} workers died of it" if lines.count(_BEGUN) >= MOST_DEATHS else None

    @contextlib.contextmanager
    def _timed(self, log: TextIO) -> Iterator[None]:
        """End this process if the block takes too long, with a note in the log.

        faulthandler's watchdog is a thread of C: it ends the process also while a decoder holds Python's lock.
        """
        if self._recipe.timeout is None:
            yield
            return
        faulthandler.dump_traceback_later(self._recipe.timeout, exit=True, file=log)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _finish(self, job: Job, row: Row) -> Row:
        """The row of a job, whose output is adopted or made."""
        source, output = Path(job.source), self._recipe.out / job.output
        if printable(str(source)) != str(source):
            raise ValueError("its name is not UTF-8; accepted: a name in UTF-8")
        if not source.is_file():
            if source.exists():
                raise ValueError(f"{source} is no regular file")
            raise FileNotFoundError(f"there is no file {source}")
        if not Path(os.path.realpath(output.parent)).is_relative_to(os.path.realpath(self._recipe.out)):
            raise ValueError(f"a link leads {job.output} out of {self._recipe.out}")
        digest = file_digest(source)
        row = row._replace(state="done", size=source.stat().st_size, input_digest=digest)
        if adopted := _adopted(output, row):
            return adopted
        output.parent.mkdir(parents=True, exist_ok=True)
        target = self._target(job)
        note = target.with_suffix(".json")
        target.parent.mkdir(exist_ok=True)
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                frames = self.purify(source, target)
            _sync(target)
            texts = dict.fromkeys(str(one.message) for one in heard if one.category is UserWarning)
            row = row._replace(frames=frames, output_size=target.stat().st_size, output_digest=file_digest(target))
            row = row._replace(warnings=printable("\n".join(texts).replace(str(target), job.output)) or None)
            os.replace(target, output)
            _sync(output.parent)
            note.write_text(json.dumps(row._asdict()))
            _sync(note)
            os.replace(note, digest_path(output))
        finally:
            shutil.rmtree(target.parent, ignore_errors=True)
        return row

    def _sentence(self, error: Exception, job: Job) -> str:
        text = str(error).replace(str(self._target(job)), job.output)
        return printable(" ".join(text.split())) or type(error).__name__

    def _target(self, job: Job) -> Path:
        """Where an output is written: in a folder for it, and for what libraries write beside it.

        It is no other worker's, of which one may outlive its driver for a while.
        """
        return self._recipe.work / f"{job.key}-{self._own}" / f"output{self._recipe.suffix}"


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that a disk is full."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def digest_path(output: Path) -> Path:
    """The hidden file beside an output that has its row. Its name fits wherever the output's does."""
    name = hashlib.sha256(output.name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return output.with_name(f".{output.stem[:_STEM]}-{name}.json")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _adopted(output: Path, wanted: Row) -> Row | None:
    """The row of an output that another worker finished, if it is of this input, these settings and weights."""
    try:
        found = json.loads(digest_path(output).read_text())
        same = all(found[name] == getattr(wanted, name) for name in ("input_digest", "settings", "weights"))
        frames, texts, digest = found["frames"], found["warnings"], found["output_digest"]
        right = type(frames) is int and isinstance(texts, str | None) and printable(texts or "") == (texts or "")
        if not same or not right or digest != file_digest(output):
            return None
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        return None
    return wanted._replace(frames=frames, warnings=texts, output_size=output.stat().st_size, output_digest=digest)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(purifier: Purifier, source: Path, target: Path, recipe: Recipe) -> int:
    """Purify a video into a safetensors file; the whole clip is in memory."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    video = probe(source)
    if video.has_audio:
        warnings.warn(f"{target} has no sound: safetensors holds tensors alone", stacklevel=2)
    clip = torch.empty(3, video.frames, *working_size(video.height, video.width, recipe.size), dtype=torch.uint8)
    for i, frame in enumerate(purified_frames(purifier, video, size=recipe.size, seed=recipe.seed)):
        clip[:, i] = frame
    seconds = torch.tensor([float(video.time(i)) for i in range(video.frames)], dtype=torch.float64)
    try:
        save_file({"clip": clip, "seconds": seconds}, target)
    except SafetensorError as error:  # the system's number of the error is in its text alone
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(target)) from error
        raise
    return video.frames
