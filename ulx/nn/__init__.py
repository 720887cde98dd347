"""Network parts. Layers see the batch: `b n c` for tokens, `b *space c` for images, video and latents.

Written for any number of spatial axes: a kernel, patch or stride is one number per axis or an int for all.
"""
