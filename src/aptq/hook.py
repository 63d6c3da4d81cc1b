"""Makes transformers know the packed format as soon as its table of quantizers is loaded.

Loading that table takes 2.5 s and imports torch (measured on 2 cores), too much for `import aptq`
and `aptq --help`; and people import transformers before or after aptq.  So a finder waits for the
one module, lets it load as usual, registers, and leaves.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers has loaded its quantizers, else when it does."""
    if TABLE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from aptq.runtime.hf import register

    register()


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)  # so that the search below does not come back here
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, finder: _Finder) -> None:
        self.inner, self.finder = inner, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self.finder)
        self.inner.exec_module(module)
        _register()
