"""Names and shapes of the tensors of the network in edm-cifar10-32x32-cond-vp.pkl, below EDMPrecond.model.

Written from SongUNet and UNetBlock in training/networks.py and the arguments that train.py gives them for --arch=ddpmpp, of
github.com/NVlabs/edm at commit 0a2ff34 (facts alone), not from our network: 128 channels, multipliers 2, 2, 2, 4 blocks,
attention at 16, adaptive_scale off, 10 classes and 9 labels of augmentations.
"""

Shapes = dict[str, tuple[int, ...]]
EMBEDDING = 512
# name, channels in and out, what else the block has
BLOCKS = """
enc.32x32_block0 128 256 skip
enc.32x32_block1 256 256
enc.32x32_block2 256 256
enc.32x32_block3 256 256
enc.16x16_down 256 256 skip filter
enc.16x16_block0 256 256 attention
enc.16x16_block1 256 256 attention
enc.16x16_block2 256 256 attention
enc.16x16_block3 256 256 attention
enc.8x8_down 256 256 skip filter
enc.8x8_block0 256 256
enc.8x8_block1 256 256
enc.8x8_block2 256 256
enc.8x8_block3 256 256
dec.8x8_in0 256 256 attention
dec.8x8_in1 256 256
dec.8x8_block0 512 256 skip
dec.8x8_block1 512 256 skip
dec.8x8_block2 512 256 skip
dec.8x8_block3 512 256 skip
dec.8x8_block4 512 256 skip
dec.16x16_up 256 256 skip filter
dec.16x16_block0 512 256 skip
dec.16x16_block1 512 256 skip
dec.16x16_block2 512 256 skip
dec.16x16_block3 512 256 skip
dec.16x16_block4 512 256 skip attention
dec.32x32_up 256 256 skip filter
dec.32x32_block0 512 256 skip
dec.32x32_block1 512 256 skip
dec.32x32_block2 512 256 skip
dec.32x32_block3 512 256 skip
dec.32x32_block4 384 256 skip
"""


def cifar10_cond_vp() -> Shapes:
    """Name -> shape."""
    shapes: Shapes = {"map_augment.weight": (128, 9)}
    shapes |= layer("map_label", 128, 10) | layer("map_layer0", 512, 128) | layer("map_layer1", 512, 512)
    shapes |= (
        layer("enc.32x32_conv", 128, 3, 3, 3) | layer("dec.32x32_aux_norm", 256) | layer("dec.32x32_aux_conv", 3, 256, 3, 3)
    )
    for line in BLOCKS.split("\n")[1:-1]:
        name, inputs, outputs, *more = line.split()
        shapes |= block(name, int(inputs), int(outputs), more)
    return shapes


def layer(name: str, *weight: int) -> Shapes:
    """A weight and a bias of as many numbers as the weight has rows."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def block(name: str, inputs: int, outputs: int, more: list[str]) -> Shapes:
    shapes = layer(f"{name}.norm0", inputs) | layer(f"{name}.conv0", outputs, inputs, 3, 3)
    shapes |= layer(f"{name}.affine", outputs, EMBEDDING)
    shapes |= layer(f"{name}.norm1", outputs) | layer(f"{name}.conv1", outputs, outputs, 3, 3)
    if "skip" in more:
        shapes |= layer(f"{name}.skip", outputs, inputs, 1, 1)
    if "filter" in more:
        shapes |= {f"{name}.conv0.resample_filter": (1, 1, 2, 2), f"{name}.skip.resample_filter": (1, 1, 2, 2)}
    if "attention" in more:
        shapes |= layer(f"{name}.norm2", outputs) | layer(f"{name}.qkv", 3 * outputs, outputs, 1, 1)
        shapes |= layer(f"{name}.proj", outputs, outputs, 1, 1)
    return shapes
