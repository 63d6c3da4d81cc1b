"""Which versions of the libraries this program has been tried with; known before they load."""

import re
from importlib.metadata import PackageNotFoundError, version

# as in pyproject.toml: from, and the first that is too new
SUPPORTED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "torch": ((2, 11), (3,)),
    "transformers": ((5, 17), (6,)),
    "safetensors": ((0, 7), (2,)),
}


def check_versions() -> None:
    """Raise ValueError for a library that is missing, too old or too new."""
    for name, (least, limit) in SUPPORTED.items():
        wanted = f"{name}>={'.'.join(map(str, least))},<{'.'.join(map(str, limit))}"
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
        if not least <= numbers < limit:
            raise ValueError(
                f"this version of {name} is not supported\n{found} is installed, {wanted} needed\n"
                f"pip install '{wanted}'"
            )
