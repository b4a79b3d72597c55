"""Facts about models that others wrote: the linears of their blocks, and modules that compute around a linear.

A family says which linears of a model belong to its transformer blocks. A reader is a module that passes the weight of
a linear to a function instead of calling the linear, so that a quantized layer in its place would never run; its entry
makes the module call the layer. One file for each package that models come from:

    base                the two registries
    torch_modules       nn.MultiheadAttention, nn.TransformerEncoder and its layers
    torchvision_models  ViT, Swin, ConvNeXt, MaxViT, MViT
    timm_models         timm's Transformers; nothing there imports timm

A new family is one `register_family` in the file of its package, a new reader one `register_reader`.
"""
