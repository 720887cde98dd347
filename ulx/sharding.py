"""Which device holds what: a mesh of them, batches split over all, weights over some.

The mesh has two axes, `data` and `fsdp`. A batch is split over both. Weights, their moments and averages are split over
`fsdp` and are the same along `data`: each large array is cut along one of its axes, small ones are kept whole. A
block's weights are put together when the block runs and dropped after it (`ulx.nn.split`), so that a device holds one
block at a time beside its own parts. On one device the mesh is 1 × 1, and nothing is cut or sent.
"""

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ulx.nn.split import WEIGHTS, Split
from ulx.nn.transformer import Stack

__all__ = [
    "AXES",
    "BATCH",
    "WHOLE",
    "bytes_per_device",
    "check_batch",
    "constrained",
    "make_mesh",
    "mean_gradients",
    "on_host",
    "on_own_devices",
    "parts",
    "place",
    "place_batch",
    "place_rows",
    "specs",
]

AXES = ("data", WEIGHTS)
BATCH, WHOLE = PartitionSpec(AXES), PartitionSpec()
"""How an array with an entry per example is split, and one that every device has."""
SMALLEST = 2**14
"""Numbers in the smallest array that is cut: below, sending it takes longer than it takes room."""

Tree = TypeVar("Tree", bound=PyTree)


def make_mesh(fsdp: int = 1, devices: Iterable[Any] | None = None) -> Mesh:
    """All devices of all processes (or those given), `fsdp` of them to a copy of the weights.

    Raises ValueError if the number of devices is no multiple of `fsdp`.
    """
    found = np.array(jax.devices() if devices is None else list(devices))
    if fsdp < 1 or len(found) % fsdp:
        raise ValueError(f"fsdp={fsdp} does not divide the number of devices, {len(found)}")
    return Mesh(found.reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def specs(tree: PyTree, fsdp: int) -> PyTree:
    """How every array of a tree is cut among `fsdp` devices: a PartitionSpec in its place, None in place of anything
    else.

    A tree is a module, its weights' gradients, or a whole training state. An array is cut along its longest axis of
    those that `fsdp` divides, the last of equals; never along the axis of a stack's layers, which is scanned over.
    """

    def spec(leaf: Any, first: int) -> PartitionSpec | None:
        if not hasattr(leaf, "shape"):
            return None
        axes = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % fsdp == 0]
        if fsdp == 1 or math.prod(leaf.shape[first:]) < SMALLEST or not axes:
            return WHOLE
        longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return PartitionSpec(*(WEIGHTS if axis == longest else None for axis in range(leaf.ndim)))

    def of_node(node: Any) -> PyTree:
        first = 1 if isinstance(node, Stack) else 0
        return jax.tree.map(lambda leaf: spec(leaf, first), node)

    return jax.tree.map(of_node, tree, is_leaf=lambda node: isinstance(node, Stack))


def bytes_per_device(tree: PyTree, fsdp: int = 1) -> int:
    """What each of `fsdp` devices holds of the arrays of a tree, or of their shapes, that is cut by `specs`."""

    def held(leaf: Any, spec: PartitionSpec | None) -> int:
        if spec is None or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return 0
        return leaf.size * np.dtype(leaf.dtype).itemsize // (fsdp if WEIGHTS in spec else 1)

    return sum(jax.tree.leaves(jax.tree.map(held, tree, specs(tree, fsdp))))


def place(tree: Tree, mesh: Mesh) -> Tree:
    """The tree with its arrays on the mesh, cut by `specs`."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, _shardings(arrays, mesh)), rest)


def constrained(tree: Tree, mesh: Mesh) -> Tree:
    """Under `jax.jit`: the same tree, its arrays cut by `specs`."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.with_sharding_constraint(arrays, _shardings(arrays, mesh)), rest)


def _shardings(arrays: PyTree, mesh: Mesh) -> PyTree:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(arrays, mesh.shape[WEIGHTS]))


def check_batch(size: int, mesh: Mesh, *, pieces: int = 1, of: str) -> None:
    """Raises ValueError for a batch of a stage that cannot be divided evenly, each device's part in so many pieces."""
    if size % (mesh.size * pieces):
        devices = f"{mesh.size} device{'s' * (mesh.size > 1)}"
        raise ValueError(
            f"a batch of {size} for {of} cannot be divided among {devices}"
            + (f" in {pieces} pieces each" if pieces > 1 else "")
            + f": make it a multiple of {mesh.size * pieces}"
        )


def place_batch(batch: Tree, mesh: Mesh) -> Tree:
    """A batch's arrays on the mesh, an equal number of examples on each device (see `check_batch`). Of several
    processes each gives its own rows, which `place_rows` does not."""
    sharding = NamedSharding(mesh, BATCH)
    if mesh.is_multi_process:
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)
    return jax.device_put(batch, sharding)


def place_rows(rows: Tree, mesh: Mesh) -> Tree:
    """Arrays that every process has whole, on the mesh, an equal number of rows on each device."""
    sharding = NamedSharding(mesh, BATCH)
    if mesh.is_multi_process:
        return jax.tree.map(lambda array: _own_rows(array, sharding), rows)
    return jax.device_put(rows, sharding)


def _own_rows(array: Any, sharding: NamedSharding) -> Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_host(tree: PyTree) -> PyTree:
    """Arrays on a mesh as NumPy arrays, whole, on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def on_own_devices(tree: Tree) -> Tree:
    """The tree with whole arrays that a process can use without the others. One alone uses them as they are."""
    if jax.process_count() == 1:
        return tree
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(jnp.asarray, on_host(arrays)), rest)


def parts(tree: Tree, tree_specs: PyTree) -> Tree:
    """Inside `jax.shard_map`: a tree of this device's arrays with those that are parts marked as such."""

    def part(spec: PartitionSpec | None, leaf: Any) -> Any:
        if spec is None or WEIGHTS not in spec:
            return leaf
        return Split(leaf, tuple(spec).index(WEIGHTS) - leaf.ndim)

    return jax.tree.map(part, tree_specs, tree, is_leaf=lambda spec: spec is None)


def mean_gradients(gradients: Tree, tree_specs: PyTree, mesh: Mesh) -> Tree:
    """Inside `jax.shard_map`: the mean over all devices of gradients of each one's mean loss.

    Those of parts have been summed over `fsdp` when the parts were gathered.
    """

    def mean(gradient: Array, spec: PartitionSpec) -> Array:
        return jax.lax.psum(gradient, "data" if WEIGHTS in spec else AXES) / mesh.size

    return jax.tree.map(mean, gradients, tree_specs)
