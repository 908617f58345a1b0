"""The ingest stage: params.yaml and a source in, both stores or nothing out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.artifacts import digest_file, read_json
from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.sources import open_source
from pipeline.sources.digits import DigitsParams
from pipeline.sources.source import SplitName
from pipeline.verify import verify
from stages.ingest import IngestParams, main
from tests.conftest import ROOT
from tests.sources.samples import encode, pixels

DIGITS = {"kind": "digits", "test_fraction": 0.2, "seed": 0}
SECTION = {"source": DIGITS, "max_train": None, "max_test": None, "seed": 0, "shard_rows": 500}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ingest(path: str = "data/real", **changes: object) -> dict[str, str]:
    """Run the stage; digest of every file written."""
    YAML(typ="safe").dump({"ingest": SECTION | changes}, Path("params.yaml"))
    main(Path(path))
    return {str(file.relative_to(path)): digest_file(file) for file in sorted(Path(path).rglob("*")) if file.is_file()}


def test_all_digits_go_into_two_stores() -> None:
    ingest()
    source = open_source(DigitsParams(kind="digits"))
    for name, split in source.splits.items():
        store = ImageStore.open(Path("data/real") / name)
        images, labels = (np.concatenate(parts) for parts in zip(*split(), strict=True))
        np.testing.assert_array_equal(store.batch(np.arange(len(store))), images)
        np.testing.assert_array_equal(store.labels, labels)
        assert read_json(store.path / "store.json")["origin"] == source.origin
    assert ImageStore.open(Path("data/real/train")).shard_counts == (500, 500, 438)


def test_the_same_parameters_give_the_same_bytes() -> None:
    assert ingest("a/real") == ingest("b/real")


def test_a_maximum_keeps_a_stratified_part_in_the_order_of_the_source() -> None:
    ingest(max_train=200, max_test=100)
    source = open_source(DigitsParams(kind="digits"))
    limits: dict[SplitName, int] = {"train": 200, "test": 100}
    for name, limit in limits.items():
        store = ImageStore.open(Path("data/real") / name)
        everything = next(iter(source.splits[name]()))[0].reshape(-1, 64).tolist()
        rows = [everything.index(image) for image in store.batch(np.arange(limit)).reshape(-1, 64).tolist()]
        assert len(store) == limit
        assert rows == sorted(rows)
        assert np.abs(np.bincount(store.labels) - limit / 10).max() <= 1
        assert read_json(store.path / "store.json")["origin"]["max_rows"] == limit


def test_a_maximum_above_the_count_keeps_all() -> None:
    ingest(max_test=10_000)
    assert len(ImageStore.open(Path("data/real/test"))) == 359


def test_a_test_split_that_cannot_be_read_leaves_no_train_store_and_the_old_stores_in_place() -> None:
    before = ingest()
    images = np.zeros((4, 2, 2, 3), np.uint8)
    np.savez("train.npz", image=images, label=np.arange(4))
    np.savez_compressed(
        "test.npz", image=np.random.default_rng(0).integers(0, 256, (400, 2, 2, 3), np.uint8), label=np.zeros(400, int)
    )
    content = bytearray(Path("test.npz").read_bytes())
    content[2000:2100] = b"\xff" * 100
    Path("test.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"test\.npz: not a readable \.npz file"):
        ingest(source={"kind": "npz", "train": ["train.npz"], "test": ["test.npz"]})
    assert [path.name for path in Path("data").iterdir()] == ["real"]
    assert {
        str(file.relative_to("data/real")): digest_file(file) for file in Path("data/real").rglob("*") if file.is_file()
    } == before


def folder_with_damage() -> dict[str, object]:
    images = pixels(12)
    for row, image in enumerate(images):
        file = Path("images") / "train" / ("ant", "bee")[row % 2] / f"{row:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image)[: 30 if row in (4, 9) else None])
    return {"kind": "imagefolder", "root": "images", "test": None, "test_fraction": 0.25, "seed": 1}


def test_corrupt_images_are_left_out_listed_and_limited() -> None:
    source = folder_with_damage()
    with pytest.raises(InputError, match=r"\d\d\.png: not a readable image .* raise max_corrupt \(now 0\)"):
        ingest(source=source)
    assert not Path("data").exists() or not list(Path("data").iterdir())
    ingest(source=source, max_corrupt=2)
    listed = [read_json(Path("data/real") / name / "corrupt.json") for name in ("train", "test")]
    names = ["ant/00.png", "ant/02.png", "ant/04.png", "ant/06.png", "ant/08.png", "ant/10.png"]
    names += ["bee/01.png", "bee/03.png", "bee/05.png", "bee/07.png", "bee/09.png", "bee/11.png"]
    assert sorted(entry["image"] for entries in listed for entry in entries) == [f"images/train/{names[i]}" for i in (2, 10)]
    assert sorted(entry["source_row"] for entries in listed for entry in entries) == [2, 10]
    found = []
    for name in ("train", "test"):
        store = ImageStore.open(Path("data/real") / name)
        rows = np.load(store.path / "source_rows.npy")
        order = [int(names[row][4:6]) for row in rows]
        np.testing.assert_array_equal(store.batch(np.arange(len(store))), pixels(12)[order])
        assert verify(store.path) == []
        found += rows.tolist()
    assert sorted(found) == [0, 1, 3, 4, 5, 6, 7, 8, 9, 11]


def test_a_part_of_a_shuffled_source_keeps_the_rows_it_came_from() -> None:
    images, labels = pixels(40), np.arange(40) // 10
    np.savez("a.npz", image=images, label=labels)
    np.savez("b.npz", image=images[::10], label=labels[::10])
    ingest(source={"kind": "npz", "train": ["a.npz"], "test": ["b.npz"], "seed": 3, "filtered": True}, max_train=20)
    store = ImageStore.open(Path("data/real/train"))
    rows = np.load(store.path / "source_rows.npy")
    assert rows.tolist() != sorted(rows)
    np.testing.assert_array_equal(store.batch(np.arange(20)), images[rows])
    assert read_json(store.path / "store.json")["origin"]["filtered"] is True


def test_a_full_disk_ends_in_one_line_and_leaves_the_old_stores_in_place(tmp_path: Path) -> None:
    """On a tmpfs in a mount namespace of its own, with the old stores in it and 12 KB left."""
    Path("disk").mkdir()
    YAML(typ="safe").dump({"ingest": SECTION | {"max_train": 20, "max_test": 20}}, Path("params.yaml"))
    Path("all.yaml").write_text(Path("params.yaml").read_text().replace("max_train: 20", "max_train: null"))
    script = (
        "mount -t tmpfs -o size=200k none disk || exit 77; set -e; python=$0\n"
        "$python -m stages.ingest disk/real; find disk -type f | sort | xargs sha256sum > before; mv all.yaml params.yaml\n"
        "head -c 200k /dev/zero > disk/ballast 2> /dev/null || true; truncate -s -12k disk/ballast\n"
        "set +e; $python -m stages.ingest disk/real; status=$?; rm disk/ballast\n"
        "find disk -type f | sort | xargs sha256sum | diff before - || exit 3; exit $status\n"
    )
    run = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", script, sys.executable],
        check=False, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {run.stderr.strip()}")
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stderr.startswith("error: no space is left on the disk"), run.stderr
    assert run.stderr.count("\n") == 1


def test_a_quota_on_the_size_of_a_file_ends_in_one_line_and_publishes_nothing(tmp_path: Path) -> None:
    YAML(typ="safe").dump({"ingest": SECTION}, Path("params.yaml"))
    run = subprocess.run(
        ["bash", "-c", "ulimit -f 20; exec $0 -m stages.ingest data/real", sys.executable],
        check=False, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("error: no space is left on the disk"), run.stderr
    assert not list(Path("data").iterdir())


def test_the_command_ends_in_one_line_when_the_source_is_wrong(tmp_path: Path) -> None:
    YAML(typ="safe").dump({"ingest": SECTION | {"source": {"kind": "npz", "train": ["x"], "test": ["y"]}}}, Path("params.yaml"))
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "stages.ingest", "data/real"],
        check=False, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("error: x: wanted a file, or a glob that matches one, found none below")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"kind": "mnist"},
            "ingest.source: Input tag 'mnist' found using 'kind' does not match any of the expected tags: 'digits'",
        ),
        ({"kind": "digits", "tests": 1}, "ingest.source.digits.tests: no such parameter"),
        ({"kind": "digits", "test_fraction": 1.0}, "ingest.source.digits.test_fraction: Input should be less than 1"),
        ({"kind": "npz", "train": ["a"]}, "ingest.source.npz.test: missing"),
        ({"kind": "parquet", "train": "a", "test": ["b"]}, "ingest.source.parquet.train: Input should be a valid array"),
        ({"kind": "imagefolder", "root": "x", "channels": 4}, "ingest.source.imagefolder.channels: Input should be 1 or 3"),
    ],
)
def test_a_source_is_checked_as_the_other_parameters_are(source: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        IngestParams.from_dict({"ingest": SECTION | {"source": source}})
    assert message in str(error.value)
