"""Recipe: TOML in and out, every wrong key and value refused with what would be right."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from aptq.allocate import allocators
from aptq.core.grid import Grid
from aptq.engine.data import Data
from aptq.engine.stage import methods
from aptq.options import construct, describe, plain
from aptq.recipe import Recipe, shipped_names

GPTQ = "[[stage]]\nuse = 'gptq'\n"


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    recipe.dump(tmp_path / "recipe.toml")
    assert Recipe.load(tmp_path / "recipe.toml") == recipe


def test_every_value_is_read() -> None:
    recipe = Recipe.parse(
        "grids = ['int4-g64-z', 'bf16']\nbudget = '110MB'\n"
        "keep = ['*.down_proj']\norder = 'group'\n"
        "seed = 3\n[data]\nsource = 'self'\nsamples = 4\nlength = 8\nseed = 2\n"
        "[[stage]]\nuse = 'gptq'\ndamp = 1\n[[stage]]\nuse = 'rtn'\n",
        "here",
    )
    assert recipe.grids == (Grid.parse("int4-g64-z"), Grid.parse("bf16"))
    assert (recipe.budget, recipe.keep, recipe.order, recipe.seed) == (
        "110MB",
        ("*.down_proj",),
        "group",
        3,
    )
    assert recipe.data == Data(source="self", samples=4, length=8, seed=2)
    assert [methods.name_of(type(stage)) for stage in recipe.stages] == ["gptq", "rtn"]
    assert plain(recipe.stages[0])["damp"] == 1.0
    assert isinstance(plain(recipe.stages[0])["damp"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid = []\n" + GPTQ, "did you mean 'grids'"),
        ("budget = '4bpw'", "a recipe without stages"),
        ("[[stage]]\nname = 'gptq'", "a table without a method"),
        ("[[stage]]\nuse = 'error'", "error measures, it changes no layer"),
        ("measure = {use = 'gptq'}\n" + GPTQ, "gptq changes layers, it measures nothing"),
        ("measure = 'error'\n" + GPTQ, "a table without a method"),
        ("measure = {use = 'eror'}\n" + GPTQ, "did you mean 'error'"),
        ("measure = {use = 'error', dampp = 1}\n" + GPTQ, "unknown key 'dampp'"),
        ("allocate = {use = 'mipl'}\n" + GPTQ, "did you mean 'milp'"),
        ("profile = 'vlm'\n" + GPTQ, "did you mean 'vllm'"),
        ("minimum = ['*.v_proj']\n" + GPTQ, "not a minimum"),
        ("minimum = ['*.v_proj=four']\n" + GPTQ, "not a minimum"),
        ("minimum = ['=4']\n" + GPTQ, "not a minimum"),
        ("budget = '4bpw, 3 bits'\n" + GPTQ, "not a budget"),
        ("budget = '4bpw,4bpw'\n" + GPTQ, "one budget twice"),
        ("[[stage]]\nuse = 'gptqq'", "did you mean 'gptq'"),
        (GPTQ + "dampp = 0.1", "did you mean 'damp'"),
        (GPTQ + "damp = 'much'", "write a value of type float"),
        (GPTQ + "damp = true", "write a value of type float"),
        ("order = 'blok'\n" + GPTQ, "did you mean 'block'"),
        ("seed = 1.5\n" + GPTQ, "write a value of type int"),
        ("grids = 'int4-g64'\n" + GPTQ, "wrong type"),
        ("grids = ['int4-g64-zz']\n" + GPTQ, "not a grid"),
        ("[data]\nsample = 3\n" + GPTQ, "did you mean 'samples'"),
        ("[data]\nsamples = 0\n" + GPTQ, "samples >= 1"),
        ("data = 3\n" + GPTQ, "wrong type"),
        ("seed = = 3", "is not TOML"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Recipe.parse(text, "here.toml")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("source", "message"), [("apqt", "did you mean 'aptq'"), ("none.toml", "no recipe at")]
)
def test_missing_recipes_are_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.load(source)


def test_adapt_replaces_only_what_is_given() -> None:
    recipe = Recipe.load("gptq")
    assert recipe.adapt() == recipe
    sized = recipe.adapt(grid="int3-row", seed=5, samples=2, source="self")
    assert (sized.grids, sized.budget) == ((Grid.parse("int3-row"),), "")
    assert (sized.seed, sized.data.seed, sized.data.samples) == (5, 5, 2)
    assert sized.data.length == recipe.data.length
    assert recipe.adapt(budget="3bpw").budget == "3bpw"
    both = recipe.adapt(grid="int3-row", budget="3.5bpw")
    assert (both.grids, both.budget) == ((Grid.parse("int3-row"),), "3.5bpw")


def test_measure_and_allocate_are_tables() -> None:
    text = (
        "budget = '4bpw, 110MB'\nprofile = 'vllm'\nminimum = ['*.v_proj=4']\nouter = true\n"
        "nats = true\n[allocate]\nuse = 'threshold'\nby = 'block'\n[measure]\nuse = 'error'\n"
    )
    recipe = Recipe.parse(text + GPTQ, "here")
    assert recipe.measure == methods.get("error")()
    assert recipe.allocate == allocators.get("threshold")(by="block")
    assert (recipe.profile, recipe.outer, recipe.nats) == ("vllm", True, True)
    assert recipe.budgets == ("4bpw", "110MB")
    assert recipe.minimums == {"*.v_proj": 4}
    assert Recipe.parse(recipe.text(), "there") == recipe
    assert recipe.adapt(profile="gguf").profile == "gguf"
    bare = Recipe.parse(GPTQ, "here")
    assert (bare.measure, bare.allocate, bare.budgets) == (None, None, ("4bpw",))
    assert "[measure]" not in bare.text()


@dataclass(frozen=True, kw_only=True)
class Example:
    """Options of the kinds that stages have."""

    count: int  # how often
    # first line,
    # second line
    share: float = 0.5
    where: Path | None = None
    grid: Grid | None = None  # any


def test_construct_and_plain_are_inverse() -> None:
    made = construct(Example, {"count": 2, "where": "a/b", "grid": "int4-g64-z"}, "x")
    assert made == Example(count=2, where=Path("a/b"), grid=Grid.parse("int4-g64-z"))
    assert construct(Example, plain(made), "x") == made
    with pytest.raises(ValueError, match="missing key 'count'"):
        construct(Example, {}, "x")


def test_describe_reads_defaults_and_comments() -> None:
    options = {option.name: option for option in describe(Example)}
    assert list(options) == ["count", "share", "where", "grid"]
    assert options["count"] == ("count", "int", "", "how often")
    assert options["share"] == ("share", "float", "0.5", "first line, second line")


@pytest.mark.parametrize("name", [*methods.names(), *allocators.names()])
def test_every_option_of_every_method_is_explained(name: str) -> None:
    options = describe((methods if name in methods.names() else allocators).get(name))
    assert all(option.why and option.default for option in options), options
