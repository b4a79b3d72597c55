#!/usr/bin/env bash
# The one body of the other train_*.sh scripts: bash scripts/train.sh SIZE VARIANT [main.py's options ...]
#   SIZE      tiny, small or base, of DeiT; swin_tiny or swin_small
#   VARIANT   mxfp4, mxfp4_q_ema or mxfp4_q_ramping
# With DATA_PATH, the directory of ImageNet's train/ and val/: the paper's 90 epochs on all GPUs, 4 of them by its
# recipe. Without it: the same model for one epoch of scikit-learn's digits, to see that everything works.
# NUM_GPUS limits the GPUs. Options at the end override the script's.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "train.sh: error: needs SIZE and VARIANT, such as small mxfp4, got $# arguments" >&2
    exit 2
fi
size="$1" variant="$2"
shift 2
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Paper, appendix: 256 images on each of 4 GPUs at lr 5e-4 for T and S, 128 at 2.5e-4 for B; lr scales with the batch.
# Swin (Liu et al. 2021, A2.1): lr 1e-3 at 1024 images; main.py knows what else differs from DeiT's recipe.
# Q-EMA's beta and Q-Ramping's k2 are the tuned ones.
model="deit_${size}_patch16_224"
case "$size" in
tiny) batch=256 lr=5e-4 beta=0.9983 k2=5 ;;
small) batch=256 lr=5e-4 beta=0.9972 k2=5 ;;
base) batch=128 lr=2.5e-4 beta=0.999 k2=5 ;;
swin_tiny) batch=256 lr=5e-4 beta=0.9975 k2=3 model="${size}_patch4_window7_224" ;;
swin_small) batch=256 lr=5e-4 beta=0.998 k2=4 model="${size}_patch4_window7_224" ;;
*) echo "train.sh: error: SIZE must be tiny, small, base, swin_tiny or swin_small, got $size" >&2 && exit 2 ;;
esac
options=(--model "$model" --quant mxfp4)
case "$variant" in
mxfp4) ;;
mxfp4_q_ema) options+=(--q-ema --q-ema-beta "$beta") ;;
mxfp4_q_ramping) options+=(--q-ramping --q-ramping-k1 16 --q-ramping-k2 "$k2") ;;
*) echo "train.sh: error: VARIANT must be mxfp4, mxfp4_q_ema or mxfp4_q_ramping, got $variant" >&2 && exit 2 ;;
esac

if [ -n "${DATA_PATH:-}" ] && { [ ! -d "$DATA_PATH/train" ] || [ ! -d "$DATA_PATH/val" ]; }; then
    echo "train.sh: error: DATA_PATH must be a directory that holds train/ and val/, got $DATA_PATH" >&2
    exit 2
fi

if [[ ! "${NUM_GPUS:-1}" =~ ^[1-9][0-9]*$ ]]; then
    echo "train.sh: error: NUM_GPUS must be a whole number from 1 on, got $NUM_GPUS; unset it for all GPUs" >&2
    exit 2
fi
source "$root/scripts/setup.sh"
if [ -z "${DATA_PATH:-}" ]; then
    echo "DATA_PATH is not set: one short epoch of $size on scikit-learn's digits at 32 px, not ImageNet."
    echo "For the real run: DATA_PATH=/path/to/imagenet bash $0 $size $variant"
    exec python "$root/main.py" "${options[@]}" --data-set DIGITS --input-size 32 --batch-size 128 --lr 5e-4 --epochs 1 \
        --warmup-epochs 0 "$@"
fi
present="$(python -c 'import torch; print(torch.cuda.device_count())')"
gpus="${NUM_GPUS:-$present}"
if [ "$gpus" -eq 0 ]; then
    echo "train.sh: error: ImageNet training needs a GPU, PyTorch finds none; unset DATA_PATH for a try on the CPU" >&2
    exit 2
fi
# Launching DeiT-S's kernels one by one takes Python longer than running them takes the GPU. Swin has not been tried as a
# CUDA graph; some options do not go with one.
recorded=(--cuda-graph)
case "$present $size $*" in 0* | *swin* | *--fs* | *--checkp* | *--dev*) recorded=() ;; esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # processes share the cores with their loaders
launcher=(python)
if [ "$gpus" -gt 1 ]; then launcher=(torchrun --standalone --nproc_per_node "$gpus"); fi
exec "${launcher[@]}" "$root/main.py" "${options[@]}" --data-set IMNET --data-path "$DATA_PATH" \
    --epochs 90 --batch-size "$batch" --lr "$lr" "${recorded[@]}" "$@"
