from pathlib import Path

import pytest

from optimizers.errors import RecipeError
from optimizers.recipe import Recipe, Uint8Input, VariantPlan, read_recipe, write_recipe


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_keys_that_are_left_out_have_their_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, 'precisions = ["fp32", "int8"]\nmin_agreement = 0.95\n'))
    assert recipe == Recipe(precisions=("fp32", "int8"), min_agreement=0.95)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("min_agrement = 0.9", "min_agrement"),
        ("min_agreement = 1.5", "min_agreement is 1.5; it must be above 0 and at most 1"),
        ("min_agreement = 'high'", "min_agreement"),
        ("precisions = ['int2']", "int2"),
        ("compressions = ['zip']", "zip"),
        ("objective = 'beauty'", "beauty"),
        ("search_samples = -1", "search_samples"),
        ("[[variants]]\nname = 'a'", "variants"),
        ("precisions = []", "at least one of"),
        ("batch_rows = [4, 2]", "ascending"),
        ("batch_rows = [0, 2]", "ascending"),
        ("batch_rows = []", "ascending"),
        ("max_accuracy_drop = -0.1", "max_accuracy_drop"),
        ("slo_ms = 0.0", "slo_ms"),
        ("calibration_samples = 0", "calibration_samples"),
        ("holdout_samples = 0", "holdout_samples"),
        ("seed = -1", "seed"),
        ("decisions = 'top1'", "decisions"),
        (
            "[decisions]\ny = 'best'",
            "decision of output 'y' is 'best'; it must be one of top1, binary, .*, near, close",
        ),
        ("precisions = [", "recipe.toml"),
    ],
)
def test_unknown_keys_and_values_are_refused_with_the_key(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        read_recipe(write(tmp_path, text))


def test_a_recipe_made_in_code_is_checked_too() -> None:
    with pytest.raises(RecipeError, match="min_agreement is 0"):
        Recipe(min_agreement=0.0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml"):
        read_recipe(tmp_path / "none.toml")


def test_digest_follows_values_and_not_the_layout(tmp_path: Path) -> None:
    one = read_recipe(write(tmp_path, "seed = 1\nmin_agreement = 0.99\n"))
    other = read_recipe(write(tmp_path, "# a comment\nmin_agreement = 0.990\n\nseed = 1\n"))
    assert one.digest() == other.digest()
    assert one.digest() != Recipe(seed=2).digest()


def test_decisions_are_part_of_the_digest() -> None:
    named = Recipe(decisions={"y": "close", "z": "top1"})
    assert named.digest() == Recipe(decisions={"z": "top1", "y": "close"}).digest()
    assert len({named.digest(), Recipe(decisions={"y": "near", "z": "top1"}).digest(), Recipe().digest()}) == 3


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(compressions=(), slo_ms=2.5, decisions={"a/b 'c'": "near", "y": "close"}),
        Recipe(variants=(VariantPlan("a", "fp32", ()),), decisions={"y": "top1"}),
        Recipe(
            uint8_inputs={"x y": Uint8Input(), "z": Uint8Input(mean=(1.0, 2.0), channel_axis=2, channels_last=True)}
        ),
    ],
)
def test_written_recipe_is_read_back(tmp_path: Path, recipe: Recipe) -> None:
    assert read_recipe(write(tmp_path, write_recipe(recipe))) == recipe
