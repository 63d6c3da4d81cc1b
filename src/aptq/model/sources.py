"""Where a model comes from: a folder, a hub id or a .gguf file; and what is refused by name."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aptq.core.reading import LISTS, read_json, strays
from aptq.model.gguf import converted as from_gguf
from aptq.model.skeleton import safe_config

# Tokenizer, chat template and generation settings, as transformers names them.
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)
INDEX = "model.safetensors.index.json"
READ = ("gptq", "compressed-tensors")  # methods of quantized sources that model/quantized decodes
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# All that is ever read in a folder, here and by transformers.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_WEIGHTS = ("model*.safetensors",)
_TOKENIZER = (".json", ".model", ".txt", ".jinja")  # files that a tokenizer is made of
_PATTERN = 1 << 14  # characters of a pattern in tokenizer.json; real ones have some hundred


@dataclass(frozen=True, slots=True)
class Source:
    """A local folder with config.json and safetensors, and the name that the user gave it."""

    name: str
    folder: Path

    def files(self) -> list[Path]:
        """Files that a compressed copy carries over unchanged (tokenizer, template, ...)."""
        found = {path for pattern in _CARRIED for path in self.folder.glob(pattern)}
        return sorted(path for path in found if path.is_file())


def resolve(
    source: str | Path,
    revision: str | None,
    cache: Path | None,
    dtype: torch.dtype | None = None,
    *,
    weights: bool = True,
) -> Source:
    """Find (download, convert) the folder of a model.

    dtype: what a .gguf (None: bfloat16, in which nearly all models are published) or a quantized
    folder (None: that of its config.json) is converted to.  Without `weights` the small files are
    enough and nothing else is fetched.
    Raises ValueError, in three lines, where there is no model or no network for a hub id.
    """
    name, path = str(source), Path(source).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            refuse("there is no such file", name, "give the path of a .gguf file")
        if path.suffix != ".gguf":
            refuse("this file is no model", name, "give a Hugging Face folder or a .gguf file")
        return Source(path.stem, from_gguf(path, cache, dtype or torch.bfloat16))
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            refuse("there is no such folder", name, "give a Hugging Face folder or a .gguf file")
        path = _download(name, revision, weights)
    _check_links(path)
    if weights:
        _check_folder(path)
        path = _dequantized(path, cache, dtype)
    return Source(name, path)


def _check_links(folder: Path) -> None:
    """Nothing that is read, or copied into the output, may be a link to elsewhere."""
    read = [path for pattern in (*_SMALL, *_WEIGHTS) for path in folder.glob(pattern)]
    if out := strays(folder, read):
        where = f"{out[0]}: a link to {out[0].resolve()}"
        refuse("a file of the model leads out of its folder", where, "put a copy in its place")


def _dequantized(folder: Path, cache: Path | None, dtype: torch.dtype | None) -> Path:
    """`folder`, or of a quantized one that can be read a folder with ordinary weights."""
    try:
        raw = read_json(folder / "config.json")
        if raw["quantization_config"]["quant_method"] not in READ or not raw["model_type"]:
            return folder
    except (OSError, ValueError, KeyError, TypeError):
        return folder  # read_config says what is wrong, if anything is
    from aptq.model.quantized import converted  # it reads shards, which refuse as this file does

    return converted(folder, raw, Source("", folder).files(), cache, dtype)


def refuse(what: str, where: str, instead: str) -> NoReturn:
    """The one form of every message to the user: what, where, what to do."""
    raise ValueError(f"{what}\n{where}\n{instead}")


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a plain, unquantized causal language model of a family in transformers.

    Of a quantized one that `resolve` converts it is the config of the model behind it.  Raises
    ValueError by name for remote code, other quantized sources and anything that is no
    decoder-only language model.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = read_json(path)
        model_type = raw["model_type"]
        hash(model_type)
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse("config.json is missing or no JSON", f"{path}: {error!r}", "copy the file again")
    method = raw.get("quantization_config")
    if method is not None:
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        if kind not in READ:
            refuse(
                f"the model is already quantized ({kind})",
                f"{path}: quantization_config",
                "start from the original bf16, fp16 or fp32 model",
            )
    native = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    _check_remote(path, raw, native)
    if model_type not in CONFIG_MAPPING_NAMES:
        refuse(
            f"model type {model_type!r} is unknown to the installed transformers",
            str(path),
            "install a version of transformers that has this family",
        )
    _check_causal(path, raw, native)
    config = safe_config(folder)
    if method is not None:
        del config.quantization_config
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.  Raises ValueError where there is none, or none to be trusted.

    Unchanged files give the same object again: the library never frees what a tokenizer has
    learned of a text (4 MB of 400,000 characters, tokenizers 0.23).
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _TOKENIZER]
    stats = [(path.name, path.stat()) for path in files if path.is_file()]
    return _tokenizer(folder, tuple((n, one.st_size, one.st_mtime_ns) for n, one in stats))


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, _files: tuple[tuple[str, int, int], ...]) -> PreTrainedTokenizerBase:
    for path in sorted(folder.glob("*.json")):
        if path.name in (INDEX, "config.json"):
            continue
        try:
            longest = max(map(len, _patterns(read_json(path, 4 * LISTS))), default=0)
            if longest > _PATTERN:
                raise ValueError(f"a pattern of {longest:,} characters, {_PATTERN:,} allowed")
        except ValueError as error:
            what = "a file beside the model is broken or too large"
            refuse(what, f"{path}: {error}", "copy the file again, or remove it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises the base class itself
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the tokenizer cannot be read\n{folder}: {reason}\n"
            "copy the tokenizer files of the model into the folder"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _patterns(data: Any) -> list[str]:
    """Regular expressions of a tokenizer.json, which the library compiles."""
    todo, found = [data], list[str]()
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if isinstance(pattern := value.get("Regex"), str):
                found.append(pattern)
            todo += [held for key, held in value.items() if key not in ("vocab", "merges")]
        elif isinstance(value, list):
            todo += [held for held in value if isinstance(held, dict | list)]
    return found


def _classes(names: Any) -> set[str]:
    """The mapping of transformers holds one class name or a tuple of them."""
    return {names} if isinstance(names, str) else set(names or ())


def _check_remote(path: Path, raw: dict[str, Any], native: Any) -> None:
    """Code in the model's folder is never run; it may stay where transformers' own class of the
    same name is meant (many folders keep the file from before their family was adopted)."""
    remote = raw.get("auto_map")
    if not remote:
        return
    entry = str(remote.get("AutoModelForCausalLM", "")) if isinstance(remote, dict) else ""
    if entry.rpartition(".")[2] not in _classes(native):
        refuse(
            "the model needs code from its own folder, which is never run",
            f"{path}: auto_map {entry or remote}",
            "use a copy of the model for a family that transformers itself contains",
        )


def _check_causal(path: Path, raw: dict[str, Any], native: Any) -> None:
    architectures = set(raw.get("architectures") or ()) or _classes(native)
    if raw.get("is_encoder_decoder") or not architectures & _classes(native):
        found = ", ".join(sorted(architectures)) or raw["model_type"]
        refuse(
            "this is no decoder-only causal language model",
            f"{path}: {found} ({raw['model_type']})",
            "give a model of a ...ForCausalLM class",
        )
    parts = [key for key in ("vision_config", "audio_config") if raw.get(key)]
    if parts:
        refuse(
            f"model type {raw['model_type']!r} has more than a language model",
            f"{path}: {', '.join(parts)}",
            "give the text-only model of the family",
        )


def _check_folder(folder: Path) -> None:
    if any(folder.glob("model.safetensors*")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        refuse(
            "the weights are Python pickles, which can run code and are never read",
            f"{folder}: {', '.join(pickles[:5])}",
            "convert them to safetensors on a machine where you trust them, or use another copy",
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    instead = f"give {folder / ggufs[0]}" if ggufs else "give a folder with model.safetensors"
    refuse("the folder holds no weights", f"{folder}: no model.safetensors", instead)


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_SMALL, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is no folder here and could not be fetched from the hub\n"
            f"revision {revision or 'main'}: {reason}\n"
            "give a local folder, or check the name and the network"
        ) from error
