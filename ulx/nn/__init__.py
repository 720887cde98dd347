"""Network parts. Layers see the batch: `b n c` for tokens, `b *space c` for images, video and latents.

Written for any number of spatial axes: a patch, or a step down, is one number for all axes or one per axis (`grid`).
"""
