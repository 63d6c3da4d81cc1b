"""Folders that are made once from a source in another form, and kept."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def once(cache: Path | None, kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` under `cache`/`kind` (default cache ~/.cache/aptq), made if it is missing.

    `make` fills an empty folder, which gets its name when it is complete.
    """
    root = (cache or Path.home() / ".cache" / "aptq") / kind
    target = root / name
    if not target.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as work:
            made = Path(work) / "model"
            made.mkdir()
            make(made)
            try:
                os.rename(made, target)
            except OSError:
                # Another process was faster: its folder is the same model.
                if not target.is_dir():
                    raise
    return target
