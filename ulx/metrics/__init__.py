"""Measuring images: distances between sets, errors between pairs, and the networks they stand on.

Nothing is imported here; take the module you need:

* `frechet`: `Moments` of features (float64, mergeable, cached) and `frechet_distance` between two of them.
* `efficientnet`: the packaged EfficientNet-lite0, whose Fréchet distance is named `fd_efflite0`. It is not
  FID (that is InceptionV3's name) and the two cannot be compared.
* `inception`: FID's own InceptionV3, with weights from a file that you name; prepared as FID or as Clean-FID.
* `i3d`: the packaged I3D, whose logits FVD compares; `features` takes its videos as it takes images.
* `kernel`: `kernel_distance`, KID's unbiased estimator; on EfficientNet-lite0's features it is `kd_efflite0`.
* `manifold`: `precision_recall` of generated features by balls that reach the third neighbour.
* `features`: any network over any number of images, in batches of one fixed shape, on all of the process's devices.
* `images`: `psnr` and `ssim` per image, and `nearest`, the search for an image's closest one in a reference set.
* `clip`, `clip_score`: CLIP's networks, with weights from a folder that you name, and 100 times the cosine between an
  image and its caption.
* `lpips`: the distance between two images in the packaged VGG16's activations.
* `examples`, `pairs`, `compare`: two folders of images or of videos, errors between files of one name, and all metrics
  on a card (`python -m ulx.metrics DIR_A DIR_B`).
* `copies`: which training image is nearest to each sample, and whether it is one.
* `retrieval`: the nearest training image of a sample, and whether it shows what a prompt named.
* `reference`: moments of data sets, kept from one evaluation to the next. `entries`: a mean with its N and standard
  error, as JSON.
* `layers`: what the networks share.
* `weights`: weight files of torch (old and new format) and pickles of numpy arrays, read by an unpickler that builds
  arrays and nothing else; those of packages checked by sha256.
"""
