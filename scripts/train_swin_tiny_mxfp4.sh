#!/usr/bin/env bash
# scripts/train.sh says what this does and what DATA_PATH changes.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" swin_tiny mxfp4 "$@"
