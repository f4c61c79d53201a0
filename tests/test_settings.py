import re

import pytest
import yaml
from pydantic import Field, ValidationError

from affekt.data.errors import SettingsError
from affekt.data.settings import Settings, apply_overrides, read_yaml
from affekt.demo import experiment
from affekt.pretrain.settings import PretrainSettings


class Optimiser(Settings):
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = 10


class Run(Settings):
    name: str
    optimiser: Optimiser = Optimiser()
    fine: Optimiser | None = None
    crop_scales: tuple[float, ...] = (1.0, 0.75)


def written(folder, text):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_into_frozen_values(tmp_path):
    run = Run.read(written(tmp_path, "# a comment\nname: täst\noptimiser:\n  learning_rate: 0.01\n"))
    assert run == Run(name="täst", optimiser=Optimiser(learning_rate=0.01))
    with pytest.raises(ValidationError):
        run.name = "other"
    with pytest.raises(ValidationError):
        run.optimiser.learning_rate = 1.0


def test_resolved_values_read_back_equal(tmp_path):
    run = Run(name="täst", fine=Optimiser(warmup_steps=3), crop_scales=(0.5,))
    assert Run.read(written(tmp_path, run.to_yaml())) == run
    assert Run.read(written(tmp_path, run.explained())) == run


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("name: a\noptimizer: {}\n", "optimizer", "did you mean `optimiser`?"),
        ("name: a\noptimiser: {learning_rte: 1}\n", "optimiser.learning_rte", "did you mean `learning_rate`?"),
        ("name: a\nfine: {warmup_step: 1}\n", "fine.warmup_step", "did you mean `warmup_steps`?"),
        ("name: a\nzzz: 1\n", "zzz", "known here: name, optimiser, fine, crop_scales"),
    ],
)
def test_an_unknown_key_names_the_file_and_the_nearest_known_one(tmp_path, text, key, hint):
    path = written(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        Run.read(path)
    assert f"{path}: unknown setting `{key}`" in str(caught.value)
    assert hint in str(caught.value)


def test_a_bad_value_names_key_value_and_limit(tmp_path):
    path = written(tmp_path, "name: a\noptimiser: {learning_rate: -2, warmup_steps: soon}\n")
    with pytest.raises(SettingsError) as caught:
        Run.read(path)
    low, word = str(caught.value).splitlines()
    assert f"{path}: optimiser.learning_rate" in low and "greater than 0" in low and "-2" in low
    assert "optimiser.warmup_steps" in word and "'soon'" in word


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(SettingsError, match="name: Field required"):
        Run.read(written(tmp_path, ""))


def test_overrides_reach_nested_keys_and_leave_the_rest_alone(tmp_path):
    path = written(tmp_path, "name: a\noptimiser: {learning_rate: 0.5, warmup_steps: 7}\n")
    run = Run.read(path, ["optimiser.learning_rate=1e-1", "crop_scales=[1, 0.5]", "fine.warmup_steps=2", "name=b=c"])
    assert run.optimiser == Optimiser(learning_rate=0.1, warmup_steps=7)
    assert run.crop_scales == (1.0, 0.5)
    assert run.fine == Optimiser(warmup_steps=2)
    assert run.name == "b=c"


def test_overrides_do_not_change_what_they_are_applied_to():
    values = {"optimiser": {"warmup_steps": 1}}
    assert apply_overrides(values, ["optimiser.warmup_steps=2"]) == {"optimiser": {"warmup_steps": 2}}
    assert values == {"optimiser": {"warmup_steps": 1}}


@pytest.mark.parametrize("item", ["optimiser.learning_rate", "=1", "crop_scales=[1, 0.5"])
def test_an_override_that_does_not_parse_is_quoted(item):
    with pytest.raises(SettingsError) as caught:
        apply_overrides({}, [item])
    assert f"`{item}`" in str(caught.value)


def test_an_unknown_override_names_the_nearest_key(tmp_path):
    with pytest.raises(SettingsError, match=r"unknown setting `optimiser.learning_rat`; did you mean `learning_rate`"):
        Run.read(written(tmp_path, "name: a\n"), ["optimiser.learning_rat=1"])


def test_a_yaml_mistake_names_file_and_line(tmp_path):
    path = written(tmp_path, "name: a\noptimiser:\n  warmup_steps: [1, 2\ncrop_scales: 1\n")
    with pytest.raises(SettingsError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "line 4" in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "12\n"])
def test_a_file_that_holds_no_mapping_is_refused(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(SettingsError, match="expected `key: value` lines"):
        read_yaml(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: cannot be read"):
        read_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(SettingsError, match=r"latin\.yaml: cannot be read"):
        read_yaml(tmp_path / "latin.yaml")


def test_yaml_cannot_make_objects(tmp_path):
    path = written(tmp_path, "name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(SettingsError, match="not valid YAML"):
        read_yaml(path)


def test_saved_values_may_hold_keys_that_are_not_known_here_and_lack_new_ones():
    saved = {"name": "a", "later": 1, "optimiser": {"learning_rate": 0.5, "newer": {"deep": 2}}}
    assert Run.parse_saved(saved, "state.json") == Run(name="a", optimiser=Optimiser(learning_rate=0.5))
    assert saved["later"] == 1  # the caller's values stay
    with pytest.raises(SettingsError, match=r"state\.json: optimiser\.learning_rate"):
        Run.parse_saved({"name": "a", "later": 1, "optimiser": {"learning_rate": -1}}, "state.json")


def test_every_shipped_experiment_is_explained_line_by_line():
    settings = PretrainSettings.read(experiment("hicmae_base"))
    text = settings.explained()
    assert yaml.safe_load(text) == settings.model_dump(mode="json")
    assert re.search(r"^  contrast_negatives: local   # .*published: local$", text, re.M)


@pytest.mark.parametrize(
    "override, told",
    [
        ("optimiser.warmup_steps=true", "run.yaml: optimiser: warmup_steps is true, which is no value of it"),
        ("fine.learning_rate=false", "fine: learning_rate is false"),
        ("optimiser.learning_rate=.inf", "optimiser.learning_rate: .*finite number"),
        ("optimiser.learning_rate=.nan", "optimiser.learning_rate: "),
    ],
)
def test_truth_and_infinity_are_no_numbers(tmp_path, override, told):
    with pytest.raises(SettingsError, match=told):
        Run.read(written(tmp_path, "name: a"), [override])
