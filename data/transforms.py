"""Transforms from a PIL image to the model's input: augmentation for training, resizing alone for evaluation."""

from __future__ import annotations

from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import transforms as T

from data.augmentation.draws import Drawer, UnknownAugmentation
from data.augmentation.images import INTERPOLATIONS
from data.base import DataConfig, DataSet, Transform
from data.epoch_order import drawing_from
from data.host_part import CentralCrop, Crop, RandomResizedCrop, ShiftedCrop, shorter_side
from runtime.errors import UserError

SMALL_IMAGE = 32  # up to this input size an image is cropped by a few pixels, not resized at random
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"  # DeiT's choice


def build_transform(config: DataConfig, data_set: DataSet, training: bool) -> Transform:
    """The transform of a split's images. Raises UserError if timm does not know `config.aa`."""
    return _training_transform(config, data_set) if training else _evaluation_transform(config, data_set)


def _training_transform(config: DataConfig, data_set: DataSet) -> T.Compose:
    size = config.input_size
    try:
        transform = create_transform(
            size,
            is_training=True,
            hflip=data_set.flip,
            color_jitter=config.color_jitter or None,
            auto_augment=None if config.aa == "none" else config.aa,
            interpolation=config.preprocessing.interpolation,
            mean=config.preprocessing.mean,
            std=config.preprocessing.std,
            re_prob=config.reprob,
            re_mode="pixel",
        )
        for step in transform.transforms:
            if type(step).__module__ == auto_augment.__name__:
                _let_posterize_keep_no_bits(step)
                # timm accepts some texts whose transform fails when it is used, so it is used once.
                with drawing_from((0,)):
                    step(Image.new("RGB", (32, 32)))
    except (AssertionError, ValueError) as error:
        raise UserError(f"--aa must be none or one of timm's, such as {RAND_AUGMENT}, got {config.aa!r}") from error
    if size <= SMALL_IMAGE:
        resize = T.Resize((size, size), T.InterpolationMode(config.preprocessing.interpolation))
        transform.transforms[0] = T.Compose([resize, T.RandomCrop(size, padding=data_set.padding)])
    return transform


def build_host_part(config: DataConfig, data_set: DataSet, training: bool) -> tuple[Crop, Drawer | None]:
    """The crop of a split's images, and what draws the rest of their augmentation; held-out images have no rest.

    Raises UserError for what batches cannot have on a device.
    """
    size, how = config.input_size, config.preprocessing
    if how.interpolation not in INTERPOLATIONS:
        raise UserError(
            f"--augment-on gpu resizes by {' or '.join(INTERPOLATIONS)} interpolation, this model's is "
            f"{how.interpolation}; pass --augment-on cpu"
        )
    if not training:
        squeezed = size <= SMALL_IMAGE or not data_set.crops_centre
        return CentralCrop(size, None if squeezed else shorter_side(size, how.crop), how.interpolation), None
    transform = _training_transform(config, data_set)
    try:
        drawer = Drawer.of(transform, size)
    except UnknownAugmentation as error:
        raise UserError(
            f"--augment-on gpu augments batches, got --aa {config.aa}: {error}; pass --augment-on cpu"
        ) from error
    if size <= SMALL_IMAGE:
        return ShiftedCrop(size, data_set.padding, how.interpolation), drawer
    return RandomResizedCrop(transform.transforms[0], size, how.interpolation), drawer


def _evaluation_transform(config: DataConfig, data_set: DataSet) -> T.Compose:
    size, how = config.input_size, config.preprocessing
    interpolation = T.InterpolationMode(how.interpolation)
    if size <= SMALL_IMAGE or not data_set.crops_centre:
        steps = [T.Resize((size, size), interpolation)]
    else:  # with DeiT's crop, the centre 224 of 256 pixels
        steps = [T.Resize(shorter_side(size, how.crop), interpolation), T.CenterCrop(size)]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(how.mean, how.std)])


def _let_posterize_keep_no_bits(
    augment: auto_augment.AutoAugment | auto_augment.RandAugment | auto_augment.AugMixAugment,
) -> None:
    """Replace timm's posterize in this transform by one that also accepts 0 bits to keep.

    DeiT's augmentation draws 0 bits now and then, which newer releases of Pillow refuse.
    """
    policies = augment.policy if isinstance(augment, auto_augment.AutoAugment) else [augment.ops]
    for operation in (operation for operations in policies for operation in operations):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """timm's posterize; without any bits to keep the image is black, as older releases of Pillow made it."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)
