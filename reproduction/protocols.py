"""On what to train, and for how long. Edit the numbers here, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from quantization.recipe import PAPER_BETA


@dataclass(frozen=True)
class Tuning:
    """The options of main.py that `targets.py` leaves open."""

    q_ema_beta: float = PAPER_BETA
    q_ramping_k2: int = 5
    q_ramping_detection: str = "--q-ramping-steps 30"
    dampen: str = "--dampen 0.1 --dampen-reduction kernel_mean"
    """Nagel et al. 2022's weight, in their reduction."""
    freeze: str = "--freeze 0.01"
    """Nagel et al. 2022's final threshold for 4-bit weights."""


@dataclass(frozen=True)
class ModelSettings:
    """The settings with which a protocol trains one of the paper's models."""

    model: str
    """A name for --model."""
    global_batch: int
    """Images per step over all processes."""
    lr: float
    """--lr, at a global batch of 512."""
    options: str = ""
    tuning: Tuning = field(default_factory=Tuning)


@dataclass(frozen=True)
class Protocol:
    description: str
    data_set: str
    epochs: int
    seeds: int
    """Number of seeds by default."""
    setups: dict[str, ModelSettings] = field(hash=False)
    """The setups, by the paper's name of the model. Models with one setup share one column of a report."""
    options: str = ""
    earlier: tuple[str, ...] = ()
    """What `options` were before. Runs that were finished with them count: only their random numbers are others."""
    torchrun: bool = False
    """True if a run takes all GPUs of its job, False if it takes one."""
    needs_gpu: bool = True


# 1,437 images are 5 steps of 287. At 4 px an image is one patch, so that 2 epochs take seconds on a CPU. The second
# epoch is for Q-Ramping, whose first detection comes after the first epoch.
_SMOKE = ModelSettings(
    "deit_micro_patch4_32",
    global_batch=287,
    lr=3.5e-3,
    options="--input-size 4 --warmup-epochs 0",
    tuning=Tuning(q_ramping_detection="--q-ramping-steps 3"),
)
# Chosen by how well bf16 and Microscaling can be told apart, with two seeds on an H200: 1.0 points, and seeds within
# 0.1 of their mean (six seeds on an H100: 1.3 points, 0.3 and 0.5). With Mixup and CutMix it was 1.7 points and 0.3;
# at twice the learning rate, too, 0.8 and 0.1; with a model half as wide 1.5 and 0.5. 2,808 steps are many of Q-EMA's
# horizons (500).
_SMALL = ModelSettings("deit_nano_patch4_32", global_batch=256, lr=4e-3, options="--smoothing 0.1 --cuda-graph")
PROTOCOLS: dict[str, Protocol] = {
    "smoke": Protocol(
        "scikit-learn's digits at 4 px, 2 epochs of 5 steps: shows that every row runs and nothing about accuracy",
        data_set="DIGITS",
        epochs=2,
        seeds=1,
        setups={name: _SMOKE for name in ("DeiT-T", "DeiT-S", "DeiT-B", "Swin-T", "Swin-S")},
        needs_gpu=False,
    ),
    "small": Protocol(
        "Fashion-MNIST at 32 px, 12 epochs, a DeiT 64 wide with 6 blocks, on a GPU",
        data_set="FASHION",
        epochs=12,
        seeds=3,
        setups={name: _SMALL for name in ("DeiT-T", "DeiT-S", "DeiT-B")},
        options="--augment-on gpu",
        earlier=("--num-workers 1",),  # batches came from a loader process on the CPU
    ),
    "imagenet": Protocol(
        "ImageNet-1k at 224 px, 90 epochs, the paper's models, batch sizes and tuned parameters",
        data_set="IMNET",
        epochs=90,
        seeds=1,
        setups={
            "DeiT-T": ModelSettings("deit_tiny_patch16_224", 1024, 5e-4, "--cuda-graph", Tuning(0.9983)),
            "DeiT-S": ModelSettings("deit_small_patch16_224", 1024, 5e-4, "--cuda-graph", Tuning(0.9972)),
            "DeiT-B": ModelSettings("deit_base_patch16_224", 512, 2.5e-4, "--cuda-graph", Tuning(0.999)),
            "Swin-T": ModelSettings("swin_tiny_patch4_window7_224", 1024, 5e-4, tuning=Tuning(0.9975, q_ramping_k2=3)),
            "Swin-S": ModelSettings("swin_small_patch4_window7_224", 1024, 5e-4, tuning=Tuning(0.998, q_ramping_k2=4)),
        },
        torchrun=True,
    ),
}
PROTOCOLS["long"] = replace(
    PROTOCOLS["small"],
    description="small for 36 epochs: whether the answers to oscillation gain when training is longer",
    epochs=36,
)
