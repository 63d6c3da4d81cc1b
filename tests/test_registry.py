"""Registry: names from files, imports only what is asked for, clear errors."""

import sys
from pathlib import Path

import pytest

from aptq.registry import Registry, closest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with one flat entry, one in a family, and one whose import fails."""
    root = tmp_path / "zoo"
    files = {
        "__init__.py": "from aptq.registry import Registry\nanimals = Registry('zoo')\n",
        "ant.py": "from zoo import animals\n@animals.register('ant')\nclass Ant: ...\n",
        "birds/__init__.py": "",
        "birds/hen.py": "from zoo import animals\n@animals.register('hen')\nclass Hen: ...\n",
        "birds/ibis.py": "raise RuntimeError('imported')\n",
        "birds/jay.py": "from zoo import animals\n@animals.register('kea')\nclass Jay: ...\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "zoo"
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


def animals(package: str) -> Registry[object]:
    import zoo  # type: ignore[import-not-found]

    return zoo.animals


def test_names_import_nothing(package: str) -> None:
    assert animals(package).names() == ("ant", "hen", "ibis", "jay")
    assert "zoo.birds.ibis" not in sys.modules
    assert animals(package).families() == {"": ("ant",), "birds": ("hen", "ibis", "jay")}


def test_get_imports_one_file(package: str) -> None:
    found = animals(package).get("hen")
    assert found.__name__ == "Hen"
    assert "zoo.ant" not in sys.modules
    assert animals(package).name_of(found) == "hen"
    assert animals(package).get("hen") is found


def test_unknown_name_suggests(package: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'hen'") as error:
        animals(package).get("henn")
    assert len(str(error.value).splitlines()) == 3


def test_file_must_register_its_own_name(package: str) -> None:
    with pytest.raises(AssertionError, match="registers 'kea', not 'jay'"):
        animals(package).get("jay")


def test_broken_file_fails_alone(package: str) -> None:
    with pytest.raises(RuntimeError, match="imported"):
        animals(package).get("ibis")
    assert animals(package).get("ant").__name__ == "Ant"


def test_two_classes_cannot_share_a_name(package: str) -> None:
    registry = animals(package)
    registry.get("ant")
    with pytest.raises(AssertionError, match="'ant' is registered by"):
        registry.register("ant")(type("Other", (), {}))


def test_name_of_unregistered_class(package: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        animals(package).name_of(int)


@pytest.mark.parametrize(
    ("name", "text"), [("gpt", "did you mean 'gptq'?"), ("zzz", "known: gptq, rtn")]
)
def test_closest(name: str, text: str) -> None:
    assert closest(name, ("rtn", "gptq")) == text
