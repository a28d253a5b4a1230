"""Find the safetensors files of a checkpoint."""

import json
from pathlib import Path

from .layout import WeightsError

FILE_NAME = "model.safetensors"
INDEX_SUFFIX = ".index.json"


def find_files(path: Path) -> list[Path]:
    """Return a checkpoint's files: `path`, a folder's model.safetensors, or an index's shards.

    Raises WeightsError if there are none.
    """
    try:
        if path.is_dir():
            names = FILE_NAME, FILE_NAME + INDEX_SUFFIX, "pytorch_model.bin"
            path = next((path / name for name in names if (path / name).exists()), path)
        found = path.is_file()
    except OSError as error:
        raise WeightsError(f"no weights at {path!s:.200}: {error.strerror}") from error
    if not found:
        raise WeightsError(
            f"no weights at {path}: expected gpt2, gpt2-medium, gpt2-xl, tiny, a .safetensors "
            f"file or a folder that holds a {FILE_NAME}"
        )
    if path.suffix in (".bin", ".pt", ".pth"):
        raise WeightsError(
            f"{path} is a pickle, expected safetensors. Convert it: "
            f'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v '
            f"in torch.load({str(path)!r}, weights_only=True).items()}}, "
            f'{str(path.with_name(FILE_NAME))!r})"'
        )
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    try:
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError("expected names of files beside it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is not an index of shards: {error!r:.200}") from error
    return [path.with_name(shard) for shard in sorted(shards)]
