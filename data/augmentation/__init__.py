"""Augmentation of whole batches: `draws` on the host, `images` on any device, `kernels` on a GPU."""
