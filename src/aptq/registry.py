"""Named implementations found by file: a folder is a family, a file stem is a name.

`names()` only lists files and `get()` imports the one file it needs, so a slow or optional import
in one method never delays or breaks another.  Torch-free, at the bottom of the import order.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type)


def closest(name: str, known: list[str] | tuple[str, ...], count: int = 3) -> str:
    """Text for an error's last line: the nearest known names, or all of them when none is near."""
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(match) for match in near) + "?"
    return "known: " + (", ".join(sorted(known)) or "none")


class Registry(Generic[T]):
    """Classes of kind `T`, one a file, in `package/<name>.py` or `package/<family>/<name>.py`.

    methods: Registry[Stage] = Registry("aptq.methods")

    @methods.register("gptq")      # in aptq/methods/quantize/gptq.py
    class GPTQ(Stage): ...

    methods.get("gptq")            # imports that file alone
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: files a class under `name`, which is also the stem of its file."""

        def file(cls: C) -> C:
            module, _, stem = cls.__module__.rpartition(".")
            inside = module == self.package or module.startswith(self.package + ".")
            assert not inside or stem == name, f"{cls.__module__} registers {name!r}, not {stem!r}"
            held = self._classes.get(name)
            same = held is None or (held.__module__, held.__qualname__) == (
                cls.__module__,
                cls.__qualname__,
            )
            assert same, f"{name!r} is registered by {held} and by {cls}"
            self._classes[name] = cls
            return cls

        return file

    def get(self, name: str) -> type[T]:
        """The class called `name`; ValueError with the closest names if there is none."""
        if name not in self._classes:
            modules = self._modules()
            if name not in modules:
                raise ValueError(
                    f"unknown name {name!r}\n"
                    f"{self.package} has {len(modules)} entries and none is called so\n"
                    f"{closest(name, self.names())}"
                )
            importlib.import_module(modules[name])
            assert name in self._classes, f"{modules[name]} does not register {name!r}"
        return self._classes[name]

    def name_of(self, cls: type[T]) -> str:
        """The name under which `cls` is filed: the inverse of `get`."""
        for name, held in self._classes.items():
            if held is cls:
                return name
        raise ValueError(
            f"{cls.__qualname__} has no name\nit is not registered in {self.package}\n"
            f"put @register(name) above the class"
        )

    def names(self) -> tuple[str, ...]:
        """All names, sorted, without importing any of their files."""
        return tuple(sorted(self._classes.keys() | self._modules().keys()))

    def families(self) -> dict[str, tuple[str, ...]]:
        """Names by folder ("" for files directly in the package), without importing any of them."""
        found: dict[str, list[str]] = {}
        for name, module in sorted(self._modules().items()):
            family = module.removeprefix(self.package + ".").rpartition(".")[0]
            found.setdefault(family, []).append(name)
        return {family: tuple(names) for family, names in found.items()}

    def _modules(self) -> dict[str, str]:
        """{name: dotted module}, read from the file system."""
        spec = importlib.util.find_spec(self.package)
        places = list(spec.submodule_search_locations or ()) if spec else []
        found: dict[str, str] = {}
        for entry in pkgutil.iter_modules(places):
            if not entry.ispkg:
                self._add(found, entry.name, f"{self.package}.{entry.name}")
                continue
            for file in pkgutil.iter_modules([f"{place}/{entry.name}" for place in places]):
                self._add(found, file.name, f"{self.package}.{entry.name}.{file.name}")
        return found

    @staticmethod
    def _add(found: dict[str, str], name: str, module: str) -> None:
        assert name not in found, f"{module} and {found[name]} share the name {name!r}"
        found[name] = module
