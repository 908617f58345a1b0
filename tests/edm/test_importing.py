"""Pickles of the published structure become our network; those that want to execute something are refused."""

import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

from pipeline.artifacts import digest_file, read_json
from pipeline.edm.importing import LICENCE, import_edm
from pipeline.edm.network import NetworkParams, UNet, build_unet
from pipeline.edm.pickles import read_pickle
from pipeline.images import ImageStore, write_store
from pipeline.params import InputError
from stages.generator import main as generate
from stages.synthesize import main as synthesize
from tests.edm.published import Persistent, inputs, perturbed, published, write_pickle

NETWORK = NetworkParams(
    channels=8, multipliers=(1, 2), blocks=2, attention_resolutions=(4,), dropout=0.1, adaptive_scale=False
)  # fmt: skip


@pytest.fixture(scope="module")
def net() -> UNet:
    return perturbed(build_unet(NETWORK, (8, 8, 3), 4, 0))


@pytest.fixture(scope="module")
def file(net: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pickle(tmp_path_factory.mktemp("published") / "edm-tiny-cond-vp.pkl", published(net))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    images = torch.zeros(8, 8, 8, 3, dtype=torch.uint8).numpy()
    labels = torch.arange(8).numpy() % 4
    return write_store(
        tmp_path / "train", [(images, labels)], classes=("a", "b", "c", "d"), shape=(8, 8, 3), shard_rows=9, origin={}
    )


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("augment_dim", [0, 9])
def test_the_imported_network_computes_what_the_published_one_does(
    net: UNet, tmp_path: Path, protocol: int, augment_dim: int
) -> None:
    source = write_pickle(tmp_path / "a.pkl", published(net, augment_dim), protocol)
    assert "torch_utils" not in sys.modules
    made = import_edm(source, tmp_path / "out")
    assert NetworkParams.model_validate(made["network"]) == NETWORK
    assert made["origin"]["sha256"] == digest_file(source)
    from pipeline.edm import load_generator

    classes = tuple(made["classes"])
    loaded = load_generator(tmp_path / "out", torch.device("cpu"), classes=classes, shape=(8, 8, 3))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.net.state_dict().items())
    torch.testing.assert_close(loaded.net(*inputs(net)), net(*inputs(net)))
    assert not [name for name in sys.modules if name.startswith(("torch_utils", "dnnlib"))]


def test_the_licence_is_in_every_store_that_is_drawn(
    file: Path, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = import_edm(file, Path("imported"))
    source = {"kind": "edm", "num_images": 6, "batch_size": 3, "seed": 0, "sampler": {"num_steps": 2}}
    params = {
        "generator": {"kind": "imported", "path": "imported", "digest": made["digest"]},
        "synthesize": {"source": source, "shard_rows": 4},
        "execution": {"device": "cpu"},
    }
    YAML(typ="safe").dump(params, Path("params.yaml"))
    generate(store.path, Path("generator"))
    synthesize(store.path, Path("generator"), Path("guide"), Path("synthetic"))
    assert read_json(Path("generator/generator.json"))["classes"] == list(store.classes)
    assert ImageStore.open(Path("synthetic")).origin["licence"] == LICENCE == "CC BY-NC-SA 4.0"


def test_an_imported_network_must_be_the_one_of_its_digest_and_of_the_images(
    file: Path, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = import_edm(file, Path("imported"))
    section = {"kind": "imported", "path": "imported", "digest": "0" * 64}
    YAML(typ="safe").dump({"generator": section}, Path("params.yaml"))
    with pytest.raises(InputError, match=r"wanted the SHA-256 generator\.digest, 0000"):
        generate(store.path, Path("generator"))
    YAML(typ="safe").dump({"generator": section | {"digest": made["digest"]}}, Path("params.yaml"))
    few = write_store(tmp_path / "few", [], classes=("a", "b"), shape=(8, 8, 3), shard_rows=9, origin={})
    with pytest.raises(InputError, match=r"wanted a generator of images and number of classes \(\[8, 8, 3\], 2\), got"):
        generate(few.path, Path("generator"))
    with pytest.raises(InputError, match="wanted a new folder"):
        import_edm(file, Path("imported"))


class Hostile:
    """Unpickled by pickle.load, it calls function(*arguments)."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Hostile(os.system, "touch mark"), "posix.system"),
        (Hostile(eval, "open('mark', 'w')"), "builtins.eval"),
        (Hostile(exec, "open('mark', 'w')"), "builtins.exec"),
        (Hostile(getattr, "a", "upper"), "builtins.getattr"),
        (Hostile(torch.load, "mark"), "torch.serialization.load"),
        (Hostile(__import__, "mark"), "builtins.__import__"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (torch.device("cpu"), "torch.device"),
    ],
)
def test_a_pickle_that_names_anything_else_is_refused_and_nothing_happens(
    content: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for wrapped in (content, {"ema": Persistent("EDMPrecond", model=content)}):
        source = write_pickle(tmp_path / "hostile.pkl", wrapped)
        with pytest.raises(InputError, match=rf"refused, because it names {named.replace('.', '[.]')}"):
            import_edm(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pkl"]


def storage_call(data: Any) -> bytes:
    """torch.storage._load_from_bytes(data)."""
    return b"\x80\x03ctorch.storage\n_load_from_bytes\n" + pickle.dumps(data, 3)[2:-1] + b"\x85R."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02cposix\nsystem\n(X\x0a\x00\x00\x00touch marktR.", r"a tensor: refused, because it names posix\.system"),
        (b"not a pickle", "not a readable pickle"),
        (b"", "not a readable pickle"),
        (7, "wanted the bytes of a storage, got int"),
    ],
)
def test_what_hides_in_the_bytes_of_a_tensor_is_refused_too(
    data: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.pkl").write_bytes(storage_call(data))
    with pytest.raises(InputError, match=message):
        read_pickle(tmp_path / "hostile.pkl")
    assert not Path("mark").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02X\x04\x00\x00\x00name\x51.", "refers to data outside the file"),  # BINPERSID
        (b"\x80\x02\x82\x01.", "unregistered extension code"),
        (b"\x80\x02N}X\x01\x00\x00\x00ab.", "not a readable pickle"),  # BUILD on None
        (b"\x80\x02ccollections\nOrderedDict\n)R(X\x0a\x00\x00\x00__reduce__Nsb.", "not a readable pickle"),
        (b"PK\x03\x04", "not a readable pickle"),
    ],
)
def test_other_ways_out_of_a_pickle_are_closed(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "hostile.pkl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_pickle(tmp_path / "hostile.pkl")


def test_what_one_pickle_writes_to_the_stand_ins_is_not_there_for_the_next(file: Path, tmp_path: Path) -> None:
    """BUILD on the function that rebuilds tensors and on the class of dicts: only copies of this load are changed."""
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict"):
        content = b"\x80\x02c" + name + b"\nN}X\x0c\x00\x00\x00__setstate__Ns\x86b."
        (tmp_path / "hostile.pkl").write_bytes(content)
        read_pickle(tmp_path / "hostile.pkl")
    import_edm(file, tmp_path / "out")


def changed(net: UNet, change: Any) -> dict[str, Any]:
    content = published(net)
    change(content["ema"])
    return content


def reshape(module: Any, *shape: int) -> None:
    module.weight = nn.Parameter(torch.zeros(shape))


def cut(module: Any, name: str) -> None:
    del module._parameters[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ema: cut(ema.model.enc["4x4_block0"].conv1, "bias"), "enc.4x4_block0.conv1.bias is missing"),
        (lambda ema: reshape(ema.model.map_layer0, 2, 2), r"map_layer0\.weight has the shape \(2, 2\)"),
        (lambda ema: setattr(ema.model, "extra", nn.Parameter(torch.zeros(2))), r"model\.extra has no place in our U-Net"),
        (lambda ema: ema.model.map_noise.register_buffer("freqs", torch.zeros(4)), r"map_noise\.freqs has no place .*-ve"),
        (lambda ema: ema.model.map_layer0.weight.data.fill_(torch.nan), "map_layer0.weight is not finite"),
        (lambda ema: setattr(ema, "label_dim", 0), "class-conditional"),
        (lambda ema: setattr(ema, "class_name", "VPPrecond"), r"wanted .*EDMPrecond\), got VPPrecond"),
        (lambda ema: setattr(ema.model, "class_name", "DhariwalUNet"), "wanted a SongUNet, .* got DhariwalUNet"),
        (lambda ema: setattr(ema.model.dec["4x4_in0"], "num_heads", 4), "4 heads of attention, our U-Net one"),
        (lambda ema: setattr(ema.model.enc["4x4_block0"].norm0, "eps", 1e-5), "groups and eps"),
        (lambda ema: ema.model.enc["4x4_down"].conv0.resample_filter.fill_(1.0), "another filter"),
        (lambda ema: delattr(ema, "img_resolution"), "KeyError: 'img_resolution'"),
        (lambda ema: setattr(ema, "img_resolution", 16), "wanted a network for images of 16 pixels"),
    ],
)  # fmt: skip
def test_a_network_that_is_not_ours_is_named_and_nothing_is_written(
    net: UNet, tmp_path: Path, change: Any, message: str
) -> None:
    source = write_pickle(tmp_path / "other.pkl", changed(net, change))
    with pytest.raises(InputError, match=message):
        import_edm(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_views_of_a_storage_are_read_and_those_beyond_it_are_not(tmp_path: Path) -> None:
    numbers = torch.arange(12.0)
    source = write_pickle(tmp_path / "views.pkl", {"a": numbers[2:8].view(2, 3).T, "half": numbers.half()})
    found = read_pickle(source)
    assert torch.equal(found["a"], numbers[2:8].view(2, 3).T)
    assert found["half"].dtype == torch.float16
    beyond = source.read_bytes().replace(b"K\x02K\x03K\x02\x86", b"K\x63K\x03K\x02\x86")  # offset 2 -> 99
    assert beyond != source.read_bytes()
    source.write_bytes(beyond)
    with pytest.raises(InputError, match="out of bounds"):
        read_pickle(source)


def test_a_storage_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    source = write_pickle(tmp_path / "a.pkl", torch.arange(3.0))
    content = source.read_bytes()
    count = struct.pack("<q", 3)
    assert content.count(count) == 1
    source.write_bytes(content.replace(count, struct.pack("<q", 4)))
    with pytest.raises(InputError, match="wanted 3 numbers"):
        read_pickle(source)


def test_the_official_cifar10_network_has_a_place_for_each_of_its_tensors(tmp_path: Path) -> None:
    """DDPM++ as in table 7 of the paper, at an eighth of its width so that the test is quick."""
    params = NetworkParams(
        channels=16, multipliers=(2, 2, 2), blocks=4, attention_resolutions=(16,), dropout=0.13, adaptive_scale=False
    )
    net = build_unet(params, (32, 32, 3), 10, 0)
    made = import_edm(write_pickle(tmp_path / "a.pkl", published(net)), tmp_path / "out")
    assert NetworkParams.model_validate(made["network"]) == params
