"""Export of trained models: 4-bit weights in the formats of other libraries, and the way back.

    python -m quantization.export CHECKPOINT --to DIR --to-format {compressed-tensors,torchao,onnx}

`export_model` does the same for a model in memory, and `load` makes a model of what either has written. Models are made
by timm, by the name in the checkpoint.
"""
