"""dvc.yaml held to the code, recipes held to the stages."""

import inspect
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML
from ruamel.yaml.tokens import AliasToken, AnchorToken

from pipeline import project, recipes
from pipeline.dependencies import code_deps
from pipeline.params import InputError, StageParams, lookup, read_yaml
from tests.conftest import ROOT

STAGES = list(read_yaml(ROOT / "dvc.yaml")["stages"])
PARAMS_FILES = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]
KEYS = (
    *("margin_model.training.epochs", "margin_model.model.arguments.width", "train.training.attack.num_steps"),
    *("train.training.epochs", "train.model.arguments.width", "ingest.source.size", "synthesize.source.source.size"),
    *("strategies.puma.eps.scale", "strategies.puma-50.eps.scale", "strategies.adaptive_eps.eps.scale"),
    *("guide.training.epochs", "perceptron.dimension"),
)


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all that is no mapping."""
    for key, value in node.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


SETTABLE = [(path, key) for path in PARAMS_FILES for key in leaves(read_yaml(path)) if key in KEYS]


def body(stage: str) -> dict[str, list[str]]:
    entry = read_yaml(ROOT / "dvc.yaml")["stages"][stage]
    found: dict[str, list[str]] = entry.get("do", entry)
    return found


def test_there_is_one_module_per_stage_and_one_stage_per_module() -> None:
    assert sorted(STAGES) == sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_exactly_the_params_it_is_handed(stage: str) -> None:
    templated = {key.replace("${key}", "{strategy}") for key in body(stage)["params"]}
    assert templated == set(project.params_class(stage).keys().values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_exactly_the_modules_it_imports(stage: str) -> None:
    listed = [dep for dep in body(stage)["deps"] if project.is_code(dep)]
    assert listed == code_deps(stage, ROOT), "run `python -m pipeline deps --write`"


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_import_closure_sees_imports_inside_functions_and_leaves_execution_out(tmp_path: Path) -> None:
    files = {
        "stages/a.py": "from pipeline import b\nfrom pipeline.execution import run\n",
        "pipeline/__init__.py": '"""Only words."""\n',
        "pipeline/b.py": "def f():\n    from pipeline.c.d import g\n    return g\n",
        "pipeline/c/__init__.py": "X = 1\n",
        "pipeline/c/d.py": "import numpy\n\n\ndef g(): ...\n",
        "pipeline/execution/__init__.py": "from pipeline.e import h\n",
        "pipeline/e.py": "def h(): ...\n",
    }
    write_files(tmp_path, files)
    assert code_deps("a", tmp_path) == ["pipeline/b.py", "pipeline/c/__init__.py", "pipeline/c/d.py", "stages/a.py"]


def test_the_import_closure_follows_relative_imports(tmp_path: Path) -> None:
    files = {
        "stages/a.py": "import nets.wide.top\n",
        "nets/__init__.py": "from .blocks import Block\n",
        "nets/blocks.py": "Block = 1\n",
        "nets/other.py": "unused = 1\n",
        "nets/wide/__init__.py": "",
        "nets/wide/top.py": "from . import side\nfrom .. import deep\nfrom ..deeper import thing\n",
        "nets/wide/side.py": "side = 1\n",
        "nets/deep.py": "deep = 1\n",
        "nets/deeper.py": "thing = 1\n",
    }
    write_files(tmp_path, files)
    wanted = set(files) - {"nets/other.py", "nets/wide/__init__.py"}  # the latter says nothing
    assert set(code_deps("a", tmp_path)) == wanted


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_names_only_declared_paths_and_fits_the_main_of_the_stage(stage: str) -> None:
    declared = body(stage)
    command = shlex.split(str(declared["cmd"]))
    assert command[:4] == ["exec", "python", "-m", f"stages.{stage}"]
    paths = [word for word in command[4:] if word.startswith("data/")]
    assert set(paths) == {path for path in [*declared["deps"], *declared["outs"]] if path.startswith("data/")}
    module = inspect.getmodule(project.params_class(stage))
    main = inspect.signature(module.main)  # type: ignore[union-attr]
    assert len(main.parameters) == len(command) - 4
    assert len(inspect.getsource(module.main).splitlines()) <= 30  # type: ignore[union-attr]


def test_no_resource_is_a_param_of_a_stage_or_templated_into_a_command() -> None:
    text = (ROOT / "dvc.yaml").read_text()
    assert "execution" not in re.sub(r"#.*", "", text)
    assert set(re.findall(r"\$\{([^}]*)\}", text)) == {"key", "item.strategy", "item.seed", "strategies", "seeds"}


def test_stages_import_the_library_and_never_each_other_and_the_library_never_a_stage() -> None:
    for path in [*(ROOT / "stages").glob("*.py"), *(ROOT / "pipeline").rglob("*.py")]:
        imported = re.findall(r"^\s*(?:from|import) (stages\S*)", path.read_text(), re.MULTILINE)
        assert not imported, f"{path} imports {imported}"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_is_valid_for_every_stage(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    project.check_params(recipes.parse(recipes.read(recipe, [])), recipe)


@pytest.mark.parametrize(
    ("recipe", "depth", "width", "epochs", "batch_size", "fraction", "filtered"),
    [
        ("cifar10-edm-1m", 28, 10, 400, 512, 0.7, True),
        ("cifar10-edm-20m", 28, 10, 2400, 2048, 0.8, False),
        ("cifar10-edm-50m-wrn70", 70, 16, 2000, 1024, 0.8, False),
    ],
)
def test_the_published_recipes_have_the_published_settings_each_with_its_source(
    recipe: str, depth: int, width: int, epochs: int, batch_size: int, fraction: float, filtered: bool
) -> None:
    """The table of Wang et al. (arXiv:2302.04638) and of their code, and a comment on every line that could differ."""
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    params = recipes.parse(text)
    training, source = params["train"]["training"], params["synthesize"]["source"]
    assert params["train"]["model"] == {"architecture": "wideresnet", "arguments": {"depth": depth, "width": width}}
    assert (training["epochs"], training["batch_size"], training["synthetic_fraction"]) == (epochs, batch_size, fraction)
    assert (training["loss"], training["beta"], training["label_smoothing"]) == ("trades", 5.0, 0.1)
    assert (training["lr"], training["warmup_fraction"], training["weight_decay"]) == (0.2, 0.025, 5e-4)
    assert (training["ema_decay"], training["holdout"]) == (0.995, 1024)
    assert (training["attack"], training["selection_attack"]) == (
        {"num_steps": 10, "step_size_255": 2}, {"num_steps": 40, "step_size_255": 2}
    )  # fmt: skip
    assert training["attack_batchnorm"] == "batch"
    assert training["augmentation"] == {"crop_padding": 4, "flip": True}
    assert (params["threat"], source["filtered"], source["num_images"]) == ({"norm": "linf", "eps_255": 8}, filtered, None)
    assert (params["evaluate"]["version"], params["ingest"]["max_test"]) == ("standard", None)
    for section in ("seeds", "threat", "ingest", "synthesize", "margin_model", "train", "evaluate"):
        body = re.search(rf"^{section}:.*(?:\n +.*)*", text, re.MULTILINE)
        assert body
        values = [line for line in body[0].splitlines() if re.search(r": [^&*#]", line)]
        assert [line for line in values if " # " not in line] == []


def test_what_the_study_changes_on_a_gpu_gives_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its comment is a list of --set; all but the split of CIFAR-10 and the strategies are then those of cifar10-edm-1m."""
    monkeypatch.chdir(ROOT)
    text = recipes.read("cifar10-study", [])
    assignments = [quoted or plain for quoted, plain in re.findall(r"--set (?:\"([^\"]+)\"|(\S+))", text)]
    larger = recipes.parse(recipes.read("cifar10-study", assignments))
    project.check_params(larger, "cifar10-study on a GPU")
    published = recipes.parse(recipes.read("cifar10-edm-1m", []))
    for stage in ("margin_model", "train", "evaluate"):
        params = project.params_class(stage)
        assert params.from_dict(larger) == params.from_dict(published)
    assert larger["synthesize"]["source"] == published["synthesize"]["source"]
    assert (larger["ingest"]["max_train"], larger["ingest"]["max_test"]) == (None, None)


def test_each_variant_in_the_study_differs_in_one_thing() -> None:
    strategies = read_yaml(ROOT / "recipes" / "cifar10-study.yaml")["strategies"]
    radius = {"rule": "margin", "scale": 1.0}
    changes = {
        **{f"{rule}-50-short": (f"{rule}-50", {"budget": "scaled"}) for rule in ("random", "prune_easy", "prune_hard", "puma")},
        "puma-50-c05": ("puma-50", {"eps": radius | {"scale": 0.5}}),
        "puma-50-c2": ("puma-50", {"eps": radius | {"scale": 2.0}}),
        "puma-50-rank": ("puma-50", {"eps": {"rule": "rank", "q": 0.5}}),
        "puma-50-class": ("puma-50", {"per_class": True}),
        "adaptive_eps": ("none", {"eps": radius}),
        **{f"puma-{keep}": (f"prune_easy-{keep}", {"eps": radius}) for keep in (30, 50, 70)},
    }
    for name, (base, change) in changes.items():
        assert strategies[name] == strategies[base] | change
    rest = {f"{rule}-{keep}" for rule in ("random", "prune_easy", "prune_hard") for keep in (30, 50, 70)}
    assert set(strategies) == {"none", *rest, *changes}


def test_the_default_is_the_digits_recipe() -> None:
    assert (ROOT / "params.yaml").read_text() == (ROOT / "recipes" / "digits.yaml").read_text()


def test_all_strategies_of_the_readme_are_one_line_away() -> None:
    lines = re.findall(r"^    (\w+): (\{(?:score|eps|\}).*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = {name for name, _ in lines}
    wanted = {"none", "random", "prune_easy", "prune_hard", "band", "puma", "adaptive_eps", "logit_margin", "entropy"}
    assert wanted | {"confidence", "el2n", "grand", "top_confidence"} <= names
    params = read_yaml(ROOT / "params.yaml")
    params["strategies"] = {name: recipes.parse(line) for name, line in lines}
    manifest = project.params_class("manifest")
    assert issubclass(manifest, StageParams)
    for name in names:
        manifest.from_dict(params, "README", strategy=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.training.epochs=0", "train.training.epochs: Input should be greater than 0, got 0"),
        ("train.training.epochs='9'", "train.training.epochs: Input should be a valid integer, got '9'"),
        ("train.training.epoch=9", "train.training.epoch: no such parameter; remove it or correct its name"),
        ("strategies.puma.keep=1.5", "strategies.puma.keep: Input should be less than or equal to 1, got 1.5"),
        ("strategies.puma.score=margins", "strategies.puma.score: Input should be 'random', 'margin'"),
        ("strategies.new={score: margin, keep: 0}", "strategies.new.keep: Input should be greater than 0, got 0"),
        ("threat.norm=linfty", "threat.norm: Input should be 'linf' or 'l2', got 'linfty'"),
        ("evaluate.attacks=[]", "evaluate: attacks: version custom wants a list of different attacks, got []"),
        ("execution.device=tpu", "execution.device: Input should be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("ingest.source.kind=zip", "ingest.source"),
        ("strategies={30: {}}", "numbers in quotes), got [30]"),
        ("train.model.architecture=alexnet", "train.model: wanted an architecture out of preactresnet, resnet"),
        ("train.model.arguments={depth: 9}", "train.model: arguments of preactresnet: got an unexpected keyword"),
        ("train.model.arguments={width: 0}", "train.model: preactresnet: wanted at least one block per stage"),
        ("margin_model.model={architecture: vit, arguments: {patch_size: 3}}", "margin_model.model: vit: wanted square images"),
        ("seeds=[a]", "seeds"),
        ("strategies=[]", "wanted a mapping of names to strategies, got []"),
        ("trian={a: 1}", "no stage reads trian, known sections are evaluate, execution"),
    ],
)
def test_a_wrong_key_type_or_range_is_named_before_anything_runs(
    change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as error:
        project.check_params(recipes.parse(recipes.read("digits", [change])), "params.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_keeps_its_comments_and_names_what_it_cannot_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    changed = recipes.read("digits", ["seeds=[0, 1, 2]", "strategies.puma.keep=0.5"])
    assert "# Recipes for other data" in changed
    assert recipes.parse(changed)["seeds"] == [0, 1, 2]
    assert recipes.parse(changed)["strategies"]["puma"]["keep"] == 0.5
    changes = [line for line in recipes.difference(recipes.read("digits", []), changed) if re.match(r"[+-][^+-]", line)]
    assert len(changes) < 20
    for wrong, message in [("seeds", "wanted KEY=VALUE"), ("nothing.at.all=1", "a KEY that the recipe has"), ("a=[", "YAML")]:
        with pytest.raises(InputError, match=message):
            recipes.read("digits", [wrong])
    known = ", ".join(sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
    with pytest.raises(InputError, match=f"wanted one of the recipes {known}; got 'imagenet'"):
        recipes.read("imagenet", [])


@pytest.mark.parametrize("path", PARAMS_FILES, ids=lambda path: path.stem)
def test_sections_are_written_out_with_no_anchor_alias_or_merge(path: Path) -> None:
    """DVC's `--set-param` would change nothing there, or other sections too."""
    tokens = list(YAML(pure=True).scan(path.read_text()))
    assert len(tokens) > 100
    assert not [token for token in tokens if isinstance(token, AnchorToken | AliasToken) or getattr(token, "value", "") == "<<"]


@pytest.mark.parametrize(("path", "key"), SETTABLE, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_setting_one_key_changes_that_key_alone(path: Path, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through DVC's own `exp run --set-param` and through `recipe --set`."""
    wanted = read_yaml(path)
    section = lookup(wanted, key.rpartition(".")[0], path.name)
    section[key.rpartition(".")[2]] = 77
    copied = Path(shutil.copy(path, tmp_path / "params.yaml"))
    apply_overrides(copied, [f"{key}=77"])
    assert read_yaml(copied) == wanted
    monkeypatch.chdir(ROOT)
    assert path.parent == ROOT or recipes.parse(recipes.read(path.stem, [f"{key}=77"])) == wanted


def test_a_key_can_be_set_in_a_mapping_that_was_set_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    changed = recipes.parse(recipes.read("digits", ["strategies={a: {}}", "strategies.a.keep=0.5"]))
    assert changed["strategies"] == {"a": {"keep": 0.5}}


def test_execution_alone_imports_submitit() -> None:
    users = {path for path in ROOT.glob("[ps]*/**/*.py") if re.search(r"^\s*(from|import) submitit", path.read_text(), re.M)}
    assert users
    assert {path.parent for path in users} == {ROOT / "pipeline/execution"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["strategies.puma.score=grand", "margins.grand=false"], "strategies.puma.score: grand wants margins.grand"),
        (["strategies.puma.eps={rule: floor, min_eps_255: 90}"], "eps.min_eps_255: wanted at most threat.eps_255"),
        (
            ["strategies.puma.applies_to=synthetic", "synthesize.source={kind: none}", "synthesize.select={kind: none}"],
            "strategies.puma.applies_to: synthetic wants some",
        ),
        (["threat.eps_255=300"], "eps_255: wanted at most 255"),
        (
            ["evaluate.version=standard", "evaluate.attacks=[apgd-ce]"],
            "version standard wants none, or its own .* got",
        ),
        (["margins.norm=l2"], "strategies.puma: eps rule margin: wanted margins in linf"),
        (["generator={kind: none}"], "synthesize.source.kind: edm wants a generator"),
        (["synthesize.select={kind: class_agreement}"], "synthesize.select: wants a guide"),
        (["execution.stages={trainn: {}}"], "execution.stages.trainn: no such stage"),
        (["execution.stages={train: {timeout_mins: 5}}"], "timeout_mins"),
    ],
)
def test_what_sections_cannot_do_together_is_found_before_anything_runs(changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        project.check_params(recipes.parse(recipes.read("digits", changes)), "params.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        ["threat={norm: l2, eps_255: 300}", "strategies={none: {}}"],
        ["strategies.puma.eps={rule: floor, min_eps_255: 24}"],
        ["evaluate.version=standard", "evaluate.attacks=[]"],
        ["evaluate.version=standard", "evaluate.attacks=[square, fab-t, apgd-t, apgd-ce]"],
        ["evaluate.version=standard", "evaluate.attacks=[apgd-ce, apgd-dlr, fab-t, square]"],
    ],
)
def test_what_only_looks_wrong_is_allowed(changes: list[str]) -> None:
    project.check_params(recipes.parse(recipes.read("digits", changes)), "params.yaml")


def test_the_summary_of_a_recipe_is_the_first_sentence_of_its_comment(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("# Settings of Wang et al. on one\n# machine: all. Never run.\nseeds: [0]  # two\n")
    assert recipes.summary(path) == "Settings of Wang et al. on one machine: all"


def test_unfinished_work_of_a_strategy_whose_name_is_a_number_is_left_over_when_its_process_is_dead(tmp_path: Path) -> None:
    own = os.getpid()
    dead, alive = f".{own}.999999999.tmp", [f".30.{own}.tmp", f".31.{own}.old.tmp"]
    for name in (dead, *alive):
        (tmp_path / "manifests" / name).mkdir(parents=True)
    params = {"strategies": {"30": {}}, "seeds": [0]}
    assert project.leftovers(params, tmp_path) == [tmp_path / "manifests" / dead]
