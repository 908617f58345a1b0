"""Pickles of the published structure become our network; those that want to execute something are refused."""

import contextlib
import math
import os
import pickle
import resource
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

from pipeline.artifacts import digest_file, read_json
from pipeline.edm import pickles
from pipeline.edm.importing import LICENCE, import_edm, network_params, rename
from pipeline.edm.network import NetworkParams, UNet, build_unet
from pipeline.edm.pickles import Module, Storage, StoredTensor, read_pickle
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.params import InputError
from stages.generator import main as generate
from stages.synthesize import main as synthesize
from tests.edm.cifar10_cond_vp import cifar10_cond_vp
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
        (b"Pname\n.", "has the opcode PERSID"),
        (b"\x80\x02\x82\x01.", "has the opcode EXT1"),
        (b"\x80\x02\x83\x01\x00.", "has the opcode EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "has the opcode EXT4"),
        (b"(X\x0a\x00\x00\x00touch markiposix\nsystem\n.", "has the opcode INST"),
        (b"(icollections\nOrderedDict\n.", "has the opcode INST"),
        (b"(ccollections\nOrderedDict\no.", "has the opcode OBJ"),
        (b"(cposix\nsystem\nX\x0a\x00\x00\x00touch marko.", r"names posix\.system"),  # OBJ
        (b"\x80\x02cposix\nsystem\nX\x0a\x00\x00\x00touch mark\x85\x81.", r"names posix\.system"),  # NEWOBJ
        (b"\x80\x02N)\x81.", "wanted a name and its arguments"),  # NEWOBJ of None
        (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "has the opcode NEWOBJ_EX"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", r"names posix\.system"),  # STACK_GLOBAL
        (b"\x80\x04]]\x93.", "wanted the name of a class"),  # STACK_GLOBAL of lists
        (b"\x80\x02N}X\x01\x00\x00\x00ab.", "not a readable pickle"),  # BUILD on a text
        (b"\x80\x02ccollections\nOrderedDict\n)R(X\x0a\x00\x00\x00__reduce__Nsb.", "not a readable pickle"),
        (b"\x80\x02cbuiltins\nset\nN}b.", "changes a NoneType"),
        (b"\x80\x02}((tNu.", "wanted a dict with names or numbers as keys"),  # a tuple as a key
        (b"\x80\x02.", "not a readable pickle"),
        (b"\x80\x02N", "not a readable pickle"),
        (b"PK\x03\x04", "not a readable pickle"),
    ],
)
def test_other_ways_out_of_a_pickle_are_closed(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hostile.pkl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_pickle(Path("hostile.pkl"))
    assert not Path("mark").exists()


def test_what_one_pickle_writes_to_the_stand_ins_is_not_there_for_the_next(file: Path, tmp_path: Path) -> None:
    """BUILD on the function that rebuilds tensors and on the class of dicts: neither changes."""
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict"):
        content = b"\x80\x02c" + name + b"\n}X\x0c\x00\x00\x00__setstate__Nsb."
        (tmp_path / "hostile.pkl").write_bytes(content)
        with pytest.raises(InputError, match="refused, because it changes a Name"):
            read_pickle(tmp_path / "hostile.pkl")
    import_edm(file, tmp_path / "out")


MIB = 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memoised_storage(count: int) -> bytes:
    """Opcodes that leave _load_from_bytes and its arguments on the stack, memo 0 and 1."""
    data = torch.zeros(count).__reduce_ex__(3)[1][0].__reduce__()[1][0]
    return b"ctorch.storage\n_load_from_bytes\nq\x00B" + struct.pack("<I", len(data)) + data + b"\x85q\x01"


def nested(base: bytes, levels: int = 60) -> bytes:
    """Opcodes of a pair of twice the pair below it, and so on: a few hundred bytes, 2^60 values when it is written out."""
    return base + b"q\x00h\x00\x86" * levels


def view(shape: int, stride: int) -> bytes:
    """Arguments after the storage: offset 0, that size and stride."""
    return b"K\x00J" + struct.pack("<i", shape) + b"\x85K" + bytes([stride]) + b"\x85\x89ccollections\nOrderedDict\n)Rt"


META = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(X\x04\x00\x00\x00typeX\x05\x00\x00\x00class"
BOMBS: dict[str, tuple[bytes, str | None]] = {
    "a tensor of stride 0": (
        b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n(" + memoised_storage(1) + b"R" + view(2**28, 0) + b"R.",
        "out of bounds",
    ),
    "a huge place in the memo": (b"\x80\x02Nr\xff\xff\xff\x3f.", None),
    "one storage many times": (b"\x80\x03(" + memoised_storage(MIB // 4) + b"h\x00h\x01R" * 1000 + b"t.", None),
    "one storage in many tensors": (
        b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\nq\x02(" + memoised_storage(MIB // 4) + b"Rq\x03" + view(MIB // 4, 1)
        + b"q\x04(" + b"h\x02h\x04R" * 1000 + b"t.",
        "together no larger than the file",
    ),
    "one dict many times": (
        b"\x80\x03ccollections\nOrderedDict\nq\x00}(" + b"".join(b"J" + struct.pack("<i", k) + b"N" for k in range(10_000))
        + b"u\x85q\x01(" + b"h\x00h\x01R" * 1000 + b"t.",
        "not a readable pickle",
    ),
    "one state many times": (
        b"\x80\x03(ctorch.nn.modules.container\nModuleDict\nq\x00}("
        + b"".join(b"J" + struct.pack("<i", k) + b"N" for k in range(10_000))
        + b"uq\x01(" + b"h\x00)\x81h\x01b" * 1000 + b"tt.",
        None,
    ),
    "a class name of lists in lists": (
        b"\x80\x03" + META + b"X\x0a\x00\x00\x00class_name" + nested(b"]") + b"X\x05\x00\x00\x00state}u\x85R.",
        "wanted the state of a class",
    ),
    "a set of tuples in tuples": (b"\x80\x04\x8f(" + nested(b")") + b"\x90.", None),
    "a name of tuples in tuples": (b"\x80\x04" + nested(b")") + b"h\x00\x93.", "wanted the name of a class"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory_and_time_whatever_it_says(name: str, tmp_path: Path) -> None:
    content, message = BOMBS[name]
    (tmp_path / "bomb.pkl").write_bytes(content)
    before, begin = peak_mib(), time.perf_counter()
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        read_pickle(tmp_path / "bomb.pkl")
    assert peak_mib() - before < 100
    assert time.perf_counter() - begin < 20


def test_a_file_of_more_opcodes_than_a_network_needs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 100)
    (tmp_path / "long.pkl").write_bytes(b"\x80\x02(" + b"N" * 100 + b"t.")
    with pytest.raises(InputError, match="more than 100 opcodes"):
        read_pickle(tmp_path / "long.pkl")


def test_a_state_for_a_tensor_is_refused(tmp_path: Path) -> None:
    """BUILD on a tensor reaches Tensor.__setstate__ in torch, which can give it memory that nothing was written to."""
    content = write_pickle(tmp_path / "a.pkl", torch.arange(3.0)).read_bytes()
    (tmp_path / "a.pkl").write_bytes(content[:-1] + b"(NK\x00K\x08\x85K\x01\x85tb.")
    with pytest.raises(InputError, match="changes a StoredTensor"):
        read_pickle(tmp_path / "a.pkl")


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
        (lambda ema: setattr(ema, "label_dim", 2**30), r"map_label\.weight has the shape \(8, 4\) instead of \(8, 1073741"),
        (lambda ema: setattr(ema, "img_channels", 2**20), r"8x8_conv\.weight has the shape \(8, 3, 3, 3\) instead of"),
        (lambda ema: setattr(ema, "label_dim", -1), "wanted a whole number as label_dim"),
        (lambda ema: setattr(ema, "sigma_data", 0.0), "wanted a number above 0 as sigma_data"),
        (lambda ema: reshape(ema.model.enc["8x8_conv"], 0, 3, 3, 3), "wanted sizes above 0"),
        (lambda ema: setattr(ema.model.enc["4x4_block0"], "skip_scale", 1.0), "block0 has the skip_scale 1, our U-Net 0.7"),
        (lambda ema: delattr(ema.model.enc["4x4_block0"], "skip_scale"), "KeyError: 'skip_scale'"),
        (lambda ema: setattr(ema.model.map_noise, "endpoint", False), "map_noise has other frequencies than endpoint: true"),
        (lambda ema: setattr(ema.model.map_noise, "max_positions", 100), "other frequencies .* max_positions: 10000"),
        (lambda ema: setattr(ema.model, "twice", ema.model.map_layer0), "got one twice"),
        (lambda ema: setattr(ema.model, "x" * 101, nn.Parameter(torch.zeros(2))), "names of at most 100 letters"),
        (lambda ema: ema.model.map_layer1.register_parameter("bias", ema.model.map_layer0.bias), "has another name besides"),
    ],
)  # fmt: skip
def test_a_network_that_is_not_ours_is_named_and_nothing_is_written(
    net: UNet, tmp_path: Path, change: Any, message: str
) -> None:
    source = write_pickle(tmp_path / "other.pkl", changed(net, change))
    before = peak_mib()
    with pytest.raises(InputError, match=message):
        import_edm(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other.pkl"]
    assert peak_mib() - before < 100


def test_modules_that_share_their_children_end_the_walk_soon(tmp_path: Path) -> None:
    module = Persistent("Linear")
    for _ in range(40):
        above = Persistent("Linear")
        above.a = above.b = module
        module = above
    source = write_pickle(tmp_path / "shared.pkl", {"ema": Persistent("EDMPrecond", model=module)})
    module.class_name = "SongUNet"
    with pytest.raises(InputError, match="wanted a tree of modules, got one twice or more than 8 deep"):
        list(read_pickle(source)["ema"].modules())


def test_a_full_disk_is_one_message_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    """A file that may not grow stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match="out: could not be written .*make room or give another folder"):
            import_edm(file, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_views_of_a_storage_are_read_and_those_beyond_it_are_not(tmp_path: Path) -> None:
    numbers = torch.arange(12.0)
    source = write_pickle(tmp_path / "views.pkl", {"a": numbers[2:8].view(2, 3).T, "half": numbers.half()})
    found = read_pickle(source)
    assert torch.equal(found["a"].read(), numbers[2:8].view(2, 3).T)
    assert torch.equal(found["half"].read(), numbers.half())
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


def test_the_published_cifar10_network_has_a_place_for_each_of_its_tensors() -> None:
    """Its names and shapes are written down apart from our network, see tests/edm/cifar10_cond_vp.py."""
    published_shapes = {f"model.{name}": shape for name, shape in cifar10_cond_vp().items()}
    trained = {name: math.prod(shape) for name, shape in published_shapes.items() if not name.endswith("resample_filter")}
    assert sum(trained.values()) == pytest.approx(56e6, rel=0.01)  # table 7 of the paper
    storage = Storage(b"", 0, 0, torch.float32)
    renamed = rename({name: StoredTensor(storage, 0, shape, ()) for name, shape in published_shapes.items()}, "a.pkl")
    network = Module({"label_dropout": 0, "_modules": {"b": Module({"dropout": 0.13}, "UNetBlock")}}, "SongUNet")
    params = network_params(network, renamed, 32)
    assert params == NetworkParams(
        channels=128, multipliers=(2, 2, 2), blocks=4, attention_resolutions=(16,), dropout=0.13, adaptive_scale=False
    )
    with torch.device("meta"):
        ours = build_unet(params, (32, 32, 3), 10, 0)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()
    }
